"""What training keeps beside a parameter: gradients, a copy in fp32, state of torch optimizers. Read and written where they lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

# Attributes of a parameter that hold a tensor of its shape: torch's, and those of Megatron-Core's DDP and mixed-precision optimizers.
BESIDE = ("grad", "main_grad", "main_param")


class Trained:
    """Of the parameters of a model, under the optimizers that train it; none = nothing but what hangs on the parameters."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer] = ()) -> None:
        self.optimizers = list(optimizers)

    def beside(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """By name: "/..." what every parameter of the kind has, "?..." what one may lack. Numbers are given as 0-d tensors."""
        found = {_named(name): x for name in BESIDE if isinstance(x := getattr(parameter, name, None), Tensor)}
        for key, value in self._state(parameter).items():
            found[f"?state/{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
        return found

    def put(self, parameter: nn.Parameter, found: dict[str, Tensor]) -> None:
        """Of another parameter of the same kind. What it lacks is gone here, as for an expert that no token has reached."""
        for name in BESIDE:
            new, own = found.get(_named(name)), getattr(parameter, name, None)
            if new is not None and own is not None:
                own.copy_(new)
            elif name == "grad":
                parameter.grad = None if new is None else new.clone()
        prefix = "?state/"
        new = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
        for optimizer in self._owners(parameter):
            own = optimizer.state.pop(_key(parameter), {})
            if new:
                optimizer.state[_key(parameter)] = {key: _like(own.get(key), value) for key, value in new.items()}

    def rows(self, parameter: nn.Parameter) -> list[Tensor]:
        """Of `beside`, what has the parameter's shape. Raises: ValueError for state whose rows can't be told apart."""
        found = self.beside(parameter)
        odd = [name for name, x in found.items() if x.dim() and x.shape != parameter.shape]
        if odd:
            raise ValueError(
                f"the optimizer's {odd[0].removeprefix('?state/')} of a router is {list(found[odd[0]].shape)}, not of its shape"
            )
        return [x for x in found.values() if x.shape == parameter.shape]

    def owns(self, parameter: nn.Parameter) -> bool:
        return any(True for _ in self._owners(parameter))

    def _owners(self, parameter: nn.Parameter) -> Iterator[torch.optim.Optimizer]:
        trained = _key(parameter)
        for optimizer in self.optimizers:
            if any(trained is one for group in optimizer.param_groups for one in group["params"]):
                yield optimizer

    def _state(self, parameter: nn.Parameter) -> dict:
        found = [optimizer.state[_key(parameter)] for optimizer in self.optimizers if _key(parameter) in optimizer.state]
        return found[0] if found else {}


def _named(name: str) -> str:
    return f"?{name}" if name == "grad" else f"/{name}"


def _key(parameter: nn.Parameter) -> Tensor:
    """What the optimizer steps: the parameter, or Megatron-Core's copy of it in fp32."""
    main = getattr(parameter, "main_param", None)
    return parameter if main is None else main


def _like(own, value: Tensor):
    if isinstance(own, Tensor) and own.shape == value.shape:
        return own.copy_(value)
    return value.clone() if own is None or isinstance(own, Tensor) else type(own)(value.item())
