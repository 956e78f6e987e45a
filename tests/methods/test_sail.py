"""SAIL: its sharpness in closed form, the noise's gradient and step, and its contract with the batch."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny_pipelines import tiny_sd

from lethebench.errors import UserError
from lethebench.hooks import ImageKey, Prediction
from lethebench.magnitude import FirstStep, magnitudes
from lethebench.method import Artefact, configure
from lethebench.methods.sail import SAIL
from lethebench.methods.sail.hooks import sharpness
from lethebench.prompts import Prompt, Role
from lethebench.sampler import prepare, sample
from lethebench.specs import SamplerSettings
from lethebench.zoo import wrap

SETTINGS = SamplerSettings(num_inference_steps=4, guidance_scale=4.0, height=32, width=32)
TEXTS = ("a red star", "a blue circle in a city", "a striped captain", "")
KEYS = [ImageKey("test@1", Prompt(str(i), t, Role.NEUTRAL, str(i)), 0) for i, t in enumerate(TEXTS)]
OBJECTIVES = SAIL.objectives


def batch_of(model, keys=KEYS):
    return prepare(model, keys, SETTINGS)


@pytest.fixture(scope="module")
def model():
    pipe = tiny_sd()
    with torch.no_grad():  # random weights hardly listen to the text
        for name, parameter in pipe.unet.named_parameters():
            if ".attn2.to_v" in name or ".attn2.to_out" in name:
                parameter.mul_(4)
    return wrap(pipe)


@pytest.fixture(scope="module")
def batch(model):
    return batch_of(model)


def started(method, batch, target):
    with torch.no_grad(), replace(method, unit="absolute", target=target).apply(batch.model, Artefact()) as h:
        return h.start(batch)


def reached(batch, objective="paper", delta=1.0):
    with torch.no_grad():
        return sharpness(FirstStep(batch).difference, batch.noise, objective, delta)


class Linear:
    """d(x) = A x of images [B, n]: its sharpness |A A x| for any delta."""

    def __init__(self, size=6):
        self.matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).double()

    def __call__(self, x, rows=None):
        return x @ self.matrix.T


def toy(batch):
    """The batch with that difference in float64, and the empty prompt's image without any."""
    linear, noise = Linear(), torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).double()

    def predict(latents, time, conditioning):
        words = (conditioning.embeds != conditioning.negative.embeds).any(dim=2).any(dim=1)
        conditional = linear(latents) * words[:, None]
        return Prediction(conditional, torch.zeros_like(latents), conditional)

    return replace(batch, noise=noise, predict=predict), linear.matrix


@pytest.mark.parametrize("delta", [0.01, 1.0, 7.0])
def test_the_papers_sharpness_is_the_hessian_difference_times_the_score_difference(delta):
    linear, x = Linear(), torch.randn(3, 6, generator=torch.Generator().manual_seed(1)).double()
    wanted = (linear(linear(x))).norm(dim=1)
    torch.testing.assert_close(sharpness(linear, x, "paper", delta), wanted, rtol=1e-10, atol=0)


def test_the_released_one_is_the_magnitude_after_a_step_along_it():
    linear, x = Linear(), torch.randn(3, 6, generator=torch.Generator().manual_seed(1)).double()
    here = linear(x)
    wanted = linear(x + 2 * here / here.norm(dim=1, keepdim=True)).norm(dim=1)
    torch.testing.assert_close(sharpness(linear, x, "released", 2.0), wanted)


def test_without_a_difference_there_is_no_sharpness_and_no_nan(batch):
    for objective in OBJECTIVES:
        x = torch.ones(2, 3, requires_grad=True)
        value = sharpness(lambda x: x * 0, x, objective, 1.0)
        (gradient,) = torch.autograd.grad(value.sum(), x)
        assert not value.any() and not gradient.any()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_step_by_hand(batch, objective):
    """The gradient by finite differences of the loss as it reads, then Adam's first step: lr g / (|g| + eps)."""
    fake, matrix = toy(batch)
    alpha, x = 0.05, fake.noise

    def loss(x):
        d = x @ matrix.T
        u = d / d.norm(dim=1, keepdim=True)
        if objective == "released":
            return ((x + u) @ matrix.T).norm(dim=1) + alpha * x.norm(dim=1)
        return (d.norm(dim=1) * ((x - u) @ matrix.T - d).norm(dim=1)) ** 2 + alpha * x.norm(dim=1) ** 2

    slopes = torch.stack([(loss(x + e) - loss(x - e)) / 2e-5 for e in 1e-5 * torch.eye(6).double()], dim=1)
    found = started(SAIL(objective=objective, alpha=alpha, iterations=1), fake, 0.0).noise
    wanted = x - 0.05 * slopes / (slopes.abs() + 1e-8)
    torch.testing.assert_close(found[:3], wanted[:3], rtol=0, atol=1e-7)
    assert torch.equal(found[3], x[3]), "the empty prompt has no difference"


