"""Methods of another distribution: installed beside pikv_ds, they are legal in a "pikv" block and held to the same contracts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dist.launcher import JobResult, run_gloo

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "tests" / "outside_package"
METHODS = {"compression": "coarse_int8", "routing": "expected_mass", "scheduling": "norm_ratio", "pools": "older_int4"}
BLOCK = {
    "page_size": 32,
    "storage": {"num_shards": 2, "requests": "replicated"},
    "compression": {"method": "coarse_int8", "group": 32},
    "routing": {"method": "expected_mass", "top_k": 1, "recent_tokens": 32},
    "scheduling": {"method": "norm_ratio", "budget_tokens": 256, "recent_tokens": 32},
}
POOLED = {key: value for key, value in BLOCK.items() if key != "routing"} | {
    "compression": {"method": "coarse_int8", "group": 32, "raw_recent_tokens": 32},
    "pools": [{"method": "older_int4", "after_tokens": 96}],
}


def install(source: Path, target: Path, work: Path) -> None:
    """pip installs it from a copy: setuptools leaves build/ and *.egg-info in the folder it builds."""
    shutil.copytree(source, work)
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--target", target]
    done = subprocess.run([sys.executable, "-m", "pip", "install", *options, work], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[str, str]:
    """The environment of a process that finds the distribution."""
    folder = tmp_path_factory.mktemp("outside")
    install(SOURCE, folder / "site", folder / "source")
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), str(folder / "site")])}


def run(site: dict[str, str], *command: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=os.environ | site, capture_output=True, text=True, timeout=200)


def generated(site: dict[str, str], folder: Path, ranks: int, block: dict = BLOCK) -> JobResult:
    (folder / "ds_config.json").write_text(json.dumps({"pikv": block}))
    return run_gloo("outside.py", [folder / "ds_config.json"], ranks=ranks, env=site)


@pytest.mark.dist
@pytest.mark.timeout(200)
def test_a_script_that_has_only_the_configuration_runs_them_on_all_ranks(site, tmp_path):
    (alone,) = generated(site, tmp_path, 1).check("generates")
    first, second = generated(site, tmp_path, 2).check("generates")
    assert alone["tokens"] == first["tokens"] == second["tokens"]
    assert alone["entries_evicted"] > 100 and first["entries_evicted"] > 0, "the policy was not asked"
    assert 0 < alone["entries_read"] < 0.9 * alone["entries_visible"], "the router was not asked"
    assert alone["attention_impl"].endswith("int8"), "the codec was not asked"


@pytest.mark.dist
@pytest.mark.timeout(200)
def test_a_third_pool_from_outside_holds_what_is_old(site, tmp_path):
    """Raw, then 8-bit integers, then the kind of the other distribution: the same tokens on one rank and on two."""
    (alone,) = generated(site, tmp_path, 1, POOLED).check("generates")
    first, second = generated(site, tmp_path, 2, POOLED).check("generates")
    assert alone["tokens"] == first["tokens"] == second["tokens"]
    assert alone["attention_impl"].endswith(" fp32+int8+int4"), alone["attention_impl"]
    (two,) = generated(site, tmp_path, 1, POOLED | {"pools": []}).check("generates")
    assert alone["kv_bytes_live"] < two["kv_bytes_live"] and alone["entries_live"] == two["entries_live"]


@pytest.mark.dist
@pytest.mark.timeout(100)
def test_without_the_distribution_the_script_is_refused(tmp_path):
    done = generated({}, tmp_path, 1)
    assert done.returncode and "pikv.routing.method = 'expected_mass': legal is one of" in done.output, done.describe()


@pytest.mark.timeout(200)
def test_the_contracts_of_this_repository_hold_for_them(site):
    """`pytest tests/contracts -k NAME`, where the distribution is installed, is all that its author needs."""
    chosen = " or ".join(METHODS.values())
    done = run(site, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/contracts", "-k", chosen)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    passed = int(done.stdout.rpartition(" passed")[0].split()[-1])
    assert passed > 100, f"{passed} contract tests: the methods were not among the registered ones"


@pytest.mark.timeout(100)
def test_methods_are_listed_with_their_distribution(site, tmp_path):
    done = run(site, "-m", "pikv_ds.launch.cli", "methods", "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    outside = {row["key"].partition(".")[0]: row["name"] for row in rows if row["from"] == "pikv-outside 1.0"}
    assert outside == METHODS and all(row["from"] is None for row in rows if row["name"] not in METHODS.values())


def test_importing_pikv_ds_loads_none_of_them(site):
    done = run(
        site, "-c", "import sys, pikv_ds; dir(pikv_ds); found = {'pikv_outside', 'torch'} & set(sys.modules); assert not found, found"
    )
    assert done.returncode == 0, done.stderr
