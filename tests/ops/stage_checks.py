"""What tiers ask of the ops: staging against the reference, over many calls whose tables must stay alike; bytes that come; checksums."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Callable

import torch

from pikv_ds.ops import library

NEAR, FAR = 6, 30


def check_stage(sections: int, slots: int, tables: int, op: Callable, device: str) -> float:
    """Lists that repeat pages, name near ones, want more than there is room for; pages fetched ahead among them."""
    generator = torch.Generator().manual_seed(slots)
    first_far, columns, clock = NEAR + slots, 20, 1
    own, expected = _empty(sections, slots), _empty(sections, slots)
    heads = 3 if sections == 1 else sections
    for _ in range(25):
        ids = torch.randint(NEAR + FAR, (tables, 1, columns), generator=generator)
        ids = torch.where(ids < NEAR, ids, ids + slots).int()
        page_list = torch.randint(-1, columns, (tables, heads, 7), generator=generator).int()
        for _ in range(200):
            clock += 1
            found = op("stage")(ids, page_list, *own, first_far, NEAR, clock)
            wanted = library.REFERENCE["stage"](ids, page_list, *expected, first_far, NEAR, clock)
            _alike(found, wanted), _alike(own, expected)
            _holds(found, ids, page_list, own, first_far)
            page_list = found[2]
            if not found[4][3]:
                break
        assert not found[4][3], "what is left does not become less"
        score = torch.randn(tables, sections, columns, generator=generator).round(decimals=1)
        score[..., ::6] = -torch.inf
        given = (score, torch.rand(tables, columns, generator=generator) < 0.2, ids)
        for most in (1, slots):
            found = op("stage_ahead")(*given, *own, first_far, clock, most)
            _alike(found, library.REFERENCE["stage_ahead"](*given, *expected, first_far, clock, most))
            _alike(own, expected)
    return 0.0


def check_gather(sections: int, op: Callable, device: str) -> float:
    """From three pieces of memory; bytes behind the last section stay."""
    generator, bytes_ = torch.Generator().manual_seed(sections), 100
    source = [torch.randint(256, (n, bytes_), dtype=torch.uint8, generator=generator) for n in (4, 1, 9)]
    records, part = torch.randperm(14, generator=generator), bytes_ if sections == 1 else 90 // sections
    far, at = torch.randperm(14, generator=generator)[:8], torch.randperm(10, generator=generator)[:8]
    coming = torch.stack([far, at, torch.arange(8) % sections], 1)
    found, whole = torch.full((12, bytes_), 7, dtype=torch.uint8), torch.cat(source)
    op("gather_sections")(found, source, records, coming, [0, 4, 5], 2, part)
    expected = torch.full_like(found, 7)
    for page, slot, section in coming.tolist():
        expected[2 + slot, section * part : (section + 1) * part] = whole[records[page], section * part : (section + 1) * part]
    assert torch.equal(found, expected)
    return 0.0


def check_crc(size: int, op: Callable, device: str) -> float:
    """Against zlib, from any address, with a seed and without."""
    memory = torch.randint(256, (size + 40,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    at, seeds = torch.tensor([0, 1, 7, 40]), torch.tensor([0, 1, 2**32 - 1, 12345])
    expected = [zlib.crc32(memory.numpy()[i : i + size], seed) for i, seed in zip(at.tolist(), seeds.tolist(), strict=True)]
    assert op("crc32")(memory, at, seeds, size).tolist() == expected
    assert op("crc32")(memory, at, None, size).tolist() == library.REFERENCE["crc32"](memory, at, None, size).tolist()
    return 0.0


def check_read_file(size: int, op: Callable, device: str) -> float:
    """Pieces in any order; one that is not all there says so, and memory beside them stays."""
    content = torch.randint(256, (3 * size + 5,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size)).numpy()
    to, at = torch.tensor([2 * size + 1, 0]), torch.tensor([3, size])
    with tempfile.TemporaryFile() as file:
        file.write(content.tobytes())
        file.flush()
        found = torch.full((3 * size + 2,), 9, dtype=torch.uint8)
        crc = op("read_file")(found, to, at, file.fileno(), size)
        assert crc.tolist() == [zlib.crc32(content[i : i + size]) for i in at.tolist()]
        for i, j in zip(to.tolist(), at.tolist(), strict=True):
            assert found[i : i + size].tolist() == content[j : j + size].tolist()
        assert found[size : 2 * size + 1].tolist() == [9] * (size + 1) and found[-1] == 9
        assert op("read_file")(found, to, at + 2 * size + 3, file.fileno(), size).tolist()[0] == (-1 if size else 0)
    return 0.0


def _empty(sections: int, slots: int) -> tuple[torch.Tensor, ...]:
    held = torch.full((sections, slots), -1)
    return torch.full((sections, FAR), -1, dtype=torch.int32), held, torch.zeros_like(held), torch.zeros_like(held, dtype=torch.bool)


def _alike(found, expected) -> None:
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), f"result {i}: {one} is not {other}"


def _holds(found, ids, page_list, staging, first_far: int) -> None:
    """By hand: what is served names where its page lies, and served and left are what was listed."""
    table, listed, left, *_ = found
    slot, held = staging[:2]
    assert torch.equal(torch.where(listed >= 0, listed, left), page_list) and not bool(((listed >= 0) & (left >= 0)).any())
    for n, h, k in torch.nonzero(listed >= 0).tolist():
        x, column = min(h, len(slot) - 1), int(listed[n, h, k])
        row, page = int(table[n, x, column]), int(ids[n, 0, column])
        assert row == page if page < first_far else int(held[x, row - NEAR]) == page - first_far
