"""What passes between the parts of a step: one layer's input, its result, what waits for a later layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from pikv_ds.placement.placement import Routed

PageLse = tuple[Tensor | None, ...]
"""Per pool [R, T, S, Hq, C] f32, what queries saw in each page, -inf where nothing was read; None where nobody read or asked."""


class Partial(NamedTuple):
    """Attention over stored entries, merged over ranks: out [B, T, Hq, Dv] f32, lse [B, T, Hq] f32; 0 and -inf where nothing is stored.

    includes_self: this forward's own tokens are among them (one column); else the caller attends inside its chunk and merges.
    empty: nothing was stored for these requests, known on the host: out is 0 and lse -inf.
    """

    out: Tensor
    lse: Tensor
    includes_self: bool
    empty: bool = False


class Query(NamedTuple):
    """One layer's share of a forward: q [B, T, Hq, Dk] (MLA: absorbed), entries k [B * T, Hkv, Dk] and v [B * T, Hkv, Dv]."""

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    v_dim: int
    expert_ids: Routed | Tensor | None
    saw: Callable[..., None] | None = None
    """Called with what is read of each pool, while a graph is recorded (cache/recorded.py)."""


class LateEntries(NamedTuple):
    """Entries of a layer whose router has not run yet (storage.expert_ids "true"): k, v [N, Hkv, D]; expert_ids once known."""

    layer: int
    k: Tensor
    v: Tensor
    expert_ids: Tensor | None = None


class LateLse(NamedTuple):
    """A layer whose queries were answered and whose merged lse is still to come: q [G, N, Hq, Dk], k [G, N, Hkv, Dk] of every source,
    slots [G * N * H] int32 of the entries on this rank (-1 elsewhere), lse [n, Hq] f32 of this rank's own n tokens."""

    layer: int
    scale: float
    q: Tensor
    k: Tensor
    slots: Tensor
    lse: Tensor | None
    page_lse: dict[int, PageLse]
    """By first row of a run of sources with as many columns."""
