"""Sessions on the ranks of a group. Arguments: "save" or "load", and the folder of files that the first writes and the second reads."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import pikv_ds
from pikv_ds.errors import SessionError, UnsupportedError
from tests.dist.jobs.failures import expect
from tests.dist.jobs.report import Report
from tests.sessions.test_turns import generate
from tests.tiny_models import prompt, tiny_model

NEXT = 64
KEEP = {"sink_tokens": 2, "recent_tokens": 6}
BLOCKS = {
    "exact": {"page_size": 4},
    "int8 behind a raw window": {"page_size": 64, "compression": {"method": "int8", "raw_recent_tokens": 64}},
    "h2o": {"page_size": 4, "scheduling": {"method": "h2o", "budget_tokens": 48, **KEEP}},
    "bounds": {"page_size": 4, "routing": {"method": "bounds", "budget_pages": 6, **KEEP}},
    "windows": {"page_size": 4},
}


def family(name: str) -> str:
    return "mixtral" if name == "windows" else "qwen3_moe"


def block(name: str, requests: str = "replicated") -> dict:
    return BLOCKS[name] | {"timeout_s": 60, "storage": {"requests": requests, "num_shards": 4}}


def check_saving(report: Report, folder: Path, group) -> None:
    """Saved where shards are at home, and where they have moved; what comes next is told to those who load it."""
    ranks = dist.get_world_size()
    for name in BLOCKS:
        with report.check(f"save {name}") as row:
            model = tiny_model(family(name))
            with pikv_ds.attach(model, block(name), group) as cache, cache.session("anna") as session:
                said, _ = generate(model, prompt(90, seed=1), session)
                session.save(folder / f"{name}.session")
                dist.barrier()
                before = (folder / f"{name}.session").read_bytes()
                session.rebalance([[(shard + 1) % ranks] for shard in range(4)])
                row["bytes"] = session.save(folder / f"{name} moved.session")
                dist.barrier()
                assert (folder / f"{name} moved.session").read_bytes() == before, "a shard map has changed the file"
                turn = torch.cat([said, prompt(7, seed=2)], 1)
                expected = generate(model, turn, session, max_new_tokens=NEXT)[0]
            if dist.get_rank() == 0:
                (folder / f"{name}.json").write_text(json.dumps({"turn": turn.tolist(), "expected": expected.tolist()}))
    dist.barrier()


def check_loading(report: Report, folder: Path, group) -> None:
    for name in BLOCKS:
        with report.check(f"load {name}"):
            model, known = tiny_model(family(name)), json.loads((folder / f"{name}.json").read_text())
            turn = torch.tensor(known["turn"])
            with pikv_ds.attach(model, block(name), group) as cache:
                generate(model, prompt(20, seed=5))  # the group has another cache
                session = cache.session("anna")
                session.load(folder / f"{name}.session")
                assert session.tokens == turn[:, :-8].tolist()
                got = generate(model, turn, session, max_new_tokens=NEXT)[0]
                assert got.tolist() == known["expected"], (got[0, turn.shape[1] :].tolist(), known["expected"][0][turn.shape[1] :])
                totals = torch.tensor([session.stats()[f"entries_{n}"] for n in ("appended", "loaded", "live", "evicted", "expired")])
                dist.all_reduce(totals, group=group)
                assert totals[0] + totals[1] == totals[2:].sum() and totals[1], totals


def check_forks(report: Report, group) -> None:
    with report.check("forks and turns") as row:
        model = tiny_model("qwen3_moe")
        first, turns = prompt(30, seed=1), [prompt(5, seed=2), prompt(6, seed=3)]
        said = generate(model, first)[0]
        expected = [generate(model, torch.cat([said, turn], 1)) for turn in turns]
        with pikv_ds.attach(model, block("exact"), group) as cache:
            session = cache.session("anna")
            generate(model, first, session)
            session.rebalance([[(shard + 1) % dist.get_world_size()] for shard in range(4)])
            for one, turn, (tokens, logits) in zip((session.fork("bert"), session), turns, expected, strict=True):
                got = generate(model, torch.cat([said, turn], 1), one)
                assert got[0].tolist() == tokens.tolist()
                torch.testing.assert_close(got[1], logits, rtol=0, atol=2e-5)
            row["sessions"] = cache.sessions
            cache.session("bert").close()
            with expect(UnsupportedError, "others from token"):
                generate(model, prompt(60, seed=9), session)


def check_own(report: Report, folder: Path, group) -> None:
    """Every rank has sessions of its own, which need not be at the same point."""
    with report.check("requests of their own"):
        rank, model = dist.get_rank(), tiny_model("qwen3_moe")
        names = [["anna", "bert"], ["anna", "carl", "dora"]][rank % 2]
        with pikv_ds.attach(model, block("exact", "distinct"), group) as cache:
            for at, name in enumerate(names):
                ids, dense = prompt(20 + rank, seed=10 * rank + at), tiny_model("qwen3_moe")
                for turn in range(2 + rank):
                    ids = ids if not turn else torch.cat([ids, prompt(3 + rank, seed=turn)], 1)
                    expected = generate(dense, ids)[0]
                    ids = generate(model, ids, cache.session(name))[0]
                    assert ids.tolist() == expected.tolist()
                if name != "anna":
                    cache.session(name).close()
            assert cache.sessions == ["anna"]
            while cache.lockstep(False):
                model(**cache.idle_inputs())
            with expect(UnsupportedError, "requests of their own"):
                cache.session("anna").save(folder / "own.session")
    assert not (folder / "own.session").exists()


def check_refusals(report: Report, folder: Path, group) -> None:
    """What one rank can't take no rank takes, and all go on with what they had."""
    with report.check("a file that is cut short on one rank"):
        rank, model = dist.get_rank(), tiny_model("qwen3_moe")
        whole = (folder / "exact.session").read_bytes()
        (folder / f"{rank}.session").write_bytes(whole[: len(whole) // 2] if rank == 1 else whole)
        with pikv_ds.attach(model, block("exact"), group) as cache, cache.session("anna") as session:
            said = generate(model, prompt(20, seed=5), session)[0]
            with expect(SessionError, "cut short" if rank == 1 else "rank 1 could not take"):
                session.load(folder / f"{rank}.session")
            turn = torch.cat([said, prompt(7, seed=2)], 1)
            assert generate(model, turn, session)[0].tolist() == generate(tiny_model("qwen3_moe"), turn)[0].tolist()
    with report.check("a folder that is not there"):
        with pikv_ds.attach(model, block("exact"), group) as cache, cache.session("anna") as session:
            generate(model, prompt(20, seed=5), session)
            with expect(SessionError, "could not be written"):
                session.save(folder / "nowhere" / "anna.session")


def main() -> None:
    dist.init_process_group("gloo")
    report, group, folder = Report(), dist.new_group(), Path(sys.argv[2])
    if sys.argv[1] == "save":
        check_saving(report, folder, group)
        check_forks(report, group)
        check_own(report, folder, group)
        check_refusals(report, folder, group)
    else:
        check_loading(report, folder, group)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
