"""AutoEP over pairs of ranks, a prompt of its own on each: on two emulated nodes, or two pairs in one job."""

import os

import torch.distributed as dist

import pikv_ds
from tests.dist.jobs.ds_compare import MICRO, assert_same_text, generate, rank_prompt, ready
from tests.dist.jobs.report import Report
from tests.tiny_models import tiny_model

report = Report()
config = {**MICRO, "expert_parallel": {"enabled": True, "autoep_size": 2}, "pikv": {}}
engine = ready(pikv_ds.initialize, model=tiny_model("qwen3_moe"), config=config)
with report.check("pairs") as row:
    row |= {
        "node": os.environ["CROSS_RANK"],
        "local_size": os.environ["LOCAL_SIZE"],
        "world": dist.get_world_size(),
        "group": dist.get_process_group_ranks(engine.pikv.core.exchange.group),
    }
    ids = rank_prompt("distinct")
    assert_same_text(row, generate(engine.module, ids), "qwen3_moe", ids)
dist.barrier()
dist.destroy_process_group()
