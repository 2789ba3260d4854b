"""Rows that move: beam search, assisted decoding (crop), early end, ranks without tokens, generations one after another."""

import torch
import torch.distributed as dist

import pikv_ds
from pikv_ds.cache.inspect import CacheProbe
from tests.dist.jobs.exact import assert_conserved, assert_same, generate, generate_sharded
from tests.dist.jobs.report import Report
from tests.host_guard import host_is_forbidden
from tests.tiny_models import prompt, tiny_model


def beams(model, ids, mask, **options):
    return model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=20,
        num_beams=4,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )


def check_beams(report: Report, name: str, model, group) -> None:
    rank = dist.get_rank()
    for requests in ("replicated", "distinct"):
        with report.check(f"{name} beam search {requests}"):
            ids = prompt(13, seed=4, batch=2) if requests == "replicated" else prompt(9 + 5 * rank, seed=40 + rank, batch=2)
            mask = torch.ones_like(ids)
            mask[1, :3] = 0
            reference = beams(model, ids, mask)
            with pikv_ds.attach(model, {"page_size": 4, "storage": {"requests": requests}}, group) as cache, host_is_forbidden(model):
                out = beams(model, ids, mask)
                stats = cache.stats()
            assert torch.equal(out.sequences, reference.sequences)
            difference = (out.sequences_scores - reference.sequences_scores).abs().max().item()
            assert difference < 1e-5, difference
            assert_conserved(stats, group)


def check_assisted(report: Report, name: str, model, group) -> None:
    rank = dist.get_rank()
    assistant = tiny_model(name, num_hidden_layers=1) if name == "mixtral" else None
    for requests in ("replicated", "distinct"):
        with report.check(f"{name} assisted decoding {requests}") as row:
            ids = prompt(12, seed=5) if requests == "replicated" else prompt(12 + 3 * rank, seed=50 + rank)
            ids = torch.cat([ids, ids], 1)  # repeats itself, so that prompt lookup has something to propose
            reference = generate(model, ids, new_tokens=30)
            options = {"assistant_model": assistant} if assistant else {"prompt_lookup_num_tokens": 4}
            with pikv_ds.attach(model, {"page_size": 4, "storage": {"requests": requests}}, group) as cache:
                out = generate(model, ids, new_tokens=30, **options)
                stats = cache.stats()
            assert torch.equal(out.tokens, reference.tokens)
            assert_conserved(stats, group)
            row["cropped"] = stats["entries_cropped"]
            assert stats["entries_cropped"] > 0 or dist.get_world_size() > 1, "nothing was cropped: the assistant was never wrong"


def check_finished_rank(report: Report, model, group) -> None:
    rank = dist.get_rank()
    with report.check("finished rank keeps step, its dummy tokens are not stored"):
        ids = prompt(10, seed=60 + rank)
        new_tokens = 5 if rank == 0 else 17
        reference = generate(model, ids, new_tokens=new_tokens)
        run = generate_sharded(model, ids, new_tokens=new_tokens, group=group, config={"page_size": 4, "storage": {"requests": "distinct"}})
        assert_same(run, reference, 1e-5)
        lens = torch.tensor(10 + new_tokens - 1)  # the last token is never fed
        appended = torch.tensor(run.stats["entries_appended"])
        dist.all_reduce(lens, group=group)
        dist.all_reduce(appended, group=group)
        assert int(appended) == 2 * int(lens), (int(appended), int(lens))
        assert_conserved(run.stats, group)


def check_rank_without_tokens(report: Report, model, group) -> None:
    rank = dist.get_rank()
    with report.check("a rank without tokens joins by lockstep"):
        ids = prompt(14, seed=70)
        reference = generate(model, ids, new_tokens=8).logits[:, 0]
        with pikv_ds.attach(model, {"page_size": 4, "storage": {"requests": "distinct"}}, group) as cache, torch.no_grad():
            step, token, logits = 0, ids, []
            while cache.lockstep(rank == 0 and step < 8):
                if rank == 0:
                    out = model(token, past_key_values=cache).logits[:, -1]
                    logits.append(out[0])
                    token = out.argmax(-1, keepdim=True)
                else:
                    model(**cache.idle_inputs())
                step += 1
            assert step == 8, step
            if rank == 0:
                assert (torch.stack(logits) - reference).abs().max() < 1e-5
            assert sum(cache.stats()["load_per_rank"]) == 2 * (14 + 7)


