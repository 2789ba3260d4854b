"""Whole pages between stores."""

from __future__ import annotations

from torch import Tensor

from .library import OPS


def migrate(target: Tensor, source: Tensor, target_ids: Tensor, source_ids: Tensor) -> None:
    """target[target_ids] = source[source_ids] for whole records; pairs with a -1 are skipped.

    Args:
        target, source: [num_pages, record_bytes] uint8 of the same format. Not the same memory: pairs are copied in any order.
        target_ids, source_ids: [n] int32.

    A buffer of gathered pages is a store of n pages: migrate into it to send, out of it to receive. Sync: none in compiled versions.
    """
    OPS.migrate(target, source, target_ids, source_ids)
