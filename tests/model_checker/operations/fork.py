from __future__ import annotations

from hypothesis import strategies as st

from tests.model_checker.world import Change, World

from .base import MAX_ROWS, Operation, draw_new, draw_sources, operation, running


@operation
class Fork(Operation):
    """Rows go on as some of the rows, whole; others end."""

    def possible(self, world: World) -> bool:
        return running(world)

    def apply(self, world: World, data: st.DataObject) -> None:
        changes = [Change(rows=draw_sources(data, [row.length for row in rows], 1, MAX_ROWS, crops=False)) for rows in world.rows]
        counts = [len(change.rows) for change in changes]
        decode = data.draw(st.booleans(), label="decode")
        world.forward([[1] * n for n in counts] if decode else draw_new(world, data, counts, 5), changes)
