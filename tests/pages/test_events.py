"""What watchers of pages are told is enough to know every page: kept up from events alone, it is what the pools hold."""

import pytest
import torch

from pikv_ds.pages.events import PageChange, PageMove, Written
from pikv_ds.pools import POOLS
from tests.aged import Aged
from tests.harness.driver import Driver, layer, ragged
from tests.harness.rebasing import svd
from tests.harness.windowed import run_mix

LAYERS = [layer(0, dim=16), layer(1, dim=16, window=20)]
RAW = {"raw_sink_tokens": 2, "raw_recent_tokens": 6}
CASES = {
    "one pool": {},
    "shards": {"num_shards": 4},
    "raw window": {"compression": RAW, "num_shards": 2},
    "three pools": {"compression": RAW, "pools": [{"method": "aged"}], "num_shards": 2},
    "evicted": {"scheduling": {"method": "h2o", "budget_tokens": 40, "sink_tokens": 2, "recent_tokens": 4}, "num_shards": 2},
    "evicted from three pools": {
        "compression": RAW,
        "pools": [{"method": "aged"}],
        "scheduling": {"method": "knorm", "budget_tokens": 40, "sink_tokens": 2, "recent_tokens": 4},
    },
    "bases": svd(rank=8),
}


class Mirror:
    """The position in every slot of a layer's pools, from events alone. [level][page][offset]."""

    def __init__(self, pages) -> None:
        self.pages, self.told = pages, {"wrote": 0, "rebuilt": 0, "rebased": 0, "moved": 0, "copied": 0, "freed": 0}
        self.start()
        for event in ("wrote", "rebuilt", "moved", "freed"):
            setattr(pages.events, event, (*getattr(pages.events, event), getattr(self, event)))

    def start(self) -> None:
        self.known: list[dict[int, dict[int, int]]] = [{} for _ in self.pages.pools]

    def wrote(self, layer: int, step, k, written: Written) -> None:
        self.told["wrote"] += 1
        assert layer == self.pages.index and k.shape[0] == step.positions.numel()
        self._put(0, written.slot_mapping, step.positions)

    def rebuilt(self, change: PageChange) -> None:
        assert change.layer == self.pages.index
        self.told["rebuilt" if change.basis is None else "rebased"] += 1
        if change.basis is None:
            self._put(change.level, change.entries.slot_mapping, change.entries.positions)
            return
        slots, positions = change.entries.slot_mapping.tolist(), change.entries.positions.tolist()
        assert [self._at(change.level, slot) for slot in slots] == positions, "in another basis entries stay where they are"

    def moved(self, move: PageMove) -> None:
        self.told["copied" if move.copied else "moved"] += 1
        pages = self.known[move.level]
        new = {target: dict(pages[source]) for source, target in zip(move.source.tolist(), move.target.tolist(), strict=True)}
        self.known[move.level] = pages | new if move.copied else new

    def freed(self, level: int, ids: torch.Tensor) -> None:
        self.told["freed"] += 1
        for page in ids.tolist():
            del self.known[level][page]

    def _put(self, level: int, slots, positions) -> None:
        size = self.pages.nearest.page_size
        for slot, position in zip(slots.tolist(), positions.tolist(), strict=True):
            if slot >= 0:
                self.known[level].setdefault(slot // size, {})[slot % size] = position

    def _at(self, level: int, slot: int) -> int:
        size = self.pages.nearest.page_size
        return self.known[level][slot // size][slot % size]

    def check(self, pools) -> None:
        for level, pool in enumerate(pools):
            used = {page for page in range(pool.num_pages) if int(pool.uses[page]) > 0}
            assert used == set(self.known[level]), f"pool {level}: pages in use"
            rows, tables = pool.counts.shape
            for row in range(rows):
                for table in range(tables):
                    found = [self._at(level, slot) for slot in pool.slots(row, table).tolist()]
                    assert found == pool.positions(row, table), f"pool {level}, row {row}, table {table}"


@pytest.mark.parametrize("name", CASES)
def test_events_are_enough(name, monkeypatch):
    monkeypatch.setitem(POOLS._classes, "aged", Aged)
    driver = Driver(LAYERS, page_size=4, placement="position", checks=[], **CASES[name])
    mirrors = [Mirror(pages) for pages in driver.cache.pages.layers]

    def follow(forward, mask):
        if driver.fresh:
            for mirror in mirrors:
                mirror.start()
        outputs = forward(mask)
        for i, mirror in enumerate(mirrors):
            mirror.check(driver.probe.pools(i))
        return outputs

    plain = driver.forward
    monkeypatch.setattr(driver, "forward", lambda mask: follow(plain, mask))
    run_mix(driver)
    driver.prefill([50, 33])
    driver.select([0, 0, 1])
    for _ in range(9):
        driver.decode()
    driver.forward(ragged([9, 14, 1]))
    told = {event: sum(mirror.told[event] for mirror in mirrors) for event in mirrors[0].told}
    always = {"wrote", "moved", "copied", "freed"}
    assert {event for event, count in told.items() if count} >= always, told
    assert (told["rebuilt"] > 0) == ("compression" in CASES[name] and name != "bases"), told
    assert (told["rebased"] > 0) == (name == "bases"), told
