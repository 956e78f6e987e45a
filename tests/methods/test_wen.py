"""Wen: the magnitude of the first step, the descent that wen, sail and han share, and the embedding's."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny_pipelines import PIPELINES, tiny_sd

from lethebench.errors import UserError
from lethebench.hooks import ImageKey, Prediction
from lethebench.magnitude import FirstStep, calibrated, descend, limit, magnitudes, unit_vectors
from lethebench.method import Artefact, Task, configure
from lethebench.methods.wen import Wen
from lethebench.prompts import Prompt, Role
from lethebench.sampler import encode_prompts, prepare, sample
from lethebench.seeding import generator
from lethebench.specs import SamplerSettings
from lethebench.zoo import wrap

SETTINGS = SamplerSettings(num_inference_steps=4, guidance_scale=4.0, height=32, width=32)
TEXTS = ("a red star", "a blue circle in a city", "a striped captain", "")
KEYS = [ImageKey("test@1", Prompt(str(i), t, Role.NEUTRAL, str(i)), 0) for i, t in enumerate(TEXTS)]
SGD = partial(torch.optim.SGD, lr=0.1)


def batch_of(model, keys=KEYS, settings=SETTINGS):
    return prepare(model, keys, settings)


def strong(pipe):
    """Text that matters: random weights hardly listen to it."""
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if ".attn2.to_v" in name or ".attn2.to_out" in name:
                parameter.mul_(4)
    return pipe


@pytest.fixture(scope="module")
def model():
    return wrap(strong(tiny_sd()))


@pytest.fixture(scope="module")
def batch(model):
    return batch_of(model)


def double(batch):
    """The batch in float64, its UNet called without the sampler's casts."""
    unet = strong(tiny_sd()).unet.requires_grad_(False).double()

    def predict(latents, time, conditioning):
        embeds = torch.cat([conditioning.negative.embeds, conditioning.embeds])
        halves = unet(torch.cat([latents, latents]), time, embeds, return_dict=False)[0].chunk(2)
        return Prediction(halves[1], *halves)

    def wide(conditioning):
        negative = conditioning.negative
        return replace(
            conditioning, embeds=conditioning.embeds.double(), negative=negative and wide(negative)
        )

    return replace(batch, noise=batch.noise.double(), conditioning=wide(batch.conditioning), predict=predict)


def started(method, batch, target):
    """What the method's hook makes of a batch at an absolute target."""
    with torch.no_grad(), replace(method, unit="absolute", target=target).apply(batch.model, Artefact()) as h:
        return h.start(batch)


def reached(batch):
    with torch.no_grad():
        return magnitudes(FirstStep(batch).difference())


# --- the magnitude --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["sd", "sd-v", "sd-pndm", "sd-euler", "sd-dpm", "sdxl", "sd3", "sd3-dynamic"]
)
def test_it_is_the_samplers_noise_norm(name):
    model = wrap(PIPELINES[name]())
    norms = torch.from_numpy(sample(model, KEYS, SETTINGS).noise_norm[:, 0])
    torch.testing.assert_close(reached(batch_of(model)), norms, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["flux-schnell", "flux-dev", "sd"])
def test_without_guidance_the_empty_prompt_is_asked_for(name):
    model, settings = wrap(PIPELINES[name]()), SETTINGS.model_copy(update={"guidance_scale": 1.0})
    batch = batch_of(model, settings=settings)
    assert batch.conditioning.negative is None
    empty = encode_prompts(model, [""] * len(KEYS), settings)
    latents = batch.scale(batch.noise, batch.timesteps[0])
    with torch.no_grad():
        with_text, without = (
            batch.predict(latents, batch.timesteps[0], c).conditional for c in (batch.conditioning, empty)
        )
    torch.testing.assert_close(reached(batch), magnitudes(with_text - without), rtol=1e-4, atol=1e-6)
    assert reached(batch)[3] < 1e-5 < reached(batch)[0]


def test_the_released_loss_grows_with_the_square_root_of_the_images(model):
    """The norm over all images' tensor, n times the same image; ours is each image's own."""
    alone = reached(batch_of(model, KEYS[:1]))
    for count in (4, 9):
        difference = FirstStep(batch_of(model, KEYS[:1] * count)).difference().detach()
        assert float(difference.norm() / alone) == pytest.approx(math.sqrt(count), rel=1e-5)
        torch.testing.assert_close(magnitudes(difference), alone.expand(count))


