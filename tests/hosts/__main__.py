"""python -m tests.hosts [HOST ...]: run versions of the hosts in environments of their own and write docs/results/hosts.json.

Lowest, pinned and newest of every range in setup.py, and the release below it; --every: all releases in the range. A leg that has a row of
the same sources is not run again, so the command can be stopped and started. Needs the package index; one leg takes one to ten minutes.
"""

import argparse
import hashlib
import json
import platform
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from packaging.version import Version

from pikv_ds.launch.ranks import end_group

from . import environments
from .claims import PASSED, RESULTS, ROOT, claimed, found, pins, requirements, untrue
from .matrix import BETWEEN, HOSTS, OF_HOST, SMOKE, Leg, legs

PYTHONS = ("3.11", "3.12")
SMOKE_LIMIT_S = 1200
REFUSAL = "is older than what PiKV was tested with"
SOURCES = ("pikv_ds", "ops", "megatron_patch", "tests/hosts/attach.py", "tests/adapters", "tests/megatron", "tests/dist")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.hosts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("hosts", nargs="*", metavar="HOST", help=f"which (default: all): {', '.join(HOSTS)}")
    parser.add_argument("--every", action="store_true", help="also the releases between lowest and newest")
    parser.add_argument("--versions", default="", help="only these releases, with commas, also outside of the range")
    parser.add_argument("--smoke", action="append", choices=SMOKE, help="only this of the smoke set, beside what a row has that passed")
    parser.add_argument("--python", action="append", choices=PYTHONS, help="only this one; default: all that are on the machine")
    parser.add_argument("--base", action="append", default=[], metavar="X.Y=FOLDER", help="an environment that has the pins of a Python")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "hosts", help="of environments and logs (default: build/hosts)")
    parser.add_argument("--again", action="store_true", help="run legs that have a row of these sources as well")
    args = parser.parse_args()
    if unknown := set(args.hosts) - set(HOSTS):
        parser.error(f"no host {', '.join(sorted(unknown))}; legal are {', '.join(HOSTS)}")
    given = {python: Path(path) for python, _, path in (one.partition("=") for one in args.base)}
    folder, only = args.folder.absolute(), [one for one in args.versions.split(",") if one]
    sources, todo = stamp(), []
    for python in args.python or PYTHONS:
        if environments.interpreter(python) is None and python not in given:
            print(f"hosts: no Python {python} on this machine: its legs are left out")
            continue
        below = environments.base(python, folder, given)
        for host in args.hosts or HOSTS:
            claim = claimed(host, python, requirements())
            if claim is None:
                continue
            releases = environments.releases(host, environments.python_of(below))
            keep(host, python, releases)
            made = legs(host, python, releases, claim, pins(python).get(host), every=args.every or bool(only))
            outside = [one for one in only if one in releases and one not in {leg.version for leg in made}]
            made += [Leg(host, one, python, BETWEEN.get(host, OF_HOST[host])) for one in outside]
            wanted = [replace(leg, smoke=tuple(args.smoke or leg.smoke)) for leg in made if not only or leg.version in only]
            todo += [(leg, below) for leg in wanted]
    for number, (leg, below) in enumerate(todo, 1):
        done = None if args.again else row_of(leg, sources)
        print(f"hosts: {number}/{len(todo)} {leg.name}: {'has a row' if done else ', '.join(leg.smoke)}", flush=True)
        if done is None:
            row = run(leg, below, folder) | {"sources": sources}
            row = beside(row, row_of(leg)) if args.smoke else row
            write(leg, row)
            print(f"hosts: {leg.name}: {row['result']} {row['cause']}".rstrip(), flush=True)
    wrong = untrue(requirements(), found())
    print("\n".join(f"hosts: {one}" for one in wrong) or "hosts: setup.py claims what has passed, and nothing else")
    return 1 if wrong else 0


