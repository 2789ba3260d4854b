"""What must hold for any store: of every format, read by every implementation that this machine can run.

A few examples of each; PIKV_HYPOTHESIS=long runs many more.
"""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pikv_ds.ops import library, merge_partials
from pikv_ds.ops.build import load
from pikv_ds.ops.format.formats import FORMATS
from tests.ops.cases import IMPLEMENTATIONS, answer, compare, compare_lse, make_case, run

LONG = os.environ.get("PIKV_HYPOTHESIS") == "long"
EVERY = pytest.mark.parametrize("name", list(FORMATS))
READER = pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "emu"])  # too slow for this


def few(count):
    return settings(max_examples=count * (25 if LONG else 1), derandomize=not LONG)


@pytest.fixture(autouse=True)
def runs_here(request):
    cap = request.node.callspec.params.get("implementation", "torch")
    if cap in ("torch", "cpu"):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIKV_CPU", cap)
        if load.cpu_instruction_set() != cap:
            pytest.skip(f"this machine has no {cap}")


@st.composite
def stores(draw):
    """Arguments of make_case but its format and page size."""
    length = st.sampled_from([0, 1, 15, 16, 17, 63, 64, 65, 128, 129, 200]) | st.integers(0, 300)
    latent = draw(st.booleans())
    shape = {"k_dim": draw(st.sampled_from([8, 32, 40, 64, 128])), "group": draw(st.sampled_from([1, 2, 4, 5, 8]))}
    if latent:
        shape |= {"latent": True, "heads": 1, "v_dim": shape["k_dim"] - draw(st.sampled_from([0, 8])) or 8}
    return shape | {
        "lens": tuple(draw(st.lists(length, min_size=1, max_size=3))),
        "shards": draw(st.integers(1, 3)),
        "dtype": draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32])),
        "seed": draw(st.integers(0, 2**32)),
    }


def page_sizes(name):
    return st.sampled_from([64, 128, 192] if FORMATS[name].levels else [1, 5, 16, 64])


def read(case, implementation, **options):
    with pytest.MonkeyPatch.context() as patch:
        return run(case, implementation, patch, **options)


@READER
@EVERY
def test_what_is_read_is_attention_over_what_is_stored(name, implementation):
    @few(6)
    @given(stores(), page_sizes(name), st.integers(0, 80))
    def check(shape, page_size, window):
        case = make_case(name, page_size=page_size, **shape)
        out, lse, page_lse = read(case, implementation, window=window, with_page_lse=True)
        expected = answer(case, window=window, with_page_lse=True)
        compare(out, expected[0], 1e-4, "out")
        compare_lse(lse, expected[1], 1e-3, "lse")
        compare_lse(page_lse, expected[2], 1e-3, "page lse")

    check()


@READER
@EVERY
def test_the_number_of_splits_changes_nothing(name, implementation):
    @few(4)
    @given(stores(), page_sizes(name), st.lists(st.integers(2, 64), min_size=1, max_size=4), st.integers(0, 80))
    def check(shape, page_size, numbers, window):
        case = make_case(name, page_size=page_size, **shape)
        out, lse, _ = read(case, implementation, num_splits=1, window=window)
        for num_splits in (*numbers, 64):
            again, again_lse, _ = read(case, implementation, num_splits=num_splits, window=window)
            compare(again, out.double(), 1e-5, f"{num_splits} splits")
            compare_lse(again_lse, lse.double(), 1e-5, f"{num_splits} splits")

    check()


@READER
@EVERY
def test_where_pages_lie_changes_no_bit(name, implementation):
    @few(4)
    @given(stores(), page_sizes(name), st.randoms(use_true_random=False))
    def check(shape, page_size, random):
        case = make_case(name, page_size=page_size, **shape)
        before = read(case, implementation, num_splits=3, with_page_lse=True)
        order = list(range(case.pages.shape[0]))
        random.shuffle(order)
        order = torch.tensor(order)
        case.pages = case.pages[order]
        moved = torch.argsort(order).int()
        inside = case.block_table < len(order)
        case.block_table = torch.where(inside, moved[case.block_table.where(inside, 0).long()], case.block_table)
        for found, expected in zip(read(case, implementation, num_splits=3, with_page_lse=True), before, strict=True):
            assert torch.equal(found, expected)

    check()


@READER
@EVERY
def test_what_is_not_used_may_hold_anything(name, implementation):
    """NaN or zero in free pages, in slots beyond seqlens, in the codes and scales of a group that is still raw, in the rest of the tail."""

    @few(4)
    @given(stores(), page_sizes(name), st.integers(0, 80))
    def check(shape, page_size, window):
        found = [
            read(make_case(name, page_size=page_size, unused=unused, **shape), implementation, window=window, with_page_lse=True)
            for unused in (0xFF, 0)
        ]
        for poisoned, clean in zip(*found, strict=True):
            assert torch.equal(poisoned, clean) and not poisoned.isnan().any()

    check()


@pytest.mark.parametrize("implementation", ["torch", "cpu"])
def test_partials_merge_in_any_order_and_grouping(implementation):
    merge = library.REFERENCE["merge"] if implementation == "torch" else torch.ops.pikv.merge

    @few(30)
    @given(st.integers(1, 9), st.integers(1, 4), st.floats(0, 60), st.integers(0, 2**32), st.data())
    def check(count, rows, spread, seed, data):
        generator = torch.Generator().manual_seed(seed)
        lse = torch.randn(count, rows, generator=generator) * spread
        lse = torch.where(torch.rand(count, rows, generator=generator) < 0.3, -torch.inf, lse)
        out = torch.where(lse.isinf().unsqueeze(-1), 0.0, torch.randn(count, rows, 16, generator=generator))
        expected = merge_partials(out.double(), lse.double())
        parts = [(out[i], lse[i]) for i in data.draw(st.permutations(range(count)))]
        while len(parts) > 1:  # any neighbours, in any order
            first = data.draw(st.integers(0, len(parts) - 2))
            last = data.draw(st.integers(first + 2, len(parts)))
            stacked = (torch.stack(x).contiguous() for x in zip(*parts[first:last], strict=True))
            parts[first:last] = [merge(*stacked)]
        found = parts[0] if count > 1 else merge(out, lse)
        torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-6, atol=1e-5)

    check()
