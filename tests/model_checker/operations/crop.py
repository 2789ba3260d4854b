from __future__ import annotations

from hypothesis import strategies as st

from tests.model_checker.world import Change, World

from .base import MAX_ROWS, Operation, draw_new, operation, running


@operation
class Crop(Operation):
    """Rows are forked and lose tokens, no further than a window or a budget allows."""

    def possible(self, world: World) -> bool:
        return running(world)

    def apply(self, world: World, data: st.DataObject) -> None:
        changes = []
        first = 0
        for rows in world.rows:
            parents = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=MAX_ROWS), label="parents")
            limits = [self.least(world, first + parent) for parent in parents]
            kept = [data.draw(st.integers(least, rows[p].length), label="kept") for p, least in zip(parents, limits, strict=True)]
            changes.append(Change(rows=list(zip(parents, kept, strict=True))))
            first += len(rows)
        world.forward(draw_new(world, data, [len(change.rows) for change in changes], 5), changes)

    @staticmethod
    def least(world: World, row: int) -> int:
        """Tokens that a crop must leave, by the numbering of the reference: what has left a window or a budget can't come back."""
        crops = world.caches[0].pages.crops
        window = min((spec.window for spec in world.layers if spec.window is not None), default=None)
        expired = crops.expired_at.values[row]
        return max(crops.evicted_at.values[row], 0 if window is None or expired < window else expired)
