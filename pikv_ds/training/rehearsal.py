"""What the model looks at when it repeats what it has read: the target of eviction scores. H kv heads, C pages."""

from __future__ import annotations

import torch
from torch import Tensor

from .recorded import LayerWindow

BLOCK = 128  # queries at a time


@torch.no_grad()
def page_peaks(layer: LayerWindow, asking: Tensor, first: int, count: int, page_size: int) -> Tensor:
    """[H, count] f32: the largest share of attention that one query gives a page, mean over the query heads of a kv head.

    asking: [Q] int64, ascending, the tokens that repeat. Pages of `page_size` tokens begin at token `first`; no token in them repeats.
    Source: KVzip (arXiv 2505.23416, section 3), of pages where it has entries.
    """
    q, keys = layer.q[asking].unflatten(1, (layer.k.shape[1], -1)).float(), layer.k.transpose(0, 1).float()  # [Q, H, G, D], [H, T, D]
    tokens = torch.arange(keys.shape[1], device=keys.device)
    peaks = torch.zeros(keys.shape[0], count, device=keys.device)
    for part, at in zip(q.split(BLOCK), asking.to(keys.device).split(BLOCK), strict=True):
        seen = int(at[-1]) + 1
        logits = layer.scale * torch.einsum("qhgd,htd->hgqt", part, keys[:, :seen])
        if layer.softcap is not None:
            logits = layer.softcap * torch.tanh(logits / layer.softcap)
        share = logits.masked_fill(tokens[:seen] > at.unsqueeze(1), -torch.inf).softmax(-1)
        pages = share[..., first : first + count * page_size].unflatten(-1, (count, page_size)).sum(-1)
        peaks = torch.maximum(peaks, pages.mean(1).amax(1))
    return peaks
