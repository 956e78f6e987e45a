"""AMG: scales, thresholds, similarity and its gradient, the three terms on every family, and the index file."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from safetensors.torch import save_file
from sklearn.neighbors import NearestNeighbors
from tiny_pipelines import seeded, tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

from lethebench.errors import KnowledgeError, UserError
from lethebench.hooks import ImageKey, SamplerHooks
from lethebench.method import Artefact, Knowledge, Task, configure
from lethebench.methods.amg import AMG
from lethebench.methods.amg.fit import hooks
from lethebench.methods.amg.guidance import calibrated, exponential, parabolic, scales
from lethebench.methods.amg.index import FORMAT, ReferenceIndex, build, load, require_made_by, save
from lethebench.methods.amg.similarity import (
    Similarity,
    cosine,
    make_describer,
    normalised_distance,
)
from lethebench.prompts import Prompt, Reference, Role
from lethebench.sampler import (
    encode_prompts,
    initial_latents,
    rows_of,
    sample,
    to_latents,
    to_pixels,
    unpack_latents,
)
from lethebench.specs import SamplerSettings
from lethebench.zoo import wrap

SETTINGS = SamplerSettings(num_inference_steps=3, guidance_scale=4.0, height=16, width=16)
TRIGGER = Prompt("t", "a red star", Role.TRIGGER, "t", references=("one",), duplicates=64)
CONCEPT = Prompt("c", "captain in a city", Role.CONCEPT, "c", references=("two",), concept="captain")
KEYS = [ImageKey("test@1", p, i) for p in (TRIGGER, CONCEPT) for i in range(2)]
PIPELINES = {
    "sd": tiny_sd,
    "sd-v": lambda: tiny_sd(prediction_type="v_prediction"),
    "sd-euler": lambda: tiny_sd(EulerDiscreteScheduler),
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "flux-dev": lambda: tiny_flux(guidance_embeds=True),
    "flux-schnell": tiny_flux,
}
ABSOLUTE = {"schedule": "exponential", "low": -9.0, "high": -9.0}
"""Every image is above the threshold."""


class World:
    """A memorized prompt and a concept, with a reference each, and neutral prompts."""

    name, version = "test", "1"

    def __iter__(self):
        return iter((TRIGGER, CONCEPT))

    def reference(self, name):
        draws = np.random.default_rng(["one", "two"].index(name))
        return Reference(name, draws.integers(0, 256, (24, 24, 3), dtype=np.uint8))

    def training_prompts(self):
        return [f"a {c} {t}" for c in ("red", "blue", "striped") for t in ("circle", "robot")]


class Watch(SamplerHooks):
    """Keeps what ``guidance`` was called with at each step."""

    def start(self, batch):
        self.calls = []
        return batch

    def guidance(self, combined, unconditional, conditional, step):
        self.calls.append((combined, unconditional, conditional, step))
        return combined


def fitted(model, settings=SETTINGS, **overrides):
    method = AMG(**{"descriptor": "pixels", "calibration_prompts": 3, **overrides})
    return method, method.fit(Task(model, settings, World(), method.sees, seed_parts=("test",)))


def drawn(model, method, artefact, keys=KEYS, settings=SETTINGS):
    with method.apply(model, artefact) as found:
        return sample(model, keys, settings, [found])


def seen(model, settings=SETTINGS):
    watch = Watch()
    sample(model, KEYS, settings, [watch])
    return watch.calls


def begun(model, step, artefact, **settings):
    """AMG's hooks at a step that was seen while base drew."""
    found = hooks(AMG(**{"descriptor": "pixels", **ABSOLUTE, **settings}), model, artefact)
    found.start(step.batch)
    return found


@pytest.fixture(scope="module")
def model():
    return wrap(tiny_sd())


# --- scales and thresholds ---


