"""Statistics of a transformers model's keys, values and queries over a text."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pikv_ds.codecs.base import Heads
from pikv_ds.codecs.calibration import Calibration, Moments
from pikv_ds.codecs.rope import pair_metric, rotate
from pikv_ds.errors import UnsupportedError
from pikv_ds.spec import LayerSpec

from .anatomy import find_attentions
from .fingerprint import key_norms
from .model_spec import read_model_spec
from .record import heads_shown
from .rotation import inv_freq_of

SHIFT, LENGTH = 101, 32  # tokens
# Of keys rotated back, relative, of a pair of channels over heads and tokens; a wrong rotation makes about 1.
TOLERANCE, TOLERANCE_16_BIT = 0.01, 0.1


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


class UnrotatedSums:
    """The same sums of keys before their rotation, and of how errors in them weigh over pairs of a query and a key."""

    def __init__(self, inv_freq: Tensor) -> None:
        self.inv_freq, self.tokens, self.pairs = inv_freq, 0, 0

    def add(self, q: Tensor, k: Tensor) -> None:
        """q [N, Hq, D] and k [N, H, D] at positions 0 to N - 1, rotated."""
        inv_freq = self.inv_freq.to(k.device)
        keys = Moments.of(rotate(k.double(), torch.arange(len(k), device=k.device), inv_freq, back=True))
        metric, pairs = pair_metric(q, inv_freq, k.shape[1])
        new = [keys.mean * len(k), keys.second * len(k), metric]
        self.sums = new if not self.tokens else [a + b for a, b in zip(self.sums, new, strict=True)]
        self.tokens, self.pairs = self.tokens + len(k), self.pairs + pairs

    def moments(self) -> Moments:
        return Moments(self.sums[0] / self.tokens, self.sums[1] / self.tokens, self.sums[2] / self.pairs)


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
    about = dict(about)
    try:
        rotations = [inv_freq_of(model.config, spec) for spec in specs]
        check_rotation(model, specs, rotations)
    except UnsupportedError as error:  # everything but rope "pre" works without: the file says why it has none
        rotations, about["rope"] = [], str(error)
    unrotated_sums = [UnrotatedSums(inv_freq) for inv_freq in rotations]
    see = {attention: [x.add] for attention, x in zip(attentions, sums, strict=True)}
    for attention, x in zip(attentions, unrotated_sums, strict=False):
        see[attention].append(lambda q, k, v, x=x: x.add(q, k))
    shown = {attention: lambda q, k, v, each=each: [add(q, k, v) for add in each] for attention, each in see.items()}
    with heads_shown(model, shown):
        for window in windows:
            model(window.unsqueeze(0).to(model.device), use_cache=False)
            advance(1)
    outputs = [output_metric(attention, spec.num_kv_heads) for attention, spec in zip(attentions, specs, strict=True)]
    moments = [x.moments(metric) for x, metric in zip(sums, outputs, strict=True)]
    found = Calibration.of(moments, fingerprint=fingerprint, about=about | {"tokens": str(sums[0].tokens)})
    for i, x in enumerate(unrotated_sums):
        found.add_unrotated(i, x.moments(), x.inv_freq)
    return found


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


@torch.no_grad()
def check_rotation(model: PreTrainedModel, specs: list[LayerSpec], rotations: list[Tensor]) -> None:
    """Keys of the same tokens further on must be the same ones, rotated further: says so of every layer, whatever the model's code.

    Raises: UnsupportedError. Cost: two forwards of LENGTH tokens.
    """
    attentions = find_attentions(model)
    ids = torch.arange(1, LENGTH + 1, device=model.device).remainder(model.config.get_text_config(decoder=True).vocab_size).unsqueeze(0)
    at = torch.arange(LENGTH, device=model.device)
    keys: list[list[Tensor]] = [[] for _ in attentions]
    with heads_shown(model, {a: lambda q, k, v, kept=kept: kept.append(k) for a, kept in zip(attentions, keys, strict=True)}):
        for first in (0, SHIFT):
            model(ids, position_ids=(at + first).unsqueeze(0), use_cache=False)
    for spec, inv_freq, (near, far) in zip(specs, rotations, keys, strict=True):
        near, far = (rotate(k, at + first, inv_freq.to(k.device), back=True) for k, first in ((near, 0), (far, SHIFT)))
        by_pair = lambda x: x.unflatten(-1, (2, -1)).square().sum((0, 1, 2))  # noqa: E731
        error = float((by_pair(far - near) / by_pair(near).clamp_min(1e-12)).sqrt().max())
        if not error <= (TOLERANCE if model.dtype == torch.float32 else TOLERANCE_16_BIT):
            raise UnsupportedError(
                f"layer {spec.layer_idx} of {type(model).__name__} does not rotate its keys by halves with rope_theta alone: rotated back, "
                f"keys of the same tokens {SHIFT} positions on differ by {error:.2g} of their norm"
            )


def output_metric(attention: nn.Module, num_kv_heads: int) -> Tensor:
    """[H, D, D] f64: mean of W^T W over the column blocks W [hidden, D] of the output projection that the values of a kv head meet."""
    projection = getattr(attention, "o_proj", None)
    if projection is None:
        raise UnsupportedError(f"{type(attention).__name__} has no o_proj, by which a calibration weighs the errors of values")
    weight = projection.weight.detach().double()
    by_head = weight.view(weight.shape[0], num_kv_heads, attention.num_key_value_groups, -1)
    return torch.einsum("ohgi,ohgj->hij", by_head, by_head) / by_head.shape[2]