def test_unit_vectors():
    found = unit_vectors(torch.stack([torch.full((2, 2), 3.0), torch.zeros(2, 2)]))
    assert found[0].norm() == 1 and not found[1].any()


# --- the descent ----------------------------------------------------------------------------------


def halves(rows, x):
    """Each image's value |x|^2, down which SGD at 0.1 multiplies x by 0.8."""
    found = (x**2).flatten(1).sum(dim=1)
    return found, found


def test_each_image_stops_on_its_own():
    start = torch.tensor([[0.5], [1.0], [2.0], [100.0]])
    found = descend(start, halves, 1.0, 5, SGD)
    steps = torch.tensor([[0.0], [0.0], [4.0], [5.0]])
    torch.testing.assert_close(found, start * 0.8**steps)
    assert (found[:2] == start[:2]).all()


def test_only_those_that_move_are_asked_for():
    asked = []

    def ask(rows, x):
        asked.append(list(rows))
        return halves(rows, x)

    descend(torch.tensor([[0.5], [1.2], [2.0]]), ask, 1.0, 3, SGD)
    assert asked == [[0, 1, 2], [1, 2], [1, 2], [2]]
    asked.clear()
    start = torch.tensor([[2.0]])
    assert torch.equal(descend(start, ask, 1.0, 0, SGD), start) and not asked


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_finished_image_is_kept_bit_for_bit(dtype):
    start = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    start[1] *= 10
    found = descend(start, halves, 20.0, 2, partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5))
    assert found.dtype == dtype and (found[[0, 2]] == start[[0, 2]]).all() and (found[1] != start[1]).all()


# --- the embedding --------------------------------------------------------------------------------


def test_the_gradient_against_finite_differences_and_one_step_by_hand(batch):
    wide = double(batch)
    embeds = wide.conditioning.embeds
    first, lr, decay = FirstStep(wide), 0.05, 0.01

    def value(changed):
        with torch.no_grad():
            return magnitudes(first.difference(embeds=changed))

    draws = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        moved = embeds.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(magnitudes(first.difference(embeds=moved))[:3].sum(), moved)
    for _ in range(3):
        along = torch.randn(embeds.shape, generator=draws, dtype=torch.float64)
        slope = (value(embeds + 1e-5 * along) - value(embeds - 1e-5 * along)) / 2e-5
        torch.testing.assert_close((gradient * along).sum(dim=(1, 2))[:3], slope[:3], rtol=1e-6, atol=1e-9)
    found = started(Wen(iterations=1), wide, 0.0).conditioning.embeds
    gradient[:, 0] = 0
    wanted = embeds * (1 - lr * decay) - lr * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(found[:3], wanted[:3], rtol=0, atol=1e-9)
    assert torch.equal(found[3], embeds[3]), "the empty prompt has no magnitude"


def test_weight_decay_alone_moves_the_first_token(batch):
    for decay in (0.0, 0.01):
        found = started(Wen(weight_decay=decay), batch, 0.0).conditioning.embeds[0, 0]
        torch.testing.assert_close(found, batch.conditioning.embeds[0, 0] * (1 - 0.05 * decay) ** 10)


def test_a_lower_target_gives_a_lower_magnitude_and_is_reached(batch):
    before = reached(batch)
    assert (before[:3] > 0.1).all()
    last = before
    for share in (0.9, 0.7, 0.5):
        target = share * float(before[:3].min())
        after = reached(started(Wen(iterations=60, lr=0.01), batch, target))
        assert (after[:3] <= target * (1 + 1e-5)).all() and (after[:3] < last[:3]).all()
        last = after


def test_images_below_the_target_are_left_alone(batch):
    before = reached(batch)
    target = float(before[:3].median())
    found = started(Wen(), batch, target).conditioning
    same = (found.embeds == batch.conditioning.embeds).all(dim=2).all(dim=1)
    assert same.tolist() == (before <= target).tolist() and same.sum() == 3
    assert found.negative is batch.conditioning.negative