def test_the_scales_are_the_papers_clamps():
    """By hand at s0 = 7.5, the released code's guidance scale."""
    sigma = torch.tensor([-0.5, 0.0, 0.1, 0.2, 0.4, 0.9], dtype=torch.float64)
    s1, s2 = scales(sigma, 7.5, 13.0, 10.0)
    assert s1.tolist() == pytest.approx([0, 0, 1.3, 2.6, 5.2, 6.5])
    assert s2.tolist() == pytest.approx([0, 0, 1.0, 2.0, 1.3, 0])
    s1, s2 = scales(sigma, 7.5, None, None)
    assert s1.tolist() == pytest.approx([0, 0, 1.3, 2.6, 5.2, 6.5]), "6.5 / 0.5 sigma, up to 6.5"
    assert s2.tolist() == pytest.approx([0, 0, 5.2 / 3, 2.6, 1.3, 0]), (
        "(6.5 - s1) / 0.3 sigma, up to 6.5 - s1"
    )
    for guidance in (0.0, 1.0):
        assert not any(s.any() for s in scales(sigma, guidance, None, None)), "nothing to take away"
    assert not any(s.any() for s in scales(sigma, 7.5, 0.0, 0.0))


def test_thresholds(model):
    steps = [step for *_, step in seen(model)]
    times = [float(s.timestep) for s in steps]
    released, parabola = exponential(0.3, 0.4), parabolic(0.3, 0.4)
    for step, time in zip(steps, times, strict=True):
        assert released(step) == pytest.approx(0.3 + 0.1 * math.exp(-0.005 * time))
        product = float(model.pipe.scheduler.alphas_cumprod[int(time)])
        assert parabola(step) == pytest.approx(0.3 + 0.1 * product**2)
    sigma = torch.rand(20, 3, generator=torch.Generator().manual_seed(0))
    neutral = calibrated(sigma, torch.tensor(times), 0.9)
    for i, step in enumerate(steps):
        assert neutral(step) == pytest.approx(float(np.quantile(sigma[:, i].numpy(), 0.9)))
        near = replace(step, timestep=step.timestep + 20)
        assert neutral(near) == neutral(step), "the nearest timestep's"


# --- similarity ---


def test_the_nearest_reference_is_scikit_learns():
    draws = torch.Generator().manual_seed(0)
    vectors, references = (torch.randn(n, 12, generator=draws, dtype=torch.float64) for n in (7, 60))
    unit = torch.nn.functional.normalize
    sigma, nearest = cosine(unit(vectors), unit(references))
    near = NearestNeighbors(n_neighbors=1, metric="cosine").fit(references.numpy())
    distance, found = near.kneighbors(vectors.numpy())
    assert nearest.tolist() == found[:, 0].tolist()
    np.testing.assert_allclose(sigma.numpy(), 1 - distance[:, 0], atol=1e-12)
    for k in (1, 5, 50, 500):
        distances, found = NearestNeighbors(n_neighbors=min(k, 60)).fit(references).kneighbors(vectors)
        sigma, nearest = normalised_distance(vectors, references, 0.5, k)
        assert nearest.tolist() == found[:, 0].tolist()
        np.testing.assert_allclose(sigma, -distances[:, 0] / (0.5 * distances.mean(axis=1)), rtol=1e-12)


def test_the_autoencoders_scaling_is_the_samplers_and_is_undone():
    from lethebench.sampler import decode

    for build_pipe in (tiny_sd, tiny_flux):  # FLUX's has a shift
        model = wrap(build_pipe())
        latents = initial_latents(wrap(tiny_sd()), KEYS, SETTINGS)
        with torch.no_grad():
            images = to_pixels(model, latents)
            z = to_latents(model, images)
            config = model.pipe.vae.config
            own = (model.pipe.vae.encode(images).latent_dist.mean - (config.shift_factor or 0)) * 0.7
            expected = decode(model, latents).permute(0, 3, 1, 2)
        pixels = ((images / 2 + 0.5).clamp(0, 1) * 255).round()
        assert torch.equal(pixels.to(torch.uint8), expected)
        assert torch.allclose(z, own, atol=1e-6)


def test_the_gradient_is_that_of_finite_differences():
    model = wrap(tiny_sd())
    model.pipe.vae.double()
    draws = torch.Generator().manual_seed(3)
    clean, direction = (torch.randn(2, 4, 8, 8, generator=draws, dtype=torch.float64) for _ in range(2))
    for name in ("pixels", "latents"):
        describer = make_describer(name, model)
        width = 3 * 32 * 32 if name == "pixels" else 4 * 8 * 8
        references = torch.randn(5, width, generator=draws, dtype=torch.float64)
        measure = Similarity(describer, references, lambda x: x)
        small = 1e-6
        with torch.no_grad():
            up, down = (measure(clean + sign * small * direction)[0] for sign in (1, -1))
        found = (measure.gradient(clean) * direction).sum(dim=(1, 2, 3))
        assert torch.allclose(found, (up - down) / (2 * small), rtol=1e-7, atol=1e-10), name


