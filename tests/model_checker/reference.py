"""The loop reference with a budget: what is evicted is taken over from the cache, after it was shown to be allowed."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import ceil

from tests.harness.parking import ParkingReference, Source

Held = Callable[[int, int, int], list[int]]
"""(layer, row, shard) -> positions that the cache holds, in the order of its slots."""


class ModelReference(ParkingReference):
    """Parked rows of ParkingReference, and how many entries a budget has taken of every row."""

    def restart(self, num_rows: int) -> None:
        super().restart(num_rows)
        self.lost = [[0] * num_rows for _ in self.layers]
        self.evicted = 0

    def change(self, rows: list[Source], parked: list[Source]) -> None:
        self.lost = [[of_layer[parent] if parent >= 0 else 0 for parent, _ in rows] for of_layer in self.lost]
        super().change(rows, parked)

    def capacity(self, layer: int) -> int:
        if self.capacity_tokens is not None:
            return self.capacity_tokens
        visible = sum(self.layers[layer].tokens_kept(n) for n in self.lens) - sum(self.lost[layer])
        return ceil(Fraction(11, 10) * visible / self.num_shards) + self.page_size

    def take_over(self, held: Held, *, budget: int, sinks: int, recent: int) -> None:
        """What a forward has evicted. Raises: AssertionError for an entry that must stay, a part of a page, or a row over its budget."""
        size = self.page_size
        for i, spec in enumerate(self.layers):
            for row, length in enumerate(self.lens) if spec.window is None else ():
                kept, could_go = 0, 0
                for shard in range(self.num_shards):
                    mine = self.shard_entries(i, row, shard)
                    there = held(i, row, shard)
                    left = set(there)
                    pages = [mine[at : at + size] for at in range(0, len(mine), size)]
                    gone = [page for page in pages if not left & {e.position for e in page}]
                    stay = [e.position for page in pages if page not in gone for e in page]
                    assert stay == there, f"layer {i}, row {row}, shard {shard}: not whole pages were evicted"
                    for page in gone:
                        self._check_may_go(page, size, length, sinks, recent, f"layer {i}, row {row}, shard {shard}")
                        dropped = {e.position for e in page}
                        self.rows[i][row][:] = [e for e in self.rows[i][row] if e.position not in dropped]
                        self.lost[i][row] += size
                        self.evicted += size
                    kept += len(there)
                    could_go += sum(self._may_go(page, size, length, sinks, recent) for page in pages if page not in gone)
                assert kept <= budget or not could_go, f"layer {i}, row {row}: {kept} entries are kept of a budget of {budget}"

    @staticmethod
    def _may_go(page: list, size: int, length: int, sinks: int, recent: int) -> bool:
        return len(page) == size and all(sinks <= e.position < length - recent for e in page)

    def _check_may_go(self, page: list, size: int, length: int, sinks: int, recent: int, where: str) -> None:
        assert self._may_go(page, size, length, sinks, recent), f"{where}: a pinned or open page was evicted: {[e.position for e in page]}"
