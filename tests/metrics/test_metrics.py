"""Every metric but FB-Mem: against independent implementations, and the contract that all share."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from cleanfid.fid import frechet_distance as clean_fid_distance
from metric_fakes import Knows, Thumbnails, TrueMasks, fresh, scene_of, shard, small_world, table, trained
from scipy.linalg import sqrtm
from scipy.spatial.distance import pdist
from sklearn.metrics import roc_auc_score

from lethebench import stats
from lethebench.errors import RunError
from lethebench.metric import Metric, Score, Shard
from lethebench.metrics import meta
from lethebench.metrics._calibration import judge_sha256, positives, soften, threshold
from lethebench.metrics._common import read_calibration
from lethebench.metrics.clip_mini import ClipMini
from lethebench.metrics.copy_mini import CopyMini
from lethebench.metrics.copy_mini.metric import FOLDER as COPY_MINI
from lethebench.metrics.fbmem import FBMem, FBMemAsReleased
from lethebench.metrics.fbmem.metric import FOLDER as FBMEM
from lethebench.metrics.fd_mini import FDMini, frechet_distance, frechet_of_features
from lethebench.metrics.fidelity_mini import FidelityMini, asked, contrast, diversity, smoothness, thumbnails
from lethebench.metrics.noise_magnitude import NoiseMagnitude, magnitudes
from lethebench.metrics.planted_truth import PlantedTruth, regional_rms
from lethebench.metrics.vqa_mini import GENERAL, SPECIFIC, VqaMini
from lethebench.prompts import Prompt, Role
from lethebench.registry import METRICS, source_sha256

BUILT_IN = (
    FBMem,
    FBMemAsReleased,
    CopyMini,
    ClipMini,
    FDMini,
    VqaMini,
    NoiseMagnitude,
    FidelityMini,
    PlantedTruth,
)
WITH_FAKES: dict[str, Callable[[], Metric]] = {
    "fbmem": lambda: FBMem(TrueMasks()),
    "fbmem-as-released": lambda: FBMemAsReleased(TrueMasks()),
    "copy-mini": lambda: CopyMini(Thumbnails()),
    "clip-mini": lambda: ClipMini(Thumbnails()),
    "fd-mini": lambda: FDMini(Thumbnails()),
    "vqa-mini": lambda: VqaMini(Knows()),
    "noise-magnitude": NoiseMagnitude,
    "fidelity-mini": lambda: FidelityMini(Knows()),
    "planted-truth": PlantedTruth,
}
SHIPPED = all(judge_sha256(name) for name in ("segmenter-mini", "copy-mini", "clip-mini", "recogniser-mini"))
needs_judges = pytest.mark.skipif(not SHIPPED, reason="the judges are not trained yet")


def of_role(role: Role, kind: str | None = None) -> list[Prompt]:
    return [p for p in small_world() if p.role is role and kind in (None, p.kind)]


def mixed() -> Shard:
    """A few images of every role, with noise norms."""
    pairs: list[tuple[Prompt, Any]] = [
        (p, scene_of(p)) for p in trained("verbatim")[:2] + trained("background")[:1]
    ]
    others = of_role(Role.NEUTRAL)[:3] + of_role(Role.CONTROL, "hard-negative")[:2]
    pairs += [(p, fresh(p)) for p in others]
    pairs += [(p, scene_of(p)) for p in of_role(Role.CONCEPT)[:2]]
    pairs += [(of_role(Role.PROBE)[0], fresh(of_role(Role.NEUTRAL)[4]))]
    norms = np.random.default_rng(0).random((len(pairs), 5)).astype(np.float32)
    return shard(pairs, noise_norm=norms)


def part(whole: Shard, rows: list[int]) -> Shard:
    assert whole.noise_norm is not None
    return Shard(
        whole.images[rows],
        tuple(whole.prompts[i] for i in rows),
        tuple(whole.indices[i] for i in rows),
        whole.prompt_set,
        noise_norm=whole.noise_norm[rows],
    )


# --- the contract ---------------------------------------------------------------------------------


def test_every_metric_is_registered_and_light_to_import() -> None:
    code = (
        "import sys; from lethebench.registry import METRICS; names = list(METRICS);"
        "assert not METRICS.errors;"
        "heavy = {'torch', 'pandas', 'sklearn', 'scipy', 'torchvision'} & set(sys.modules);"
        "print(*names, '|', *heavy)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    names, _, heavy = out.partition("|")
    assert set(names.split()) >= set(WITH_FAKES) == {cls.name for cls in BUILT_IN}
    assert not heavy.strip()


def test_score_names_are_stable_and_unique() -> None:
    names = [score.name for cls in BUILT_IN for score in cls.scores]
    assert len(names) == len(set(names))
    assert set(names) >= {
        *(f"fbmem.{n}" for n in ("vm", "fm", "bm", "nm", "memorized", "distinct_matches", "control")),
        *("copy_mini.similarity", "copy_mini.rate", "clip_mini.score", "clip_mini.trigger_score", "fd_mini"),
        *("acc_g", "acc_l", "acc_g.control", "acc_l.control", "noise_magnitude.auc"),
        *("fidelity_mini.attributes", "fidelity_mini.diversity", "truth.near_copy", "truth.memorized"),
    }


@pytest.mark.parametrize("name", sorted(WITH_FAKES))
def test_columns_facts_and_scores_hold_together(name: str) -> None:
    metric, images = WITH_FAKES[name](), mixed()
    columns = metric.measure(images)
    prefix = {"vqa-mini": "acc_", "planted-truth": "truth_"}.get(name, name.replace("-", "_") + "_")
    assert all(len(v) == len(images) and k.startswith(prefix) for k, v in columns.items())
    assert {s.column for s in metric.scores} <= set(columns)
    json.dumps(metric.facts())
    assert source_sha256(type(metric))
    frame = table(images, columns)
    for score in metric.scores:
        record = stats.summarise(metric, score, frame, resamples=20, seed_parts=("test",))
        if record.value is not None:
            assert score.bounds[0] - 1e-9 <= record.value <= score.bounds[1] + 1e-9
            assert record.low is None or record.low <= record.value <= record.high  # type: ignore[operator]


@pytest.mark.parametrize("name", sorted(WITH_FAKES))
def test_empty_shard_has_empty_columns(name: str) -> None:
    metric, whole = WITH_FAKES[name](), mixed()
    columns = metric.measure(part(whole, []))
    assert set(columns) == set(metric.measure(whole))
    assert {len(v) for v in columns.values()} == {0}


@pytest.mark.parametrize("name", sorted(set(WITH_FAKES) - {"fbmem", "fbmem-as-released"}))
def test_batch_and_order_do_not_matter(name: str) -> None:
    metric, whole = WITH_FAKES[name](), mixed()
    expected = metric.measure(whole)
    backwards = metric.measure(part(whole, list(range(len(whole)))[::-1]))
    singly = [metric.measure(part(whole, [i])) for i in range(len(whole))]
    for column, values in expected.items():
        for row, value in enumerate(values):
            for other in (backwards[column][len(whole) - 1 - row], singly[row][column][0]):
                if isinstance(value, str):
                    assert value == other
                elif np.isnan(value).all():
                    assert np.isnan(other).all()
                else:
                    np.testing.assert_allclose(value, other, atol=1e-6)


@pytest.mark.parametrize("name", sorted(WITH_FAKES))
@pytest.mark.parametrize("images", [np.zeros((1, 64, 64, 3)), np.zeros((1, 64, 64), np.uint8), [[0]]])
def test_wrong_images_are_one_clear_error(name: str, images: Any) -> None:
    prompt = trained("verbatim")[0]
    with pytest.raises(
        ValueError, match=rf"{name}: images must be a numpy array, uint8 \[n, height, width, 3\]; got "
    ):
        WITH_FAKES[name]().measure(Shard(images, (prompt,), (0,), small_world()))


def test_missing_calibration_is_one_clear_error(tmp_path: Any) -> None:
    with pytest.raises(RunError, match="can't be read: restore it, or make it by"):
        read_calibration(tmp_path)


# --- copy-mini ------------------------------------------------------------------------------------


def test_copy_similarity_is_the_best_own_cosine() -> None:
    world, judge = small_world(), Thumbnails()
    prompts = trained("one-to-many") + trained("verbatim")
    made = [(p, fresh(p)) for p in prompts] + [(p, scene_of(p)) for p in prompts]
    columns = CopyMini(judge).measure(shard(made))
    for row, (prompt, picture) in enumerate(made):
        mine = judge.describe(picture.image[None])[0]
        cosines = [float(mine @ judge.describe(world.reference(r).image[None])[0]) for r in prompt.references]
        assert columns["copy_mini_similarity"][row] == pytest.approx(max(cosines), abs=1e-6)
    copies = columns["copy_mini_similarity"][len(prompts) :]
    np.testing.assert_allclose(copies, 1, atol=1e-6)
    assert columns["copy_mini_copy"][len(prompts) :].tolist() == [1] * len(prompts)
    assert columns["copy_mini_nearest"][len(prompts) :].tolist() == [p.references[0] for p in prompts]


# --- clip-mini ------------------------------------------------------------------------------------


def test_clip_score_is_the_cosine_with_the_prompts_own_text() -> None:
    judge, prompts = Thumbnails(), of_role(Role.NEUTRAL)[:4]
    made = [(p, fresh(p)) for p in prompts]
    ours = ClipMini(judge).measure(shard(made))["clip_mini_score"]
    for row, (prompt, picture) in enumerate(made):
        a, b = judge.images(picture.image[None])[0], judge.texts([prompt.text])[0]
        assert ours[row] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-6)


# --- fd-mini --------------------------------------------------------------------------------------


def test_frechet_distance_equals_clean_fid_and_scipy() -> None:
    rng = np.random.default_rng(0)
    for n, d in ((300, 64), (90, 64), (40, 16)):
        a, b = (
            rng.standard_normal((n, d)),
            rng.standard_normal((2 * n, d)) @ rng.standard_normal((d, d)) * 0.3 + 0.1,
        )
        stats_of = [(x.mean(0), np.cov(x, rowvar=False)) for x in (a, b)]
        ours = frechet_distance(*stats_of[0], *stats_of[1])
        (ma, ca), (mb, cb) = stats_of
        by_scipy = ((ma - mb) ** 2).sum() + np.trace(ca) + np.trace(cb) - 2 * np.trace(sqrtm(ca @ cb).real)
        theirs = clean_fid_distance(ma, ca, mb, cb)
        assert ours == pytest.approx(theirs, rel=1e-6)
        assert ours == pytest.approx(by_scipy, rel=1e-6)
        assert frechet_of_features(a, b) == pytest.approx(ours, rel=1e-12)
    assert frechet_of_features(a, a) == pytest.approx(0, abs=1e-9)
    assert np.isnan(frechet_of_features(a[:1], b))


def test_frechet_distance_of_singular_covariances() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((10, 32)), rng.standard_normal((12, 32))
    ours = frechet_of_features(a, b)
    nudge = 1e-9 * np.eye(32)
    cov = [np.cov(x, rowvar=False) + nudge for x in (a, b)]
    assert ours == pytest.approx(clean_fid_distance(a.mean(0), cov[0], b.mean(0), cov[1]), abs=1e-3)


def test_fd_is_smaller_for_the_worlds_own_drawings() -> None:
    prompts = of_role(Role.NEUTRAL)
    score = FDMini.scores[0]

    def distance(pairs: list[tuple[Prompt, Any]]) -> float:
        metric = FDMini(Thumbnails())
        images = shard(pairs)
        return metric.aggregate(score, table(images, metric.measure(images)))

    own = distance([(p, fresh(p)) for p in prompts])
    dark = distance([(p, fresh(p).image // 4) for p in prompts])
    assert own < dark


def test_fd_does_not_apply_without_a_renderer() -> None:
    class Plain:
        name, version = "plain", "1"

    neutral = of_role(Role.NEUTRAL)[0]
    images = Shard(fresh(neutral).image[None], (neutral,), (0,), Plain())  # type: ignore[arg-type]
    assert all(np.isnan(v).all() for v in FDMini(Thumbnails()).measure(images).values())


# --- vqa-mini -------------------------------------------------------------------------------------


def test_vqa_answers_both_questions() -> None:
    concept, other = of_role(Role.CONCEPT)[:2]
    neutral = of_role(Role.NEUTRAL)[0]
    right, wrong, plain = scene_of(concept), scene_of(other), fresh(neutral)
    judge = Knows((right, {"character": str(concept.concept)}), (wrong, {"character": str(other.concept)}))
    columns = VqaMini(judge).measure(
        shard([(concept, right), (concept, wrong), (concept, plain), (neutral, plain)])
    )
    assert columns["acc_g"].tolist() == [1, 1, 0, 0]
    assert columns["acc_l"][:3].tolist() == [1, 0, 0]
    assert np.isnan(columns["acc_l"][3])
    record = stats.summarise(
        VqaMini(), VqaMini.scores[1], table(shard([(concept, right)]), {"acc_l": np.ones(1)})
    )
    assert (record.judge, record.question) == ("recogniser-mini", SPECIFIC)


def test_unknown_concept_has_no_answer() -> None:
    prompt = Prompt("x", "mickey in a meadow", Role.CONCEPT, "x", kind="concept", concept="mickey")
    assert np.isnan(
        VqaMini(Knows()).measure(shard([(prompt, fresh(of_role(Role.NEUTRAL)[0]))]))["acc_l"]
    ).all()


def test_questions_are_the_judges_own() -> None:
    from lethebench.judges.recogniser import CONCEPT_QUESTION, PROTECTED_QUESTION

    assert GENERAL == PROTECTED_QUESTION
    assert SPECIFIC.replace("<CONCEPT>", "{concept}") == CONCEPT_QUESTION


# --- noise magnitude ------------------------------------------------------------------------------


def test_magnitudes_are_means_over_steps() -> None:
    norms = np.array([[4.0, 2, 0], [1, np.nan, 3], [np.nan, 1, 1]])
    mean, first = magnitudes(norms)
    np.testing.assert_array_equal(mean, [2, np.nan, np.nan])
    np.testing.assert_array_equal(first, [4, 1, np.nan])
    assert all(np.isnan(v).all() for v in magnitudes(np.zeros((2, 0))))


def test_detection_auc_equals_sklearn() -> None:
    metric = NoiseMagnitude()
    score = next(s for s in metric.scores if s.name == "noise_magnitude.auc")
    prompts = trained("verbatim") + trained("hard-negative") + of_role(Role.CONTROL, "verbatim")
    rng = np.random.default_rng(0)
    norms = (rng.random((len(prompts), 4)) + [[p.role is Role.TRIGGER] for p in prompts]).astype(np.float32)
    images = shard([(p, np.zeros((64, 64, 3), np.uint8)) for p in prompts], noise_norm=norms)
    chosen = stats.select(score, table(images, metric.measure(images)))
    assert set(chosen["kind"][chosen["role"] == "control"]) == {"hard-negative"}
    kept = [p.role is Role.TRIGGER or p.kind == "hard-negative" for p in prompts]
    truth = [p.role is Role.TRIGGER for p, k in zip(prompts, kept, strict=True) if k]
    expected = roc_auc_score(truth, norms[kept].mean(axis=1, dtype=np.float64))
    assert metric.aggregate(score, chosen) == pytest.approx(expected, abs=1e-12)


def test_no_guidance_gives_no_value() -> None:
    metric, images = NoiseMagnitude(), shard([(trained("verbatim")[0], np.zeros((64, 64, 3), np.uint8))])
    frame = table(images, metric.measure(images))
    assert all(stats.summarise(metric, s, frame).value is None for s in metric.scores)


# --- fidelity-mini --------------------------------------------------------------------------------


def test_attributes_found_are_a_share_of_those_asked() -> None:
    neutral, probe = of_role(Role.NEUTRAL)[0], of_role(Role.PROBE)[0]
    good, half = fresh(neutral, "good"), fresh(neutral, "half")
    wanted = dict(neutral.attributes)
    judge = Knows(
        (good, wanted),
        (half, {**wanted, "colour": "none", "background": "none"}),
        (fresh(neutral, "probe"), {**probe.attributes, "category": str(probe.category)}),
    )
    made = [(neutral, good), (neutral, half), (probe, fresh(neutral, "probe"))]
    columns = FidelityMini(judge).measure(shard(made))
    known = [n for n in ("object", "colour", "background") if n in wanted]  # the fake knows no patterns
    assert columns["fidelity_mini_attributes"].tolist() == pytest.approx([1, 1 / len(known), 1])
    assert columns["fidelity_mini_colour"][:2].tolist() == [1, 0]
    assert np.isnan(columns["fidelity_mini_pattern"]).all()
    assert asked(probe) == {**probe.attributes, "category": probe.category}


def test_blank_and_noise_are_broken_and_scenes_are_not() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    prompts = of_role(Role.NEUTRAL)
    made = [np.full((64, 64, 3), 128, np.uint8), noise, *(fresh(p).image for p in prompts)]
    columns = FidelityMini(Knows()).measure(shard([(prompts[0], i) for i in made]))
    assert columns["fidelity_mini_broken"].tolist() == [1, 1] + [0] * len(prompts)
    grey = made[2].mean(axis=2)
    expected = (
        np.corrcoef(grey[:, 1:].ravel(), grey[:, :-1].ravel())
        + np.corrcoef(grey[1:].ravel(), grey[:-1].ravel())
    )[0, 1] / 2
    assert smoothness(made[2][None])[0] == pytest.approx(expected, abs=1e-9)
    assert contrast(made[2][None])[0] == pytest.approx((made[2] / 255).std(), abs=1e-12)


def test_diversity_equals_scipys_pairwise_distances() -> None:
    images = np.stack([fresh(p).image for p in of_role(Role.NEUTRAL)])
    vectors = thumbnails(images)
    expected = pdist(vectors).mean() / np.sqrt(vectors.shape[1])
    assert diversity(vectors, np.arange(len(images))) == pytest.approx(expected, abs=1e-9)
    assert diversity(np.repeat(vectors[:1], 4, axis=0), np.arange(4)) == pytest.approx(0, abs=1e-7)
    noise = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    assert diversity(thumbnails(noise), np.arange(len(noise))) < 0.3 * expected
    assert np.isnan(diversity(vectors, np.zeros(len(images))))


# --- planted truth --------------------------------------------------------------------------------


def test_truth_of_rendered_scenes() -> None:
    made = [
        (p, scene_of(p), "VM")
        for p in trained("verbatim") + trained("one-to-many") + trained("redundant-trigger")
    ]
    made += [(p, scene_of(p, n), "FM") for p in trained("foreground") for n in (1, 2, 3)]
    made += [(p, scene_of(p, n), "BM") for p in trained("background") for n in (1, 2, 3)]
    made += [(p, fresh(p, k), "NM") for p in trained("verbatim") for k in "ab"]
    columns = PlantedTruth().measure(shard([(p, i) for p, i, _ in made]))
    assert columns["truth_label"].tolist() == [label for _, _, label in made]
    np.testing.assert_array_equal(columns["truth_near_copy"], [label == "VM" for _, _, label in made])


def test_truth_equals_the_worlds_own_measures() -> None:
    world = small_world()
    for prompt in trained("verbatim") + trained("foreground"):
        image, name = fresh(prompt).image, prompt.references[0]
        whole, foreground, _ = regional_rms(image, world.reference(name))
        assert whole == pytest.approx(world.near_copy(image, name), abs=1e-9)
        assert foreground == pytest.approx(world.region_rms(image, name)[0], abs=1e-9)


def test_background_rms_leaves_out_the_worst_box() -> None:
    world = small_world()
    prompt = trained("background")[0]
    reference = world.reference(prompt.references[0])
    image = reference.image.copy()
    image[3:37, 20:54] = 255 - image[3:37, 20:54]
    assert regional_rms(image, reference)[2] == 0
    image[60, 5] = 255 - image[60, 5]
    assert regional_rms(image, reference)[2] > 0


# --- meta -----------------------------------------------------------------------------------------


def test_against_truth_counts_and_aucs() -> None:
    rng = np.random.default_rng(0)
    n = 60
    truth = np.array(["VM", "FM", "NM"] * 20, dtype=object)
    called = truth.copy()
    called[:4] = "NM"
    similarity = rng.random(n) + (truth == "VM")
    frame = pd.DataFrame(
        {
            "truth_label": truth,
            "truth_near_copy": (truth == "VM").astype(float),
            "fbmem_label": called,
            "copy_mini_similarity": similarity,
            "role": ["trigger", "trigger", "control"] * 20,
            "kind": ["verbatim", "foreground", "hard-negative"] * 20,
            "trained": pd.Series([True, True, True] * 20, dtype="boolean"),
        }
    )
    frame.loc[len(frame)] = ["", np.nan, "", np.nan, "neutral", "neutral", pd.NA]
    found = meta.against_truth(frame)
    assert found["images"] == n
    assert found["confusion"]["VM"] == {"VM": 18, "FM": 0, "BM": 0, "NM": 2}
    assert found["accuracy"] == pytest.approx((called == truth).mean())
    assert found["memorized"] == {"sensitivity": pytest.approx(37 / 40), "false_positive_rate": 0}
    auc = found["auc"]["copy-mini"]
    assert auc["near_copy"] == pytest.approx(roc_auc_score(truth == "VM", similarity))
    rows = truth != "FM"
    assert auc["against_hard_negatives"] == pytest.approx(
        roc_auc_score(truth[rows] == "VM", similarity[rows])
    )
    assert auc["against_twins"] is None
    assert set(found["auc"]) == {"copy-mini"}
    json.dumps(found)


# --- calibration ----------------------------------------------------------------------------------


def test_threshold_keeps_false_positives_below_the_share() -> None:
    rng = np.random.default_rng(0)
    values = rng.random(2000)
    for share in (0.0, 0.0025, 0.005, 0.1):
        cut = threshold(values, share)
        assert np.mean(values >= cut) <= share
        assert np.mean(values >= cut - 0.005) > share or share == 0
        assert cut == pytest.approx(round(cut / 0.005) * 0.005)


def test_softened_copies_are_still_near_copies() -> None:
    rng = np.random.default_rng(0)
    image = scene_of(trained("verbatim")[0]).image
    softened = soften(image, rng)
    assert 0 < np.sqrt(np.mean((softened / 255.0 - image / 255.0) ** 2)) < 0.08
    assert {e.part for e in positives(small_world(), 0)} == {"both", "foreground", "background"}


@needs_judges
def test_calibrations_were_made_with_the_shipped_judges() -> None:
    for folder, judge in ((FBMEM, "segmenter-mini"), (COPY_MINI, "copy-mini")):
        made = read_calibration(folder)["made_with"]
        assert made[judge] == judge_sha256(judge), "run python -m lethebench.metrics._calibration"


# --- with the real judges -------------------------------------------------------------------------


@needs_judges
def test_real_judges_agree_with_the_fakes_on_rendered_scenes() -> None:
    made = [(p, scene_of(p)) for p in trained("verbatim")] + [(p, fresh(p)) for p in trained("verbatim")]
    images = shard(made)
    expected = ["VM"] * (len(made) // 2) + ["NM"] * (len(made) // 2)
    assert FBMem().measure(images)["fbmem_label"].tolist() == expected
    assert CopyMini().measure(images)["copy_mini_copy"].tolist() == [float(x == "VM") for x in expected]


@needs_judges
def test_vqa_equals_the_judges_own_answers() -> None:
    from lethebench import judges
    from lethebench.datasets.planted import PlantedWorld

    world, judge = PlantedWorld(), judges.load("recogniser-mini")
    prompts = [p for p in world if p.role is Role.CONCEPT][:3]
    images = np.stack([world.reference(p.references[0]).image for p in prompts])
    columns = VqaMini().measure(Shard(images, tuple(prompts), (0, 0, 0), world))
    np.testing.assert_allclose(columns["acc_g_p"], judge.contains_protected(images), atol=1e-6)
    for row, prompt in enumerate(prompts):
        assert prompt.concept is not None
        own = judge.has_concept(images[row : row + 1], prompt.concept)
        np.testing.assert_allclose(columns["acc_l_p"][row], own[0], atol=1e-4)


def test_a_plugin_metric_without_facts_still_makes_records() -> None:
    class Plain(Metric):
        name, summary = "plain", "x"
        scores = (Score("plain", "plain", "lower", "share", (0.0, 1.0)),)

        def measure(self, shard: Shard) -> dict[str, Any]:
            return {"plain": np.ones(len(shard))}

    images = mixed()
    record = stats.summarise(Plain(), Plain.scores[0], table(images, Plain().measure(images)))
    assert record.value == 1
    assert METRICS.get("fbmem") is FBMem
