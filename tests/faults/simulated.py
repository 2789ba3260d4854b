"""Faults in forwards on simulated ranks, one a run: what every rank ended with, and that nothing it gave out before differs from the run
without the fault."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch

from pikv_ds.cache import PiKVCache
from pikv_ds.cache import cache as cache_module
from pikv_ds.config import PiKVConfig
from pikv_ds.errors import CapacityError, ConfigError, CorruptedError, MigrationError, PeerError
from tests.migration.moving import BLOCKS
from tests.migration.simulated import Fault, Killed, Network, Seat, SimulatedExchange, run_ranks
from tests.recorded import host_core

SHARDS, DECODES = 8, 6
KINDS: dict[str, Callable[[Scene], str]] = {}


def kind(function: Callable[[Scene], str]) -> Callable[[Scene], str]:
    """A fault: breaks a scene, checks what came of it, returns in a word what that was."""
    KINDS[function.__name__.replace("_", " ")] = function
    return function


class Player(host_core.Run):
    """broken: told of (layer index, q, k, v) of every layer before the cache is; what it returns is given to the cache."""

    broken: Callable | None = None

    def _draw(self, layer, columns):
        drawn = super()._draw(layer, columns)
        return drawn if self.broken is None else self.broken(self, layer, *drawn)


@dataclass
class Scene:
    seed: int
    world: int = 2
    requests: str = "distinct"
    block: dict = field(default_factory=dict)
    network: Network | None = None
    players: dict[int, Player] = field(default_factory=dict)

    @classmethod
    def drawn(cls, seed: int) -> Scene:
        draw = random.Random(f"scene {seed}")
        return cls(seed, draw.choice((2, 2, 4)), draw.choice(("replicated", "distinct")), dict(draw.choice(BLOCKS)))

    def __post_init__(self) -> None:
        self.draw = random.Random(f"fault {self.seed}")

    @property
    def rank(self) -> int:
        """The one that something happens to."""
        return self.seed % self.world

    def begin(self, of_rank: Callable[[int], dict] = lambda rank: {}) -> Scene:
        """of_rank: what is in this rank's block besides."""
        self.network = Network(self.world)

        def one(rank: int) -> None:
            mine = of_rank(rank)
            storage = {"requests": self.requests, "num_shards": SHARDS, **mine.get("storage", {})}
            config = PiKVConfig(**{"page_size": 4} | self.block | mine | {"storage": storage})
            layers, seat = [host_core.spec(0, "full"), host_core.spec(1, "window")], Seat(self.network, rank)
            cache = PiKVCache(
                layers, config, num_experts=host_core.EXPERTS, dtype=torch.float32, device=torch.device("cpu"), group=seat
            )  # fmt: skip
            self.players[rank] = Player(cache, config, seat)

        with patch.object(cache_module, "Exchange", SimulatedExchange):
            assert run_ranks(self.network, one) == [None] * self.world
        return self

    def play(self, fault: Fault | None = None, work: Callable[[Player], None] | None = None) -> list[Any]:
        """Requests of drawn lengths, and some tokens more: what every rank ended with."""
        draw = random.Random(self.seed + 1)
        lengths = [draw.randrange(20, 90) for _ in range(self.world)]

        def run(rank: int) -> None:
            player = self.players[rank]
            player.prefill(lengths)
            player.decode(DECODES) if work is None else work(player)

        self.network.arm(fault)
        return run_ranks(self.network, run)

    def same(self) -> Scene:
        return Scene(self.seed, self.world, self.requests, self.block).begin()

    def compare(self, plain: Scene, *, whole: bool = False) -> None:
        """What ranks gave out is, as far as it goes, what they give out without a fault, bit for bit."""
        for rank, player in self.players.items():
            wanted = plain.players[rank].outputs
            assert len(player.outputs) <= len(wanted) and (not whole or len(player.outputs) == len(wanted)), "a forward too many"
            for i, (a, b) in enumerate(zip(player.outputs, wanted, strict=False)):
                assert torch.equal(a, b), f"rank {rank}: output {i} is silently another"


def named(ended: list[Any], *errors: type[BaseException], rank: int | None = None) -> None:
    """Every rank but `rank` ended with one of these."""
    for at, how in enumerate(ended):
        assert at == rank or isinstance(how, errors), f"rank {at} ended with {how!r}"


