"""Published models: by name or by hub id the same, pinned, and looked for without any download."""

import re
import shutil

import huggingface_hub.constants
import pytest
from tiny_pipelines import tiny_sd

from lethebench.doctor import Machine, _needs, examine
from lethebench.errors import UserError
from lethebench.memory import GB, DryRun, outline, sampling
from lethebench.registry import MODELS
from lethebench.zoo import LoadSettings, check_model, find_model, load_model
from lethebench.zoo._files import fetch_command, missing_files

PUBLISHED = {name: entry for name, entry in MODELS.items() if not entry.builtin}
NAMES = [
    "sd-1.4",
    "sd-1.5",
    "sd-2.1",
    "sdxl",
    "sd3-medium",
    "sd3.5-medium",
    "sd3.5-large",
    "flux-schnell",
    "flux-dev",
]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def stored(cache, source, commit):
    """A tiny pipeline where huggingface_hub's downloads would leave it."""
    folder = cache / f"models--{source.replace('/', '--')}" / "snapshots" / commit
    tiny_sd().save_pretrained(folder)
    return folder


def test_every_entry_is_pinned_and_licensed():
    assert set(NAMES) <= set(PUBLISHED)
    for entry in PUBLISHED.values():
        assert re.fullmatch(r"[0-9a-f]{40}", entry.revision) and entry.licence and entry.summary
        assert all(re.fullmatch(r"[0-9a-f]{40}", revision) for revision in entry.mirrors.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_hub_id_is_the_registered_model(name):
    entry = PUBLISHED[name]
    assert find_model(entry.source) == find_model(name) == entry
    assert find_model(entry.source, revision="b" * 40).revision == "b" * 40
    for mirror, revision in entry.mirrors.items():
        found = find_model(mirror)
        assert (found.name, found.source, found.revision) == (name, mirror, revision)
        assert found.sampler == entry.sampler


def test_the_pinned_revision_is_what_is_loaded(cache):
    entry = PUBLISHED["sd-1.4"]
    stored(cache, entry.source, "a" * 40)
    with pytest.raises(
        UserError, match=f"lethe fetch CompVis/stable-diffusion-v1-4 --revision {entry.revision}"
    ):
        load_model("sd-1.4")
    stored(cache, entry.source, entry.revision)
    model = load_model(entry.source)
    assert model.name == "sd-1.4" and model.entry.sampler.num_inference_steps == 50
    assert sorted(model.weights_sha256()) == [
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]


def test_a_mirror_in_the_cache_will_do(cache):
    source, revision = next(iter(PUBLISHED["sd-2.1"].mirrors.items()))
    folder = stored(cache, source, revision)
    assert load_model("sd-2.1").folder == folder


def test_what_a_cut_download_lacks(cache):
    entry = PUBLISHED["sd-1.5"]
    folder = stored(cache, entry.source, entry.revision)
    assert missing_files(folder) == []
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(UserError, match=r"lacks .* and 1 more: fetch it again with `lethe fetch") as error:
        check_model("sd-1.5")
    assert "\n" not in str(error.value)
    (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"a variant that isn't loaded")
    assert set(missing_files(folder)) == {"unet/diffusion_pytorch_model.safetensors", "tokenizer/"}


def test_the_parts_of_a_split_file(tmp_path):
    tiny_sd().save_pretrained(tmp_path, max_shard_size="60KB")
    parts = sorted((tmp_path / "unet").glob("*-of-*.safetensors"))
    assert len(parts) > 1 and missing_files(tmp_path) == []
    assert {f"unet/{p.name}" for p in parts} < set(load_model(str(tmp_path)).weights_sha256())
    parts[0].unlink()
    assert missing_files(tmp_path) == [f"unet/{parts[0].name}"]


def by_name(findings):
    return {f.what: f for f in findings}


def test_doctor_says_what_is_missing(cache, tmp_path):
    found = by_name(examine("sd-1.4", tmp_path / "runs", device="cpu"))
    missing = found["model sd-1.4"]
    assert (
        not missing.ok
        and fetch_command("CompVis/stable-diffusion-v1-4", PUBLISHED["sd-1.4"].revision) in missing.detail
    )
    assert "CreativeML OpenRAIL-M" in missing.detail and "gated" not in missing.detail
    assert "4.3 GB" in found["room for the model"].detail
    assert found["memory"].ok and "unet 3.4" in found["memory"].detail
    assert "with --load checkpointing=true" in found["one 80 GB GPU"].detail
    stored(cache, "CompVis/stable-diffusion-v1-4", PUBLISHED["sd-1.4"].revision)
    assert by_name(examine("sd-1.4", tmp_path / "runs", device="cpu"))["model sd-1.4"].ok
    wrong = by_name(examine("mini-ds", tmp_path / "runs"))["model mini-ds"]
    assert not wrong.ok and "did you mean mini-sd" in wrong.detail


def test_doctor_advises_what_makes_a_model_fit(tmp_path):
    tiny_sd().save_pretrained(tmp_path / "tiny")
    found = outline(find_model(str(tmp_path / "tiny")))
    total = sampling(DryRun(found, find_model("sd-1.4").sampler, "float32")).total
    enough = by_name(_needs(found, Machine("cuda", total, GB), "float32", LoadSettings()))
    assert enough["memory"].ok and "batches of up to 1 images" in enough["memory"].detail
    short = by_name(_needs(found, Machine("cuda", total - 1, GB), "float32", LoadSettings()))
    assert not short["memory"].ok and "it fits with --dtype bfloat16" in short["memory"].detail
    none = by_name(_needs(found, Machine("cuda", 1000, 1000), "bfloat16", LoadSettings()))
    assert "nothing in --load makes it fit" in none["memory"].detail and not none["main memory"].ok
    cpu = Machine("cpu", GB, GB)
    asked = by_name(_needs(found, cpu, "bfloat16", LoadSettings(offload="model")))
    assert not asked["loading"].ok and "give --device cuda" in asked["loading"].detail
