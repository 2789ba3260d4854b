"""ShardMap against loops over its holders."""

import pytest
import torch

from pikv_ds.errors import ConfigError
from pikv_ds.placement.shard_map import ShardMap

CPU = torch.device("cpu")
SWAPPED = ((1,), (1,), (0,), (0,))
MIXED = ((1,), (0,), (0,), (1,))


@pytest.mark.parametrize(("num_shards", "num_ranks"), [(1, 1), (4, 1), (4, 2), (4, 4), (12, 3)], ids=lambda n: str(n))
def test_blocks_are_neighbouring_shards(num_shards, num_ranks):
    maps = [ShardMap.blocks(num_shards, rank, num_ranks, CPU) for rank in range(num_ranks)]
    assert sum((list(one.local) for one in maps), []) == list(range(num_shards))
    for one in maps:
        assert one.num_local == num_shards // num_ranks and one.contiguous
        assert all(one.home(shard) == one.rank for shard in one.local)


@pytest.mark.parametrize("holders", [SWAPPED, MIXED], ids=["swapped", "mixed"])
@pytest.mark.parametrize("heads", [1, 3])
def test_what_ranks_send_is_brought_into_the_order_of_shards(holders, heads):
    maps = [ShardMap(holders, rank, 2, CPU) for rank in range(2)]
    whole = torch.arange(2 * 4 * heads * 5).view(2, 4 * heads, 5)
    parts = [one.own(whole, 1, heads) for one in maps]
    for one, part in zip(maps, parts, strict=True):
        wanted = torch.cat([whole[:, shard * heads : (shard + 1) * heads] for shard in one.local], 1)
        assert torch.equal(part, wanted)
        assert torch.equal(one.in_shard_order(torch.cat(parts, 1), 1, heads), whole)
        assert one.shards.tolist() == list(one.local) and not one.contiguous
        assert one.is_local(torch.arange(4)).tolist() == [holders[shard] == (one.rank,) for shard in range(4)]
        assert [int(one.index[shard]) for shard in one.local] == list(range(one.num_local))


def test_partials_are_added_up_by_the_first_shard_of_their_ranks():
    swapped, blocks = ShardMap(SWAPPED, 0, 2, CPU), ShardMap.blocks(4, 0, 2, CPU)
    of_ranks = torch.tensor([[2.0], [1.0]])  # rank 0 has shards 2 and 3 in the one, 0 and 1 in the other
    assert torch.equal(swapped.in_rank_order(of_ranks), blocks.in_rank_order(of_ranks.flip(0)))


def test_shards_that_cannot_be_dealt_out_evenly_are_refused():
    with pytest.raises(ConfigError, match="pikv.storage.num_shards = 3 with 2 ranks: legal is a multiple of 2"):
        ShardMap.blocks(3, 0, 2, CPU)
    with pytest.raises(ValueError, match=r"every rank of 2 holds as many shards, here \[3, 1\]"):
        ShardMap(((0,), (0,), (0,), (1,)), 0, 2, CPU)
    with pytest.raises(ValueError, match="per shard the different ranks that hold it"):
        ShardMap(((0, 0), (1, 1)), 0, 2, CPU)


def test_a_shard_with_copies_has_one_reader_per_query():
    holders = ((1, 0), (0,), (1,), (0, 1))
    maps = [ShardMap(holders, rank, 2, CPU) for rank in range(2)]
    assert [one.local for one in maps] == [(0, 1, 3), (0, 2, 3)]
    for source, column in ((0, 0), (1, 1), (None, 2)):
        reads = [[s for s, yes in zip(one.local, one.reads_here[column].tolist(), strict=True) if yes] for one in maps]
        assert sorted(sum(reads, [])) == [0, 1, 2, 3]
        assert reads == ([[0, 1, 3], [2]] if source == 0 else [[1], [0, 2, 3]] if source == 1 else [[1, 3], [0, 2]])
    whole = torch.arange(8).view(2, 4)
    parts = [one.own(whole, 1) for one in maps]
    parts[0][:, 0] = parts[1][:, 2] = -1  # a gather takes what the home has
    assert torch.equal(maps[0].in_shard_order(torch.cat(parts, 1), 1), whole)
