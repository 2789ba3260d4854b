"""Placement: shards, spill, the directory, who holds what; plans from loads."""

# ruff: noqa: E501 - a table: one mutant, one row

from tests.mutants.mutant import Place, planted
from tests.mutants.operators import edits

SPILL = Place(file="pikv_ds/placement/spill.py", tests=("tests/placement/test_spill.py",))
MAP = Place(file="pikv_ds/placement/shard_map.py", tests=("tests/placement/test_shard_map.py", "tests/migration/test_moves.py"))
DIRECTORY = Place(file="pikv_ds/placement/directory.py", tests=("tests/placement/test_directory.py", "tests/cache/test_single_rank.py"))
PLACEMENT = Place(file="pikv_ds/placement/placement.py", tests=("tests/placement/test_placement.py",))
XOR = Place(file="pikv_ds/placement/rules/xor.py", tests=("tests/placement/test_placement.py",))
EXPERTS = Place(file="pikv_ds/placement/rules/experts.py", tests=("tests/placement/test_placement.py",))
BY_TABLE = Place(file="pikv_ds/placement/rules/table.py", tests=("tests/placement/test_placement.py",))
PACKING = Place(file="pikv_ds/placement/packing.py", tests=("tests/placement/test_packing.py",), model=False)
SWAPS = Place(file="pikv_ds/placement/swaps.py", tests=("tests/placement/test_packing.py",), model=False)
SLOTS = Place(file="pikv_ds/placement/slots.py", tests=("tests/placement/test_balance.py",), model=False)

