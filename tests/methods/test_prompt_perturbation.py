"""Random tokens, random numbers, repeated words, and noise on the embeddings."""

from collections import Counter

import pytest
import torch
from tiny_pipelines import clip_tokenizer, tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

from lethebench.errors import UserError
from lethebench.hooks import ImageKey, SamplerHooks
from lethebench.method import Artefact, configure
from lethebench.methods.embedding_noise import EmbeddingNoise, EmbeddingNoiseHooks
from lethebench.methods.random_numbers import RandomNumberHooks, RandomNumbers
from lethebench.methods.random_tokens import RandomTokenHooks, RandomTokens
from lethebench.methods.word_repeat import WordRepeat, WordRepeatHooks
from lethebench.prompts import Prompt, Role
from lethebench.sampler import encode_prompts, sample
from lethebench.specs import SamplerSettings
from lethebench.zoo import wrap

SETTINGS = SamplerSettings(num_inference_steps=2, guidance_scale=4.0, height=16, width=16)
BUILDERS = {"sd": tiny_sd, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}
TEXT = "a striped blue circle in a night city"
INSERTING = {
    "random-tokens": lambda n: RandomTokenHooks(clip_tokenizer(), n),
    "random-numbers": RandomNumberHooks,
    "word-repeat": WordRepeatHooks,
}


def key(index=0, prompt="p", text=TEXT):
    return ImageKey("test@1", Prompt(prompt, text, Role.NEUTRAL, prompt), index)


def inserted(before, after):
    """The words that ``after`` has more than ``before``, whose own words keep their order."""
    rest = iter(after.split(" "))
    assert all(word in rest for word in before.split(" ")), "a word of the prompt is lost or moved"
    return list((Counter(after.split(" ")) - Counter(before.split(" "))).elements())


@pytest.mark.parametrize("name", INSERTING)
@pytest.mark.parametrize("count", [0, 1, 4])
def test_so_many_words_are_inserted(name, count):
    keys = tuple(key(i) for i in range(20))
    for text in INSERTING[name](count).texts([TEXT] * 20, keys):
        assert len(inserted(TEXT, text)) == count
        assert count or text == TEXT


@pytest.mark.parametrize("name", INSERTING)
def test_the_words_depend_on_the_key_alone(name):
    keys = (key(0), key(1), key(0, "q"))
    together = INSERTING[name](4).texts([TEXT] * 3, keys)
    assert [INSERTING[name](4).texts([TEXT], (k,))[0] for k in keys] == together
    assert len(set(together)) == 3


@pytest.mark.parametrize("name", INSERTING)
def test_stronger_settings_have_the_weaker_ones_words(name):
    words = {n: inserted(TEXT, INSERTING[name](n).texts([TEXT], (key(),))[0]) for n in (1, 2, 4)}
    for few, many in ((1, 2), (2, 4)):
        assert not Counter(words[few]) - Counter(words[many])


def test_random_tokens_draw_what_they_always_drew():
    assert RandomTokenHooks(clip_tokenizer(), 2).texts(["a red star"], (key(),)) == ["e 5 a red star"]


def test_numbers_are_uniform_up_to_99999():
    keys = tuple(key(i) for i in range(500))
    texts = RandomNumberHooks(4).texts([TEXT] * 500, keys)
    numbers = torch.tensor([int(n) for t in texts for n in inserted(TEXT, t)], dtype=torch.float64)
    assert len(numbers) == 2000 and numbers.min() >= 0 and numbers.max() < 100_000
    deciles = torch.histc(numbers, 10, 0, 100_000)
    assert ((deciles - 200).abs() < 5 * 200**0.5).all()


def test_every_word_of_the_prompt_is_repeated_by_chance():
    keys = tuple(key(i) for i in range(300))
    drawn = Counter(w for t in WordRepeatHooks(1).texts([TEXT] * 300, keys) for w in inserted(TEXT, t))
    assert set(drawn) == set(TEXT.split(" "))
    assert drawn["a"] > 1.4 * drawn["city"], "a word that is there twice is drawn twice as often"


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("cls", [RandomNumbers, WordRepeat, EmbeddingNoise])
def test_images_change_on_every_family_and_not_at_zero(name, cls):
    model = wrap(BUILDERS[name]())
    base = sample(model, [key()], SETTINGS)
    for strength, changed in (("strong", True), (cls.off, False)):
        method = configure(cls, "strong", None if changed else strength)
        with method.apply(model, Artefact()) as hooks:
            found = sample(model, [key()], SETTINGS, [hooks])
        assert (found.latents != base.latents).any() == changed


