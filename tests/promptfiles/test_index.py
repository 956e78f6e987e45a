"""Reference indexes: any image file, the same bytes again, and the same scores as from the images."""

from __future__ import annotations

import json
import struct
import sys
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from metric_fakes import fresh, scene_of, shard, small_world, trained
from PIL import Image
from safetensors.numpy import save_file

from lethebench import plan as planning
from lethebench import prompts as typed
from lethebench.cli import main
from lethebench.composition import recipes
from lethebench.errors import RunError, UserError
from lethebench.indexing import build_index, describing_metric
from lethebench.methods.amg import index as amg
from lethebench.metric import Metric, Shard
from lethebench.metrics.copy_mini import CopyMini
from lethebench.metrics.sscd import SSCD
from lethebench.promptfiles.sets import load_spec
from lethebench.prompts import Role
from lethebench.referencing import (
    Descriptor,
    ImageFolder,
    Indexes,
    ReferenceIndex,
    References,
    UnreadableImage,
    find_references,
    load_index,
    open_references,
    read_image,
    save_index,
    unusable_references,
)
from lethebench.registry import METRICS, PROMPT_SETS
from lethebench.specs import load_suite
from lethebench.store import file_sha256

# --- any image file -------------------------------------------------------------------------------

RED, BLUE = (255, 0, 0), (0, 0, 255)


def saved(path: Path, image: Image.Image, **settings: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **settings)
    return path


def halves(mode: str = "RGB") -> Image.Image:
    """8 x 4 pixels: red on the left, blue on the right."""
    image = Image.new("RGB", (8, 4), RED)
    image.paste(BLUE, (4, 0, 8, 4))
    return image.convert(mode)


def claims(path: Path, width: int, height: int) -> Path:
    """A small PNG whose header says another size."""
    data = bytearray(saved(path, halves()).read_bytes())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)
    return path


def test_pixels_are_what_a_viewer_shows(tmp_path: Path) -> None:
    plain = np.asarray(halves())
    assert np.array_equal(read_image(saved(tmp_path / "rgb.png", halves())), plain)
    assert np.array_equal(read_image(saved(tmp_path / "palette.gif", halves("P"))), plain)
    clear = halves("RGBA")
    clear.paste((9, 9, 9, 0), (0, 0, 4, 4))
    shown = read_image(saved(tmp_path / "clear.png", clear))
    assert (shown[:, :4] == 255).all() and (shown[:, 4:] == BLUE).all()
    half = Image.new("LA", (2, 2), (0, 128))
    assert (read_image(saved(tmp_path / "half.png", half)) == 127).all()
    keyed = halves("P")
    red = keyed.getpixel((0, 0))
    assert (read_image(saved(tmp_path / "keyed.png", keyed, transparency=red))[:, :4] == 255).all()
    deep = Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16))
    assert read_image(saved(tmp_path / "deep.png", deep))[0, :, 1].tolist() == [0, 1, 128, 255]
    inks = Image.new("CMYK", (2, 2), (0, 255, 255, 0))
    assert (read_image(saved(tmp_path / "inks.tif", inks)) == RED).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    turned = read_image(saved(tmp_path / "turned.png", halves(), exif=exif))
    assert turned.shape == (8, 4, 3) and (turned[0] == RED).all() and (turned[-1] == BLUE).all()
    frames = saved(
        tmp_path / "frames.gif", halves("P"), save_all=True, append_images=[Image.new("P", (8, 4))]
    )
    assert np.array_equal(read_image(frames), plain)
    assert read_image(saved(tmp_path / "one.png", Image.new("1", (1, 1), 1))).tolist() == [[[255] * 3]]


def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    cut = saved(tmp_path / "cut.jpg", noise)
    cut.write_bytes(cut.read_bytes()[:1500])
    saved(tmp_path / "float.tif", Image.fromarray(np.zeros((4, 4), np.float32)))
    saved(tmp_path / "int.tif", Image.fromarray(np.zeros((4, 4), np.int32)))
    claims(tmp_path / "large.png", 12_000, 12_000)
    claims(tmp_path / "huge.png", 100_000, 100_000)
    for name, words in {
        "text.jpg": "no image that",
        "empty.png": "no image that",
        "cut.jpg": "truncated",
        "float.tif": "floating-point",
        "int.tif": "32-bit",
        "large.png": "12000 x 12000",
        "huge.png": "more than",
    }.items():
        with pytest.raises(UnreadableImage, match=words) as error:
            read_image(tmp_path / name)
        assert "\n" not in str(error.value) and str(tmp_path) not in str(error.value)


