"""What the masks and positions of a forward say: which of its columns are real tokens, and that every row is one request."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.errors import UnsupportedError

from .conversation import Conversation


def new_mask(cache: Conversation, mask, rows: int, columns: int) -> Tensor | None:
    """Which of the new columns hold real tokens: [B, T] bool on the host; None = all. Sync: with a mask, reads B * (T + 1) values."""
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedError(f"attention_mask is {shape}; PiKV honours 2-D padding masks [batch, tokens] only")
    if cache.idle:
        return torch.zeros(rows, columns, dtype=torch.bool)
    if mask is None:
        return None
    if mask.shape != (rows, cache.columns + columns):
        raise UnsupportedError(
            f"attention_mask has shape {tuple(mask.shape)}; with {cache.columns} columns cached and {columns} new it must be "
            f"[{rows}, {cache.columns + columns}]"
        )
    mask = mask.to(torch.bool)
    if cache.columns:
        seen = mask[:, : cache.columns].sum(1).tolist()
        if seen != cache.lens:
            raise UnsupportedError(
                f"attention_mask shows {seen} cached tokens per row, the cache holds {cache.lens}: "
                "a mask can't hide or reveal cached tokens"
            )
    new_mask = mask[:, -columns:].cpu()
    return None if bool(new_mask.all()) else new_mask


def last_positions(cache: Conversation, position_ids, new_mask: Tensor | None, rows: int, columns: int) -> Tensor:
    """Positions of real tokens must ascend in every row; returns the last one of each row, [B] int64 on the host."""
    last = torch.full((rows,), -1) if cache.fresh or cache.last_position is None else cache.last_position
    if position_ids is None:
        return last + (columns if new_mask is None else new_mask.sum(1))
    if position_ids.dim() != 2:
        raise UnsupportedError(f"position_ids has shape {tuple(position_ids.shape)}; PiKV honours [batch, tokens]")
    ids = position_ids.cpu().expand(rows, -1)
    if new_mask is None:
        before, latest = torch.cat([last.unsqueeze(1), ids[:, :-1]], 1), ids[:, -1]
        wrong = ids <= before
    else:
        running = torch.cat([last.unsqueeze(1), torch.where(new_mask, ids, -1)], 1).cummax(1).values
        wrong, latest = (ids <= running[:, :-1]) & new_mask, running[:, -1]
    if bool(wrong.any()):
        raise UnsupportedError(
            "position_ids do not ascend within a row (packed sequences, or positions that restart): every row must be one request; "
            "start a new generation for a new request"
        )
    return latest
