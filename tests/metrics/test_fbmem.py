from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from metric_fakes import TrueMasks, fresh, picture, scene_of, shard, small_world, trained
from scipy.ndimage import gaussian_filter
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as torch_ms_ssim

from lethebench import stats
from lethebench.datasets.planted import Picture, render_backdrop
from lethebench.errors import UserError
from lethebench.metric import Shard
from lethebench.metrics import _calibration
from lethebench.metrics._common import read_calibration
from lethebench.metrics.fbmem import FBMem, FBMemAsReleased, _labels
from lethebench.metrics.fbmem import _functional as fn
from lethebench.metrics.fbmem._constants import THREE_SCALES
from lethebench.metrics.fbmem._noise import disc, noise_table
from lethebench.metrics.fbmem.metric import FOLDER
from lethebench.prompts import Prompt, Reference, Role


def pictures(*made: Picture) -> fn.Pictures:
    masks = np.stack([p.mask >= 128 for p in made])
    return fn.Pictures.of(np.stack([p.image for p in made]), masks)


def noisy(image: np.ndarray, rms: float, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 255 * rms, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("size", "scales"), [(48, 3), (64, 3), (97, 3), (176, 5), (201, 5)])
def test_ms_ssim_equals_torchmetrics(size: int, scales: int) -> None:
    generator = torch.Generator().manual_seed(size)
    x = torch.rand(6, 3, size, size, generator=generator)
    y = (x + torch.linspace(0, 1, 6)[:, None, None, None] * torch.randn(x.shape, generator=generator)).clamp(
        0, 1
    )
    own = {"betas": fn.betas(size, size)} if scales == 3 else {}  # five: torchmetrics' defaults
    theirs = torch_ms_ssim(x, y, **own, data_range=1.0, reduction="none")
    assert len(fn.betas(size, size)) == scales
    assert float((fn.ms_ssim(x, y) - theirs).abs().max()) < 1e-5


