"""Experts of Megatron-Core that change ranks with the shards of their entries: where they lie in a model, and which can move.

Every rank has as many slots, neighbours in the order of ranks, and a token goes to the slot that the router names. See
pikv_ds/migration/experts.py for what a move is, placed.py for what it asks of the modules.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from pikv_ds.adapters.trained import Trained
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.migration.experts import Experts, State

from .groups import expert_group
from .layers import Layer
from .optimizers import torch_optimizers
from .placed import place
from .subclass import is_pikv

# Of a TopKRouter, what has a row per expert. Anything else it keeps is unknown here.
ROUTER_ROWS = ("weight", "bias", "expert_bias", "local_tokens_per_expert", "global_tokens_per_expert")
NO_ROWS = ("ga_steps",)


class MegatronExperts:
    """ExpertStore (pikv_ds/migration/experts.py) of the MoE layers of a model on this rank."""

    def __init__(self, moes: list[MoELayer], rank: int) -> None:
        self.moes, self.each = moes, moes[0].num_local_experts
        self.first, self.num_experts = rank * self.each, moes[0].config.num_moe_experts
        self.device = moes[0].router.weight.device
        self.trained: Trained | None = None  # None: nobody has said what trains the model

    def train_with(self, optimizer) -> None:
        """optimizer: Megatron-Core's, torch's, several of them, () for none. Raises: UnsupportedError for one that can't be followed."""
        self.trained = Trained(torch_optimizers(optimizer))

    def read(self, slots: Sequence[int]) -> dict[int, State]:
        return {slot: self._read(slot) for slot in slots}

    def write(self, states: dict[int, State]) -> None:
        for slot, state in states.items():
            self._write(slot, state)

    def write_rows(self, rows: list[Tensor]) -> None:
        for own, row in zip(self.rows(), rows, strict=True):
            own.copy_(row)

    def _read(self, slot: int) -> State:
        state: State = {}
        for name, parameter in self._parameters(slot):
            state[name] = parameter.detach()
            state |= {name + key: value for key, value in self._trained().beside(parameter).items()}
        return state | dict(self._buffers(slot))

    def _write(self, slot: int, state: State) -> None:
        for name, parameter in self._parameters(slot):
            parameter.copy_(state[name])
            beside = {key.removeprefix(name): x for key, x in state.items() if key.startswith((f"{name}/", f"{name}?"))}
            self._trained().put(parameter, beside)
        for name, buffer in self._buffers(slot):
            buffer.copy_(state[name])

    def rows(self) -> list[Tensor]:
        found: list[Tensor] = []
        for moe in self.moes:
            for name in ROUTER_ROWS:
                tensor = getattr(moe.router, name, None)
                if isinstance(tensor, torch.nn.Parameter):
                    found += [tensor.detach(), *self._trained().rows(tensor)]
                elif tensor is not None:
                    found.append(tensor)
        return found

    def obstacle(self) -> str:
        if self.trained is None and any(hasattr(moe.router.weight, "main_grad") or moe.router.weight.grad is not None for moe in self.moes):
            return (
                "the model has gradients, so an optimizer may hold state of its experts, and none was given: call "
                "context.rebalance(optimizer=...), with () if none does"
            )
        return ""

    def placed(self, expert_of_slot: tuple[int, ...]) -> None:
        for moe in self.moes:
            place(moe, expert_of_slot, self.first)

    def _trained(self) -> Trained:
        return self.trained or Trained()

    def _parameters(self, slot: int) -> list[tuple[str, torch.nn.Parameter]]:
        return [(f"{i}.{name}", x) for i, expert in self._experts(slot) for name, x in expert.named_parameters()]

    def _buffers(self, slot: int) -> list[tuple[str, Tensor]]:
        return [(f"{i}.{name}", x) for i, expert in self._experts(slot) for name, x in expert.named_buffers()]

    def _experts(self, slot: int) -> list[tuple[int, torch.nn.Module]]:
        return [(i, moe.experts.local_experts[slot - self.first]) for i, moe in enumerate(self.moes)]


def experts_of(layers: list[Layer], config: PiKVConfig, group: dist.ProcessGroup | None) -> Experts | str:
    """Those of the model, the same object for all its contexts; or why they stay where they are, the same words on all ranks."""
    moes = list(dict.fromkeys(layer.moe for layer in layers if layer.moe is not None))
    why = _why_not(moes, layers, config, group)
    if why:
        return why
    assert group is not None, "a reason"
    router = moes[0].router
    if router.pikv_along is None:
        router.pikv_along = Experts(MegatronExperts(moes, group.rank()), group.rank(), group.size())
    return router.pikv_along


def _why_not(moes: list[MoELayer], layers: list[Layer], config: PiKVConfig, group: dist.ProcessGroup | None) -> str:
    if group is None or not moes:
        return "the model has no experts, or one rank has all of them"
    of_model, experts = expert_group(layers), moes[0].config.num_moe_experts
    if of_model is None or dist.get_process_group_ranks(of_model) != dist.get_process_group_ranks(group):
        return "the cache is sharded over another group than the experts"
    shards = config.storage.num_shards or group.size()
    if config.storage.placement != "experts" or experts % shards:
        return (
            f"storage.placement = {config.storage.placement!r} with {shards} shards: only 'experts' with a divisor of {experts} names them"
        )
    if config.storage.expert_ids == "true":
        return "storage.expert_ids = 'true': a forward of the cache ends while its last router runs, whose choice would be of moved experts"
    return next((why for moe in moes if (why := _why_not_moe(moe))), "")


def _why_not_moe(moe: MoELayer) -> str:
    router, experts, name = moe.router, moe.experts, f"layer {moe.layer_number}"
    if not isinstance(router, TopKRouter) or not is_pikv(router):
        return f"{name} routes with {type(router).__name__}; only TopKRouter can be told where experts are"
    if not isinstance(experts, SequentialMLP):
        return (
            f"{name} has its experts in {type(experts).__name__}; only SequentialMLP has been run, build it with moe_grouped_gemm = False"
        )
    if experts.dp_group.size() > 1 or experts.tp_group.size() > 1:
        return f"{name} has its experts on more ranks than its expert-parallel group, which would have to move alike"
    for option in ("moe_router_num_groups", "moe_enable_routing_replay"):
        if getattr(moe.config, option, None):
            return f"TransformerConfig.{option} = {getattr(moe.config, option)!r} counts on the order of experts"
    kept = {key for key, _ in (*router.named_parameters(), *router.named_buffers())} - {*ROUTER_ROWS, *NO_ROWS}
    return f"the router of {name} keeps {sorted(kept)}, whose rows are not known here" if kept else ""
