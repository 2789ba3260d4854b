"""Merging by log-sum-exp: attention over a union of disjoint key sets, whatever the sets, their number and their order."""

import pytest
import torch

from pikv_ds.ops import add_sink, merge_partials
from tests.harness.dense import rel_error
from tests.harness.driver import TOLERANCE
from tests.reference_cache import dense_attention, merge

SCALE = 0.4


def split_attention(
    sizes: list[int], seed: int = 0, magnitude: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """float64 partials per set [S, H, D], [S, H], and attention over all keys [H, D], [H]."""
    generator = torch.Generator().manual_seed(seed)
    num_keys = sum(sizes)
    q = magnitude * torch.randn(4, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, num_keys, 2, 8, generator=generator, dtype=torch.float64)
    parts = [dense_attention(q, ks, vs, SCALE) for ks, vs in zip(k.split(sizes), v.split(sizes), strict=True)]
    outs, lses = (torch.stack(side) for side in zip(*parts, strict=True))
    return outs, lses, *dense_attention(q, k, v, SCALE)


SIZES = {"one": [5], "two": [3, 4], "five": [1, 9, 2, 30, 4], "with-empty": [0, 6, 0, 3], "one-key-each": [1] * 7}


@pytest.mark.parametrize("magnitude", [1.0, 300.0], ids=["usual", "peaked"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_equals_attention_over_the_union(sizes, magnitude):
    outs, lses, want, want_lse = split_attention(sizes, magnitude=magnitude)
    out, lse = merge_partials(outs.float(), lses.float())
    # float32 cannot hold a log-sum-exp of hundreds to better than 1e-5, and weights are exponentials of its differences.
    assert rel_error(out, want) <= (TOLERANCE if magnitude == 1 else 3e-5)
    assert rel_error(lse, want_lse) <= TOLERANCE
    out, lse = merge_partials(outs, lses)
    assert rel_error(out, want) <= 1e-12 and rel_error(lse, want_lse) <= 1e-12
    out, lse = merge(list(zip(outs, lses, strict=True)))  # the oracle's own
    assert rel_error(out, want) <= 1e-12 and rel_error(lse, want_lse) <= 1e-12


def test_order_does_not_matter():
    outs, lses, want, want_lse = split_attention(SIZES["five"])
    for seed in range(6):
        order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
        out, lse = merge_partials(outs[order].float(), lses[order].float())
        assert rel_error(out, want) <= TOLERANCE and rel_error(lse, want_lse) <= TOLERANCE


@pytest.mark.parametrize("cut", [1, 2, 3, 4], ids="cut{}".format)
def test_grouping_does_not_matter(cut):
    outs, lses, want, want_lse = split_attention(SIZES["five"])
    outs, lses = outs.float(), lses.float()
    halves = [merge_partials(outs[part], lses[part]) for part in (slice(cut), slice(cut, None))]
    out, lse = merge_partials(*(torch.stack(side) for side in zip(*halves, strict=True)))
    assert rel_error(out, want) <= TOLERANCE and rel_error(lse, want_lse) <= TOLERANCE


def test_equal_inputs_in_equal_order_give_equal_bits():
    outs, lses, *_ = split_attention(SIZES["five"])
    first, second = (merge_partials(outs.float().clone(), lses.float().clone()) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_an_empty_set_changes_no_bit():
    outs, lses, *_ = split_attention([4])
    outs, lses = outs.float(), lses.float()
    out, lse = merge_partials(torch.cat([outs, torch.zeros_like(outs)]), torch.cat([lses, torch.full_like(lses, -torch.inf)]))
    assert torch.equal(out, outs[0]) and torch.equal(lse, lses[0])


def test_empty_everywhere_gives_zero_and_minus_infinity():
    outs, lses = torch.zeros(3, 2, 4, 8), torch.full((3, 2, 4), -torch.inf)
    lses[1, 1], outs[1, 1] = 0.5, 7.0  # the second row saw something
    out, lse = merge_partials(outs, lses)
    assert out[0].eq(0).all() and lse[0].eq(-torch.inf).all()
    assert out[1].eq(7).all() and torch.equal(lse[1], torch.full((4,), 0.5))


@pytest.mark.parametrize("level", [-1e4, -200.0, 200.0, 1e4], ids=str)
def test_large_normalisers_do_not_overflow(level):
    out, lse = merge_partials(torch.tensor([[[1.0]], [[3.0]]]), torch.full((2, 1), level))
    assert out.item() == 2.0 and lse.item() == pytest.approx(level + 0.6931472, abs=1e-3)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"out \(2, 3, 4\) and lse \(2, 4\) differ"):
        merge_partials(torch.zeros(2, 3, 4), torch.zeros(2, 4))


def test_a_sink_is_one_more_key_without_a_value():
    outs, lses, out, lse = split_attention([6])
    sink = torch.tensor([-3.0, 0.0, 1.5, 40.0])
    got = add_sink(out.float()[None, :, None], lse.float()[None, :, None], sink)[0, :, 0]
    share = torch.exp(lse) / (torch.exp(lse) + torch.exp(sink.double()))
    assert rel_error(got, out * share.unsqueeze(-1)) <= TOLERANCE
    nothing = add_sink(torch.zeros(1, 4, 1, 8), torch.full((1, 4, 1), -torch.inf), sink)
    assert nothing.eq(0).all()
