"""Fixtures shared by all tests."""

import os
import sys
from collections import Counter

import pytest
from hypothesis import settings

from tests.long_form import LONG

pytest.register_assert_rewrite(*(f"tests.harness.{name}" for name in ("checks", "evicting", "invariants", "windowed")))

# Tests share their machine with others: a slow example is no failure.
settings.register_profile("pikv", deadline=None)
settings.load_profile("pikv")


@pytest.fixture(scope="module")
def nan_filled_empty():
    """torch.empty and its kin give NaN (floats) or the largest integer: reading what nobody wrote shows at once."""
    import torch

    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(was)


def pytest_configure(config) -> None:
    """What DeepSpeed builds for the tests lies in our own folder, where no other environment builds over it."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):  # not in the process that only hands out tests
        from pikv_ds.ops.build.torch_builds import own_folder

        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(own_folder()))
    if not LONG:  # what compiles the CUDA kernels, or emulates them, would take minutes more
        os.environ.setdefault("PIKV_CUDA_WIDTHS", "64,128")


def pytest_collection_modifyitems(config, items) -> None:
    """With several workers: files with slow tests first, of these and of the others those with most cases. A long one that is started
    last leaves the other workers idle. (launch/test.sh: --no-loadscope-reorder, or the order would be by the number of cases alone.)"""
    if not hasattr(config, "workerinput"):
        return
    cases, slow = Counter(item.path for item in items), {item.path for item in items if any(map(item.get_closest_marker, ("slow", "dist")))}
    items.sort(key=lambda item: (item.path not in slow, -cases[item.path], item.path))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """One file at a time on each worker, but all of tests/megatron on one: every worker that starts its jobs makes the processes which
    import Megatron-Core for them (dist/warm.py), seconds each."""
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/megatron" if nodeid.startswith("tests/megatron/") else super()._split_scope(nodeid)

    return Files(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_sessionfinish() -> None:
    """Tests that start DeepSpeed in this process leave its buffers in shared memory."""
    if "deepspeed" in sys.modules:
        from pikv_ds.adapters.deepspeed.shm import unlink_own_buffers

        unlink_own_buffers()
