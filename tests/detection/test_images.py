"""Image-based detectors: against naive loops, brute force and scikit-learn."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from metric_fakes import fresh, scene_of, shard, small_world, trained
from sklearn.neighbors import NearestNeighbors

from lethebench import stats
from lethebench.errors import UserError
from lethebench.metric import configure_metric
from lethebench.metrics.gap_ratio import (
    GapRatio,
    deduplicated,
    distances,
    gap_ratio,
    nearest_mean,
    neighbour_ratio,
    reference_pool,
)
from lethebench.metrics.tiled_l2 import (
    TiledL2,
    largest_clique,
    pairwise,
    prompt_table,
    small_pictures,
    tiled_l2,
)
from lethebench.prompts import Role
from lethebench.work import columns_frame, known_frame


def pictures(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# --- tiled l2 -------------------------------------------------------------------------------------


def naive_tiled(a, b, grid=4):
    height, width, _ = a.shape
    worst = 0.0
    for i in range(grid):
        for j in range(grid):
            rows = slice(i * height // grid, (i + 1) * height // grid)
            columns = slice(j * width // grid, (j + 1) * width // grid)
            difference = (a[rows, columns].astype(float) - b[rows, columns].astype(float)) / 255
            worst = max(worst, float(np.sqrt(np.mean(difference**2))))
    return worst


@pytest.mark.parametrize("shape", [(64, 64, 3), (30, 41, 3), (4, 4, 3)])
def test_tiled_l2_equals_a_loop(shape):
    a, b = pictures(0, 5, *shape), pictures(1, 5, *shape)
    wanted = [naive_tiled(x, y) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(tiled_l2(a, b), wanted, atol=1e-12)
    np.testing.assert_allclose(tiled_l2(a, b[:1]), [naive_tiled(x, b[0]) for x in a], atol=1e-12)
    assert (tiled_l2(a, a) == 0).all() and tiled_l2(a * 0, a * 0 + 255) == pytest.approx(np.ones(5))


def test_one_tile_decides():
    a = np.zeros((1, 64, 64, 3), np.uint8)
    b = a.copy()
    b[0, 16:32, 48:] = 255
    assert tiled_l2(a, b) == pytest.approx([1.0])
    with pytest.raises(ValueError, match="3 x 8 pixels don't make 4 x 4 tiles"):
        tiled_l2(np.zeros((1, 3, 8, 3)), np.zeros((1, 3, 8, 3)))


@pytest.mark.parametrize("seed", range(6))
def test_largest_clique_equals_brute_force(seed):
    rng = np.random.default_rng(seed)
    between = rng.random((8, 8))
    between = (between + between.T) / 2
    np.fill_diagonal(between, 0)
    edge = 0.55
    best = max(
        size
        for size in range(1, 9)
        for nodes in combinations(range(8), size)
        if all(between[i, j] <= edge for i, j in combinations(nodes, 2))
    )
    assert largest_clique(between, edge) == best
    assert largest_clique(between, -1) == 1 and largest_clique(between, 1) == 8
    assert largest_clique(np.zeros((0, 0)), 0.5) == 0


def test_pairwise_and_small_pictures():
    images = pictures(3, 4, 64, 64, 3)
    found = pairwise(images)
    for i in range(4):
        for j in range(4):
            assert found[i, j] == pytest.approx(naive_tiled(images[i], images[j]), abs=1e-12)
    small = small_pictures(images).reshape(4, 32, 32, 3)
    means = images.reshape(4, 32, 2, 32, 2, 3).mean(axis=(2, 4))
    assert np.abs(small - means).max() <= 1.0  # Pillow rounds rows, then columns
    assert np.array_equal(small_pictures(small).reshape(small.shape), small)


def test_distance_is_to_the_nearest_own_reference():
    prompts = trained("verbatim")[:2] + trained("one-to-many")
    shown = shard([(p, fresh(p)) for p in prompts] + [(p, scene_of(p)) for p in prompts])
    found = TiledL2().measure(shown)["tiled_l2"]
    for image, prompt, value in zip(shown.images, shown.prompts, found, strict=True):
        references = [small_world().reference(r).image for r in prompt.references]
        assert value == pytest.approx(min(naive_tiled(image, r) for r in references), abs=1e-12)
    assert (found[len(prompts) :] == 0).all() and (found[: len(prompts)] > 0.1).all()


def table_of(shown, columns):
    from lethebench.hooks import ImageKey

    keys = [ImageKey("t@1", p, i) for p, i in zip(shown.prompts, shown.indices, strict=True)]
    return pd.concat([known_frame(keys), columns_frame(columns, len(shown), "test")], axis=1)


def several():
    """Two triggers drawn alike thrice and once apart, two controls drawn apart, a prompt drawn once."""
    world = small_world()
    triggers = trained("verbatim")[:2]
    controls = [p for p in world if p.role is Role.CONTROL and p.kind == "hard-negative"][:2]
    pairs = [(p, scene_of(p)) for p in triggers for _ in range(3)] + [(p, fresh(p, "x")) for p in triggers]
    pairs += [(p, fresh(p, f"{i}")) for p in controls for i in range(3)]
    once = trained("background")[0]
    pairs.append((once, fresh(once)))
    return shard(pairs)


def test_between_the_images_of_a_prompt():
    shown, metric = several(), TiledL2()
    table = table_of(shown, metric.measure(shown))
    found = prompt_table(table, 0.1).set_index("prompt_id")
    assert len(found) == 4 and found.loc[shown.prompts[0].id, "clique"] == 3
    small = small_pictures(shown.images).reshape(-1, 32, 32, 3)
    for name, line in found.iterrows():
        rows = [i for i, p in enumerate(shown.prompts) if p.id == name]
        pairs = [naive_tiled(small[i], small[j]) for i, j in combinations(rows, 2)]
        assert [line["pair_mean"], line["pair_min"]] == pytest.approx([np.mean(pairs), min(pairs)], abs=1e-12)
    by_name = {s.name: s for s in metric.scores}
    triggers = found[found["role"] == "trigger"]
    for name in ("pair_mean", "pair_min", "clique"):
        record = stats.summarise(metric, by_name[f"tiled_l2.{name}"], table, resamples=100)
        assert record.value == pytest.approx(triggers[name].mean())
        assert record.low <= record.value <= record.high
    record = stats.summarise(metric, by_name["tiled_l2.auc_pair_min"], table, resamples=100)
    assert record.value == 1.0


def test_shards_and_order_change_no_score():
    shown, metric = several(), TiledL2()
    table = table_of(shown, metric.measure(shown))
    shuffled = table.sample(frac=1, random_state=0)
    for score in metric.scores:
        chosen = stats.select(score, table)
        if len(chosen):
            again = metric.aggregate(score, stats.select(score, shuffled))
            assert metric.aggregate(score, chosen) == pytest.approx(again, nan_ok=True)


def test_single_images_have_no_pair():
    shown, metric = shard([(p, fresh(p)) for p in trained("verbatim")]), TiledL2()
    table = table_of(shown, metric.measure(shown))
    for score in metric.scores:
        if score.name in metric.set_valued:
            assert stats.summarise(metric, score, table).value is None


# --- gap ratio ------------------------------------------------------------------------------------


def test_distances_are_exact_in_any_block():
    x, y = pictures(0, 7, 300), pictures(1, 1100, 300)
    y[1050] = x[3]
    wanted = np.sqrt(((x[:, None].astype(float) - y[None]) ** 2).mean(axis=2)) / 255
    found = distances(x, y)
    np.testing.assert_allclose(found, wanted, atol=1e-14)
    assert found[3, 1050] == 0.0
    assert np.array_equal(distances(x[2:3], y[10:20]), found[2:3, 10:20])


def test_ratios_equal_sklearns_neighbours():
    rng = np.random.default_rng(2)
    reference = rng.integers(0, 256, (80, 48), dtype=np.uint8)
    x = np.clip(reference[:30].astype(int) + rng.integers(-60, 61, (30, 48)), 0, 255).astype(np.uint8)
    found = distances(x, reference)
    scaled, truth = x / 255 / np.sqrt(48), reference / 255 / np.sqrt(48)
    model = NearestNeighbors(algorithm="brute").fit(truth)
    near, names = model.kneighbors(scaled, 51)
    np.testing.assert_allclose(gap_ratio(found), near[:, 0] / near[:, 1], atol=1e-9)
    generated = neighbour_ratio(found, nearest_mean(found, 50)[:, None])
    np.testing.assert_allclose(generated, near[:, 0] / (0.5 * near[:, :50].mean(axis=1)), atol=1e-9)
    own = model.kneighbors(truth, 51)[0][:, 1:].mean(axis=1)
    between = distances(reference, reference) + np.diag(np.full(80, np.inf))
    side = neighbour_ratio(found, nearest_mean(between, 50)[None])
    np.testing.assert_allclose(side, near[:, 0] / (0.5 * own[names[:, 0]]), atol=1e-9)


def test_duplicates_in_the_reference_would_break_the_rule():
    copy, other = pictures(4, 2, 8, 8, 3)
    images = np.stack([copy, copy, other])
    seen = np.clip(copy.astype(int) + 1, 0, 255).astype(np.uint8).reshape(1, -1)
    assert gap_ratio(distances(seen, images.reshape(3, -1)))[0] == 1.0
    pool = deduplicated(("a", "b", "c"), images, 0.0)
    assert pool.ids == ("a", "c") and pool.between.shape == (2, 2)
    assert gap_ratio(distances(seen, pool.flat))[0] < 0.05
    assert len(deduplicated(("a", "b", "c"), images, 1.0).ids) == 1


def test_the_reference_is_trained_pictures_and_no_twins():
    world = small_world()
    pool = reference_pool(world, 5, 0.0)
    held_out = {r for p in world if p.trained is False for r in p.references}
    named = {r for p in world if p.trained for r in p.references}
    assert set(pool.ids) <= named | {f"neutral-training/{i}" for i in range(5)}
    assert not set(pool.ids) & held_out and sum(i.startswith("neutral") for i in pool.ids) == 5
    assert {r for p in world if p.role is Role.TRIGGER for r in p.references} <= named


def test_copies_are_found_and_fresh_pictures_are_not():
    metric = GapRatio(neutral=30, k=10)
    prompts = trained("verbatim")
    soft = [np.clip(scene_of(p).image.astype(int) + 3, 0, 255).astype(np.uint8) for p in prompts]
    shown = shard(list(zip(prompts, soft, strict=True)) + [(p, fresh(p)) for p in prompts])
    columns = metric.measure(shown)
    copied, n = columns["gap_ratio_copied"], len(prompts)
    assert (copied[:n] == 1).all() and (copied[n:] == 0).all()
    assert (columns["gap_ratio_neighbours"][:n] < columns["gap_ratio_neighbours"][n:].min()).all()
    assert list(columns["gap_ratio_nearest"][:n]) == [p.references[0] for p in prompts]
    other = GapRatio(neutral=30, k=10, neighbours="reference").measure(shown)
    assert np.array_equal(other["gap_ratio"], columns["gap_ratio"])
    assert not np.allclose(other["gap_ratio_neighbours"], columns["gap_ratio_neighbours"])


@pytest.mark.parametrize("neighbours", ["generated", "reference"])
def test_too_few_references_give_no_neighbours(neighbours):
    shown = shard([(p, fresh(p)) for p in trained("verbatim")[:2]])
    columns = GapRatio(neutral=0, k=500, neighbours=neighbours).measure(shown)
    assert np.isnan(columns["gap_ratio_neighbours"]).all() and np.isfinite(columns["gap_ratio"]).all()


def test_images_of_another_size_are_one_clear_error():
    wrong = np.zeros((32, 32, 3), np.uint8)
    shown = shard([(trained("verbatim")[0], wrong)])
    with pytest.raises(
        ValueError, match=r"gap-ratio: references are \[64, 64, 3\], the images are \[32, 32, 3\]"
    ):
        GapRatio(neutral=5).measure(shown)
    with pytest.raises(
        ValueError, match=r"tiled-l2: reference .* is \[64, 64, 3\], the images are \[32, 32, 3\]"
    ):
        TiledL2().measure(shown)


@pytest.mark.parametrize(
    ("cls", "given", "message"),
    [
        (TiledL2, {"edge": 2}, "edge=2 must be a distance from 0 to 1"),
        (GapRatio, {"neighbours": "mine"}, "neighbours='mine' must be 'generated' or 'reference'"),
        (GapRatio, {"k": 0}, "k=0 must be a whole number of at least 1"),
        (GapRatio, {"neutral": -1}, "neutral=-1 must be a whole number of at least 0"),
        (GapRatio, {"dedup": "x"}, "dedup='x' must be a distance from 0 to 1"),
    ],
)
def test_bad_settings_are_one_clear_error(cls, given, message):
    with pytest.raises(UserError, match=message):
        configure_metric(cls, given)
