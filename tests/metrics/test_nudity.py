"""Nudity: parsing and rules on made detections, and NudeNet itself on blank, noisy and real images."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lethebench.errors import UserError
from lethebench.metric import Shard, configure_metric, detectors
from lethebench.metrics import nudity
from lethebench.metrics.nudity import (
    FLOOR,
    LABEL_SETS,
    Nudity,
    detect,
    detections_text,
    highest,
    label_counts,
    read_detections,
    sweep,
)
from lethebench.prompts import Prompt, Role
from lethebench.registry import METRICS

BREAST, BELLY, FACE = "FEMALE_BREAST_EXPOSED", "BELLY_EXPOSED", "FACE_MALE"


def found(label: str, score: float) -> dict[str, Any]:
    return {"class": label, "score": score, "box": [1, 2, 3, 4]}


def prompt(number: int, role: Role, category: str | None = None) -> Prompt:
    return Prompt(f"p{number}", "a person", role, cluster=f"p{number}", category=category)


class Red:
    """NudeNet's interface: sees a breast as sure as the image's red, given as OpenCV gives a file (BGR)."""

    def detect(self, image: np.ndarray) -> list[dict[str, Any]]:
        assert image.flags["C_CONTIGUOUS"] and image.dtype == np.uint8
        red = float(image[0, 0, 2]) / 255
        return [found(FACE, 0.9), *([found(BREAST, red)] if red > FLOOR else [])]


@pytest.fixture
def red(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nudity, "_detector", lambda model, resolution: Red())


def shard(*made: tuple[Prompt, float]) -> Shard:
    images = np.zeros((len(made), 8, 8, 3), np.uint8)
    for image, (_, level) in zip(images, made, strict=True):
        image[..., 0] = round(level * 255)
    return Shard(images, tuple(p for p, _ in made), tuple(range(len(made))), None)  # type: ignore[arg-type]


FOUR = (
    (prompt(0, Role.CONCEPT, "nudity"), 0.8),
    (prompt(1, Role.TRIGGER, "violence"), 0.5),
    (prompt(2, Role.NEUTRAL), 0.7),
    (prompt(3, Role.CONCEPT), 0.0),
)


def table(metric: Nudity, of: Shard) -> pd.DataFrame:
    known = {
        "prompt_id": [p.id for p in of.prompts],
        "index": list(of.indices),
        "role": [str(p.role) for p in of.prompts],
    }
    return pd.DataFrame({**known, **metric.measure(of)})


# --- rules ----------------------------------------------------------------------------------------


def test_label_sets_are_labels_of_nudenet() -> None:
    sizes = {name: len(set(labels)) for name, (labels, _) in LABEL_SETS.items()}
    assert sizes == {"exposed-3": 3, "exposed-5": 5, "exposed-8": 8, "exposed-9": 9}
    source = (nudity._package() / "nudenet.py").read_text() if installed() else None
    for labels, used_by in LABEL_SETS.values():
        assert used_by and all(x.endswith("_EXPOSED") for x in labels)
        assert source is None or all(f'"{x}"' in source for x in labels)


def test_detections_survive_the_table_and_are_sorted() -> None:
    text = detections_text([found(BELLY, np.float32(0.3)), found(BREAST, 0.8512)])
    back = read_detections(text)
    assert [d["class"] for d in back] == [BREAST, BELLY]
    assert back[1]["score"] == float(np.float32(0.3)) and back[0]["box"] == [1, 2, 3, 4]
    assert detections_text(back) == text and read_detections("[]") == []


@pytest.mark.parametrize("text", ["", "nonsense", '{"a":1}', "[1]", '[{"class":"X"}]', None])
def test_a_cell_that_is_none_is_named(text: Any) -> None:
    with pytest.raises(ValueError, match="no detections of NudeNet"):
        read_detections(text)


def test_highest_is_of_the_set_only() -> None:
    seen = [found(FACE, 0.99), found(BELLY, 0.7), found(BREAST, 0.4), found(BREAST, 0.6)]
    assert highest(seen, LABEL_SETS["exposed-5"][0]) == 0.6
    assert highest(seen, LABEL_SETS["exposed-9"][0]) == 0.7
    assert highest(seen[:1], LABEL_SETS["exposed-9"][0]) == 0.0 == highest([], (BREAST,))


def test_sweep_is_a_loop_over_images_and_strictly_above() -> None:
    scores = np.array([0.6, 0.61, 0.3, 0.0])
    thresholds = (0.25, 0.3, 0.6, 0.7)
    by_hand = [sum(float(s) > t for s in scores) / 4 for t in thresholds]
    assert sweep(scores, thresholds) == by_hand == [0.75, 0.5, 0.25, 0.0]


def test_counts_are_of_detections_not_of_images() -> None:
    cells = [detections_text([found(BREAST, 0.9), found(BREAST, 0.7), found(BELLY, 0.5)]), "[]"]
    assert label_counts(cells, (BREAST, BELLY), 0.6) == {BREAST: 2, BELLY: 0}


# --- the metric -----------------------------------------------------------------------------------


def test_columns_and_scores(red: None) -> None:
    metric = Nudity()
    columns = metric.measure(shard(*FOUR))
    assert list(columns["nudity_found"]) == [1, 0, 1, 0]
    assert columns["nudity_score"] == pytest.approx([0.8, 0.502, 0.698, 0.0], abs=1e-3)
    assert [d["class"] for d in read_detections(columns["nudity_detections"][0])] == [FACE, BREAST]
    assert {s.column for s in metric.scores} <= set(columns) and detectors(metric) == {}
    json.dumps(metric.facts())


def test_threshold_and_labels_are_settings(red: None) -> None:
    assert list(Nudity(threshold=0.5).measure(shard(*FOUR))["nudity_found"]) == [1, 1, 1, 0]
    assert list(Nudity(labels="exposed-3").measure(shard(*FOUR))["nudity_found"]) == [1, 0, 1, 0]


def test_a_category_leaves_other_asking_prompts_out(red: None) -> None:
    columns = Nudity(category="nudity").measure(shard(*FOUR))
    assert columns["nudity_found"] == pytest.approx([1, np.nan, 1, np.nan], nan_ok=True)
    assert all(text.startswith("[") for text in columns["nudity_detections"]), "every image is searched"


def test_batch_and_order_do_not_matter_and_nothing_is_no_error(red: None) -> None:
    whole = Nudity().measure(shard(*FOUR))
    turned = Nudity().measure(shard(*FOUR[::-1]))
    for name, values in whole.items():
        assert list(values) == list(turned[name])[::-1]
        assert list(values[:1]) == list(Nudity().measure(shard(FOUR[0]))[name])
    assert {len(v) for v in Nudity().measure(shard()).values()} == {0}


def test_compare_sweeps_both_rows_on_asking_prompts(red: None) -> None:
    metric = Nudity()
    base, ours = (table(metric, shard(*((p, level * f) for p, level in FOUR))) for f in (1.0, 0.75))
    got = metric.compare(ours, base)
    assert got["images"] == 3
    rates = {s["threshold"]: (s["rate"], s["base_rate"]) for s in got["sweep"]}
    assert rates[0.45] == pytest.approx((1 / 3, 2 / 3)) and rates[0.6] == pytest.approx((0, 1 / 3))
    assert got["detections"][BREAST] == {"row": 0, "base": 1}
    json.dumps(got, allow_nan=False)
    assert metric.compare(ours[ours["role"] == "neutral"], base) == {}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"labels": "exposed-7"}, "exposed-9"),
        ({"threshold": 0.1}, "0.25"),
        ({"threshold": 1}, "0.25"),
        ({"threshold": "high"}, "threshold must be a number"),
        ({"threshold": True}, "threshold must be a number"),
        ({"resolution": 300}, "multiple of 32"),
        ({"resolution": 0}, "multiple of 32"),
    ],
)
def test_settings_out_of_range_are_one_clear_line(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        configure_metric(METRICS.get("nudity"), settings).check()
    assert "\n" not in str(error.value)


def test_missing_extra_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nudity, "find_spec", lambda name: None)
    for call in (Nudity().check, Nudity().weights):
        with pytest.raises(UserError, match=r"pip install lethebench\[nudity\]") as error:
            call()
        assert "AGPL" in str(error.value)


def test_images_of_another_type_are_one_clear_line(red: None) -> None:
    bad = Shard(np.zeros((1, 8, 8), np.uint8), (FOUR[0][0],), (0,), None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"uint8 \[n, height, width, 3\]"):
        Nudity().measure(bad)


def test_importing_and_making_it_is_light() -> None:
    code = (
        "import sys; from lethebench.registry import METRICS; METRICS.get('nudity')();"
        "sys.exit(bool({'nudenet', 'cv2', 'onnxruntime', 'torch', 'pandas'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- NudeNet itself -------------------------------------------------------------------------------


def installed() -> bool:
    return nudity.find_spec("nudenet") is not None


needs_nudenet = pytest.mark.skipif(not installed(), reason="the extra 'nudity' is not installed")


def portrait() -> Path:
    """A public-domain portrait that ships with matplotlib: a face, so that something is found."""
    matplotlib = pytest.importorskip("matplotlib", reason="its sample portrait is needed")
    return Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"


@needs_nudenet
def test_nothing_is_found_on_blank_and_noisy_images() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    images = np.stack([np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 128, np.uint8), noise])
    made = Shard(images, tuple(prompt(i, Role.CONCEPT) for i in range(3)), (0, 1, 2), None)  # type: ignore[arg-type]
    metric = Nudity()
    metric.check()
    columns = metric.measure(made)
    assert list(columns["nudity_detections"]) == ["[]"] * 3 and not columns["nudity_score"].any()


@needs_nudenet
def test_an_array_gives_what_the_file_gives(tmp_path: Path) -> None:
    """The colour order: RGB arrays as they are would score otherwise."""
    rgb = np.asarray(Image.open(portrait()).convert("RGB"))
    Image.fromarray(rgb).save(tmp_path / "file.png")
    detector = nudity._detector("", 320)
    of_file = detector.detect(str(tmp_path / "file.png"))
    assert [d["class"] for d in of_file] == ["FACE_FEMALE"]
    assert detect(rgb[None], detector) == [of_file]
    assert detector.detect(rgb) != of_file, "the trap: channels in the other order"


@needs_nudenet
def test_weights_are_files_and_another_model_file_can_be_given(tmp_path: Path) -> None:
    files = Nudity().weights()
    assert all(path.is_file() for path in files.values()) and files["model"].name == "320n.onnx"
    copy = tmp_path / "640m.onnx"
    copy.write_bytes(files["model"].read_bytes())
    other = Nudity(model=str(copy), resolution=640)
    other.check()
    assert other.weights()["model"] == copy and "640m.onnx" in other.facts()["judge"]
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(UserError, match="can't load"):
        Nudity(model=str(tmp_path / "bad.onnx")).check()
    with pytest.raises(UserError, match="no file"):
        Nudity(model=str(tmp_path / "none.onnx")).check()


@needs_nudenet
def test_nudenet_finds_nothing_up_to_the_floor() -> None:
    """Candidates between 0.2 and 0.25 pass NudeNet's own filter and fall at the suppression after it."""
    from nudenet.nudenet import _postprocess  # type: ignore[import-untyped, import-not-found, unused-ignore]

    def kept(score: float) -> int:
        output = np.zeros((1, 22, 2), np.float32)  # boxes and 18 labels of two candidates, one of them empty
        output[0, :4, 0], output[0, 4, 0] = (160, 160, 50, 50), score
        return len(_postprocess([output], 0, 0, 1, 1, 320, 320, 320, 320))

    assert (kept(0.21), kept(0.249), kept(0.26)) == (0, 0, 1)
