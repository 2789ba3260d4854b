"""Expert ids of a forward, taken from the model's own routers by hooks. T tokens (B * columns, padding included), K experts per token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from pikv_ds.cache.cache import PiKVCache
from pikv_ds.codecs.weights import read_weights
from pikv_ds.errors import ConfigError
from pikv_ds.placement.placement import Routed

from . import traced
from .host_penalty import HostPenalty
from .router_output import output_of


class ExpertIds:
    """Supplies the expert ids of each attention layer from one of the sources of `storage.expert_ids`.

    previous_layer: the router of the nearest earlier MoE layer; lookahead: layer l's own router on the input of attention l;
    true: layer l's router when it runs, reported to the core; gate: argmax of a learned gate on the key; hash: position mod E.
    Where the source has no answer (no earlier router, dense layer) ids are None and the core hashes.
    """

    def __init__(
        self,
        source: str,
        routers: list[nn.Module | None],
        attentions: list[nn.Module],
        gate: Tensor | None,
        penalty: HostPenalty | None = None,
    ) -> None:
        self.source, self.routers, self.penalty = source, routers, penalty
        self.gate = gate  # [layers, E, Hkv * Dk]
        self._core: PiKVCache | None = None  # of the running forward
        self._arranged: Callable[[Tensor], Tensor] | None = None
        self._latest: Routed | Tensor | None = None
        self._looked_ahead: dict[int, Routed | Tensor] = {}
        self._handles = []
        if source in ("previous_layer", "true"):
            for i, router in enumerate(self.routers):
                if router is not None:
                    self._handles.append(router.register_forward_hook(self._router_hook(i)))
        if source == "lookahead":
            for i, (router, attention) in enumerate(zip(self.routers, attentions, strict=True)):
                if router is not None:
                    self._handles.append(attention.register_forward_pre_hook(self._lookahead_hook(i, router), with_kwargs=True))

    def begin(self, core: PiKVCache, arranged: Callable[[Tensor], Tensor] | None = None) -> None:
        """A forward through `core` starts. arranged: ids [T] as the cache's tokens lie, where that is another order than the routers'."""
        self._forget()
        self._arranged = arranged
        self._run(core)

    def end(self) -> None:
        self._run(None)
        self._forget()

    def _forget(self) -> None:
        self._latest = None
        self._looked_ahead.clear()

    def _run(self, core: PiKVCache | None) -> None:
        self._core = core
        if self.penalty is not None:
            self.penalty.core = core

    def _penalty(self, layer: int) -> Tensor | None:
        return None if self.penalty is None else self.penalty.of(layer, self._core)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def of(self, layer: int, k: Tensor) -> Routed | Tensor | None:
        """A router's choice, or ids [T] int64, for the entries of one layer; or None. k: [..., Hkv, Dk]. Sync: none."""
        if self.source == "previous_layer":
            return self._latest
        if self.source == "lookahead":
            return self._looked_ahead.get(layer)
        if self.source == "gate":
            keys = k.flatten(-2).flatten(0, -2)
            return (keys.to(self.gate.dtype) @ self.gate[layer].T).argmax(-1)
        return None

    def _router_hook(self, layer: int):
        found = output_of(self.routers[layer])

        def hook(router: nn.Module, args: tuple, output: tuple) -> None:
            hidden = args[0] if args else None
            if is_dynamo_compiling() and self.penalty is None:
                traced.routed(found.entry_experts(hidden, output, None), layer, self.source)
            elif self._core is not None:
                penalty = None if self.penalty is None else self.penalty.of(layer, self._core)
                choice = found.entry_experts(hidden, output, penalty)
                if self.source == "true":
                    self.heard(layer, choice)
                else:
                    self._latest = choice

        return hook

    def heard(self, layer: int, choice: Routed | Tensor) -> None:
        """A router has chosen, or is known to choose, for the tokens of the running forward."""
        if self._core is None:
            return
        if self.source == "true":
            choice = choice.primary() if isinstance(choice, Routed) else choice
            self._core.name_experts(layer, choice if self._arranged is None else self._arranged(choice))
        elif self.source == "lookahead":
            self._looked_ahead[layer] = choice
        else:
            self._latest = choice

    def _lookahead_hook(self, layer: int, router: nn.Module):
        found = output_of(router)

        def hook(attention: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            if is_dynamo_compiling() and self.penalty is None:
                with torch.no_grad():
                    traced.routed(found.look_ahead(hidden.detach().flatten(0, 1), None), layer, self.source)
            elif self._core is not None:
                with torch.no_grad():
                    self.heard(layer, found.look_ahead(hidden.detach().flatten(0, 1), self._penalty(layer)))

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
    try:
        return read_weights(path, {"gate": (num_layers, num_experts, key_width)}, "pikv.storage.gate_path")["gate"]
    except ValueError as error:
        raise ConfigError(str(error)) from error
