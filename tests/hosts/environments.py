"""Environments of their own for one version of a host: a venv over a base that has everything else."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .claims import ROOT, pins
from .matrix import Leg, running_python

PIP_LIMIT_S = 1800


def python_of(environment: Path) -> Path:
    return environment / "bin" / "python"


def interpreter(python: str) -> str | None:
    """A Python of this version on the machine; None: there is none."""
    return sys.executable if python == running_python() else shutil.which(f"python{python}")


def base(python: str, folder: Path, given: dict[str, Path]) -> Path:
    """The environment with all pins of a Python: one that was given, the running one if it is of that version, or a new one."""
    if python in given:
        return given[python]
    if python == running_python():
        return Path(sys.prefix)
    made = folder / f"base-{python}"
    if not (made / ".complete").is_file():
        shutil.rmtree(made, ignore_errors=True)
        _checked([str(interpreter(python)), "-m", "venv", str(made)])
        pinned = pins(python)
        torch = f"torch=={pinned['torch']}"
        constraints = made / "constraints.txt"
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in pinned.items()))
        pip(made, torch, "setuptools>=77", "-c", str(constraints))
        pip(made, "--no-build-isolation", "-c", str(constraints), "-e", f"{ROOT}[test]")
        (made / ".complete").touch()
    return made


def overlay(leg: Leg, below: Path, folder: Path) -> Path:
    """A venv with the leg's version of its host in front of what `below` has. Made once."""
    made = folder / leg.slug
    if not (made / ".complete").is_file():
        shutil.rmtree(made, ignore_errors=True)
        _checked([str(python_of(below)), "-m", "venv", str(made)])
        (_packages(made) / "base.pth").write_text(f"{_packages(below)}\n")
        pip(made, f"{leg.host}=={leg.version}", "--no-build-isolation")
        (made / ".complete").touch()
    return made


def releases(host: str, python: Path) -> list[str]:
    """What the package index has for this Python, newest first. Raises: RuntimeError when it can't be asked."""
    said = _checked([str(python), "-m", "pip", "index", "versions", host, "--disable-pip-version-check"])
    listed = re.search(r"Available versions: (.+)", said)
    assert listed is not None, said
    return listed[1].split(", ")


def version_in(environment: Path, package: str) -> str:
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return _checked([str(python_of(environment)), "-c", code]).strip().partition("+")[0]


def pip(environment: Path, *words: str) -> None:
    _checked([str(python_of(environment)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words])


def variables(environment: Path, extensions: Path) -> dict[str, str]:
    """Of a smoke set: the repository in front, compiled ops of its own, no accelerator."""
    extensions.mkdir(parents=True, exist_ok=True)
    return os.environ | {
        "VIRTUAL_ENV": str(environment),
        "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "TORCH_EXTENSIONS_DIR": str(extensions),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def _packages(environment: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(_checked([str(python_of(environment)), "-c", code]).strip())


def _checked(command: Sequence[str]) -> str:
    environment = os.environ | {"DS_BUILD_OPS": "0"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PIP_LIMIT_S, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()[-600:]}")
    return done.stdout
