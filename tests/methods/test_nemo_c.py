"""NeMo-C: clusters of prompts, the nearest cluster's neurons for any prompt, the permanent union."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_pipelines import tiny_sd, tiny_sdxl

from lethebench.errors import UserError
from lethebench.hooks import ImageKey
from lethebench.method import Artefact, Task, configure
from lethebench.methods.nemo.fit import mask_facts
from lethebench.methods.nemo.neurons import ValueNeurons
from lethebench.methods.nemo_c import NeMoC
from lethebench.methods.nemo_c.clusters import clustered
from lethebench.prompts import Prompt, Role
from lethebench.sampler import encode_prompts, sample
from lethebench.specs import SamplerSettings
from lethebench.zoo import wrap

SETTINGS = SamplerSettings(scheduler="ddim", num_inference_steps=2, guidance_scale=4.0, height=32, width=32)
TEXTS = ("a red star", "a red star in a city", "robot robot robot", "robot robot captain", "night")
NEAR, FAR = "a red star in a forest", "circle circle circle circle striped striped striped striped"


def prompt(text):
    return Prompt(text, text, Role.TRIGGER, text)


def key(text, index=0):
    return ImageKey("test@1", prompt(text), index)


class Set:
    """Memorized prompts and neutral ones."""

    name, version = "test", "1"

    def __iter__(self):
        return iter([prompt(text) for text in TEXTS])

    def paraphrases(self, prompt_id):
        return ["a circle"]

    def training_prompts(self):
        return [f"a {c} {t}" for c in ("red", "blue", "striped") for t in ("star", "circle", "captain")]


def build(builder=tiny_sd):
    pipe = builder()
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(20)
        for name, parameter in pipe.unet.named_parameters():
            if ".attn2.to_v" in name:
                parameter.mul_(10)
    return wrap(pipe)


@pytest.fixture(scope="module")
def model():
    return build()


FITTED = NeMoC(targets="triggers", seeds=3, threshold=0.0, stop_ssim=0.95, theta=2.0, clusters=3)


def task(model, method=FITTED):
    return Task(model, SETTINGS, Set(), method.sees, seed_parts=("test@1",))


@pytest.fixture(scope="module")
def artefact(model):
    return FITTED.fit(task(model))


@pytest.fixture(scope="module")
def handmade(model, artefact):
    """Real clusters with made masks: prompt i turns off neuron i of the first layer."""
    first = next(iter(ValueNeurons(model).layers))
    tensors = dict(artefact.tensors)
    tensors[f"refined.{first}"] = torch.eye(len(TEXTS), tensors[f"refined.{first}"].shape[1]).bool()
    for name in [n for n in tensors if n.startswith("refined.") and n != f"refined.{first}"]:
        tensors[name] = torch.zeros_like(tensors[name])
    return Artefact(tensors, artefact.facts)


def embedded(model, texts, settings=SETTINGS):
    return encode_prompts(model, texts, settings)


def factors(model, method, artefact, texts):
    """What the hooks multiply the first layer's neurons by, ``[texts, size]``."""
    with method.apply(model, artefact) as hooks:
        marked = hooks.conditioning(embedded(model, texts), tuple(key(t) for t in texts))
        extra, negative = marked.extra["nemo_c"], marked.negative.extra["nemo_c"]
    assert torch.equal(extra, negative), "both halves of guidance"
    return extra[:, : ValueNeurons(model).sizes[0]]


def drawn(model, method, artefact, keys, batch_size=8):
    with method.apply(model, artefact) as hooks:
        return sample(model, keys, SETTINGS, [hooks], batch_size=batch_size).latents


def test_clusters_are_k_means_of_the_flattened_embeddings(model, artefact):
    points = embedded(model, list(TEXTS)).embeds.flatten(1)
    labels, centroids = artefact.tensors["cluster"], artefact.tensors["centroids"]
    assert centroids.shape == (3, points.shape[1])
    for number in range(3):
        torch.testing.assert_close(centroids[number], points[labels == number].mean(dim=0))
    distances = (points[:, None].double() - centroids.double()).norm(dim=-1)
    assert torch.equal(distances.argmin(dim=1), labels), "a prompt's own centroid is its nearest"
    assert float(artefact.tensors["radius"]) == pytest.approx(float(distances.amin(dim=1).max()), rel=1e-4)
    assert sorted(artefact.facts["prompts_by_cluster"]) == sorted(torch.bincount(labels).tolist())


def test_a_cluster_has_the_union_of_its_prompts_neurons(model, handmade):
    found = factors(model, FITTED, handmade, list(TEXTS))
    labels = handmade.tensors["cluster"]
    for i in range(len(TEXTS)):
        off = (found[i] == 0).nonzero().flatten().tolist()
        assert off == [j for j in range(len(TEXTS)) if labels[j] == labels[i]]
    half = factors(model, replace(FITTED, scale=0.5), handmade, list(TEXTS))
    assert torch.equal(half, torch.where(found == 0, 0.5, 1.0))


def test_a_prompt_that_was_not_fitted_gets_the_nearest_cluster(model, handmade):
    point = embedded(model, [NEAR]).embeds.flatten(1)
    nearest = int((point - handmade.tensors["centroids"]).norm(dim=1).argmin())
    off = (factors(model, FITTED, handmade, [NEAR])[0] == 0).nonzero().flatten().tolist()
    assert off == (handmade.tensors["cluster"] == nearest).nonzero().flatten().tolist() != []