@pytest.mark.parametrize("through", ["image", "denoiser"])
@pytest.mark.parametrize("name", ["sd", "sd-euler", "sd3", "flux-dev"])
def test_the_gradient_at_x_t_is_that_of_finite_differences(name, through):
    """With the noise prediction held fixed, or through the denoiser (float32, as the sampler predicts)."""
    model, exact = wrap(PIPELINES[name]()), wrap(PIPELINES[name]())
    exact.pipe.vae.double()
    _, artefact = fitted(model)
    combined, _, _, step = seen(model)[1]
    found = begun(exact, step, artefact, gradient=through)
    rows = torch.tensor([1, 3])
    batch, time = step.batch, step.timestep
    signal, noise = batch.levels(time)
    held = signal if name == "sd-euler" else 1.0  # what x_t is multiplied by in the scheduler's latents
    x = (step.latents[rows] * held).double()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def noise_of(x):
        predicted = batch.predict(
            batch.scale((x / held).float(), time), time, rows_of(step.conditioning, rows)
        ).combined
        clean = batch.clean(x / held, time, predicted.double())
        return (x - signal * clean) / noise

    with torch.no_grad():
        fixed = noise_of(x)

        def sigma(x):
            e = fixed if through == "image" else noise_of(x)
            return found.similarity((x - noise * e) / signal)[0]

        small = 1e-6 if through == "image" else 3e-3
        slope = (sigma(x + small * direction) - sigma(x - small * direction)) / (2 * small)
        gradient = found._gradient(combined[rows].double(), rows, widened(step))
        ours = (gradient * direction).flatten(1).sum(dim=1)
    assert torch.allclose(ours, slope, rtol=1e-5 if through == "image" else 2e-2, atol=1e-6)


def widened(step):
    """The step with float64 latents, which the sampler's denoiser takes as float32."""
    return replace(step, latents=step.latents.double())


# --- the terms ---


@pytest.mark.parametrize("name", PIPELINES)
def test_dissimilarity_moves_the_clean_image_as_the_paper_does(name):
    """By -(s / a) c3 s grad_{x_t} sigma, whatever the model predicts and however latents are held."""
    model = wrap(PIPELINES[name]())
    _, artefact = fitted(model)
    combined, unconditional, conditional, step = seen(model)[1]
    found = begun(model, step, artefact, c1=0.0, c2=0.0, c3=7.0, ramp=0.0)
    with torch.no_grad():
        changed = found.guidance(combined, unconditional, conditional, step)
        before, after = (step.batch.clean(step.latents, step.timestep, p) for p in (combined, changed))
    signal, noise = step.batch.levels(step.timestep)
    gradient = found.similarity.gradient(before) / signal
    expected = -noise / signal * 7.0 * noise * gradient
    assert (after - before).abs().max() > 1e-4
    assert torch.allclose(after - before, expected, atol=2e-5 * float(expected.abs().max()) + 1e-5)
    ramped = begun(model, step, artefact, c1=0.0, c2=0.0, c3=7.0, ramp=170.0)
    with torch.no_grad():
        sigma, _ = found.sigma(combined, step)
        stronger = ramped.guidance(combined, unconditional, conditional, step) - combined
    factor = (sigma + 9.0) * math.exp((1000 - float(step.timestep)) / 170)
    ratio = stronger.flatten(1).norm(dim=1) / (changed - combined).flatten(1).norm(dim=1)
    assert torch.allclose(ratio, factor, rtol=1e-3)


