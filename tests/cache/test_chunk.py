"""A forward's own chunk, merged with what is stored, is attention over both; a latent's projections fold into query and output."""

import pytest
import torch

from pikv_ds.cache.chunk import finish
from pikv_ds.cache.latent import absorb_query, expand_value
from pikv_ds.step.query import Partial

B, T, PAST, HQ, HKV, D, WINDOW = 2, 5, 4, 4, 2, 8, 3


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def dense(q, k, v, visible, sink):
    """Softmax over all keys at once in f64: q [B, Hq, T, D], k, v [B, Hkv, L, D], visible [B, T, L] -> [B, T, Hq, D]."""
    k, v = (x.repeat_interleave(HQ // HKV, 1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) * D**-0.5).masked_fill(~visible.unsqueeze(1), -torch.inf)
    if sink is not None:
        scores = torch.cat([scores, sink.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = torch.nan_to_num(scores.softmax(-1))[..., : k.shape[2]]
    return (weights @ v).transpose(1, 2)


@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("padding", ["none", "left", "middle"])
def test_chunk_and_stored_are_attention_over_both(padding, window, with_sink):
    q, k, v = drawn(B, HQ, T, D), drawn(B, HKV, PAST + T, D), drawn(B, HKV, PAST + T, D)
    hidden = torch.zeros(B, T, dtype=torch.bool)
    if padding != "none":
        hidden[0, 0 if padding == "left" else 2] = True
    positions = PAST + (~hidden).cumsum(1) - 1
    key_at = torch.cat([torch.arange(PAST).expand(B, -1), positions], 1)
    visible = key_at.unsqueeze(1) <= positions.unsqueeze(2)
    visible &= ~torch.cat([torch.zeros(B, PAST, dtype=torch.bool), hidden], 1).unsqueeze(1)
    if window is not None:
        visible &= key_at.unsqueeze(1) > positions.unsqueeze(2) - window
    sink = drawn(HQ) if with_sink else None
    expected = dense(q, k, v, visible, sink)

    past = visible.clone()
    past[..., PAST:] = False
    out = dense(q, k, v, past, None)
    scores = (q @ k.repeat_interleave(HQ // HKV, 1).transpose(-1, -2) * D**-0.5).masked_fill(~past.unsqueeze(1), -torch.inf)
    stored = Partial(out.float(), scores.logsumexp(-1).transpose(1, 2).float(), False)
    own = [x[:, :, -T:].float() for x in (q, k, v)]
    given = {"positions": positions, "hidden": None if padding == "none" else hidden, "sink": None if sink is None else sink.float()}
    got = finish(stored, *own, scale=D**-0.5, window=window, **given)
    real = ~hidden
    torch.testing.assert_close(got[real].double(), expected[real], rtol=1e-5, atol=1e-5)
    if padding != "middle":  # columns tell the same order as positions
        in_order = finish(stored, *own, scale=D**-0.5, window=window, **given | {"positions": None})
        assert torch.equal(in_order[real], got[real])


def test_a_stored_part_that_has_the_own_token_is_left_alone():
    out, lse = drawn(B, 1, HQ, D).float(), drawn(B, 1, HQ).float()
    nobody = torch.full((B, HQ, 1, D), torch.nan)
    assert torch.equal(finish(Partial(out, lse, True), nobody, nobody, nobody, scale=1.0, window=None), out)


def test_absorbed_latent_attention_is_attention_over_expanded_heads():
    rank, rot, width = 6, 4, 5
    c, k_rot, up_k, up_v = drawn(B, PAST, rank), drawn(B, PAST, rot), drawn(HQ, D, rank), drawn(HQ, width, rank)
    q = drawn(B, T, HQ, D + rot)
    keys = torch.cat([torch.einsum("blr,hdr->blhd", c, up_k), k_rot.unsqueeze(2).expand(-1, -1, HQ, -1)], -1)
    values = torch.einsum("blr,hvr->blhv", c, up_v)
    weights = torch.einsum("bthd,blhd->bthl", q, keys).softmax(-1)
    scores = torch.einsum("bthd,bld->bthl", absorb_query(q, up_k), torch.cat([c, k_rot], -1))
    torch.testing.assert_close(scores.softmax(-1), weights)
    over_latents = torch.einsum("bthl,blr->bthr", scores.softmax(-1), c)
    torch.testing.assert_close(expand_value(over_latents, up_v), torch.einsum("bthl,blhv->bthv", weights, values))