# --- making an index ------------------------------------------------------------------------------


class Colours(Metric):
    """Describes an image by the mean colour of its four quarters."""

    name = "colours"
    needs = frozenset({"images", "references"})
    scores = ()

    def __init__(self) -> None:
        self.described = 0

    def measure(self, shard: Shard) -> dict[str, Any]:
        return {}

    def descriptor(self) -> Descriptor:
        return Descriptor("colours", "", "4 quarters")

    def describe(self, images: Any) -> np.ndarray:
        found = []
        for image in images:
            self.described += 1
            small = Image.fromarray(image).resize((2, 2), Image.Resampling.BOX)
            found.append(np.asarray(small, np.float64).ravel() + 1)
        stacked = np.stack(found)
        return stacked / np.linalg.norm(stacked, axis=1, keepdims=True)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Six pictures below a folder, two of them the same file."""
    folder = tmp_path / "images"
    for number, name in enumerate(["b.png", "a.png", "sub/c.jpg", "sub/d.webp", "e.png"]):
        pixels = np.random.default_rng(number).integers(0, 256, (6, 5 + number, 3), dtype=np.uint8)
        saved(folder / name, Image.fromarray(pixels))
    (folder / "sub" / "copy.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden.png").write_text("not seen")
    return folder


def test_an_index_holds_ids_sums_and_vectors(images: Path, tmp_path: Path) -> None:
    metric, out = Colours(), tmp_path / "index.safetensors"
    built = build_index(images, out, metric)
    assert built.index.sha256 == file_sha256(out) and load_index(out).ids == built.index.ids
    assert built.index.ids == ("a", "b", "e", "sub/c", "sub/copy", "sub/d")
    assert built.same == (("a", "sub/copy"),) and built.others == 1 and built.unreadable == ()
    for name, total, vector in zip(built.index.ids, built.index.sums, built.index.vectors, strict=True):
        path = next(p for p in images.rglob("*.*") if p.with_suffix("") == images / name)
        assert total.tobytes().hex() == file_sha256(path)
        np.testing.assert_allclose(vector, metric.describe([read_image(path)])[0], atol=1e-7)
    assert sorted(tmp_path.iterdir()) == [images, out]


def test_an_index_keeps_no_picture_and_no_path(images: Path, tmp_path: Path) -> None:
    data = build_index(images, tmp_path / "index.safetensors", Colours()).path.read_bytes()
    assert str(tmp_path).encode() not in data and len(data) < 2000


def test_the_same_images_give_the_same_bytes(images: Path, tmp_path: Path) -> None:
    first = build_index(images, tmp_path / "first.safetensors", Colours()).index.sha256
    table = tmp_path / "reversed.csv"
    files = [p for p in images.rglob("*") if p.suffix in (".png", ".jpg", ".webp") and p.name[0] != "."]
    table.write_text("file\n" + "".join(f"{p.relative_to(images)}\n" for p in sorted(files, reverse=True)))
    second = build_index(images, tmp_path / "second.safetensors", Colours(), table=table).index.sha256
    assert first == second


class Killed(Colours):
    """As Colours, and interrupted at the fourth image."""

    def describe(self, images: Any) -> np.ndarray:
        if self.described == 3:
            raise KeyboardInterrupt
        return super().describe(images)


def test_an_interrupted_index_goes_on(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build_index(images, tmp_path / "whole.safetensors", Colours()).index.sha256
    monkeypatch.setattr("lethebench.indexing.source_sha256", lambda _: "one metric")
    out, part = tmp_path / "index.safetensors", tmp_path / "index.safetensors.part"
    with pytest.raises(KeyboardInterrupt):
        build_index(images, out, Killed())
    assert not out.exists() and part.exists()
    with part.open("ab") as file:  # a record that was being written
        file.write(b"half a record")
    metric = Colours()
    assert build_index(images, out, metric).index.sha256 == whole
    assert metric.described == 5 - 3 and not part.exists()  # two of the six are one file


def test_what_another_code_made_is_not_gone_on_with(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, metric = tmp_path / "index.safetensors", Colours()
    with pytest.raises(KeyboardInterrupt):
        build_index(images, out, Killed())
    monkeypatch.setattr("lethebench.indexing.source_sha256", lambda _: "changed since")
    build_index(images, out, metric)
    assert metric.described == 5


def test_unreadable_images_are_told_and_left_out_only_on_request(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "broken.png").write_text("no image")
    claims(images / "huge.png", 50_000, 50_000)
    out, metric = tmp_path / "index.safetensors", Colours()
    with pytest.raises(RunError, match="2 of 8 images can't be read"):
        build_index(images, out, metric)
    lines = [line for line in capsys.readouterr().err.splitlines() if "can't be read" in line]
    assert len(lines) == 2 and "broken.png" in lines[0] and "huge.png" in lines[1] and not out.exists()
    built = build_index(images, out, metric, skip_unreadable=True)
    assert len(built.index) == 6 and len(built.unreadable) == 2 and metric.described == 5
    for path in images.rglob("*.*"):
        path.write_text("no image")
    with pytest.raises(RunError, match="none of the 8 images"):
        build_index(images, tmp_path / "none.safetensors", metric, skip_unreadable=True)


def test_a_table_says_ids_captions_and_duplicates(images: Path, tmp_path: Path) -> None:
    rows = [
        {"file": "b.png", "id": "7", "prompt": "a bee", "duplicates": 64, "more": "x"},
        {"file": "a.png", "id": "0012"},
        {"file": "a.png"},
    ]
    table = tmp_path / "map.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    found = build_index(images, tmp_path / "index.safetensors", Colours(), table=table).index
    assert found.ids == ("0012", "7", "a")
    assert found.captions == ("", "a bee", "") and found.duplicates == (0, 64, 0)
    read = amg.load(tmp_path / "index.safetensors")  # the method AMG takes the same file
    assert read.captions == found.captions and read.duplicates == found.duplicates
    assert torch.equal(read.descriptors, torch.from_numpy(found.vectors)) and read.descriptor == "colours"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("map.csv", "image,id\na.png,1\n", "column `file`"),
        ("map.csv", "file,id\na.png,1\nb.png,1\n", "line 3 has the id '1'"),
        ("map.csv", "file,duplicates\na.png,many\n", "line 2: duplicates is 'many'"),
        ("map.csv", "file,id\n,1\n", "line 2 names no file"),
        ("map.csv", "file\n", "no rows"),
        ("map.json", "[]", "format"),
        ("gone.csv", None, "no such file"),
    ],
)
def test_a_wrong_table_is_refused(
    images: Path, tmp_path: Path, name: str, text: str | None, words: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    metric = Colours()
    with pytest.raises(UserError, match=words):
        build_index(images, tmp_path / "index.safetensors", metric, table=tmp_path / name)
    assert not metric.described


def test_a_file_that_a_table_names_and_is_not_there_is_unreadable(images: Path, tmp_path: Path) -> None:
    (tmp_path / "map.csv").write_text("file\na.png\ngone.png\n")
    with pytest.raises(RunError, match="1 of 2"):
        build_index(images, tmp_path / "index.safetensors", Colours(), table=tmp_path / "map.csv")


def test_wrong_places_are_refused(images: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    metric, out = Colours(), tmp_path / "index.safetensors"
    for folder, place, words in (
        (tmp_path / "empty", out, "no images"),
        (tmp_path / "gone", out, "no folder"),
        (images / "a.png", out, "no folder"),
        (images, tmp_path / "index.npz", "safetensors"),
        (images, images / "index.safetensors", "among the images"),
        (images, tmp_path / "model.safetensors", "no index"),
        (images, images / "a.png" / "index.safetensors", "among the images"),
        (images, tmp_path / "model.safetensors" / "index.safetensors", "can't write"),
    ):
        with pytest.raises(UserError, match=words):
            build_index(folder, place, metric)
    saved(images / "a.jpg", halves())
    with pytest.raises(UserError, match="both have the id 'a'"):
        build_index(images, out, metric)
    assert not metric.described
    with pytest.raises(UserError, match="copy-mini or sscd"):
        describing_metric("fd-mini", {})
    with pytest.raises(UserError, match="needs sscd_disc_mixup"):
        describing_metric("sscd", {"path": str(tmp_path)})


# --- reading one ----------------------------------------------------------------------------------


def made(count: int = 3, **changes: Any) -> ReferenceIndex:
    vectors = np.random.default_rng(0).standard_normal((count, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = tuple("abcdefgh"[:count])
    sums = np.zeros((count, 32), np.uint8)
    whole = ReferenceIndex(Descriptor("colours", "", ""), ids, vectors, sums, ("",) * count, (0,) * count)
    return replace(whole, **changes)


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "index.safetensors"
    for index, words in (
        (made(0), "no references"),
        (made(ids=("a", "b", "b")), "id twice"),
        (made(ids=("a", "b")), "uint8 \\[2, 32\\]"),
        (made(captions=("",)), "3 descriptors, 3 ids, 1 captions"),
        (made(vectors=np.full((3, 4), 2, np.float32)), "unit length"),
        (made(vectors=np.full((3, 4), np.nan, np.float32)), "unit length"),
        (made(vectors=np.zeros((3,), np.float32)), "float32 \\[n, d\\]"),
    ):
        save_index(index, path)
        with pytest.raises(UserError, match=words):
            load_index(path)
    save_index(made(), path)
    whole = path.read_bytes()
    for data in (whole[:-5], whole[: len(whole) // 3], b"", b"junk" * 50):
        path.write_bytes(data)
        with pytest.raises(UserError, match="damaged"):
            load_index(path)
    save_file({"descriptors": np.zeros((1, 4), np.float32)}, path)
    with pytest.raises(UserError, match="its format must be"):
        load_index(path)
    of_amg = amg.ReferenceIndex(torch.eye(2), ("", ""), (0, 0), "colours")
    amg.save(of_amg, path)
    with pytest.raises(UserError, match="doesn't say whose"):
        load_index(path)
    with pytest.raises(UserError, match="no reference index at"):
        load_index(tmp_path / "gone.safetensors")


def test_references_are_a_folder_or_an_index(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = build_index(images, tmp_path / "indexes" / "colours.safetensors", Colours()).path
    pictures, one, several = (open_references(p) for p in (images, index, index.parent))
    assert isinstance(pictures, ImageFolder) and isinstance(one, Indexes) and isinstance(several, Indexes)
    assert pictures.ids == one.ids == several.ids and "sub/c" in one and "sub/c" in pictures
    assert "gone" not in pictures and "gone" not in one
    assert np.array_equal(pictures.reference("a").image, read_image(images / "a.png"))
    assert pictures.described("a") is None
    kept = one.described("a")
    assert kept is not None and kept.by(Descriptor("colours", "")).shape == (12,)
    with pytest.raises(UserError, match="only as a descriptor"):
        one.reference("a")
    for found in (pictures, one):
        for ask in (found.reference, found.described):
            with pytest.raises(KeyError):
                ask("gone")
    assert one.manifest() == {"descriptors": {"colours": {"references": 6, "sha256": file_sha256(index)}}}
    before = pictures.manifest()
    saved(images / "a.png", halves())
    assert before["images"] == 6 and open_references(images).manifest() != before
    (images / "e.png").write_text("no image")
    with pytest.raises(UserError, match="can't be read"):
        open_references(images).reference("e")

    monkeypatch.setenv("LETHE_DATA", str(tmp_path / "data"))
    assert find_references("nemo") is None
    place = tmp_path / "data" / "nemo" / "references"
    place.mkdir(parents=True)
    assert find_references("nemo") is None
    (place / "colours.safetensors").write_bytes(index.read_bytes())
    found_there = find_references("nemo")
    assert found_there is not None and found_there.ids == one.ids
    (place / "again.safetensors").write_bytes(index.read_bytes())
    with pytest.raises(UserError, match="two indexes hold descriptors of colours"):
        find_references("nemo")
    (place / "again.safetensors").rename(place / "again.png")
    with pytest.raises(UserError, match="images and index files"):
        find_references("nemo")
    for wrong, words in ((tmp_path / "gone", "no references at"), (tmp_path / "data" / "nemo", "images and")):
        with pytest.raises(UserError, match=words):
            open_references(wrong)


# --- the same scores ------------------------------------------------------------------------------


class Kept:
    """The small world with its references somewhere else."""

    version = "1"

    def __init__(self, references: References, name: str = "kept") -> None:
        self.references, self.name = references, name

    def __iter__(self) -> Iterator[typed.Prompt]:
        return iter(small_world())

    def reference(self, reference_id: str) -> typed.Reference:
        return self.references.reference(reference_id)

    def described(self, reference_id: str) -> Any:
        return self.references.described(reference_id)

    def training_prompts(self) -> list[str]:
        return list(small_world().training_prompts())

    def manifest(self) -> dict[str, Any]:
        return {"references": self.references.manifest()}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small world's references as PNG files."""
    folder = tmp_path_factory.mktemp("references")
    for name in sorted({r for prompt in small_world() for r in prompt.references}):
        saved(folder / f"{name}.png", Image.fromarray(small_world().reference(name).image))
    return folder