@pytest.mark.parametrize("name", PIPELINES)
def test_prompt_terms(name):
    """-s1 (e(y) - e()) - s2 (e(y_N) - e()) with predictions asked for one by one; nothing without guidance."""
    model = wrap(PIPELINES[name]())
    _, artefact = fitted(model)
    combined, unconditional, conditional, step = seen(model)[1]
    artefact.facts["captions"] = ["a robot in a city", ""]
    found = begun(model, step, artefact, c1=0.0, c2=0.0, c3=0.0)
    _, nearest = found.sigma(combined, step)
    found.similarity = Fixed(torch.tensor([0.05, 0.1, 0.2, 0.9]), torch.tensor([0, 0, 1, 0]))
    found._settings = replace(found._settings, c1=5.0, c2=4.0)
    with torch.no_grad():
        changed = found.guidance(combined, unconditional, conditional, step)
    if name == "flux-schnell":
        assert torch.equal(changed, combined)
        return
    scaled = step.batch.scale(step.latents, step.timestep)

    def predicted(text):
        conditioning = replace(encode_prompts(model, [text] * 4, SETTINGS), negative=None)
        with torch.no_grad():
            return step.batch.predict(scaled, step.timestep, conditioning).conditional

    empty, caption = predicted("") if unconditional is None else unconditional, predicted("a robot in a city")
    unit = 0.25 if name == "flux-dev" else 1.0  # its difference of predictions is s0 times the paper's
    shape = (-1, *[1] * (combined.ndim - 1))
    s1 = torch.tensor([0.25, 0.5, 1.0, 3.0]).view(shape) * unit
    s2 = torch.tensor([0.2, 0.4, 0.0, 0.0]).view(shape) * unit  # no caption; nothing left
    expected = combined - s1 * (conditional - empty) - s2 * (caption - empty)
    assert torch.allclose(changed, expected, atol=1e-5)
    assert not torch.allclose(changed, combined, atol=1e-4)
    found._settings = replace(found._settings, c1=0.0, min_duplicates=65)
    with torch.no_grad():
        assert torch.equal(found.guidance(combined, unconditional, conditional, step), combined)
    assert nearest.shape == (4,)


class Fixed:
    """A similarity that was said."""

    def __init__(self, sigma, nearest):
        self.sigma, self.nearest = sigma, nearest

    def __call__(self, clean):
        return self.sigma, self.nearest


@pytest.mark.parametrize("name", PIPELINES)
def test_zero_scales_are_base_others_are_not_and_no_image_depends_on_its_batch(name):
    model = wrap(PIPELINES[name]())
    base = sample(model, KEYS, SETTINGS)
    method, artefact = fitted(model, c1=0.0, c2=0.0, c3=0.0, **ABSOLUTE)
    assert (drawn(model, method, artefact).latents == base.latents).all()
    other = drawn(model, replace(method, c1=None, c2=None, c3=1.0), artefact).latents
    assert np.isfinite(other).all()
    assert (np.abs(other - base.latents).max(axis=(1, 2, 3)) > 1e-3).all()
    with replace(method, c1=None, c2=None, c3=1.0).apply(model, artefact) as found:
        alone = sample(model, KEYS, SETTINGS, [found], batch_size=1).latents
    assert np.abs(alone - other).max() <= 1e-3 * np.abs(alone).max(), "the same alone"
    tiny = drawn(model, replace(method, c3=1e-5, ramp=0.0), artefact).latents
    assert 0 < np.abs(tiny - base.latents).max() < 1e-3, "continuous at zero"


def test_an_image_below_the_threshold_is_bases(model):
    base = sample(model, KEYS, SETTINGS)
    method, artefact = fitted(model, **ABSOLUTE)
    watching = hooks(method, model, artefact)
    sigmas = []
    for combined, _, _, step in seen(model):
        watching.start(step.batch)
        with torch.no_grad():
            sigmas.append(watching.sigma(combined, step)[0])
    highest = torch.stack(sigmas).max(dim=0).values
    order = highest.argsort()
    between = float(highest[order[1:3]].mean())
    found = drawn(model, replace(method, low=between, high=between), artefact)
    same = (found.latents == base.latents).all(axis=(1, 2, 3))
    assert set(np.flatnonzero(same)) == set(order[:2].tolist())


@pytest.mark.parametrize("descriptor", ["copy-mini", "pixels", "latents"])
@pytest.mark.parametrize("gradient", ["image", "denoiser"])
def test_an_image_whose_copy_is_in_the_index_is_less_like_it(model, descriptor, gradient):
    base = sample(model, KEYS, SETTINGS)
    describer = make_describer(descriptor, model)
    with torch.no_grad():
        own = describer.latents(torch.from_numpy(base.latents))
    artefact = Artefact({"descriptors": own, "duplicates": torch.zeros(4)}, {"captions": [""] * 4})
    c3 = 10.0 if descriptor == "copy-mini" else 1.0
    method = AMG(descriptor=descriptor, c1=0.0, c2=0.0, c3=c3, ramp=0.0, gradient=gradient, **ABSOLUTE)
    found = drawn(model, method, artefact)
    with torch.no_grad():
        before, after = (
            Similarity(describer, own, lambda x: x)(torch.from_numpy(s.latents))[0] for s in (base, found)
        )
    assert (after < before - 1e-3).all(), f"{before.tolist()} to {after.tolist()}"


