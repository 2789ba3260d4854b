"""A recorder of steps that any machine has: the ops that were asked for, and asks for them again with the same tensors.

What torch.cuda.graph does to a device, op by op: results of the first time are the places for results of later times, nothing of Python
runs again, and numbers of the host stay what they were. So what would be wrong in a graph is wrong here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.device.far import READS, SHAPES, FarTensor

EMPTY = {"aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty_strided"}


class Tape(TorchDispatchMode):
    """A pikv_ds.cache.step_graph.Recorder."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []

    def record(self, work: Callable[[], Any]) -> Any:
        with self:
            return work()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        assert function not in READS and name.removeprefix("aten::") not in SHAPES, (
            f"{name} makes the host wait, in a step that is recorded"
        )
        made = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, made))
        return made

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, made in self.calls:
            if function._schema.name in EMPTY:
                for place in tensors(made):
                    held(place).view(torch.uint8).fill_(255)  # NaN and -1: nothing may count on what lies there
                continue
            again = function(*args, **kwargs)
            given = {held(x).untyped_storage().data_ptr() for x in tensors((args, kwargs))}
            for place, new in zip(tensors(made), tensors(again), strict=True):
                if held(place).untyped_storage().data_ptr() not in given:  # else it is a view, or was written in place
                    held(place).copy_(held(new))
            for work in tree_leaves(again):
                if isinstance(work, torch.ScriptObject) and "Work" in str(work._type()):
                    work.wait()

    @property
    def asked(self) -> list[tuple]:
        """What was asked for, and with which shapes."""
        return [(function._schema.name, *(tuple(x.shape) for x in tensors((args, kwargs)))) for function, args, kwargs, _ in self.calls]


def tensors(tree: Any) -> Iterator[Tensor]:
    return (x for x in tree_leaves(tree) if isinstance(x, Tensor))


def held(x: Tensor) -> Tensor:
    """The numbers of a tensor, also of one that is far."""
    return x.held if isinstance(x, FarTensor) else x
