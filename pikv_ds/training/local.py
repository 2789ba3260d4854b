"""LocalEngine: torch's AdamW in this process. What the other engines are compared with."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .engine import Optimizing
from .part import PartLoss
from .recorded import Window

STATE = "local.pt"


class LocalEngine:
    """One process, one device, f32."""

    name, rank, world, writes = "local", 0, 1, True

    def __init__(self, model: PartLoss, optimizing: Optimizing, device: torch.device | str = "cpu") -> None:
        self.model, self.optimizing = model.to(device), optimizing
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=optimizing.lr, weight_decay=optimizing.weight_decay)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, optimizing.rate)

    def loss(self, window: Window, generator: torch.Generator | None) -> dict[str, Tensor]:
        with torch.set_grad_enabled(generator is not None):
            return self.model(window, generator)

    def backward(self, loss: Tensor, of: int) -> None:
        (loss / of).backward()

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, self.optimizing.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()

    def mean(self, values: Tensor) -> Tensor:
        return values

    def weights(self) -> dict[str, Tensor]:
        return {name: x.detach().to("cpu", torch.float32, copy=True) for name, x in self.model.module.state_dict().items()}

    def put(self, weights: dict[str, Tensor]) -> None:
        self.model.module.load_state_dict(weights)

    def save(self, folder: Path) -> None:
        state = {"module": self.model.module.state_dict(), "optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}
        torch.save(state, folder / STATE)

    def load(self, folder: Path) -> None:
        state = torch.load(folder / STATE, map_location=self.parameters[0].device, weights_only=True)
        self.model.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
