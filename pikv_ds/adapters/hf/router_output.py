"""The expert routers of a model and what they return: transformers', AutoEP's, and TopKGate of DeepSpeed's own MoE layer.

T tokens of a forward (B * columns, padding included), K experts per token, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pikv_ds.errors import UnsupportedError
from pikv_ds.placement.placement import Routed, primary_expert

# Qwen3MoeTopKRouter, DeepseekV3TopkRouter, AutoEP's TokenChoiceTopKRouter; TopKGate of deepspeed.moe.layer.MoE
_ROUTER = re.compile(r"top_?k_?router$|^TopKGate$", re.IGNORECASE)

PLACED = "pikv_experts"  # an attribute of routers whose experts have moved (adapters/deepspeed/experts.py)


def find_router(layer: nn.Module) -> nn.Module | None:
    """The expert router of one decoder layer, or None for a dense layer."""
    routers = [m for m in layer.modules() if _ROUTER.search(type(m).__name__)]
    if len(routers) > 1:
        raise UnsupportedError(f"{type(layer).__name__} has {len(routers)} expert routers; PiKV expects at most one per decoder layer")
    return routers[0] if routers else None


def find_routers(layers: list[nn.Module]) -> list[nn.Module | None]:
    """Of decoder layers [L]; a layer that stands there twice, with two attention modules, names its experts at the first."""
    return [None if any(layer is earlier for earlier in layers[:i]) else find_router(layer) for i, layer in enumerate(layers)]


def placed_at(router: nn.Module) -> Tensor | None:
    """[E] int64, the expert in every slot that a router chooses from; None = each in that of its number."""
    return vars(router).get(PLACED)  # a module that has no such attribute looks for it long


def is_gate(router: nn.Module | None) -> bool:
    return type(router).__name__ == "TopKGate"


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

    def reweighed(self, output: tuple, weights: Tensor) -> tuple:
        """The output with other weights [T, K] for the same experts."""
        old = output[self.at[1]]
        return (*output[: self.at[1]], weights.to(old.dtype), *output[self.at[1] + 1 :])

    def entry_experts(self, hidden: Tensor, output: tuple, penalty: Tensor | None) -> Routed:
        """Which experts name the homes of the entries of `hidden` [T, width], for which the router returned `output`."""
        routed = self.routed(output)
        return routed if vars(self.router).get(PLACED) is None else self._named(routed)

    def look_ahead(self, hidden: Tensor, penalty: Tensor | None) -> Routed:
        """The same for other hidden states; the router runs (with its hooks)."""
        return self._named(self.routed(self.router(hidden)))

    def _named(self, routed: Routed) -> Routed:
        """A router chooses slots; where experts have moved (placed_at), the one in each."""
        experts = placed_at(self.router)
        return routed if experts is None else Routed(experts[routed.ids.long()], routed.weights)

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


class GateOutput(RouterOutput):
    """TopKGate of deepspeed.moe: with sparse routes (l_aux, capacity, E, ids [K, T] int32, locations, weights [K, T], counts); -1: dropped.

    An entry's expert is the one of the highest gate score, before capacity drops tokens and before a second expert is sampled: what is
    dropped depends on the other tokens of the forward and on this rank's share of them, and homes must not. When nothing is dropped it is
    the expert of the largest weight that the gate routes to. Source: deepspeed/moe/sharded_moe.py, top1gating, top2gating, topkgating.
    """

    def routed(self, output: tuple) -> Routed:
        if len(output) != 7 or not isinstance(output[3], Tensor) or output[3].shape != output[5].shape:
            raise UnsupportedError(
                f"TopKGate returned {len(output)} values, not (l_aux, capacity, experts, ids, locations, weights, counts) as from "
                f"DeepSpeed 0.19.4 on; PiKV can't tell the experts of a token. Set pikv.storage.expert_ids = 'hash'"
            )
        return Routed(output[3].t(), output[5].t())

    def reweighed(self, output: tuple, weights: Tensor) -> tuple:
        return (*output[:5], weights.t().contiguous().to(output[5].dtype), output[6])

    def entry_experts(self, hidden: Tensor, output: tuple, penalty: Tensor | None) -> Tensor:
        return self.look_ahead(hidden, penalty)

    def look_ahead(self, hidden: Tensor, penalty: Tensor | None) -> Tensor:
        """[T] int64. The gate itself does not run: it would sample, and agree on a capacity with other ranks."""
        logits = nn.functional.linear(hidden.detach().float(), self.router.wg.weight.detach().float())
        scores = torch.softmax(logits if penalty is None else logits - penalty, dim=1)
        return primary_expert(torch.arange(scores.shape[1], device=scores.device).expand_as(scores), scores)


def output_of(router: nn.Module) -> RouterOutput:
    return GateOutput(router) if is_gate(router) else RouterOutput(router)


def count_router_experts(routers: list[nn.Module | None]) -> int | None:
    """Experts per layer, as many as the routers choose among: the rows of their weights. None for a dense model.

    Routers of several sizes are covered by the largest. Raises: UnsupportedError for TopKGates of several sizes.
    """
    counts = sorted({_rows(router) for router in routers if router is not None})
    if len(counts) > 1 and any(map(is_gate, routers)):
        raise UnsupportedError(f"the MoE layers have {counts} experts; PiKV places entries by expert and needs the same number everywhere")
    return counts[-1] if counts else None


def _rows(router: nn.Module) -> int:
    """Of the widest weight with as many columns as a hidden state, or what the router itself says."""
    for module in router.modules():  # itself first
        if isinstance(getattr(module, "out_features", None), int):
            return module.out_features
    weight = getattr(router, "weight", None)
    if isinstance(weight, Tensor):
        shape = getattr(weight, "ds_shape", weight.shape)  # ZeRO-3 leaves an empty tensor
        if len(shape) == 2:
            return int(shape[0])
    found = (getattr(router, name, None) for name in ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts"))
    return next((count for count in found if isinstance(count, int)), 0)


def check_gates(routers: list[nn.Module | None], num_ranks: int, requests: str) -> None:
    """Refuse gates that route at random where several ranks are to compute the same: their hidden states would part without notice."""
    if num_ranks == 1 or requests == "distinct":
        return
    random: dict[str, Callable[[nn.Module], bool]] = {
        "use_rts": lambda gate: gate.k == 1 and gate.drop_tokens and gate.use_rts,
        "top2_2nd_expert_sampling": lambda gate: gate.k == 2 and gate.top2_2nd_expert_sampling,
    }
    for option, acts in random.items():
        if any(is_gate(router) and acts(router) for router in routers):
            raise UnsupportedError(
                f"a deepspeed MoE layer has {option}=True, which draws random numbers in inference too: {num_ranks} ranks that run the "
                f"same requests would not compute the same. Build it with {option}=False (set gate.{option}), or set storage.requests = "
                f"'distinct' and give each rank its own"
            )
