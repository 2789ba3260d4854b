"""merge against fp64 and its torch twin: as exact as the twin, a mean of equal values is that value, and what is empty, infinite or NaN."""

import pytest
import torch

from pikv_ds import ops
from pikv_ds.ops import library
from pikv_ds.ops.build import load

INF, NAN = torch.inf, torch.nan
EVERY = pytest.mark.parametrize("which", ["torch", "cpu", "emu"])
COMPILED = pytest.mark.parametrize("which", ["cpu", "emu"])


def _merge(which):
    if which == "torch":
        return library.REFERENCE["merge"]
    if which == "emu":
        load.define_emu()
    return torch.ops.pikv_emu.merge if which == "emu" else torch.ops.pikv.merge


def _partials(sets, *shape, dim=128):
    generator = torch.Generator().manual_seed(sets)
    return torch.randn(sets, *shape, dim, generator=generator), 2 * torch.randn(sets, *shape, generator=generator)


def _rms(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("sets", [2, 4, 8])
@COMPILED
def test_as_exact_as_the_twin(sets, which):
    """Dividing each weight by the total before summing made the error 2 to 8 % larger than the twin's."""
    out, lse = _partials(sets, 512)
    exact, exact_lse = ops.merge_partials(out.double(), lse.double())
    (found, found_lse), (twin, _) = _merge(which)(out, lse), library.REFERENCE["merge"](out, lse)
    assert _rms(found, exact) <= 1.01 * _rms(twin, exact)
    torch.testing.assert_close(found_lse.double(), exact_lse, rtol=0, atol=1e-6)
    torch.testing.assert_close(found, twin, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sets", [1, 2, 3, 8, 64])
@COMPILED
def test_a_mean_of_ones_is_one(sets, which):
    """Weights that are rounded after a division of their own do not sum to one."""
    lse = _partials(sets, 300)[1]
    lse[1:] = lse[1:].where(torch.arange(300) % 5 > 0, -INF)
    out = lse.isfinite().float().unsqueeze(-1).expand(sets, 300, 40).contiguous()
    assert _merge(which)(out, lse)[0].eq(1).all()


@EVERY
def test_what_is_empty_changes_no_bit(which):
    out, lse = _partials(3, 7)
    merge, whole = _merge(which), _merge(which)(out, lse)
    empty = torch.zeros(2, 7, 128), torch.full((2, 7), -INF)
    for at in (0, 2, 3):
        found = merge(*(torch.cat([x[:at], none, x[at:]]) for x, none in zip((out, lse), empty, strict=True)))
        assert torch.equal(found[0], whole[0]) and torch.equal(found[1], whole[1])
    alone = merge(*(torch.cat([none[:1], x[:1]]) for x, none in zip((out, lse), empty, strict=True)))
    assert torch.equal(alone[0], out[0]) and torch.equal(alone[1], lse[0])
    nothing = merge(*empty)
    assert nothing[0].eq(0).all() and nothing[1].eq(-INF).all()


@EVERY
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("others", [-INF, 0.5])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_bad_lse_spoils_its_row_only(which, bad, others, at):
    out, lse = torch.ones(3, 2, 40), torch.full((3, 2), 0.5)
    lse[:, 1] = others
    lse[at, 1] = bad
    out[lse == -INF] = 0
    merged, merged_lse = _merge(which)(out, lse)
    assert merged[0].eq(1).all() and merged_lse[0].isfinite()
    assert merged[1].isnan().all() and merged_lse[1].isnan()


@EVERY
@pytest.mark.parametrize("lse", [0.0, -150.0], ids=["weight", "weight-underflows"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_bad_value_spoils_its_column_only(which, bad, lse):
    """Also when its weight is 0 in fp32: that the set is not empty says its lse."""
    out, lses = torch.ones(2, 3, 40), torch.tensor([[0.0] * 3, [lse] * 3])
    out[1, 1, 5] = bad
    merged, merged_lse = _merge(which)(out, lses)
    expected = bad if lse == 0 else NAN
    torch.testing.assert_close(merged[1, 5], torch.tensor(expected), equal_nan=True)
    merged[1, 5] = 1
    assert merged.eq(1).all() and merged_lse.isfinite().all()


@EVERY
@pytest.mark.parametrize("level", [-1e4, -200.0, 200.0, 1e4, torch.finfo(torch.float32).min])
def test_a_large_lse_does_not_overflow(which, level):
    merged, merged_lse = _merge(which)(torch.tensor([[[1.0]], [[3.0]]]), torch.full((2, 1), level))
    assert merged.item() == 2 and merged_lse.item() == pytest.approx(level + 0.6931472, rel=1e-7, abs=1e-5)


def test_what_the_steps_pass():
    """Out and lse beside each other in rows, as gathered from all ranks (not contiguous), and rows of no request."""
    B, T, H, D = 2, 3, 4, 16
    out, lse = _partials(4, B, T, H, dim=D)
    gathered = torch.cat([out.view(4, B * T, -1), lse.view(4, B * T, -1)], -1)
    outs, lses = gathered.split([H * D, H], -1)
    rows = torch.cat([out, lse.unsqueeze(-1)], -1).split([D, 1], -1)
    expected = ops.merge(out, lse)
    for given in ((outs.reshape(-1, B, T, H, D), lses.reshape(-1, B, T, H)), (rows[0], rows[1].squeeze(-1))):
        assert not given[0].is_contiguous()
        found = ops.merge(*given)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    none = ops.merge(out[:, :0], lse[:, :0])
    assert none[0].shape == (0, T, H, D) and none[1].shape == (0, T, H)
