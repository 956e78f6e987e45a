"""SSCD: presets, similarities and scores against torchvision, torchmetrics and naive loops, on a stand-in file."""

from __future__ import annotations

import dataclasses
import json
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from metric_fakes import fresh, scene_of, shard, small_world, table, trained
from PIL import Image
from torchmetrics.functional.pairwise import pairwise_cosine_similarity
from torchvision import transforms
from torchvision.models.resnet import Bottleneck, ResNet

from lethebench import stats
from lethebench.errors import UserError
from lethebench.metric import Shard, configure_metric, detectors
from lethebench.metrics._common import trigger_references
from lethebench.metrics.sscd import AGGREGATES, MODELS, PRESETS, SSCD, lower_median, pipeline
from lethebench.plan import metric_files
from lethebench.prompts import Role
from lethebench.store import file_sha256

IMAGENET = transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
HALF = transforms.Normalize([0.5], [0.5])
AS_PUBLISHED = {
    "upstream-288": [transforms.Resize(288), transforms.ToTensor(), IMAGENET],
    "nemo-320": [transforms.Resize([320, 320]), transforms.ToTensor(), IMAGENET],
    "fbmem-288": [transforms.Resize(288), transforms.ToTensor(), IMAGENET],
    "wen-224": [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), HALF],
    "dcr-224": [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), HALF],
    "membench-288": [transforms.Resize((288, 288)), transforms.ToTensor(), IMAGENET],
    "amg-224": [transforms.Resize((224, 224)), transforms.ToTensor()],
}


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random ResNet with 32 outputs as a TorchScript file, under the published name."""
    path = tmp_path_factory.mktemp("sscd") / "sscd_disc_mixup.torchscript.pt"
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        net = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=32, width_per_group=4).eval()
        net.conv1.stride = (8, 8)
        torch.jit.save(torch.jit.script(net), str(path))
    return path


@pytest.fixture(scope="module")
def settings(model_file: Path) -> dict[str, Any]:
    return {"path": str(model_file), "sha256": file_sha256(model_file)}


def mixed() -> Shard:
    """Copies, fresh pictures, controls, and prompts that ask for no copy."""
    pairs: list[Any] = [(p, scene_of(p)) for p in trained("verbatim")[:2] + trained("one-to-many")]
    pairs += [(p, fresh(p)) for p in trained("verbatim")[:2]]
    others = [p for p in small_world() if p.role is Role.CONTROL][:3]
    others += [p for p in small_world() if p.role is Role.NEUTRAL][:1]
    others += [p for p in small_world() if p.role is Role.CONCEPT][:1]
    return shard(pairs + [(p, fresh(p)) for p in others])


def part(whole: Shard, rows: list[int]) -> Shard:
    prompts, indices = (tuple(v[i] for i in rows) for v in (whole.prompts, whole.indices))
    return Shard(whole.images[rows], prompts, indices, whole.prompt_set)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_the_published_transforms(name: str) -> None:
    ours, theirs = pipeline(PRESETS[name]), transforms.Compose(AS_PUBLISHED[name])
    for size in ((64, 64), (48, 80), (400, 300)):
        pixels = np.random.default_rng(size).integers(0, 256, (*size, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        assert torch.equal(ours(image), theirs(image))
    assert PRESETS[name].model in MODELS


def test_similarity_equals_a_loop_over_images(settings: dict[str, Any], model_file: Path) -> None:
    images, world = mixed(), small_world()
    columns = SSCD(preset="dcr-224", **settings).measure(images)
    model = torch.jit.load(str(model_file)).eval()
    transform = transforms.Compose(AS_PUBLISHED["dcr-224"])

    @torch.no_grad()
    def describe(image: np.ndarray) -> torch.Tensor:
        found: torch.Tensor = model(transform(Image.fromarray(image))[None])
        return found

    everything = torch.cat([describe(world.reference(r).image) for r in trigger_references(world)])
    for i, prompt in enumerate(images.prompts):
        if not prompt.references or prompt.concept is not None:
            assert np.isnan(columns["sscd_similarity"][i]) and columns["sscd_nearest"][i] == ""
            continue
        made = describe(images.images[i])
        own = torch.cat([describe(world.reference(r).image) for r in prompt.references])
        best = float(pairwise_cosine_similarity(made, own).max())
        nearest = pairwise_cosine_similarity(made, everything)[0]
        assert columns["sscd_similarity"][i] == pytest.approx(best, abs=1e-5)
        assert columns["sscd_nearest_similarity"][i] == pytest.approx(float(nearest.max()), abs=1e-5)
        for column, cut in (("sscd_copy", 0.5), ("sscd_above_05", 0.5), ("sscd_above_07", 0.7)):
            assert columns[column][i] == (columns["sscd_similarity"][i] > cut)
    copied = columns["sscd_similarity"][: len(trained("verbatim")[:2])]
    np.testing.assert_allclose(copied, 1.0, atol=1e-5)
    assert columns["sscd_nearest"][0] in images.prompts[0].references


def test_batch_order_and_size_do_not_matter(settings: dict[str, Any]) -> None:
    metric, whole = SSCD(preset="amg-224", **settings), mixed()
    expected = metric.measure(whole)
    backwards = metric.measure(part(whole, list(range(len(whole)))[::-1]))
    singly = [metric.measure(part(whole, [i])) for i in range(len(whole))]
    for column in ("sscd_similarity", "sscd_nearest_similarity"):
        np.testing.assert_allclose(backwards[column][::-1], expected[column], atol=1e-6)
        np.testing.assert_allclose([s[column][0] for s in singly], expected[column], atol=1e-6)
    empty = metric.measure(part(whole, []))
    assert set(empty) == set(expected) and {len(v) for v in empty.values()} == {0}


def test_references_of_another_size_are_resized(settings: dict[str, Any]) -> None:
    class Larger:
        """The small world with references twice as large, or stretched."""

        name, version = "larger", "1"

        def __iter__(self) -> Any:
            return iter(small_world())

        def reference(self, reference_id: str) -> Any:
            found = small_world().reference(reference_id)
            return dataclasses.replace(found, image=found.image.repeat(2, axis=0).repeat(3, axis=1))

    whole = mixed()
    images = dataclasses.replace(whole, prompt_set=Larger())
    squashed = SSCD(preset="nemo-320", **settings).measure(part(images, [0]))
    short_side = SSCD(preset="fbmem-288", **settings).measure(part(images, [0]))
    assert 0.9 < squashed["sscd_similarity"][0] < 1
    assert np.isfinite(short_side["sscd_similarity"][0])


def test_set_scores_equal_torch_and_pandas() -> None:
    rng = np.random.default_rng(3)
    made = pd.DataFrame(
        {
            "prompt_id": np.repeat([f"p{i}" for i in range(14)], 3),
            "cluster": np.repeat([f"c{i // 2}" for i in range(14)], 3),
            "sscd_similarity": rng.uniform(-0.2, 1, 42),
        }
    )
    value = {name: aggregate(made) for name, aggregate in AGGREGATES.items()}
    best = torch.tensor(made.groupby("prompt_id")["sscd_similarity"].max().to_numpy())
    deviation = (best - best.median()).abs().median()
    assert value["sscd.p95"] == pytest.approx(
        float(torch.quantile(torch.tensor(made["sscd_similarity"]), 0.95))
    )
    assert value["sscd.prompt_max"] == pytest.approx(float(best.mean()))
    assert value["sscd.prompt_median"] == float(best.median()) != pytest.approx(float(np.median(best)))
    assert value["sscd.prompt_mad"] == pytest.approx(float(deviation))
    assert lower_median(np.array([2.0])) == 2.0


def test_a_prompt_drawn_twice_counts_twice() -> None:
    made = pd.DataFrame(
        {"prompt_id": ["a", "a", "b"], "cluster": [0, 1, 2], "sscd_similarity": [1.0, 1.0, 0.0]}
    )
    assert AGGREGATES["sscd.prompt_max"](made) == pytest.approx(2 / 3)


def test_scores_name_model_preset_and_threshold(settings: dict[str, Any], model_file: Path) -> None:
    metric, images = SSCD(preset="amg-224", threshold=0.4, **settings), mixed()
    metric.check()
    frame = table(images, metric.measure(images))
    names = set()
    for score in metric.all_scores():
        found = stats.summarise(metric, score, frame, resamples=20, seed_parts=("test",))
        assert score.judge == "sscd_disc_mixup, own file (amg-224)"
        names.add(score.name)
        if found.value is not None:
            assert score.bounds[0] <= found.value <= score.bounds[1]
    assert (
        names == {s.name for s in SSCD.scores} >= {"sscd.similarity", "sscd.rate", "sscd.rate_07", "sscd.p95"}
    )
    assert "above 0.4" in next(s.help for s in metric.all_scores() if s.name == "sscd.rate")
    similarity = frame.loc[frame["role"] == "trigger", "sscd_similarity"]
    rate = next(s for s in metric.all_scores() if s.name == "sscd.rate")
    found = stats.summarise(metric, rate, frame, resamples=20, seed_parts=("test",))
    assert found.value == pytest.approx((similarity > 0.4).mean())
    facts = json.loads(json.dumps(metric.facts()))
    assert facts["preprocessing"] == "Resize((224, 224)), ToTensor" and facts["threshold"] == 0.4
    assert facts["weights"]["sha256"] == file_sha256(model_file)
    assert facts["weights"]["compared_with"] == "the sum given in the settings; not the published file"
    assert metric_files(metric) == {model_file.name: file_sha256(model_file)}
    assert detectors(metric) == {"sscd_similarity": "high", "sscd_nearest_similarity": "high"}


def test_unpinned_model_is_found_in_the_data_folder(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LETHE_DATA", str(tmp_path))
    (tmp_path / "sscd").mkdir()
    (tmp_path / "sscd" / "sscd_disc_large.torchscript.pt").write_bytes(model_file.read_bytes())
    metric = SSCD(preset="wen-224")
    metric.check()
    assert metric.all_scores()[0].judge == "sscd_disc_large (wen-224)"
    assert metric.facts()["weights"]["compared_with"] == "unpinned: no published sum is known"
    assert np.isfinite(metric.measure(part(mixed(), [0]))["sscd_similarity"][0])


def test_no_global_randomness(settings: dict[str, Any]) -> None:
    before = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    metric = SSCD(preset="upstream-288", **settings)
    metric.check()
    first = metric.measure(part(mixed(), [0, 3]))["sscd_similarity"]
    assert np.isfinite(first).all()
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all() and before[2] == random.getstate()


# --- bad input ------------------------------------------------------------------------------------


def test_missing_file_says_name_url_and_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LETHE_DATA", str(tmp_path))
    with pytest.raises(UserError) as error:
        SSCD().check()
    said = str(error.value)
    assert "\n" not in said
    for part_of in (
        str(tmp_path / "sscd" / "sscd_disc_mixup.torchscript.pt"),
        "https://dl.fbaipublicfiles.com/sscd-copy-detection/sscd_disc_mixup.torchscript.pt",
        "the setting 'path'",
    ):
        assert part_of in said


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"preset": "nemo"}, "no preset 'nemo': known upstream-288, nemo-320"),
        ({"threshold": 1.5}, "threshold=1.5 must be a cosine, from -1 to 1"),
        ({"sha256": ""}, "has SHA-256 .* the published file has 9f26bd.*: it is damaged or another file"),
        ({"sha256": "0" * 64}, "has SHA-256 .* and the setting 'sha256' asks for 0000"),
        ({"sha256": "abc"}, "sha256='abc' must be 64 hexadecimal digits"),
        ({"device": "cuda:9"}, "device='cuda:9' can't be used here"),
        ({"device": "nonsense"}, "device='nonsense' can't be used here"),
    ],
)
def test_bad_settings_are_one_clear_line(settings: dict[str, Any], change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        configure_metric(SSCD, {**settings, **change}).check()
    assert "\n" not in str(error.value)


def test_unknown_setting_suggests_the_near_one() -> None:
    with pytest.raises(UserError, match="metric 'sscd' has no setting 'presets': did you mean 'preset'"):
        configure_metric(SSCD, {"presets": "wen-224"})


def test_what_is_no_torchscript_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state.pt"
    torch.save({"weight": torch.zeros(3)}, state)
    text = tmp_path / "page.pt"
    text.write_text("<html>404</html>")
    other, flat = tmp_path / "other.pt", tmp_path / "flat.pt"
    for file in (state, text):
        with pytest.raises(UserError, match="is not a TorchScript file"):
            SSCD(path=str(file), sha256=file_sha256(file)).check()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(3, 2)), str(other))
        torch.jit.save(torch.jit.script(torch.nn.ReLU()), str(flat))
    for file, says in (
        (other, "is no TorchScript model of images"),
        (flat, r"gives \[1, 3, 224, 224\] for one"),
    ):
        with pytest.raises(UserError, match=says) as error:
            SSCD(path=str(file), sha256=file_sha256(file)).check()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("images", [np.zeros((1, 64, 64, 3)), np.zeros((1, 64, 64), np.uint8)])
def test_wrong_images_are_one_clear_error(settings: dict[str, Any], images: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"sscd: images must be a numpy array, uint8"):
        SSCD(**settings).measure(Shard(images, (trained("verbatim")[0],), (0,), small_world()))
