"""User masks: PiKV masks by stored positions, so a mask that hides anything else than the future is refused."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.errors import UnsupportedError


def refuse_other_than_causal(mask: Tensor | None, columns: int, offset: int) -> None:
    """Args: mask as Megatron passes it: None, or bool [..., columns, offset + columns], True = hidden. Sync: reads a given mask."""
    if mask is None:
        return
    if mask.dtype != torch.bool or mask.shape[-2:] != (columns, offset + columns):
        raise UnsupportedError(
            f"attention_mask is {mask.dtype} {tuple(mask.shape)}; PiKV takes None or a bool mask [..., {columns}, {offset + columns}] in "
            f"which True hides"
        )
    future = torch.ones(columns, offset + columns, dtype=torch.bool, device=mask.device).triu(offset + 1)
    if not torch.equal(mask, future.expand_as(mask)):
        raise UnsupportedError(
            "attention_mask hides other tokens than the future (padding, packed documents): static batching stores every column of every "
            "row; prefill up to the shortest prompt and feed the rest token by token, as StaticInferenceEngine does, and pass a causal mask"
        )
