"""Several caches alive on the ranks of a group, and ranks whose generations differ. The oracle is plain transformers on each rank alone."""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import pikv_ds
from pikv_ds.cache.stats import stats
from pikv_ds.errors import PeerError
from tests.dist.jobs.failures import expect
from tests.dist.jobs.report import Report
from tests.tiny_models import prompt, tiny_model

OWN = {"page_size": 4, "timeout_s": 60, "storage": {"requests": "distinct"}}
SAME = {"page_size": 4, "timeout_s": 60, "storage": {"requests": "replicated"}}


def greedy(model, ids, new=6, **options):
    return model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None, **options)


def allocated(core) -> int:
    return stats(core, 0, 0)["kv_bytes_allocated"]


def rest(model, cache) -> None:
    """The loop of a rank that has no work left."""
    while cache.lockstep(False):
        model(**cache.idle_inputs())


class Looks(StoppingCriteria):
    """Runs the model on the newest tokens, on the ranks where it is used."""

    def __init__(self, model) -> None:
        self.model = model

    def __call__(self, ids, scores, **kwargs):
        self.model(ids[:, -5:])
        return torch.zeros(ids.shape[0], dtype=torch.bool)


class Breaks(LogitsProcessor):
    def __call__(self, input_ids, scores):
        raise ArithmeticError


def check_four_alive(report: Report, model, draft, group, block: dict) -> None:
    with report.check(f"four caches, {block['storage']['requests']}"):
        rank = dist.get_rank() if block is OWN else 0
        ids = [prompt(8 + i + 3 * rank, 20 + 4 * i + rank) for i in range(4)]
        options = [{}, {"num_beams": 3}, {"assistant_model": draft}, {}]
        expected = [greedy(model, each, 8, **more) for each, more in zip(ids, options, strict=True)]
        with pikv_ds.attach(model, block, group) as attached:
            caches = [attached.new_cache() for _ in ids]
            seen = [greedy(model, ids[i], 4, past_key_values=caches[i]) for i in (0, 3)]
            beams = greedy(model, ids[1], 8, past_key_values=caches[1], num_beams=3)
            middle = greedy(model, seen[0], 2, past_key_values=caches[0])
            core = caches[3].core
            assert allocated(core)
            caches[3] = None
            assert allocated(core) == 0
            drafted = greedy(model, ids[2], 8, past_key_values=caches[2], assistant_model=draft)
            last = greedy(model, middle, 2, past_key_values=caches[0])
            assert all(allocated(cache.core) for cache in caches[:3])
            again = greedy(model, ids[3], 8)
        assert seen[1].tolist() == expected[3][:, :-4].tolist()
        got = [last, beams, drafted, again]
        assert [each.tolist() for each in got] == [each.tolist() for each in expected]


def check_differing_generations(report: Report, model, group) -> None:
    rank = dist.get_rank()
    with report.check("prefill in chunks, other numbers of them"):
        ids = prompt(12 + 8 * rank, 3 + rank)
        expected = greedy(model, ids)
        with pikv_ds.attach(model, OWN, group):
            assert greedy(model, ids, prefill_chunk_size=8).tolist() == expected.tolist()
    with report.check("other batches, lengths and ends"):
        ids = prompt(9 + rank, 5 + rank, batch=1 + rank)
        expected = greedy(model, ids, 3 + 5 * rank)
        with pikv_ds.attach(model, OWN, group):
            assert greedy(model, ids, 3 + 5 * rank).tolist() == expected.tolist()
    for mine in ([int(n) for n in pair.split(",")] for pair in sys.argv[1:]):
        with report.check(f"{mine[0]} and {mine[1]} prompts, then lockstep"):
            prompts = [prompt(7 + i + 2 * rank, 40 + i + rank) for i in range(mine[rank])]
            expected = [greedy(model, ids).tolist() for ids in prompts]
            with pikv_ds.attach(model, OWN, group) as cache:
                got = [greedy(model, ids).tolist() for ids in prompts]
                rest(model, cache)
                assert got == expected
                got = [greedy(model, ids).tolist() for ids in prompts]  # and once more
                rest(model, cache)
            assert got == expected
    with report.check("a rank that detaches ends the loop of the other"):
        expected = greedy(model, prompt(9, 5)).tolist()
        with pikv_ds.attach(model, OWN, group) as cache:
            if rank == 0:
                assert greedy(model, prompt(9, 5)).tolist() == expected
            else:
                rest(model, cache)
    with report.check("a forward inside the generation of one rank"):
        ids = prompt(9 + rank, 11 + rank)
        expected = greedy(model, ids)
        with pikv_ds.attach(model, OWN, group):
            looks = {"stopping_criteria": StoppingCriteriaList([Looks(model)])} if rank == 0 else {}
            assert greedy(model, ids, **looks).tolist() == expected.tolist()
    with report.check("and then what the other rank has not used yet"):
        ids, other = prompt(9 + rank, 11 + rank), prompt(6 + rank, 15 + rank)
        expected, then = greedy(model, ids), greedy(model, other)
        with pikv_ds.attach(model, OWN, group) as cache:
            looks = {"stopping_criteria": StoppingCriteriaList([Looks(model)])} if rank == 0 else {"past_key_values": cache.new_cache()}
            assert greedy(model, ids, **looks).tolist() == expected.tolist()
            if rank == 1:  # the object of attach has stood for nothing so far on this rank
                assert greedy(model, other).tolist() == then.tolist()
            rest(model, cache)
    with report.check("one rank goes on with a conversation, the other begins"):
        ids, other = prompt(9 + rank, 13 + rank), prompt(6 + rank, 15 + rank)
        expected, begun = greedy(model, ids, 10), greedy(model, other, 4)
        with pikv_ds.attach(model, OWN, group) as cache:
            first = greedy(model, ids, 4, return_dict_in_generate=True)
            got = greedy(model, other, 4) if rank else greedy(model, first.sequences, 6, past_key_values=first.past_key_values)
            assert got.tolist() == (begun if rank else expected).tolist()
            got = greedy(model, first.sequences, 6, past_key_values=first.past_key_values) if rank else greedy(model, other, 4)
            assert got.tolist() == (expected if rank else begun).tolist()
            if rank == 0:
                mine = cache.new_cache()
                assert greedy(model, other, 4, past_key_values=mine).tolist() == begun.tolist()
            rest(model, cache)


