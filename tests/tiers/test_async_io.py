"""Page files through DeepSpeed's async_io op: the same files as by threads, and refused by name where it can't be had."""

import importlib.util
import os

import numpy as np
import pytest
import torch

from pikv_ds.errors import CapacityError, PageFileError, UnsupportedError
from pikv_ds.tiers import file_io
from pikv_ds.tiers.file_io import FILE_IO, ThreadIO, served
from pikv_ds.tiers.page_file import HEAD, PageFile
from tests.harness.driver import Driver, layer
from tests.harness.offloading import check_tiers, poison, tiered_pools, tiers
from tests.long_form import LONG
from tests.tiers.test_offload import grown
from tests.tiers.test_page_file import FAULTS, RECORD, record

LAYERS = [layer(0, dim=16)]


def op_is_here() -> str:
    """Why it is not, in words; empty where it is."""
    if importlib.util.find_spec("deepspeed") is None:
        return "deepspeed is not installed"
    from pikv_ds.adapters.deepspeed.async_io import refusal

    return refusal() or ("" if LONG else "DeepSpeed compiles the op for minutes: the long form does")


needs_op = pytest.mark.skipif(bool(op_is_here()), reason=op_is_here() or "the op is here")


@pytest.fixture
def folder(tmp_path):
    """Direct transfers need a disk; the system's temporary folder may lie in memory."""
    return tmp_path


def filled(path, io: str) -> PageFile:
    file = PageFile.create(path, RECORD, FILE_IO[served(io)]())
    file.write([0, 1, 2, 5, 7], np.stack([record(page) for page in (0, 1, 2, 5, 7)]))
    file.commit()
    return file


@needs_op
@pytest.mark.parametrize(("writes", "reads"), [("async_io", "threads"), ("threads", "async_io"), ("async_io", "async_io")])
def test_one_way_reads_what_the_other_has_written(writes, reads, folder):
    filled(folder / "a", writes).close()
    file = PageFile.open(folder / "a", RECORD, FILE_IO[served(reads)]())
    assert sorted(file.pages) == [0, 1, 2, 5, 7] and not file.dropped
    found = file.read([file.pages[slot] for slot in (7, 1, 2, 0)])
    assert np.array_equal(found, np.stack([record(page) for page in (7, 1, 2, 0)]))
    memory, at = torch.zeros(3 * 100, dtype=torch.uint8), HEAD + file.stride * torch.tensor([2, 0, 40]) + 77
    crc = file.io.read_parts(at, 100, memory, torch.tensor([100, 0, 200]))
    assert memory[:200].tolist() == [*record(0)[:100], *record(2)[:100]] and crc[2] == -1
    assert crc[:2].tolist() == [int(torch.ops.pikv.crc32(memory, torch.tensor([i]), None, 100)) for i in (100, 0)]


@needs_op
@pytest.mark.parametrize("name", FAULTS)
def test_what_does_not_check_is_named(name, folder):
    file = PageFile.create(folder / "a", RECORD, FILE_IO[served("async_io")]())
    pages = file.write(list(range(8)), np.stack([record(page) for page in range(8)]))
    FAULTS[name](folder / "a", file)
    with pytest.raises(PageFileError, match=f"page 3 .*{name}"):
        file.read(pages[2:5])


@needs_op
def test_a_full_disk_is_an_error_and_not_the_end(folder, monkeypatch):
    file = filled(folder / "a", "async_io")

    def full(*args):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left on device"):
        file.write([9], record(9)[None])


@needs_op
@pytest.mark.parametrize("io", ["async_io", "auto"])
def test_a_cache_over_files_is_exact(io, folder):
    page = tiers(LAYERS, 12, 4)["device_gib"] / 12
    offload = tiers(LAYERS, 12, 4, host=0, nvme_path=str(folder / "nvme"), nvme_gib=page * 40, nvme_io=io)
    driver = grown(Driver(LAYERS, offload=offload), [90, 41])
    assert driver.cache.offload.io == "async_io"
    for _ in range(5):
        driver.decode()
        poison(driver)
    check_tiers(driver)
    with pytest.raises(CapacityError, match="pikv.offload.nvme_gib"):
        grown(driver, [300])
    routing = {"method": "bounds", "budget_pages": 64, "sink_tokens": 4, "recent_tokens": 8}
    driver = grown(Driver(LAYERS, offload=offload, routing=routing), [90, 41])
    driver.decode()
    assert tiered_pools(driver)[0].bytes_fetched


@pytest.mark.parametrize("missing", ["libaio", "deepspeed"])
def test_without_it_the_name_is_refused_and_auto_means_threads(missing, monkeypatch, folder):
    def imported(name):
        if missing == "deepspeed":
            raise ModuleNotFoundError("No module named 'deepspeed'", name="deepspeed")
        return type("Adapter", (), {"refusal": staticmethod(lambda: "it needs libaio")})

    monkeypatch.setattr(file_io, "import_module", imported)
    monkeypatch.setattr(file_io, "FILE_IO", {"threads": ThreadIO})
    assert served("auto") == served("threads") == "threads"
    offload = tiers(LAYERS, 12, 4, host=0, nvme_path=str(folder), nvme_gib=1.0, nvme_io="async_io")
    with pytest.raises(UnsupportedError, match=rf"pikv.offload.nvme_io = 'async_io': it needs {missing}.*set 'threads' or 'auto'"):
        Driver(LAYERS, offload=offload)
    assert Driver(LAYERS, offload=offload | {"nvme_io": "auto"}).cache.offload.io == "threads"
