"""The torch optimizers inside of Megatron-Core's, whose state follows an expert to its new rank."""

from __future__ import annotations

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer

from pikv_ds.errors import UnsupportedError


def torch_optimizers(optimizer) -> list[torch.optim.Optimizer]:
    """Of an optimizer of Megatron-Core or of torch, or of several; None and () give none.

    Raises: UnsupportedError for one whose state lies in pieces over ranks or devices.
    """
    if optimizer is None:
        return []
    if isinstance(optimizer, list | tuple):
        return [inner for one in optimizer for inner in torch_optimizers(one)]
    if isinstance(optimizer, ChainedOptimizer):
        return torch_optimizers(list(optimizer.chained_optimizers))
    name = type(optimizer).__name__
    if isinstance(optimizer, DistributedOptimizer) or name == "HybridDeviceOptimizer":
        raise UnsupportedError(
            f"{name} has the state of experts and routers in pieces, which don't follow them to another rank; train with "
            f"use_distributed_optimizer = False and optimizer_cpu_offload = False, or move the entries alone: rebalance(experts=False)"
        )
    if isinstance(optimizer, MegatronOptimizer):
        return torch_optimizers(optimizer.optimizer)
    if isinstance(optimizer, torch.optim.Optimizer):
        return [optimizer]
    raise UnsupportedError(f"optimizer = {name}: experts move with the state of Megatron-Core's and torch's optimizers")