# --- fit ---


def test_the_fit_holds_descriptors_captions_and_neutral_similarities(model):
    method, artefact = fitted(model, descriptor="copy-mini")
    assert artefact.facts == {"captions": [TRIGGER.text, CONCEPT.text], "references": 2}
    assert artefact.tensors["duplicates"].tolist() == [64, 0]
    assert artefact.tensors["descriptors"].shape == (2, 128)
    assert artefact.tensors["neutral_sigma"].shape == (3, 3)
    describer = make_describer("copy-mini", model)
    own = describer.images(
        torch.from_numpy(World().reference("two").image).permute(2, 0, 1)[None] / 127.5 - 1
    )
    assert torch.allclose(own[0], artefact.tensors["descriptors"][1], atol=1e-5)
    assert method.sees == method.knowledge - {Knowledge.REFERENCE_INDEX}


def test_it_sees_what_its_settings_use(model, tmp_path):
    assert AMG(captions=False, schedule="exponential").sees == {Knowledge.TRAINING_IMAGES}
    _, artefact = fitted(model, captions=False, schedule="exponential")
    assert artefact.facts["captions"] == ["", ""] and set(artefact.tensors) == {"descriptors", "duplicates"}
    path = tmp_path / "own.safetensors"
    index = made(model)
    save(index, path)
    method, artefact = fitted(model, index=str(path), schedule="parabolic")
    assert method.sees == {Knowledge.REFERENCE_INDEX}
    assert torch.equal(artefact.tensors["descriptors"], index.descriptors)
    with pytest.raises(KnowledgeError):
        AMG(descriptor="pixels").fit(Task(model, SETTINGS, World(), frozenset(), seed_parts=()))


