"""setup.py claims the versions of the hosts that docs/results/hosts.json has passing rows of; the newest transformers is tried here."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from pikv_ds.adapters.hf import versions
from tests.hosts.__main__ import beside, first_cause, row_of
from tests.hosts.claims import PASSED, ROOT, claimed, found, pins, requirements, untrue
from tests.hosts.matrix import HOSTS, OF_HOST, Leg, legs

DOWNLOAD_LIMIT_S, RUN_LIMIT_S = 120, 240


def test_setup_claims_what_passed_and_nothing_else():
    assert untrue(requirements(), found()) == []


@pytest.mark.parametrize(
    "text, said",
    [
        ("transformers>=5.0,<5.25", "setup.py claims transformers 5.18.0 on Python 3.11, which has no row that passed"),
        ("transformers>=5.19", "transformers>=5.19 has no upper bound"),
        ("transformers>=5.19,<5.24", "transformers 5.24.0 on Python 3.11 passed, and setup.py does not claim it"),
        ("transformers>=5.20,<5.25", "transformers 5.19.0 on Python 3.11 passed, and setup.py does not claim it"),
    ],
)
def test_a_range_that_says_more_or_less_is_found(text, said):
    given = [one for one in requirements() if one.name != "transformers"] + [Requirement(text)]
    assert any(one.startswith(said) for one in untrue(given, found())), untrue(given, found())


def test_a_row_that_failed_is_no_proof():
    results = copy.deepcopy(found())
    for row in results["hosts"]["transformers"]["rows"]:
        if row["version"] == "5.23.0":
            row["result"] = "failed"
    assert "setup.py claims transformers 5.23.0 on Python 3.11, which has no row that passed" in untrue(requirements(), results)


def test_ranges_by_python():
    given = [Requirement("deepspeed>=1,<2; python_version<'3.12'"), Requirement("deepspeed>=2,<3; python_version>='3.12'")]
    assert claimed("deepspeed", "3.11", given) == SpecifierSet(">=1,<2") and claimed("deepspeed", "3.12", given) == SpecifierSet(">=2,<3")
    assert claimed("transformers", "3.11", given) is None


def test_rows_are_whole():
    for host in HOSTS:
        for row in found()["hosts"][host]["rows"]:
            assert set(row) == {"version", "python", "torch", "result", "cause", "smoke", "sources"}, (host, row)
            assert row["result"] in (PASSED, "failed", "refused", "not installed") and (row["result"] == PASSED) == (not row["cause"])


def test_the_range_of_the_adapter_is_that_of_setup():
    assert claimed("transformers", "3.11", requirements()) == SpecifierSet(f">={versions.OLDEST},<{versions.BEYOND}")


def test_legs_are_the_ends_the_pin_and_what_lies_below():
    made = legs("transformers", "3.11", ["3", "1", "2", "4", "5", "6"], SpecifierSet(">=2,<6"), "4")
    assert [leg.version for leg in made] == ["1", "2", "4", "5"]
    assert made[0].smoke == ("attach",) and all(leg.smoke == OF_HOST["transformers"] for leg in made[1:])
    every = legs("transformers", "3.11", ["3", "1", "2", "4", "5", "6"], SpecifierSet(">=2,<6"), "4", every=True)
    assert [leg.version for leg in every] == ["1", "2", "3", "4", "5"] and every[2].smoke == ("attach",)


def test_a_leg_that_has_a_row_of_these_sources_is_not_run_again():
    row = next(row for row in found()["hosts"]["transformers"]["rows"] if row["version"] == pins("3.11")["transformers"])
    leg = Leg("transformers", row["version"], row["python"], tuple(row["smoke"]))
    assert row_of(leg, row["sources"]) == row and row_of(leg, "others") is None
    more = Leg("transformers", row["version"], row["python"], (*row["smoke"], "one more"))
    assert row_of(more, row["sources"]) is None


def test_a_part_of_the_smoke_set_is_added_to_a_row_that_passed():
    before = {"result": PASSED, "cause": "", "smoke": {"a": 1.0}, "sources": "older"}
    part = {"result": PASSED, "cause": "", "smoke": {"b": 2.0}, "sources": "newer"}
    assert beside(part, before) == {"result": PASSED, "cause": "", "smoke": {"a": 1.0, "b": 2.0}, "sources": "older"}
    failed = part | {"result": "failed", "cause": "b: no"}
    assert beside(failed, before)["result"] == "failed" and beside(part, failed) == part and beside(part, None) == part


def test_the_first_cause_is_what_a_rank_raised():
    assert first_cause("E   a.JobTimeout: killed\nE  [rank1]: raise X\nE  [rank1]: AttributeError: b\n") == "AttributeError: b"
    assert first_cause("E   AssertionError: check 'x' ran on 0 of 2 ranks\nE   TypeError: c\n") == "TypeError: c"
    assert first_cause("x\nE   ImportError: a\n") == "ImportError: a" and first_cause("E   a.JobTimeout: d\n") == "a.JobTimeout: d"
    assert first_cause("a\nb\n\n") == "b" and first_cause("") == "no output"


@pytest.fixture(scope="module")
def newest() -> tuple[str, list[str]]:
    """The newest transformers that is claimed, and the folders to put in front of sys.path for it: none where it is installed."""
    rows = found()["hosts"]["transformers"]["rows"]
    version = max((row["version"] for row in rows if row["result"] == PASSED), key=Version)
    if Version(transformers.__version__) >= Version(version):
        return version, []
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "pikv_ds" / "hosts" / f"transformers-{version}"
    if not (folder / ".complete").is_file():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile"]
        command += ["--upgrade", "--target", str(folder), f"transformers=={version}"]
        try:
            subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_LIMIT_S, check=True, stdin=subprocess.DEVNULL)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            said = (error.stderr or "").strip().splitlines() if isinstance(error, subprocess.CalledProcessError) else [str(error)]
            pytest.skip(f"transformers {version} can't be had here: {said[-1] if said else error}")
        (folder / ".complete").touch()
    return version, [str(folder)]


@pytest.mark.timeout(DOWNLOAD_LIMIT_S + RUN_LIMIT_S + 30)
def test_newest_transformers(newest):
    """Three families on the newest version, beside the pinned environment. All versions and families: bash launch/dev.sh hosts."""
    version, folders = newest
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*folders, str(ROOT)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.hosts.attach", "--short"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=RUN_LIMIT_S
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-2000:]}"
    assert done.stdout.startswith(f"transformers {version} in") or not folders, done.stdout
