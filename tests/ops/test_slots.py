"""assign_slots, in torch and compiled, against a loop over the tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pikv_ds.ops import library
from pikv_ds.ops.build import load

ALL = pytest.mark.parametrize("which", ["torch", "cpu", "emu"])


def call(which, *args):
    load.ensure("cpu")
    if which == "emu":
        load.define_emu()
        return torch.ops.pikv_emu.assign_slots(*args)
    return (library.REFERENCE["assign_slots"] if which == "torch" else torch.ops.pikv.assign_slots)(*args)


def make(num_rows, num_shards, num_pages, width, page_size, lens):
    """counts, block_table, free_stack, free_top, refcount of a store whose tables hold `lens` entries; the stack is shuffled."""
    ids = torch.randperm(num_pages, generator=torch.Generator().manual_seed(0)).int().tolist()
    table, refcount = torch.full((num_rows, num_shards, width), -1, dtype=torch.int32), torch.zeros(num_pages + 1, dtype=torch.int32)
    for (row, shard), length in lens.items():
        for column in range(-(-length // page_size)):
            table[row, shard, column] = page = ids.pop()
            refcount[page] += 1
    counts = torch.tensor([[lens[row, shard] for shard in range(num_shards)] for row in range(num_rows)], dtype=torch.int32)
    stack = torch.tensor(ids + [0] * (num_pages + 1 - len(ids)), dtype=torch.int32)
    return [counts, table, stack, torch.tensor(len(ids)), refcount]


def loop(state, rows, shards, here, page_size):
    counts, table, stack, top, refcount = state
    slots, cells = [], []
    for row, shard, stored in zip(rows, shards, here, strict=True):
        if not stored:
            slots.append(-1), cells.append(0)
            continue
        column, offset = divmod(int(counts[row, shard]), page_size)
        if offset == 0:
            top -= 1
            table[row, shard, column] = stack[top]
            refcount[stack[top]] += 1
        counts[row, shard] += 1
        slots.append(int(table[row, shard, column]) * page_size + offset), cells.append(row * counts.shape[1] + shard)
    return slots, cells


@ALL
@settings(max_examples=60)
@given(st.data())
def test_equals_the_loop(which, data):
    num_rows, num_shards, page_size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    one_per_row = data.draw(st.booleans())
    rows = sorted(data.draw(st.lists(st.integers(0, num_rows - 1), min_size=1, max_size=12, unique=one_per_row)))
    shards = data.draw(st.lists(st.integers(0, num_shards - 1), min_size=len(rows), max_size=len(rows)))
    here = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    lens = {(row, shard): data.draw(st.integers(0, 7)) for row in range(num_rows) for shard in range(num_shards)}
    width = 1 + max(-(-(n + 12) // page_size) for n in lens.values())
    num_pages = sum(-(-n // page_size) for n in lens.values()) + len(rows)
    want_state, state = (make(num_rows, num_shards, num_pages, width, page_size, lens) for _ in range(2))
    slots, cells = loop(want_state, rows, shards, here, page_size)
    shard = None if num_shards == 1 and data.draw(st.booleans()) else torch.tensor(shards)
    stored = None if all(here) and data.draw(st.booleans()) else torch.tensor(here)
    opens = int(want_state[3]) < int(state[3])
    got = call(which, *state, torch.tensor(rows), shard, stored, page_size, one_per_row, opens or data.draw(st.booleans()))
    assert got[0].tolist() == slots and got[1].tolist() == cells and got[0].dtype == got[1].dtype == torch.int32
    want_state[1][..., -1] = state[1][..., -1]  # the column that stays unused
    for name, x, y in zip(("counts", "block_table", "free_stack", "free_top", "refcount"), state, want_state, strict=True):
        assert torch.equal(x[:-1] if name == "refcount" else x, y[:-1] if name == "refcount" else y), name


@pytest.mark.parametrize("which", ["cpu", "emu"])
def test_a_page_that_was_not_reserved(which):
    """The kernel itself can only stop (test_kernel_text.py); under the emulation, and with PIKV_DEBUG=1, the host looks before."""
    rows = torch.tensor([0])
    with pytest.raises(RuntimeError, match="a page is needed for row 0, shard 0 and 0 are free; reserve before"):
        call(which, *make(1, 1, 1, 3, 2, {(0, 0): 2}), rows, None, None, 2, True, True)
    with pytest.raises(RuntimeError, match="a page is needed for row 0, shard 0 and 1 are free"):
        call(which, *make(1, 1, 2, 3, 2, {(0, 0): 2}), rows, None, None, 2, True, False)
    with pytest.raises(RuntimeError, match="row 0, shard 0 is full: the block table has 2 columns"):
        call(which, *make(1, 1, 2, 2, 2, {(0, 0): 2}), rows, None, None, 2, True, True)
    with pytest.raises(RuntimeError, match="token 0 goes to row 1, shard 0 of 1 x 1"):
        call(which, *make(1, 1, 2, 3, 2, {(0, 0): 2}), rows + 1, None, None, 2, True, True)


BAD = {
    "shards": (lambda a: a.__setitem__(0, torch.zeros(1, 2, dtype=torch.int32)), "block_table must be [1, 2, max_pages], got [1, 1, 4]"),
    "counts": (lambda a: a.__setitem__(0, a[0].long()), "counts must be torch.int32, got torch.int64"),
    "stack": (lambda a: a.__setitem__(2, a[2][:-1]), "free_stack [2] and refcount [3] must both be [num_pages + 1]"),
    "top": (lambda a: a.__setitem__(3, a[3].int()), "free_top must be one torch.int64, got torch.int32 []"),
    "rows": (lambda a: a.__setitem__(5, a[5].int()), "rows must be torch.int64, got torch.int32"),
    "shard": (lambda a: a.__setitem__(6, torch.zeros(2, dtype=torch.int64)), "shard must be contiguous [1], got [2]"),
    "here": (lambda a: a.__setitem__(7, torch.ones(1)), "here must be torch.bool [1], got [1]"),
}


@ALL
@pytest.mark.parametrize("what", list(BAD))
def test_bad_input(which, what):
    args = [*make(1, 1, 2, 4, 2, {(0, 0): 1}), torch.tensor([0]), None, None, 2, True, True]
    change, message = BAD[what]
    change(args)
    with pytest.raises(RuntimeError) as error:
        call(which, *args)
    assert message in str(error.value)


def test_opcheck():
    load.ensure("cpu")
    args = (*make(2, 1, 6, 4, 2, {(0, 0): 2, (1, 0): 1}), torch.tensor([0, 1]), None, torch.tensor([True, False]), 2, True, True)
    result = torch.library.opcheck(torch.ops.pikv.assign_slots, args, raise_exception=False)
    assert set(result.values()) == {"SUCCESS"}, result
