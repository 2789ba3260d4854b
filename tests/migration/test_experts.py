"""Experts over slots in one process: every rank an Experts, blocks handed over by hand. With hosts: tests/megatron, tests/dist."""

import pytest
import torch

from pikv_ds.migration.experts import Experts, pack, slots_of, unpack
from pikv_ds.placement.shard_map import ShardMap

CPU = torch.device("cpu")


class Store:
    """Of one rank: a weight [n, 3], bf16, and a 0-d state that expert 1 lacks; one router."""

    num_experts, device = 8, CPU

    def __init__(self, rank: int, num_ranks: int) -> None:
        self.first, self.each, self.waits, self.told = rank * 8 // num_ranks, 8 // num_ranks, "", None
        numbers = range(self.first, self.first + self.each)
        self.slots = [{"w": torch.full((3,), n).bfloat16(), **({} if n == 1 else {"w?step": torch.tensor(n)})} for n in numbers]
        self.router = torch.arange(8.0).unsqueeze(1).repeat(1, 2)

    def read(self, slots):
        return {slot: self.slots[slot - self.first] for slot in slots}

    def write(self, states):
        for slot, state in states.items():
            self.slots[slot - self.first] = state

    def rows(self):
        return [self.router]

    def write_rows(self, rows):
        self.router.copy_(rows[0])

    def obstacle(self):
        return self.waits

    def placed(self, expert_of_slot):
        self.told = expert_of_slot


def ranks_of(count: int) -> list[Experts]:
    return [Experts(Store(rank, count), rank, count) for rank in range(count)]


def carried(ranks: list[Experts], holders: tuple) -> None:
    maps = [ShardMap(holders, rank, len(ranks), CPU) for rank in range(len(ranks))]
    blocks = [each.leaving(wanted) for each, wanted in zip(ranks, maps, strict=True)]
    assert len({each.plan() for each in ranks}) == 1
    for rank, each in enumerate(ranks):
        each.arrived([of_rank[rank] for of_rank in blocks])


@pytest.mark.parametrize(
    ("count", "holders"),
    [(2, ((1,), (0,), (0,), (1,))), (2, ((1,), (1,), (0,), (0,))), (4, ((3,), (1,), (0,), (2,))), (2, ((1,), (0,)))],
)
def test_every_expert_is_whole_in_its_new_slot(count, holders):
    ranks = ranks_of(count)
    slots = slots_of(ShardMap(holders, 0, count, CPU), 8)
    assert sorted(slots) == list(range(8)) and all(each.due(ShardMap(holders, 0, count, CPU)) for each in ranks)
    carried(ranks, holders)
    claims = ranks[0].claims()
    for i, (_, source, target) in enumerate(claims):
        assert ranks[source].said()[i] == ranks[target].said()[i] != 0 and ranks[0].claims() == ranks[target].claims()
    assert all(each.store.slots[0]["w"][0] == each.store.first for each in ranks), "nothing has changed before the commit"
    for each in ranks:
        each.commit()
        each.commit()  # again, where it broke off
        store = each.store
        for i, state in enumerate(store.slots):
            expert = slots[store.first + i]
            assert state["w"].dtype == torch.bfloat16 and state["w"].tolist() == [expert] * 3
            assert ("w?step" in state) == (expert != 1) and state.get("w?step", expert) == expert
        assert store.router[:, 0].tolist() == list(slots) and store.told == each.expert_of_slot == slots
        assert each.holders(len(holders)) == holders and not each.due(ShardMap(holders, 0, count, CPU))
        assert each.holders(8) == tuple((slots.index(expert) // (8 // count),) for expert in range(8))


def test_a_move_that_is_forgotten_changes_nothing():
    ranks = ranks_of(2)
    carried(ranks, ((1,), (0,), (0,), (1,)))
    for each in ranks:
        each.forget()
        assert each.expert_of_slot == tuple(range(8)) and each.store.told is None
        assert [int(state["w"][0]) for state in each.store.slots] == list(range(each.store.first, each.store.first + 4))


def test_shards_coarser_than_those_that_placed_the_experts_have_no_map():
    ranks = ranks_of(2)
    carried(ranks, ((1,), (0,), (0,), (1,)))
    ranks[0].commit()
    assert ranks[0].holders(4) == ((1,), (0,), (0,), (1,)) and ranks[0].holders(2) is None


def test_what_is_refused():
    ranks = ranks_of(2)
    ranks[0].store.waits = "gradients wait"
    with pytest.raises(RuntimeError, match="gradients wait"):
        ranks[0].leaving(ShardMap(((1,), (0,)), 0, 2, CPU))
    ranks[0].store.waits = ""
    ranks[0].store.slots[0]["w"] = torch.zeros(4)
    with pytest.raises(ValueError, match="does not fit"):
        carried(ranks, ((1,), (0,)))
    with pytest.raises(ValueError, match="are what was to come|are asked for"):
        unpack(pack({"w": torch.ones(3)}, CPU)[:-1])
