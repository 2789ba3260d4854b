"""Parts of `pikv plan --simulate` against the cache's own functions and against loops; what it refuses."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pikv_ds.launch.cli import main
from pikv_ds.launch.simulate import paper
from pikv_ds.launch.simulate.following import following, reached
from pikv_ds.launch.simulate.interconnects import INTERCONNECTS
from pikv_ds.launch.simulate.stored import entries, spilled
from pikv_ds.launch.simulate.strategies import Job, head_ways, simulate, wire
from pikv_ds.launch.simulate.traces import Trace, drawn
from pikv_ds.placement.spill import spill
from pikv_ds.spec import LayerSpec
from tests.launch.test_cli import run_json

NET = INTERCONNECTS["h100-ndr"]
FULL = LayerSpec(layer_idx=0, num_kv_heads=4, k_dim=8, v_dim=8)


def job(ranks: int, requests: str = "distinct", layers=(FULL, FULL), length: int = 64, **more) -> Job:
    return Job(
        layers=layers, num_q_heads=8, itemsize=2, record_bytes=[4 * 4 * 16 * 2 + 16] * len(layers), tail_bytes=[0] * len(layers),
        page_size=4, requests=requests,
        lengths=[[length]] * ranks, **more,
    )  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 20))
def test_spill_without_a_table_is_spill(wanted, more):
    wanted, shards = torch.tensor(wanted), 5
    capacity = -(-len(wanted) // shards) + more // 4
    want = spill(wanted, torch.ones_like(wanted, dtype=torch.bool), torch.zeros(shards, dtype=torch.int64), capacity)
    assert torch.equal(spilled(wanted, shards, capacity), want.shard)


def test_entries_are_those_that_stay_visible():
    trace = drawn("zipf", layers=2, tokens=50, experts=8, k=2, seed=0)
    window = LayerSpec(layer_idx=1, num_kv_heads=1, k_dim=4, v_dim=4, window=9)
    counts = entries(1, window, trace, [30, 5], placement="experts", num_shards=4, page_size=4, spills=False)
    want = [[0] * 4, [0] * 4]
    for row, (first, length) in enumerate(((0, 30), (30, 5))):
        for position in range(max(0, length - 8), length):
            want[row][int(trace.ids[0, first + position, 0]) * 4 // 8] += 1
    assert counts.tolist() == want


def test_a_position_placement_is_even_and_replicas_hold_everything():
    trace = drawn("uniform", layers=2, tokens=512, experts=8, k=2, seed=0)
    even, whole = (simulate(name, job(8, "replicated"), trace, NET) for name in ("position", "replicated"))
    assert even["imbalance"] == 1 and even["kv_bytes_fullest"] * 8 == whole["kv_bytes_fullest"]
    assert whole["wire_bytes"] == whole["wire_ms"] == 0 < even["wire_ms"]


def test_heads_are_dealt_out_no_further_than_there_are_any():
    assert [head_ways(FULL, ranks) for ranks in (1, 2, 4, 8, 6)] == [1, 2, 4, 4, 2]
    latent = LayerSpec(layer_idx=0, num_kv_heads=1, k_dim=24, v_dim=16, latent=True)
    assert head_ways(latent, 8) == 1 and wire("heads", job(8, layers=[latent]), NET) == (0, 0, 0.0)
    sent, collectives, _ = wire("heads", job(8), NET)
    one = (8 * 8 + 4 * 16) // 4 * 2 + 8 * 8 // 4 * 2  # q, k, v of a token to one rank, and outputs of its heads back
    assert (sent, collectives) == (2 * 3 * one, 4)


def test_times_by_hand():
    assert NET.all_gather_us(1, 1e6) == NET.all_to_all_us(1, 1e6) == 0
    assert NET.all_gather_us(8, 450e3) == pytest.approx(6.6 + 7 * 0.6 + 7 * 450e3 / 450e3)
    assert NET.all_gather_us(16, 450e3) == pytest.approx(6.6 + 14 * 0.6 + 2.7 + max(15 * 450e3 / 450e3, 8 * 450e3 / 8 / 50e3))
    assert NET.all_gather_us(64, 450e3) == pytest.approx(6.6 + 56 * 0.6 + 7 * 2.7 + max(63, 56 * 450 / 8 / 50))
    assert NET.all_to_all_us(16, 50e3) == pytest.approx(6.6 + 2.7 + 8 * 50e3 / 50e3)


@pytest.mark.parametrize("requests", ["replicated", "distinct"])
def test_means_are_near_what_is_placed_one_by_one(requests):
    trace = drawn("zipf", layers=2, tokens=8192, experts=16, k=2, seed=1)
    for placement in ("experts", "position"):
        whole, means = (simulate(placement, job(4, requests, length=2048, sample=sample), trace, NET) for sample in (None, 2000))
        assert not whole["means"] and means["means"]
        assert means["kv_bytes_fullest"] == pytest.approx(whole["kv_bytes_fullest"], rel=0.03)
        assert means["kv_bytes_mean"] == pytest.approx(whole["kv_bytes_mean"], rel=0.03)


def test_queries_reach_the_ranks_of_their_experts():
    ids = torch.tensor([[[0, 1], [3, 2], [1, 3], [2, 0]]])  # 4 experts on 2 ranks, tokens 0, 1 of rank 0
    assert reached(ids * 2 // 4, torch.tensor([0, 0, 1, 1]), 2) == pytest.approx((0 + 1 + 1 + 1) / 4)
    rows = {row["kv"]: row for row in following(job(2, layers=(FULL,)), Trace(ids=ids, num_experts=4, name="four"))}
    entry, query, partial = 64 * 2, 64 * 2, 8 * 9 * 4
    assert rows["experts"]["bytes_top_k"] == pytest.approx(0.5 * entry + 0.75 * (query + partial))
    assert rows["position"]["bytes_top_k"] == rows["position"]["bytes_exact"] == pytest.approx(0.5 * entry + query + partial)
    assert rows["stays"]["bytes_exact"] == 0


def test_the_papers_minimum():
    best = paper.best_capacity(4096, 8, 16)
    least = paper.rank_bytes(96.0, 4096, 8, 16, best)
    assert least == pytest.approx(2 * 96.0 * (16 * 4096 / 8) ** 0.5)
    assert least < min(paper.rank_bytes(96.0, 4096, 8, 16, best * x) for x in (0.9, 1.1))
    assert paper.fpga_us(64, 2, 10, 460.0) == pytest.approx(4 / 250 + 2 * (2 / 250 + 10 * 1e-3))


def test_the_command(tmp_path, capsys):
    rows = run_json(tmp_path, "plan", "--simulate", "zipf", "--ranks", "2,4,8", "--context", "300", "--plot", str(tmp_path / "plan.png"))
    steps, followed = ([row for row in rows if row["kind"] == kind] for kind in ("step", "following"))
    assert len(steps) == 3 * 4 and len(followed) == 3 * 2 * 3 and {row["ranks"] for row in steps} == {2, 4, 8}
    assert (tmp_path / "plan.png").stat().st_size > 1000
    assert "lower bounds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--context", "10,20"], "one number of tokens"),
        (["--context", "10", "--num-shards", "4"], "leave out --num-shards"),
        (["--context", "10", "--codec", "adaptive"], "codec adaptive"),
    ],
)
def test_what_it_does_not_simulate_is_refused(capsys, more, said):
    assert main(["plan", "--simulate", "uniform", "--ranks", "2", *more]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_a_file_that_is_no_trace_is_refused(tmp_path, capsys):
    assert main(["plan", "--simulate", str(tmp_path / "no.safetensors"), "--ranks", "2", "--context", "9"]) == 2
    assert "no such file" in capsys.readouterr().err
