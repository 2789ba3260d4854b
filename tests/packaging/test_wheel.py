"""The wheel holds the three grafted folders, the bundled model and nothing at the top level but pikv_ds."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEEDED = [
    "pikv_ds/__init__.py",
    "pikv_ds/py.typed",
    "pikv_ds/config/pikv.py",
    "pikv_ds/codecs/none.py",
    "pikv_ds/adapters/hf/model_spec.py",
    "pikv_ds/ops/__init__.py",
    "pikv_ds/megatron_patch/__init__.py",
    "pikv_ds/launch/cli.py",
    "pikv_ds/launch/commands/plan.py",
    "pikv_ds/launch/sweeps/methods.json",
    "pikv_ds/launch/sweeps/verdicts.json",
    "pikv_ds/bundled/PROVENANCE.md",
    "pikv_ds/bundled/haystack.txt",
    "pikv_ds/bundled/wikitext2_test.txt",
    "pikv_ds/bundled/wikitext2_valid.txt",
    "pikv_ds/bundled/model/config.json",
    "pikv_ds/bundled/model/model.safetensors",
    "pikv_ds/bundled/model/tokenizer.json",
    "pikv_ds/bundled/parts/eviction_scorer.safetensors",
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools leaves build/ and *.egg-info in the folder it builds."""
    work = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns(".git", ".venv", ".mypy_cache", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(ROOT, work / "source", ignore=ignore)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        work / "out",
        work / "source",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (made,) = (work / "out").glob("*.whl")
    return made


@pytest.mark.slow
def test_contents(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert not [name for name in NEEDED if name not in names]
    top = {name.partition("/")[0] for name in names}
    assert top == {"pikv_ds", f"pikv_ds-{wheel.name.split('-')[1]}.dist-info"}


@pytest.mark.slow
def test_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    text = archive.read(name).decode()
    for line in ("Requires-Dist: torch>=2.11", "Requires-Dist: deepspeed<", "Requires-Dist: megatron-core<0.17,>=0.16;"):
        assert line in text
    assert "Requires-Python: >=3.11" in text and "License: Apache-2.0" in text
    (entry,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "pikv = pikv_ds.launch.cli:main" in archive.read(entry).decode()


@pytest.mark.slow
def test_the_unpacked_wheel_runs_away_from_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import pikv_ds, pikv_ds.ops, pikv_ds.launch.cli as cli, pikv_ds.megatron_patch\n"
        f"assert pikv_ds.__file__.startswith({str(tmp_path)!r}), pikv_ds.__file__\n"
        "from pikv_ds.bundled import model_path\n"
        "assert (model_path() / 'model.safetensors').stat().st_size > 6_000_000\n"
        "raise SystemExit(cli.main(['methods']))\n"
    )
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "compression.method" in done.stdout
