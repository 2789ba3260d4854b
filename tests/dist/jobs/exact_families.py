"""Every model family over the ranks of one group: replicated and distinct requests, ragged batches, chunked prefill. args: families..."""

import sys

import torch
import torch.distributed as dist

from tests.dist.jobs.exact import assert_conserved, assert_same, generate, generate_sharded
from tests.dist.jobs.report import Report
from tests.tiny_models import prompt, tiny_model

TOLERANCE = 1e-5


def ragged(ids: torch.Tensor, pads: list[int]) -> torch.Tensor:
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    return mask


def check_family(report: Report, family: str, group: dist.ProcessGroup) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    model = tiny_model(family)
    with report.check(f"{family} replicated"):
        ids = prompt(21, seed=3, batch=3)
        mask = ragged(ids, [0, 5, 11])
        reference = generate(model, ids, mask, new_tokens=64)
        run = generate_sharded(model, ids, mask, new_tokens=64, group=group, config={"page_size": 4})
        assert run.stats["requests"] == ("replicated" if size > 1 else "local")
        assert_same(run, reference, TOLERANCE)
        assert_conserved(run.stats, group)
    with report.check(f"{family} unpadded"):
        ids = prompt(33, seed=5, batch=2)  # longer than any window
        run = generate_sharded(model, ids, new_tokens=12, group=group)
        assert_same(run, generate(model, ids, new_tokens=12), TOLERANCE)
        assert_conserved(run.stats, group)
    with report.check(f"{family} distinct"):
        batch = 1 + rank % 2
        ids = prompt(9 + 7 * rank, seed=10 + rank, batch=batch)  # another prompt, another length, another batch size on every rank
        mask = ragged(ids, [0, 4][:batch])
        reference = generate(model, ids, mask, new_tokens=64)
        run = generate_sharded(model, ids, mask, new_tokens=64, group=group, config={"page_size": 3})
        assert run.stats["requests"] == ("distinct" if size > 1 else "local")
        assert_same(run, reference, TOLERANCE)
        assert_conserved(run.stats, group)
    with report.check(f"{family} chunked"):
        ids = prompt(22 + 4 * rank, seed=20 + rank, batch=2)
        mask = ragged(ids, [0, 6])
        reference = generate(model, ids, mask, new_tokens=12)
        chunk = -(-ids.shape[1] // 5)  # five chunks on every rank
        run = generate_sharded(model, ids, mask, new_tokens=12, group=group, prefill_chunk_size=chunk)
        assert_same(run, reference, TOLERANCE)


def main() -> None:
    report = Report()
    dist.init_process_group("gloo")
    group = dist.new_group()
    for family in sys.argv[1:]:
        check_family(report, family, group)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
