"""The constraints files pin every dependency that setup.py names, inside the range that setup.py gives for their Python."""

import ast
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
FILES = {"3.11": "constraints.txt", "3.12": "constraints-3.12.txt"}


def required() -> list[Requirement]:
    call = next(node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if ast.unparse(node).startswith("setup("))
    given = {
        keyword.arg: ast.literal_eval(keyword.value)
        for keyword in call.value.keywords
        if keyword.arg in ("install_requires", "extras_require")
    }
    extras = given["extras_require"]
    texts = [text for extra in ("test", "eval", "serve", "weights") for text in extras[extra] if not text.startswith("pikv-ds[")]
    return [Requirement(text) for text in given["install_requires"] + texts]


def pins(file: str) -> dict[str, str]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line) for line in lines)
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


@pytest.mark.parametrize("python", FILES)
def test_every_dependency_is_pinned_inside_its_range(python):
    found, here = pins(FILES[python]), {"python_version": python, "sys_platform": "linux"}
    for requirement in required():
        if requirement.marker is None or requirement.marker.evaluate(here):
            assert requirement.specifier.contains(found[canonicalize_name(requirement.name)]), requirement


def test_the_files_differ_in_megatron_core_alone():
    ours, theirs = pins(FILES["3.11"]), pins(FILES["3.12"])
    differing = {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}
    assert differing == {"megatron-core", "triton"}, "a version was changed in one file and not in the other"
    assert "triton" not in ours