def check_requests_come_and_go(report: Report, name: str, model, group) -> None:
    """Served traffic: at any step one rank decodes, another is in the middle of its prompt, a third has nothing or starts anew."""
    rank = dist.get_rank()
    with report.check(f"{name} requests come and go on their own"), torch.no_grad():
        jobs = [(17 + 5 * rank, 9, 4 + rank), (6, 5 + rank, 6), (25, 3, 7)]  # prompt length, new tokens, columns per prefill forward
        waits = [rank, 2 * rank % 3, 1]
        references = [
            generate(model, prompt(n, seed=100 + 10 * rank + j, batch=1 + j % 2), new_tokens=t) for j, (n, t, _) in enumerate(jobs)
        ]
        with pikv_ds.attach(model, {"page_size": 4, "storage": {"requests": "distinct"}}, group) as cache:

            def traffic():
                for j, (length, new_tokens, columns) in enumerate(jobs):
                    for _ in range(waits[j]):
                        yield None
                    ids = prompt(length, seed=100 + 10 * rank + j, batch=1 + j % 2)
                    cache.begin_generation()
                    logits, pieces = [], list(ids.split(columns, 1))
                    while len(logits) < new_tokens:
                        out = yield pieces.pop(0)
                        if not pieces:
                            logits.append(out.logits[:, -1])
                            pieces.append(logits[-1].argmax(-1, keepdim=True))
                    difference = (torch.stack(logits) - references[j].logits).abs().max().item()
                    assert difference < 1e-5, f"request {j} of rank {rank} differs by {difference:.1e}"

            requests = traffic()
            tokens, active, failure = next(requests), True, None
            while cache.lockstep(active):
                out = model(**cache.idle_inputs()) if tokens is None else model(tokens, past_key_values=cache)
                try:
                    tokens = requests.send(out if tokens is not None else None) if active else None
                except StopIteration:
                    tokens, active = None, False
                except AssertionError as error:  # keep step with the others, report at the end
                    tokens, active, failure = None, False, error
            assert_conserved(cache.stats(), group)
        if failure:
            raise failure


def check_generations(report: Report, model, group) -> None:
    with report.check("generations one after another leak nothing"):
        rank = dist.get_rank()
        with pikv_ds.attach(model, {"page_size": 4}, group) as cache:
            for turn in range(3):
                ids = prompt(8 + 9 * turn, seed=80 + turn, batch=1 + turn)
                if turn == 1:
                    ids = prompt(8 + rank, seed=90 + rank, batch=2)  # the mode changes between generations
                run = generate(model, ids, new_tokens=6)
                assert cache.stats()["requests"] == (
                    "distinct" if turn == 1 and dist.get_world_size() > 1 else "replicated" if dist.get_world_size() > 1 else "local"
                )
                live = torch.tensor(cache.stats()["entries_live"])
                dist.all_reduce(live, group=group)
                tokens = torch.tensor(ids.numel() + 5 * ids.shape[0])
                if cache.stats()["requests"] == "distinct":
                    dist.all_reduce(tokens, group=group)
                assert int(live) == 2 * int(tokens), (turn, int(live), int(tokens))
            cache.reset()
            assert cache.stats()["kv_bytes_allocated"] <= CacheProbe(cache.core).formats[0].record_bytes, cache.stats()
        reference = generate(model, ids, new_tokens=6)
        assert_same(run, reference, 1e-5)


def main() -> None:
    report = Report()
    dist.init_process_group("gloo")
    group = dist.new_group()
    for name in ("qwen3_moe", "mixtral"):
        model = tiny_model(name)
        check_beams(report, name, model, group)
        check_assisted(report, name, model, group)
        check_requests_come_and_go(report, name, model, group)
    model = tiny_model("qwen3_moe")
    check_finished_rank(report, model, group)
    check_rank_without_tokens(report, model, group)
    check_generations(report, model, group)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
