"""A part under DeepSpeed: the curve of every ZeRO stage is that of one process. Arguments: a folder."""

import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from pikv_ds.adapters.deepspeed.train import DeepSpeedTraining
from pikv_ds.adapters.deepspeed.train_base import any_rank, spread_over_ranks
from pikv_ds.adapters.deepspeed.train_config import read
from pikv_ds.adapters.hf.record import Recorder
from pikv_ds.training.fit import fit
from pikv_ds.training.local import LocalEngine
from pikv_ds.training.order import generator_at, window_at
from tests.dist.jobs.report import Report
from tests.long_form import LONG
from tests.tiny_models import prompt, tiny_model
from tests.training.fits import DATA, HELD, OPTIMIZING, PARTS, SEED, STEPS, Killed, alone, apart, kill, model, plan

report, folder = Report(), Path(sys.argv[1])
deepspeed.init_distributed()


def engine(stage: int, name: str = "kv_gate", **more) -> DeepSpeedTraining:
    given = {"zero_optimization": {"stage": stage}, **more}
    return DeepSpeedTraining(model(name), OPTIMIZING, read(given, OPTIMIZING, dist.get_world_size()).part)


expected = {name: alone(name, dist.get_world_size()) for name in PARTS}
for stage in (0, 1, 2, 3) if LONG else (1, 3):
    with report.check(f"zero {stage}") as row:
        for name, (losses, weights) in expected.items():
            own = engine(stage, name)
            found = fit(PARTS[name], own, DATA, HELD, plan())
            far, now = apart(found.curve, losses), own.weights()
            row[name] = [far, max((now[key] - x).abs().max().item() for key, x in weights.items())]
            assert losses[-1] < losses[0] - 0.01 and max(row[name]) < 1e-5, (row, own.said)
            put = {key: x + 1 for key, x in now.items()}
            own.put(put)
            assert all(torch.allclose(x, put[key]) for key, x in own.weights().items())

for stage in (1, 3) if LONG else (3,):
    with report.check(f"resumed {stage}") as row:
        own = folder / f"zero{stage}"
        try:
            fit(PARTS["kv_gate"], engine(stage), DATA, HELD, plan(folder=own), kill)
            raise AssertionError("it was not killed")
        except Killed:
            pass
        torch.manual_seed(99)
        again = fit(PARTS["kv_gate"], engine(stage), DATA, HELD, plan(folder=own, resume=True))
        row["apart"] = apart(again.curve, expected["kv_gate"][0])
        assert row["apart"] < 1e-6 and len(again.curve) == STEPS, row

with report.check("bf16") as row:
    for stage in (1, 3) if LONG else (1,):
        found = fit(PARTS["kv_gate"], engine(stage, bf16={"enabled": True}), DATA, HELD, plan())
        row[f"apart {stage}"] = apart(found.curve, expected["kv_gate"][0])
        assert 1e-6 < row[f"apart {stage}"] < 0.05, row

with report.check("accumulated") as row:
    two = fit(PARTS["listed"], engine(2, "listed"), DATA, HELD, plan(windows_per_step=2))
    local = LocalEngine(model("listed"), OPTIMIZING)
    losses = []
    for step in range(STEPS):
        each = []
        for place in range(4):
            found = local.loss(DATA[window_at(SEED, len(DATA), step * 4 + place)], generator_at(SEED, step, 0))
            local.backward(found["loss"], 4)
            each.append(found["loss"].item())
        local.step()
        losses.append(sum(each) / 4)
    row["apart"] = apart(two.curve, losses)
    assert row["apart"] < 1e-5, row

for stage in (0, 3):
    with report.check(f"base {stage}") as row:  # windows of a model under AutoEP, each rank its own, beside those of the whole model
        ids = torch.stack([prompt(24, seed=i)[0] for i in range(3)])
        whole = Recorder(tiny_model("qwen3_moe"), ids)
        block = {"expert_parallel": {"enabled": True, "autoep_size": 2}, "zero_optimization": {"stage": stage}}
        base = spread_over_ranks(tiny_model("qwen3_moe"), read(block, OPTIMIZING, dist.get_world_size()).base)
        spread = Recorder(base, ids, any_rank=any_rank)
        row["apart"] = 0.0
        for index in (0, 1 + dist.get_rank(), 0, 2 * dist.get_rank()):  # the last: one rank has kept its own, the other has not
            for own, expected in zip(spread[index].layers, whole[index].layers, strict=True):
                far = (getattr(own, name) - getattr(expected, name) for name in ("q", "k", "v", "hidden"))
                row["apart"] = max(row["apart"], *(x.abs().max().item() for x in far))
        assert row["apart"] < 1e-5, row

dist.barrier()
dist.destroy_process_group()