def naive_ms_ssim(x: np.ndarray, y: np.ndarray, betas: tuple[float, ...]) -> float:
    """MS-SSIM of grey pictures by scipy's Gaussian filter, in float64."""

    def blur(a: np.ndarray) -> np.ndarray:
        return gaussian_filter(a, 1.5, radius=5, mode="mirror")

    product = 1.0
    for scale, beta in enumerate(betas, 1):
        mx, my = blur(x), blur(y)
        vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
        term = (2 * cov + fn.C2) / (vx + vy + fn.C2)
        if scale == len(betas):
            return product * max(0, (term * (2 * mx * my + fn.C1) / (mx**2 + my**2 + fn.C1)).mean()) ** beta
        product *= max(0, term[5:-5, 5:-5].mean()) ** beta
        even = [side // 2 * 2 for side in x.shape]
        x, y = (
            a[: even[0], : even[1]].reshape(even[0] // 2, 2, even[1] // 2, 2).mean(axis=(1, 3))
            for a in (x, y)
        )
    raise AssertionError


@pytest.mark.parametrize(("height", "width", "scales"), [(44, 60, 3), (175, 200, 3), (176, 180, 5)])
def test_scales_by_size_equal_scipy(height: int, width: int, scales: int) -> None:
    rng = np.random.default_rng(height)
    x = gaussian_filter(rng.random((height, width)), 2)
    y = x + 0.05 * gaussian_filter(rng.standard_normal((height, width)), 1)
    given = [torch.tensor(a, dtype=torch.float32).expand(1, 3, -1, -1) for a in (x, y)]
    assert len(fn.betas(height, width)) == scales
    assert float(fn.ms_ssim(*given)) == pytest.approx(naive_ms_ssim(x, y, fn.betas(height, width)), abs=1e-4)


def test_pictures_too_small_for_three_scales_are_one_clear_error() -> None:
    with pytest.raises(ValueError, match="fbmem: images must have at least 44 pixels a side; got 40 x 64"):
        fn.ms_ssim(torch.zeros(1, 3, 40, 64), torch.zeros(1, 3, 40, 64))


def test_ms_ssim_equals_torchmetrics_on_pictures() -> None:
    made = pictures(*(fresh(p) for p in trained("verbatim")))
    x, y = made.pixels, made.pixels.roll(1, 0)
    for other in (
        y,
        (x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1),
    ):
        theirs = torch_ms_ssim(x, other, betas=THREE_SCALES, data_range=1.0, reduction="none")
        assert float((fn.ms_ssim(x, other) - theirs).abs().max()) < 1e-4


def naive_terms(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> tuple[float, float]:
    """Weighted windows one by one, in float64; x and y [c, h, w]."""
    steps = np.arange(-5, 6)
    gauss = np.exp(-(steps**2) / (2 * 1.5**2))
    kernel = np.outer(gauss, gauss)
    contrast, both, mass = 0.0, 0.0, 0.0
    for i in range(5, x.shape[1] - 5):
        for j in range(5, x.shape[2] - 5):
            at = (slice(i - 5, i + 6), slice(j - 5, j + 6))
            k = kernel * w[at]
            total = k.sum()
            if total < 1e-12:
                continue
            for a, b in zip(x, y, strict=True):
                ma, mb = (k * a[at]).sum() / total, (k * b[at]).sum() / total
                va, vb = (k * (a[at] - ma) ** 2).sum() / total, (k * (b[at] - mb) ** 2).sum() / total
                cov = (k * (a[at] - ma) * (b[at] - mb)).sum() / total
                c = (2 * cov + fn.C2) / (va + vb + fn.C2)
                contrast += total * c
                both += total * c * (2 * ma * mb + fn.C1) / (ma**2 + mb**2 + fn.C1)
            mass += 3 * total
    return contrast / mass, both / mass


def test_masked_terms_equal_a_loop_over_windows() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.random((2, 3, 24, 24))
    w = (rng.random((24, 24)) < 0.3).astype(float)
    w[:, :8] = 0
    ours = fn.scale_terms(*(torch.tensor(a, dtype=torch.float32)[None] for a in (x, y, w[None])))
    assert [float(t) for t in ours] == pytest.approx(naive_terms(x, y, w), abs=1e-5)


def test_nothing_outside_the_region_enters() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y, other = torch.rand(3, 1, 3, 64, 64, generator=generator)
    weight = torch.zeros(1, 1, 64, 64)
    weight[..., 10:41, 22:50] = 1
    painted = torch.where(weight > 0, x, other)
    assert float(fn.ms_ssim(painted, y, weight)) == pytest.approx(float(fn.ms_ssim(x, y, weight)), abs=1e-6)
    assert float(fn.ms_ssim(painted, x, weight)) == pytest.approx(1, abs=1e-5)


def test_region_similarity_is_symmetric_and_one_on_itself() -> None:
    made = pictures(*(fresh(p) for p in trained("verbatim")))
    ahead = fn.region_similarity(made, made[torch.arange(len(made)).roll(1)])
    back = fn.region_similarity(made[torch.arange(len(made)).roll(1)], made)
    torch.testing.assert_close(ahead, back)
    for one in fn.region_similarity(made, made):
        torch.testing.assert_close(one, torch.ones(len(made)), atol=1e-5, rtol=0)


def test_against_all_finds_the_best_of_every_pair() -> None:
    world = small_world()
    ids = sorted({r for p in world for r in p.references})
    references = pictures(*(picture(world.reference_scene(r)) for r in ids))
    always = torch.zeros(len(ids), dtype=torch.bool)
    always[3] = True
    for prompt in trained("verbatim")[:3] + trained("foreground")[:1]:
        one = pictures(fresh(prompt))
        f, b = fn.region_similarity(one.repeated(len(ids)), references)
        for keep in (None, len(ids)):
            found = fn.against_all(one, references, keep=keep, always=always)
            known = ~found[0].isnan()
            assert known[3]
            torch.testing.assert_close(found[0][known], f[known], atol=1e-5, rtol=0)
            torch.testing.assert_close(found[1][known], b[known], atol=1e-5, rtol=0)
            assert fn.best_match(*found) == fn.best_match(f, b)
        among = torch.zeros(len(ids), dtype=torch.bool)
        among[5:20] = True
        found = fn.against_all(one, references, among=among, always=always)
        assert set(torch.nonzero(~found[0].isnan())[:, 0].tolist()) <= {3, *range(5, 20)}
        among[3] = True
        assert fn.best_match(*found) == fn.best_match(torch.where(among, f, torch.nan), b)


def test_the_engine_gives_as_released_of_every_pair() -> None:
    references = pictures(*(fresh(p, "many") for p in trained("verbatim") + trained("background")))
    masks = references.masks.clone()
    masks[1] = 0  # nothing in front: the whole pictures are compared
    references = fn.Pictures(references.pixels, masks)
    made = pictures(*(fresh(p) for p in trained("verbatim")))
    always = torch.ones(len(references), dtype=torch.bool)
    found = fn.against_every(made, references)
    assert torch.equal(found[0][:, 1], found[1][:, 1])
    for row in range(len(made)):
        one = made[slice(row, row + 1)]
        each = fn.against_all(one, references, "as-released", keep=None, always=always)
        for ours, theirs in zip(found, each, strict=True):
            torch.testing.assert_close(ours[row], theirs, atol=1e-4, rtol=0)


def test_memory_limit_changes_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    references = pictures(*(fresh(p, "many") for p in trained("verbatim") + trained("background")))
    one = pictures(fresh(trained("verbatim")[0]))
    for variant in ("masked", "as-released"):
        whole = fn.against_all(one, references, variant, keep=None)  # type: ignore[arg-type]
        with monkeypatch.context() as patch:
            patch.setattr(fn, "CHUNK_PIXELS", 3 * 2 * 64 * 64)
            parts = fn.against_all(one, references, variant, keep=None)  # type: ignore[arg-type]
        assert fn.best_match(*whole) == fn.best_match(*parts)
        for a, b in zip(whole, parts, strict=True):
            both = ~(a.isnan() | b.isnan())
            torch.testing.assert_close(a[both], b[both], atol=1e-6, rtol=0)


def test_prefilter_keeps_copies() -> None:
    world = small_world()
    ids = sorted({r for p in world for r in p.references})
    references = pictures(*(picture(world.reference_scene(r)) for r in ids))
    for prompt in trained("verbatim") + trained("foreground") + trained("background"):
        made = scene_of(prompt, 1 if prompt.kind != "verbatim" else 0)
        one = pictures(Picture(noisy(made.image, 0.03), made.mask))
        assert ids[fn.best_match(*fn.against_all(one, references, keep=6))] == prompt.references[0]


@pytest.mark.parametrize("times", [1, 3])
def test_as_released_is_flat_fill_by_torchmetrics(times: int) -> None:
    """At 64 pixels with NeMo's three scales, at 192 with torchmetrics' own five."""
    a, b = (
        pictures(
            *(
                Picture(p.image.repeat(times, 0).repeat(times, 1), p.mask.repeat(times, 0).repeat(times, 1))
                for p in (fresh(prompt, key) for prompt in trained("verbatim"))
            )
        )
        for key in "ab"
    )
    betas = {"betas": THREE_SCALES} if times == 1 else {}
    f, back = fn.region_similarity(a, b, "as-released")
    for ours, fill, inside in ((f, 0.0, True), (back, 1.0, False)):
        x, y = (torch.where((p.masks > 0) == inside, p.pixels, torch.tensor(fill)) for p in (a, b))
        theirs = torch_ms_ssim(x, y, **betas, data_range=1.0, reduction="none")
        assert float((ours - theirs).abs().max()) < 1e-4


def test_flat_fill_calls_unrelated_foregrounds_alike_and_masked_does_not() -> None:
    far = np.hypot(*np.mgrid[-32:32, -32:32])
    disc = torch.from_numpy((far < 11.4).astype(np.float32))[None, None]  # a tenth of the area
    one, other = (pictures(fresh(p)) for p in trained("verbatim")[:2])
    a, b = fn.Pictures(one.pixels, disc), fn.Pictures(other.pixels, disc)
    assert float(fn.region_similarity(a, b, "as-released")[0]) > 0.7
    assert float(fn.region_similarity(a, b)[0]) < 0.3


def test_noise_reads_alike_by_flat_fill_where_the_mask_is_small() -> None:
    released, masked = (
        noise_table(v, side=176, areas=(0.1, 0.5), pairs=1) for v in ("as-released", "masked")
    )  # type: ignore[arg-type]
    assert released["0.10"]["same_place"] > 0.8
    assert released["0.50"]["same_place"] < 0.7
    assert all(value < 0.3 for row in masked.values() for value in row.values())


def test_discs_cover_their_area() -> None:
    for area in (0.04, 0.1, 0.5):
        assert disc(512, area).mean() == pytest.approx(area, abs=1e-3)
        assert (disc(512, area, 60)[:, 60:] == disc(512, area)[:, :-60]).all()


def test_adaptive_rule_compares_whole_pictures_on_either_side() -> None:
    a, b = (pictures(fresh(p)) for p in trained("verbatim")[:2])
    tiny = torch.zeros_like(a.masks)
    tiny[..., :8, :8] = 1
    whole = fn.ms_ssim(a.pixels, b.pixels)
    small, large = fn.Pictures(a.pixels, tiny), fn.Pictures(b.pixels, 1 - tiny)
    for first, second, variants in (
        (small, b, ["as-released"]),
        (a, large, ["as-released", "masked"]),
        (small, fn.Pictures(b.pixels, tiny), ["as-released", "masked"]),
    ):
        for variant in variants:
            for found in fn.region_similarity(first, second, variant):  # type: ignore[arg-type]
                torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)


def test_a_copied_background_without_its_foreground_is_bm() -> None:
    made = []
    for prompt in trained("background") + trained("verbatim"):
        item = small_world().item_of(prompt.id)
        assert item is not None
        bare = Picture(render_backdrop(item.scenes[0].backdrop), np.zeros((64, 64), np.uint8))
        made.append((prompt, bare))
    columns = FBMem(TrueMasks()).measure(shard(made))
    assert columns["fbmem_label"].tolist() == ["BM"] * len(made)


# --- the metric -----------------------------------------------------------------------------------


def cases() -> list[tuple[Prompt, Picture, str]]:
    """Prompt, picture and the label that it must get."""
    found = [(p, scene_of(p), "VM") for p in trained("verbatim") + trained("one-to-many")]
    found += [(p, scene_of(p, 2), "FM") for p in trained("foreground")]
    found += [(p, scene_of(p, 2), "BM") for p in trained("background")]
    return found + [(p, fresh(p), "NM") for p in trained("verbatim") + trained("hard-negative")]


def test_labels_of_rendered_scenes() -> None:
    made = cases()
    columns = FBMem(TrueMasks()).measure(shard([(p, i) for p, i, _ in made]))
    assert columns["fbmem_label"].tolist() == [label for _, _, label in made]
    for row, (prompt, _, label) in enumerate(made):
        assert (columns["fbmem_best"][row] in prompt.references) or label == "NM"
        assert columns["fbmem_memorized"][row] == (label != "NM")
        assert columns[f"fbmem_{label.lower()}"][row] == 1
        if label == "VM":
            assert columns["fbmem_own"][row] == pytest.approx(1, abs=1e-4)


def test_true_masks_of_references_give_the_same_labels() -> None:
    made = cases()
    images = shard([(p, i) for p, i, _ in made])
    ours, true = (FBMem(TrueMasks(), true_masks=t).measure(images) for t in (False, True))
    assert ours["fbmem_label"].tolist() == true["fbmem_label"].tolist()


def test_blank_and_noise_are_not_memorized() -> None:
    prompts = trained("verbatim")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    made = [(p, i) for p in prompts for i in (np.full((64, 64, 3), 128, np.uint8), noise)]
    assert set(FBMem(TrueMasks()).measure(shard(made))["fbmem_label"]) == {"NM"}


class Covering:
    """A segmenter that a broken image fools: everything but a frame of one pixel, or speckles."""

    def masks(self, images: np.ndarray) -> np.ndarray:
        frame = np.pad(np.ones((62, 62), np.float32), 1)
        speckles = (np.random.default_rng(0).random((64, 64)) < 0.4).astype(np.float32)
        return np.stack([frame if i % 2 else speckles for i in range(len(images))])


def test_a_background_that_is_nowhere_is_not_memorized() -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    made = [(p, noise) for p in trained("verbatim")]
    assert set(FBMem(Covering()).measure(shard(made))["fbmem_label"]) == {"NM"}


@pytest.mark.parametrize("metric", [FBMem, FBMemAsReleased])
def test_batch_and_order_do_not_matter(metric: type[FBMem]) -> None:
    made = [(p, i) for p, i, _ in cases()]
    whole = metric(TrueMasks()).measure(shard(made))
    backwards = metric(TrueMasks()).measure(shard(made[::-1]))
    alone = [metric(TrueMasks()).measure(shard([pair])) for pair in made]
    for name, column in whole.items():
        singly = np.concatenate([c[name] for c in alone])
        if column.dtype == object:
            assert column.tolist() == backwards[name][::-1].tolist() == singly.tolist()
        else:
            np.testing.assert_allclose(column, backwards[name][::-1], atol=1e-5)
            np.testing.assert_allclose(column, singly, atol=1e-5)


def test_prompts_without_references_have_no_label() -> None:
    neutral = next(p for p in small_world() if p.role is Role.NEUTRAL)
    concept = next(p for p in small_world() if p.role is Role.CONCEPT)
    columns = FBMem(TrueMasks()).measure(shard([(neutral, fresh(neutral)), (concept, fresh(neutral))]))
    assert columns["fbmem_label"].tolist() == ["", ""]
    assert all(np.isnan(v).all() for v in columns.values() if v.dtype != object)


def test_empty_shard_has_empty_columns() -> None:
    for metric in (FBMem(TrueMasks()), FBMemAsReleased(TrueMasks())):
        assert {len(v) for v in metric.measure(shard([])).values()} == {0}


def test_as_released_metric_calls_copies_memorized() -> None:
    made = [(p, scene_of(p)) for p in trained("verbatim")]
    columns = FBMemAsReleased(TrueMasks()).measure(shard(made))
    assert set(columns["fbmem_as_released_label"]) == {"VM"}


@pytest.mark.parametrize(
    "images", [np.zeros((1, 64, 64, 3)), np.zeros((1, 64, 64), np.uint8), np.zeros((1, 32, 32, 3), np.uint8)]
)
def test_wrong_images_are_one_clear_error(images: np.ndarray) -> None:
    prompt = trained("verbatim")[0]
    with pytest.raises(ValueError, match="fbmem: "):
        FBMem(TrueMasks()).measure(Shard(images, (prompt,), (0,), small_world()))


def test_lengths_that_differ_are_one_clear_error() -> None:
    prompt = trained("verbatim")[0]
    with pytest.raises(
        ValueError, match="fbmem: the parts of a shard must be of one length; got 1 images, 2 prompts"
    ):
        FBMem(TrueMasks()).measure(Shard(fresh(prompt).image[None], (prompt, prompt), (0, 1), small_world()))


def test_reference_without_true_mask_is_one_clear_error() -> None:
    class Maskless:
        name, version = "maskless", "1"
        world = small_world()

        def __iter__(self):
            return iter(self.world)

        def reference(self, name: str) -> Reference:
            return Reference(name, self.world.reference(name).image)

    prompt = trained("verbatim")[0]
    images = Shard(fresh(prompt).image[None], (prompt,), (0,), Maskless())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no true mask"):
        FBMem(TrueMasks(), true_masks=True).measure(images)


# --- what labels add up to ------------------------------------------------------------------------


def score(name: str) -> Any:
    return next(s for s in FBMem.scores if s.name == f"fbmem.{name}")


def test_distinct_matches_with_and_without_a_floor() -> None:
    table = pd.DataFrame(
        {
            "cluster": ["a", "a", "a", "a", "b", "b", "c"],
            "fbmem_best": ["1", "2", "2", "9", "3", "3", "4"],
            "fbmem_memorized": [1.0, 1, 1, 0, 1, 1, 0],
        }
    )
    assert FBMem().aggregate(score("distinct_matches"), table) == pytest.approx((2 + 1 + 0) / 3)
    assert FBMem().aggregate(score("distinct_matches_all"), table) == pytest.approx((3 + 1 + 1) / 3)


def results(*rows: tuple[str, int, str], role: str = "trigger") -> pd.DataFrame:
    return pd.DataFrame(
        {
            "prompt_id": [p for p, _, _ in rows],
            "index": [i for _, i, _ in rows],
            "role": role,
            "fbmem_label": [label for _, _, label in rows],
            "fbmem_risk": _labels.risks(np.array([label for _, _, label in rows], dtype=object)),
        }
    )


BASE = results(("p", 0, "VM"), ("p", 1, "BM"), ("q", 0, "FM"), ("q", 1, "NM"), ("r", 0, "VM"))
MITIGATED = results(("r", 0, "VM"), ("q", 1, "BM"), ("q", 0, "NM"), ("p", 1, "NM"), ("p", 0, "BM"))


def test_risk_is_the_labels_weight() -> None:
    assert BASE["fbmem_risk"].tolist() == [2, 0.5, 1.5, 0, 2]
    assert np.isnan(_labels.risks(np.array([""], dtype=object))).all()
    assert FBMem().aggregate(score("risk"), BASE) == pytest.approx(6 / 5)
    assert (score("risk").direction, score("risk").bounds) == ("lower", (0.0, 2.0))
    made = [(p, i) for p, i, _ in cases()]
    columns = FBMem(TrueMasks()).measure(shard(made))
    weights = {"VM": 2.0, "FM": 1.5, "BM": 0.5, "NM": 0.0}
    assert columns["fbmem_risk"].tolist() == [weights[label] for label in columns["fbmem_label"]]


def test_mitigation_is_the_mean_risk_that_went_away() -> None:
    """By hand: VM to BM 1.5, BM to NM 0.5, FM to NM 1.5, NM to BM -0.5, VM to VM 0; mean 3 / 5."""
    others = results(("n", 0, "VM"), ("p", 0, ""), role="control")
    blank = results(("s", 0, ""))
    found = FBMem().compare(pd.concat([MITIGATED, others, blank]), pd.concat([BASE, blank]))
    assert found["mitigation"] == pytest.approx(0.6)
    assert (found["images"], found["base_risk"], found["risk"]) == (5, 1.2, 0.6)
    assert found["transitions"] == {
        "VM": {"VM": 1, "FM": 0, "BM": 1, "NM": 0},
        "FM": {"VM": 0, "FM": 0, "BM": 0, "NM": 1},
        "BM": {"VM": 0, "FM": 0, "BM": 0, "NM": 1},
        "NM": {"VM": 0, "FM": 0, "BM": 1, "NM": 0},
    }
    json.dumps(found)
    assert FBMem().compare(BASE, BASE)["mitigation"] == 0
    assert FBMem().compare(blank, blank) == {}


def test_mitigation_is_less_the_risks_difference_from_base() -> None:
    clusters = [
        {**t, "cluster": t["prompt_id"], "kind": "verbatim", "trained": True} for t in (MITIGATED, BASE)
    ]
    tables = [pd.DataFrame(c) for c in clusters]
    record = stats.summarise(FBMem(), score("risk"), *tables, resamples=20, seed_parts=("test",))
    assert record.base_difference is not None
    assert -record.base_difference.value == pytest.approx(FBMem().compare(*tables)["mitigation"])


def test_images_without_a_counterpart_are_one_clear_error() -> None:
    for table, base, words in (
        (
            MITIGATED[1:],
            BASE,
            "fbmem: 1 trigger images have no counterpart, first image 0 of prompt r, which",
        ),
        (MITIGATED, BASE[1:], "which base lacks: score both on the same prompts and images"),
        (MITIGATED, pd.concat([BASE, BASE[:1]]), "image 0 of prompt p is twice"),
    ):
        with pytest.raises(UserError, match=words):
            FBMem().compare(table, base)


def test_as_released_compares_its_own_labels() -> None:
    def renamed(t: pd.DataFrame) -> pd.DataFrame:
        return t.rename(columns={"fbmem_label": "fbmem_as_released_label"})

    assert FBMemAsReleased().compare(renamed(MITIGATED), renamed(BASE))["mitigation"] == pytest.approx(0.6)


# --- unrelated pictures ---------------------------------------------------------------------------


def test_unrelated_pictures_are_told_by_area() -> None:
    world, tau = small_world(), {"foreground": 0.605, "background": 0.73}
    examples = list(_calibration.negatives(world, 24, 0))

    class Half:
        def masks(self, images: np.ndarray) -> np.ndarray:
            found = np.zeros(images.shape[:3], np.float32)
            found[:, :32, :8] = 1  # a sixteenth
            return found

    pairs = _calibration._random_pairs(_calibration._seen(world, examples, Half()), 0)
    assert len(pairs["area"]) == 24 * _calibration.PAIRS
    table = _calibration._says(pairs["area"], *pairs["as-released"], tau)
    assert list(table) == ["0.06-0.10"] and table["0.06-0.10"]["n"] == 24 * _calibration.PAIRS
    by_hand = (pairs["as-released"][0] >= 0.605) | (pairs["as-released"][1] >= 0.73)
    assert table["0.06-0.10"]["memorized"] == pytest.approx(by_hand.mean(), abs=1e-5)
    assert pairs["as-released"][0].mean() > pairs["masked"][0].mean() + 0.3


def test_the_stored_table_is_of_the_calibrations_thresholds() -> None:
    stored = json.loads((FOLDER / "unrelated.json").read_text())
    assert stored["recipe"]["tau"]["masked"] == read_calibration(FOLDER)["tau"]
    assert stored["made_with"] == read_calibration(FOLDER)["made_with"]
    for metric in (FBMem(), FBMemAsReleased()):
        told = metric.facts()["unrelated_pictures"]
        assert told == stored[metric.variant] and set(told) == {"images", "pairs", "noise"}
    noise = stored["as-released"]["noise"]["0.10"]  # the research note: 0.92, and 0.81 apart
    assert noise["same_place"] == pytest.approx(0.92, abs=0.03)
    assert noise["shifted_60_px"] == pytest.approx(0.81, abs=0.05)
    assert stored["masked"]["noise"]["0.10"]["same_place"] < 0.1
