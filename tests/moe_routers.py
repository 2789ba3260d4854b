"""An oracle for penalised routers: the host's own router, its weight widened by a column that holds the penalty and meets a one.

It shares nothing with the hooks under test, and every router's own code chooses. T tokens, E experts.
"""

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pikv_ds.adapters.hf.cache import HFCache
from pikv_ds.adapters.hf.router_output import is_gate, output_of


@dataclass
class Calls:
    """What a router was given and returned while a penalty was in force."""

    layer: int
    router: nn.Module
    seen: list[tuple[Tensor, tuple, Tensor]] = field(default_factory=list)  # args[0], output, penalty [E]


def watch(routers: list[nn.Module], cache: HFCache) -> list[Calls]:
    """Records every call from now on; register it after attach, so that it sees what the model sees."""
    calls = [Calls(layer, router) for layer, router in enumerate(routers) if router is not None]
    for call in calls:

        def hook(module: nn.Module, args: tuple, output: tuple, call: Calls = call) -> None:
            call.seen.append((args[0], output, cache.penalty.of(call.layer, cache.core)))

        call.router.register_forward_hook(hook)
    return calls


def unhooked(router: nn.Module) -> nn.Module:
    # A process group can't be copied, and a gate without one agrees on no capacity: nothing is dropped either way.
    plain = copy.deepcopy(router, {id(getattr(router, "ep_group", None)): None})
    for name in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        getattr(plain, name).clear()
    return plain


def dense(router: nn.Module, output: tuple, num_experts: int) -> tuple[Tensor, Tensor]:
    """(chosen [T, E] bool, weights [T, E] f32) of a router's output."""
    ids, weights = output_of(router).routed(output)
    kept = ids >= 0
    chosen = torch.zeros(len(ids), num_experts).scatter_add_(1, ids.long().clamp_min(0), kept.float()) > 0
    return chosen, torch.zeros(len(ids), num_experts).scatter_add_(1, ids.long().clamp_min(0), weights.float() * kept)


def call(router: nn.Module, hidden: Tensor) -> tuple:
    return router(hidden, None, True) if is_gate(router) else router(hidden)


def widened(router: nn.Module, hidden: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
    """The choice and the weights of the router on logits lowered by `penalty` [E]."""
    plain = unhooked(router)
    holder = plain.wg if is_gate(plain) else getattr(plain, "gate", plain)
    holder.weight = nn.Parameter(torch.cat([holder.weight, -penalty.unsqueeze(1).to(holder.weight.dtype)], 1))
    if hasattr(plain, "hidden_dim"):
        plain.hidden_dim += 1
    hidden = hidden.reshape(-1, hidden.shape[-1])
    return dense(router, call(plain, torch.cat([hidden, torch.ones(len(hidden), 1)], 1)), len(penalty))


def raw_logits(router: nn.Module, hidden: Tensor) -> Tensor:
    holder = router.wg if is_gate(router) else getattr(router, "gate", router)
    return nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]).float(), holder.weight.float(), getattr(holder, "bias", None))


def model_weights(logits: Tensor, chosen: Tensor, rule: str, scale: float = 1.0) -> Tensor:
    """[T, E]: what a model of this rule gives to a chosen set, written out once more. Rules: softmax, softmax_norm, sigmoid_norm."""
    score = torch.sigmoid(logits) if rule.startswith("sigmoid") else torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
    weights = score * chosen
    return scale * (weights / weights.sum(1, keepdim=True) if rule.endswith("norm") else weights)


def check_calls(calls: list[Calls], applies_to: str, rule: str, scale: float = 1.0) -> int:
    """Every call chose as the widened router and weighed as the mode says. Returns how many tokens chose other experts than unpenalised."""
    moved = 0
    for router in calls:
        assert router.seen
        for hidden, output, penalty in router.seen:
            chosen, weights = dense(router.router, output, len(penalty))
            expected, lowered = widened(router.router, hidden, penalty)
            assert torch.equal(chosen, expected)
            if applies_to == "selection":
                lowered = model_weights(raw_logits(router.router, hidden), chosen, rule, scale)
            assert torch.allclose(weights, lowered, atol=2e-6), (weights - lowered).abs().max()
            moved += int((chosen != widened(router.router, hidden, torch.zeros_like(penalty))[0]).any(1).sum())
    return moved
