"""CLIP score: every way of loading against open_clip's or transformers' own computation, on tiny random models."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from metric_fakes import fresh, shard, small_world, table, trained
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchmetrics.functional.pairwise import pairwise_cosine_similarity
from torchvision import transforms

from lethebench import stats
from lethebench.errors import UserError
from lethebench.metric import Shard, configure_metric, detectors
from lethebench.metrics.clip_score import OPEN_CLIP_CONFIG, PRESETS, ClipScore, kind_of
from lethebench.metrics.frechet import KID, write_reference
from lethebench.metrics.frechet._reference import read_reference
from lethebench.plan import metric_files
from lethebench.prompts import Role
from lethebench.store import file_sha256

CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def tiny(quick_gelu: bool = False) -> open_clip.CLIP:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CLIP(**CONFIG, quick_gelu=quick_gelu).eval()
        for name, values in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(values, std=0.1)
    return model


def archive(state: dict[str, torch.Tensor], path: Path) -> None:
    """A TorchScript file with this state dict, as OpenAI publishes its models."""
    root = nn.Module()
    for name, value in state.items():
        *parents, leaf = name.split(".")
        holder = root
        for parent in parents:
            if not hasattr(holder, parent):
                holder.add_module(parent, nn.Module())
            holder = getattr(holder, parent)
        holder.register_parameter(leaf, nn.Parameter(value.clone(), requires_grad=False))
    torch.jit.save(torch.jit.script(root), str(path))


@pytest.fixture(scope="module")
def openai(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("clip") / "ViT-B-32.pt"
    archive(tiny().state_dict(), path)
    return {"path": str(path), "sha256": file_sha256(path)}


def directly(model: Any, images: np.ndarray, texts: list[str]) -> np.ndarray:
    """The cosines by open_clip's own calls and a preprocessing written out here."""
    preprocess = transforms.Compose(
        [
            transforms.Resize(32, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.fromarray(i)) for i in images])
        made = model.encode_image(pixels)
        asked = model.encode_text(open_clip.get_tokenizer("ViT-B-32")(texts))
        return pairwise_cosine_similarity(made, asked).diagonal().numpy()


def some() -> Shard:
    prompts = [p for p in small_world() if p.role is Role.NEUTRAL][:5] + trained("verbatim")[:2]
    return shard([(p, fresh(p)) for p in prompts])


# --- ways of loading ------------------------------------------------------------------------------


def test_openai_archive_equals_open_clip_with_quick_gelu(openai: dict[str, Any]) -> None:
    images = some()
    metric = ClipScore(**openai)
    metric.check()
    # OpenAI's release is held in float16, and open_clip rounds its matrices so.
    model = tiny(quick_gelu=True)
    open_clip.model.convert_weights_to_fp16(model)
    expected = directly(model.float(), images.images, [p.text for p in images.prompts])
    found = metric.measure(images)["clip_score"]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    plain = directly(tiny(), images.images, [p.text for p in images.prompts])
    assert np.abs(plain - expected).max() > 1e-4, "the test must tell the two activations apart"


@pytest.mark.parametrize("suffix", ["pt", "bin", "safetensors"])
def test_checkpoint_of_a_named_architecture(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny", json.loads(json.dumps(CONFIG)))
    path = tmp_path / f"model.{suffix}"
    state = {k: v.contiguous() for k, v in tiny().state_dict().items()}
    if suffix == "safetensors":
        save_file(state, path)
    else:
        torch.save(
            {"state_dict": {f"module.{k}": v for k, v in state.items()}} if suffix == "pt" else state, path
        )
    metric, images = ClipScore(model="Tiny", path=str(path)), some()
    metric.check()
    expected = directly(tiny(), images.images, [p.text for p in images.prompts])
    np.testing.assert_allclose(metric.measure(images)["clip_score"], expected, atol=1e-6)
    assert metric.all_scores()[0].judge == f"Tiny (model.{suffix})"
    assert metric.facts()["weights"]["compared_with"] == "unpinned: no published sum is known"


def test_open_clip_folder(tmp_path: Path) -> None:
    folder = tmp_path / "CLIP-tiny"
    folder.mkdir()
    (folder / OPEN_CLIP_CONFIG).write_text(
        json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {"mean": MEAN}})
    )
    torch.save(tiny().state_dict(), folder / "open_clip_pytorch_model.bin")
    (folder / "README.md").write_text("card")
    metric, images = ClipScore(path=str(folder)), some()
    metric.check()
    expected = directly(tiny(), images.images, [p.text for p in images.prompts])
    np.testing.assert_allclose(metric.measure(images)["clip_score"], expected, atol=1e-6)
    assert metric_files(metric) == {
        n: file_sha256(folder / n) for n in ("open_clip_config.json", "open_clip_pytorch_model.bin")
    }
    assert metric.facts()["loaded_as"] == "open_clip" and metric.facts()["preset"] is None
    with pytest.raises(
        UserError, match=r"is a model's folder, .* leave out the settings 'model' and 'sha256'"
    ):
        ClipScore(path=str(folder), model="ViT-B-32").check()