def run(leg: Leg, below: Path, folder: Path) -> dict:
    """A row: the leg's environment made, its smoke set run until something fails."""
    row = {"version": leg.version, "python": leg.python, "torch": environments.version_in(below, "torch"), "result": PASSED, "cause": ""}
    seconds: dict[str, float] = {}
    try:
        environment = environments.overlay(leg, below, folder)
    except RuntimeError as error:
        return row | {"result": "not installed", "cause": str(error)[-300:], "smoke": seconds}
    for name in leg.smoke:
        started = time.monotonic()
        failed = smoke(name, environment, folder, leg)
        seconds[name] = round(time.monotonic() - started, 1)
        if failed is not None:
            if REFUSAL not in failed:
                return row | {"result": "failed", "cause": f"{name}: {failed}", "smoke": seconds}
            behind = smoke(name, environment, folder, leg, taken_for=True) or "nothing: it passes"
            return row | {"result": "refused", "cause": f"by its version; behind the refusal: {behind}", "smoke": seconds}
    return row | {"smoke": seconds}


def smoke(name: str, environment: Path, folder: Path, leg: Leg, *, taken_for: bool = False) -> str | None:
    """None: it passed; else the first cause."""
    words = [*SMOKE[name], *(("--as", pins(leg.python)[leg.host]) if taken_for else ())]
    command = [str(environments.python_of(environment)), *words]
    env = environments.variables(environment, folder / f"extensions-{leg.python}")
    log = folder / "logs" / f"{leg.slug}-{name.replace(' ', '_')}{'-as' if taken_for else ''}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            status = process.wait(SMOKE_LIMIT_S)
        except subprocess.TimeoutExpired:
            return f"not done after {SMOKE_LIMIT_S} s"
        finally:
            end_group(process)
    return None if status == 0 else first_cause(log.read_text(errors="replace"))


def first_cause(output: str) -> str:
    """The first error that pytest shows, before what the launcher of jobs makes of it; without one, the last line."""
    shown = re.findall(r"^E\s+(?:\[rank\d+\]: )?((?:\w+\.)*\w*(?:Error|Exception|Timeout)\b.*)$", output, re.MULTILINE)
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    own = [error for error in shown if not re.search(r"JobTimeout|^AssertionError: check '", error)]
    return next(iter(own or shown or lines[-1:]), "no output")[:300]


def stamp() -> str:
    """Of the sources that a row depends on."""
    digest = hashlib.sha256()
    for folder in SOURCES:  # or a file
        for file in sorted((ROOT / folder).rglob("*")) or [ROOT / folder]:
            if file.suffix in (".py", ".cpp", ".h", ".cu", ".cuh") and file.is_file():
                digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def row_of(leg: Leg, sources: str | None = None) -> dict | None:
    """The row of a leg; with `sources`: that was run with these, and at least its smoke set."""
    for row in found()["hosts"][leg.host]["rows"]:
        if (row["version"], row["python"]) != (leg.version, leg.python):
            continue
        whole = row["result"] != PASSED or set(leg.smoke) <= set(row["smoke"])
        if sources is None or (row["sources"] == sources and whole):
            return row
    return None


def beside(row: dict, before: dict | None) -> dict:
    """A row of a part of the smoke set, with what passed before. The sources are the older ones, so that the whole is run again one day."""
    if before is None or before["result"] != PASSED:
        return row
    return row | {"smoke": before["smoke"] | row["smoke"], "sources": before["sources"]}


def keep(host: str, python: str, releases: list[str]) -> None:
    """What the index had, from the release below the oldest that is claimed: a range that reaches further down is seen by that one."""
    results = found() if RESULTS.is_file() else {"hosts": {}}
    results["command"] = "bash launch/dev.sh hosts"
    results["machine"] = f"{platform.machine()}, CPU, gloo"
    mine = results["hosts"].setdefault(host, {"releases": {}, "rows": []})
    claim = claimed(host, python, requirements())
    ordered = sorted(releases, key=Version)
    oldest = next((at for at, one in enumerate(ordered) if claim is None or one in claim), 0)
    mine["releases"][python] = ordered[max(oldest - 1, 0) :]
    _write(results)


def write(leg: Leg, row: dict) -> None:
    results = found()
    rows = results["hosts"][leg.host]["rows"]
    rows[:] = [one for one in rows if (one["version"], one["python"]) != (leg.version, leg.python)] + [row]
    rows.sort(key=lambda one: (Version(one["version"]), one["python"]))
    _write(results)


def _write(results: dict) -> None:
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
