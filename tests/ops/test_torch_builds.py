"""Ops that torch builds: our own folder, what is said before a build, and locks that a killed process has left."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import file_baton
from torch.utils.file_baton import FileBaton

from pikv_ds.ops.build import torch_builds
from pikv_ds.ops.build.compile import cache_dir, own_extensions
from pikv_ds.ops.build.torch_builds import (
    AbandonedLock,
    Watch,
    announce_build,
    is_held,
    lock_outlives_its_holder,
    locks_watched,
    own_folder,
)

BUILDER = """
import runpy, sys, time
FileBaton = runpy.run_path(sys.argv[2])["FileBaton"]  # without the rest of torch
baton = FileBaton(sys.argv[1])
assert baton.try_acquire()
print("builds", flush=True)
time.sleep(600)
"""
needs_lock_files = pytest.mark.skipif(not lock_outlives_its_holder(), reason="the lock of this torch goes with its process")


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(torch_builds, "PATIENCE_S", 0.2)


@pytest.fixture
def lock(tmp_path):
    """That of an op in a folder of them."""
    folder = tmp_path / "some_op"
    folder.mkdir()
    return folder / "lock"


@pytest.fixture
def builder(lock):
    """A process that holds the lock, as torch takes it."""
    process = subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(lock), file_baton.__file__], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    )
    assert process.stdout.readline() == "builds\n"
    yield process
    process.kill()
    process.communicate()


@needs_lock_files
def test_a_lock_is_held_until_its_process_is_killed(lock, builder, impatient):
    watch = Watch(lock.parents[1])
    assert is_held(lock)
    with locks_watched():
        for _ in range(3):
            watch.check()
            torch_builds.time.sleep(0.1)
        builder.kill()
        builder.wait()
        assert lock.exists() and not is_held(lock)
        with pytest.raises(AbandonedLock, match=f"{lock}.*built some_op was killed.*rm {lock}"):
            FileBaton(str(lock), wait_seconds=0.02).wait()
    with pytest.raises(AbandonedLock, match=str(lock)):
        for _ in range(50):
            watch.check()
            torch_builds.time.sleep(0.02)


@needs_lock_files
def test_ranks_on_other_machines_may_hold_it(lock, impatient, monkeypatch, capsys):
    lock.touch()
    monkeypatch.setenv("CROSS_SIZE", "2")
    now, rounds = iter(range(0, 10**6, 30)), iter(range(8))
    monkeypatch.setattr(torch_builds.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(torch_builds.time, "sleep", lambda seconds: lock.unlink() if next(rounds) == 7 else None)
    with locks_watched():
        FileBaton(str(lock)).wait()  # until it goes
    assert 1 <= capsys.readouterr().err.count(f"torch waits for {lock}") < 8


@needs_lock_files
def test_torch_gets_its_wait_back_and_keeps_it_where_it_needs_no_help(monkeypatch):
    before = FileBaton.wait
    with locks_watched():
        assert FileBaton.wait is not before
        with locks_watched():
            pass
        assert FileBaton.wait is not before, "an inner use must not undo the outer one"
    assert FileBaton.wait is before
    monkeypatch.setattr(torch_builds, "lock_outlives_its_holder", lambda: False)
    with locks_watched():
        assert FileBaton.wait is before


def test_what_is_released_is_waited_for(lock):
    own = FileBaton(str(lock))
    assert own.try_acquire() and is_held(lock)
    own.release()
    with locks_watched():
        FileBaton(str(lock)).wait()


def test_a_folder_of_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = own_folder()
    assert folder.parent == own_extensions() == tmp_path / "pikv_ds" / "torch_extensions"
    assert torch.__version__ in folder.name and f"py{sys.version_info.major}{sys.version_info.minor}" in folder.name
    monkeypatch.setattr(sys, "prefix", sys.prefix + "2")
    assert own_folder() != folder
    for given, ours in ((None, tmp_path / "pikv_ds"), (folder, tmp_path / "pikv_ds"), (tmp_path / "mine", tmp_path / "mine" / "pikv_ds")):
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        if given is not None:
            monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(given))
        assert cache_dir() == ours, "our own ops are keyed by their content: environments share them"


def test_the_first_build_says_what_it_does(tmp_path, capsys):
    env = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "DS_ACCELERATOR": "cpu"}
    announce_build(env)
    said = capsys.readouterr().err
    assert "DeepSpeed builds deepspeed_shm_comm" in said and str(tmp_path) in said and "one to four minutes" in said
    built = Path(tmp_path, "deepspeed_shm_comm", "deepspeed_shm_comm.so")
    built.parent.mkdir()
    built.touch()
    announce_build(env)
    assert capsys.readouterr().err == ""


def test_tests_have_a_folder_of_their_own():
    assert os.environ["TORCH_EXTENSIONS_DIR"]