def baseline(scene: Scene) -> tuple[Scene, list[str]]:
    plain = scene.same()
    assert plain.play() == [None] * scene.world
    return plain, plain.network.said


@kind
def rank_killed(scene: Scene) -> str:
    plain, said = baseline(scene)
    others = [rank for rank in range(scene.world) if rank != scene.rank]
    sent = scene.draw.random() < 0.5
    deaf = tuple(scene.draw.sample(others, scene.draw.randrange(len(others) + 1))) if sent else ()
    ended = scene.begin().play(Fault(scene.draw.randrange(len(said)), scene.rank, sent, deaf))
    assert isinstance(ended[scene.rank], Killed)
    # who has got every message of the last forward may end it
    for rank in others:
        assert ended[rank] is None or isinstance(ended[rank], PeerError), ended
    scene.compare(plain)
    return "PeerError"


@kind
def message_lost(scene: Scene) -> str:
    plain, said = baseline(scene)
    ended = scene.begin().play(Fault(scene.draw.randrange(len(said)), None, False, (scene.rank,)))
    assert isinstance(ended[scene.rank], PeerError), ended
    assert all(how is None or isinstance(how, PeerError) for how in ended), ended
    scene.compare(plain)
    return "PeerError"


@kind
def message_late(scene: Scene) -> str:
    plain, said = baseline(scene)
    at, waits = scene.draw.randrange(len(said)), scene.draw.uniform(0, 0.1)
    scene.begin()
    meet, count = scene.network.meet, [0]

    def late(rank: int, what: str, payload: Any) -> list[Any]:
        if rank == scene.rank:
            count[0] += 1
            if count[0] == at:
                time.sleep(waits)
        return meet(rank, what, payload)

    scene.network.meet = late
    assert scene.play() == [None] * scene.world
    scene.compare(plain, whole=True)
    return "as without"


@kind
def nan_in_keys(scene: Scene) -> str:
    """Of one token of one row: all other rows are as without it. Some kernels leave an entry out whose score is not a number."""
    return _not_a_number(scene, 1)


@kind
def nan_in_values(scene: Scene) -> str:
    return _not_a_number(scene, 2)


def _not_a_number(scene: Scene, which: int) -> str:
    scene.requests, scene.block = "distinct", {}
    plain, _ = baseline(scene)
    scene.begin()

    def broken(player, layer, *drawn):
        if player.rank == scene.rank and player.forwards == 1 and layer.layer_idx == 0:
            drawn[which][0, -1] = torch.nan
        return drawn

    for player in scene.players.values():
        player.broken = broken
    assert scene.play() == [None] * scene.world
    for rank, player in scene.players.items():
        pairs = list(zip(player.outputs, plain.players[rank].outputs, strict=True))
        if rank != scene.rank:
            assert all(torch.equal(a, b) for a, b in pairs), f"rank {rank}: a row of another rank's is another"
    after = scene.players[scene.rank].outputs[-3]  # out of the full layer in the last decode step
    if bool(after.isfinite().all()):
        assert which == 1, "a value that is not a number was read and left no trace"
        return "the entry is left out"
    return "in its row"


@kind
def capacity_exhausted(scene: Scene) -> str:
    scene.block = {}
    plain, _ = baseline(scene)
    tokens = scene.draw.randrange(4, 12)
    scene.begin(lambda rank: {"storage": {"capacity_tokens": tokens, "overflow": scene.draw.choice(("spill", "error"))}})
    one = scene.players[0].cache.config.storage.overflow
    scene.begin(lambda rank: {"storage": {"capacity_tokens": tokens, "overflow": one}})
    named(scene.play(), CapacityError)
    scene.compare(plain)
    return "CapacityError"


@kind
def other_configuration(scene: Scene) -> str:
    scene.block = {}
    name, other = scene.draw.choice(
        [("page_size", {"page_size": 8}), ("num_shards", {"storage": {"num_shards": 4}}), ("method", {"compression": {"method": "int8"}}),
         ("page_size", {"page_size": 16}), ("capacity_tokens", {"storage": {"capacity_tokens": 4000}})]
    )  # fmt: skip
    if "compression" in other:
        other = other | {"page_size": 32, "compression": {"method": "int8", "group": 32}}
    ended = scene.begin(lambda rank: other if rank == scene.rank else {}).play()
    named(ended, ConfigError)
    assert all("not alike" in str(how) for how in ended), ended
    assert any(name in str(how) or "page_size" in str(how) for how in ended), (name, ended)
    return "ConfigError"


