"""What a choice is, and what reading has found: the results of a read, handed on as values."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pikv_ds.pages.view import PageView
from pikv_ds.step.query import PageLse


class Choice(NamedTuple):
    """Pages that queries read. N tables, K listed pages, H kv heads, Q queries, G ranks."""

    columns: Tensor
    """[N, 1 or H, K] int32 columns of this rank's tables, -1 = none."""
    readers: Tensor | None = None
    """[G, Q, 1 or H] bool, ranks that have a page of it (more may be named that find nothing), the same on all of them; None where nobody
    asks or there is one rank."""


class Beside(NamedTuple):
    """Pools that every query reads besides those that a router chooses from."""

    views: tuple[PageView, ...]
    lse: Tensor
    """[R, T, Hq] f32 of their entries on this rank, as the routed pool's logits are: without what maps of it leave out."""


class Found(NamedTuple):
    """Attention of R rows of T queries to what they read on this rank; 0 and -inf where that is nothing."""

    out: Tensor
    """[R, T, Hq, Dv] f32."""
    lse: Tensor
    """[R, T, Hq] f32."""
    page_lse: PageLse = ()
    """By pool; empty where nobody watches."""
    readers: Tensor | None = None
    """[G, R * T, H] bool, ranks whose partials count; None = all."""
