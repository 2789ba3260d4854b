"""Whole pages moved and summed, torch reference."""

import torch
from torch import Tensor

from pikv_ds.ops import checks


def migrate(target: Tensor, source: Tensor, target_ids: Tensor, source_ids: Tensor) -> None:
    checks.migrate(target, source, target_ids, source_ids)
    keep = (target_ids >= 0) & (source_ids >= 0)
    target[target_ids[keep].long()] = source[source_ids[keep].long()]


def checksum(data: Tensor) -> Tensor:
    checks.words(data)
    words = data.flatten().view(torch.int64)
    while words.numel() > 1:  # xor of halves, until one word is left
        half = words.numel() // 2
        rest = words[2 * half :]
        words = torch.cat([words[:half] ^ words[half : 2 * half], rest])
    return words.sum() if words.numel() == 0 else words[0].clone()
