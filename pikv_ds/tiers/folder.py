"""A folder of page files that one process uses and nobody trusts afterwards: those of processes that died are removed by the next one."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path

PREFIX = "pikv-"


class Folder:
    """Owns path/pikv-RANK-XXXX, 0700, as long as it lives; a lock in it says so, which the system lets go of with the process."""

    def __init__(self, parent: str | Path, rank: int) -> None:
        """Raises: OSError for a parent in which no folder can be made."""
        parent = Path(parent)
        parent.mkdir(parents=True, exist_ok=True)
        turn = _opened(parent / f"{PREFIX}lock")
        try:
            fcntl.flock(turn, fcntl.LOCK_EX)  # nobody takes a folder for dead that is being made
            for other in parent.glob(f"{PREFIX}*-*"):
                _remove_if_dead(other)
            self.path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{rank}-", dir=parent))
            lock = _opened(self.path / "lock")
            fcntl.flock(lock, fcntl.LOCK_EX)
        finally:
            os.close(turn)
        self.close = weakref.finalize(self, _remove, self.path, lock)


def _opened(path: Path) -> int:
    return os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)


def _remove_if_dead(folder: Path) -> None:
    lock = _opened(folder / "lock")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # its process lives
        os.close(lock)
    else:
        _remove(folder, lock)


def _remove(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)
