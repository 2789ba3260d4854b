"""Bytes of the tensors that are alive while a piece of code runs, op by op: on the meta device too, where none of them has memory."""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """peak: the largest sum over storages that were made inside. What a kernel takes for itself is not seen. ops: names, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self.ops = 0, []
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._before: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        self._before |= given - self._alive.keys()
        result = func(*args, **(kwargs or {}))
        self.ops.append(func.name().removesuffix(".default"))
        self._alive = {key: (ref, size) for key, (ref, size) in self._alive.items() if not ref.expired()}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in given:
                    self._before.discard(storage._cdata)
                    self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result
