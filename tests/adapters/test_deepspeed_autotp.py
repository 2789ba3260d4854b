"""DeepSpeed's tensor parallelism beside PiKV: the group of the cache, heads of a rank, tokens of DeepSpeed's own AutoTP."""

import pytest

from tests.dist.launcher import run_deepspeed_ranks
from tests.long_form import LONG, short_or_long

pytestmark = [pytest.mark.dist, pytest.mark.slow]

INFERENCE = short_or_long(["qwen3_moe", "deepseek_v3"], ["qwen3_moe", "mixtral", "deepseek_v3"])
FOLDED = short_or_long(["deepseek_v3"], ["qwen3_moe", "deepseek_v3"])
ON_FOUR = [f"{how} {requests}" for requests in ("replicated", "distinct") for how in ("mpu qwen3_moe", "mpu deepseek_v3", "initialize")]
FOLDED_ON_FOUR = [f"folded ep {size} {prompts}" for size in (2, 4) for prompts in ("alike", "own")]


@pytest.fixture(scope="module")
def on_two():
    return run_deepspeed_ranks("ds_autotp.py", timeout_s=280)


@pytest.fixture(scope="module")
def on_four():
    return run_deepspeed_ranks("ds_autotp.py", ranks=4, timeout_s=280)


@pytest.mark.parametrize("family", INFERENCE)
def test_each_rank_keeps_its_heads_and_exchanges_nothing(on_two, family):
    rows = on_two.check(f"init_inference {family}")
    assert rows[0]["tokens"] == rows[1]["tokens"]
    latent = family == "deepseek_v3"  # which every rank needs whole
    assert [row["heads"][0] for row in rows] == [[0, 1], [0 if latent else 1, 1]]


def test_under_initialize(on_two):
    assert [row["heads"] for row in on_two.check("initialize")] == [[[0, 1]] * 2, [[1, 1]] * 2]


@pytest.mark.parametrize("family", FOLDED)
def test_peers_in_one_expert_group_are_distinct_requests(on_two, family):
    """Expert parallelism over the tensor-parallel ranks: each head's entry is stored once in the group."""
    rows = on_two.check(f"folded {family}")
    assert rows[0]["tokens"] == rows[1]["tokens"]
    appended = sum(row["stats"]["entries_appended"] for row in rows)
    assert appended == 2 * 2 * (13 + 11), "ranks, layers, and the tokens of a prompt with those generated but for the last"
    assert sum(row["stats"]["entries_live"] for row in rows) == appended


@pytest.mark.parametrize(
    "name",
    ["replicated peers", "sinks", "one head", "a size in words", "cut twice", "other tokens on a peer", "other lengths on a peer"],
)
def test_refusals(on_two, name):
    on_two.check(f"refused: {name}")


def test_detach(on_two):
    on_two.check("a detached model is the host's")


@pytest.mark.skipif(not LONG, reason="four ranks, in the long form; two above")
@pytest.mark.parametrize("name", ["init_inference", "refused: two of four", *ON_FOUR, *FOLDED_ON_FOUR])
def test_on_four_ranks(on_four, name):
    on_four.check(name)