@pytest.fixture(scope="module")
def sscd(tmp_path_factory: pytest.TempPathFactory) -> SSCD:
    """A small random network as SSCD's file."""
    path = tmp_path_factory.mktemp("sscd") / "sscd_disc_mixup.torchscript.pt"
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        layers = (torch.nn.Conv2d(3, 16, 16, 16), torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten())
        torch.jit.save(torch.jit.script(torch.nn.Sequential(*layers).eval()), str(path))
    return SSCD(preset="amg-224", path=str(path), sha256=file_sha256(path))


def asked() -> Shard:
    prompts = trained("verbatim")[:2] + trained("one-to-many") + trained("foreground")[:1]
    controls = [p for p in small_world() if p.role is Role.CONTROL][:2]
    concept = next(p for p in small_world() if p.role is Role.CONCEPT)
    pairs: list[Any] = [(p, scene_of(p)) for p in prompts]
    return shard([*pairs, *((p, fresh(p)) for p in [*prompts[:2], *controls, concept])])


@pytest.mark.parametrize("which", ["copy-mini", "sscd"])
def test_scores_from_an_index_are_those_from_the_images(
    which: str, pictures: Path, sscd: SSCD, tmp_path: Path
) -> None:
    metric: Metric = CopyMini() if which == "copy-mini" else sscd
    index = build_index(pictures, tmp_path / "index.safetensors", metric).path
    images = asked()
    expected = metric.measure(images)
    for references in (open_references(index), open_references(pictures)):
        found = metric.measure(replace(images, prompt_set=Kept(references)))
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            if values.dtype == object:
                assert list(found[name]) == list(values)
            else:
                np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-6)
    assert np.nanmax(expected[f"{metric.name.replace('-', '_')}_similarity"]) > 0.99
    made_by = metric.descriptor()
    assert made_by is not None and load_index(index).descriptor == made_by
    if which == "copy-mini":
        read = amg.load(index)
        assert (read.descriptor, read.weights) == (made_by.name, made_by.weights)


