"""Entry points of other distributions: when they are imported, and what is said when that fails. No such distribution is installed here."""

import importlib
import json
import os
import subprocess
import sys

import pytest

from pikv_ds.errors import ConfigError
from pikv_ds.registry import GROUP, Outside, Registry

HOLDER = "from pikv_ds.registry import Outside, Registry\nM = Registry('codec', Outside('some.group'))\n"


def distribution(folder, name: str, text: str, *, group: str = "some.group") -> None:
    """A module of one file, and the metadata that pip would have written."""
    (folder / f"{name}.py").write_text(text)
    info = folder / f"{name}-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\nmethods = {name}\n")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder on sys.path, forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        if (tmp_path / f"{name}.py").exists():
            del sys.modules[name]


def registry(folder) -> Registry:
    (folder / "some_holder.py").write_text(HOLDER)
    return importlib.import_module("some_holder").M


def method(cls: str, name: str, more: str = "") -> str:
    return f"from some_holder import M\n{more}\n@M.register({name!r})\nclass {cls}: pass\n"


def test_they_are_imported_when_the_registry_is_first_read(folder):
    distribution(folder, "some_b", method("B", "b", "seen = M.names()"))
    for letter in "ca":
        distribution(folder, f"some_{letter}", method(letter.upper(), letter))
    found = registry(folder)
    found.register("own")(type("Own", (), {}))
    assert "some_a" not in sys.modules
    assert found.names() == ["a", "b", "c", "own"]
    assert sys.modules["some_b"].seen == ["a", "own"], "in the order of their names; a module may read the registry"
    assert [found.origin(name) for name in found.names()] == ["some_a 2.0", "some_b 2.0", "some_c 2.0", None]


def test_two_distributions_with_the_same_name_are_refused_by_both_names(folder):
    distribution(folder, "some_a", method("A", "x"))
    distribution(folder, "some_b", method("B", "x"))
    found = registry(folder)
    said = (
        "methods of some_b 2.0 cannot be loaded.*'x' is already registered by some_a.A of some_a 2.0; give some_b.B of some_b 2.0 another"
    )
    for _ in range(2):  # and again: half of the methods are not all of them
        with pytest.raises(ConfigError, match=said):
            found.names()


def test_a_name_of_this_package_is_not_given_away(folder):
    distribution(folder, "some_a", method("A", "own"))
    found = registry(folder)
    found.register("own")(type("Own", (), {}))
    with pytest.raises(
        ConfigError, match=r"some_a 2.0 cannot be loaded.*'own' is already registered by .*\.Own; give some_a.A of some_a 2.0"
    ):
        found.get("own")


def test_where_a_method_comes_from_is_known_whoever_imported_it(folder):
    """A script may import it first, and a class may lie beside the module that the entry point names."""
    distribution(folder, "some_a", method("A", "a"))
    found = registry(folder)
    importlib.import_module("some_a")
    assert found.origin("a") == "some_a 2.0"
    outside = Outside("some.group")
    assert outside.origin(type("X", (), {"__module__": "some_a.other"})) == "some_a 2.0"
    assert outside.origin(type("X", (), {"__module__": "some_abc"})) is None


def test_a_registry_of_ones_own_has_nothing_from_outside(folder):
    distribution(folder, "some_a", method("A", "a"), group=GROUP)
    assert Registry("codec").names() == [] and "some_a" not in sys.modules


@pytest.mark.parametrize("text, said", [("import no_such_library", "ModuleNotFoundError"), ("def x(:", "SyntaxError")])
def test_a_configuration_names_the_distribution_that_cannot_be_loaded(tmp_path, text, said):
    distribution(tmp_path, "some_broken", text, group=GROUP)
    (tmp_path / "block.json").write_text(json.dumps({"pikv": {}}))
    command = [sys.executable, "-m", "pikv_ds.launch.cli", "config", "--check", tmp_path / "block.json"]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", os.getcwd())])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "pikv config: the methods of some_broken 2.0 cannot be loaded: its entry point methods = some_broken" in done.stderr
    assert f"raises {said}" in done.stderr