def test_transformers_folder(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    words = ["<|startoftext|>", "<|endoftext|>", "a", "a</w>", "b", "b</w>"]
    (tmp_path / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=77)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": 6, "bos_token_id": 0, "eos_token_id": 1},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    folder = tmp_path / "clip"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config).eval()
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for piece in (model, tokenizer, processor):
        piece.save_pretrained(folder)
    images = some()
    metric = ClipScore(path=str(folder))
    metric.check()
    found = metric.measure(images)["clip_score"]
    texts = [p.text for p in images.prompts]
    with torch.no_grad():
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=77, return_tensors="pt")
        pixels = processor(images=[Image.fromarray(i) for i in images.images], return_tensors="pt")
        out = model(**tokens, **pixels)
    expected = pairwise_cosine_similarity(out.image_embeds, out.text_embeds).diagonal()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert metric.facts()["loaded_as"] == kind_of(folder) == "transformers"


# --- the metric -----------------------------------------------------------------------------------


def test_batch_order_and_context_length(openai: dict[str, Any]) -> None:
    metric, whole = ClipScore(**openai), some()
    expected = metric.measure(whole)["clip_score"]
    for rows in (list(range(len(whole)))[::-1], *([i] for i in range(len(whole)))):
        prompts, indices = (tuple(v[i] for i in rows) for v in (whole.prompts, whole.indices))
        one = Shard(whole.images[rows], prompts, indices, whole.prompt_set)
        np.testing.assert_allclose(metric.measure(one)["clip_score"], expected[rows], atol=1e-6)
    assert metric.measure(Shard(whole.images[:0], (), (), whole.prompt_set))["clip_score"].shape == (0,)
    long = metric.encoder().texts(["word " * 500, "word " * 75, "word"])
    np.testing.assert_allclose(long[0], long[1], atol=1e-6)
    assert np.abs(long[0] - long[2]).max() > 1e-3


def test_scores_facts_and_ratio_to_base(openai: dict[str, Any]) -> None:
    metric, images = ClipScore(**openai), some()
    base = table(images, metric.measure(images))
    worse = base.assign(clip_score=base["clip_score"] * 0.5)
    for score in metric.all_scores():
        assert score.judge == "ViT-B-32-quickgelu (ViT-B-32.pt), own file"
        found = stats.summarise(metric, score, base, resamples=20, seed_parts=("test",))
        assert found.value is None or -1 <= found.value <= 1
    assert metric.compare(worse, base) == {"clip_relative": pytest.approx(0.5), "n": 5}
    assert metric.compare(worse[5:], base) == {}
    facts = json.loads(json.dumps(metric.facts()))
    assert facts["loaded_as"] == "torchscript" and "not times 100" in facts["convention"]
    assert facts["weights"]["sha256"] == openai["sha256"]
    assert detectors(metric) == {"clip_score": "low"}


def test_presets_name_open_clips_architectures_and_pinned_files() -> None:
    for preset in PRESETS.values():
        config = open_clip.get_model_config(preset.model)
        assert config is not None and preset.weights.sha256 is not None and len(preset.weights.sha256) == 64
        tag = "openai" if "openai" in preset.weights.url else preset.source.split(";")[0]
        assert open_clip.get_pretrained_cfg(preset.model, tag).get("quick_gelu", False) == config.get(
            "quick_gelu", False
        )
    assert open_clip.get_pretrained_cfg("ViT-L-14", "openai")["url"] == PRESETS["vit-l-14"].weights.url


