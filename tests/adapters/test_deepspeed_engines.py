"""The DeepSpeed adapter on 2 gloo ranks; one launch serves many tests."""

import csv

import pytest

from tests.dist.launcher import run_deepspeed_ranks

pytestmark = [pytest.mark.dist, pytest.mark.slow]

FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3")
REFUSALS = (
    "gpt-oss under AutoEP",
    "experts not divisible",
    "unknown expert_parallel key",
    "unknown pikv key",
    "wrapped model",
)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ds_generate")
    return run_deepspeed_ranks("ds_generate.py", [folder], timeout_s=280), folder


@pytest.fixture(scope="module")
def training():
    return run_deepspeed_ranks("ds_training.py", timeout_s=280)


def assert_conserved(rows):
    total = {name: sum(row["stats"][name] for row in rows) for name in rows[0]["stats"]}
    left = sum(total[f"entries_{what}"] for what in ("live", "expired", "evicted", "cropped"))
    assert left == total["entries_appended"] > 0


def test_job_ended_well(job):
    result, _ = job
    assert result.returncode == 0, result.describe()


@pytest.mark.parametrize("requests", ["replicated", "distinct"])
@pytest.mark.parametrize("family", FAMILIES)
def test_autoep_text_equals_eager(job, family, requests):
    rows = job[0].check(f"autoep {family} {requests}")
    assert_conserved(rows)
    if requests == "replicated":
        assert rows[0]["tokens"] == rows[1]["tokens"]
        assert all(row["stats"]["kv_bytes_allocated"] > 0 for row in rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_autoep_patches_nothing_beyond_the_engine(job, family):
    job[0].check(f"autoep {family} leaves configuration and registry alone")
    job[0].check(f"autoep {family} detach")


@pytest.mark.parametrize("family", FAMILIES)
def test_placement_of_layers_without_a_descriptor(job, family):
    job[0].check(f"autoep {family} without a descriptor of its placement")


def test_init_inference_starts_the_group_and_shards(job):
    assert_conserved(job[0].check("init_inference"))


def test_replicated_experts_under_initialize(job):
    assert_conserved(job[0].check("replicated experts under initialize"))


def test_install_and_uninstall(job):
    job[0].check("install")


def test_an_engine_makes_the_op_known(job):
    job[0].check("the op is known to DeepSpeed")


def test_disabled_block_is_bit_identical(job):
    job[0].check("disabled")


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(job, name):
    job[0].check(f"refused: {name}")


def test_monitor_writes_the_sum_over_the_group(job):
    result, folder = job
    result.check("monitor")
    with (folder / "run" / "PiKV_ep_size_2_entries_appended.csv").open() as file:
        header, *lines = list(csv.reader(file))
    # 12 new tokens: prefill and 11 decode steps, written every 4 steps.
    assert header == ["step", "entries_appended"] and [int(step) for step, _ in lines] == [4, 8, 12]
    # 2 layers; prompts of 13 and 19 tokens, and one token of each rank per decode step.
    assert [float(value) for _, value in lines] == [2 * (13 + 19 + 2 * (step - 1)) for step in (4, 8, 12)]
    assert (folder / "run" / "PiKV_ep_size_2_kv_bytes_allocated_fullest.csv").is_file()


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("experts", ["autoep", "replicated"])
def test_training_losses_are_bit_identical(training, experts, stage):
    training.check(f"losses {experts} zero{stage}")


def test_generate_under_zero3(training):
    training.check("zero3 generate")
