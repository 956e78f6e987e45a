"""Han: the noise's descent, and algorithm 1 (the adjustments and the guidance that waits)."""

from dataclasses import replace

import pytest
import torch
from tiny_pipelines import tiny_sd

from lethebench.errors import UserError
from lethebench.hooks import ImageKey, Prediction, SamplerHooks
from lethebench.magnitude import FirstStep, magnitudes
from lethebench.method import Artefact, Task, configure
from lethebench.methods.han import Han
from lethebench.prompts import Prompt, Role
from lethebench.sampler import encode_prompts, prepare, sample
from lethebench.specs import SamplerSettings
from lethebench.zoo import wrap

SETTINGS = SamplerSettings(num_inference_steps=4, guidance_scale=4.0, height=32, width=32)
TEXTS = ("a red star", "a blue circle in a city", "a striped captain", "")
KEYS = [ImageKey("test@1", Prompt(str(i), t, Role.NEUTRAL, str(i)), 0) for i, t in enumerate(TEXTS)]
BATCH_WISE = Han(mode="batch-wise")


def batch_of(model, keys=KEYS, settings=SETTINGS):
    return prepare(model, keys, settings)


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


def started(method, batch):
    with torch.no_grad(), method.apply(batch.model, Artefact()) as hooks:
        return hooks.start(batch)


def to(target, **settings):
    return Han(unit="absolute", target=target, **settings)


def reached(batch):
    with torch.no_grad():
        return magnitudes(FirstStep(batch).difference())


def drawn(model, method, keys=KEYS, settings=SETTINGS, batch_size=4):
    with method.apply(model, Artefact()) as hooks:
        return torch.from_numpy(sample(model, keys, settings, [hooks], batch_size=batch_size).latents)


def toy(batch):
    """The batch with d(x) = tanh(A x) in float64."""
    matrix = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double()
    noise = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).double()

    def d(x):
        return torch.tanh(x @ matrix.T)

    def predict(latents, time, conditioning):
        return Prediction(d(latents), torch.zeros_like(latents), d(latents))

    return replace(batch, noise=noise, predict=predict), d


# --- per sample -----------------------------------------------------------------------------------


def test_one_step_by_hand(batch):
    fake, d = toy(batch)
    x = fake.noise
    size = [(d(x + e).norm(dim=1) - d(x - e).norm(dim=1)) / 2e-5 for e in 1e-5 * torch.eye(6).double()]
    slopes = torch.stack(size, dim=1)
    found = started(to(0.0, iterations=1, lr=0.01), fake).noise
    wanted = x * (1 - 0.01 * 0.01) - 0.01 * slopes / (slopes.abs() + 1e-8)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8)


def test_two_steps_are_torchs_adamw(batch):
    fake, d = toy(batch)
    own = fake.noise.clone().requires_grad_()
    adamw = torch.optim.AdamW([own], lr=0.01)
    for _ in range(2):
        adamw.zero_grad()
        d(own).norm(dim=1).sum().backward()
        adamw.step()
    torch.testing.assert_close(started(to(0.0, iterations=2), fake).noise, own.detach())


def test_a_lower_target_gives_a_lower_magnitude_and_is_reached(batch):
    before = reached(batch)
    last = before
    for share in (0.9, 0.8):
        target = share * float(before[:3].min())
        after = reached(started(to(target, iterations=60, lr=0.03), batch))
        assert (after[:3] <= target * (1 + 1e-5)).all() and (after[:3] < last[:3]).all()
        last = after


def test_images_below_the_target_are_left_alone_and_others_have_no_part(batch):
    before = reached(batch)
    method = to(1.001 * float(before[:3].median()))  # batches differ by rounding
    found = started(method, batch)
    same = (found.noise == batch.noise).flatten(1).all(dim=1)
    assert same.tolist() == (before <= method.target).tolist() and same.sum() == 3
    assert found.conditioning is batch.conditioning
    for row, key in enumerate(KEYS):
        alone = started(method, batch_of(batch.model, [key])).noise
        torch.testing.assert_close(found.noise[row], alone[0], atol=1e-3, rtol=0)


# --- batch-wise -----------------------------------------------------------------------------------