@kind
def other_weights(scene: Scene) -> str:
    """Ranks with the same tokens whose keys differ are not taken for replicas: each keeps its own."""
    scene.requests = "auto"
    scene.begin()

    def broken(player, layer, q, k, v, ids):
        return (q, k * (1.001 if player.rank == scene.rank else 1.0), v, ids)

    for player in scene.players.values():
        player.broken = broken
    assert scene.play() == [None] * scene.world
    assert all(player.cache.agreement.mode == "distinct" for player in scene.players.values())
    return "distinct"


@kind
def allocator_corrupted(scene: Scene) -> str:
    """storage.audit finds it in the forward in which it happens, and the other ranks hear of it."""
    plain, _ = baseline(scene)
    scene.begin(lambda rank: {"storage": {"audit": True}})
    how = scene.draw.choice(("count of uses", "free stack", "table"))

    def work(player: Player) -> None:
        player.decode(2)
        if player.rank == scene.rank:
            pool = player.cache.pages.layers[0].nearest
            page = int(pool.table.ids[pool.table.ids >= 0][0])
            if how == "count of uses":
                pool.allocator.refcount[page] += 1
            elif how == "free stack":
                pool.allocator.free_top += 1
            else:
                row, of_row, column = torch.nonzero(pool.table.ids >= 0)[-1].tolist()
                pool.table.ids[row, of_row, column] = (
                    pool.num_pages - 1 if int(pool.table.ids[row, of_row, column]) != pool.num_pages - 1 else 0
                )
        player.decode(3)

    ended = scene.play(work=work)
    assert isinstance(ended[scene.rank], CorruptedError), ended
    named(ended, PeerError, rank=scene.rank)
    return "CorruptedError"


@kind
def no_memory_in_a_move(scene: Scene) -> str:
    plain, _ = baseline(scene)
    scene.begin()
    homes = [rank for rank in range(scene.world) for _ in range(SHARDS // scene.world)]
    scene.draw.shuffle(homes)
    what = scene.draw.choice(("leaving", "arrived", "prepare"))
    from pikv_ds.migration import transaction

    real = getattr(transaction, what)

    def failing(pages, *args):
        if pages.map.rank == scene.rank:
            raise MemoryError("none left")
        return real(pages, *args)

    def work(player: Player) -> None:
        player.decode(2)
        try:
            moved = player.cache.rebalance(tuple((rank,) for rank in homes))
        except MigrationError:
            moved = False
        assert not moved or homes == sorted(homes)
        player.decode(DECODES - 2)

    with patch(f"pikv_ds.migration.migration.{what}", failing):
        assert scene.play(work=work) == [None] * scene.world
    scene.compare(plain, whole=True)
    return "MigrationError"


@kind
def interrupted(scene: Scene) -> str:
    """One rank leaves in the middle of a forward by Ctrl-C; the others say so; new caches on a new group work."""
    plain, _ = baseline(scene)
    scene.begin()
    layer_of, forward = scene.draw.randrange(2), scene.draw.randrange(1, DECODES)

    def broken(player, layer, *drawn):
        if player.rank == scene.rank and player.forwards == forward and layer.layer_idx == layer_of:
            raise KeyboardInterrupt
        return drawn

    for player in scene.players.values():
        player.broken = broken
    ended = scene.play()
    assert isinstance(ended[scene.rank], KeyboardInterrupt), ended
    named(ended, PeerError, rank=scene.rank)
    scene.compare(plain)
    again, _ = baseline(scene)
    again.compare(plain, whole=True)
    return "PeerError"


def one(seed: int) -> dict[str, Any]:
    """The fault of this seed: every kind in turn. Raises: AssertionError, Hang."""
    name = list(KINDS)[seed % len(KINDS)]
    scene = Scene.drawn(seed // len(KINDS) + 7919 * (seed % len(KINDS)))
    return {"seed": seed, "kind": name, "world": scene.world, "requests": scene.requests, "outcome": KINDS[name](scene)}
