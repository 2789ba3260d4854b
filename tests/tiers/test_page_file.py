"""A page file gives back what was written, or names what is wrong with it."""

import errno
import os
import stat

import numpy as np
import pytest

from pikv_ds.errors import CapacityError, PageFileError
from pikv_ds.tiers.file_io import FILE_IO, ThreadIO
from pikv_ds.tiers.page_file import HEAD, PageFile, Written
from tests.harness.driver import Driver, layer
from tests.harness.offloading import check_tiers, poison, tiered_pools, tiers
from tests.tiers.test_offload import grown

RECORD = 1000


def record(page: int, version: int = 0) -> np.ndarray:
    """Says which page and write it is in every byte."""
    return np.full(RECORD, (page * 7 + version * 31) % 251, dtype=np.uint8)


def filled(path, pages: int = 8) -> tuple[PageFile, list[Written]]:
    file = PageFile.create(path, RECORD, ThreadIO())
    return file, file.write(list(range(pages)), np.stack([record(page) for page in range(pages)]))


def patch(path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def test_what_is_written_is_read(tmp_path):
    file, pages = filled(tmp_path / "a")
    again = file.write([2, 5], np.stack([record(2, 1), record(5, 1)]))
    order = [pages[7], again[1], pages[0], again[0]]
    assert np.array_equal(file.read(order), np.stack([record(7), record(5, 1), record(0), record(2, 1)]))
    assert stat.S_IMODE(os.stat(tmp_path / "a").st_mode) == 0o600


def test_a_commit_survives_and_nothing_else(tmp_path):
    file, _ = filled(tmp_path / "a")
    file.commit()
    with pytest.raises(PageFileError, match="slot 3 is in the manifest"):
        file.write([3], record(3, 1)[None])
    file.write([8], record(8)[None])
    file.release([4])
    file.close()
    assert stat.S_IMODE(os.stat(tmp_path / "a.manifest").st_mode) == 0o600
    file = PageFile.open(tmp_path / "a", RECORD, ThreadIO())
    assert sorted(file.pages) == list(range(8)) and not file.dropped
    assert all(np.array_equal(file.read([page])[0], record(slot)) for slot, page in file.pages.items())


def _truncated(path, file):
    os.truncate(path, HEAD + 3 * file.stride + 100)


def _flipped(path, file):
    patch(path, HEAD + 3 * file.stride + 500, bytes([record(3)[500] ^ 4]))


def _swapped(path, file):
    with open(path, "rb") as whole:
        whole.seek(HEAD + 5 * file.stride)
        patch(path, HEAD + 3 * file.stride, whole.read(file.stride))


def _overwritten(path, file):
    patch(path, HEAD + 3 * file.stride, bytes(file.stride))


def _of_another_file(path, file):
    other, _ = filled(path.with_name("other"))
    with open(other.path, "rb") as whole:
        whole.seek(HEAD + 3 * file.stride)
        patch(path, HEAD + 3 * file.stride, whole.read(file.stride))


FAULTS = {
    "truncated": _truncated, "flipped": _flipped, "swapped": _swapped, "no mark": _overwritten, "of another file": _of_another_file,
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_what_does_not_check_is_named_and_not_served(name, tmp_path):
    file, pages = filled(tmp_path / "a")
    file.commit()
    FAULTS[name](tmp_path / "a", file)
    with pytest.raises(PageFileError, match=f"page 3 .*{name}"):
        file.read(pages[2:5])
    again = PageFile.open(tmp_path / "a", RECORD, ThreadIO())
    assert 3 not in again.pages and any("page 3 " in said and name in said for said in again.dropped)
    assert all(np.array_equal(again.read([page])[0], record(slot)) for slot, page in again.pages.items())


def test_an_earlier_write_is_stale(tmp_path):
    file, pages = filled(tmp_path / "a")
    with open(tmp_path / "a", "rb") as whole:
        whole.seek(HEAD + 3 * file.stride)
        before = whole.read(file.stride)
    written = file.write([3], record(3, 1)[None])
    patch(tmp_path / "a", HEAD + 3 * file.stride, before)
    with pytest.raises(PageFileError, match="page 3 is stale: it holds write 4, asked for is write 9"):
        file.read(written)


@pytest.mark.parametrize("fault", ["truncated", "flipped", "of another file", "missing"])
def test_manifests_and_heads_that_do_not_check(fault, tmp_path):
    file, _ = filled(tmp_path / "a")
    file.commit()
    manifest = tmp_path / "a.manifest"
    if fault == "truncated":
        os.truncate(manifest, 50)
    elif fault == "flipped":
        patch(manifest, 60, b"\x01")
    elif fault == "missing":
        manifest.unlink()
    else:
        other, _ = filled(tmp_path / "b")
        other.commit()
        os.replace(tmp_path / "b.manifest", manifest)
    with pytest.raises(PageFileError, match="manifest"):
        PageFile.open(tmp_path / "a", RECORD, ThreadIO())
    patch(tmp_path / "a", 9, b"\xff")
    with pytest.raises(PageFileError, match="head"):
        PageFile.open(tmp_path / "a", RECORD, ThreadIO())
    file, _ = filled(tmp_path / "c")
    file.commit()
    with pytest.raises(PageFileError, match=f"records of {RECORD} bytes"):
        PageFile.open(tmp_path / "c", RECORD + 8, ThreadIO())


# ---- a cache over it ---------------------------------------------------------------------------------------------------------

LAYERS = [layer(0, dim=16)]


@pytest.fixture
def offload(tmp_path):
    page = tiers(LAYERS, 12, 4)["device_gib"] / 12
    return tiers(LAYERS, 12, 4, host=0, nvme_path=str(tmp_path / "nvme"), nvme_gib=page * 40)


@pytest.mark.parametrize("host", [0, 5], ids=["file", "host memory and file"])
def test_a_cache_over_files_is_exact(host, offload, tmp_path):
    if host:
        offload |= {"host_gib": offload["nvme_gib"] / 40 * host}
    driver = grown(Driver(LAYERS, offload=offload), [90, 41])
    for _ in range(5):
        driver.decode()
        poison(driver)
    check_tiers(driver)
    folder = next((tmp_path / "nvme").glob("pikv-0-*"))
    assert {path.name for path in folder.iterdir()} == {"lock", "layer0.pages"}
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    driver.reset()
    assert not list(folder.glob("*.pages"))
    driver.cache.offload._folder.close()
    assert not folder.exists()


def test_folders_of_the_dead_are_removed_and_those_of_the_living_stay(offload, tmp_path):
    first = Driver(LAYERS, offload=offload)
    dead = tmp_path / "nvme" / "pikv-0-dead"
    dead.mkdir()
    (dead / "layer0.pages").write_bytes(b"x")
    second = Driver(LAYERS, offload=offload)
    assert not dead.exists()
    assert first.cache.offload._folder.path.exists() and second.cache.offload._folder.path.exists()


def test_a_page_that_was_changed_on_disk_ends_the_forward(offload):
    driver = grown(Driver(LAYERS, offload=offload), [90])
    poison(driver)  # nothing is staged
    store = tiered_pools(driver)[0].tier.store
    patch(store.path, HEAD + 2 * store.file.stride + 40, b"\x55\xaa")
    with pytest.raises(PageFileError, match="page 2 is flipped"):
        driver.decode()


@pytest.mark.parametrize("name", ["truncated", "flipped", "swapped"])
def test_a_section_that_is_not_what_was_written_is_named(name, offload):
    """Heads read what they chose of a page alone; what does not check is read as a whole page, which says what it is."""
    routing = {"method": "bounds", "budget_pages": 64, "sink_tokens": 4, "recent_tokens": 8}
    driver = grown(Driver(LAYERS, offload=offload, routing=routing), [90])
    pool = tiered_pools(driver)[0]
    poison(driver)
    driver.decode()
    assert pool.staged.sections == LAYERS[0].num_kv_heads > 1
    poison(driver)
    store = pool.tier.store
    if name == "flipped":
        patch(store.path, HEAD + 3 * store.file.stride + pool.fmt.head.end + 9, b"\x55\xaa\x11")
    elif name == "truncated":
        _truncated(store.path, store.file)
    else:
        _swapped(store.path, store.file)
    with pytest.raises(PageFileError, match=rf"page \d+ is {name}"):
        driver.decode()


def test_a_full_file_tier_is_named(offload):
    driver = Driver(LAYERS, offload=offload | {"nvme_gib": offload["nvme_gib"] / 20})
    with pytest.raises(CapacityError, match="pikv.offload.nvme_gib"):
        grown(driver, [200])


def test_a_full_disk_is_named_and_changes_nothing(offload, monkeypatch):
    driver, real = Driver(LAYERS, offload=offload), ThreadIO.write

    def full(self, at, blocks):
        if max(at) > HEAD + 20 * blocks.shape[1]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, at, blocks)

    monkeypatch.setitem(FILE_IO, "threads", type("Full", (ThreadIO,), {"write": full}))
    with pytest.raises(CapacityError, match="No space left on device"):
        grown(driver, [200])
    check_tiers(driver)
