from __future__ import annotations

from hypothesis import strategies as st

from tests.model_checker.world import SHARDS, World

from .base import Operation, operation


def draw_holders(world: World, data: st.DataObject) -> tuple[tuple[int, ...], ...]:
    """Another map: every rank as many shards."""
    homes = [rank for rank in range(world.size) for _ in range(SHARDS // world.size)]
    present = world.caches[0].map.holders
    drawn = data.draw(st.permutations(homes).filter(lambda order: tuple((rank,) for rank in order) != present), label="homes")
    return tuple((rank,) for rank in drawn)


@operation
class Migrate(Operation):
    """Shards change ranks: at once, or beside the forwards that follow; or a move under way is cancelled."""

    def possible(self, world: World) -> bool:
        return world.size > 1 and not world.fresh and not any(world.parked)

    def apply(self, world: World, data: st.DataObject) -> None:
        if world.moving:
            world.on_ranks(lambda rank: world.caches[rank].cancel_rebalance())
            world.moving = False
            return
        holders, ahead = draw_holders(world, data), data.draw(st.sampled_from([None, 300, 3000]), label="bytes per step")
        assert all(world.on_ranks(lambda rank: world.caches[rank].rebalance(holders, bytes_per_step=ahead)))
        world.moving = ahead is not None
        assert world.moving or world.caches[0].map.holders == holders
