"""Ops that torch builds at first use, as DeepSpeed's are: the folder they lie in, what is said, and the lock that a killed build leaves.

Up to torch 2.13 the lock is a file that is there or not (torch.utils.file_baton): a process that is killed while it builds leaves it, and
every later one waits for ever and says nothing. From 2.14 on the system drops the lock with the process, and nothing here does anything.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.utils.file_baton import FileBaton

from .compile import BuildError, own_extensions

PATIENCE_S = 10.0  # a lock that nobody holds for so long has been left
DEEPSPEED_OP = "deepspeed_shm_comm"  # what DeepSpeed builds when torch.distributed starts on CPU
_PROC = Path("/proc")
_host_wait: dict[str, Any] = {}


class AbandonedLock(BuildError):
    """The message names the file and what to do."""

    def __init__(self, lock: Path) -> None:
        super().__init__(
            f"torch waits for {lock}, which no process of this machine holds: one that built {lock.parent.name} was killed and left it. "
            f"Remove the file and start again (rm {lock}). If another machine or container builds in this folder just now, wait for it"
        )


def own_folder() -> Path:
    """Where our launchers and tests have such ops built unless TORCH_EXTENSIONS_DIR is set: one folder for each environment. In torch's own
    folder environments of one Python build over each other."""
    try:
        deepspeed = version("deepspeed")
    except PackageNotFoundError:
        deepspeed = "-none"
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    prefix = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    return own_extensions() / f"{python}-torch{torch.__version__}-deepspeed{deepspeed}-{prefix}"


def build_root(env: Mapping[str, str] = os.environ) -> Path:
    """TORCH_EXTENSIONS_DIR of that environment, or torch's own folder."""
    given = env.get("TORCH_EXTENSIONS_DIR")
    if given is not None:
        return Path(given)
    from torch.utils.cpp_extension import get_default_build_root  # imports setuptools

    return Path(get_default_build_root())


def announce_build(env: Mapping[str, str] = os.environ) -> None:
    """Say on stderr that DeepSpeed is going to build its op for collectives on CPU, unless it has been built or nothing says so."""
    if env.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available():
        return
    host, root = importlib.util.find_spec("deepspeed"), build_root(env)
    ahead = [Path(place) for place in (host.submodule_search_locations or ())] if host is not None else []
    if host is None or any(any(place.glob("ops/comm/*shm_comm*.so")) for place in ahead):
        return
    if any(any(root.glob(f"{folder}{DEEPSPEED_OP}/*.so")) for folder in ("", "*/")):
        return
    print(f"pikv: first start here: DeepSpeed builds {DEEPSPEED_OP} in {root}, once, in one to four minutes", file=sys.stderr, flush=True)


@cache
def lock_outlives_its_holder() -> bool:
    """Whether this torch takes the file itself for the lock."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lock"
        path.touch()
        baton = FileBaton(str(path))
        taken = baton.try_acquire()
        if taken:
            baton.release()
        return not taken


def is_held(lock: Path) -> bool:
    """Whether a process of this machine has the lock open, as who builds does. True where that can't be known."""
    try:
        wanted = lock.stat()
    except FileNotFoundError:
        return True
    if not _PROC.is_dir() or wanted.st_uid != os.getuid():
        return True
    for links in _PROC.glob("[0-9]*/fd"):
        try:
            for link in links.iterdir():
                if os.path.samestat(link.stat(), wanted):
                    return True
        except OSError:  # the process has ended, closed the file, or is another user's, who does not hold a file of this one
            continue
    return False


class Watch:
    """Looks again and again for locks that were left in a folder; cheap to ask often."""

    def __init__(self, root: Path, pattern: str = "*/lock") -> None:
        self._root, self._pattern, self._asked = root, pattern, 0.0
        self._since: dict[tuple[Path, int], float] = {}  # by file and its number: one that is made anew is another

    def check(self) -> None:
        """Raises: AbandonedLock for a file that nobody has held for PATIENCE_S."""
        now = time.monotonic()
        if now < self._asked or not lock_outlives_its_holder():
            return
        self._asked = now + PATIENCE_S / 5
        unheld = {}
        for lock in self._root.glob(self._pattern):
            try:
                key = lock, lock.stat().st_ino
            except FileNotFoundError:
                continue
            if not is_held(lock):
                unheld[key] = self._since.get(key, now)
        self._since = unheld
        for (lock, _), since in unheld.items():
            if now - since >= PATIENCE_S:
                raise AbandonedLock(lock)


@contextmanager
def locks_watched() -> Iterator[None]:
    """Inside, torch's wait for a lock ends with AbandonedLock when nobody holds it. With ranks on several machines, where the holder may be
    on another, it goes on and says once a minute what it waits for."""
    was_watched = bool(_host_wait)
    watch_locks()
    try:
        yield
    finally:
        if not was_watched:
            unwatch_locks()


def watch_locks() -> None:
    """Replace FileBaton.wait of a torch that needs it, for the process. Idempotent."""
    if not _host_wait and lock_outlives_its_holder():
        _host_wait["wait"] = FileBaton.wait
        FileBaton.wait = _wait


def unwatch_locks() -> None:
    """Put torch's method back. Idempotent."""
    if _host_wait:
        FileBaton.wait = _host_wait.pop("wait")


def _wait(baton: FileBaton) -> None:
    lock = Path(baton.lock_file_path)
    watch, told = Watch(lock.parent, lock.name), time.monotonic()
    while lock.exists():
        try:
            watch.check()
        except AbandonedLock as left:
            if _on_one_machine():
                raise
            if time.monotonic() - told > 60:
                told = time.monotonic()
                print(f"pikv: {left}", file=sys.stderr, flush=True)
        time.sleep(baton.wait_seconds)


def _on_one_machine() -> bool:
    """As the launcher says: DeepSpeed's CROSS_SIZE, torchrun's and DeepSpeed's numbers of ranks here and in all."""
    env, world = os.environ, os.environ.get("WORLD_SIZE", "1")
    here = env.get("LOCAL_SIZE") or env.get("LOCAL_WORLD_SIZE") or world
    return env.get("CROSS_SIZE", "1") == "1" and here == world
