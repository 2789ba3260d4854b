from __future__ import annotations

from hypothesis import strategies as st

from pikv_ds.errors import MigrationError, PeerError
from tests.harness.invariants import check_pages
from tests.migration.simulated import Fault, Killed, run_ranks
from tests.model_checker import checks
from tests.model_checker.world import World

from .base import Operation, operation, running
from .migrate import draw_holders

HOW = ("before it sends", "after it has sent", "lost")


@operation
class Fail(Operation):
    """A rank dies before or after it has sent some message of a move or of a forward, or that message does not reach a rank."""

    def possible(self, world: World) -> bool:
        return world.size > 1 and running(world) and not any(world.parked)

    def apply(self, world: World, data: st.DataObject) -> None:
        how, victim = data.draw(st.sampled_from(HOW), label="how"), data.draw(st.integers(0, world.size - 1), label="rank")
        lost = how == "lost"
        fault = Fault(
            data.draw(st.integers(0, 4), label="message"), None if lost else victim, how == HOW[1], (victim,) if lost else ()
        )  # fmt: skip
        moves = not world.moving and data.draw(st.booleans(), label="in a move")
        before = [cache.map.holders for cache in world.caches]
        if moves:
            wanted = draw_holders(world, data)
            work = lambda rank: world.caches[rank].rebalance(wanted)  # noqa: E731
        else:
            wanted = before[0]
            if world.moving:
                wanted = tuple(tuple(world.caches[0].migration.wanted.holders)[shard] for shard in range(len(before[0])))
            steps = world.prepared([[1] * len(rows) for rows in world.rows], None)
            work = lambda rank: world.run(rank, steps[rank])  # noqa: E731
        world.network.arm(fault)
        ended = run_ranks(world.network, work)
        world.network.fault = None
        if not any(isinstance(one, BaseException) for one in ended):
            assert not world.network.happened or not lost
            if not moves:
                world.settle(ended)
            return
        self.settle(world, ended, wanted, entries_hold=moves)

    def settle(self, world: World, ended: list, wanted: tuple, *, entries_hold: bool) -> None:
        """Survivors hear an error by name and agree on the map. entries_hold: no forward broke off, so every shard is as it was."""
        left = [rank for rank, one in enumerate(ended) if not isinstance(one, Killed)]
        for rank in left:
            one = ended[rank]
            if isinstance(one, BaseException) and not isinstance(one, (PeerError, MigrationError)):
                raise AssertionError(f"rank {rank} ended with {one!r}") from one
        committed = any(world.caches[rank].map.holders == wanted for rank in left)
        for rank in left:
            migration = world.caches[rank].migration
            if migration.in_doubt is not None:
                migration.resolve(committed=committed)
            migration.cancel()
        maps = {world.caches[rank].map.holders for rank in left}
        assert len(maps) == 1, f"a mixed state: {maps}"
        for rank in left:
            probe = world.probes[rank]
            assert all(one is world.caches[rank].map for one in probe.shard_maps)
            for pool in probe.all_pools:
                check_pages(pool, shrunk=entries_hold)
            if entries_hold:
                self._same(world, rank)
        world.broken, world.survivors = True, len(left)

    @staticmethod
    def _same(world: World, rank: int) -> None:
        probe = world.probes[rank]
        for i, spec in enumerate(world.layers):
            for row in range(len(world.reference.lens)):
                for at, shard in enumerate(probe.local_shards):
                    found = probe.near_pool(i).entries(row, at)
                    checks.compare(
                        f"rank {rank}, layer {i}, row {row}, shard {shard}",
                        world.reference.shard_entries(i, row, shard),
                        *found,
                        spec.latent,
                    )