def test_no_global_randomness(tmp_path: Path, openai: dict[str, Any]) -> None:
    folder = tmp_path / "CLIP-tiny"
    folder.mkdir()
    (folder / OPEN_CLIP_CONFIG).write_text(json.dumps({"model_cfg": CONFIG}))
    torch.save(tiny().state_dict(), folder / "open_clip_pytorch_model.bin")
    copy = tmp_path / "ViT-B-32.pt"
    copy.write_bytes(Path(openai["path"]).read_bytes())
    before = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    for metric in (ClipScore(path=str(folder)), ClipScore(path=str(copy), sha256=openai["sha256"])):
        metric.check()
        metric.measure(some())
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all() and before[2] == random.getstate()


def test_clip_features_of_kid(tmp_path: Path) -> None:
    """With 512 dimensions, as ViT-B/32 has; preprocessing as clean-fid's ``img_preprocess_clip``."""
    path = tmp_path / "ViT-B-32.pt"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        archive(open_clip.CLIP(**{**CONFIG, "embed_dim": 512}).state_dict(), path)
    settings = {"features": "clip-vit-b-32", "path": str(path), "sha256": file_sha256(path)}
    images = some()
    reference = write_reference(images.images[::-1], tmp_path / "set.npz", **settings)
    metric = KID(str(reference), **settings)
    metric.check()
    found = metric.measure(images)["kid_features"]
    made = read_reference("kid", reference)
    assert made.features is not None and made.made["features"] == "clip-vit-b-32"
    np.testing.assert_allclose(found[:5], made.features[::-1][:5], atol=1e-5)
    model = open_clip.load_openai_model(str(path), precision="fp32", device="cpu")
    cut = transforms.Compose([transforms.Resize(32, interpolation=transforms.InterpolationMode.BICUBIC)])
    with torch.no_grad():
        pixels = torch.stack([torch.tensor(np.asarray(cut(Image.fromarray(i)))) for i in images.images[:5]])
        pixels = transforms.Normalize(MEAN, STD)(pixels.permute(0, 3, 1, 2) / 255.0)
        np.testing.assert_allclose(found[:5], model.encode_image(pixels), atol=1e-5)
    assert metric.facts()["features"] == "clip-vit-b-32, 512 dimensions"
    with pytest.raises(UserError, match="clip-vit-b-32 has no resizer 'legacy-tensorflow'"):
        KID(str(reference), resizer="legacy-tensorflow", **settings).check()


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"preset": "vit"}, "no preset 'vit': known vit-b-32, vit-l-14, vit-h-14, vit-g-14"),
        ({"sha256": ""}, "the published file has 40d36571.*: it is damaged or another file"),
        ({"model": "ViT-B-33", "sha256": ""}, "open_clip has no architecture 'ViT-B-33'"),
        (
            {"model": "ViT-B-32", "path": "", "sha256": ""},
            "model='ViT-B-32' needs its weights, and path='' is no",
        ),
        ({"path": "/none.pt"}, "it is not at /none.pt: download https://openaipublic"),
        ({"device": "cuda:9"}, "device='cuda:9' can't be used here"),
    ],
)
def test_bad_settings_are_one_clear_line(openai: dict[str, Any], change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        configure_metric(ClipScore, {**openai, **change}).check()
    assert "\n" not in str(error.value)


def test_wrong_files_are_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny", json.loads(json.dumps(CONFIG)))
    text, other = tmp_path / "page.pt", tmp_path / "other.pt"
    text.write_text("<html>404</html>")
    torch.save({"weight": torch.zeros(3)}, other)
    for file in (text, other):
        with pytest.raises(UserError, match="can't be read as an open_clip checkpoint of Tiny") as error:
            ClipScore(model="Tiny", path=str(file)).check()
        assert "\n" not in str(error.value)
    for model, says in (("ViT-B-33", "no architecture"), ("roberta-ViT-B-32", "needs a tokenizer beside")):
        with pytest.raises(UserError, match=says):
            ClipScore(model=model, path=str(other)).check()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"can't be read as a CLIP model \(transformers\)"):
        ClipScore(path=str(folder)).check()


def test_missing_file_says_name_url_and_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LETHE_DATA", str(tmp_path))
    for name, preset in PRESETS.items():
        with pytest.raises(UserError) as error:
            ClipScore(preset=name).check()
        said = str(error.value)
        assert preset.weights.url in said and str(tmp_path / "clip" / preset.weights.file) in said


def test_wrong_images_are_one_clear_error(openai: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"clip: images must be a numpy array, uint8"):
        ClipScore(**openai).measure(Shard(np.zeros((1, 64, 64, 3)), some().prompts[:1], (0,), small_world()))
