"""Whole pages moved between stores, torch reference."""

from torch import Tensor

from . import checks


def migrate(target: Tensor, source: Tensor, target_ids: Tensor, source_ids: Tensor) -> None:
    checks.migrate(target, source, target_ids, source_ids)
    keep = (target_ids >= 0) & (source_ids >= 0)
    target[target_ids[keep].long()] = source[source_ids[keep].long()]
