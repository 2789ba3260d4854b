from __future__ import annotations

from hypothesis import strategies as st

from tests.model_checker.world import Change, World

from .base import MAX_ROWS, Operation, draw_new, draw_sources, operation, running


@operation
class Park(Operation):
    """Rows begin as rows that ran or were parked, up to some token, or new; others are parked, or those that are."""

    def possible(self, world: World) -> bool:
        return world.flavour == "parks" and running(world)

    def apply(self, world: World, data: st.DataObject) -> None:
        changes = []
        anew = data.draw(st.booleans(), label="park anew")
        for rows, parked in zip(world.rows, world.parked, strict=True):
            lengths = [row.length for row in (*rows, *parked)]
            begun = draw_sources(data, lengths, 0, MAX_ROWS - 1, crops=True) + [(-1, 0)] * data.draw(st.integers(0, 1), label="new rows")
            park = draw_sources(data, lengths, 0, 2, crops=True) if anew else None
            changes.append(Change(rows=begun or [(-1, 0)], park=park))
        world.forward(draw_new(world, data, [len(change.rows) for change in changes], 7), changes)