# --- embedding-noise -------------------------------------------------------------------------------


def parts(conditioning):
    """Its tensors: conditional and unconditional, tokens and pooled."""
    halves = [c for c in (conditioning, conditioning.negative) if c is not None]
    return [t for c in halves for t in (c.embeds, c.pooled) if t is not None]


def noise_of(model, scale, keys):
    clean = encode_prompts(model, [TEXT] * len(keys), SETTINGS)
    noisy = EmbeddingNoiseHooks(scale).conditioning(clean, keys)
    return [after - before for before, after in zip(parts(clean), parts(noisy), strict=True)]


@pytest.mark.parametrize(("name", "count"), [("sd", 2), ("sdxl", 4), ("sd3", 4), ("flux", 2)])
def test_all_embeddings_get_noise_of_the_scale(name, count):
    model, keys = wrap(BUILDERS[name]()), tuple(key(i) for i in range(64))
    found = noise_of(model, 0.1, keys)
    assert len(found) == count
    for noise in found:
        assert float(noise.std()) == pytest.approx(0.1, rel=0.05)
        assert abs(float(noise.mean())) < 5 * 0.1 / noise.numel() ** 0.5
    flat = torch.stack([n.flatten(1)[:, :16].flatten() for n in found])
    apart = torch.corrcoef(flat) - torch.eye(count)
    assert float(apart.abs().max()) < 0.2, "the parts' noise is drawn independently"


def test_noise_is_the_images_own():
    model, keys = wrap(tiny_sd()), tuple(key(i) for i in range(3))
    together, alone = noise_of(model, 0.1, keys), noise_of(model, 0.1, keys[1:2])
    for one, all_three in zip(alone, together, strict=True):
        assert torch.equal(one[0], all_three[1])
        assert not torch.equal(all_three[0], all_three[1])


def test_noise_is_linear_in_the_scale_down_to_nothing():
    model, keys = wrap(tiny_sd()), (key(),)
    for small, one in zip(noise_of(model, 1e-3, keys), noise_of(model, 1.0, keys), strict=True):
        assert torch.allclose(small, 1e-3 * one, atol=1e-6)
    base = sample(model, [key()], SETTINGS).latents
    tiny = sample(model, [key()], SETTINGS, [EmbeddingNoiseHooks(1e-4)]).latents
    assert 0 < abs(tiny - base).max() < 1e-2


def test_noise_comes_on_top_of_what_another_method_did():
    class Zeros(SamplerHooks):
        def conditioning(self, conditioning, keys):
            return conditioning.with_embeds(torch.zeros_like(conditioning.embeds)[:, :5])

    class Look(SamplerHooks):
        def conditioning(self, conditioning, keys):
            self.embeds = conditioning.embeds
            return conditioning

    look = Look()
    sample(wrap(tiny_sd()), [key()], SETTINGS, [Zeros(), EmbeddingNoiseHooks(0.5), look])
    assert look.embeds.shape[1] == 5 and float(look.embeds.std()) == pytest.approx(0.5, rel=0.3)


@pytest.mark.parametrize(
    ("cls", "settings", "words"),
    [
        (RandomTokens, {"tokens": -1}, "tokens must be 0 or more, not -1"),
        (RandomNumbers, {"numbers": -2}, "numbers must be 0 or more, not -2"),
        (WordRepeat, {"repeats": 1.5}, "repeats is a whole number, not 1.5"),
        (EmbeddingNoise, {"scale": -0.1}, "scale must be 0 or more, not -0.1"),
        (EmbeddingNoise, {"scale": float("nan")}, "scale is a number, not nan"),
    ],
)
def test_settings_that_mean_nothing_are_refused(cls, settings, words):
    with pytest.raises(UserError, match=words):
        configure(cls, "weak", settings)
