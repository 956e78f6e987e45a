"""The adversarial embeddings' arithmetic, on every family of models."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_pipelines import tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

from lethebench.attack import Attempt, Subject, Try
from lethebench.attack._embeddings import adversarial, denoising_losses, image_latents
from lethebench.attack._trial import _Offsets
from lethebench.attack.dori import Dori
from lethebench.attack.paraphrase import Paraphrase, edited
from lethebench.attack.seeds import Seeds
from lethebench.datasets.planted import PlantedWorld
from lethebench.hooks import ImageKey, SamplerHooks
from lethebench.plan import prompt_set
from lethebench.prompts import Role
from lethebench.sampler import decode, sample, unpack_latents
from lethebench.specs import SamplerSettings
from lethebench.unlearning import encode
from lethebench.zoo import wrap

BUILDERS = {"sd": tiny_sd, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}
SETTINGS = SamplerSettings(num_inference_steps=3, guidance_scale=4.0, height=16, width=16)
WORLD = PlantedWorld()
ASKED = [p for p in WORLD if p.role is Role.TRIGGER and p.duplicates == 128][:3]


@pytest.fixture(scope="module", params=list(BUILDERS))
def model(request):
    return wrap(BUILDERS[request.param]())


def subject(model, suite="tiny@1"):
    return Subject(model, SETTINGS, WORLD, suite, unseen=2)


def losses(model, offsets, repeats=2):
    """The loss of two items at given offsets, always for the same noises and times."""
    clean = image_latents(model, [subject(model).reference(p) for p in ASKED[:2]], SETTINGS)
    conditioning = encode(model, [p.text for p in ASKED[:2] for _ in range(repeats)], SETTINGS)
    draws = [torch.Generator().manual_seed(i) for i in range(2)]
    return denoising_losses(model, SETTINGS, clean, conditioning, offsets, draws, repeats)


def test_the_gradient_is_that_of_finite_differences(model):
    shape = encode(model, ["a", "a"], SETTINGS).embeds.shape
    draws = torch.Generator().manual_seed(0)
    at = 0.1 * torch.randn(shape, generator=draws)
    offsets = at.clone().requires_grad_()
    found = losses(model, offsets)
    (gradient,) = torch.autograd.grad(found.sum(), offsets)
    assert found.shape == (2,) and (gradient.flatten(1).norm(dim=1) > 0).all()
    along = gradient / gradient.norm() + 0.3 * torch.randn(shape, generator=draws) / gradient.numel() ** 0.5
    step = 0.05
    with torch.no_grad():
        ahead, behind = (losses(model, at + sign * step * along).double().sum() for sign in (1, -1))
    slope = float((gradient * along).sum())
    assert float(ahead - behind) / (2 * step) == pytest.approx(slope, rel=0.02)


def test_an_items_loss_and_embedding_are_its_own(model):
    how = Dori(steps=3, batch_size=2)
    together, curves = adversarial(subject(model), ASKED, how)
    assert curves.shape == (3, len(ASKED)) and together.abs().max() > 0.1
    for row, prompt in enumerate(ASKED):
        alone, curve = adversarial(subject(model), [prompt], how)
        assert curve[:, 0].tolist() == pytest.approx(curves[:, row].tolist(), rel=1e-3)
        moved = (alone[0] - together[row]).abs()  # Adam steps by the sign where a gradient is next to nothing
        assert float(moved.median()) < 1e-4
    again, _ = adversarial(subject(model), ASKED, how)
    assert torch.equal(again, together)
    other, _ = adversarial(subject(model, "tiny@2"), ASKED, how)
    assert not torch.equal(other, together)


def test_more_steps_lower_the_loss():
    model = wrap(tiny_sd())
    how = Dori(steps=40, batch_size=8)
    _, curves = adversarial(subject(model), ASKED, how)
    assert (curves[-10:].mean(0) < curves[:10].mean(0)).all()


def test_latents_are_those_that_the_decoder_takes(model):
    image = subject(model).reference(ASKED[0])
    latents = image_latents(model, [image, image], SETTINGS)
    small = np.asarray(decode(model, unpack_latents(model, latents, SETTINGS)))
    from lethebench.metrics.fbmem.segmenters import resize_image

    x = torch.from_numpy(resize_image(image, 16, 16).copy())[None].permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        mean = model.pipe.vae.encode(x.float()).latent_dist.mean
        expected = model.pipe.vae.decode(mean, return_dict=False)[0]
    expected = ((expected / 2 + 0.5).clamp(0, 1) * 255).round()[0].permute(1, 2, 0).numpy()
    assert small.shape == (2, 16, 16, 3)
    assert np.abs(small[0].astype(float) - expected).max() <= 1


class Rewrites(SamplerHooks):
    def texts(self, texts, keys):
        return ["a blue robot" for _ in texts]


class Doubles(SamplerHooks):
    def conditioning(self, conditioning, keys):
        return conditioning.with_embeds(conditioning.embeds * 2)


def drawn(model, tries, hooks=()):
    keys = [ImageKey("tiny@1", p, t.index) for p, t in zip(ASKED, tries, strict=True)]
    own = _Offsets(model, SETTINGS, tuple(tries))
    return sample(model, keys, SETTINGS, [own, *hooks], batch_size=len(keys)).latents


def test_zero_steps_draw_the_plain_prompts_images_bit_for_bit(model):
    attempts = Dori(steps=0, images=1).attempts(subject(model), ASKED)
    keys = [ImageKey("tiny@1", p, 0) for p in ASKED]
    plain = sample(model, keys, SETTINGS, batch_size=len(keys)).latents
    tries = [a.tries[0] for a in attempts]
    assert (drawn(model, tries) == plain).all()
    assert (drawn(model, tries, [Rewrites()]) == plain).all()  # what only rewrites the text is passed by
    doubled = sample(model, keys, SETTINGS, [Doubles()], batch_size=len(keys)).latents
    assert (drawn(model, tries, [Doubles()]) == doubled).all()  # what acts on the embedding still does
    assert not (doubled == plain).all()


def test_a_try_without_an_offset_keeps_what_the_method_did(model):
    offset = torch.ones(encode(model, ["a"], SETTINGS).embeds.shape[1:])
    tries = [Try(0), Try(0, offset=offset), Try(0)]
    found = drawn(model, tries, [Rewrites()])
    keys = [ImageKey("tiny@1", p, 0) for p in ASKED]
    rewritten = sample(model, keys, SETTINGS, [Rewrites()], batch_size=len(keys)).latents
    assert np.allclose(found[[0, 2]], rewritten[[0, 2]], atol=1e-5)
    assert not np.allclose(found[1], rewritten[1], atol=1e-3)


# --- texts and seeds ---


def test_edits_are_distinct_seeded_and_of_every_kind():
    prompt = ASKED[0]
    who = subject(None)
    first, second = (Paraphrase(images=30).attempts(who, asked) for asked in ([prompt], [ASKED[1], prompt]))
    assert first[0] == second[1]  # whoever else is asked for
    texts = [t.text for t in first[0].tries]
    assert prompt.text not in texts
    assert any(t in WORLD.paraphrases(prompt.id) for t in texts)
    name = prompt.text.split(",")[0]
    assert name in texts and any(t.endswith(name) for t in texts)
    fresh = [t for t in first[0].tries if t.index == 0]
    assert len({t.text for t in fresh}) == len(fresh)


def test_a_sets_own_rewordings_come_before_its_paraphrases():
    train = prompt_set("planted-train")
    items = [p for p in train if p.role is Role.CONCEPT and p.kind == "direct" and p.twin][:3]
    who = Subject(None, SETTINGS, train, "tiny@1", unseen=2)
    for prompt in items:
        twin = train.prompt(prompt.twin)
        for asked in (prompt, twin):
            assert asked.concept not in "".join(train.paraphrases(asked.id))
            assert all(asked.concept in text for text in who.paraphrases(asked))
        assert len(who.paraphrases(prompt)) == len(who.paraphrases(twin)) > 1


def test_where_edits_run_out_they_come_again_from_other_noises():
    bare = replace(ASKED[0], id="neutral-001", text="zim")
    (attempt,) = Paraphrase(images=7).attempts(subject(None), [bare])
    assert len(attempt.tries) == 7
    assert len({(t.index, t.text) for t in attempt.tries}) == 7
    assert edited("zim", [], torch.Generator()) == ["zim zim", "zim, zim"]


def test_other_seeds_are_none_of_the_rows():
    found = Seeds(images=3).attempts(subject(None), ASKED)
    assert found == [Attempt((Try(2), Try(3), Try(4)))] * len(ASKED)
