"""Exactness over process groups: each launch runs many checks, each check is a test. World sizes 1, 2 and 4, gloo on loopback."""

import pytest

from tests.dist.jobs.exact_storage import NAMES, storage_cases
from tests.dist.launcher import JobResult, run_gloo
from tests.long_form import short_or_long
from tests.tiny_models import FAMILIES

pytestmark = [pytest.mark.dist, pytest.mark.timeout(420)]
WORLDS = pytest.mark.parametrize("world", [1, 2, 4], ids="world{}".format, scope="module")
FEW_RANKS = pytest.mark.parametrize("world", short_or_long([1, 2], [1, 2, 4]), ids="world{}".format, scope="module")
_jobs: dict[tuple, JobResult] = {}


def job(name: str, world: int, *args: object, timeout_s: float = 400) -> JobResult:
    """One launch per job and world, shared by the tests that look at its checks."""
    key = (name, world, args)
    if key not in _jobs:
        _jobs[key] = run_gloo(name, args, ranks=world, timeout_s=timeout_s)
    return _jobs[key]


def families(world: int) -> list[str]:
    """Short, on 4 ranks: windows, latents, sinks. Grouped heads alone are test_every_home's; routers know nothing of ranks."""
    return list(FAMILIES) if world < 4 else short_or_long(["mixtral", "deepseek_v3", "gpt_oss"], list(FAMILIES))


FAMILY_CASES = [(family, world) for world in (1, 2, 4) for family in families(world)]


@pytest.mark.parametrize(("family", "world"), FAMILY_CASES, ids=[f"{family}-world{world}" for family, world in FAMILY_CASES])
def test_every_family(family: str, world: int):
    result = job("exact_families.py", world, *families(world))
    for kind in ("replicated", "unpadded", "distinct", "chunked"):
        result.check(f"{family} {kind}")


STORAGE = [(s, p, name, world) for world in (1, 2, 4) for name in NAMES for s, p in storage_cases(name, world)]


@pytest.mark.parametrize(("source", "placement", "family", "world"), STORAGE, ids=["{}-{}-{}-world{}".format(*case) for case in STORAGE])
def test_every_home(source: str, placement: str, family: str, world: int, tmp_path_factory: pytest.TempPathFactory):
    gate = tmp_path_factory.getbasetemp() / "gate"
    result = job("exact_storage.py", world, gate)
    for requests in ("replicated", "distinct"):
        result.check(f"{family} {source} {placement} {requests}")


@WORLDS
def test_homes_depend_on_shards_not_on_ranks(world: int, tmp_path_factory: pytest.TempPathFactory):
    """num_shards 4: the entries of every expert, and of every shard, are the same on 1, 2 and 4 ranks."""
    gate = tmp_path_factory.getbasetemp() / "gate"
    for family in ("qwen3_moe", "deepseek_v3"):
        check = f"{family} previous_layer experts replicated"
        rows = job("exact_storage.py", world, gate).check(check)
        alone = job("exact_storage.py", 1, gate).check(check)[0]
        by_expert = [sum(counts) for counts in zip(*(row["load_per_expert"] for row in rows), strict=True)]
        assert by_expert == alone["load_per_expert"]
        assert sum(rows[0]["load_per_rank"]) == alone["load_per_rank"][0]


@FEW_RANKS
@pytest.mark.parametrize(
    "check",
    [
        *(
            f"{m} {what} {r}"
            for m in ("qwen3_moe", "mixtral")
            for what in ("beam search", "assisted decoding")
            for r in ("replicated", "distinct")
        ),
        *(f"{m} requests come and go on their own" for m in ("qwen3_moe", "mixtral")),
        "finished rank keeps step, its dummy tokens are not stored",
        "a rank without tokens joins by lockstep",
        "generations one after another leak nothing",
    ],
)
def test_rows_that_move(check: str, world: int):
    job("rows.py", world).check(check)


@FEW_RANKS
@pytest.mark.parametrize(
    "check",
    [
        "replicated 1100 tokens",
        "distinct 1100 tokens",
        "collectives of a decode step, replicated",
        "collectives of a decode step, distinct",
        "plan against the store, replicated",
        "plan against the store, distinct",
        "four shards whatever the ranks",
        "bf16 error against fp32",
    ],
)
def test_bundled_model(check: str, world: int):
    job("bundled.py", world).check(check)


@pytest.mark.parametrize(
    "check",
    [
        "replicated ranks that sample differently stop, all of them",
        "sampling alike on all ranks is fine",
        "declared replicated, but the prompts differ",
        "replicated decode against a longer forward of another rank",
        "the model works again afterwards",
        "overflow error: a shard is full",
        "overflow spill: the same load fits",
        "no shard has room",
        "synced_gpus=False is refused",
        "what a probe refuses on one rank is refused on all, and the group goes on",
    ],
)
def test_ranks_fail_together(check: str):
    job("failures.py", 2, "all").check(check)


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_lost_rank_ends_the_others(how: str):
    rows = [row for row in job("failures.py", 2, how).rows if row["rank"] == 0]
    assert [row["ok"] for row in rows] == [True], rows
