"""Bases that are fitted to each request's own keys and values while it runs (codec svd), and what is stored when a basis changes.

A request's basis is the first r eigenvectors of the sum of x x^T over its tokens so far, that is the first right singular vectors of its
keys (values). It is fitted to the first forward of the request before anything is stored, and again after the forwards in which
the request has doubled, until it has `fit_tokens` tokens or is forked: then the pages of the request are turned, c' = c W^T W', on
whatever rank they lie. Each turn loses what the old basis had not kept; a prompt that comes in one forward loses only the tail of its
spectrum.

The bases lie at the rank that runs the request, as queries and outputs are mapped there. B rows of this rank, R of all ranks, H kv heads,
D head_dim, r rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .agreement import Agreed
from .exchange import Exchange
from .plan import LocalStep, StepPlan
from .reproject import reproject
from .spec import LayerSpec
from .step import Partial
from .store import LayerStore

NEVER = 1 << 62


class Turn(NamedTuple):
    """A layer whose keys and queries of some rows have another basis from now on: x -> x by, of rows [n] int64, ascending."""

    rows: Tensor
    by: Tensor
    """[n, H, r, r] f32, the same on all ranks."""


class RequestMaps:
    """The maps of one layer for the rows of this rank, to be called as a Transform; k, v [B, H, D, r] f32, orthonormal columns."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v

    @property
    def v_rank(self) -> int:
        return self.v.shape[-1]

    def enter(self, q: Tensor, k: Tensor, v: Tensor, scale: float, positions: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, None]:
        by_head = q.float().unflatten(2, (k.shape[2], -1))
        folded = torch.einsum("bthgd,bhdr->bthgr", by_head, self.k).flatten(2, 3).to(q.dtype)
        c_k, c_v = (torch.einsum("bthd,bhdr->bthr", x.float(), basis).to(x.dtype) for x, basis in ((k, self.k), (v, self.v)))
        return folded, c_k, c_v, None

    def leave(self, partial: Partial, shift: None) -> Partial:
        by_head = partial.out.unflatten(2, (self.v.shape[1], -1))
        return partial._replace(out=torch.einsum("bthgr,bhdr->bthgd", by_head, self.v).flatten(2, 3))


