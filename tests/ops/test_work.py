"""How the work of a decode is shared out: Python and C++ alike, and evenly enough."""

import ctypes
import itertools
import shutil

import pytest

from pikv_ds.ops.nvrtc.params import Attend
from pikv_ds.ops.nvrtc.work import share_work
from tests.ops import wave_efficiency
from tests.ops.kernel_text import compile_kernels

SHARED = ("unit", "workers", "splits", "least")


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_python_and_cpp_share_alike(tmp_path):
    library = compile_kernels(tmp_path / "build")
    function = library.pikv_share_work
    function.restype, function.argtypes = ctypes.c_longlong, (ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)
    seen = set()
    for requests, queries, group, block, columns, splits, page_lse in itertools.product(
        (1, 7, 64), (1, 300), (1, 12), (5, 8, 64, 128), (0, 3, 4096), (0, 3), (None, 1)
    ):
        options = {"R": requests, "T": queries, "S": 2, "H": 3, "G": group, "num_columns": columns, "page_lse": page_lse}
        ours, theirs = Attend(**options), Attend(**options)
        ours.block = theirs.block = block
        parts = share_work(ours, 4, 396, splits)
        assert parts == function(ctypes.addressof(theirs), 4, 396, splits)
        found = tuple(getattr(ours, name) for name in SHARED)
        assert found == tuple(getattr(theirs, name) for name in SHARED), options
        seen.add((ours.workers > 0, ours.splits > 1))
    assert seen == {(False, False), (True, False), (False, True)}


def test_the_work_is_even():
    """92 % of the multiprocessors' time, batches of 1 to 64, pages of 16 to 128, lengths alike or not."""
    rows = wave_efficiency.rows()
    assert {(row["tier"], row["lengths"]) for row in rows} == set(
        itertools.product(wave_efficiency.TIERS, ("even", "ragged", "two lengths", "one long"))
    )
    low = [row for row in rows if row["least"] < 0.92]
    assert not low, low
