"""Expert id and position -> shard -> rank, against the plain-integer rules of tests/reference_cache.py."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pikv_ds.placement.placement import Placement, hash_expert, primary_expert
from tests.reference_cache import wanted_shard

POSITIONS = torch.arange(40)
TABLE = [[[0, -1], [1, 2], [2, 0], [2, -1], [0, 1]]]


def test_primary_expert_is_the_largest_weight_wherever_it_stands():
    ids = torch.tensor([[3, 1], [1, 3], [7, 0]])
    weights = torch.tensor([[0.2, 0.8], [0.8, 0.2], [0.6, 0.4]])
    assert primary_expert(ids, weights).tolist() == [1, 1, 7]


def test_primary_expert_ties_go_to_the_lowest_id():
    ids = torch.tensor([[5, 2, 4], [2, 5, 4], [9, 8, 0]], dtype=torch.int32)
    weights = torch.tensor([[0.4, 0.4, 0.2], [0.4, 0.4, 0.2], [0.3, 0.3, 0.3]], dtype=torch.bfloat16)
    got = primary_expert(ids, weights)
    assert got.tolist() == [2, 2, 0] and got.dtype == torch.int64


@given(
    st.lists(
        st.tuples(st.permutations(range(6)), st.lists(st.sampled_from([0.1, 0.2, 0.3]), min_size=6, max_size=6)), min_size=1, max_size=8
    )
)
def test_primary_expert_equals_a_loop(rows):
    ids, weights = torch.tensor([list(r[0]) for r in rows]), torch.tensor([r[1] for r in rows])
    want = [min(e for e, w in zip(*row, strict=True) if w == max(row[1])) for row in rows]
    assert primary_expert(ids, weights).tolist() == want


def test_hash_expert():
    assert hash_expert(torch.tensor([0, 7, 8, 17], dtype=torch.int32), 8).tolist() == [0, 7, 0, 1]


CASES = [
    ("experts", 8, 4, {}),
    ("experts", 7, 4, {}),
    ("experts", 3, 4, {}),
    ("experts", 8, 1, {}),
    ("position", 8, 3, {}),
    ("xor", 8, 4, {"n_tok": 4}),
    ("xor", 6, 4, {"n_tok": 8}),
    ("xor", 6, 3, {"n_tok": 1}),
    ("xor", 1, 2, {"n_tok": 2}),
    ("table", 5, 3, {"table": TABLE}),
    ("table", 5, 3, {"table": [*TABLE, [[e % 3] * 1 + [-1] for e in range(5)]]}),
]


@pytest.mark.parametrize(
    ("method", "num_experts", "num_shards", "options"), CASES, ids=[f"{m}-E{e}-S{s}-{i}" for i, (m, e, s, _) in enumerate(CASES)]
)
@pytest.mark.parametrize("layer", [0, 1], ids="layer{}".format)
def test_every_method_equals_its_rule(layer, method, num_experts, num_shards, options):
    placement = Placement(method, num_experts, num_shards, **options)
    experts, positions = (torch.tensor(side) for side in zip(*itertools.product(range(num_experts), range(40)), strict=True))
    want = [
        wanted_shard(method, layer, e, t, num_experts=num_experts, num_shards=num_shards, **options)
        for e, t in zip(experts.tolist(), positions.tolist(), strict=True)
    ]
    got = placement.shard_of(layer, experts, positions.to(torch.int32))
    assert got.tolist() == want and got.dtype == torch.int64
    assert got.min() >= 0 and got.max() < num_shards


def test_experts_follows_the_contiguous_layout_of_the_hosts():
    got = Placement("experts", 8, 4).shard_of(0, torch.arange(8), torch.zeros(8, dtype=torch.int64))
    assert got.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_xor_uses_every_shard_also_when_one_expert_is_hot():
    got = Placement("xor", 8, 4, n_tok=4).shard_of(0, torch.full((40,), 5), POSITIONS)
    assert torch.bincount(got, minlength=4).tolist() == [10, 10, 10, 10]


def test_replicas_share_an_expert_by_position():
    placement = Placement("table", 5, 3, table=TABLE)
    assert placement.shard_of(0, torch.full((40,), 1), POSITIONS).tolist() == [1, 2] * 20
    assert placement.shard_of(0, torch.full((40,), 0), POSITIONS).tolist() == [0] * 40


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([[[0], [1, 2]]], "full nested list"),
        ("nonsense", "full nested list"),
        ([[0, 1]], r"has shape \[1, 2\]; this model needs \[num_layers or 1, 2 experts, max_replicas\]"),
        ([[[0], [1], [0]]], r"has shape \[1, 3, 1\]; this model needs .* 2 experts"),
        ([[[0], [3]]], r"names shard 3, but there are 3 shards \(0..2\)"),
        ([[[0], [-1]]], "each expert needs a shard in its first column"),
        ([[[0, -1, 1], [1, -1, -1]]], "-1 only after the last replica"),
    ],
    ids=["not-full", "not-a-list", "two-levels", "experts", "shard-range", "no-home", "hole"],
)
def test_wrong_tables_say_what_is_wrong(table, message):
    with pytest.raises(ValueError, match=message):
        Placement("table", 2, 3, table=table)
