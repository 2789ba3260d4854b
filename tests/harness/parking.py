"""A Driver whose rows are parked and come back: a row may begin as a parked one, or one of the last generation, up to some token."""

from __future__ import annotations

import torch

from pikv_ds.spec import LayerSpec
from tests.harness.driver import Driver
from tests.harness.invariants import parked_slots
from tests.reference_cache import Entry, ReferenceCache

Source = tuple[int, int]
"""(row, numbered as LocalStep.parent is; tokens that stay of it); (-1, 0): a new row."""


class ParkingReference(ReferenceCache):
    """Parked rows lie apart: they are no load, and no forward brings them tokens."""

    def restart(self, num_rows: int) -> None:
        super().restart(num_rows)
        self.parked: list[list[list[Entry]]] = [[] for _ in self.layers]
        self.parked_lens: list[int] = []

    @property
    def held(self) -> list[list[list[Entry]]]:
        return [rows + parked for rows, parked in zip(self.rows, self.parked, strict=True)]

    def change(self, rows: list[Source], parked: list[Source]) -> None:
        """Rows and parked rows continue these, numbered over both."""
        self.rows, self.lens = self.held, self.lens + self.parked_lens
        self.fork([parent for parent, _ in rows + parked])
        for row, (_, keep) in enumerate(rows + parked):
            self.crop(row, keep)
        active = len(rows)
        self.parked, self.parked_lens = [each[active:] for each in self.rows], self.lens[active:]
        self.rows, self.lens = [each[:active] for each in self.rows], self.lens[:active]


class ParkingDriver(Driver):
    def __init__(self, layers: list[LayerSpec], **options) -> None:
        self.kept: list[list[list]] = [[] for _ in layers]  # [layer][parked row]: as history
        super().__init__(layers, **options)
        own = self.reference
        self.reference = ParkingReference(
            layers, own.wanted, num_shards=own.num_shards, page_size=own.page_size, num_ranks=own.num_ranks,
            capacity_tokens=own.capacity_tokens,
        )  # fmt: skip

    def reset(self) -> None:
        super().reset()
        self.kept = [[] for _ in self.layers]

    @property
    def parked_lens(self) -> list[int]:
        return [len(row) for row in self.kept[0]]

    @property
    def held_lens(self) -> list[int]:
        """Tokens of every row that another one may begin as."""
        return self.lens + self.parked_lens

    def begin(self, rows: list[Source], park: list[Source] | None) -> None:
        """The rows of the next forward, and what is parked from then on; None: what is."""
        held = [own + kept for own, kept in zip(self.history or [[] for _ in self.layers], self.kept, strict=True)]
        stay = [(len(self.lens) + i, n) for i, n in enumerate(self.parked_lens)] if park is None else park
        self.changed, self.park = (rows, stay), park
        self.end_crops()
        self.history = [[each[parent][:keep] if parent >= 0 else [] for parent, keep in rows] for each in held]
        self.kept = [[each[parent][:keep] for parent, keep in stay] for each in held]
        self.fresh, self.touched = all(parent < 0 for parent, _ in rows), True
        self.parent, self.lens = [parent for parent, _ in rows], [keep for _, keep in rows]

    def _move_rows(self, num_rows: int) -> None:
        if not hasattr(self, "changed"):
            stay = [(len(self.reference.lens) + i, n) for i, n in enumerate(self.reference.parked_lens)]
            self.changed = [*zip(self.parent, self.lens, strict=True)], stay
        rows, stay = self.changed
        del self.changed
        if self.fresh and not stay:
            self.reference.restart(num_rows)
        elif self.fresh or self.touched:
            self.reference.change(rows, stay)


def check_parked(driver: ParkingDriver) -> None:
    """Parked rows hold the reference's entries, bit for bit, and their bytes are those of pages that no active row names."""
    alone = 0
    for i, spec in enumerate(driver.layers):
        pool, parked = driver.probe.near_pool(i), driver.reference.parked[i]
        slots = parked_slots(driver, i)
        assert len(slots) == len(parked) * pool.num_tables
        for at, slot in enumerate(slots):
            row, shard = divmod(at, pool.num_tables)
            entries = [entry for entry in parked[row] if entry.shard == shard]
            page, offset = slot // pool.page_size, slot % pool.page_size
            k, v, positions = (pool.fields[0][page, :, offset], pool.fields[1][page, :, offset], pool.fields[2][page, offset])
            assert positions.tolist() == [entry.position for entry in entries], f"layer {i}, parked row {row}, shard {shard}"
            if entries:
                assert torch.equal(k, torch.stack([entry.k for entry in entries]))
                assert spec.latent or torch.equal(v, torch.stack([entry.v for entry in entries]))
        named, active = set(pool.parked_table.flatten().tolist()) - {-1}, set(pool.page_table.flatten().tolist())
        alone += len(named - active) * pool.records.shape[1]
        table = pool.parked_table
        last = [table[row, shard, (n - 1) // pool.page_size] for row, shard, n in _open(driver, i)]
        assert all(int(pool.uses[page]) == 1 for page in last), "an open page of a parked row is shared"
    assert driver.probe.parked.nbytes == alone


def _open(driver: ParkingDriver, i: int) -> list[tuple[int, int, int]]:
    """(row, table, entries) of parked tables whose last page is not full."""
    counts = driver.probe.parked.counts
    found = counts[0][i].tolist() if counts else []
    return [(row, at, n) for row, each in enumerate(found) for at, n in enumerate(each) if n % driver.cache.page_size]
