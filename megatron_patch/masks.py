"""User masks: PiKV masks by stored positions, so a mask may hide the future and padding, which is not stored; others are refused.

B rows, T columns of a forward, S columns up to its end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.errors import UnsupportedError


def padding_of(mask: Tensor | None, rows: int, columns: int, held: Tensor | None, offset: int) -> Tensor | None:
    """Which columns of the rows are padding once this forward has run: [B, S] bool on the CPU, or None when none is.

    A column is padding when it is hidden from its own query and from every later one.

    Args:
        mask: as Megatron passes it: None, or bool [B or 1, 1, T, S], True = hidden.
        held: [B, offset] bool, padding of the earlier columns, or None.

    Raises: UnsupportedError for a mask that hides, or shows, anything else; rows of padding queries may hold anything.
    Sync: reads a given mask.
    """
    if mask is None:
        if held is not None and held.any():
            raise UnsupportedError(
                "attention_mask is None after a forward in which columns were padding: the host would attend to them; pass a mask that "
                "hides them in every forward, decode steps included"
            )
        return None
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape not in {(b, 1, columns, offset + columns) for b in (1, rows)}:
        raise UnsupportedError(
            f"attention_mask is {mask.dtype} {tuple(mask.shape)}; PiKV takes None or a bool mask "
            f"[{rows} or 1, 1, {columns}, {offset + columns}] in which True hides"
        )
    mask = mask[:, 0].cpu().expand(rows, -1, -1)
    future = torch.ones(columns, offset + columns, dtype=torch.bool).triu(offset + 1)
    held = torch.zeros(rows, offset, dtype=torch.bool) if held is None else held
    new = (mask | future)[:, :, offset:].all(1)
    padding = torch.cat([held, new], 1)
    if not ((mask == (future | padding[:, None])) | new[:, :, None]).all():
        raise UnsupportedError(
            "attention_mask hides other tokens than the future and padding, or shows what was padding: PiKV stores a token once, for all "
            "later queries of its row (no packed documents, no attention beyond the causal one)"
        )
    return padding if padding.any() else None
