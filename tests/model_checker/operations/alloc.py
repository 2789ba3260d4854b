from __future__ import annotations

from hypothesis import strategies as st

from tests.model_checker.world import Change, World

from .base import MAX_ROWS, Operation, draw_new, operation


@operation
class Alloc(Operation):
    """New requests in place of all rows; what is parked stays."""

    def possible(self, world: World) -> bool:
        return True

    def apply(self, world: World, data: st.DataObject) -> None:
        counts = [data.draw(st.integers(1, MAX_ROWS), label="rows") for _ in range(world.num_sources)]
        world.forward(draw_new(world, data, counts, 18), [Change(rows=[(-1, 0)] * n) for n in counts], left=data.draw(st.booleans()))
