"""A kind of page pool: what it stores pages as, and which pages of the pool before go there. R request rows, S tables, C columns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from pikv_ds.pages.listing import Pages
from pikv_ds.pages.plan import PoolPlan
from pikv_ds.spec import LayerSpec

__all__ = ["Pages", "PoolKind", "PoolPlan"]


class PoolKind(ABC):
    """One more pool behind the last of every full-attention layer. Pages come there whole and stay until they are evicted.

    Options of a kind are keyword-only constructor arguments with defaults; they are keys of its block in the list "pools". Every query
    reads the pool, as it reads the ones before.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def recent_tokens(self) -> int:
        """The latest so many tokens of a request never go there, so that a crop may still take them back."""

    @abstractmethod
    def pool(self, before: PoolPlan, spec: LayerSpec, dtype: torch.dtype) -> PoolPlan:
        """The pool of a layer. before: the pool that pages come from, whose page size, heads and widths a record must keep.

        dtype: of the model. Raises: ValueError for a layer that it can't store.
        """

    @abstractmethod
    def leaves(self, pages: Pages) -> Tensor:
        """-> [R, S, C] bool: which pages of the pool before go now. Pages that are not full or hold recent tokens stay, whatever it says.

        It must follow from the pages of a table alone, never from the number of ranks. Host phase, after every forward.
        """