def test_the_gradient_through_the_denoiser(batch):
    """Of the whole loss in float64, the direction of the perturbation included."""
    unet = tiny_sd().unet.requires_grad_(False).double()
    embeds, negative = (c.embeds[:2].double() for c in (batch.conditioning, batch.conditioning.negative))
    time, x = batch.timesteps[0], batch.noise[:2].double()

    def difference(x):
        both = unet(torch.cat([x, x]), time, torch.cat([negative, embeds]), return_dict=False)[0]
        return both[2:] - both[:2]

    for objective in OBJECTIVES:
        value = partial(sharpness, difference, objective=objective, delta=1.0)
        moved = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(moved).sum(), moved)
        along = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        with torch.no_grad():
            slope = (value(x + 1e-4 * along) - value(x - 1e-4 * along)) / 2e-4
        torch.testing.assert_close((gradient * along).flatten(1).sum(dim=1), slope, rtol=1e-5, atol=1e-10)


def test_the_norm_term_keeps_the_noise_small(batch):
    """A weight that outweighs the sharpness makes the noise shorter."""
    sizes = [
        float(magnitudes(started(SAIL(alpha=alpha), batch, 0.0).noise)[:3].mean()) for alpha in (0.0, 1.0)
    ]
    assert sizes[1] < sizes[0] - 0.5


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_lower_target_gives_a_lower_sharpness(batch, objective):
    method = SAIL(objective=objective, alpha=0.0, lr=0.02, iterations=12)
    before = reached(batch, objective)
    highest = int(before.argmax())
    last = before
    for share in (0.95, 0.85):
        target = share * float(before.max())
        after = reached(started(method, batch, target), objective)
        assert after[highest] <= target * (1 + 1e-5) and (after <= last).all()
        assert after[highest] < last[highest]
        last = after


def test_images_below_the_target_are_left_alone_and_others_have_no_part(batch):
    before = reached(batch)
    target = 1.001 * float(before[:3].median())  # batches differ by rounding
    found = started(SAIL(), batch, target)
    same = (found.noise == batch.noise).flatten(1).all(dim=1)
    assert same.tolist() == (before <= target).tolist() and same.sum() == 3
    assert found.conditioning is batch.conditioning
    for row, key in enumerate(KEYS):
        alone = started(SAIL(), batch_of(batch.model, [key]), target).noise
        torch.testing.assert_close(found.noise[row], alone[0], atol=1e-3, rtol=0)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_every_family(make_model, make_task, family):
    model = make_model(family)
    method = SAIL(target=0.5, alpha=0.0, neutral_prompts=4, lr=0.02)
    task = make_task(method, model)
    artefact = method.fit(task)
    with method.apply(model, artefact) as hooks:
        drawn = sample(model, KEYS[:3], task.sampler, [hooks]).latents
        batch = prepare(task.model, KEYS[:3], task.sampler)
        with torch.no_grad():
            after = hooks.start(batch)
    assert (reached(after) <= reached(batch)).all() and (reached(after) < reached(batch)).any()
    assert (drawn != sample(model, KEYS[:3], task.sampler).latents).any()
    assert all(p.grad is None for p in model.denoiser.parameters())


def test_targets_count_in_the_neutral_median_of_the_objective(model, make_task):
    medians = []
    for objective in OBJECTIVES:
        method = SAIL(objective=objective, neutral_prompts=5)
        artefact = method.fit(make_task(method, model))
        assert artefact.facts["neutral_median"] == pytest.approx(float(artefact.tensors["neutral"][2]))
        medians.append(artefact.facts["neutral_median"])
    assert medians[0] != medians[1]
    assert not SAIL(unit="absolute").sees and SAIL().sees


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"objective": "wen"}, "objective is paper or released, not 'wen'"),
        ({"delta": 0.0}, "delta must be above 0, not 0.0"),
        ({"alpha": -0.1}, "alpha must be at least 0, not -0.1"),
        ({"unit": "loss"}, "unit is neutral or absolute, not 'loss'"),
        ({"iterations": -1}, "iterations must be at least 0, not -1"),
        ({"lr": -0.1}, "lr must be above 0, not -0.1"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings, words):
    with pytest.raises(UserError) as error:
        configure(SAIL, "weak", settings)
    assert words in str(error.value) and "\n" not in str(error.value)
