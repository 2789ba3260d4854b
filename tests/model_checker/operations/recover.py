from __future__ import annotations

from hypothesis import strategies as st

from tests.model_checker.world import SHARDS, World

from .base import Operation, operation


@operation
class Recover(Operation):
    """Survivors make another group and new caches on it: as many ranks as shards can be dealt out to. Their requests begin anew."""

    mends = True

    def possible(self, world: World) -> bool:
        return world.broken

    def apply(self, world: World, data: st.DataObject) -> None:
        world.build(max(size for size in range(1, world.survivors + 1) if SHARDS % size == 0))
