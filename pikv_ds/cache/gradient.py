"""Backward through attention over stored entries: the same attention once more, in torch, from what was read (recorded.py).

B rows, T columns, H heads, D head_dim, L entries of a part. Computed in f32. Cost of backward: layer by layer the scores of the forward's
queries over all that they could read, B * Hq * T * (L + T) f32 numbers, a few times, as eager attention holds them. Of forward: the
copies of recorded.py, no sync. First derivatives only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pikv_ds.errors import UnsupportedError
from pikv_ds.modes import untraced
from pikv_ds.step.query import Partial

from .recorded import Record, Seen

NOTHING = -1e30  # the logit of what is not seen: finite, so that no derivative is NaN
OFF = 0.05  # of the largest output: where what is computed again differs by more, it is not what was read

Part = tuple[Tensor, Tensor]
"""out [B, T, Hq, Dv] and lse [B, T, Hq], f32; 0 and NOTHING where nothing is seen."""


def is_recorded(*inputs: Tensor | None) -> bool:
    """Whether autograd follows what is computed from these now."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def with_gradient(out: Tensor, again: Callable[..., Tensor] | None, refusal: str | None, *inputs: Tensor) -> Tensor:
    """`out` as it is, with a backward that computes again(*inputs) and differentiates that.

    Raises, in backward: UnsupportedError when there is a refusal; RuntimeError when `again` gives something else than `out`.
    """
    return _Again.apply(out, again, refusal, *inputs)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float | None = None) -> Part:
    """q [B, T, Hq, D], k and v [B, H, L, D], visible [B or 1, T or 1, H or 1, L] bool. Differentiable."""
    logits = scale * torch.einsum("bthgd,bhld->bthgl", q.float().unflatten(2, (k.shape[1], -1)), k.float())
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = torch.where(visible.unsqueeze(3), logits, NOTHING)
    lse = logits.logsumexp(-1)
    out = torch.einsum("bthgl,bhlv->bthgv", torch.exp(logits - lse.unsqueeze(-1)), v.float())
    sees = visible.any(-1).unsqueeze(3).expand_as(lse)
    out, lse = torch.where(sees.unsqueeze(-1), out, 0), torch.where(sees, lse, NOTHING)
    return out.flatten(2, 3), lse.flatten(2, 3)


def merge(parts: list[Part]) -> Part:
    """As ops.merge. Differentiable."""
    if len(parts) == 1:
        return parts[0]
    lses = torch.stack([lse for _, lse in parts])
    return (lses.softmax(0).unsqueeze(-1) * torch.stack([out for out, _ in parts])).sum(0), lses.logsumexp(0)


def add_sink(out: Tensor, lse: Tensor, sink: Tensor) -> Tensor:
    """As ops.add_sink, for a Part. Differentiable."""
    return out * torch.sigmoid(lse - sink.float()).unsqueeze(-1)


def stored(record: Record, q: Tensor, k: Tensor, v: Tensor, scale: float, v_dim: int, softcap: float | None = None) -> Part:
    """What PiKVCache.attend has answered for q [B, T, Hq, Dk] and entries k, v [B, T, H, D]. Differentiable in all three."""
    maps, shift = record.maps, None
    if maps is not None:
        q, k, v, shift = maps.enter(q.float(), k.float(), v.float(), scale, record.positions)
        v_dim = maps.v_rank
    if not record.parts:  # no pool has a page
        return q.new_zeros(*q.shape[:3], v_dim, dtype=torch.float32), q.new_full(q.shape[:3], NOTHING, dtype=torch.float32)
    out, lse = merge([_part(part, record, q, k, v, scale, v_dim, softcap) for part in record.parts])
    if maps is None:
        return out, lse
    return _left(maps.leave(_partial(out, lse), shift))


def _part(part: Seen, record: Record, q: Tensor, k: Tensor, v: Tensor, scale: float, v_dim: int, softcap: float | None) -> Part:
    keys, values, shift = part.k.float(), None if part.v is None else part.v.float(), None
    if part.own is not None:
        own = k.to(part.k.dtype) if part.rebuilt is None else part.rebuilt.keys(k, record.positions)
        keys = torch.where(part.own.unsqueeze(-1), own.float().transpose(1, 2), keys)
        if values is not None:
            values = torch.where(part.own.unsqueeze(-1), v.to(part.v.dtype).float().transpose(1, 2), values)
    if values is None:
        values = keys[..., :v_dim] if part.maps is None else keys[..., : part.maps.v_rank]
    if part.maps is not None:
        q, shift = part.maps.fold(q.float(), scale)
    out, lse = attend(q, keys, values, part.visible, scale, softcap)
    return (out, lse) if part.maps is None else _left(part.maps.leave(_partial(out, lse), shift))


def _partial(out: Tensor, lse: Tensor) -> Partial:
    return Partial(out, torch.where(lse > NOTHING / 2, lse, -torch.inf), False)


def _left(partial: Partial) -> Part:
    return partial.out, partial.lse.clamp_min(NOTHING)


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, again, refusal, *inputs):
        ctx.again, ctx.refusal = again, refusal
        if refusal is None:
            ctx.save_for_backward(out, *inputs)
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    @untraced
    def backward(ctx, grad):
        if ctx.refusal is not None:
            raise UnsupportedError(f"backward through attention over a PiKV cache: {ctx.refusal}")
        out, *inputs = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        with torch.enable_grad(), torch.autocast(out.device.type, enabled=False):
            leaves = [None if x is None else x.detach().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
            computed = ctx.again(*leaves)
        off, most = ((x.float().nan_to_num().abs().max() if x.numel() else x.new_zeros(())) for x in (computed.detach() - out, out))
        if float(off) > OFF * float(most) + 1e-6:
            raise RuntimeError(
                f"backward through attention over a PiKV cache: what was read gives an output that is off by {float(off):.3g}, where "
                f"the largest is {float(most):.3g}; the gradient would be wrong, please report the configuration"
            )
        found = iter(torch.autograd.grad(computed, [x for x, want in zip(leaves, wanted, strict=True) if want], grad, allow_unused=True))
        return None, None, None, *(next(found) if want else None for want in wanted)
