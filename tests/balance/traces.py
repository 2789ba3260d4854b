"""Loads of experts [L, E]: drawn ones by seed, and counts of what a model's routers choose."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

KINDS = ("uniform", "lognormal", "zipf", "counts")


def drawn(seed: int, num_layers: int, num_experts: int) -> tuple[str, Tensor]:
    """Kind and loads of a seed: even ones, skewed ones, a few very hot experts, and whole numbers with many equal ones."""
    generator, kind = torch.Generator().manual_seed(seed), KINDS[seed % len(KINDS)]
    shape = (num_layers, num_experts)
    if kind == "uniform":
        return kind, torch.rand(shape, generator=generator)
    if kind == "zipf":
        rank = torch.stack([torch.randperm(num_experts, generator=generator) for _ in range(num_layers)])
        return kind, 1 / (1 + rank.double())
    normal = torch.randn(shape, generator=generator)
    return kind, torch.exp(normal) if kind == "lognormal" else torch.poisson(20 * torch.exp(1.5 * normal), generator=generator)


def recorded(model, token_ids: Tensor, window: int) -> Iterator[Tensor]:
    """Per window of tokens [1, N]: how often the routers of every MoE layer have chosen each expert, [L, E] int64."""
    top_k = model.config.get_text_config(decoder=True).num_experts_per_tok
    for at in range(0, token_ids.shape[1] - window + 1, window):
        with torch.no_grad():
            logits = model(token_ids[:, at : at + window], output_router_logits=True, use_cache=False).router_logits
        yield torch.stack([layer.topk(top_k, -1).indices.flatten().bincount(minlength=layer.shape[-1]) for layer in logits])
