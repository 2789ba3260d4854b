"""Requests that begin like earlier ones, on the ranks of a group. The oracle is plain transformers on each rank alone."""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist

import pikv_ds
from pikv_ds.errors import ConfigError, DivergedError
from tests.dist.jobs.failures import expect
from tests.dist.jobs.report import Report
from tests.tiny_models import prompt, tiny_model


def block(requests: str, budget: int = 400) -> dict:
    storage = {"requests": requests, "num_shards": 4, "prefix": {"enabled": True, "budget_tokens": budget}}
    return {"page_size": 4, "timeout_s": 60, "storage": storage}


def generate(model, ids, mask, new: int, **options):
    given = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "output_logits": True, "return_dict_in_generate": True}
    made = model.generate(ids, attention_mask=mask, **given, **options)
    return made.sequences.clone(), torch.stack(made.logits, 1) if made.logits is not None and "num_beams" not in options else None


def asked(mine: int, seed: int):
    """(ids, mask, new tokens) one generation after the other: new, alike, a padded batch of both, a turn, and something else."""
    prefix = prompt(40 + mine, seed=100 + mine)
    yield torch.cat([prefix, prompt(6, seed=seed)], 1), None, 5
    yield torch.cat([prefix, prompt(3 + mine, seed=seed + 1)], 1), None, 4 + 3 * mine
    ids = torch.zeros(2, 60, dtype=torch.int64)
    for row, (pad, own) in enumerate(((5, 15 - mine), (14, 6 - mine))):
        ids[row, pad:] = torch.cat([prefix, prompt(own, seed=seed + 2 + row)], 1)[0]
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[1, :14] = 0
    yield ids, mask, 5
    yield prompt(20, seed=seed + 4), None, 3
    yield prefix, None, 4


def check_alike(report: Report, model, group, requests: str) -> None:
    with report.check(f"alike, {requests}") as row:
        rank = dist.get_rank() if requests == "distinct" else 0
        given = list(asked(rank, seed=10 + 20 * rank))
        expected = [generate(model, *each) for each in given]
        with pikv_ds.attach(model, block(requests), group) as cache:
            for each, (tokens, logits) in zip(given, expected, strict=True):
                got = generate(model, *each)
                assert got[0].tolist() == tokens.tolist()
                torch.testing.assert_close(got[1], logits, rtol=0, atol=1e-5)
            stats = cache.stats()
        row |= {name: stats[name] for name in stats if name.startswith("prefix") or name in ("rows_parked", "requests")}
        assert stats["requests"] == requests and stats["rows_parked"]
        assert stats["prefix_hits"] == 4 and stats["prefix_tokens_reused"] >= 3 * 40
        counts = torch.tensor([stats[f"entries_{name}"] for name in ("live", "cropped", "appended", "forked")])
        dist.all_reduce(counts, group=group)
        assert counts[0] + counts[1] == counts[2] + counts[3]


def check_beams(report: Report, model, group, requests: str) -> None:
    """One rank has beams, the other one row; and one finds its beginning, the other is new."""
    with report.check(f"beams, {requests}"):
        rank = dist.get_rank() if requests == "distinct" else 0
        prefix = prompt(40, seed=1 + rank)
        given = [torch.cat([prefix, prompt(4, seed=5 + at)], 1) for at in range(2)] + [prompt(30, seed=9) if rank else prefix]
        options = {} if rank else {"num_beams": 3}
        expected = [generate(model, ids, None, 5, **options)[0] for ids in given]
        with pikv_ds.attach(model, block(requests), group) as cache:
            for ids, tokens in zip(given, expected, strict=True):
                assert generate(model, ids, None, 5, **options)[0].tolist() == tokens.tolist()
            assert cache.stats()["prefix_hits"] == (1 if rank else 6)


def check_refused(report: Report, model, group) -> None:
    with report.check("auto is refused"):
        with expect(ConfigError, "replicated"):
            pikv_ds.attach(model, block("auto"), group)


def check_diverged(report: Report, model, group) -> None:
    """Ranks that say they are replicated and are not: both stop, also when one finds its beginning and the other does not."""
    with report.check("diverged"):
        with pikv_ds.attach(model, block("replicated"), group) as cache, torch.no_grad():
            model(prompt(40, seed=1))
            cache.begin_generation()
            ids = torch.cat([prompt(40, seed=1), prompt(3, seed=2)], 1) if dist.get_rank() else prompt(43, seed=3)
            held = cache.reuse(ids)
            with expect(DivergedError, "differs between"):
                model(ids[:, held:], past_key_values=cache)


def main() -> None:
    torch.manual_seed(0)
    report = Report()
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    model, group = tiny_model(sys.argv[1]), dist.group.WORLD
    for requests in ("replicated", "distinct"):
        check_alike(report, model, group, requests)
        check_beams(report, model, group, requests)
    check_refused(report, model, group)
    check_diverged(report, model, group)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
