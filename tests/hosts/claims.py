"""What setup.py and the constraints say of the hosts, and what of it docs/results/hosts.json does not bear out."""

import ast
import json
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from .matrix import HOSTS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "hosts.json"
PASSED = "passed"


def found() -> dict:
    """{"hosts": {host: {"releases": {python: [version]}, "rows": [{version, python, torch, result, cause, smoke}]}}, ...}"""
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def requirements() -> list[Requirement]:
    """Those of setup.py that name a host; one may have several, with markers."""
    call = next(node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if ast.unparse(node).startswith("setup("))
    given = next(ast.literal_eval(keyword.value) for keyword in call.value.keywords if keyword.arg == "install_requires")
    return [one for one in map(Requirement, given) if one.name in HOSTS]


def claimed(host: str, python: str, given: list[Requirement]) -> SpecifierSet | None:
    """The range of a host on one Python; None: setup.py does not ask for it there."""
    marked = {"python_version": python, "python_full_version": f"{python}.0"}
    mine = [one for one in given if one.name == host and (one.marker is None or one.marker.evaluate(marked))]
    assert len(mine) <= 1, f"setup.py has {len(mine)} ranges of {host} for Python {python}: {', '.join(map(str, mine))}"
    return mine[0].specifier if mine else None


def pins(python: str) -> dict[str, str]:
    """Of the constraints of a Python: constraints-X.Y.txt where there is one."""
    own = ROOT / f"constraints-{python}.txt"
    lines = (own if own.is_file() else ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def untrue(given: list[Requirement], results: dict) -> list[str]:
    """Where ranges and rows differ, in words; nothing: they are equal."""
    wrong = []
    for host in HOSTS:
        if host not in results["hosts"]:
            wrong.append(f"{host} has no row at all")
            continue
        releases, rows = results["hosts"][host]["releases"], results["hosts"][host]["rows"]
        passed = {(row["version"], row["python"]) for row in rows if row["result"] == PASSED}
        inside = set()
        for python, there in releases.items():
            claim = claimed(host, python, given)
            if claim is None:
                continue
            if not any(one.operator == "<" for one in claim):
                wrong.append(f"{host}{claim} has no upper bound: what comes next has not been run")
            inside |= {(release, python) for release in there if release in claim}
        on = "{} {} on Python {}".format
        wrong += [f"setup.py claims {on(host, *one)}, which has no row that passed" for one in sorted(inside - passed)]
        wrong += [f"{on(host, *one)} passed, and setup.py does not claim it" for one in sorted(passed - inside)]
    return wrong
