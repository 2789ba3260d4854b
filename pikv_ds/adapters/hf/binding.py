"""Which layer of which model an attention module is, while the model is attached."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import ref

import torch
from torch import Tensor, nn

from pikv_ds.errors import UnsupportedError
from pikv_ds.spec import LayerSpec

from .cache import HFCache
from .latent import Expansion
from .running import Forward, Running


@dataclass(slots=True)
class Binding:
    """One attention module's place in its model. The cache is that of the forward that runs in this thread."""

    running: Running
    layer: int
    """Among those that PiKV keeps."""
    at: int
    """Among all layers of the model's cache."""
    spec: LayerSpec
    shares: bool
    """Its keys and values are those of another layer (KV sharing): it keeps a copy of its own."""
    expansion: Expansion | None = None
    """Of a latent layer."""

    @property
    def forward(self) -> Forward:
        forward = self.running.forward
        if forward is None:
            raise UnsupportedError(
                f"layer {self.layer} runs with attention 'pikv' outside of a forward of its model; call the model, not its layers"
            )
        return forward

    def entries(self, cache: HFCache, dtype: torch.dtype, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """New entries as [B, T, Hkv, D]; a latent layer stores [c_kv | k_rot] once, its value has no columns of its own.

        Args: dtype of the cache; key, value as the attention function got them: what the model gave to the cache, or (MLA) expanded from
            it.
        """
        new = (key, value) if self.shares else cache.layers[self.at].take()
        if new is None:
            raise UnsupportedError(
                f"layer {self.layer} reached attention without updating the cache; a model must call update() of its cache"
            )
        k, v = new[0].transpose(1, 2), new[1].transpose(1, 2)
        if k.dtype != dtype or v.dtype != dtype:
            exact = all(torch.promote_types(x.dtype, dtype) == dtype for x in (k, v))
            if torch.is_autocast_enabled(k.device.type) and exact:  # the pages hold what autocast has rounded
                k, v = k.to(dtype), v.to(dtype)
        if k.dtype != dtype or v.dtype != dtype:
            raise UnsupportedError(
                f"layer {self.layer}: keys arrive as {k.dtype}, the cache was attached for parameters of {dtype} (autocast?); "
                f"convert the model with model.to({k.dtype}) and attach again"
            )
        if self.spec.latent:
            k = self._latent(k, v)
            return k, k.new_empty(*k.shape[:3], 0)
        shapes = (self.spec.num_kv_heads, self.spec.k_dim), (self.spec.num_kv_heads, self.spec.v_dim)
        if (k.shape[2:], v.shape[2:]) != shapes:
            raise UnsupportedError(
                f"layer {self.layer}: keys and values have (heads, width) "
                f"{tuple(k.shape[2:])} and {tuple(v.shape[2:])}, "
                f"the model's configuration says {shapes[0]} and {shapes[1]}"
            )
        if (key is not new[0] or value is not new[1]) and not (_same(key, new[0]) and _same(value, new[1])):
            raise UnsupportedError(
                f"layer {self.layer}: the model changes keys or values between the cache and attention ({tuple(new[0].shape)} became "
                f"{tuple(key.shape)}); PiKV attends to what is stored and can't honour that"
            )
        return k, v

    def _latent(self, c: Tensor, k_rot: Tensor) -> Tensor:
        if c.shape[-1] + k_rot.shape[-1] != self.spec.k_dim or c.shape[2] != 1:
            raise UnsupportedError(
                f"layer {self.layer}: this transformers version caches expanded MLA keys {tuple(c.shape)}, not the latent of width "
                f"{self.spec.v_dim}; use a version whose cache receives the latent (5.23 does)"
            )
        return torch.cat([c, k_rot], -1)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape


_BINDINGS: dict[int, tuple[ref[nn.Module], Binding]] = {}
"""By the id of the module, as it is looked up in every layer: a WeakKeyDictionary takes as long as an op. The reference tells whether the
id is still the module's, and takes the entry away with it."""


def bind(module: nn.Module, binding: Binding) -> None:
    at = id(module)
    _BINDINGS[at] = ref(module, lambda gone: _forget(at, gone)), binding


def unbind(module: nn.Module) -> None:
    _BINDINGS.pop(id(module), None)


def _forget(at: int, gone: ref[nn.Module]) -> None:
    if _BINDINGS.get(at, (None,))[0] is gone:
        del _BINDINGS[at]


def binding_of(module: nn.Module) -> Binding:
    bound = _BINDINGS.get(id(module))
    if bound is None or bound[0]() is not module:
        raise UnsupportedError(
            f"{type(module).__name__} runs with attention 'pikv' but is not attached; call pikv_ds.attach(model, config)"
        )
    return bound[1]
