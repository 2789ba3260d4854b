"""Rollouts between training steps: nothing of the weights before is in them, and nothing of them stays. Arguments: ZeRO stages."""

import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

import pikv_ds
from tests.dist.jobs.ds_compare import MICRO
from tests.dist.jobs.report import Report
from tests.long_form import LONG
from tests.tiny_models import prompt, tiny_model

ROUNDS = 20 if LONG else 6
ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}}
# "prefix" keeps rows of finished requests: rows of older weights must go.
EXACT = {"storage": {"requests": "distinct", "placement": "position"}}  # by position, so that bytes do not depend on weights
PREFIX = {"storage": {**EXACT["storage"], "prefix": {"enabled": True, "budget_tokens": 4096}}}
# name -> (block, whether steps are made in train mode, which alone would drop the rows)
BLOCKS = {"exact": (EXACT, True), "prefix": (PREFIX, True), "prefix, trained in eval mode": (PREFIX, False)}
report = Report()
deepspeed.init_distributed()


def generate(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(ids, do_sample=False, max_new_tokens=8, min_new_tokens=8, synced_gpus=True)


def fresh(engine) -> torch.nn.Module:
    """Another model, with no cache of ours, of the weights that the engine has now. Collective."""
    other = tiny_model("qwen3_moe")
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=engine.zero_optimization_stage() == 3):
        state = {name: x.detach().clone() for name, x in engine.module.state_dict().items()}
    other.load_state_dict(state)
    return other.eval()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


for stage in map(int, sys.argv[1:]):
    for name, (block, in_train_mode) in BLOCKS.items():
        with report.check(f"zero {stage} {name}") as row:
            model = tiny_model("qwen3_moe")
            config = {**MICRO, **ADAM, "zero_optimization": {"stage": stage}, "pikv": block}
            engine, *_ = pikv_ds.initialize(model=model, model_parameters=model.parameters(), config=config)
            ids, texts, bytes_, memory, stale = prompt(40 + 6 * dist.get_rank(), seed=3 + dist.get_rank()), [], [], [], []
            for step in range(ROUNDS):
                engine.eval()
                text = generate(engine.module, ids)
                again = generate(engine.module, ids)
                expected = generate(fresh(engine), ids)
                if not (torch.equal(text, expected) and torch.equal(again, expected)):  # told at the end: other ranks go on
                    stale.append((step, text.tolist(), again.tolist(), expected.tolist()))
                texts.append(tuple(text[0].tolist()))
                bytes_.append(engine.pikv.stats()["kv_bytes_allocated"])
                engine.train(in_train_mode)
                batch = prompt(24, seed=100 + 10 * step + dist.get_rank())
                engine.backward(engine(input_ids=batch, labels=batch, use_cache=False).loss)
                engine.step()
                memory.append(resident())
            assert not stale, stale
            if block is PREFIX and stage < 3:  # with ZeRO-3 every forward gathers weights anew, and nothing is continued
                assert engine.pikv.stats()["prefix_hits"] >= ROUNDS - 1, "the second text of a round continues the first"
            row["texts"], row["kv_bytes"] = len(set(texts)), sorted(set(bytes_))
            row["grown"] = memory[-1] - memory[len(memory) // 2]
            assert row["texts"] > ROUNDS // 2, "a step must change what is generated, or nothing was shown"
            assert max(bytes_[1:]) == min(bytes_[1:]) and row["grown"] < 8 << 20, row
            engine.pikv.detach()

dist.barrier()
dist.destroy_process_group()