def test_within_a_radius_far_prompts_are_left_alone(model, handmade):
    near = replace(FITTED, radius=1.0)
    found = factors(model, near, handmade, [*TEXTS, FAR])
    assert (found[:-1] == 0).any(dim=1).all(), "fitted prompts are never out of reach"
    assert (found[-1] == 1).all()
    assert (factors(model, FITTED, handmade, [FAR]) == 0).any(), "always the nearest without a radius"
    plain = sample(model, [key(FAR)], SETTINGS).latents
    assert (drawn(model, near, handmade, [key(FAR)]) == plain).all()


def test_common_neurons_of_a_cluster(model, handmade):
    found = factors(model, replace(FITTED, common=1.0), handmade, list(TEXTS))
    sizes = torch.bincount(handmade.tensors["cluster"])[handmade.tensors["cluster"]]
    assert (found == 0).any(dim=1).tolist() == (sizes == 1).tolist()


def test_gating_by_the_union_of_all_is_the_permanent_union(model, handmade):
    """With one cluster both modes turn the same neurons off for every prompt."""
    tensors = {**handmade.tensors, "cluster": torch.zeros(len(TEXTS), dtype=torch.int64)}
    tensors["centroids"] = tensors["centroids"][:1]
    one = Artefact(tensors, handmade.facts)
    keys = [key(TEXTS[0]), key(FAR)]
    gated = drawn(model, FITTED, one, keys)
    union = drawn(model, replace(FITTED, mode="union"), one, keys)
    np.testing.assert_allclose(gated, union, atol=1e-4, rtol=1e-4)
    assert abs(gated - sample(model, keys, SETTINGS).latents).max(axis=(1, 2, 3)).min() > 1e-3


def test_an_image_does_not_depend_on_its_neighbours(model, artefact):
    keys = [key(TEXTS[0]), key(FAR), key(TEXTS[2]), key(NEAR)]
    np.testing.assert_allclose(
        drawn(model, FITTED, artefact, keys),
        drawn(model, FITTED, artefact, keys, batch_size=1),
        rtol=1e-4,
        atol=1e-4,
    )


def test_it_runs_on_sdxl():
    model = build(tiny_sdxl)
    found = FITTED.fit(task(model))
    assert found.facts["prompt_clusters"] == 3
    assert np.isfinite(drawn(model, FITTED, found, [key(FAR)])).all()


def points(groups, each=6):
    draws = torch.Generator().manual_seed(0)
    centres = 10 * torch.eye(8)[:groups]
    return (centres[:, None] + 0.1 * torch.randn(groups, each, 8, generator=draws)).flatten(0, 1)


def test_the_number_of_clusters_has_the_greatest_silhouette():
    labels, silhouettes = clustered(NeMoC(), points(5), seed=0)
    assert labels.unique().numel() == 5 and set(silhouettes) == {str(k) for k in range(2, 25)}
    assert max(silhouettes, key=silhouettes.get) == "5" and silhouettes["5"] > 0.9
    assert all(len(set(labels[i : i + 6].tolist())) == 1 for i in range(0, 30, 6))
    assert set(clustered(NeMoC(most_clusters=3), points(5), 0)[1]) == {"2", "3"}


def test_a_given_number_of_clusters_is_kept():
    labels, silhouettes = clustered(NeMoC(clusters=2), points(5), seed=0)
    assert labels.unique().numel() == 2 and list(silhouettes) == ["2"]
    assert clustered(NeMoC(clusters=1), points(5), 0)[0].unique().tolist() == [0]
    assert clustered(NeMoC(), points(1, each=1), 0)[0].tolist() == [0], "one prompt is one cluster"


def test_more_clusters_than_prompts_are_refused():
    with pytest.raises(UserError, match="9 clusters of 5 prompts: set clusters to 5 or less"):
        clustered(NeMoC(clusters=9), points(5, each=1), 0)


def test_changed_numbers_of_tokens_are_refused(model, artefact):
    with FITTED.apply(model, artefact) as hooks:
        longer = embedded(model, [NEAR])
        longer = longer.with_embeds(torch.cat([longer.embeds, longer.embeds], dim=1))
        with pytest.raises(UserError, match="put it before the method that changes the number of tokens"):
            hooks.conditioning(longer, (key(NEAR),))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "per-prompt"}, "mode is gated or union, not 'per-prompt'"),
        ({"clusters": 0}, "clusters must be at least 1, not 0"),
        ({"most_clusters": 1}, "most_clusters must be at least 2, not 1"),
        ({"radius": -1.0}, "radius must not be negative, not -1.0"),
        ({"seeds": 1}, "seeds must be at least 2, not 1"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings, words):
    with pytest.raises(UserError) as error:
        configure(NeMoC, "gated", settings)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_facts_are_of_the_clusters_unions(model, handmade):
    """At settings that share the fit: every cluster's common neurons count."""
    changed = {
        **handmade.facts,
        **mask_facts(ValueNeurons(model), torch.zeros(1, ValueNeurons(model).total).bool()),
    }
    made = Artefact(handmade.tensors, changed)
    labels = handmade.tensors["cluster"]
    assert FITTED.facts(made)["neurons_of_union"] == len(TEXTS)
    alone = int((torch.bincount(labels) == 1).sum())
    assert replace(FITTED, common=1.0).facts(made)["neurons_of_union"] == alone
