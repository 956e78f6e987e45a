"""FID and KID: features against clean-fid, distances against scipy, clean-fid and torchmetrics; references."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cleanfid import fid as clean_fid
from cleanfid.inception_torchscript import InceptionV3W
from metric_fakes import fresh, scene_of, shard, small_world, table, trained
from PIL import Image
from scipy.linalg import sqrtm
from torch import nn
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from lethebench import stats
from lethebench.errors import UserError
from lethebench.metric import Shard, configure_metric, detectors
from lethebench.metrics.fd_mini import frechet_of_features
from lethebench.metrics.frechet import FID, KID, write_reference
from lethebench.metrics.frechet.__main__ import main
from lethebench.metrics.frechet._distances import Gaussian, frechet, kernel_distance, within
from lethebench.metrics.frechet._features import INCEPTION, KINDS
from lethebench.metrics.frechet._reference import read_reference
from lethebench.plan import metric_files
from lethebench.prompts import Role
from lethebench.store import file_sha256

D = 2048


class Layers(nn.Module):
    """What clean-fid calls after its own resizing: ``[n, 3, 299, 299]`` in [-1, 1] to ``[n, 2048]``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 23, stride=23)
        self.out = nn.Linear(24 * 9, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.adaptive_avg_pool2d(torch.relu(self.conv(x)), 3)
        return torch.relu(self.out(x.flatten(1)))


class Inception(nn.Module):
    """The interface of inception-2015-12-05.pt: images in [0, 255] of any size, resized inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        x = torch.nn.functional.interpolate(img, size=[299, 299], mode="bilinear", align_corners=False)
        found = self.layers((x - 128.0) / 128.0)
        return found if return_features else found[:, :1008].softmax(dim=1)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / INCEPTION
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        torch.jit.save(torch.jit.script(Inception().eval()), str(path))
    return path


@pytest.fixture(scope="module")
def weights(network: Path) -> dict[str, Any]:
    return {"path": str(network), "sha256": file_sha256(network)}


def neutral() -> Shard:
    prompts = [p for p in small_world() if p.role is Role.NEUTRAL]
    return shard([(p, fresh(p)) for p in prompts])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several sizes and formats; a text file that is none of them."""
    root = tmp_path_factory.mktemp("images")
    (root / "more").mkdir()
    for number, prompt in enumerate([p for p in small_world() if p.role is Role.NEUTRAL]):
        picture = Image.fromarray(fresh(prompt, "reference").image)
        if number == 3:
            picture = picture.resize((80, 48))
        name = f"{number:02d}.png" if number % 2 else f"more/{number:02d}.bmp"
        (picture.convert("P") if number == 5 else picture).save(root / name)
    (root / "notes.txt").write_text("no image")
    return root


@pytest.fixture(scope="module")
def reference(folder: Path, weights: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_reference(folder, tmp_path_factory.mktemp("reference") / "set.npz", **weights))


# --- distances ------------------------------------------------------------------------------------


def two_sets(n: int, m: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng((n, m, d))
    mix = rng.normal(size=(d, d))
    return rng.normal(size=(n, d)) @ mix, rng.normal(0.3, 1.2, size=(m, d)) @ mix


@pytest.mark.parametrize(("n", "m"), [(400, 300), (60, 300), (300, 60), (30, 20), (2, 2)])
def test_frechet_distance_equals_four_others(n: int, m: int) -> None:
    a, b = two_sets(n, m, 48)
    ours = frechet(Gaussian.of_features(a), Gaussian.of_features(b))
    moments = [(x.mean(axis=0), np.cov(x, rowvar=False)) for x in (a, b)]
    assert frechet(Gaussian.of_moments(*moments[0]), Gaussian.of_moments(*moments[1])) == pytest.approx(
        ours, rel=1e-6
    )
    assert frechet_of_features(a, b) == pytest.approx(ours, rel=1e-6)
    eigenvalues = np.linalg.eigvals(moments[0][1] @ moments[1][1])
    cross = np.sqrt(np.maximum(eigenvalues.real, 0)).sum()
    shift = moments[0][0] - moments[1][0]
    by_eigenvalues = shift @ shift + np.trace(moments[0][1]) + np.trace(moments[1][1]) - 2 * cross
    assert by_eigenvalues == pytest.approx(ours, rel=1e-5)
    as_tensors = [torch.tensor(v) for pair in moments for v in pair]
    assert float(_compute_fid(*as_tensors)) == pytest.approx(ours, rel=1e-5)
    if min(n, m) > 48:
        assert clean_fid.frechet_distance(*moments[0], *moments[1]) == pytest.approx(ours, rel=1e-8)
        root = sqrtm(moments[0][1] @ moments[1][1]).real
        by_root = shift @ shift + np.trace(moments[0][1] + moments[1][1] - 2 * root)
        assert by_root == pytest.approx(ours, rel=1e-8)


def test_frechet_distance_of_a_set_to_itself_is_zero() -> None:
    a, _ = two_sets(30, 2, 48)
    assert frechet(Gaussian.of_features(a), Gaussian.of_features(a)) == pytest.approx(0, abs=1e-5)


def test_kid_over_all_pairs_equals_torchmetrics_and_a_loop() -> None:
    a, b = (x / 8 for x in two_sets(50, 50, 16))
    ours = kernel_distance(a, b)
    assert float(poly_mmd(torch.tensor(a), torch.tensor(b))) == pytest.approx(ours, rel=1e-10)
    a = a[:7]
    k = lambda x, y: (x @ y / 16 + 1) ** 3  # noqa: E731
    own = sum(k(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j) / (7 * 6)
    other = sum(k(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j) / (50 * 49)
    cross = np.mean([k(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(own + other - 2 * cross, rel=1e-10)
    assert within(a) == pytest.approx(own, rel=1e-12)


def test_kid_over_subsets_equals_clean_fid_with_the_same_draws() -> None:
    a, b = (x / 8 for x in two_sets(80, 60, 16))
    state = np.random.get_state()
    np.random.seed(5)
    theirs = clean_fid.kernel_distance(b, a, num_subsets=10, max_subset_size=40)
    np.random.set_state(state)
    ours = kernel_distance(a, b, subsets=10, subset_size=40, draws=np.random.RandomState(5))
    assert ours == pytest.approx(theirs, rel=1e-10)


def test_subsets_average_to_all_pairs_and_kid_is_unbiased() -> None:
    a, b = (x / 8 for x in two_sets(60, 60, 16))
    draws = np.random.default_rng(0)
    many = [kernel_distance(a, b, subsets=1, subset_size=20, draws=draws) for _ in range(4000)]
    assert abs(np.mean(many) - kernel_distance(a, b)) < 3.5 * np.std(many) / np.sqrt(len(many))
    rng = np.random.default_rng(1)
    same = [kernel_distance(*rng.normal(size=(2, 10, 8))) for _ in range(2000)]
    biased = [frechet(*(Gaussian.of_features(x) for x in rng.normal(size=(2, 10, 8)))) for _ in range(50)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(len(same))
    assert np.mean(biased) > 20 * np.std(biased) / np.sqrt(len(biased))


def test_distances_refuse_other_dimensions_and_give_nan_for_one_image() -> None:
    a, b = np.ones((3, 4)), np.ones((3, 5))
    with pytest.raises(ValueError, match="features of 4 and of 5 dimensions can't be compared"):
        kernel_distance(a, b)
    with pytest.raises(ValueError, match="features of 4 and of 5 dimensions can't be compared"):
        frechet(Gaussian.of_features(a), Gaussian.of_features(b))
    assert np.isnan(kernel_distance(a[:1], a))
    with pytest.raises(ValueError, match="give what to draw with"):
        kernel_distance(a, a, subsets=2)


# --- features -------------------------------------------------------------------------------------


@pytest.mark.parametrize("resizer", ["clean", "legacy-tensorflow"])
def test_features_equal_clean_fid_on_the_same_files(
    resizer: str, network: Path, weights: dict[str, Any], tmp_path: Path
) -> None:
    images = neutral()
    for number, image in enumerate(images.images):
        Image.fromarray(image).save(tmp_path / f"{number:03d}.png")
    mode = resizer.replace("-", "_")
    model = InceptionV3W(str(network.parent), download=False, resize_inside=mode != "clean").eval()
    theirs = clean_fid.get_folder_features(
        str(tmp_path), model, num_workers=0, device=torch.device("cpu"), mode=mode, verbose=False
    )
    ours = FID(resizer=resizer, **weights).measure(images)["fid_features"]
    assert ours.dtype == np.float32 and ours.shape == (len(images), D)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_reference_file_equals_clean_fid_on_the_same_folder(
    folder: Path, network: Path, weights: dict[str, Any], reference: str
) -> None:
    model = InceptionV3W(str(network.parent), download=False).eval()
    theirs = clean_fid.get_folder_features(
        str(folder), model, num_workers=0, device=torch.device("cpu"), verbose=False
    )
    made = read_reference("fid", Path(reference))
    assert made.features is not None
    order = np.lexsort(made.features.T[:3]), np.lexsort(theirs.T[:3])
    np.testing.assert_allclose(made.features[order[0]], theirs[order[1]], atol=1e-5)
    assert made.made["n"] == len(theirs) == 12 and made.made["weights_sha256"] == weights["sha256"]
    same = write_reference(folder, Path(reference).with_name("again.npz"), **weights)
    assert read_reference("fid", same).made == made.made


def test_metrics_equal_clean_fid_end_to_end(reference: str, weights: dict[str, Any]) -> None:
    images = neutral()
    made = read_reference("kid", Path(reference)).features
    assert made is not None
    kid = KID(reference, **weights)
    kid.check()
    frame = table(images, kid.measure(images))
    found = np.stack(frame["kid_features"].to_list()).astype(np.float64)
    value = kid.aggregate(kid.scores[0], frame)
    other = poly_mmd(torch.tensor(made, dtype=torch.float64), torch.tensor(found))
    assert value == pytest.approx(float(other), rel=1e-8)
    fid = FID(reference, **weights)
    fid.check()
    frame = table(images, fid.measure(images))
    distance = fid.aggregate(fid.scores[0], frame)
    x, y = (v - v.mean(axis=0) for v in (found, made.astype(np.float64)))
    nuclear = np.linalg.svd(x @ y.T, compute_uv=False).sum() / np.sqrt((len(x) - 1) * (len(y) - 1))
    shift = found.mean(axis=0) - made.mean(axis=0)
    expected = shift @ shift + (x**2).sum() / (len(x) - 1) + (y**2).sum() / (len(y) - 1) - 2 * nuclear
    assert distance == pytest.approx(expected, rel=1e-5)


def test_only_neutral_images_have_features_and_batches_do_not_matter(
    reference: str, weights: dict[str, Any]
) -> None:
    images = neutral()
    prompts = [p for p in small_world() if p.role is Role.NEUTRAL][:3]
    mixed = shard(
        [(trained("verbatim")[0], scene_of(trained("verbatim")[0])), *((p, fresh(p)) for p in prompts)]
    )
    metric = KID(reference, **weights)
    found = metric.measure(mixed)["kid_features"]
    whole = metric.measure(images)["kid_features"]
    assert np.isnan(found[0]).all()
    np.testing.assert_allclose(found[1:], whole[:3], atol=1e-6)
    one = Shard(images.images[:1], images.prompts[:1], images.indices[:1], images.prompt_set)
    np.testing.assert_allclose(metric.measure(one)["kid_features"], whole[:1], atol=1e-6)
    none = Shard(images.images[:0], (), (), images.prompt_set)
    assert metric.measure(none)["kid_features"].shape == (0, D)


@pytest.mark.parametrize("cls", [FID, KID])
def test_scores_facts_and_ratio_to_base(
    cls: Any, reference: str, weights: dict[str, Any], network: Path
) -> None:
    metric, images = cls(reference, **weights), neutral()
    base = table(images, metric.measure(images))
    column = metric.scores[0].column
    worse = base.copy()
    worse[column] = [v * 1.3 for v in base[column]]
    (score,) = metric.all_scores()
    assert score.judge == "inception, clean, own file"
    found = stats.summarise(metric, score, worse, base, resamples=10, seed_parts=("test",))
    assert found.value is not None and found.n == len(images)
    if metric.name == "fid":
        values = [metric.aggregate(score, t) for t in (worse, base)]
        compared = metric.compare(worse, base)
        assert compared["fid_relative"] == pytest.approx(values[0] / values[1])
        assert compared["n"] == compared["base_n"] == len(images)
        assert "no full rank" in compared["warning"]
    assert metric.compare(worse[:1], base) == {}
    assert np.isnan(metric.aggregate(score, base[:1]))
    facts = json.loads(json.dumps(metric.facts()))
    assert facts["reference_n"] == 12 and facts["resizer"] == "clean-fid's clean"
    assert facts["weights"]["compared_with"].startswith("the sum given in the settings")
    assert len(facts["reference_images_sha256"]) == 64
    assert metric_files(metric) == {
        INCEPTION: file_sha256(network),
        "reference/set.npz": file_sha256(Path(reference)),
    }
    assert detectors(metric) == {}


def test_no_global_randomness(reference: str, weights: dict[str, Any]) -> None:
    images = neutral()
    before = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    metric = KID(reference, subsets=7, subset_size=5, **weights)
    frame = table(images, metric.measure(images))
    first = metric.aggregate(metric.scores[0], frame)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all() and before[2] == random.getstate()
    again = KID(reference, subsets=7, subset_size=5, **weights).aggregate(metric.scores[0], frame)
    assert first == again != KID(reference, **weights).aggregate(metric.scores[0], frame)


def test_clean_fids_own_statistics_are_read(weights: dict[str, Any], reference: str, tmp_path: Path) -> None:
    made = read_reference("fid", Path(reference)).features
    assert made is not None
    np.savez_compressed(tmp_path / "kid.npz", feats=made)
    x = made.astype(np.float64)[:, :40]
    np.savez_compressed(tmp_path / "fid.npz", mu=x.mean(axis=0), sigma=np.cov(x, rowvar=False))
    moments = read_reference("fid", tmp_path / "fid.npz")
    other, _ = two_sets(60, 2, 40)
    expected = frechet(Gaussian.of_features(other), Gaussian.of_features(x))
    assert frechet(Gaussian.of_features(other), moments.gaussian) == pytest.approx(expected, rel=1e-6)
    metric = KID(str(tmp_path / "kid.npz"), **weights)
    metric.check()
    assert metric.facts()["reference_made_by"].startswith("another program")


def test_command_writes_the_same_reference(
    folder: Path,
    weights: dict[str, Any],
    reference: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = [str(folder), str(tmp_path / "x.npz")]
    assert main([*made, "--path", weights["path"], "--sha256", weights["sha256"]]) == 0
    assert capsys.readouterr().out.strip() == made[1]
    assert read_reference("fid", tmp_path / "x.npz").made == read_reference("fid", Path(reference)).made
    assert main([*made, "--path", "/none.pt"]) == 2
    assert "is not at /none.pt" in capsys.readouterr().err


# --- bad input ------------------------------------------------------------------------------------


def test_missing_weights_say_name_url_and_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LETHE_DATA", str(tmp_path))
    for metric, file in ((FID(), INCEPTION), (KID(features="clip-vit-b-32"), "ViT-B-32.pt")):
        with pytest.raises(UserError) as error:
            metric.check()
        said = str(error.value)
        assert "\n" not in said and file in said and "https://" in said and str(tmp_path) in said


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sha256": ""}, "the published file has f58cb9b6.*: it is damaged or another file"),
        ({"features": "vgg"}, "no features 'vgg': known inception, clip-vit-b-32"),
        ({"resizer": "bilinear"}, "inception has no resizer 'bilinear': known clean, legacy-tensorflow"),
        ({"reference": ""}, "needs a reference set: make it by `python -m lethebench.metrics.frechet"),
        ({"reference": "/none.npz"}, "no reference file at /none.npz"),
        ({"subset_size": 1}, "subset_size=1 at least 2"),
        ({"device": "cuda:9"}, "device='cuda:9' can't be used here"),
    ],
)
def test_bad_settings_are_one_clear_line(
    reference: str, weights: dict[str, Any], change: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says) as error:
        configure_metric(KID, {"reference": reference, **weights, **change}).check()
    assert "\n" not in str(error.value)


def test_bad_references_are_one_clear_line(weights: dict[str, Any], reference: str, tmp_path: Path) -> None:
    def refused(of: Path, says: str, cls: Any = FID, **extra: Any) -> None:
        with pytest.raises(UserError, match=says) as error:
            cls(str(of), **{**weights, **extra}).check()
        assert "\n" not in str(error.value)

    refused(tmp_path, "is a folder: make its features once by")
    bad = tmp_path / "bad.npz"
    bad.write_bytes(b"PK\x03\x04 cut")
    refused(bad, "can't be read .*must be an .npz file")
    np.savez(tmp_path / "empty.npz", other=np.zeros(3))
    refused(tmp_path / "empty.npz", "can't be read .*mu")
    np.savez(tmp_path / "small.npz", features=np.ones((5, 64), np.float32))
    refused(tmp_path / "small.npz", "has 64 dimensions, inception has 2048")
    np.savez(tmp_path / "one.npz", features=np.ones((1, D), np.float32))
    refused(tmp_path / "one.npz", "at least two images")
    np.savez(tmp_path / "nan.npz", features=np.full((3, D), np.nan, np.float32))
    refused(tmp_path / "nan.npz", "not all of its values are finite")
    np.savez(tmp_path / "moments.npz", mu=np.zeros(D), sigma=np.zeros((D, D), np.float32))
    refused(tmp_path / "moments.npz", "KID needs the features", KID)
    np.savez(tmp_path / "object.npz", features=np.array([{}], dtype=object))
    refused(tmp_path / "object.npz", "can't be read")
    refused(
        Path(reference),
        "was made with resizer clean, the images with legacy-tensorflow",
        resizer="legacy-tensorflow",
    )


def test_bad_images_for_a_reference_are_one_clear_line(
    weights: dict[str, Any], tmp_path: Path, folder: Path
) -> None:
    (tmp_path / "none").mkdir()
    for images, says in (
        (tmp_path / "none", "has 0 images: a reference needs at least two"),
        (tmp_path / "gone", "no folder of images at"),
    ):
        with pytest.raises(UserError, match=says):
            write_reference(images, tmp_path / "x.npz", **weights)
    (tmp_path / "cut").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "cut" / name).write_bytes((folder / "01.png").read_bytes()[:100])
    with pytest.raises(UserError, match=r"a\.png can't be read as an image"):
        write_reference(tmp_path / "cut", tmp_path / "x.npz", **weights)
    with pytest.raises(UserError, match=r"a reference is an \.npz file"):
        write_reference(folder, tmp_path / "x.csv", **weights)
    assert not list(tmp_path.glob("*.npz"))


def test_another_torchscript_file_is_refused(tmp_path: Path, reference: str) -> None:
    file = tmp_path / INCEPTION
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(3, 2)), str(file))
    with pytest.raises(UserError, match="can't be read as clean-fid's Inception"):
        FID(reference, path=str(file), sha256=file_sha256(file)).check()
    other = file.rename(tmp_path / "net.pt")
    with pytest.raises(UserError, match=r"reads inception-2015-12-05\.pt by its name: rename"):
        FID(reference, path=str(other), sha256=file_sha256(other)).check()
    other.write_text("text")
    with pytest.raises(UserError, match="is not a TorchScript file"):
        FID(reference, path=str(other), sha256=file_sha256(other)).check()
    assert KINDS["inception"].dimension == D
