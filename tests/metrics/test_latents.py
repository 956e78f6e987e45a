"""Latents: magnitude and projection against scikit-learn, what is recorded of the change, bad input."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.spatial.distance import pdist
from sklearn.random_projection import GaussianRandomProjection

from lethebench.metric import Shard, detectors
from lethebench.metrics.latents import DIMENSIONS, Latents, drawn, magnitudes, project, projection_matrix
from lethebench.prompts import Prompt, Role

SHAPE = (4, 8, 8)


def prompts(concepts: int = 20, neutral: int = 20, images: int = 2) -> list[tuple[Prompt, int]]:
    made = [Prompt(f"c{i}", "c", Role.CONCEPT, cluster=f"c{i // 2}") for i in range(concepts)]
    made += [Prompt(f"n{i}", "n", Role.NEUTRAL, cluster=f"n{i}") for i in range(neutral)]
    return [(p, k) for p in made for k in range(images)]


def shard(keys: list[tuple[Prompt, int]], latents: np.ndarray | None) -> Shard:
    images = np.zeros((len(keys), 8, 8, 3), np.uint8)
    return Shard(images, tuple(p for p, _ in keys), tuple(k for _, k in keys), None, latents)  # type: ignore[arg-type]


def table(keys: list[tuple[Prompt, int]], latents: np.ndarray | None) -> pd.DataFrame:
    columns = Latents().measure(shard(keys, latents))
    known = {
        "prompt_id": [p.id for p, _ in keys],
        "index": [k for _, k in keys],
        "role": [str(p.role) for p, _ in keys],
        "cluster": [p.cluster for p, _ in keys],
    }
    return pd.DataFrame(known | {k: list(v) if v.ndim > 1 else v for k, v in columns.items()})


def noise(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, *SHAPE)).astype(np.float32)


# --- values of an image ---------------------------------------------------------------------------


def test_magnitude_is_the_norm_over_the_root_of_the_size() -> None:
    x = noise(5)
    by_hand = [np.linalg.norm(row.astype(float).ravel()) / np.sqrt(row.size) for row in x]
    assert magnitudes(x) == pytest.approx(by_hand, rel=1e-12)
    assert magnitudes(np.full((1, 3, 2), -2.0)) == pytest.approx([2.0])


def test_projection_is_scikit_learns_with_our_matrix() -> None:
    x = noise(7)
    theirs = GaussianRandomProjection(DIMENSIONS, random_state=0).fit(x.reshape(7, -1))
    theirs.components_ = projection_matrix(4 * 8 * 8)
    assert np.abs(project(x) - theirs.transform(x.reshape(7, -1))).max() < 1e-5
    spread = projection_matrix(4 * 8 * 8).std()
    assert spread == pytest.approx(theirs.n_components_**-0.5, rel=0.02), "their scale: 1 / sqrt(dimensions)"


def test_projection_keeps_distances_within_the_stated_error() -> None:
    """Relative error of squared distances: mean 0, standard deviation sqrt(2 / 64) = 0.18."""
    x = (
        np.random.default_rng(1).standard_normal((60, 4, 16, 16))
        * np.linspace(0.5, 2, 60)[:, None, None, None]
    )
    before = pdist(x.reshape(60, -1), "sqeuclidean")
    error = pdist(project(x).astype(float), "sqeuclidean") / before - 1
    assert abs(error.mean()) < 0.08 and 0.12 < error.std() < 0.24
    lengths = np.linalg.norm(project(x), axis=1) / np.sqrt(4 * 16 * 16)
    assert np.abs(lengths / magnitudes(x) - 1).max() < 0.4, "any such reduction agrees with the magnitude"


def test_batch_and_order_do_not_change_a_digit() -> None:
    keys = prompts(3, 2)
    x = noise(len(keys))
    whole = Latents().measure(shard(keys, x))
    order = np.random.default_rng(2).permutation(len(keys))
    turned = Latents().measure(shard([keys[i] for i in order], x[order]))
    for name, values in whole.items():
        assert np.array_equal(turned[name], values[order])
        alone = [Latents().measure(shard([keys[i]], x[i : i + 1]))[name][0] for i in range(len(keys))]
        assert np.array_equal(np.stack(alone), values)


def test_nan_where_nothing_was_drawn_or_sampling_diverged() -> None:
    keys = prompts(2, 1, 1)
    x = noise(3)
    x[1, 0, 0, 0] = np.inf
    for latents, known in ((None, []), (np.zeros((3, 0), np.float32), []), (x, [0, 2])):
        columns = Latents().measure(shard(keys, latents))
        assert columns["latent_projection"].shape[0] == 3
        for values in columns.values():
            finite = np.isfinite(values).reshape(3, -1).all(axis=1)
            assert list(np.flatnonzero(finite)) == known
    assert {len(v) for v in Latents().measure(shard([], None)).values()} == {0}
    assert {len(v) for v in Latents().measure(shard([], noise(0))).values()} == {0}


def test_latents_of_another_number_are_one_clear_line() -> None:
    with pytest.raises(ValueError, match="one length"):
        Latents().measure(shard(prompts(2, 1, 1), noise(2)))
    with pytest.raises(ValueError, match="as many latents"):
        drawn(noise(2), 3)


def test_facts_scores_and_detector() -> None:
    metric = Latents()
    json.dumps(metric.facts())
    assert detectors(metric) == {"latent_magnitude": "high"}
    assert {s.name for s in metric.scores} == {
        f"latents.magnitude_{role}" for role in ("neutral", "concept", "trigger")
    }
    assert all(s.direction == "none" for s in metric.scores)


# --- the change from base -------------------------------------------------------------------------


def moved(keys: list[tuple[Prompt, int]], x: np.ndarray, roles: set[Role], by: float) -> np.ndarray:
    out = x.copy()
    for i, (prompt, _) in enumerate(keys):
        if prompt.role in roles:
            out[i] += by
    return out


def test_what_moves_is_found_and_what_stays_is_not() -> None:
    """The paper's claim as a made case: concepts sit apart in base; the method puts them among the neutral."""
    keys = prompts()
    x = noise(len(keys))
    base = moved(keys, x, {Role.CONCEPT}, 0.6)
    wobble = x + 0.05 * noise(len(keys), 1)
    found = Latents().compare(table(keys, wobble), table(keys, base))
    concept, neutral = found["from_base"]["concept"], found["from_base"]["neutral"]
    assert concept["low"] > 0.05 and concept["p"] < 0.01
    assert neutral["p"] > 0.05 and abs(neutral["mmd2"]) < concept["mmd2"] / 20
    apart = found["from_neutral"]["concept"]
    assert apart["base"]["p"] < 0.01 and apart["row"]["p"] > 0.05
    assert apart["row"]["high"] < apart["base"]["low"], "closer than before"
    assert concept["clusters"] == 10 and concept["n"] == 40 and neutral["clusters"] == 20
    assert found["from_base"]["trigger"] is None, "no such prompts"
    json.dumps(found, allow_nan=False)


