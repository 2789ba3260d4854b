"""Experts that change ranks with the shards of their entries. E experts in E slots, n slots on each of G ranks, S shards.

A host fixes which slots a rank has, not which expert is in a slot. So a move is a permutation: of the rows of every router, which all ranks
have, and of what belongs to single experts (weights, gradients, state of an optimizer), which goes from rank to rank. The model computes
the same function before and after; entries keep the shard of their expert, by the expert's number and not by its slot.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pikv_ds.exchange.digest import digest
from pikv_ds.placement.shard_map import ShardMap

from .along import Claim, Holders
from .wire import Unpacked, packed

_WORDS = 1 << 20  # of 8 bytes, in one part of a checksum
State = dict[str, Tensor]  # by name, what belongs to one expert


class ExpertStore(Protocol):
    """Where a host keeps experts: in the same slot in all layers. Tensors that are read may be views."""

    num_experts: int
    device: torch.device

    def read(self, slots: Sequence[int]) -> dict[int, State]:
        """Of this rank's slots. Names with a "?" in them may be missing: an expert that no token has reached has no state yet."""

    def write(self, states: dict[int, State]) -> None:
        """By slot, in place; what has a "?" in its name and is not in a state is gone."""

    def rows(self) -> list[Tensor]:
        """[E, ...] each, on every rank: row i belongs to slot i. Collectives: the same on all ranks."""

    def write_rows(self, rows: list[Tensor]) -> None: ...

    def obstacle(self) -> str:
        """Why nothing can move just now, on this rank; "" = it can."""

    def placed(self, expert_of_slot: tuple[int, ...]) -> None:
        """The experts lie so from now on: routers' choices are slots, and entries ask for experts."""


class ExpertMove(NamedTuple):
    expert: int
    source: int  # slots, of all ranks
    target: int


@dataclass(slots=True)
class Staged:
    """A move before its commit."""

    slots: tuple[int, ...]
    moves: list[ExpertMove]
    own: dict[int, State] = field(default_factory=dict)  # by this rank's slot, as it is now
    states: dict[int, State] = field(default_factory=dict)  # by this rank's slot, as it will be
    rows: list[Tensor] = field(default_factory=list)
    sums: dict[int, int] = field(default_factory=dict)  # by expert


