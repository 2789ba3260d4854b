"""DeepSpeed's buffers in shared memory: none of ours stay, none of others go."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pikv_ds.adapters.deepspeed.shm import unlink_own_buffers
from pikv_ds.launch.ranks import RanksFailed, free_port, run_ranks
from pikv_ds.launch.shm_buffers import FOLDER, PREFIX, remove_buffers
from tests.dist.launcher import run_deepspeed_ranks
from tests.long_form import LONG

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="no /dev/shm here")

MAPPED = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    mapped = mmap.mmap(file.fileno(), 0)
print("mapped", flush=True)
sys.stdin.read()
"""


def buffers() -> set[str]:
    """Of all jobs that run on this machine and have run on it."""
    return {path.name for path in FOLDER.glob(f"{PREFIX}_*")}


@contextlib.contextmanager
def files(*names: str) -> Iterator[list[Path]]:
    made = [FOLDER / f"{PREFIX}_{name}" for name in names]
    for path in made:
        path.write_bytes(b"0" * 64)
    try:
        yield made
    finally:
        for path in made:
            path.unlink(missing_ok=True)


def test_those_of_a_job_are_told_by_user_address_and_port():
    port, user = free_port(), os.getuid()
    names = [f"{user}_127.0.0.1_{port}_0", f"{user}_127.0.0.1_{port}_1"]
    others = [f"{user + 1}_127.0.0.1_{port}_0", f"{user}_127.0.0.2_{port}_0", f"{user}_127.0.0.1_{port}1_0", f"{user}_127.0.0.1_1{port}_0"]
    with files(*names) as own, files(*others) as foreign:
        assert sorted(remove_buffers(port)) == own and remove_buffers(port) == []
        assert all(path.exists() for path in foreign) and not any(path.exists() for path in own)


def test_what_a_process_has_mapped_stays_until_it_ends():
    port = free_port()
    with files(f"{os.getuid()}_127.0.0.1_{port}_0") as (path,):
        process = subprocess.Popen([sys.executable, "-c", MAPPED, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "mapped\n"
        assert remove_buffers(port) == [] and path.exists()
        process.communicate()  # its stdin ends, and it with that
        assert remove_buffers(port) == [path]


def test_a_process_removes_the_names_of_what_it_has_mapped():
    import mmap

    with files("0_own", "0_other") as (own, other):
        with own.open("r+b") as file:
            mapped = mmap.mmap(file.fileno(), 0)
        assert str(own) in unlink_own_buffers() and str(own) not in unlink_own_buffers()
        assert not own.exists() and other.exists() and mapped[0] == ord("0")
        mapped.close()


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed before an engine", "killed with an engine", "killed under our launcher"])
def test_none_is_left_by_a_job_whose_rank_was_killed(how, monkeypatch):
    port = free_port()
    monkeypatch.setattr("tests.dist.launcher.free_port", lambda: port)
    if how != "killed before an engine":  # what the rank itself has taken away is all there is
        monkeypatch.setattr("tests.dist.launcher.remove_buffers", lambda port: [])
    before = buffers()
    with files("0_another_job") as (other,):
        result = run_deepspeed_ranks("ds_killed.py", [how], timeout_s=120)
        assert other.exists()
    rows = result.check("started")
    assert result.returncode != 0, result.describe()
    # Under our launcher, or with an engine of PiKV, there is no name from the first on: only the memory of living processes.
    assert all(len(row["names"]) == (2 if how == "killed before an engine" else 0) for row in rows), rows
    left = {name for name in buffers() - before if f"_{port}_" in name}
    assert not left


def test_deepspeed_is_given_back_what_the_launcher_replaced():
    pytest.importorskip("deepspeed")
    from deepspeed.comm.torch import TorchBackend

    from pikv_ds.adapters.deepspeed.shm import leave_names, unlink_once_mapped

    host = TorchBackend.__init__
    assert unlink_once_mapped() and not unlink_once_mapped() and TorchBackend.__init__ is not host
    assert leave_names() and TorchBackend.__init__ is host and not leave_names()


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.skipif(not LONG, reason="under DeepSpeed's launcher, in the long form; the same ranks above")
def test_none_is_left_by_a_job_of_our_launcher(monkeypatch, tmp_path):
    port = free_port()
    monkeypatch.setattr("pikv_ds.launch.ranks.free_port", lambda: port)
    monkeypatch.setenv("PIKV_TEST_RESULTS", str(tmp_path))
    with pytest.raises(RanksFailed):
        run_ranks("tests.dist.jobs.ds_killed", ["killed before an engine"], 2)
    assert len(list(tmp_path.glob("rank*.jsonl"))) == 2
    assert not [name for name in buffers() if f"_{port}_" in name]
