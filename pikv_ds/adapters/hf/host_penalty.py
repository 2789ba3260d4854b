"""The penalty of pikv_ds.adapters.penalty on the routers of a transformers model: its own, AutoEP's, DeepSpeed's TopKGate.

A router's own code chooses: while it runs, the penalty is taken off what its one F.linear returns (a torch function mode, entered and left
by hooks). Where only the choice may change, the weights of the chosen experts are formed again from the untouched logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pikv_ds.adapters.penalty import RouterPenalty, penalty_of
from pikv_ds.cache.cache import PiKVCache
from pikv_ds.errors import ConfigError, UnsupportedError

from .router_output import RouterOutput, is_gate, output_of, placed_at

Weighing = Callable[[Tensor, Tensor], Tensor]  # logits [T, E], ids [T, K] (-1 = dropped) -> weights [T, K] f32
PROBE_TOKENS = 16


class LoweredLogits(TorchFunctionMode):
    """Takes a penalty [E] off the logits that F.linear returns, and keeps them as they were."""

    def __init__(self, penalty: Tensor) -> None:
        super().__init__()
        self.penalty = penalty
        self.logits: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is not nn.functional.linear:
            return out
        self.logits.append(out)
        return out - self.penalty.to(out.dtype)


class HostPenalty:
    """Hooks on every router of a model; they act while a forward runs through a cache, which is `core`."""

    def __init__(self, penalty: RouterPenalty, core: PiKVCache, routers: list[nn.Module | None], hidden_size: int, model: str) -> None:
        """Raises: ConfigError for a dense model, UnsupportedError for a router that PiKV does not understand; nothing is hooked then.

        Collectives: with "selection", those of a TopKGate that keeps all tokens (drop_tokens=False), which is probed once.
        """
        if not any(router is not None for router in routers):
            raise ConfigError(
                f"pikv.routing.host_penalty = {penalty}: {model} has no expert router that could heed it (it is dense, or its routers are "
                f"none of transformers', AutoEP's or DeepSpeed's TopKGate); leave the penalty out"
            )
        self.penalty = penalty
        self.core: PiKVCache | None = None
        self.misses = torch.zeros(len(routers), core.num_experts, dtype=torch.float32, device=core.device)
        self._running: dict[int, LoweredLogits] = {}
        self._handles = []
        found = [None if router is None else (output_of(router), _weighing(router, hidden_size, core)) for router in routers]
        for layer, (router, how) in enumerate(zip(routers, found, strict=True)):
            if how is not None:
                self._handles.append(router.register_forward_pre_hook(self._before(layer)))
                self._handles.append(router.register_forward_hook(self._after(layer, *how), always_call=True))

    def of(self, layer: int, core: PiKVCache) -> Tensor:
        """[E] f32, see `penalty_of`; core: of the cache that the forward runs through."""
        return penalty_of(self.penalty, core, layer, self.misses)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before(self, layer: int):
        def hook(router: nn.Module, args: tuple) -> None:
            if self.core is not None:
                penalty, experts = self.of(layer, self.core), placed_at(router)
                self._running[layer] = LoweredLogits(penalty if experts is None else penalty[experts])
                self._running[layer].__enter__()

        return hook

    def _after(self, layer: int, reader: RouterOutput, weighing: Weighing):
        def hook(router: nn.Module, args: tuple, output):
            mode = self._running.pop(layer, None)
            if mode is None:
                return None
            mode.__exit__(None, None, None)
            if output is None or self.penalty.applies_to != "selection":  # None: the router raised; its error is on its way up
                return None
            return reader.reweighed(output, weighing(mode.logits[0], reader.routed(output).ids))

        return hook


def _weighing(router: nn.Module, hidden_size: int, core: PiKVCache) -> Weighing:
    """How this router weighs the experts that it has chosen: the formula that gives its own weights on a probe.

    Raises UnsupportedError when none does, or when its logits are not the result of one F.linear: another version, a router unknown here.
    """
    name, reader = type(router).__name__, output_of(router)
    weight = next(router.parameters())
    tokens = max(PROBE_TOKENS, getattr(router, "min_capacity", 0))
    probe = torch.randn(tokens, hidden_size, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    mode = LoweredLogits(torch.zeros(core.num_experts, dtype=torch.float32, device=weight.device))
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []), torch.no_grad(), mode:
        output = router(probe, None, True) if is_gate(router) else router(probe)
    if len(mode.logits) != 1 or mode.logits[0].shape != (tokens, core.num_experts):
        raise UnsupportedError(
            f"pikv.routing.host_penalty on {name}: its logits [tokens, {core.num_experts}] are not the result of one F.linear, "
            f"so the penalty can't be taken off them (ZeRO-3 replaces F.linear); leave the penalty out"
        )
    ids, weights = reader.routed(output)
    for formula in _formulas(router):
        if torch.allclose(formula(mode.logits[0], ids), weights.float(), rtol=4 * torch.finfo(weights.dtype).eps, atol=1e-7):
            return formula
    raise UnsupportedError(
        f"pikv.routing.host_penalty on {name}: its weights are neither softmax nor sigmoid of its logits, normalised or scaled, so those "
        f"of a chosen set are not known here; leave the penalty out"
    )


def _formulas(router: nn.Module) -> Iterator[Weighing]:
    scales = [1.0, *(getattr(router, key) for key in ("routed_scaling_factor", "route_scale") if hasattr(router, key))]
    for scale in dict.fromkeys(scales):
        for score in (lambda logits: logits.softmax(-1), torch.sigmoid):
            for normalised in (False, True):
                yield _formula(score, normalised, scale)


def _formula(score: Callable[[Tensor], Tensor], normalised: bool, scale: float) -> Weighing:
    def weights_of(logits: Tensor, ids: Tensor) -> Tensor:
        ids = ids.long()
        weights = score(logits.float()).gather(1, ids.clamp_min(0)) * (ids >= 0)
        if normalised:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        return weights * scale

    return weights_of
