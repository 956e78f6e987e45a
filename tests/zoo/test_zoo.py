"""Naming, checking and loading models."""

import json
import resource
import shutil
import subprocess
import sys
import types

import huggingface_hub.constants
import pytest
import torch
from tiny_pipelines import tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

from lethebench import zoo
from lethebench.errors import UserError
from lethebench.registry import MODELS
from lethebench.specs import SamplerSettings
from lethebench.zoo import ModelEntry, check_model, family_of, load_model, wrap
from lethebench.zoo._files import WEIGHTS, file_sha256

BUILDERS = {"sd": tiny_sd, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, build in BUILDERS.items():
        build().save_pretrained(root / name)
    return root


@pytest.fixture
def builtin(tmp_path, monkeypatch):
    """A built-in model in a weights folder of its own, float16 and with its records."""
    folder = tmp_path / "tiny-sd"
    tiny_sd().to(dtype=torch.float16).save_pretrained(folder)
    names = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file()]
    (folder / "weights.json").write_text(json.dumps({n: file_sha256(folder / n) for n in names}))
    (folder / "lethe.json").write_text(json.dumps({"num_inference_steps": 7, "guidance_scale": 3.5}))
    monkeypatch.setattr(zoo._files, "WEIGHTS", tmp_path)
    entry = ModelEntry("tiny-sd", "sd", "tiny-sd", sampler=SamplerSettings(scheduler="ddim"), builtin=True)
    monkeypatch.setitem(MODELS._items, "tiny-sd", entry)
    return folder


@pytest.mark.parametrize("family", BUILDERS)
def test_a_local_folder_loads(folders, family):
    path = str(folders / family)
    assert family_of(path) == family
    model = load_model(path)
    assert (model.name, model.family, model.dtype) == (family, family, torch.float32)
    assert (
        len(model.text_encoders) == len(model.tokenizers) == {"sd": 1, "sdxl": 2, "sd3": 3, "flux": 2}[family]
    )
    assert model.denoiser is (model.pipe.unet if family in ("sd", "sdxl") else model.pipe.transformer)
    for module in (model.denoiser, model.vae, *model.text_encoders):
        assert not module.training and not any(p.requires_grad for p in module.parameters())
    files = model.weights_sha256()
    assert len(files) == 2 + len(model.text_encoders) and all(f.endswith(".safetensors") for f in files)
    assert files == zoo.weights_sha256(path)


def test_type_of_the_model_and_of_its_vae(folders):
    model = load_model(str(folders / "sd"), dtype="bfloat16")
    assert model.dtype is torch.bfloat16 and model.vae.dtype is torch.float32
    assert model.text_encoders[0].dtype is torch.bfloat16


def test_a_safety_checker_is_never_loaded(folders):
    index = folders / "sd" / "model_index.json"
    written = json.loads(index.read_text())
    assert "safety_checker" in written
    assert load_model(str(folders / "sd")).pipe.safety_checker is None


def test_builtin_model(builtin):
    assert check_model("tiny-sd").builtin
    model = load_model("tiny-sd")
    assert model.dtype is torch.float32
    assert model.entry.sampler == SamplerSettings(scheduler="ddim", num_inference_steps=7, guidance_scale=3.5)
    record = json.loads((builtin / "weights.json").read_text())
    assert model.weights_sha256() == {k: v for k, v in record.items() if k.endswith(".safetensors")}


def test_damaged_and_missing_files(builtin):
    path = builtin / "unet" / "diffusion_pytorch_model.safetensors"
    good = path.read_bytes()
    bad = bytearray(good)
    bad[-1] ^= 1
    path.write_bytes(bytes(bad))
    with pytest.raises(
        UserError, match=r"unet/diffusion_pytorch_model.safetensors is damaged.*make models"
    ) as error:
        load_model("tiny-sd")
    assert "\n" not in str(error.value) and error.value.exit_code == 2
    path.unlink()
    with pytest.raises(UserError, match=r"unet/diffusion_pytorch_model.safetensors is missing.*make models"):
        check_model("tiny-sd")
    path.write_bytes(good)
    check_model("tiny-sd")
    (builtin / "lethe.json").write_text('{"steps": 3}')
    with pytest.raises(UserError, match=r"lethe.json: steps"):
        load_model("tiny-sd")
    (builtin / "weights.json").write_text("{")
    with pytest.raises(UserError, match=r"weights.json can't be read"):
        check_model("tiny-sd")
    (builtin / "weights.json").unlink()
    with pytest.raises(UserError, match=r"weights.json is missing"):
        check_model("tiny-sd")
    (builtin / "model_index.json").unlink()
    with pytest.raises(UserError, match=r"has no weights in .*make models"):
        check_model("tiny-sd")


