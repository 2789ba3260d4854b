"""Folded maps against decode-then-attend, and the rotation."""

import pytest
import torch

from pikv_ds.codecs.lora_plus import LoRAPlus
from pikv_ds.codecs.maps import Linear, Transform
from pikv_ds.codecs.none import NoCodec
from pikv_ds.codecs.rotated import hadamard, rotated
from pikv_ds.ops import sdpa_lse
from pikv_ds.spec import LayerSpec
from pikv_ds.step.query import Partial
from tests.calibrations import random_calibration

HEADS, TOKENS, SCALE = 2, 9, 0.3


def heads_of(spec, group, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda heads, dim: torch.randn(1, TOKENS, heads, dim, generator=generator)  # noqa: E731
    return draw(HEADS * group, spec.k_dim), draw(HEADS, spec.k_dim), draw(HEADS, spec.v_dim)


def attend(q, k, v):
    out, lse = sdpa_lse(*(x.transpose(1, 2) for x in (q, k, v)), scale=SCALE)
    return out.transpose(1, 2), lse.transpose(1, 2)


@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize(("k_dim", "v_dim", "rank"), [(32, 32, 8), (64, 32, 16), (96, 96, 96), (128, 128, 64)])
@pytest.mark.parametrize("fit", ["norm", "attention"])
def test_folded_attention_is_attention_to_what_is_decoded(k_dim, v_dim, rank, group, fit):
    spec = LayerSpec(layer_idx=0, num_kv_heads=HEADS, k_dim=k_dim, v_dim=v_dim)
    codec = LoRAPlus.on(random_calibration([spec]), rank=min(rank, v_dim), fit=fit)
    maps = rotated(codec.pool(spec, 4, torch.float32), seed=3).maps
    q, k, v = heads_of(spec, group)
    want, want_lse = attend(q, maps.k.invert(maps.k.apply(k)), maps.v.invert(maps.v.apply(v)))
    folded, c_k, c_v, shift = maps.enter(q, k, v, SCALE)
    assert folded.shape[-1] == c_k.shape[-1] == codec.stored(spec).k_dim and c_v.shape[-1] == codec.stored(spec).v_dim
    found = maps.leave(Partial(*attend(folded, c_k, c_v), True), shift)
    assert (found.out - want).norm() <= 1e-5 * want.norm() and (found.lse - want_lse).abs().max() < 1e-4
    assert shift.abs().min() > 1e-4, "without a shift the lse would be right by chance"


def test_full_rank_changes_nothing_but_rounding():
    spec = LayerSpec(layer_idx=0, num_kv_heads=HEADS, k_dim=32, v_dim=32)
    maps = LoRAPlus.on(random_calibration([spec]), rank=32, fit="attention").transform(spec)
    _, k, v = heads_of(spec, 1)
    for side, x in ((maps.k, k), (maps.v, v)):
        assert (side.invert(side.apply(x)) - x).norm() <= 1e-5 * x.norm()


def test_where_nothing_is_stored_out_stays_zero():
    """The mean of values must not appear for a query that saw none."""
    spec = LayerSpec(layer_idx=0, num_kv_heads=HEADS, k_dim=32, v_dim=32)
    maps = LoRAPlus.on(random_calibration([spec]), rank=8).transform(spec)
    lse = torch.zeros(1, 2, HEADS)
    lse[0, 1] = -torch.inf
    left = maps.leave(Partial(torch.zeros(1, 2, HEADS, 8), lse, False), torch.ones(1, 2, HEADS))
    assert left.out[0, 1].abs().max() == 0 and bool(torch.isneginf(left.lse[0, 1]).all())
    assert torch.equal(left.out[0, 0], maps.v.mean) and torch.equal(left.lse[0, 0], torch.ones(HEADS))
    empty = maps.leave(Partial(torch.zeros(1, 2, HEADS, 8), torch.full((1, 2, HEADS), -torch.inf), False, True), None)
    assert empty.out.shape == (1, 2, HEADS, 32) and empty.out.abs().max() == 0


def test_one_map_after_another():
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    basis = torch.linalg.qr(draw(2, 32, 16)).Q
    inner = Linear(basis, basis.mT, draw(2, 32))
    turn = torch.linalg.qr(draw(2, 16, 8)).Q
    outer = Linear(turn, turn.mT, draw(2, 16))
    both, x = outer.after(inner), draw(5, 2, 32)
    c = torch.einsum("nhd,hdr->nhr", x - inner.mean, inner.encode)
    want_c = torch.einsum("nhr,hrs->nhs", c - outer.mean, outer.encode)
    want = torch.einsum("nhr,hrd->nhd", torch.einsum("nhs,hsr->nhr", want_c, outer.decode) + outer.mean, inner.decode) + inner.mean
    found_c = torch.einsum("nhd,hdr->nhr", x - both.mean, both.encode)
    assert torch.allclose(found_c, want_c) and torch.allclose(torch.einsum("nhr,hrd->nhd", found_c, both.decode) + both.mean, want)


@pytest.mark.parametrize("width", [8, 16, 24, 32, 80, 96, 128, 576])
def test_hadamard_is_orthogonal_at_every_width(width):
    turn = hadamard(width).double()
    assert torch.allclose(turn @ turn.mT, torch.eye(width, dtype=torch.float64), atol=1e-6)
    spread = turn.abs().max(0).values  # the largest share that one channel keeps of itself
    assert spread.max() <= 8**-0.5 + 1e-6


def test_rotation_spreads_an_outlier_and_is_seeded():
    spec = LayerSpec(layer_idx=2, num_kv_heads=3, k_dim=64, v_dim=64)
    first, again, other = (rotated(NoCodec().pool(spec, 4, torch.float32), seed).maps for seed in (0, 0, 1))
    assert torch.equal(first.k.encode, again.k.encode) and not torch.equal(first.k.encode, other.k.encode)
    assert not torch.equal(first.k.encode[0], first.k.encode[1]) and not torch.equal(first.k.encode, first.v.encode)
    x = torch.zeros(1, 3, 64)
    x[..., 5] = 100.0
    assert torch.allclose(first.k.apply(x).abs(), torch.full((1, 3, 64), 12.5))


def test_heads_of_a_tensor_parallel_rank_are_those_of_the_whole_model():
    whole = LayerSpec(layer_idx=1, num_kv_heads=4, k_dim=32, v_dim=32)
    own = LayerSpec(layer_idx=1, num_kv_heads=2, k_dim=32, v_dim=32, first_head=2)
    calibration = random_calibration([LayerSpec(layer_idx=0, num_kv_heads=4, k_dim=32, v_dim=32), whole])
    codec = LoRAPlus.on(calibration, rank=16)
    cut, uncut = (rotated(codec.pool(spec, 4, torch.float32), seed=1).maps for spec in (own, whole))
    for part, full in ((cut.k, uncut.k), (cut.v, uncut.v)):
        assert all(torch.equal(a, b[2:]) for a, b in zip(part, full, strict=True))


def test_a_latent_turns_its_values_among_themselves():
    spec = LayerSpec(layer_idx=0, num_kv_heads=1, k_dim=72, v_dim=64, latent=True)
    maps = rotated(NoCodec().pool(spec, 4, torch.float32), 0).maps
    assert isinstance(maps, Transform) and maps.k.encode[0, :64, 64:].abs().max() == 0 == maps.k.encode[0, 64:, :64].abs().max()
    assert torch.equal(maps.k.encode[:, :64, :64], maps.v.encode)