def test_the_same_latents_are_no_distance_from_base() -> None:
    keys = prompts()
    x = table(keys, noise(len(keys)))
    found = Latents().compare(x, x)
    for role in ("neutral", "concept"):
        assert found["from_base"][role]["mmd2"] == pytest.approx(0, abs=1e-14)
        assert found["from_base"][role]["p"] == 1.0


def test_only_images_that_both_drew_are_compared_and_their_order_is_nothing() -> None:
    keys = prompts()
    x, y = noise(len(keys)), noise(len(keys), 3)
    y[:10] = np.nan
    ours, theirs = table(keys, y), table(keys, x)
    found = Latents().compare(ours, theirs)
    turned = Latents().compare(ours.iloc[::-1], theirs.sample(frac=1, random_state=0))
    assert found["from_base"]["concept"]["n"] == 30
    for name, value in found["from_base"]["concept"].items():
        assert turned["from_base"]["concept"][name] == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("latents", [None, np.ones((80, *SHAPE), np.float32)])
def test_a_base_without_a_scale_is_named(latents: Any) -> None:
    keys = prompts()
    found = Latents().compare(table(keys, noise(80)), table(keys, latents))
    assert set(found) == {"reason"} and found["reason"].startswith("base: ")


def test_a_row_that_drew_nothing_records_that_there_is_no_number() -> None:
    keys = prompts()
    found = Latents().compare(table(keys, None), table(keys, noise(80)))
    assert found["from_base"] == dict.fromkeys(("neutral", "concept", "trigger"))
    assert found["from_neutral"]["concept"]["row"] is None
    assert found["from_neutral"]["concept"]["base"]["p"] > 0.01


def test_prompts_of_one_cluster_in_two_roles_are_not_compared_as_strangers() -> None:
    keys = [(Prompt(p.id, p.text, p.role, cluster=p.cluster[1:]), k) for p, k in prompts()]
    x = table(keys, noise(len(keys)))
    found = Latents().compare(x, x)
    assert found["from_neutral"]["concept"] == {"row": None, "base": None}
