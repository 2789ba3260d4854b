"""Staging of far pages, reference: plain loops. The arguments are those of ops/stage.py, ops/stage_ahead.py and ops/gather_sections.py."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.ops import checks


def stage(
    block_table: Tensor, page_list: Tensor, slot: Tensor, held: Tensor, asked: Tensor, ahead: Tensor,
    first_far: int, num_near: int, clock: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    checks.staging(slot, held, asked, ahead)
    checks.listed(block_table, page_list, slot, first_far)
    sections, slots = held.shape
    table = block_table.new_zeros(block_table.shape[0], sections, block_table.shape[2])
    listed, left = torch.full_like(page_list, -1), torch.full_like(page_list, -1)
    coming, counts = held.new_full((sections * slots, 3), -1), held.new_zeros(4)
    ids = block_table[:, 0].tolist()
    for x in range(sections):
        own = torch.ones_like(page_list, dtype=torch.bool) if sections == 1 else torch.zeros_like(page_list, dtype=torch.bool)
        own[:, x] = True
        entries = [(n, h, k, int(page_list[n, h, k])) for n, h, k in torch.nonzero(own & (page_list >= 0)).tolist()]
        wanted = list(dict.fromkeys(ids[n][column] - first_far for n, _, _, column in entries if ids[n][column] >= first_far))
        there = [far for far in wanted if slot[x, far] >= 0]
        for at in (int(slot[x, far]) for far in there):
            asked[x, at] = clock
            counts[2] += ahead[x, at]
            ahead[x, at] = False
        missing = [far for far in wanted if slot[x, far] < 0][: slots - len(there)]
        for far, at in zip(missing, _oldest(asked[x], clock), strict=False):
            _place(slot[x], held[x], far, at)
            asked[x, at], ahead[x, at] = clock, False
            coming[counts[0]] = torch.tensor([far, at, x])
            counts[0] += 1
        counts[1] += len(there) + len(missing)
        for n, h, k, column in entries:
            far = ids[n][column] - first_far
            where = ids[n][column] if far < 0 else num_near + int(slot[x, far])
            if far >= 0 and slot[x, far] < 0:
                left[n, h, k] = column
                counts[3] += 1
            else:
                listed[n, h, k], table[n, x, column] = column, where
    return table, listed, left, coming, counts


def stage_ahead(
    score: Tensor, hidden: Tensor, block_table: Tensor, slot: Tensor, held: Tensor, asked: Tensor, ahead: Tensor,
    first_far: int, clock: int, most: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    checks.staging(slot, held, asked, ahead)
    checks.scored(score, hidden, block_table, slot, first_far)
    coming, count = held.new_full((held.numel(), 3), -1), held.new_zeros(1)
    for x in range(len(held)):
        places = _oldest(asked[x], clock)[:most]
        far = block_table[:, 0].long() - first_far
        seen = ~hidden & (far >= 0) & (score[:, x] > -torch.inf) & (slot[x][far.clamp(0, max(0, slot.shape[1] - 1))] < 0)
        pairs = sorted(zip(score[:, x][seen].tolist(), far[seen].tolist(), strict=True))
        best = sorted({page: (-value, page) for value, page in pairs}.values())  # of a page that tables share the highest score
        for (_, page), at in zip(best, places, strict=False):
            _place(slot[x], held[x], page, at)
            asked[x, at], ahead[x, at] = clock - 1, True
            coming[count[0]] = torch.tensor([page, at, x])
            count += 1
    return coming, count


def gather_sections(
    target: Tensor, source: list[Tensor], records: Tensor, coming: Tensor, begins: list[int], first: int, section_bytes: int
) -> None:
    checks.gather_sections(target, source, records, coming, begins, first, section_bytes)
    for far, at, section in coming.tolist():
        record = int(records[far])
        i = max(i for i, begin in enumerate(begins) if begin <= record)
        part = slice(section * section_bytes, (section + 1) * section_bytes)
        target[first + at, part] = source[i][record - begins[i], part]


def _oldest(asked: Tensor, clock: int) -> list[int]:
    """Slots that were not asked for at `clock`, the longest unused first; of equal ones the lower."""
    return sorted((at for at, when in enumerate(asked.tolist()) if when < clock), key=lambda at: (int(asked[at]), at))


def _place(slot: Tensor, held: Tensor, far: int, at: int) -> None:
    if held[at] >= 0:
        slot[held[at]] = -1
    held[at], slot[far] = far, at
