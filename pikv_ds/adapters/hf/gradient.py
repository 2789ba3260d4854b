"""One layer's attention as the cache answers it, and its backward. B rows, T columns, H heads, D head_dim.

The forward is the same whether a graph is recorded or not. Backward is right for this forward's queries, keys, values, latent and the
weights that expand it; entries that were stored before are constants, as they are for transformers when their forward ran under no_grad.
What can't be right is refused when backward is called (cache/recorded.py), not before: a forward may record a graph that nobody uses.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from torch import Tensor

from pikv_ds.cache import gradient
from pikv_ds.cache.cache import PiKVCache
from pikv_ds.cache.chunk import finish, visible_in_chunk
from pikv_ds.cache.latent import absorb_query, expand_value
from pikv_ds.cache.recorded import Record
from pikv_ds.modes import in_step, without_autocast
from pikv_ds.placement.placement import Routed
from pikv_ds.spec import LayerSpec
from pikv_ds.step.query import Partial


class Inputs(NamedTuple):
    """What the attention of a layer is computed from, and what may want a gradient."""

    query: Tensor
    """[B, Hq, T, D]."""
    key: Tensor
    """[B, Hkv, T, D]."""
    value: Tensor
    """[B, Hkv, T, Dv]."""
    entry_k: Tensor
    """[B, T, Hkv, Dk], what is stored."""
    entry_v: Tensor
    """[B, T, Hkv, Dv]; Dv = 0 of a latent."""
    up_k: Tensor | None
    """[Hq, D, R] of a latent layer (cache/latent.py)."""
    up_v: Tensor | None
    sink: Tensor | None
    """[Hq]."""


class Chunk(NamedTuple):
    """How the tokens of the forward lie, as `finish` takes it."""

    scale: float
    window: int | None
    positions: Tensor | None
    hidden: Tensor | None
    mask: Tensor | None
    softcap: float | None


def attention(core: PiKVCache, layer: int, inputs: Inputs, chunk: Chunk, expert_ids: Routed | Tensor | None) -> Tensor:
    """[B, T, Hq, Dv] f32, with a graph if one is recorded. Sync: as PiKVCache.attend."""
    if not gradient.is_recorded(*inputs):
        read = _read if inputs.up_k is None else stored  # without a latent there is nothing to compute but in core.attend
        found, _ = read(core, layer, inputs, chunk.scale, expert_ids, None)
        return found.out if found.includes_self and inputs.sink is None else _finished(found, inputs, chunk)
    spec, record = core.layers[layer], Record(entries=inputs.entry_k.requires_grad or inputs.entry_v.requires_grad)
    found, v_dim = stored(core, layer, inputs, chunk.scale, expert_ids, record)
    if found.empty and inputs.sink is None:  # torch has a backward of its own, that holds no scores
        with without_autocast():
            return finish(found, inputs.query, inputs.key, inputs.value, **chunk._asdict())
    again = partial(_again, record, spec, v_dim, chunk, includes_self=found.includes_self, empty=found.empty)
    return gradient.with_gradient(_finished(found, inputs, chunk), again, record.refusal, *inputs)


def _read(
    core: PiKVCache, layer: int, inputs: Inputs, scale: float, expert_ids: Routed | Tensor | None, record: Record | None
) -> tuple[Partial, int]:
    """Attention to what is stored, as wide as the model's values; and how wide it is in the cache."""
    q, v_dim = inputs.query.transpose(1, 2), inputs.value.shape[-1]
    if inputs.up_k is not None:
        q, v_dim = absorb_query(q, inputs.up_k), core.layers[layer].v_dim
    k, v = inputs.entry_k, inputs.entry_v
    found = core.attend(layer, q, k, v, scale=scale, v_dim=v_dim, expert_ids=expert_ids, record=record)
    if inputs.up_v is not None:
        found = found._replace(out=expand_value(found.out, inputs.up_v.to(found.out.dtype)))
    return found, v_dim


def _finish(found: Partial, inputs: Inputs, chunk: Chunk) -> Tensor:
    if found.includes_self and inputs.sink is None:  # one column: nothing is missing
        return found.out
    return finish(found, inputs.query, inputs.key, inputs.value, **chunk._asdict(), sink=inputs.sink)


stored, _finished = in_step(_read), in_step(_finish)  # of a graph that is recorded


def _again(record: Record, spec: LayerSpec, v_dim: int, chunk: Chunk, *tensors: Tensor | None, includes_self: bool, empty: bool) -> Tensor:
    """The same, differentiable, from what was read."""
    inputs, parts = Inputs(*tensors), []
    q = inputs.query.transpose(1, 2)
    if not empty:
        asked = q if inputs.up_k is None else absorb_query(q.float(), inputs.up_k.float())
        out, lse = gradient.stored(record, asked, inputs.entry_k, inputs.entry_v, chunk.scale, v_dim, chunk.softcap)
        parts.append((out if inputs.up_v is None else expand_value(out, inputs.up_v.float()), lse))
    if not includes_self:
        visible = chunk.mask
        if visible is None:
            visible = visible_in_chunk(inputs.query, chunk.window, chunk.positions, chunk.hidden)
        parts.append(gradient.attend(q, inputs.key, inputs.value, visible.transpose(1, 2), chunk.scale, chunk.softcap))
    out, lse = gradient.merge(parts)
    return out if inputs.sink is None else gradient.add_sink(out, lse, inputs.sink)