class Experts:
    """Along (along.py) for the experts of one model. Owns which expert lies in which slot; borrows the host's tensors."""

    def __init__(self, store: ExpertStore, rank: int, num_ranks: int) -> None:
        self.store, self.rank, self.num_ranks = store, rank, num_ranks
        self.each = store.num_experts // num_ranks
        self.expert_of_slot = tuple(range(store.num_experts))
        self._staged: Staged | None = None

    @property
    def staged(self) -> Staged:
        assert self._staged is not None, "leaving comes first"
        return self._staged

    def holders(self, num_shards: int) -> Holders | None:
        each = self.store.num_experts // num_shards
        ranks = {expert: slot // self.each for slot, expert in enumerate(self.expert_of_slot)}
        of_shards = [[ranks[shard * each + i] for i in range(each)] for shard in range(num_shards)]
        if any(len(set(of_shard)) != 1 for of_shard in of_shards):
            return None  # placed by finer shards than these
        return tuple((of_shard[0],) for of_shard in of_shards)

    def due(self, wanted: ShardMap) -> bool:
        return slots_of(wanted, self.store.num_experts) != self.expert_of_slot

    def leaving(self, wanted: ShardMap) -> list[Tensor]:
        if why := self.store.obstacle():
            raise RuntimeError(why)
        slots = slots_of(wanted, self.store.num_experts)
        source = {expert: slot for slot, expert in enumerate(self.expert_of_slot)}
        moves = [ExpertMove(expert, source[expert], slot) for slot, expert in enumerate(slots) if source[expert] != slot]
        self._staged = Staged(slots, moves)
        order = torch.tensor([source[expert] for expert in slots], device=self.store.device)
        self.staged.rows = [row.index_select(0, order.to(row.device)) for row in self.store.rows()]
        self.staged.own = self.store.read([move.source for move in moves if move.source // self.each == self.rank])
        parts: list[list[Tensor]] = [[] for _ in range(self.num_ranks)]
        for move in self._between():
            if move.source // self.each == self.rank:
                blob = pack(self.staged.own[move.source], self.store.device)
                self.staged.sums[move.expert] = _checksum(blob)
                parts[move.target // self.each] += [torch.tensor([len(blob)], device=self.store.device), blob]
        return [packed(part, self.store.device) for part in parts]

    def plan(self) -> int:
        return digest([torch.tensor([*self.expert_of_slot, *self.staged.slots], dtype=torch.int64)])

    def arrived(self, blocks: Sequence[Tensor]) -> None:
        staged = self.staged
        for source, block in enumerate(blocks):
            read = Unpacked(block)
            for move in self._between():
                if (move.source // self.each, move.target // self.each) == (source, self.rank):
                    (size,) = read.take((1,), torch.int64).tolist()
                    blob = read.take((size,), torch.uint8)
                    staged.sums[move.expert] = _checksum(blob)
                    staged.states[move.target] = unpack(blob)
            read.end()
        for move in staged.moves:
            if move.source // self.each == move.target // self.each == self.rank:
                staged.states[move.target] = {name: tensor.clone() for name, tensor in staged.own[move.source].items()}
        for slot, state in staged.states.items():
            check_alike(staged.own[slot], state)

    def claims(self) -> list[Claim]:
        return [Claim(f"expert {move.expert}", move.source // self.each, move.target // self.each) for move in self._between()]

    def said(self) -> list[int]:
        return [self.staged.sums.get(move.expert, 0) for move in self._between()]

    @torch.no_grad()
    def commit(self) -> None:
        if self._staged is None:
            return  # done already
        staged = self.staged
        self.store.write_rows(staged.rows)
        self.store.write(staged.states)
        self.store.placed(staged.slots)
        self.expert_of_slot = staged.slots
        self._staged = None

    def forget(self) -> None:
        self._staged = None

    def _between(self) -> list[ExpertMove]:
        """Of the move: those that change ranks."""
        return [move for move in self.staged.moves if move.source // self.each != move.target // self.each]


def slots_of(shard_map: ShardMap, num_experts: int) -> tuple[int, ...]:
    """The expert of every slot where the experts of a shard lie on its rank, ascending in a rank. S divides E; one rank per shard."""
    each = num_experts // shard_map.num_shards
    return tuple(shard * each + i for shards in shard_map.of_ranks for shard in shards for i in range(each))


def check_alike(own: State, state: State) -> None:
    """Raises: ValueError when an expert would not fit where another one is."""
    shapes = [{name: (x.shape, x.dtype) for name, x in one.items() if "?" not in name} for one in (own, state)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"an expert with {shapes[1]} does not fit where one with {shapes[0]} is")


def pack(state: State, device: torch.device) -> Tensor:
    """uint8 [n], which says itself what is in it."""
    said = [[name, str(x.dtype).removeprefix("torch."), list(x.shape)] for name, x in state.items()]
    header = torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8).to(device)
    return packed([torch.tensor([len(header)], device=device), header, *(x.detach().to(device) for x in state.values())], device)


def _checksum(blob: Tensor) -> int:
    """In parts, as a digest takes some times the memory of what it reads."""
    words = torch.nn.functional.pad(blob, (0, -len(blob) % 8)).view(torch.int64)
    return digest([torch.tensor([len(blob), *(digest([part]) for part in words.split(_WORDS))], dtype=torch.int64)])


def unpack(blob: Tensor) -> State:
    """Raises: ValueError for what `pack` has not made."""
    read = Unpacked(blob)
    (size,) = read.take((1,), torch.int64).tolist()
    said = json.loads(bytes(read.take((size,), torch.uint8).tolist()))
    state = {name: read.take(shape, getattr(torch, dtype)) for name, dtype, shape in said}
    read.end()
    return state