MUTANTS = [
    planted(SPILL, "room off by one", "one entry too many", "> room[wanted])", "> room[wanted] + 1)"),
    planted(SPILL, "padding takes room", "", "torch.arange(num_shards, device=wanted.device)) & valid.unsqueeze(-1)", "torch.arange(num_shards, device=wanted.device))"),
    planted(SPILL, "old load forgotten", "spills fill shards that are full", "extra = water_fill(load + torch.minimum(running[-1], room), over.sum())", "extra = water_fill(torch.minimum(running[-1], room), over.sum())"),
    planted(SPILL, "all spilled to one", "", "torch.searchsorted(extra.cumsum(0), turn.clamp_min(0), right=True)", "torch.searchsorted(extra.cumsum(0), turn.clamp_min(0) * 0, right=True)"),
    planted(SPILL, "side of the search", "the last of a quota goes on", "turn.clamp_min(0), right=True)", "turn.clamp_min(0), right=False)"),
    planted(SPILL, "spilled everywhere", "all tokens count as spilled", "return Homes(torch.where(over, taken_over, wanted), over)", "return Homes(torch.where(over, taken_over, wanted), valid)"),
    planted(MAP, "swapped owner", "home names the next rank", "return self.holders[shard][0]", "return (self.holders[shard][0] + 1) % self.num_ranks"),
    planted(MAP, "index of another shard", "", "index[list(self.local)] = torch.arange(self.num_local)", "index[list(self.local)] = torch.arange(self.num_local).flip(0)"),
    planted(MAP, "shard 0 is nobody's", "", "return self.index[shard] >= 0", "return self.index[shard] > 0"),
    planted(MAP, "rank order", "partials are added in another order", "sorted(range(num_ranks), key=first.__getitem__)", "sorted(range(num_ranks), key=first.__getitem__, reverse=True)"),
    planted(MAP, "order not inverted", "gathered shards are permuted twice", "_select(x, self._order, dim, heads)", "_select(x, self.by_rank, dim, heads)"),
    planted(MAP, "blocks reversed", "experts of another rank", "tuple((shard * num_ranks // num_shards,) for shard in range(num_shards))", "tuple(((num_shards - 1 - shard) * num_ranks // num_shards,) for shard in range(num_shards))"),
    planted(MAP, "uneven maps", "a rank may hold none", "if len({len(shards) for shards in self.of_ranks}) != 1:", "if False:"),
    planted(MAP, "own of another rank", "narrow begins at shard 0", "x.narrow(dim, self.local[0] * heads,", "x.narrow(dim, 0 * heads,"),
    planted(DIRECTORY, "heads forgotten", "load counts tokens, not entries", "seen.to(torch.int64) * self.heads)", "seen.to(torch.int64))"),
    planted(DIRECTORY, "window off by one", "the load counts an entry that left", "valid & (positions > (lens - window)[rows])", "valid & (positions >= (lens - window)[rows])"),
    planted(DIRECTORY, "leaving off by one", "another entry leaves the load", "leaving = positions.to(torch.int64) - (window - 1)", "leaving = positions.to(torch.int64) - window"),
    planted(DIRECTORY, "homes of padding", "padding overwrites position 0", "cell = rows * capacity + torch.where(valid, positions.to(torch.int64), capacity - 1)", "cell = rows * capacity + torch.where(valid, positions.to(torch.int64), 0)"),
    planted(DIRECTORY, "evicted not subtracted", "stale load after an eviction", "        self.load[layer] -= self._by_shard(entries.sum(0))\n", ""),
    planted(DIRECTORY, "evicted lost in forks", "", "self.evicted = torch.where((parent >= 0)[:, None], self.evicted[:, source], 0)", "self.evicted = torch.zeros_like(self.evicted[:, source])"),
    planted(DIRECTORY, "fork of the wrong row", "", "homes = old[source] if old.shape[0]", "homes = old[source.flip(0)] if old.shape[0]"),
    planted(DIRECTORY, "reset keeps the load", "", "        self.load.zero_()\n", ""),
    planted(DIRECTORY, "parked load counted", "", "            self.load[i] -= parked\n", ""),
    planted(DIRECTORY, "spare column", "padding lands on a token", "if self.num_shards > 1 and length >= self.shard_at[0].shape[1]:", "if self.num_shards > 1 and length > self.shard_at[0].shape[1]:"),
    planted(PLACEMENT, "ties to the highest", "", "torch.iinfo(expert_ids.dtype).max).amin(-1)", "-1).amax(-1)"),
    planted(PLACEMENT, "column 0", "not the largest weight", "best = weights == weights.amax(-1, keepdim=True)", "best = torch.arange(weights.shape[-1]).expand_as(weights) == 0"),
    planted(PLACEMENT, "hash off by one", "", "positions.to(torch.int64) % num_experts", "(positions.to(torch.int64) + 1) % num_experts"),
    planted(XOR, "mask one bit short", "", "max(facts.num_experts - 1, 0).bit_length()) - 1", "max(facts.num_experts - 1, 0).bit_length() - 1) - 1"),
    planted(XOR, "or for xor", "", ") ^ (expert_ids", ") | (expert_ids"),
    planted(EXPERTS, "experts dealt in turns", "mod for floor", "torch.arange(facts.num_experts) * facts.num_shards // facts.num_experts", "torch.arange(facts.num_experts) % facts.num_shards"),
    planted(BY_TABLE, "first replica only", "", "positions % self.replicas[layer][expert_ids]", "positions * 0"),
    planted(BY_TABLE, "layer 0 for all", "", "layer = layer_idx if self.table.shape[0] > 1 else 0", "layer = 0"),
    planted(PACKING, "heaviest to the heaviest", "a round is dealt the wrong way round", "torch.where(left > 0, load, torch.inf).argsort(dim=1, stable=True)", "torch.where(left > 0, load, -torch.inf).argsort(dim=1, descending=True, stable=True)"),
    planted(PACKING, "load not told", "all rounds are dealt in one order", "        load.scatter_add_(1, packs, heavy.gather(1, at) * valid)\n", ""),
    planted(PACKING, "full packs take", "", "item, valid = order.gather(1, at), seat < takes", "item, valid = order.gather(1, at), seat <= takes"),
    planted(PACKING, "parted into another copy", "", "(kind != own[:, None, None]).all(2, keepdim=True) & ~known", "~known"),
    planted(SWAPS, "copies dealt together", "a copy that stays weighs nothing more", "* (FAR * load.amax((1, 2)))", "* (0 * load.amax((1, 2)))"),
    planted(SWAPS, "all that one is over", "not half of it", "(load[:, :, 1] - load[:, :, 0]) / 2", "(load[:, :, 1] - load[:, :, 0])"),
    planted(SWAPS, "copies swapped together", "", "other.masked_fill_(packs.holds(top[:, None, None], theirs), torch.inf)", "other.masked_fill_(packs.holds(top[:, None, None], theirs), -torch.inf)"),
    planted(SWAPS, "goes on when light enough", "", "self.enough = (least if enough is None else enough) + self.close", "self.enough = least + self.close"),
    *edits(SPILL, ("spill", "water_fill")),
    *edits(DIRECTORY, ("Directory.leave", "Directory.per_row", "Directory.fork", "Directory.split")),
    *edits(SLOTS, ("rank_loads", "moved", "holders")),
]  # fmt: skip
