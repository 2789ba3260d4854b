"""Fits that engines must agree on: parts, windows, and what all ranks do together, in one process."""

import torch

from pikv_ds.training.engine import Optimizing
from pikv_ds.training.fit import FitPlan
from pikv_ds.training.local import LocalEngine
from pikv_ds.training.order import generator_at, window_at
from pikv_ds.training.part import PartLoss
from pikv_ds.training.parts.kv_gate import KVGatePart
from tests.training.windows import SPECS, Mean, facts, windows

STEPS, SEED = 20, 5
OPTIMIZING = Optimizing(steps=STEPS, lr=0.05, warmup=3, clip=0.5)
DATA, HELD = windows(5), windows(3, 50)


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


PARTS = {"kv_gate": KVGatePart(page_size=4, queries=8), "listed": ListedPart()}


def model(name: str = "kv_gate") -> PartLoss:
    torch.manual_seed(3)
    return PartLoss(PARTS[name], PARTS[name].build(facts()))


def alone(name: str, world: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The oracle. -> losses and the last weights."""
    engine, losses = LocalEngine(model(name), OPTIMIZING), []
    for step in range(STEPS):
        row = []
        for rank in range(world):
            found = engine.loss(DATA[window_at(SEED, len(DATA), step * world + rank)], generator_at(SEED, step, rank))
            engine.backward(found["loss"], world)
            row.append(found["loss"].item())
        engine.step()
        losses.append(sum(row) / world)
    return losses, engine.weights()


def plan(**more) -> FitPlan:
    return FitPlan(**{"steps": STEPS, "seed": SEED, "every": 5, **more})


def apart(rows: list[dict], losses: list[float]) -> float:
    return max(abs(row["loss"] - x) for row, x in zip(rows, losses, strict=True))


class Killed(Exception):
    pass


def kill(row: dict) -> None:
    if row["step"] == 11:
        raise Killed
