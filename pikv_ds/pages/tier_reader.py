"""How pages in two tiers are read: those that a query reads and that are not near are staged first, as many at once as staging holds.

Everything that is stored is read in passes, near pages first, whose answers are merged by lse; while one pass is computed the pages of the
next are fetched. N tables, C columns of a table, X lists of a table (1, or its heads), K listed columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pikv_ds import ops

from .far import TwoTiers
from .view import PageReader, PageView, Read

AHEAD = 4
"""Of so many pages that a query reads one more is fetched ahead."""


class Pass(NamedTuple):
    """Some pages of a view, closed up in their order: the open page of a table is near, and last."""

    view: PageView
    columns: Tensor
    """[N, 1, C'] int64, where each column of the pass stands in the tables, C where there is none."""


class TierReader:
    """The pages.view.PageReader of a pool in two tiers: gives another reader views without far ids."""

    as_stored = False

    def __init__(self, pool: TwoTiers, near: PageReader) -> None:
        self.pool, self.near = pool, near
        self._scored: tuple[Tensor, Tensor] | None = None  # what a router has said of the pages that are read next
        self.k_dim, self.rebuilds, self.met, self.bounds_shape = near.k_dim, near.rebuilds, near.met, near.bounds_shape
        self.table_per_head = near.table_per_head

    def bounds(self, out: Tensor, slot_mapping: Tensor, table: Tensor) -> None:
        self.near.bounds(out[: self.pool.allocator.first_far], slot_mapping, table)  # entries are written near

    def attend(self, q: Tensor, view: PageView, *, scale: float, window: int | None = None, q_positions: Tensor | None = None) -> Read:
        def read(one: Pass) -> Read:
            return self.near.attend(q, one.view, scale=scale, window=window, q_positions=q_positions)

        return self._over_passes(view, read)

    def attend_pages(self, q: Tensor, view: PageView, *, scale: float) -> Read:
        shape = q.shape[:2]
        view = view.per_query(*shape)
        read = self.attend_listed(q.flatten(0, 1).contiguous(), view, None, scale=scale, page_lse=True)
        out, lse = (x.unflatten(0, shape) for x in read[:2])
        return Read(out, lse, read.page_lse.unflatten(0, (*shape, -1)))

    def attend_listed(
        self,
        q: Tensor,
        view: PageView,
        page_list: Tensor | None,
        *,
        scale: float,
        window: int | None = None,
        q_positions: Tensor | None = None,
        page_lse: bool = False,
        block_size: int = 0,
    ) -> Read:
        """block_size: a whole page's (blueprint/offload.py refuses others)."""
        options = {"scale": scale, "window": window, "q_positions": q_positions, "page_lse": page_lse, "block_size": block_size}
        if page_list is None:
            return self._over_passes(view, lambda one: self.near.attend_listed(q, one.view, None, **options), page_lse=page_lse)
        if not self.pool.num_far:
            return self.near.attend_listed(q, view, page_list, **options)
        found = None
        for table, listed in self._listed(view.block_table, page_list):
            found = _merged(found, self.near.attend_listed(q, view._replace(block_table=table), listed, **options))
        return found

    def entries(self, table: Tensor, counts: Tensor, tail_rows: Tensor | None) -> tuple[Tensor, Tensor]:
        far = (table >= self.pool.allocator.first_far).any()
        assert not bool(far), "entries of far pages are read by attention alone (blueprint/offload.py refuses who asks for them)"
        return self.near.entries(table, counts, tail_rows)

    def expect(self, score: Tensor, hidden: Tensor) -> None:
        """What a router says of the pages, before the chosen ones are read: some of the next best of them that are far are fetched while
        the step goes on, into slots that this read does not use. score [Q, S, X, C] f32, hidden [Q, S, C]. Sync: none."""
        self._scored = (score.flatten(0, 1), hidden.flatten(0, 1)) if self.pool.num_far else None

    # ---- chosen pages --------------------------------------------------------------------------------------------------------

    def _listed(self, block_table: Tensor, page_list: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Tables without far ids, and the columns of them to read: one piece where staging holds all that is listed."""
        staged, heads = self.pool.staged, page_list.shape[1]
        sections = heads if self.near.table_per_head and heads == self.pool.fmt.num_kv_heads else 1
        staged.divide(sections)
        block_table, left = block_table.contiguous(), page_list.contiguous()
        while left is not None:
            one = staged.serve(block_table, left)
            left = one.left
            if left is None and self._scored is not None:
                score, hidden = self._scored
                score = score if score.shape[1] == sections else score.amax(1, keepdim=True)
                staged.foresee(score.contiguous(), hidden.contiguous(), block_table, max(1, page_list.shape[2] // AHEAD))
                self._scored = None
            yield one.table, one.listed

    def _named(self, ids: np.ndarray) -> Tensor:
        """Ids as rows of the pool's memory; 0 for far pages that are not staged, which are not listed."""
        pool, first_far = self.pool, self.pool.allocator.first_far
        slot = pool.staged.slot[0][np.maximum(ids - first_far, 0)]
        there = np.where(slot >= 0, slot + pool.tier.num_near, 0)
        return torch.from_numpy(np.where(ids >= first_far, there, ids).astype(np.int32))

    # ---- everything ----------------------------------------------------------------------------------------------------------

    def _over_passes(self, view: PageView, read: Callable[[Pass], Read], *, page_lse: bool = False) -> Read:
        num_tables, columns = view.block_table.shape[0], view.block_table.shape[2]
        if not self.pool.num_far:
            return read(Pass(view, torch.arange(columns).expand(num_tables, 1, columns)))
        found, of_pages = None, None
        for one in self._passes(view):
            part = read(one)
            if page_lse:
                if of_pages is None:
                    of_pages = part.page_lse.new_full((*part.page_lse.shape[:2], columns + 1), -torch.inf)
                of_pages.scatter_(2, one.columns.expand_as(part.page_lse), part.page_lse)
            found = _merged(found, part._replace(page_lse=None))
        return found if of_pages is None else found._replace(page_lse=of_pages[..., :-1])

    def _passes(self, view: PageView) -> Iterator[Pass]:
        pool, staged, size = self.pool, self.pool.staged, self.pool.page_size
        ids, lens = view.block_table.numpy()[:, 0], view.seqlens.numpy()
        entries = np.clip(lens - np.arange(ids.shape[1]) * size, 0, size)  # [N, C]
        far = ids - pool.allocator.first_far
        is_far = (entries > 0) & (far >= 0)
        pages = np.unique(far[is_far])
        staged.divide(1)
        pages = pages[np.argsort(staged.slot[0][pages] < 0, kind="stable")]  # what is there already comes first
        half = max(1, staged.num_slots // 2)
        chunks = np.split(pages, range(half, len(pages), half)) if len(pages) else []
        if chunks:
            staged.bring(chunks[0], wait=False)
        yield self._pass(view, ids, (entries > 0) & ~is_far, entries)
        part = np.full(max(pool.allocator.num_far, 1), -1, dtype=np.int32)
        for i, chunk in enumerate(chunks):
            part[chunk] = i
            staged.wait()
            one = self._pass(view, ids, is_far & (part[np.maximum(far, 0)] == i), entries)
            if i + 1 < len(chunks):  # may take the slots of all chunks but this one
                staged.bring(chunks[i + 1], wait=False)
            yield one

    def _pass(self, view: PageView, ids: np.ndarray, chosen: np.ndarray, entries: np.ndarray) -> Pass:
        num = chosen.sum(1)
        order = np.argsort(~chosen, axis=1, kind="stable")[:, : max(int(num.max(initial=0)), 1)]
        held = np.arange(order.shape[1]) < num[:, None]
        table = self._named(np.where(held, np.take_along_axis(ids, order, 1), -1))
        lens = torch.from_numpy(np.where(chosen, entries, 0).sum(1, dtype=np.int32))
        columns = torch.from_numpy(np.where(held, order, ids.shape[1]))
        return Pass(view._replace(block_table=table.unsqueeze(1), seqlens=lens.unsqueeze(1)), columns.unsqueeze(1))


def _merged(found: Read | None, part: Read) -> Read:
    if found is None:
        return part
    out, lse = ops.merge(torch.stack([found.out, part.out]), torch.stack([found.lse, part.lse]))
    of_pages = None if part.page_lse is None else torch.maximum(found.page_lse, part.page_lse)
    return Read(out, lse, of_pages)