def test_no_training_images_is_one_clear_line(model):
    class Empty(World):
        def __iter__(self):
            return iter(())

    with pytest.raises(UserError, match="no training images: give an index of your own"):
        AMG().fit(Task(model, SETTINGS, Empty(), AMG().sees, seed_parts=()))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"descriptor": "clip"}, "descriptor is copy-mini, sscd, latents, pixels, not 'clip'"),
        ({"descriptor": "sscd"}, "set sscd"),
        ({"descriptor": "sscd", "sscd": "x", "preset": "y"}, "preset is one of"),
        ({"schedule": "linear"}, "schedule is"),
        ({"gradient": "none"}, "gradient is"),
        ({"quantile": 1.5}, "quantile is between 0 and 1, not 1.5"),
        ({"neighbours": 0}, "neighbours must be at least 1"),
        ({"alpha": 0.0}, "alpha must be above 0"),
        ({"c2": -1.0}, "c2 must not be negative"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(UserError, match=words):
        configure(AMG, "medium", settings)


# --- SSCD's file ---


class Net(torch.nn.Module):
    """Stands for SSCD: a small convolution and a mean, to 8 numbers."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 7, 4)

    def forward(self, x):
        return self.conv(x).mean(dim=(2, 3))


@pytest.mark.parametrize("preset", ["amg-224", "nemo-320", "wen-224"])
def test_sscd_is_preprocessed_as_the_metric_does_it_and_gives_gradients(model, tmp_path, preset):
    from lethebench.metrics.sscd import PRESETS, describe

    path = tmp_path / "sscd.pt"
    with seeded(0):
        net = Net()
    torch.jit.script(net).save(str(path))
    describer = make_describer("sscd", model, sscd=str(path), preset=preset)
    rows, columns = np.mgrid[:40, :40]
    image = np.stack([rows * 6, columns * 6, (rows + columns) * 3], axis=-1).astype(np.uint8)
    index = build([image], describer, [""])
    own = describe([image], net, PRESETS[preset])
    assert float(index.descriptors.numpy()[0] @ own[0]) > 0.999, "alike but for resizing in bytes"
    assert index.descriptor == f"sscd:{preset}" and len(index.weights) == 64
    gradient = Similarity(describer, index.descriptors, lambda x: x).gradient(torch.randn(1, 4, 8, 8))
    assert gradient.abs().max() > 0


def test_a_bad_sscd_file_is_one_clear_line(model, tmp_path):
    path = tmp_path / "sscd.pt"
    with pytest.raises(UserError, match="there is no file"):
        make_describer("sscd", model, sscd=str(path))
    path.write_bytes(b"no network")
    with pytest.raises(UserError, match="is no TorchScript file"):
        make_describer("sscd", model, sscd=str(path))


# --- the index ---


def made(model, descriptor="pixels"):
    images = [World().reference(name).image for name in ("one", "two", "one")]
    images[1] = images[1][:20, :12]  # another size
    return build(images, make_describer(descriptor, model), ["a star", 'é "quoted"', ""], [5, 0, 7])


def test_an_index_is_the_same_after_writing_and_reading(model, tmp_path):
    index = made(model, "copy-mini")
    save(index, tmp_path / "index.safetensors")
    again = load(tmp_path / "index.safetensors")
    assert torch.equal(again.descriptors, index.descriptors) and len(again) == 3
    assert replace(again, descriptors=index.descriptors) == index
    assert torch.allclose(again.descriptors[0], again.descriptors[2])
    require_made_by(again, make_describer("copy-mini", model), "it")


BAD = {
    "there is no reference index": None,
    "a damaged one": b"nothing of the kind",
    "its format must be": {"metadata": {"format": "other"}},
    "is no JSON list": {"metadata": {"captions": "["}},
    "must be a JSON list of texts": {"metadata": {"captions": "[1, 2]"}},
    "one of each": {"metadata": {"captions": '["a"]'}},
    r"'descriptors' must be float32 \[n, d\]": {"descriptors": torch.zeros(2, 3, dtype=torch.float64)},
    r"'duplicates' must be int64 \[n\]": {"duplicates": torch.zeros(2)},
    "no finite numbers": {"descriptors": torch.tensor([[1.0, math.nan], [0.0, 1.0]])},
    "holds no references": {
        "descriptors": torch.zeros(0, 3),
        "duplicates": torch.zeros(0, dtype=torch.int64),
        "metadata": {"captions": "[]"},
    },
}


@pytest.mark.parametrize("words", BAD)
def test_a_bad_index_is_one_clear_line(tmp_path, words):
    path, bad = tmp_path / "index.safetensors", BAD[words]
    if isinstance(bad, bytes):
        path.write_bytes(bad)
    elif bad is not None:
        good = {"descriptors": torch.eye(2), "duplicates": torch.zeros(2, dtype=torch.int64)}
        tensors = {**good, **{k: v for k, v in bad.items() if k != "metadata"}}
        metadata = {"format": FORMAT, "captions": json.dumps(["a", "b"]), "descriptor": "pixels"}
        save_file(tensors, path, {**metadata, **bad.get("metadata", {})})
    with pytest.raises(UserError, match=words) as error:
        load(path)
    assert "\n" not in str(error.value)


def test_an_index_of_another_descriptor_is_refused(model):
    pixels, copy = make_describer("pixels", model), make_describer("copy-mini", model)
    with pytest.raises(UserError, match="it holds descriptors of 'pixels', the settings ask for 'copy-mini'"):
        require_made_by(made(model), copy, "it")
    index = made(model, "copy-mini")
    with pytest.raises(UserError, match="other weights of copy-mini"):
        require_made_by(replace(index, weights="0"), copy, "it")
    with pytest.raises(UserError, match="not of unit length"):
        require_made_by(replace(index, descriptors=2 * index.descriptors), copy, "it")
    require_made_by(made(model), pixels, "it")
    with pytest.raises(ValueError, match="1 images, 2 captions"):
        build([World().reference("one").image], pixels, ["a", "b"])
    assert isinstance(index, ReferenceIndex)


def test_take_keeps_what_the_images_share():
    model = wrap(tiny_flux(guidance_embeds=True))
    both = encode_prompts(model, ["a red star", "a blue circle"], SETTINGS)
    one = rows_of(both, torch.tensor([1]))
    alone = encode_prompts(model, ["a blue circle"], SETTINGS)
    assert torch.allclose(one.embeds, alone.embeds, atol=1e-5)
    assert one.extra.keys() == alone.extra.keys()
    assert all(one.extra[k].shape == alone.extra[k].shape for k in one.extra)
    latents = initial_latents(model, KEYS[:1], SETTINGS)
    assert unpack_latents(model, latents, SETTINGS).shape == (1, 4, 8, 8)