def test_the_index_alone_is_asked(pictures: Path, tmp_path: Path) -> None:
    """A changed vector changes the score: nothing else is looked at."""
    index = build_index(pictures, tmp_path / "index.safetensors", CopyMini()).index
    images = asked()
    own = images.prompts[0].references[0]
    vectors = index.vectors.copy()
    vectors[index.rows[own]] *= -1
    changed = Kept(Indexes((replace(index, vectors=vectors),)))
    before, after = (
        CopyMini().measure(replace(images, prompt_set=prompts))["copy_mini_similarity"][0]
        for prompts in (Kept(Indexes((index,))), changed)
    )
    assert before == pytest.approx(1, abs=1e-5) and after == pytest.approx(-1, abs=1e-5)


def test_what_needs_pixels_does_not_apply_to_an_index(
    pictures: Path, sscd: SSCD, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = build_index(pictures, tmp_path / "index.safetensors", sscd).path
    indexed, imaged = Kept(open_references(index)), Kept(open_references(pictures))
    images = replace(asked(), prompt_set=indexed)
    needing = {name: cls() for name, cls in METRICS.items() if "references" in cls.needs}
    assert {"fbmem", "tiled-l2", "gap-ratio", "planted-truth", "copy-mini", "sscd"} <= needing.keys()
    for name, metric in needing.items():
        assert unusable_references(metric, small_world()) is None
        if name in ("copy-mini", "sscd"):
            continue
        assert unusable_references(metric, imaged) is None
        told = unusable_references(metric, indexed)
        assert told is not None and f"metric '{name}' does not apply" in told and "descriptors only" in told
        with pytest.raises(UserError, match="only as a descriptor"):
            metric.measure(images)
    assert unusable_references(sscd, indexed) is None
    told = unusable_references(CopyMini(), indexed)
    assert told is not None and "sscd:amg-224" in told and "copy-mini is asked for" in told
    with pytest.raises(UserError, match="copy-mini is asked for"):
        CopyMini().measure(images)
    assert "dcr-224 is asked for" in str(unusable_references(replace(sscd, preset="dcr-224"), indexed))
    other = replace(load_index(index), descriptor=Descriptor("sscd:amg-224", "0" * 64))
    assert "other weights" in str(unusable_references(sscd, Kept(Indexes((other,)))))
    assert unusable_references(METRICS.get("clip-mini")(), indexed) is None
    nothing = [replace(prompt, references=()) for prompt in small_world()]
    monkeypatch.setattr(Kept, "__iter__", lambda _: iter(nothing))
    assert "no prompt of 'kept' has a reference" in str(unusable_references(sscd, indexed))
    assert unusable_references(METRICS.get("clip-mini")(), indexed) is None


def test_a_changed_index_changes_the_keys_of_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(index: ReferenceIndex) -> tuple[Any, Any]:
        prompts = Kept(Indexes((replace(index, sha256=f"of {index.vectors.tobytes()!r}"),)))
        monkeypatch.setitem(PROMPT_SETS._items, "kept", prompts)
        planning.prompt_set.cache_clear()
        planning.manifest_sha256.cache_clear()
        suite = load_suite("smoke")
        selected = tuple(s for s in suite.select if s.role is Role.TRIGGER)
        suite = suite.model_copy(update={"prompt_set": "kept", "select": selected})
        row = planning.RowPlan(suite, suite.model, recipes("base")[0], planning.Runtime())
        copy = next(m for m in suite.metrics if m.name == "copy-mini")
        return row.scores_key(0, copy)["prompts"], row.scores_key(0, copy)

    try:
        first, again = key(made()), key(made())
        changed = key(made(vectors=-made().vectors))
    finally:
        planning.prompt_set.cache_clear()
        planning.manifest_sha256.cache_clear()
    assert first == again and first[0] != changed[0]


def test_a_users_prompt_set_names_an_index_or_a_folder(images: Path, tmp_path: Path) -> None:
    build_index(images, tmp_path / "colours.safetensors", Colours())
    (tmp_path / "prompts.csv").write_text("prompt,id\na bee,b\nan ant,a\na cat,sub\n")
    spec = tmp_path / "set.yaml"
    found = {}
    for references in ("images", "colours.safetensors"):
        spec.write_text(f"{{name: mine, file: prompts.csv, role: trigger, references: {references}}}")
        found[references] = load_spec(spec)
    for prompts in found.values():
        named = {prompt.id: prompt.references for prompt in prompts}
        assert named["b"] == ("b",) and set(named["sub"]) == {"sub/c", "sub/copy", "sub/d"}
    assert found["images"].described("b") is None
    assert found["colours.safetensors"].described("b") is not None
    sums = [prompts.manifest()["references"] for prompts in found.values()]
    assert sums[0] != sums[1] and None not in sums


# --- the command ----------------------------------------------------------------------------------


def lethe(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["lethe", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_command(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert lethe(monkeypatch, "index", images, "--descriptor", "copy-mini") == 0
    told = capsys.readouterr()
    assert "6 references by copy-mini" in told.out and "1 other files" in told.out
    assert "the same file: a, sub/copy" in told.err
    found = load_index(tmp_path / "index.safetensors")
    assert found.sha256 in told.out and found.vectors.shape == (6, 128)
    (images / "broken.png").write_text("no image")
    arguments = ("index", images, "--descriptor", "copy-mini", "--out", "again.safetensors")
    assert lethe(monkeypatch, *arguments) == 1
    assert "--skip-unreadable" in capsys.readouterr().err.splitlines()[-1]
    assert lethe(monkeypatch, *arguments, "--skip-unreadable", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["sha256"] == found.sha256 and list(record["unreadable"]) == [str(images / "broken.png")]
    for wrong in (
        ("index", images, "--descriptor", "sccd"),
        ("index", images, "--descriptor", "copy-mini", "--set", "preset=x"),
        ("index", tmp_path / "gone", "--descriptor", "copy-mini"),
        ("index", images),
    ):
        assert lethe(monkeypatch, *wrong) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
