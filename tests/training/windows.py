"""Windows of random heads, and a part so small that one can see what the loop does with it."""

import torch
from torch import nn

from pikv_ds.spec import LayerSpec
from pikv_ds.training.engine import Optimizing
from pikv_ds.training.local import LocalEngine
from pikv_ds.training.part import LearnedPart, PartLoss
from pikv_ds.training.recorded import LayerWindow, ModelFacts, Window

SPECS = [LayerSpec(layer_idx=i, num_kv_heads=2, k_dim=8, v_dim=8) for i in range(2)]


def window(seed: int, tokens: int = 48, dtype: torch.dtype = torch.float32) -> Window:
    draw = torch.Generator().manual_seed(seed)
    layers = []
    for spec in SPECS:
        q, k, v, hidden = (
            torch.randn(tokens, *shape, generator=draw, dtype=dtype) for shape in ((4, spec.k_dim), (2, spec.k_dim), (2, spec.v_dim), (16,))
        )
        layers.append(LayerWindow(q=2 * q, k=2 * k, v=v, hidden=hidden, scale=spec.k_dim**-0.5))
    ids = torch.randint(0, 100, (tokens,), generator=draw)
    return Window(ids=ids, question=torch.zeros(tokens, dtype=torch.bool), layers=tuple(layers))


def windows(count: int, first: int = 0) -> list[Window]:
    return [window(first + i) for i in range(count)]


def facts() -> ModelFacts:
    return ModelFacts.of(SPECS, window(0))


class Mean(LearnedPart):
    """Learns the mean of the first key channel; draws noise, so that a resumed fit must draw the same."""

    name, serves = "mean", "nothing"

    def __init__(self, *, spoil_at: int = -1) -> None:
        self.spoil_at, self.calls = spoil_at, 0

    def options(self) -> dict[str, object]:
        return {}

    def build(self, facts: ModelFacts) -> nn.Module:
        return nn.Linear(1, 1, bias=False)

    def loss(self, module, window, generator):
        self.calls += 1
        noise = torch.randn(1, generator=generator)
        spoil = torch.nan if self.calls - 1 == self.spoil_at else 1.0
        error = (module(torch.ones(1, 1)) - window.layers[0].k[:, 0, 0].mean() - 0.1 * noise).square().mean()
        return {"loss": spoil * error, "noise": noise.mean()}

    def held_out(self, module, window):
        return {"objective": -(module(torch.ones(1, 1)) - 0.5).square().mean()}


def engine_of(part: LearnedPart, steps: int, lr: float = 0.05) -> LocalEngine:
    torch.manual_seed(3)
    module = part.build(facts())
    part.begin(module, windows(2))
    return LocalEngine(PartLoss(part, module), Optimizing(steps=steps, lr=lr, warmup=1))
