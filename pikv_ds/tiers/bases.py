"""Bases that are fitted to each request's own keys and values while it runs (codec svd), and what is stored when a basis changes.

A request's basis is the first r eigenvectors of the sum of x x^T over its tokens so far, that is the first right singular vectors of its
keys (values). It is fitted to the first forward of the request before anything is stored, and again after the forwards in which
the request has doubled, until it has `fit_tokens` tokens or is forked: then the pages of the request are rebased, c' = c W^T W', on
whatever rank they lie. Each change loses what the old basis had not kept; a prompt that comes in one forward loses only the tail of its
spectrum.

The bases lie at the rank that runs the request, as queries and outputs are mapped there. With a raw window (tiers/window.py) entries are
projected when they leave it, and queries are folded where far pages lie: then every rank has the bases of all rows, fitted at the end of
the first forward and shared. B rows of this rank, R of all ranks, H kv heads, D head_dim, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.codecs.request_maps import RequestMaps, RowMaps, leading
from pikv_ds.codecs.table import CodecTable
from pikv_ds.exchange.exchange import Exchange
from pikv_ds.pages.layers import RankPages
from pikv_ds.pages.plan import PagesPlan
from pikv_ds.pages.rows import Rows
from pikv_ds.step.step import LocalStep, Step

NEVER = 1 << 62


class RequestBases:
    """Owns the bases of this rank's rows and, while they may still change, the sums that they follow from. Borrows the exchange."""

    def __init__(self, plan: PagesPlan, codec: CodecTable, device: torch.device, exchange: Exchange) -> None:
        specs = [layer.spec for layer in plan.layers]
        stored = [codec.pool(spec, plan.page_size, plan.dtype) for spec in specs]
        self.fit_tokens = max((pool.fitted.tokens for pool in stored), default=0)  # the same for all
        self.exchange, self.device = exchange, device
        self.far = [i for i, layer in enumerate(plan.layers) if len(layer.pools) > 1]  # with a raw window: bases of all rows, on every rank
        # Per layer and side (k, v): heads, D, r.
        self.shapes = [
            ((spec.num_kv_heads, spec.k_dim, pool.stored.k_dim), (spec.num_kv_heads, spec.v_dim, pool.stored.v_dim))
            for spec, pool in zip(specs, stored, strict=True)
        ]
        rotations = (pool.fitted.rotation for pool in stored)
        self.rotations = [None if pair is None else [x.to(device) for x in pair] for pair in rotations]  # [layer][side] [H, r, r]
        self.near = [layer for layer in range(len(specs)) if layer not in self.far]
        self.rows = Rows(device)  # of all ranks
        self.fitted_at = self.rows.ints("fitted_at", _refitted)  # tokens of a request when its basis was fitted; NEVER = not again
        self.shared = {  # layer with far pages -> [side] [R, H, D, r]
            layer: [self.rows.tensor(f"{layer}.{side}", shape, empties=True) for side, shape in zip("kv", self.shapes[layer], strict=True)]
            for layer in self.far
        }
        self.far_maps = {layer: RowMaps(*sides) for layer, sides in self.shared.items()}
        self.reset()

    def reset(self) -> None:
        self.rows.start(0)
        self.bases: dict[int, list[Tensor]] = {}  # layer without far pages -> [side] [B, H, D, r]
        self.sums: list[list[Tensor]] | None = None  # [layer][side] [B, H, D, D]; None: no row of this rank is fitted again
        self.new: list[int] = []  # rows of this rank whose first tokens the running forward brings
        self.begun, self.num_rows = False, 0  # B
        self.positions: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of bases and sums of this rank's requests: they are part of its KV cache."""
        return self.rows.nbytes + sum(x.nbytes for layer in [*self.bases.values(), *(self.sums or [])] for x in layer)

    # ---- host phase ----------------------------------------------------------------------------------------------------------

    def begin(self, local: LocalStep) -> None:
        """Bring the rows of this rank in line with what it brings to the next forward."""
        self.positions = local.positions
        self.new = [row for row, keep in enumerate(local.keep) if keep == 0]
        if local.identity and not self.new and self.begun:
            return
        parent = [-1] * local.num_rows if local.fresh or not self.begun else local.parent
        self.begun = True
        index = torch.tensor(parent, dtype=torch.int64).to(self.device)
        if self.sums is None and self.new:
            self.sums = [
                [torch.zeros(self.num_rows, h, d, d, dtype=torch.float32, device=self.device) for h, d, _ in sides] for sides in self.shapes
            ]
        if not self.bases:
            self.bases = {
                i: [torch.zeros(0, h, d, r, dtype=torch.float32, device=self.device) for h, d, r in self.shapes[i]] for i in self.near
            }
        new = torch.zeros(local.num_rows, dtype=torch.bool)
        new[self.new] = True
        new, self.num_rows = new.to(self.device), local.num_rows
        self.bases = {layer: [_take(side, index, new) for side in sides] for layer, sides in self.bases.items()}
        self.sums = None if self.sums is None else [[_take(x, index, new) for x in layer] for layer in self.sums]

    def refit(self, step: Step, pages: RankPages) -> bool:
        """Fit again what has doubled, and rebase what is stored. Call it before pages are demoted. Returns False: no page has left.

        Collectives with several ranks' requests: one when some have doubled; one for layers with far pages, then and with a new request.
        """
        first, doubled, fitted_at = [], [], self.fitted_at.values
        for row, (before, after) in enumerate(zip(step.lens_before_host, step.lens_after_host, strict=True)):
            at = fitted_at[row]
            if before == 0 and after > 0:
                first.append(row)
            elif after > before and at < self.fit_tokens and after >= 2 * at:
                doubled.append(row)
            else:
                continue
            fitted_at[row] = after
        if doubled and self.near:
            rows = torch.tensor(doubled, dtype=torch.int64).to(self.device)
            for layer, (by_k, by_v) in zip(self.near, self._changes(step, self.near, doubled), strict=True):
                pages.layers[layer].rebase(0, rows, by_k, by_v)
        if self.far and (first or doubled):
            self._share(step, pages, sorted(first + doubled))
        own = step.sources[step.own]
        if self.sums is not None and all(at >= self.fit_tokens for at in fitted_at[own.row0 : own.row0 + own.num_rows]):
            self.sums = None
        self.positions = None
        return False

    def _changes(self, step: Step, layers: list[int], rows: list[int]) -> list[list[Tensor]]:
        """Of some layers [side] [len(rows), H, r, r]: from old coefficients to new ones. The new bases are in place afterwards."""
        index, changes = self._own(step, rows), []
        for layer in layers:
            for side, basis in enumerate(self.bases[layer]):
                old = basis[index]
                new = self._fitted(layer, side, index)
                changes.append(old.mT @ new)
                basis[index] = new
        changes = self._of_all(step, rows, changes, "rebasing what is stored of requests")
        return [changes[i : i + 2] for i in range(0, len(changes), 2)]

    def _share(self, step: Step, pages: RankPages, rows: list[int]) -> None:
        """New bases of `rows` for far pages, on every rank, and far pages rebased to them."""
        index = self._own(step, rows)
        new = [self._fitted(layer, side, index) for layer in self.far for side in range(2)]
        new = self._of_all(step, rows, new, "sharing the bases of requests for their far pages")
        rows = torch.tensor(rows, dtype=torch.int64).to(self.device)
        for layer, *sides in zip(self.far, new[::2], new[1::2], strict=True):
            columns = self.shared[layer]
            changes = [column.value[rows].mT @ y for column, y in zip(columns, sides, strict=True)]
            for level in range(1, len(pages.layers[layer].pools)):
                pages.layers[layer].rebase(level, rows, *changes)  # a new row has no far page
            for column, y in zip(columns, sides, strict=True):
                column.value = column.value.index_copy(0, rows, y)

    def _own(self, step: Step, rows: list[int]) -> Tensor:
        """Those of some rows of all ranks that are this rank's, counted from its first."""
        source = step.sources[step.own]
        own = [row - source.row0 for row in rows if source.row0 <= row < source.row0 + source.num_rows]
        return torch.tensor(own, dtype=torch.int64).to(self.device)

    def _fitted(self, layer: int, side: int, index: Tensor | list[int]) -> Tensor:
        """[n, H, D, r] bases of the rows `index` of this rank, after all their tokens so far."""
        heads, dim, rank = self.shapes[layer][side]
        if not len(index):
            return torch.zeros(0, heads, dim, rank, dtype=torch.float32, device=self.device)
        basis = leading(self.sums[layer][side][index], rank)
        return basis if self.rotations[layer] is None else basis @ self.rotations[layer][side]

    def _of_all(self, step: Step, rows: list[int], parts: list[Tensor], what: str) -> list[Tensor]:
        """parts [n, ...] of this rank's among `rows` -> [len(rows), ...] of all ranks', in the order of the rows."""
        if len(step.sources) == 1:
            return parts
        counts = [sum(s.row0 <= row < s.row0 + s.num_rows for row in rows) for s in step.sources]
        most = max(counts)
        blocks = self.exchange.all_gather(torch.cat([_padded(part, most).flatten() for part in parts]), what)
        sizes = [most * part.shape[1:].numel() for part in parts]
        found = []
        for part, block in zip(parts, blocks.split(sizes, 1), strict=True):
            by_rank = block.view(len(counts), most, *part.shape[1:])
            found.append(torch.cat([x[:count] for x, count in zip(by_rank, counts, strict=True)]))
        return found

    # ---- the step ------------------------------------------------------------------------------------------------------------

    def maps(self, layer: int, k: Tensor, v: Tensor) -> RequestMaps | None:
        """The maps of this forward, k and v [B, T, H, D]; None: entries are stored as they are (far pages are mapped by their readers).

        Sync: where a request is new, an eigendecomposition reads the device.
        """
        if self.sums is not None:
            real = (self.positions >= 0).view(*k.shape[:2], 1, 1)
            for side, x in enumerate((k, v)):
                x = torch.where(real, x.float(), 0).nan_to_num(0.0, 0.0, 0.0)  # what is not finite stays in its own entry
                self.sums[layer][side] += torch.einsum("bthi,bthj->bhij", x, x)
                if self.new and layer not in self.far:
                    self.bases[layer][side][self.new] = self._fitted(layer, side, self.new)
        return None if layer in self.far else RequestMaps(*self.bases[layer])


def _refitted(at: int, keep: int, shared: bool) -> int:
    """A row that is forked keeps its basis from then on, as its pages are another row's too."""
    return 0 if keep == 0 else NEVER if shared else at


def _take(x: Tensor, index: Tensor, new: Tensor) -> Tensor:
    """Rows `index` of x, -1 and new ones = 0."""
    if x.shape[0] == 0:
        return x.new_zeros(len(index), *x.shape[1:])
    kept = x.index_select(0, index.clamp_min(0))
    return torch.where(((index < 0) | new).view(-1, 1, 1, 1), 0, kept)


def _padded(x: Tensor, rows: int) -> Tensor:
    return torch.cat([x, x.new_zeros(rows - x.shape[0], *x.shape[1:])])
