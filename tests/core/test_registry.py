from __future__ import annotations

from pathlib import Path

import pytest

from lethebench.composition import recipes
from lethebench.errors import UserError
from lethebench.method import Family, Method, configure
from lethebench.registry import METHODS, Registry, source_sha256

PLUGIN = """
from dataclasses import dataclass
from lethebench.method import Family, Method, setting

@dataclass(frozen=True)
class Mine(Method):
    name = "mine"
    summary = "does nothing"
    family = Family.SAMPLING
    citation = "none"
    strengths = {"a": {"x": 1}, "b": {"x": 2}, "c": {"x": 3}}
    x: int = setting(1, "a number")

class NotAMethod:
    name = "no"
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "my_method.py"
    path.write_text(PLUGIN)
    return path


def test_a_method_is_found_by_its_path(plugin: Path) -> None:
    cls = METHODS.get(f"{plugin}:Mine")
    assert cls.name == "mine"
    assert [r.setting for r in recipes(f"{plugin}:Mine")] == ["a", "b", "c"]


def test_the_source_hash_changes_with_the_file(plugin: Path) -> None:
    cls = METHODS.get(f"{plugin}:Mine")
    before = source_sha256(cls)
    plugin.write_text(PLUGIN + "\n# changed\n")
    assert source_sha256(cls) != before


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("unifroget", "did you mean uniforget"),
        ("./no/such.py:X", "not found"),
        ("{plugin}:Nothing", "has no 'Nothing'"),
        ("{plugin}:NotAMethod", "must derive from"),
        ("{plugin}", "say which class"),
    ],
)
def test_a_miss_is_one_clear_line(plugin: Path, spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        METHODS.get(spec.format(plugin=plugin))


def test_a_file_that_fails_to_import_says_why(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("import no_such_module_at_all")
    with pytest.raises(UserError, match=r"failed to import: ModuleNotFoundError: .*no_such_module_at_all"):
        METHODS.get(f"{path}:X")


def _registry() -> Registry[type[Method]]:
    return Registry("method", "lethebench.method:Method", "lethebench.methods", "lethebench.none")


def test_bad_and_taken_names_are_refused() -> None:
    registry = _registry()

    class One(Method):
        name = "one"

    class Other(Method):
        name = "one"

    class Bad(Method):
        name = "Not A Name"

    registry.register(One)
    registry.register(One)
    with pytest.raises(UserError, match="registered already"):
        registry.register(Other)
    with pytest.raises(UserError, match="no valid name"):
        registry.register(Bad)


def test_unknown_strengths_and_settings_are_refused(plugin: Path) -> None:
    cls = METHODS.get(f"{plugin}:Mine")
    with pytest.raises(UserError, match="no strength 'd': known a, b, c"):
        configure(cls, "d")
    with pytest.raises(UserError, match="no setting 'y'"):
        configure(cls, "a", {"y": 1})
    with pytest.raises(UserError, match="setting 'y' is not a setting"):
        recipes(f"{plugin}:Mine", "a", {"y": 1})


def test_a_composition_keeps_order_and_pairs_strengths(plugin: Path) -> None:
    found = recipes(f"{plugin}:Mine+base")
    assert [r.name for r in found] == ["mine+base"] * 3
    assert [r.strengths for r in found] == [("a", "default"), ("b", "default"), ("c", "default")]
    one = recipes(f"{plugin}:Mine+random-tokens", "b+strong", {"mine.x": 9})[0]
    assert one.parts[0].x == 9  # type: ignore[attr-defined]
    assert one.setting == "b+strong,mine.x=9"


def test_every_registered_method_declares_a_family() -> None:
    for name, cls in METHODS.items():
        assert isinstance(cls.family, Family), name
    assert METHODS.errors == {}


def test_two_objects_of_one_name_are_refused() -> None:
    from lethebench.zoo import ModelEntry

    registry: Registry[ModelEntry] = Registry(
        "model", "lethebench.zoo:ModelEntry", "lethebench.zoo", "lethebench.none"
    )
    registry.register(ModelEntry("twice", "sd", "one"))
    with pytest.raises(UserError, match="registered already"):
        registry.register(ModelEntry("twice", "sd", "other"))


def test_source_covers_the_plugins_that_it_imports():
    """EAP is built on ESD's files, NeMo-C on NeMo's: a change to these must not find the old results."""
    from lethebench import methods
    from lethebench.registry import _with_imported

    room = Path(methods.__path__[0])

    def covered(name):
        files = _with_imported(tuple(sorted((room / name).glob("*.py"))))
        return {f.parent.name for f in files}

    assert {"eap", "esd"} <= covered("eap") and "eap" not in covered("esd")
    assert {"nemo_c", "nemo"} <= covered("nemo_c")
    assert covered("uce") == {"uce"}
