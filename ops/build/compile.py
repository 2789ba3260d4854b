"""Compile sources into a shared library in a cache that survives the process.

The cache key covers the sources, their headers, the flags, torch's version and the compiler's: a change in any of them builds anew.
The library appears under its name in one rename, and a file lock keeps two processes from building it twice.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).parents[1] / "csrc"
PREBUILT = Path(__file__).parents[1] / "prebuilt"  # filled at install time with DS_BUILD_PIKV=1
_HEADERS = (".h", ".cuh", ".inc")


class BuildError(RuntimeError):
    """A tool is missing or failed; the message says which and how to go on."""


class ToolMissing(BuildError):
    """A compiler or package is not installed here."""


@dataclass(frozen=True)
class Source:
    path: str  # below csrc/
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Library:
    name: str  # the file is <name>-<key>.so
    compiler: str  # a command
    flags: tuple[str, ...]
    sources: tuple[Source, ...]
    link_flags: tuple[str, ...] = ()
    headers: tuple[str, ...] = ("cpu", "include")  # folders below csrc/ whose headers the key covers
    keep_log: bool = False  # what the compiler printed, beside the library (.log)


def cache_dir() -> Path:
    """Our own ops: below TORCH_EXTENSIONS_DIR if the user has set it, else one folder for all environments, as their names hold the key."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    if given is not None and Path(given).parent != own_extensions():
        return Path(given) / "pikv_ds"
    return own_extensions().parent


