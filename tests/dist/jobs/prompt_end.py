"""Prompts of several lengths in chunks, a row per rank: each is kept until its own end, and all ranks see the same."""

import torch
import torch.distributed as dist

import pikv_ds
from pikv_ds.cache.inspect import CacheProbe
from tests.dist.jobs.report import Report
from tests.tiny_models import prompt, tiny_model

LENGTHS, CHUNK, BUDGET = (64, 40, 50, 17), 16, 32
BLOCK = {
    "page_size": 4,
    "storage": {"num_shards": 4, "requests": "distinct"},
    "scheduling": {"method": "knorm", "budget_tokens": BUDGET, "sink_tokens": 2, "recent_tokens": 6},
}


def main() -> None:
    dist.init_process_group("gloo")
    report, rank, size = Report(), dist.get_rank(), dist.get_world_size()
    model = tiny_model("qwen3_moe")
    with report.check("each until its end"), torch.no_grad(), pikv_ds.attach(model, BLOCK, dist.group.WORLD) as attached:
        cache = attached.new_cache()
        cache.expect_prompt(LENGTHS[rank])
        ids = prompt(LENGTHS[rank] + 8, seed=rank)
        for forward in range(1, 6):
            done = min(cache.columns + CHUNK, LENGTHS[rank]) if cache.columns < LENGTHS[rank] else cache.columns + 1
            model(ids[:, cache.columns : done], past_key_values=cache, use_cache=True)
            probe = CacheProbe(cache.core)
            for row, length in enumerate(LENGTHS[:size]):
                ended = forward * CHUNK >= length
                gone = max(max(of_row[row]) for of_row in probe.evicted)
                assert (gone > 0) == ended and probe.lens[row] - gone <= (BUDGET if ended else length), (forward, row, gone, probe.lens)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
