"""The two trees: the base, checked out into a temporary folder, and the current one with what is not committed yet."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BASE = "d67f97ff9d7a3e557d48d5262eb0d7ae43421d98"  # where the restructuring began


class NoBase(RuntimeError):
    """There is nothing to compare with; the message says how to get it."""


def git(*arguments: str) -> str:
    """What git printed, in this repository. Raises: NoBase."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise NoBase(f"git {' '.join(arguments)} failed: {done.stderr.strip()}")
    return done.stdout.strip()


def is_checkout() -> bool:
    """False in an unpacked archive, also in one that lies inside another repository, and where there is no git."""
    try:
        return Path(git("rev-parse", "--show-toplevel")).resolve() == ROOT
    except (NoBase, FileNotFoundError):
        return False


def resolve(revision: str) -> str:
    """The full name of a commit of this repository. Raises: NoBase."""
    if not is_checkout():
        raise NoBase(f"{ROOT} is no git checkout: the gate needs the history to check out {revision!r}")
    try:
        return git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    except NoBase:
        raise NoBase(f"--base {revision!r} is no commit of this repository; a shallow clone needs `git fetch --unshallow`") from None


def current() -> str:
    """The commit of the current tree, with "+changes" when files differ from it."""
    return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")


@contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """The tree of a commit in a temporary folder; removed afterwards, whatever happened."""
    with tempfile.TemporaryDirectory(prefix="pikv_gate_") as folder:
        tree = Path(folder).resolve() / "base"
        try:
            git("worktree", "add", "--quiet", "--detach", str(tree), revision)
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, capture_output=True)
            git("worktree", "prune")
