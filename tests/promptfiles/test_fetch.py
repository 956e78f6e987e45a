"""`lethe fetch` against real servers on this machine: whole, cut, refused, wrong, hanging; and a small hub."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest

from lethebench import fetching
from lethebench.cli import main
from lethebench.errors import RunError, UserError
from lethebench.fetching import _fetch, download
from lethebench.promptfiles.consent import OptIn
from lethebench.promptfiles.sources import SourceFile
from lethebench.zoo._files import find_model

BODY = bytes(range(256)) * 1200
SUM = hashlib.sha256(BODY).hexdigest()
QUICK: dict[str, Any] = {"wait": 0.01, "timeout": (2.0, 0.3)}


class Site:
    """Files over HTTP. ``plan`` holds what the next answers do: cut:N, hang, full (ranges ignored), a status,
    or to:URL; when it is used up, answers are as they should be."""

    def __init__(self) -> None:
        self.files = {"/data.csv": BODY}
        self.plan: list[str] = []
        self.ranges: list[str | None] = []
        self.paths: list[str] = []
        self.release = threading.Event()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                site.answer(self, send=False)

            def do_GET(self) -> None:
                site.answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    def close(self) -> None:
        self.release.set()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, *, send: bool = True) -> None:
        todo = self.plan.pop(0) if self.plan else ""
        asked = request.headers.get("Range")
        path = request.path.partition("?")[0]
        self.ranges.append(asked)
        self.paths.append(path)
        if todo.isdecimal() or path not in self.files:
            request.send_error(int(todo or 404))
            return
        if todo.startswith("to:"):
            request.send_response(302)
            request.send_header("Location", todo.removeprefix("to:"))
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        body = self.files[path]
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and todo != "full" else 0
        if start >= len(body) and start:
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(body)}")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(body) - start))
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        request.send_header("ETag", hashlib.sha256(body).hexdigest())
        request.send_header("X-Repo-Commit", COMMIT)
        request.end_headers()
        if todo == "hang":
            request.wfile.flush()
            self.release.wait(10)
        elif send:
            end = start + int(todo.removeprefix("cut:")) if todo.startswith("cut:") else len(body)
            request.wfile.write(body[start:end])


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.close()


def part_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


# --- one file -------------------------------------------------------------------------------------


def test_a_file_arrives_whole_in_one_request(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "new" / "data.csv"
    assert download(f"{site.url}/data.csv", path, sha256=SUM, size=len(BODY), **QUICK) == SUM
    assert path.read_bytes() == BODY and list(path.parent.iterdir()) == [path]
    assert site.ranges == [None]


def test_a_cut_connection_goes_on_where_it_stopped(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    site.plan = ["cut:131072", "cut:65536"]
    download(f"{site.url}/data.csv", path, sha256=SUM, size=len(BODY), **QUICK)
    assert path.read_bytes() == BODY and not part_of(path).exists()
    assert site.ranges == [None, "bytes=131072-", "bytes=196608-"]


def test_what_came_is_kept_for_the_next_command(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    site.plan = ["cut:131072", "503"]
    with pytest.raises(RunError, match=r"503.*2 tries.*131072 bytes are kept"):
        download(f"{site.url}/data.csv", path, sha256=SUM, tries=2, **QUICK)
    assert not path.exists() and part_of(path).read_bytes() == BODY[:131072]
    download(f"{site.url}/data.csv", path, sha256=SUM, **QUICK)
    assert path.read_bytes() == BODY and site.ranges[-1] == "bytes=131072-"


def test_a_server_without_ranges_sends_all_again(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    site.plan = ["cut:131072", "full"]
    download(f"{site.url}/data.csv", path, sha256=SUM, **QUICK)
    assert path.read_bytes() == BODY


def test_a_part_that_is_whole_already_only_needs_its_name(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    part_of(path).write_bytes(BODY)
    download(f"{site.url}/data.csv", path, sha256=SUM, **QUICK)
    assert path.read_bytes() == BODY and len(site.ranges) == 1


@pytest.mark.parametrize("old", [b"x" * 5000, b"x" * (len(BODY) + 7)])
def test_a_part_of_another_version_is_begun_anew(site: Site, tmp_path: Path, old: bytes) -> None:
    path = tmp_path / "data.csv"
    part_of(path).write_bytes(old)
    download(f"{site.url}/data.csv", path, sha256=SUM, size=len(BODY), **QUICK)
    assert path.read_bytes() == BODY and site.ranges == [f"bytes={len(old)}-", None]


def test_a_wrong_file_leaves_nothing(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    site.files["/data.csv"] = BODY[:-1] + b"!"
    with pytest.raises(RunError, match="not the published file") as error:
        download(f"{site.url}/data.csv", path, sha256=SUM, **QUICK)
    assert SUM in str(error.value) and not list(tmp_path.iterdir())


def test_a_file_that_is_too_large_is_stopped(site: Site, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="more than the 1000 bytes"):
        download(f"{site.url}/data.csv", tmp_path / "data.csv", sha256=SUM, size=1000, **QUICK)
    assert not (tmp_path / "data.csv").exists() and not part_of(tmp_path / "data.csv").read_bytes()


def test_an_answer_that_no_try_would_change_is_asked_once(site: Site, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="answers 404"):
        download(f"{site.url}/gone.csv", tmp_path / "gone.csv", **QUICK)
    assert len(site.ranges) == 1 and not list(tmp_path.iterdir())


def test_a_busy_server_is_asked_again_a_bounded_number_of_times(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    site.plan = ["503", "429"]
    download(f"{site.url}/data.csv", path, sha256=SUM, **QUICK)
    assert len(site.ranges) == 3
    site.plan = ["503"] * 9
    with pytest.raises(RunError, match=r"503.*4 tries"):
        download(f"{site.url}/data.csv", tmp_path / "again.csv", tries=4, **QUICK)
    assert len(site.ranges) == 7


def test_a_server_that_falls_silent_is_left(site: Site, tmp_path: Path) -> None:
    site.plan = ["hang"] * 2
    with pytest.raises(RunError, match="no answer in time"):
        download(f"{site.url}/data.csv", tmp_path / "data.csv", tries=2, **QUICK)
    assert not (tmp_path / "data.csv").exists()


def test_offline_is_one_line(tmp_path: Path) -> None:
    closed = Site()
    closed.close()
    with pytest.raises(RunError, match="online") as error:
        download(f"{closed.url}/data.csv", tmp_path / "data.csv", tries=2, **QUICK)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "url", ["http://example.invalid/data.csv", "http://127.0.0.1.example.invalid/data.csv"]
)
def test_only_encrypted_connections_leave_this_machine(site: Site, tmp_path: Path, url: str) -> None:
    with pytest.raises(RunError, match="is not https"):
        download(url, tmp_path / "data.csv", **QUICK)
    site.plan = [f"to:{url}"]
    with pytest.raises(RunError, match="is not https"):
        download(f"{site.url}/data.csv", tmp_path / "data.csv", **QUICK)
    assert len(site.ranges) == 1


# --- by name --------------------------------------------------------------------------------------


@pytest.fixture
def sources(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, SourceFile]:
    """Upstream files on the site, and a prompt set of two of them."""

    def source(name: str, body: bytes, **more: Any) -> SourceFile:
        site.files[f"/{name}"] = body
        pinned = {"sha256": hashlib.sha256(body).hexdigest(), "bytes": len(body), "url": f"{site.url}/{name}"}
        return SourceFile(name, "owner/repository", name, "MIT", **{**pinned, **more})

    made = [
        source("set/one.csv", b"one"),
        source("set/two.csv", b"two"),
        source("set/unsafe.csv", b"unsafe", opt_in=OptIn.UNSAFE),
        source("set/by-hand.csv", b"", url=None, sha256=None, bytes=None, note="log in and put it there"),
        source("set/unpinned.csv", b"any", sha256=None, bytes=None),
    ]
    known = {one.name: one for one in made}
    sets = {"pair": SimpleNamespace(files=("set/one.csv", "set/two.csv")), "planted": SimpleNamespace()}
    monkeypatch.setattr(_fetch, "SOURCES", known)
    monkeypatch.setattr(_fetch, "PROMPT_SETS", sets)
    monkeypatch.setenv("LETHE_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("LETHE_ALLOW", raising=False)
    return known


def test_a_prompt_sets_files_are_fetched_once(
    site: Site, sources: dict[str, SourceFile], tmp_path: Path
) -> None:
    done = fetching.fetch(["pair", "set/one.csv"], **QUICK)
    assert done == [(name, tmp_path / "data" / name) for name in ("set/one.csv", "set/two.csv")]
    assert [path.read_bytes() for _, path in done] == [b"one", b"two"]
    assert fetching.fetch(["pair"], **QUICK) == done and len(site.paths) == 2
    states = {item.name: (item.kind, item.state, item.bytes) for item in fetching.known_items()}
    assert states["pair"] == ("prompt set", "there", 6)
    assert states["set/unpinned.csv"] == ("file", "missing", None)
    assert "planted" not in states and "mini-sd" not in states


def test_a_changed_file_is_replaced_and_said(
    sources: dict[str, SourceFile], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data" / "set" / "one.csv"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"something else")
    assert {i.name: i.state for i in fetching.known_items()}["set/one.csv"] == "changed"
    fetching.fetch(["set/one.csv"], **QUICK)
    assert path.read_bytes() == b"one" and "not the published file" in capsys.readouterr().err


def test_one_that_fails_stops_no_other(
    site: Site, sources: dict[str, SourceFile], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del site.files["/set/one.csv"]
    names = ["pair", "set/unsafe.csv", "set/by-hand.csv", "set/unpinned.csv", "mini-sd"]
    with pytest.raises(RunError, match="4 of 6"):
        fetching.fetch(names, **QUICK)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lethe: ")]
    assert len(lines) == 5
    for line, words in zip(
        lines,
        ("set/one.csv: can't fetch", "--allow unsafe", "log in and put it there", "no published", "built in"),
        strict=True,
    ):
        assert words in line
    there = sorted(p.name for p in (tmp_path / "data" / "set").iterdir())
    assert there == ["two.csv", "unpinned.csv"]


def test_what_must_be_allowed_is_fetched_when_it_is(
    sources: dict[str, SourceFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LETHE_ALLOW", "unsafe")
    assert fetching.fetch(["set/unsafe.csv"], **QUICK)[0][1].read_bytes() == b"unsafe"


@pytest.mark.parametrize(
    ("name", "words"),
    [("pear", "did you mean pair"), ("set/ones.csv", "did you mean set/one.csv"), ("qqqq", "--list")],
)
def test_an_unknown_name_is_a_wrong_request(
    site: Site, sources: dict[str, SourceFile], name: str, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        fetching.fetch(["pair", name], **QUICK)
    assert not site.paths


def test_a_full_disk_is_told_before_anything_is_asked(
    site: Site, sources: dict[str, SourceFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5))
    with pytest.raises(UserError, match="5 B free, and 6 B are to be fetched"):
        fetching.fetch(["pair"], **QUICK)
    assert not site.paths


# --- the command, and models ----------------------------------------------------------------------


def lethe(*arguments: str) -> int:
    """The command's exit code, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lethe", *arguments])
        for name in ("LETHE_DATA", "LETHE_ALLOW"):  # what the options set is gone again afterwards
            patch.setenv(name, "")
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def test_the_command_lists_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lethe("fetch", "--list", "--json", "--to", str(tmp_path)) == 0
    items = {item["name"]: item for item in json.loads(capsys.readouterr().out)}
    assert items["comic"]["kind"] == "prompt set" and items["comic"]["state"] == "missing"
    assert "needs --allow unsafe" in items["i2p"]["note"]
    assert lethe("fetch", "i2p", "--to", str(tmp_path)) == 1
    assert "--allow unsafe" in capsys.readouterr().err.splitlines()[0]
    for wrong in (["fetch"], ["fetch", "comic", "--list"], ["fetch", "comix", "--to", str(tmp_path)]):
        assert lethe(*wrong) == 2 and len(capsys.readouterr().err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_command_fetches(
    site: Site, sources: dict[str, SourceFile], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lethe("fetch", "pair", "set/unsafe.csv", "--allow", "unsafe", "--to", str(tmp_path / "to")) == 0
    there = sorted(p.name for p in (tmp_path / "to" / "set").iterdir())
    assert there == ["one.csv", "two.csv", "unsafe.csv"]
    assert capsys.readouterr().out.splitlines()[0] == f"set/one.csv  {tmp_path / 'to' / 'set' / 'one.csv'}"


@pytest.fixture
def hub(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """huggingface_hub with the site as its hub and a cache of its own."""
    for name, value in {
        "ENDPOINT": site.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": site.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    return f"/lab/model/resolve/{COMMIT}/"


INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
}
NEEDED = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder_3/model-00001-of-00002.safetensors",
    "text_encoder_3/model.safetensors.index.json",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "tokenizer_2/spiece.model",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
]
NOT_NEEDED = [
    "README.md",
    "sd-v1-4.ckpt",
    "v1-5-pruned.safetensors",
    "flux1-dev.safetensors",
    "vae_1_0/config.json",
    "safety_checker/model.safetensors",
    "safety_checker/config.json",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "text_encoder_3/model.fp16-00001-of-00002.safetensors",
    "text_encoder_3/model.safetensors.index.fp16.json",
    "text_encoders/t5xxl_fp16.safetensors",
    "unet/model.onnx",
    "vae/flax_model.msgpack",
    "image_encoder/model.safetensors",
    "feature_extractor/preprocessor_config.json",
]


def test_a_model_comes_without_what_is_not_needed(
    site: Site, hub: str, capsys: pytest.CaptureFixture[str]
) -> None:
    site.files = {hub + name: f"of {name}".encode() for name in (*NEEDED, *NOT_NEEDED)}
    site.files[f"{hub}model_index.json"] = json.dumps(INDEX).encode()
    tree = [
        {
            "type": "file",
            "path": path.removeprefix(hub),
            "size": len(body),
            "oid": hashlib.sha1(body).hexdigest(),
        }
        for path, body in site.files.items()
    ]
    site.files[f"/api/models/lab/model/tree/{COMMIT}"] = json.dumps(tree).encode()
    assert lethe("fetch", "lab/model", "--revision", COMMIT, "--json") == 0
    folder = Path(json.loads(capsys.readouterr().out)["lab/model"])
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == sorted(NEEDED)
    assert {path.removeprefix(hub) for path in site.paths if path.startswith(hub)} == set(NEEDED)
    asked = len(site.paths)
    assert find_model("lab/model", revision=COMMIT).family == "sd"  # from the cache, which lacks the rest
    assert len(site.paths) == asked


def test_a_model_that_cannot_be_fetched_is_one_line(
    site: Site, hub: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(words: str) -> None:
        assert lethe("fetch", "lab/model", "--revision", COMMIT) == 1
        lines = capsys.readouterr().err.splitlines()
        first, last = (line for line in lines if line.startswith("lethe: "))
        assert words in first and "1 of 1" in last

    refused("lab/model: can't fetch")  # the hub answers 404
    site.files[f"/api/models/lab/model/tree/{COMMIT}"] = json.dumps([]).encode()
    refused("no diffusers pipeline")
    site.close()
    monkeypatch.setattr("time.sleep", lambda _: None)  # the hub's client waits between its tries
    refused("online")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused("HF_HUB_OFFLINE is set")