def test_an_image_does_not_depend_on_its_neighbours(batch):
    target = 0.8 * float(reached(batch).max())
    together = started(Wen(lr=0.02), batch, target).conditioning.embeds
    for row, key in enumerate(KEYS):
        alone = started(Wen(lr=0.02), batch_of(batch.model, [key]), target).conditioning.embeds
        torch.testing.assert_close(together[row], alone[0], atol=2e-4, rtol=0)


def test_no_iterations_ask_nothing(batch):
    calls = []
    handle = batch.model.denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        found = started(Wen(iterations=0), batch, 0.0)
    finally:
        handle.remove()
    assert torch.equal(found.conditioning.embeds, batch.conditioning.embeds) and not calls


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_every_family(make_model, make_task, family):
    model = make_model(family)
    method = Wen(target=0.3, neutral_prompts=4, lr=0.02)
    task = make_task(method, model)
    artefact = method.fit(task)
    with method.apply(model, artefact) as hooks:
        drawn = sample(model, KEYS[:3], task.sampler, [hooks]).latents
        batch = prepare(task.model, KEYS[:3], task.sampler)
        with torch.no_grad():
            after = hooks.start(batch)
    assert (reached(after) < reached(batch)).all()
    assert (after.conditioning.negative is None) == (family == "flux")
    assert (drawn != sample(model, KEYS[:3], task.sampler).latents).any()
    assert all(p.grad is None and not p.requires_grad for p in model.denoiser.parameters())
    begin = (after.conditioning.embeds - batch.conditioning.embeds)[:, 0].abs().max()
    assert (begin > 0.01) == (family == "flux")


# --- the target -----------------------------------------------------------------------------------


def test_targets_count_in_the_neutral_median(model, make_task):
    method = Wen(neutral_prompts=5, batch_size=2)
    task = make_task(method, model)
    artefact = method.fit(task)
    draws = task.shared_generator("magnitude")
    texts = [task.neutral_prompts()[i] for i in torch.randperm(9, generator=draws)[:5]]
    suite = f"neutral-{int(torch.randint(2**62, (1,), generator=draws))}"
    wanted = []
    for i, text in enumerate(texts):
        batch = batch_of(model, [ImageKey(suite, Prompt(str(i), text, Role.NEUTRAL, ""), 0)], task.sampler)
        noise = torch.randn(batch.noise.shape[1:], generator=generator("noise", suite, str(i), 0))
        assert torch.equal(batch.noise[0], noise)
        wanted.append(float(reached(batch)))
    torch.testing.assert_close(artefact.tensors["neutral"], torch.tensor(sorted(wanted)), rtol=1e-4, atol=0)
    middle = sorted(wanted)[2]
    assert artefact.facts["neutral_median"] == pytest.approx(middle, rel=1e-4)
    assert artefact.facts["neutral_prompts"] == 5
    assert limit(0.5, "neutral", artefact) == pytest.approx(0.5 * middle, rel=1e-4)


def test_an_absolute_target_needs_no_prompts(model):
    method = Wen(unit="absolute", target=3.0)
    assert not method.sees
    task = Task(model, SETTINGS, None, method.sees)
    artefact = method.fit(task)
    assert not artefact.tensors and limit(method.target, method.unit, artefact) == 3.0


def test_without_neutral_prompts_one_clear_line(model):
    class Bare:
        def training_prompts(self):
            return []

    with pytest.raises(UserError, match="no neutral prompts to fit on"):
        Wen().fit(Task(model, SETTINGS, Bare(), Wen.knowledge, seed_parts=("test",)))


def test_calibration_leaves_no_gradients(model, make_task):
    task = make_task(Wen(), model)
    found = calibrated(task, 3, 2, lambda first: magnitudes(first.difference()))
    assert not found.tensors["neutral"].requires_grad


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"unit": "median"}, "unit is neutral or absolute, not 'median'"),
        ({"target": -1.0}, "target must be at least 0, not -1.0"),
        ({"lr": 0.0}, "lr must be above 0, not 0.0"),
        ({"iterations": -1}, "iterations must be at least 0, not -1"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, not -0.1"),
        ({"neutral_prompts": 0}, "neutral_prompts must be at least 1, not 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"target": "low"}, "target is a number, not 'low'"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings, words):
    with pytest.raises(UserError) as error:
        configure(Wen, "weak", settings)
    assert words in str(error.value) and "\n" not in str(error.value)