class RequestBases:
    """Owns the bases of this rank's rows and, while they may still change, the sums that they follow from. Borrows the exchange."""

    def __init__(self, layers: list[LayerSpec], stored: list[LayerSpec], fit_tokens: int, exchange: Exchange, device: torch.device) -> None:
        self.fit_tokens, self.exchange, self.device = fit_tokens, exchange, device
        widths = ((spec.k_dim, own.k_dim, spec.v_dim, own.v_dim) for spec, own in zip(layers, stored, strict=True))
        # Per layer and side (k, v): heads, D, r.
        self.shapes = [
            ((spec.num_kv_heads, k_dim, k_rank), (spec.num_kv_heads, v_dim, v_rank))
            for spec, (k_dim, k_rank, v_dim, v_rank) in zip(layers, widths, strict=True)
        ]
        self.reset()

    def reset(self) -> None:
        self.bases: list[list[Tensor]] = []  # [layer][side] [B, H, D, r]
        self.sums: list[list[Tensor]] | None = None  # [layer][side] [B, H, D, D]; None: no row of this rank is fitted again
        self.new: list[int] = []  # rows of this rank whose first tokens the running forward brings
        self.positions: Tensor | None = None
        self.fitted_at: list[int] = []  # [R] tokens of a request when its basis was fitted; NEVER = not again; the same on all ranks

    @property
    def nbytes(self) -> int:
        """Bytes of bases and sums of this rank's requests: they are part of its KV cache."""
        return sum(x.nbytes for layer in [*self.bases, *(self.sums or [])] for x in layer)

    # ---- host phase ----------------------------------------------------------------------------------------------------------

    def begin(self, local: LocalStep) -> None:
        """Bring the rows of this rank in line with what it brings to the next forward."""
        self.positions = local.positions
        self.new = [row for row, keep in enumerate(local.keep) if keep == 0]
        if local.identity and not self.new and self.bases:
            return
        parent = [-1] * local.num_rows if local.fresh or not self.bases else local.parent
        index = torch.tensor(parent, dtype=torch.int64).to(self.device)
        if self.sums is None and self.new:
            self.sums = [[x.new_zeros(x.shape[0], *x.shape[1:3], x.shape[2]) for x in layer] for layer in self.bases]
            self.sums = self.sums or [[torch.zeros(0, h, d, d, device=self.device) for h, d, _ in sides] for sides in self.shapes]
        self.bases = self.bases or [[torch.zeros(0, h, d, r, device=self.device) for h, d, r in sides] for sides in self.shapes]
        new = torch.zeros(local.num_rows, dtype=torch.bool)
        new[self.new] = True
        new = new.to(self.device)
        self.bases = [[_take(x, index, new) for x in layer] for layer in self.bases]
        self.sums = None if self.sums is None else [[_take(x, index, new) for x in layer] for layer in self.sums]

    def remap(self, agreed: Agreed) -> None:
        """Follow the rows of all ranks: a row that is forked keeps its basis from then on, as its pages are another row's too."""
        parents = [] if agreed.restart else agreed.parent
        self.fitted_at = [
            0 if p < 0 or agreed.keep[row] == 0 else NEVER if parents.count(p) > 1 else self.fitted_at[p]
            for row, p in enumerate(parents or [-1] * len(agreed.parent))
        ]

    def settle(self, plan: StepPlan, stores: list[LayerStore]) -> list[Turn]:
        """Fit again what has doubled, and turn what is stored. One collective when there are such requests on several ranks.

        Returns: how the keys of each layer were turned; nothing when no request has doubled, the same on every rank.
        """
        doubled = []
        for row, (before, after) in enumerate(zip(plan.lens_before_host, plan.lens_after_host, strict=True)):
            at = self.fitted_at[row]
            if before == 0 and after > 0:
                self.fitted_at[row] = after
            elif after > before and at < self.fit_tokens and after >= 2 * at:
                doubled.append(row)
                self.fitted_at[row] = after
        turned = []
        if doubled:
            turns = self._turns(plan, doubled)
            rows = torch.tensor(doubled, dtype=torch.int64).to(self.device)
            for store, (turn_k, turn_v) in zip(stores, turns, strict=True):
                reproject(store, rows, turn_k, turn_v)
                turned.append(Turn(rows, turn_k))
        own = plan.sources[plan.own]
        if self.sums is not None and all(at >= self.fit_tokens for at in self.fitted_at[own.row0 : own.row0 + own.num_rows]):
            self.sums = None
        return turned

    def _turns(self, plan: StepPlan, doubled: list[int]) -> list[list[Tensor]]:
        """[layer][side] [len(doubled), H, r, r]: from old coefficients to new ones. The new bases are in place afterwards."""
        source = plan.sources[plan.own]
        own = [row - source.row0 for row in doubled if source.row0 <= row < source.row0 + source.num_rows]
        index = torch.tensor(own, dtype=torch.int64).to(self.device)
        turns = []
        for bases, sums in zip(self.bases, self.sums or self.bases, strict=True):
            for side, basis in enumerate(bases):
                old = basis[index]
                new = leading(sums[side][index], basis.shape[-1]) if own else old
                turns.append(old.mT @ new)
                basis[index] = new
        if len(plan.sources) > 1:  # the rows are on several ranks, in the order of their ranks
            most = max(sum(s.row0 <= row < s.row0 + s.num_rows for row in doubled) for s in plan.sources)
            block = torch.cat([_padded(turn, most).flatten() for turn in turns])
            blocks = self.exchange.all_gather(block, "turning what is stored of requests with a new basis")
            counts = [sum(s.row0 <= row < s.row0 + s.num_rows for row in doubled) for s in plan.sources]
            at, gathered = 0, []
            for turn in turns:
                size = most * turn[:1].numel() if len(turn) else most * turn.shape[1] * turn.shape[2] ** 2
                part = blocks[:, at : at + size].view(len(counts), most, *turn.shape[1:])
                gathered.append(torch.cat([x[:count] for x, count in zip(part, counts, strict=True)]))
                at += size
            turns = gathered
        return [turns[i : i + 2] for i in range(0, len(turns), 2)]

    # ---- the step ------------------------------------------------------------------------------------------------------------

    def maps(self, layer: int, k: Tensor, v: Tensor) -> RequestMaps:
        """The maps of this forward, k and v [B, T, H, D]. Sync: where a request is new, an eigendecomposition reads the device."""
        if self.sums is not None:
            real = (self.positions >= 0).view(*k.shape[:2], 1, 1)
            for side, x in enumerate((k, v)):
                x = torch.where(real, x.float(), 0).nan_to_num(0.0, 0.0, 0.0)  # what is not finite stays in its own entry
                self.sums[layer][side] += torch.einsum("bthi,bthj->bhij", x, x)
                if self.new:
                    fitted = leading(self.sums[layer][side][self.new], self.bases[layer][side].shape[-1])
                    self.bases[layer][side][self.new] = fitted
        return RequestMaps(*self.bases[layer])


def leading(second: Tensor, rank: int) -> Tensor:
    """The first `rank` eigenvectors [..., D, r] f32 of [..., D, D], largest eigenvalue first."""
    return torch.linalg.eigh(second.double())[1].flip(-1)[..., :rank].float()


def _take(x: Tensor, index: Tensor, new: Tensor) -> Tensor:
    """Rows `index` of x, -1 and new ones = 0."""
    if x.shape[0] == 0:
        return x.new_zeros(len(index), *x.shape[1:])
    kept = x.index_select(0, index.clamp_min(0))
    return torch.where(((index < 0) | new).view(-1, 1, 1, 1), 0, kept)


def _padded(x: Tensor, rows: int) -> Tensor:
    return torch.cat([x, x.new_zeros(rows - x.shape[0], *x.shape[1:])])
