"""One optimizer step of Megatron's own training stack: DDP, finalize_model_grads, the distributed optimizer."""

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from pikv_ds.megatron_patch.cpu_compat import cuda_literals_on_cpu
from tests.megatron.models import positions


def train(model, ids: torch.Tensor, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Adam under DDP with a sharded optimizer state. Returns the loss of every step and the parameters after the last; changes `model`."""
    with cuda_literals_on_cpu():
        ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(use_distributed_optimizer=True), model)
        optimizer = get_megatron_optimizer(
            OptimizerConfig(optimizer="adam", lr=1e-2, weight_decay=0.01, clip_grad=1.0, use_distributed_optimizer=True), [ddp]
        )
        ddp.train()
        losses = []
        for _ in range(steps):
            ddp.zero_grad_buffer()
            optimizer.zero_grad()
            loss = ddp(ids, positions(ids), None, labels=ids.roll(-1, 1)).mean()
            loss.backward()
            finalize_model_grads([ddp])
            updated, _, _ = optimizer.step()
            assert updated, "the optimizer skipped the step"
            losses.append(loss.item())
        ddp.eval()
    return losses, {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
