from __future__ import annotations

from hypothesis import strategies as st

from tests.model_checker.world import World

from .base import Operation, draw_new, operation, running


@operation
class Append(Operation):
    """A chunk, or a few decode steps."""

    def possible(self, world: World) -> bool:
        return running(world)

    def apply(self, world: World, data: st.DataObject) -> None:
        counts = [len(rows) for rows in world.rows]
        if data.draw(st.booleans(), label="decode"):
            for _ in range(data.draw(st.integers(1, 5), label="steps")):
                world.forward([[1] * n for n in counts])
        else:
            world.forward(draw_new(world, data, counts, 9), left=data.draw(st.booleans()))