def own_extensions() -> Path:
    """Where the folders lie in which torch builds the ops of others for us (torch_builds.py)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pikv_ds" / "torch_extensions"


def cpu_library(extra_flags: Sequence[str] = ()) -> Library:
    """The CPU ops. One file per instruction set; cpuid decides which runs (csrc/cpu/kernels.cpp). -DPK_PORTABLE: only plain C++."""
    import platform

    import torch

    root = Path(torch.__file__).parent
    exact = ("-ffp-contract=off",)  # the bits of the torch reference: no fused multiply-add
    plain = [Source(f"cpu/{name}.cpp") for name in ("attend", "slots", "pack", "route", "kernels", "checksum", "choose", "stage", "crc")]
    plain += [Source(f"cpu/{name}.cpp", exact) for name in ("append", "bounds")]
    sets = _per_instruction_set("baseline")
    if platform.machine() == "x86_64" and "-DPK_PORTABLE" not in extra_flags:
        wide = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mavx2", "-mf16c", "-mprefer-vector-width=512")
        sets += _per_instruction_set("avx2", "-mavx2", "-mfma", "-mf16c") + _per_instruction_set("avx512", *wide)
        vnni = (*wide, "-mavx512vnni")
        sets += [
            Source(f"cpu/{name}.cpp", vnni)
            for name in (
                "attend_vnni",
                "score_vnni",
                "attend_phases",
                "phase_table",
                "phase_int_keys",
                "phase_int_values",
                "attend_chunk",
                "chunk_float",
            )  # fmt: skip
        ]
        bf16, amx = (*vnni, "-mavx512vbmi", "-mavx512bf16"), ("-mamx-tile", "-mamx-int8", "-mamx-bf16")
        sets += [
            *(Source(f"cpu/{name}.cpp", bf16) for name in ("phase_float_dot", "phase_fp4_keys", "phase_fp4_values", "chunk_bf16")),
            *(Source(f"cpu/phase_amx_{kind}.cpp", (*bf16, *amx)) for kind in ("int", "float")),
        ]
        for names in (("kFp32", "kFp16"), ("kBf16", "kFp8", "kFp4"), ("kInt8", "kInt4", "kInt2")):  # so that they compile side by side
            formats = "-DPK_FORMATS=" + "".join(f"X({name})" for name in names)
            sets += [Source(f"cpu/vnni_{part}.cpp", (*vnni, formats)) for part in ("values", "keys")]
    # 0x020b...: the stable ABI as of torch 2.11, so one library serves every later torch.
    flags = ("-O3", "-std=c++17", "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-Wall", "-Werror=return-type",
             "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{root / 'include'}", *extra_flags)  # fmt: skip
    sanitizers = (flag for flag in extra_flags if flag.startswith("-fsanitize"))
    link = (f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-ltorch_cpu", "-lc10", *sanitizers)
    return Library("pikv_cpu", os.environ.get("CXX", "g++"), flags, tuple(plain + sets), link)


def _per_instruction_set(name: str, *flags: str) -> list[Source]:
    return [Source(f"cpu/{what}_generic.cpp", (f"-DPK_{what.upper()}={what}_{name}", *flags)) for what in ("attend", "score")]


def library_key(library: Library, with_compiler: bool = True) -> str:
    """Without the compiler: what an installed library is known by, on a machine that may have none."""
    import torch

    compiler = compiler_version(library.compiler) if with_compiler else ""
    parts = (torch.__version__, compiler, repr((library.flags, library.sources, library.link_flags)))
    return text_digest(library, hashlib.sha256(b"".join(part.encode() + b"\0" for part in parts))).hexdigest()[:16]


def text_digest(library: Library, digest: hashlib._Hash | None = None) -> hashlib._Hash:
    """Digest of the sources and the headers, after what it has seen already; no flags, no compiler, no path of this machine."""
    digest = hashlib.sha256() if digest is None else digest
    headers = {path for folder in library.headers for path in (CSRC / folder).glob("*") if path.suffix in _HEADERS}
    for path in sorted({CSRC / s.path for s in library.sources} | headers):
        digest.update(str(path.relative_to(CSRC)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest


def compiler_version(command: str) -> str:
    tool = shlex.split(command)[0]
    if shutil.which(tool) is None:
        raise ToolMissing(
            f"{tool!r} was not found; install it (or set CXX for C++, CUDA_HOME for CUDA), or set PIKV_OPS=torch to do without"
        )
    return subprocess.run([*shlex.split(command), "--version"], capture_output=True, text=True, timeout=60, check=False).stdout


def compiler_name(command: str) -> str:
    """The tool and its version, for people: "nvcc 13.0"."""
    tool = Path(shlex.split(command)[0]).name
    numbers = re.findall(r"\b\d+\.\d+(?:\.\d+)?\b", re.sub(r"\([^)]*\)", "", compiler_version(command)))
    return f"{tool} {numbers[0]}" if numbers else tool


def build(library: Library, directory: Path | None = None) -> Path:
    """The path of the compiled library, built now unless the install or the cache has it. Raises BuildError."""
    if directory is None and (there := built(library)) is not None:
        return there
    directory = directory or cache_dir()
    target = directory / _file_name(library)
    if target.is_file():
        return target
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory / f"{library.name}.lock"):
        if not target.is_file():  # another process may have built it while this one waited
            _compile(library, target)
    return target


def built(library: Library) -> Path | None:
    """Where the compiled library lies, from an installation or in the cache; None: it is built at its first use."""
    installed = prebuilt(library)
    if installed.is_file():
        return installed
    try:
        cached = cache_dir() / _file_name(library)
    except ToolMissing:  # its name has the compiler's version
        return None
    return cached if cached.is_file() else None


def _file_name(library: Library) -> str:
    return f"{library.name}-{library_key(library)}.so"


def prebuilt(library: Library, folder: Path = PREBUILT) -> Path:
    """Where an install with DS_BUILD_PIKV=1 puts the library."""
    return folder / f"{library.name}-{library_key(library, with_compiler=False)}.so"


def build_ahead(library: Library, folder: Path) -> Path:
    """Compile into `folder` as part of an installation. Called by setup.py; raises BuildError."""
    folder.mkdir(parents=True, exist_ok=True)
    target = prebuilt(library, folder)
    _compile(library, target)
    return target


@contextmanager
def _locked(path: Path):
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(library: Library, target: Path) -> None:
    started = time.monotonic()
    total, done, logs = len(library.sources), [], {}
    _progress(f"building {library.name}, once per machine: {total} files")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:

        def one(numbered: tuple[int, Source]) -> str:
            number, source = numbered
            output = str(Path(folder) / f"{number}.o")
            command = [*shlex.split(library.compiler), *library.flags, *source.flags, "-c", str(CSRC / source.path), "-o", output]
            logs[number] = _run(command)
            done.append(source)
            _progress(f"building {library.name}: {len(done)}/{total} {source.path}")
            return output

        # Longest first: the file with the templates is last in the list and decides how long it takes.
        with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
            objects = list(pool.map(one, reversed(list(enumerate(library.sources)))))
        # In the order of the sources, plainest first: of a function that several files instantiate (std::vector's members) the linker keeps
        # the first, and one compiled for AVX512 would crash the others' callers on an older CPU.
        objects.reverse()
        linked = str(Path(folder) / target.name)
        _run([*shlex.split(library.compiler), "-shared", "-o", linked, *objects, *library.link_flags])
        if library.keep_log:
            target.with_suffix(".log").write_text("".join(logs[number] for number in sorted(logs)))
        os.replace(linked, target)
    _progress(f"built {library.name} in {time.monotonic() - started:.0f} s", last=True)


_TELLING = ("error", "undefined", "multiple definition")


def _run(command: list[str]) -> str:
    """What the command printed, both streams."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = result.stderr.strip().splitlines()
        shown = [line for line in lines if any(word in line for word in _TELLING)][:5] or lines[-5:]
        raise BuildError(f"{Path(command[0]).name} failed (exit status {result.returncode}):\n" + "\n".join(shown))
    return result.stdout + result.stderr


def _progress(text: str, last: bool = False) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[Kpikv: {text}", end="\n" if last else "", file=sys.stderr, flush=True)
    elif last or "/" not in text:
        print(f"pikv: {text}", file=sys.stderr, flush=True)
