"""A part under DeepSpeed: the curve of every ZeRO stage is that of one process. Arguments: a folder."""

import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from pikv_ds.adapters.deepspeed.train import DeepSpeedTraining
from pikv_ds.adapters.deepspeed.train_config import read
from pikv_ds.training.engine import Optimizing
from pikv_ds.training.fit import FitPlan, fit
from pikv_ds.training.local import LocalEngine
from pikv_ds.training.order import generator_at, window_at
from pikv_ds.training.part import PartLoss
from pikv_ds.training.parts.kv_gate import KVGatePart
from tests.dist.jobs.report import Report
from tests.training.windows import SPECS, Mean, facts, windows

STEPS, SEED = 20, 5


class Listed(torch.nn.Module):
    """Parameters of all layers in one module that is called once a layer, some of them in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = torch.nn.ParameterList([torch.ones(2, 8) for _ in SPECS])
        self.shared = torch.nn.Linear(8, 8)
        self.bias = torch.nn.Parameter(torch.zeros(2, 8))

    def forward(self, layer: int, k: torch.Tensor) -> torch.Tensor:
        return self.shared(k * self.scales[layer] + self.bias)


class ListedPart(Mean):
    """Keys from values: of no use but for its gradients, which are those of every parameter."""

    def build(self, facts):
        return Listed()

    def loss(self, module, window, generator):
        errors = [(module(i, layer.k) - layer.v.float()).square().mean() for i, layer in enumerate(window.layers)]
        return {"loss": torch.stack(errors).mean() + 0 * torch.randn(1, generator=generator).mean()}

    def held_out(self, module, window):
        return {"objective": -self.loss(module, window, torch.Generator())["loss"]}


OPTIMIZING = Optimizing(steps=STEPS, lr=0.05, warmup=3, clip=0.5)
PARTS = {"kv_gate": KVGatePart(page_size=4, queries=8), "listed": ListedPart()}
report, folder = Report(), Path(sys.argv[1])
deepspeed.init_distributed()
data, held = windows(5), windows(3, 50)


def model(name: str = "kv_gate") -> PartLoss:
    torch.manual_seed(3)
    return PartLoss(PARTS[name], PARTS[name].build(facts()))


def alone(name: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """What all ranks do together, in one process: the oracle."""
    engine, losses, world = LocalEngine(model(name), OPTIMIZING), [], dist.get_world_size()
    for step in range(STEPS):
        row = []
        for rank in range(world):
            found = engine.loss(data[window_at(SEED, len(data), step * world + rank)], generator_at(SEED, step, rank))
            engine.backward(found["loss"], world)
            row.append(found["loss"].item())
        engine.step()
        losses.append(sum(row) / world)
    return losses, engine.weights()


def engine(stage: int, name: str = "kv_gate", **more) -> DeepSpeedTraining:
    given = {"zero_optimization": {"stage": stage}, **more}
    return DeepSpeedTraining(model(name), OPTIMIZING, read(given, OPTIMIZING, dist.get_world_size()).part)


def plan(**more) -> FitPlan:
    return FitPlan(**{"steps": STEPS, "seed": SEED, "every": 5, **more})


def apart(rows: list[dict], losses: list[float]) -> float:
    return max(abs(row["loss"] - x) for row, x in zip(rows, losses, strict=True))


class Killed(Exception):
    pass


def kill(row: dict) -> None:
    if row["step"] == 11:
        raise Killed


expected = {name: alone(name) for name in PARTS}
for stage in (0, 1, 2, 3):
    with report.check(f"zero {stage}") as row:
        for name, (losses, weights) in expected.items():
            own = engine(stage, name)
            found = fit(PARTS[name], own, data, held, plan())
            far, now = apart(found.curve, losses), own.weights()
            row[name] = [far, max((now[key] - x).abs().max().item() for key, x in weights.items())]
            assert losses[-1] < losses[0] - 0.01 and max(row[name]) < 1e-5, (row, own.said)
            put = {key: x + 1 for key, x in now.items()}
            own.put(put)
            assert all(torch.allclose(x, put[key]) for key, x in own.weights().items())

for stage in (1, 3):
    with report.check(f"resumed {stage}") as row:
        own = folder / f"zero{stage}"
        try:
            fit(PARTS["kv_gate"], engine(stage), data, held, plan(folder=own), kill)
            raise AssertionError("it was not killed")
        except Killed:
            pass
        torch.manual_seed(99)
        again = fit(PARTS["kv_gate"], engine(stage), data, held, plan(folder=own, resume=True))
        row["apart"] = apart(again.curve, expected["kv_gate"][0])
        assert row["apart"] < 1e-6 and len(again.curve) == STEPS, row

with report.check("bf16") as row:
    for stage in (1, 3):
        found = fit(PARTS["kv_gate"], engine(stage, bf16={"enabled": True}), data, held, plan())
        row[f"apart {stage}"] = apart(found.curve, expected["kv_gate"][0])
        assert 1e-6 < row[f"apart {stage}"] < 0.05, row

with report.check("accumulated") as row:
    two = fit(PARTS["listed"], engine(2, "listed"), data, held, plan(windows_per_step=2))
    local = LocalEngine(model("listed"), OPTIMIZING)
    losses = []
    for step in range(STEPS):
        each = []
        for place in range(4):
            found = local.loss(data[window_at(SEED, len(data), step * 4 + place)], generator_at(SEED, step, 0))
            local.backward(found["loss"], 4)
            each.append(found["loss"].item())
        local.step()
        losses.append(sum(each) / 4)
    row["apart"] = apart(two.curve, losses)
    assert row["apart"] < 1e-5, row

dist.barrier()
dist.destroy_process_group()