def check_drafts(report: Report, model, draft, group) -> None:
    rank = dist.get_rank()
    ids = torch.cat([prompt(9 + 2 * rank, 30 + rank)] * 2, 1)
    expected = greedy(model, ids, 8 + 6 * rank)
    with report.check("attached draft on the same group"), pikv_ds.attach(model, OWN, group), pikv_ds.attach(draft, OWN, group):
        assert greedy(model, ids, 8 + 6 * rank, assistant_model=draft).tolist() == expected.tolist()
    watches = {"scheduling": {"method": "h2o", "budget_tokens": 24, "recent_tokens": 4, "sink_tokens": 2}}
    draft.generation_config.assistant_confidence_threshold = 0.0  # many forwards, then one crop
    expected_later = greedy(model, ids, 30)
    with report.check("a draft that evicts"), pikv_ds.attach(model, OWN, group), pikv_ds.attach(draft, {**OWN, **watches}, group) as drafts:
        assert greedy(model, ids, 30, assistant_model=draft).tolist() == expected_later.tolist()
        assert drafts.stats()["entries_evicted"] > 0
    with report.check("drafts with the first layer"), pikv_ds.attach(model, OWN, group):
        assert greedy(model, ids, 8 + 6 * rank, assistant_early_exit=1).tolist() == expected.tolist()


def check_failures(report: Report, model) -> None:
    rank, hurried = dist.get_rank(), {**OWN, "timeout_s": 2}
    with report.check("a cache that another rank goes on with was dropped"):
        group = dist.new_group(timeout=timedelta(seconds=60))
        with pikv_ds.attach(model, hurried, group) as attached:
            cache = attached.new_cache()
            seen = greedy(model, prompt(9, 5), 3, past_key_values=cache)
            if rank == 1:
                del cache
            with expect(PeerError, "dropped" if rank else "rank 0 of 2"):
                greedy(model, seen, 3, past_key_values=cache) if rank == 0 else rest(model, attached)
    with report.check("one rank raises inside generate()"):
        group = dist.new_group(timeout=timedelta(seconds=60))
        with pikv_ds.attach(model, hurried, group), expect(PeerError if rank else ArithmeticError, ""):
            greedy(model, prompt(9, 5), **({"logits_processor": LogitsProcessorList([Breaks()])} if rank == 0 else {}))


def main() -> None:
    dist.init_process_group("gloo")
    group, report = dist.new_group(), Report()
    model, draft = tiny_model("qwen3_moe"), tiny_model("qwen3_moe", seed=5, num_hidden_layers=1)
    for block in (SAME, OWN):
        check_four_alive(report, model, draft, group, block)
    with torch.no_grad():
        check_differing_generations(report, model, group)
        check_drafts(report, model, draft, group)
        check_failures(report, model)


if __name__ == "__main__":
    main()
