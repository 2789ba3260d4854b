"""The bf16 rule: the sharded cache must not add rounding error to that of the ordinary bf16 path.

RMS error of the logits against fp32, teacher-forced, with the experts of the fp32 run in every run, median over prompts.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from pikv_ds.adapters.hf.router_output import find_router

PREFILL, STEPS = 96, 32


@contextlib.contextmanager
def recorded_routing(model: nn.Module, record: list) -> Iterator[None]:
    with _router_hooks(model, lambda output: record.append(output) or None):
        yield


@contextlib.contextmanager
def fixed_routing(model: nn.Module, record: list) -> Iterator[None]:
    """Every router call returns what the recorded run's call of the same order returned."""
    replay = iter(record)

    def same_experts(output: tuple) -> tuple:
        logits, weights, ids = next(replay)
        return logits.to(output[0].dtype), weights.to(output[1].dtype), ids

    with _router_hooks(model, same_experts):
        yield


@contextlib.contextmanager
def _router_hooks(model: nn.Module, change) -> Iterator[None]:
    routers = [router for layer in model.model.layers if (router := find_router(layer)) is not None]
    handles = [router.register_forward_hook(lambda module, args, output: change(output)) for router in routers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def forced_logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the last STEPS positions: prefill, then one token at a time through whatever cache the model uses."""
    out = model(ids[:, :PREFILL], use_cache=True)
    logits, past = [out.logits[:, -1]], out.past_key_values
    for i in range(PREFILL, ids.shape[1] - 1):
        logits.append(model(ids[:, i : i + 1], past_key_values=past).logits[:, -1])
    return torch.stack(logits, 1).float()


def rms(x: torch.Tensor) -> float:
    return x.pow(2).mean().sqrt().item()
