"""Training with rollouts: the losses are those of training without PiKV, bit for bit."""

import deepspeed
import torch
import torch.distributed as dist

import pikv_ds
from pikv_ds.adapters.deepspeed.autoep_shim import registry_shim
from tests.dist.jobs.ds_compare import MICRO, assert_same_text, generate, rank_prompt
from tests.dist.jobs.report import Report
from tests.tiny_models import prompt, tiny_model

OPTIMIZER = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}}
EXPERTS = {"autoep": {"expert_parallel": {"enabled": True, "autoep_size": 2}}, "replicated": {}}
report = Report()
deepspeed.init_distributed()


def losses(config: dict, rollouts: bool) -> list[float]:
    model = tiny_model("qwen3_moe")
    start = pikv_ds.initialize if rollouts else deepspeed.initialize
    with registry_shim():
        engine, *_ = start(model=model, model_parameters=model.parameters(), config=config)
    values = []
    for step in range(3):
        engine.train()
        ids = prompt(24, seed=100 + 10 * step + dist.get_rank())
        # Once with the model's own cache argument, as a user would call it, once without.
        loss = engine(input_ids=ids, labels=ids, use_cache=step == 1).loss
        engine.backward(loss)
        engine.step()
        values.append(loss.item())
        if rollouts:
            engine.eval()
            for requests in ("replicated", "distinct"):
                generate(engine.module, rank_prompt(requests))
    if rollouts:
        assert engine.pikv.stats()["entries_appended"] > 0
    return values


for experts, block in EXPERTS.items():
    for stage in (0, 1):
        with report.check(f"losses {experts} zero{stage}") as row:
            config = {**MICRO, **OPTIMIZER, **block, "zero_optimization": {"stage": stage}}
            row["without"] = losses(config, rollouts=False)
            row["with"] = losses({**config, "pikv": {}}, rollouts=True)
            assert row["with"] == row["without"] and len(set(row["with"])) == 3

with report.check("zero3 generate") as row:
    model = tiny_model("qwen3_moe")
    config = {**MICRO, **OPTIMIZER, "zero_optimization": {"stage": 3}, "pikv": {}}
    engine, *_ = pikv_ds.initialize(model=model, model_parameters=model.parameters(), config=config)
    engine.eval()
    ids = rank_prompt("distinct")
    with torch.no_grad():
        assert_same_text(row, generate(engine.module, ids), "qwen3_moe", ids)

dist.barrier()
dist.destroy_process_group()
