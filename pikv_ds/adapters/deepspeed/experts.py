"""AutoEP's experts that change ranks with the shards of their entries: rows of its grouped weights, and what an optimizer keeps of them.

AutoEP sends a token to rank slot // num_local_experts, whatever its placement descriptor says, so experts change slots
(pikv_ds/migration/experts.py). A checkpoint of the engine has them in the order of slots, routers and experts alike: it is the same
function, and loads into any engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pikv_ds.adapters.hf.router_output import PLACED
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.migration.experts import Experts, State

from .autoep import autoep_layers
from .kept import Kept, kept_by

# What has a row per expert: of the router, and of the layer.
ROUTER_ROWS = ("gate.weight", "gate.bias", "e_score_correction_bias")
LAYER_ROWS = ("expert_bias", "tokens_per_expert")


class AutoEPExperts:
    """ExpertStore (pikv_ds/migration/experts.py) of the AutoEP layers of an engine on this rank."""

    def __init__(self, layers: list[nn.Module], kept: Kept, rank: int) -> None:
        self.layers, self.kept = layers, kept
        self.num_experts, self.first = layers[0].num_experts, rank * layers[0].num_local_experts
        self.device = layers[0].router.gate.weight.device

    def read(self, slots: Sequence[int]) -> dict[int, State]:
        states: dict[int, State] = {slot: {} for slot in slots}
        for name, parameter in self._experts():
            for key, x in {name: parameter.detach(), **self._kept(name, parameter)}.items():
                for slot, state in states.items():
                    state[key] = x[slot - self.first]
        return states

    def write(self, states: dict[int, State]) -> None:
        for name, parameter in self._experts():
            whole = {name: parameter.detach(), **self._kept(name, parameter)}
            for slot, state in states.items():
                for key, x in whole.items():
                    x[slot - self.first].copy_(state[key])
            self._keep(name, parameter, whole)

    def rows(self) -> list[Tensor]:
        return [row for found in self._rows() for row in found.values()]

    def write_rows(self, rows: list[Tensor]) -> None:
        new = iter(rows)
        for (name, tensor), found in zip(self._routers(), self._rows(), strict=True):
            for own in found.values():
                own.copy_(next(new))
            if isinstance(tensor, nn.Parameter):
                self._keep(name, tensor, found)

    def obstacle(self) -> str:
        return "gradients wait for a step of the optimizer: call rebalance() behind engine.step()" if self.kept.pending() else ""

    def placed(self, expert_of_slot: tuple[int, ...]) -> None:
        moved = list(expert_of_slot) != list(range(self.num_experts))
        for layer in self.layers:
            setattr(layer.router, PLACED, torch.tensor(expert_of_slot, device=self.device) if moved else None)

    def _rows(self) -> list[dict[str, Tensor]]:
        found = []
        for name, tensor in self._routers():
            kept = self._kept(name, tensor) if isinstance(tensor, nn.Parameter) else {}
            found.append({name: tensor.detach(), **kept})
        return found

    def _kept(self, name: str, parameter: nn.Parameter) -> dict[str, Tensor]:
        return {f"{name}/{key}": x for key, x in self.kept.read(parameter).items()} if parameter.requires_grad else {}

    def _keep(self, name: str, parameter: nn.Parameter, whole: dict[str, Tensor]) -> None:
        if parameter.requires_grad:
            self.kept.write(parameter, {key.removeprefix(f"{name}/"): x for key, x in whole.items() if key != name})

    def _experts(self) -> list[tuple[str, nn.Parameter]]:
        return [(f"{i}.{name}", x) for i, layer in enumerate(self.layers) for name, x in layer.experts.named_parameters()]

    def _routers(self) -> list[tuple[str, Tensor]]:
        return [(f"{i}.{name}", x) for i, layer in enumerate(self.layers) for name, x in rows_of(layer).items()]


def rows_of(layer: nn.Module) -> dict[str, Tensor]:
    """Of an AutoEP layer, the tensors [E, ...] with a row per expert, on every rank."""
    router = {**dict(layer.router.named_parameters()), **dict(layer.router.named_buffers())}
    found = {name: x for name in LAYER_ROWS if isinstance(x := getattr(layer, name, None), Tensor)}
    return {name: router[name] for name in ROUTER_ROWS if name in router} | found


def experts_of(engine: Any, config: PiKVConfig, group: dist.ProcessGroup | None) -> Experts | str:
    """Those of an engine with AutoEP; or why they stay where they are, the same words on all ranks."""
    layers = autoep_layers(engine.module)
    why = _why_not(layers, config, group)
    if why:
        return why
    assert group is not None, "a reason"
    parameters = [x for layer in layers for part in (layer.experts, layer.router) for x in part.parameters() if x.requires_grad]
    kept = kept_by(engine, parameters)
    if isinstance(kept, str):
        return kept
    return Experts(AutoEPExperts(layers, kept, group.rank()), group.rank(), group.size())


def _why_not(layers: list[nn.Module], config: PiKVConfig, group: dist.ProcessGroup | None) -> str:
    if group is None or layers[0].ep_size == 1:
        return "one rank has all experts"
    if group.size() != dist.get_world_size():
        return f"experts lie on {group.size()} of {dist.get_world_size()} ranks, and their copies on the others would have to move alike"
    experts, shards, placement = layers[0].num_experts, config.storage.num_shards or group.size(), config.storage.placement
    if placement != "experts" or experts % shards:
        return f"storage.placement = {placement!r} with {shards} shards: only 'experts' with a divisor of {experts} names them"
    for layer in layers:
        known, kept = rows_of(layer), {**dict(layer.router.named_parameters()), **dict(layer.router.named_buffers())}
        if layer.num_experts != experts:
            return f"the layers have {experts} and {layer.num_experts} experts, so no one order serves all"
        if getattr(layer.router, "num_expert_groups", None) is not None:
            return f"the router chooses among {layer.router.num_expert_groups} groups of neighbouring experts"
        if set(kept) - set(known) or any(x.shape[0] != experts for x in known.values()):
            return f"the router keeps {sorted(kept)}, whose rows are not known here"
        if any(hasattr(x, "ds_id") for x in layer.parameters()):
            return "ZeRO stage 3 has the parameters in pieces; use stage 0 to 2"
        if getattr(layer, "comm_backend", "comm") != "comm":
            return f"expert_parallel.comm_backend = {layer.comm_backend!r} has not been run with experts that move; use 'comm'"
    return ""