def test_a_local_folder_with_a_record_is_verified(folders, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(folders / "sd", folder)
    (folder / "weights.json").write_text(json.dumps({"vae/diffusion_pytorch_model.safetensors": "0" * 64}))
    with pytest.raises(UserError, match=r"vae/.* is damaged .*save the model again"):
        load_model(str(folder))


def test_a_truncated_file_without_a_record(folders, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(folders / "sd", folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="can't be loaded") as error:
        load_model(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mini-ds", "did you mean mini-sd"),
        ("./nowhere", "model folder not found"),
        ("nobody/nothing-at-all", "lethe fetch nobody/nothing-at-all"),
    ],
)
def test_names_that_lead_nowhere(name, message, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=message) as error:
        load_model(name)
    assert "\n" not in str(error.value)


def test_folders_that_are_no_model(tmp_path):
    with pytest.raises(UserError, match=r"no model_index.json"):
        family_of(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    with pytest.raises(UserError, match="is a DDPMPipeline"):
        family_of(str(tmp_path))


def test_bad_device_and_type(folders):
    path = str(folders / "sd")
    for arguments, message in (
        ({"dtype": "float8"}, "unknown dtype"),
        ({"dtype": "float16"}, "on a CPU"),
        ({"device": "tpu9"}, "unknown device"),
        ({"device": f"cuda:{torch.cuda.device_count() + 1}"}, "is not there"),
    ):
        with pytest.raises(UserError, match=message):
            load_model(path, **arguments)


def test_a_hub_id_loads_from_the_cache_alone(folders, tmp_path, monkeypatch):
    """The layout that huggingface_hub's downloads leave behind."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--Tiny"
    commit = "a" * 40
    shutil.copytree(folders / "sd", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    model = load_model("someone/Tiny")
    assert (model.name, model.entry.source, model.family) == ("someone-tiny", "someone/Tiny", "sd")
    assert load_model("someone/Tiny", revision=commit).entry.revision == commit
    with pytest.raises(UserError, match=rf"--revision {'b' * 40}"):
        load_model("someone/Tiny", revision="b" * 40)


def test_a_pruned_folder_is_loaded_by_pruning(folders, tmp_path, monkeypatch):
    folder = tmp_path / "pruned"
    shutil.copytree(folders / "sd", folder)
    (folder / "pruning.json").write_text("{}")
    seen = []

    def load_pruned(path, **arguments):
        seen.append((path, sorted(arguments)))
        return tiny_sd()

    monkeypatch.setitem(sys.modules, "lethebench.pruning", types.SimpleNamespace(load_pruned=load_pruned))
    assert load_model(str(folder)).folder == folder.resolve()
    assert seen[0][0] == folder.resolve() and "dtype" in seen[0][1]


def test_a_pipeline_in_memory():
    model = wrap(tiny_sd())
    before = model.weights_sha256()
    assert set(before) == {"text_encoder", "unet", "vae"}
    with torch.no_grad():
        model.denoiser.conv_in.bias.add_(1)
    after = model.weights_sha256()
    assert [k for k in before if before[k] != after[k]] == ["unet"]
    with pytest.raises(UserError, match="can't be used"):
        wrap(object())


def test_listing_models_imports_nothing_heavy():
    code = (
        "import sys; from lethebench.registry import MODELS; names = list(MODELS); "
        "heavy = [m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules]; "
        "print(names, heavy, MODELS.errors)"
    )
    began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began
    assert "'mini-sd'" in found.stdout and "] [] {}" in found.stdout
    assert seconds < 1.0  # processor time, so that a busy machine doesn't matter; 0.2 s measured


@pytest.mark.skipif(
    not (WEIGHTS / "mini-sd" / "model_index.json").is_file(), reason="mini-sd is not trained yet"
)
def test_mini_sd_loads_from_the_package():
    model = load_model("mini-sd")
    assert model.folder == WEIGHTS / "mini-sd" and model.family == "sd"
    assert (
        json.loads((WEIGHTS / "mini-sd" / "weights.json").read_text()).items()
        >= model.weights_sha256().items()
    )
