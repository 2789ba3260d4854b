from __future__ import annotations

from hypothesis import strategies as st

from tests.model_checker.world import World

from .base import MAX_TOKENS, Operation, operation, running


@operation
class Evict(Operation):
    """Decode steps until some row is over its budget and loses pages (world.py takes over what has gone)."""

    def possible(self, world: World) -> bool:
        return world.budget is not None and running(world)

    def apply(self, world: World, data: st.DataObject) -> None:
        before = world.reference.evicted
        while world.reference.evicted == before and world.longest < MAX_TOKENS + world.page_size:
            world.forward([[1] * len(rows) for rows in world.rows])
