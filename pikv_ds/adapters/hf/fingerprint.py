"""How a transformers model is told from others: by the key projections of its attention."""

from __future__ import annotations

from torch import Tensor, nn

from pikv_ds.cache.cache import PiKVCache
from pikv_ds.errors import UnsupportedError


def check_calibration(core: PiKVCache, attentions: list[nn.Module]) -> None:
    """Raises: ConfigError when the codec's calibration was made with other weights than these attention modules have."""
    if core.codec.calibrated:
        for spec, attention in zip(core.layers, attentions, strict=True):
            core.codec.check_model(spec, key_norms(attention, spec.num_kv_heads))


def key_norms(attention: nn.Module, num_kv_heads: int) -> Tensor:
    """[H, D]: norms of the rows of the key projection."""
    projection = getattr(attention, "k_proj", None)
    weight = getattr(projection, "weight", None)
    if weight is None or not weight.is_floating_point() or weight.numel() == 0 or weight.is_meta:
        why = "has no k_proj" if projection is None else "has a k_proj whose weight is partitioned (ZeRO-3), packed or offloaded"
        raise UnsupportedError(
            f"{type(attention).__name__} {why}, by which a calibration knows its model; use a codec without a calibration"
        )
    return weight.detach().double().view(num_kv_heads, -1, weight.shape[1]).norm(dim=-1)
