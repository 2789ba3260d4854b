"""The headers of the oldest torch that setup.py takes, for compiling against: from its macOS wheel, the smallest that has them (80 MB)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from pikv_ds.ops.build.compile import cache_dir

SETUP = Path(__file__).resolve().parents[2] / "setup.py"


def oldest_torch() -> str:
    """ "2.11.0", from the requirement in setup.py."""
    return re.search(r'"torch>=(\d+\.\d+)', SETUP.read_text()).group(1) + ".0"


def headers(version: str) -> Path | str:
    """The include folder, downloaded once into the cache of built ops; or why it cannot be had."""
    folder = cache_dir() / f"torch-{version}-headers"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            fetched = _download(version, Path(scratch))
            if isinstance(fetched, str):
                return fetched
            with zipfile.ZipFile(fetched) as wheel:
                wheel.extractall(scratch, [name for name in wheel.namelist() if name.startswith("torch/include/")])
            try:
                os.replace(Path(scratch) / "torch" / "include", folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
    return folder


def _download(version: str, to: Path) -> Path | str:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:",
               "--platform=macosx_11_0_arm64", f"--python-version={sys.version_info[0]}.{sys.version_info[1]}", f"--dest={to}",
               "--retries=1", "--timeout=15", f"torch=={version}"]  # fmt: skip
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL, check=False)
    except subprocess.TimeoutExpired:
        return f"the wheel of torch {version} did not come within 300 s"
    if result.returncode:
        return f"pip has no wheel of torch {version}: {result.stderr.strip().splitlines()[-1]}"
    return next(to.glob("*.whl"))
