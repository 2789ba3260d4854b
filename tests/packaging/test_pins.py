"""constraints.txt pins every dependency that setup.py names, inside the range that setup.py gives."""

import ast
import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


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


def test_every_dependency_is_pinned_inside_its_range():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line) for line in lines)
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    for requirement in required():
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