def test_algorithm_1_by_hand(batch):
    fake, d = toy(batch)
    x, rho = fake.noise, 50.0 * 6**0.5 / 128
    for _ in range(2):
        here = d(x)
        x = x - 0.7 * (d(x + rho * here / here.norm(dim=1, keepdim=True)) - here)
    torch.testing.assert_close(started(BATCH_WISE, fake).noise, x)


def test_guidance_waits_until_the_timestep_is_at_tau(model):
    """Against the unconditional prediction by a hook of the test's own: the first two of four steps."""

    class Waits(SamplerHooks):
        def guidance(self, combined, unconditional, conditional, step):
            return unconditional if step.index < 2 else combined

    times = batch_of(model).timesteps.tolist()
    method = replace(BATCH_WISE, adjustments=0, tau=times[2])
    wanted = torch.from_numpy(sample(model, KEYS, SETTINGS, [Waits()]).latents)
    assert torch.equal(drawn(model, method), wanted)
    later = replace(method, tau=times[1])
    assert not torch.equal(drawn(model, later), wanted)


def test_the_papers_tau_is_its_steps():
    """Fifty DDIM steps: guidance off in the first five (steps 0 to 4 of the released code)."""
    model, settings = wrap(tiny_sd()), SETTINGS.model_copy(update={"num_inference_steps": 50})
    times = batch_of(model, KEYS[:1], settings).timesteps
    assert int((times > BATCH_WISE.tau).sum()) == 5


def test_no_adjustment_and_no_waiting_is_base(model):
    off = replace(BATCH_WISE, adjustments=0, tau=1000.0)
    assert torch.equal(drawn(model, off), torch.from_numpy(sample(model, KEYS, SETTINGS).latents))
    nearly = replace(off, adjustments=2, gamma=1e-6)
    torch.testing.assert_close(drawn(model, nearly), drawn(model, off), atol=1e-3, rtol=0)


def test_an_image_does_not_depend_on_its_neighbours(model):
    together, alone = drawn(model, BATCH_WISE), drawn(model, BATCH_WISE, batch_size=1)
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=0)


def test_without_guidance_the_empty_prompt_takes_the_prompts_place(make_model):
    model = make_model("flux")
    settings = SETTINGS.model_copy(update={"height": 16, "width": 16})
    always = replace(BATCH_WISE, adjustments=0, tau=0.0)
    empty = [replace(key, prompt=replace(key.prompt, text="")) for key in KEYS]
    wanted = torch.from_numpy(sample(model, empty, settings).latents)
    torch.testing.assert_close(drawn(model, always, settings=settings), wanted, atol=1e-5, rtol=1e-5)
    assert encode_prompts(model, [""], settings).negative is None


# --- both -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("mode", Han.modes)
def test_every_family(make_model, make_task, family, mode):
    model = make_model(family)
    method = Han(mode=mode, target=0.3, neutral_prompts=4, iterations=10)
    task = make_task(method, model)
    artefact = method.fit(task)
    with method.apply(model, artefact) as hooks:
        images = sample(model, KEYS[:3], task.sampler, [hooks]).latents
        batch = prepare(task.model, KEYS[:3], task.sampler)
        with torch.no_grad():
            after = hooks.start(batch)
    assert (images != sample(model, KEYS[:3], task.sampler).latents).any()
    if mode == "per-sample":
        assert (reached(after) < reached(batch)).all()
    assert all(p.grad is None for p in model.denoiser.parameters())


def test_what_it_sees():
    assert Han().sees == Han.knowledge
    assert not Han(mode="batch-wise").sees and not Han(unit="absolute").sees
    assert not BATCH_WISE.fit(Task(None, SETTINGS, None, BATCH_WISE.sees)).tensors


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "batch"}, "mode is per-sample or batch-wise, not 'batch'"),
        ({"adjustments": -1}, "adjustments must be at least 0, not -1"),
        ({"gamma": -0.5}, "gamma must be at least 0, not -0.5"),
        ({"rho": -1.0}, "rho must be at least 0, not -1.0"),
        ({"unit": "loss"}, "unit is neutral or absolute, not 'loss'"),
        ({"target": -0.1}, "target must be at least 0, not -0.1"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings, words):
    with pytest.raises(UserError) as error:
        configure(Han, "weak", settings)
    assert words in str(error.value) and "\n" not in str(error.value)
