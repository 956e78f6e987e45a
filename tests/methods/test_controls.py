"""The controls: base, blank, oracle, random tokens, random pruning."""

import pytest
import torch
from tiny_pipelines import clip_tokenizer, tiny_sd

from lethebench.errors import UserError
from lethebench.hooks import ImageKey
from lethebench.method import Artefact, configure
from lethebench.methods.base import Base
from lethebench.methods.blank import Blank
from lethebench.methods.oracle import Oracle
from lethebench.methods.random_pruning import RandomPruning
from lethebench.methods.random_tokens import RandomTokenHooks, RandomTokens, insert_words, random_words
from lethebench.prompts import Prompt, Role
from lethebench.pruning import find_sites, unpack
from lethebench.registry import METHODS
from lethebench.sampler import sample
from lethebench.seeding import generator
from lethebench.specs import SamplerSettings
from lethebench.zoo import wrap

SETTINGS = SamplerSettings(num_inference_steps=2, guidance_scale=4.0, height=16, width=16)
CONTROLS = (Base, Blank, Oracle, RandomTokens, RandomPruning)


def key(text="a red star", prompt="p", index=0):
    return ImageKey("test@1", Prompt(prompt, text, Role.NEUTRAL, prompt), index)


def test_controls_are_registered():
    names = {cls.name for cls in CONTROLS}
    assert names == {"base", "blank", "oracle", "random-tokens", "random-pruning"}
    assert all(METHODS.get(cls.name) is cls and cls.control for cls in CONTROLS)
    assert [cls.name for cls in CONTROLS if not cls.generates] == ["blank"]


def test_base_changes_nothing(make_task):
    model = wrap(tiny_sd())
    plain = sample(model, [key()], SETTINGS)
    artefact = Base().fit(make_task(Base(), model))
    with Base().apply(model, artefact) as hooks:
        assert (sample(model, [key()], SETTINGS, [hooks]).latents == plain.latents).all()


def test_blank_is_grey():
    images = torch.arange(2 * 4 * 4 * 3, dtype=torch.uint8).view(2, 4, 4, 3)
    with Blank().apply(None, Artefact()) as hooks:
        grey = hooks.images(images, (key(), key()))
    assert grey.shape == images.shape and grey.dtype == torch.uint8 and set(grey.unique().tolist()) == {128}


PROMPTS = {
    p.id: p
    for p in (
        Prompt(
            "t1", "zorv star", Role.TRIGGER, "c1", "verbatim", ("r1",), trained=True, twin="t2", duplicates=64
        ),
        Prompt("t2", "mika star", Role.CONTROL, "c2", "verbatim", ("r2",), trained=False, twin="t1"),
        Prompt(
            "k1",
            "captain zed",
            Role.CONCEPT,
            "c3",
            "concept",
            concept="zed",
            category="comic",
            trained=True,
            twin="k2",
        ),
        Prompt(
            "k2",
            "captain lum",
            Role.CONTROL,
            "c4",
            "concept",
            concept="lum",
            category="comic",
            trained=False,
            twin="k1",
        ),
        Prompt("n1", "a red star", Role.NEUTRAL, "n1"),
        Prompt("lost", "vor", Role.TRIGGER, "c5", trained=True, twin="not in the set"),
    )
}


def test_oracle_draws_the_twin():
    swapped = Oracle().substitute(PROMPTS["t1"], PROMPTS)
    assert (swapped.text, swapped.references) == ("mika star", ("r2",))
    assert (swapped.id, swapped.cluster, swapped.role, swapped.duplicates) == ("t1", "c1", Role.TRIGGER, 64)
    assert Oracle().substitute(PROMPTS["k1"], PROMPTS).concept == "lum"
    for name in ("t2", "k2", "n1", "lost"):
        assert Oracle().substitute(PROMPTS[name], PROMPTS) is PROMPTS[name]


def test_random_tokens_depend_on_the_key_alone():
    hooks = RandomTokenHooks(clip_tokenizer(), 2)
    first, second, other = key(), key(index=1), key(prompt="q")
    alone = hooks.texts(["a red star"], (first,))
    together = hooks.texts(["a red star"] * 3, (second, first, other))
    assert alone[0] == together[1] and len(set(together)) == 3
    for text in together:
        words = text.split(" ")
        assert len(words) == 5
        assert [w for w in words if w in ("a", "red", "star")][:1]  # the prompt's own words are still there


def test_stronger_random_tokens_contain_the_weaker_ones():
    """The same words are drawn first, so that strengths are nested."""
    draws = {n: random_words(clip_tokenizer(), n, generator("x")) for n in (1, 2, 4)}
    assert draws[4][:2] == draws[2] and draws[2][:1] == draws[1]
    assert all(word.strip() and "<|" not in word for word in draws[4])


def test_words_go_anywhere():
    places = {insert_words("a b", ["x"], generator("place", i)) for i in range(50)}
    assert places == {"x a b", "a x b", "a b x"}


def test_random_tokens_change_the_images():
    model = wrap(tiny_sd())
    with configure(RandomTokens, "strong").apply(model, Artefact()) as hooks:
        changed = sample(model, [key()], SETTINGS, [hooks]).latents
    assert (changed != sample(model, [key()], SETTINGS).latents).any()


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_random_pruning_turns_off_the_given_shares(make_model, make_task, name):
    model = make_model(name)
    method = RandomPruning(ffn=0.5, norm=0.25, residual=0.1)
    artefact = method.fit(make_task(method, model))
    for kind, share in artefact.facts["deactivated"].items():
        assert share == pytest.approx(getattr(method, kind), abs=0.01)
    assert ("residual" in artefact.facts["deactivated"]) == (name == "sd")
    before = {k: v.clone() for k, v in model.denoiser.state_dict().items()}
    with method.apply(model, artefact):
        assert any(not torch.equal(v, before[k]) for k, v in model.denoiser.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in model.denoiser.state_dict().items())


def test_random_pruning_draws_again(make_task):
    model = wrap(tiny_sd())
    draws = [RandomPruning(ffn=0.5, draw=d).fit(make_task(RandomPruning(), model)) for d in (0, 0, 1)]
    masks = [torch.cat([*unpack(a.tensors).values()]) for a in draws]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert set(unpack(draws[0].tensors)) == {s.name for s in find_sites(model.denoiser, ("ffn",))}


def test_shares_are_shares():
    with pytest.raises(UserError, match="norm is a share between 0 and 1"):
        configure(RandomPruning, "weak", {"norm": 1.5})
