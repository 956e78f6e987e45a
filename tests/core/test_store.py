from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from lethebench.errors import UserError
from lethebench.store import Store, digest, write_atomic


def _write(text: str):
    return lambda folder: (folder / "a.txt").write_text(text)


def test_an_entry_is_found_under_its_key_only(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.find("shard", {"x": 1}) is None
    folder = store.put("shard", {"x": 1}, _write("one"))
    assert store.find("shard", {"x": 1}) == folder
    assert (folder / "a.txt").read_text() == "one"
    assert store.find("shard", {"x": 2}) is None
    assert store.find("fit", {"x": 1}) is None


def test_the_key_does_not_depend_on_the_order_of_its_parts() -> None:
    assert digest({"a": 1, "b": [2, 3]}) == digest({"b": [2, 3], "a": 1})
    assert digest({"a": 1}) != digest({"a": 1.5})


def test_a_failing_writer_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        store.put("fit", {"x": 1}, fail)
    assert store.find("fit", {"x": 1}) is None
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize("damage", ["truncate", "missing", "record"])
def test_a_damaged_entry_is_reported_and_made_again(tmp_path: Path, capsys, damage: str) -> None:
    store = Store(tmp_path)
    folder = store.put("shard", {"x": 1}, _write("one"))
    if damage == "truncate":
        (folder / "a.txt").write_text("on")
    elif damage == "missing":
        (folder / "a.txt").unlink()
    else:
        (folder / "entry.json").write_text("{")
    assert store.find("shard", {"x": 1}) is None
    assert "damaged shard entry" in capsys.readouterr().err
    store.put("shard", {"x": 1}, _write("one"))
    assert store.find("shard", {"x": 1}) is not None


def test_the_first_of_two_writers_wins_and_both_see_a_whole_entry(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = store.put("shard", {"x": 1}, _write("one"))
    second = store.put("shard", {"x": 1}, _write("two"))
    assert first == second
    assert (first / "a.txt").read_text() == "one"


def _hammer(root: str, worker: int) -> None:
    store = Store(Path(root))
    for number in range(20):
        if store.find("shard", {"n": number}) is None:
            store.put("shard", {"n": number}, _write(str(number)))


def test_many_processes_share_a_store(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_hammer, args=(str(tmp_path), i)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    store = Store(tmp_path)
    for number in range(20):
        folder = store.find("shard", {"n": number})
        assert folder is not None
        assert (folder / "a.txt").read_text() == str(number)


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="can't write"):
        Store(tmp_path / "file" / "store").prepare()


def test_write_atomic_replaces_and_leaves_no_temporary(tmp_path: Path) -> None:
    write_atomic(tmp_path / "x", b"1")
    write_atomic(tmp_path / "x", b"2")
    assert (tmp_path / "x").read_bytes() == b"2"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
