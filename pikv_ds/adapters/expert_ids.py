"""Expert ids of a forward, taken from the model's own routers by hooks. T tokens (B * columns, padding included), K experts per token."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pikv_ds.errors import ConfigError, UnsupportedError
from pikv_ds.placement import Routed

_ROUTER = re.compile(r"top_?k_?router$", re.IGNORECASE)  # Qwen3MoeTopKRouter, DeepseekV3TopkRouter, AutoEP's TokenChoiceTopKRouter


def find_router(layer: nn.Module) -> nn.Module | None:
    """The expert router of one decoder layer, or None for a dense layer."""
    routers = [m for m in layer.modules() if _ROUTER.search(type(m).__name__)]
    if len(routers) > 1:
        raise UnsupportedError(f"{type(layer).__name__} has {len(routers)} expert routers; PiKV expects at most one per decoder layer")
    return routers[0] if routers else None


class RouterOutput:
    """Finds the (ids, weights) [T, K] in a router's output: (logits, weights, ids) in transformers, (weights, ids, counts) under AutoEP.

    Where they are is looked up in the first output and kept: a router always returns the same kinds of tensors.
    """

    def __init__(self, router: nn.Module) -> None:
        self.router, self.at = router, None

    def routed(self, output: tuple) -> Routed:
        if self.at is None:
            self.at = self._find(output)
        return Routed(output[self.at[0]], output[self.at[1]])

    def _find(self, output: tuple) -> tuple[int, int]:
        tensors = [(i, t) for i, t in enumerate(output) if isinstance(t, Tensor) and t.dim() == 2] if isinstance(output, tuple) else []
        for i, ids in tensors:
            if not ids.is_floating_point():
                weights = [j for j, t in tensors if t.is_floating_point() and t.shape == ids.shape]
                if weights:
                    return i, weights[0]
        raise UnsupportedError(
            f"{type(self.router).__name__} returned no (weights, ids) pair of equal shape [tokens, top_k]; PiKV can't tell the experts of "
            f"a token. Set pikv.storage.expert_ids = 'hash'"
        )


class ExpertIds:
    """Supplies the expert ids of each attention layer from one of the sources of `storage.expert_ids`.

    previous_layer: the router of the nearest earlier MoE layer; lookahead: layer l's own router on the input of attention l;
    true: layer l's router when it runs, reported through `on_routed`; gate: argmax of a learned gate on the key; hash: position mod E.
    Where the source has no answer (no earlier router, dense layer) ids are None and the core hashes.
    """

    def __init__(self, source: str, decoder_layers: list[nn.Module], attentions: list[nn.Module], gate: Tensor | None) -> None:
        self.source = source
        self.routers = [find_router(layer) for layer in decoder_layers]
        self.gate = gate  # [layers, E, Hkv * Dk]
        self.on_routed: Callable[[int, Tensor], None] | None = None
        self._latest: Routed | None = None
        self._looked_ahead: dict[int, Routed] = {}
        self._handles = []
        if source in ("previous_layer", "true"):
            for i, router in enumerate(self.routers):
                if router is not None:
                    self._handles.append(router.register_forward_hook(self._router_hook(i)))
        if source == "lookahead":
            for i, (router, attention) in enumerate(zip(self.routers, attentions, strict=True)):
                if router is not None:
                    self._handles.append(attention.register_forward_pre_hook(self._lookahead_hook(i, router), with_kwargs=True))
        self.active = False  # only while a forward runs through the cache

    def begin(self) -> None:
        self._latest, self.active = None, True
        self._looked_ahead.clear()

    def end(self) -> None:
        self.active = False

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def of(self, layer: int, k: Tensor) -> Routed | Tensor | None:
        """A router's choice, or ids [T] int64, for the entries of one layer; or None. k: [B, columns, Hkv, Dk]. Sync: none."""
        if self.source == "previous_layer":
            return self._latest
        if self.source == "lookahead":
            return self._looked_ahead.get(layer)
        if self.source == "gate":
            keys = k.flatten(2).flatten(0, 1)
            return (keys.to(self.gate.dtype) @ self.gate[layer].T).argmax(-1)
        return None

    def _router_hook(self, layer: int):
        found = RouterOutput(self.routers[layer])

        def hook(router: nn.Module, args: tuple, output: tuple) -> None:
            if not self.active:
                return
            choice = found.routed(output)
            if self.source == "true":
                self.on_routed(layer, choice.primary())
            else:
                self._latest = choice

        return hook

    def _lookahead_hook(self, layer: int, router: nn.Module):
        found = RouterOutput(router)

        def hook(attention: nn.Module, args: tuple, kwargs: dict) -> None:
            if not self.active:
                return
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            with torch.no_grad():
                self._looked_ahead[layer] = found.routed(router(hidden.detach().flatten(0, 1)))

        return hook


def count_experts(config) -> int | None:
    """Experts per MoE layer as the model's configuration names them; None for a dense model."""
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        value = getattr(config, name, None)
        if value:
            return int(value)
    return None


def load_gate(path: str, num_layers: int, num_experts: int, key_width: int) -> Tensor:
    """Read a learned KV gate: safetensors file with "gate" [num_layers, num_experts, num_kv_heads * k_dim]."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"pikv.storage.gate_path = {path!r} can't be read as safetensors: {error}") from error
    wanted = (num_layers, num_experts, key_width)
    if "gate" not in tensors or tuple(tensors["gate"].shape) != wanted:
        found = {name: tuple(t.shape) for name, t in tensors.items()}
        raise ConfigError(f"pikv.storage.gate_path = {path!r} holds {found}; this model needs 'gate' of shape {wanted}")
    return tensors["gate"]
