"""Statistics of a transformers model's keys, values and queries over a text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pikv_ds.calibration import Calibration, Moments
from pikv_ds.codecs.base import Heads
from pikv_ds.errors import UnsupportedError

from .fingerprint import key_norms
from .hf import find_attentions
from .model_spec import read_model_spec


class Sums:
    """Running sums over tokens of one layer, f64: of x, x x^T for keys and values, q q^T for queries."""

    def __init__(self) -> None:
        self.tokens = 0
        self.sums: list[Tensor] = []

    def add(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """q [N, Hq, D], k and v [N, H, D]."""
        keys, values = Moments.of(k, q), Moments.of(v)
        new = [x * len(k) for x in (*keys, values.mean, values.second)]
        self.sums = new if not self.tokens else [a + b for a, b in zip(self.sums, new, strict=True)]
        self.tokens += len(k)

    def moments(self, outputs: Tensor) -> tuple[Moments, Moments]:
        """Of keys and of values; outputs [H, D, D]: the metric of values."""
        means = [x / self.tokens for x in self.sums]
        return Moments(*means[:3]), Moments(*means[3:], outputs)


@torch.no_grad()
def calibrate(model: PreTrainedModel, windows: Tensor, advance: Callable[[int], None], about: dict[str, str]) -> Calibration:
    """Run windows [N, context] int64 through the model, one at a time, and keep the moments of all its layers.

    Raises: UnsupportedError for a model without keys of its own (MLA), or without a key projection to know it by.
    """
    attentions = find_attentions(model)
    specs = read_model_spec(model.config)
    for spec in specs:
        if spec.latent:
            raise UnsupportedError(
                f"{type(model).__name__} stores latents (MLA), a low-rank code already; no codec of this version is calibrated on them"
            )
    fingerprint = [key_norms(attention, spec.num_kv_heads) for attention, spec in zip(attentions, specs, strict=True)]
    sums = [Sums() for _ in specs]
    with heads_shown(model, {attention: x.add for attention, x in zip(attentions, sums, strict=True)}):
        for window in windows:
            model(window.unsqueeze(0).to(model.device), use_cache=False)
            advance(1)
    outputs = [output_metric(attention, spec.num_kv_heads) for attention, spec in zip(attentions, specs, strict=True)]
    moments = [x.moments(metric) for x, metric in zip(sums, outputs, strict=True)]
    return Calibration.of(moments, fingerprint=fingerprint, about=about | {"tokens": str(sums[0].tokens)})


@torch.no_grad()
def heads_of(model: PreTrainedModel, windows: Tensor) -> list[list[Heads]]:
    """[layer][window]: what every layer computes for each window [N, context], on the CPU."""
    attentions = find_attentions(model)
    found: list[list[Heads]] = [[] for _ in attentions]
    see = {a: lambda q, k, v, kept=kept: kept.append(Heads(q.cpu(), k.cpu(), v.cpu())) for a, kept in zip(attentions, found, strict=True)}
    with heads_shown(model, see):
        for window in windows:
            model(window.unsqueeze(0).to(model.device), use_cache=False)
    return found


@contextlib.contextmanager
def heads_shown(model: PreTrainedModel, see: dict[nn.Module, Callable[[Tensor, Tensor, Tensor], None]]) -> Iterator[None]:
    """Inside, every attention module in `see` also hands its q [N, Hq, D], k and v [N, H, D] (after RoPE, rows joined) to its function."""

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs):
        see[module](*(x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)))
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    before = model.config._attn_implementation
    AttentionInterface.register("pikv_calibrate", attend)
    model.set_attn_implementation("pikv_calibrate")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def output_metric(attention: nn.Module, num_kv_heads: int) -> Tensor:
    """[H, D, D] f64: mean of W^T W over the column blocks W [hidden, D] of the output projection that the values of a kv head meet."""
    projection = getattr(attention, "o_proj", None)
    if projection is None:
        raise UnsupportedError(f"{type(attention).__name__} has no o_proj, by which a calibration weighs the errors of values")
    weight = projection.weight.detach().double()
    by_head = weight.view(weight.shape[0], num_kv_heads, attention.num_key_value_groups, -1)
    return torch.einsum("ohgi,ohgj->hij", by_head, by_head) / by_head.shape[2]
