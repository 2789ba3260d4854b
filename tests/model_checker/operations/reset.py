from __future__ import annotations

from hypothesis import strategies as st

from tests.model_checker.world import World

from .base import Operation, operation


@operation
class Reset(Operation):
    """Everything is dropped and all memory returned, on all ranks."""

    def possible(self, world: World) -> bool:
        return not world.fresh

    def apply(self, world: World, data: st.DataObject) -> None:
        world.on_ranks(lambda rank: world.caches[rank].reset())
        world.reference.restart(0)
        world.rows, world.parked = ([[] for _ in range(world.num_sources)] for _ in range(2))
        world.moving = False
        assert all(probe.bytes == 0 for probe in world.probes), "memory was not returned"
