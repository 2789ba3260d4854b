"""The modes of torch that a forward through an attached model may run in, and what becomes of each: the rows of docs/reference/modes.md.

A row runs the same program with plain transformers and with PiKV, and both must give the same, or PiKV refuses by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny_models import prompt
from tests.torch_defaults import double_by_default

Found = dict[str, torch.Tensor]
TURNS = (12, 5, 1, 1)  # tokens of the forwards of a conversation
WEIGHT = "model.layers.0.self_attn.k_proj.weight"


@dataclass(frozen=True)
class Row:
    mode: str
    run: Callable[[torch.nn.Module], Found]
    note: str
    refused: str | None = None
    """What the refusal says; None: served."""
    tolerance: float = 1e-5
    """Absolute, of logits around 1; of gradients relative to the largest."""
    long: bool = False
    family: str = "qwen3_moe"
    oracle: Callable[[torch.nn.Module], Found] | None = None
    """What plain transformers run; None: the same."""


def chat(model, *modes, forward=None) -> Found:
    """A conversation, every forward in the next of `modes`. The logits of each."""
    past, found = None, {}
    for turn, length in enumerate(TURNS):
        with modes[turn % len(modes)]() as _:
            out = (model if forward is None else forward)(prompt(length, seed=turn), past_key_values=past)
        past, found[f"turn {turn}"] = out.past_key_values, out.logits.detach().clone()
    return found


def suffix_gradient(model, forward=None, around=contextlib.nullcontext, suffix: int = 5) -> Found:
    """Of a loss over tokens after a cached prefix, in all parameters."""
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        past = model(prompt(12, seed=2)).past_key_values
    with around():
        loss = (model if forward is None else forward)(prompt(suffix, seed=9), past_key_values=past).logits.log_softmax(-1)[..., 7].sum()
        loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}}


def graphs(model) -> Found:
    return chat(model, torch.enable_grad) | suffix_gradient(model) | {"token": suffix_gradient(model, suffix=1)[WEIGHT]}


def turns_with_and_without(model) -> Found:
    return chat(model, partial(torch.set_grad_enabled, False), partial(torch.set_grad_enabled, True)) | suffix_gradient(model)


def every_mixture(model) -> Found:
    found = {}
    for i, modes in enumerate(
        [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode), (torch.inference_mode, torch.enable_grad)]
    ):
        found |= {f"{i} {name}": logits for name, logits in chat(model, *modes).items()}
    return found


def frozen_then_not(model) -> Found:
    with_none = chat(model.requires_grad_(False), torch.enable_grad)
    return with_none | suffix_gradient(model.requires_grad_(True))


def uncompiled(model) -> Found:
    return chat(model, torch.no_grad) | suffix_gradient(model)


def compiled(model, backend: str, method: bool = False) -> Found:
    torch._dynamo.reset()
    forward = torch.compile(model.forward if method else model, backend=backend)
    found = chat(model, torch.no_grad, forward=forward) | suffix_gradient(model, forward=forward)
    torch._dynamo.reset()
    return found


def checkpointing(model) -> Found:
    model.gradient_checkpointing_enable()
    found = suffix_gradient(model)
    model.train()
    model.zero_grad(set_to_none=True)
    model(prompt(9, seed=3), labels=prompt(9, seed=3)).loss.backward()
    found["train"] = model.get_parameter(WEIGHT).grad.clone()
    model.eval()
    model.gradient_checkpointing_disable()
    return found


def checkpoint_around(model) -> Found:
    found = {}
    for reentrant in (False, True):
        model.zero_grad(set_to_none=True)
        given = model.get_input_embeddings()(prompt(9, seed=2)).detach().requires_grad_()
        logits = checkpoint(lambda x: model(inputs_embeds=x).logits, given, use_reentrant=reentrant)
        logits.log_softmax(-1)[..., 7].sum().backward()
        found |= {f"inputs {reentrant}": given.grad, f"weight {reentrant}": model.get_parameter(WEIGHT).grad.clone()}
    return found


def training_between_turns(model) -> Found:
    with torch.no_grad():
        first = model(prompt(12, seed=0))
    model.train()
    model.zero_grad(set_to_none=True)
    model(prompt(9, seed=3), labels=prompt(9, seed=3), use_cache=False).loss.backward()
    model.eval()
    with torch.no_grad():
        second = model(prompt(3, seed=1), past_key_values=first.past_key_values)
    return {"first": first.logits, "second": second.logits, "trained": model.get_parameter(WEIGHT).grad.clone()}


def cache_in_training(model) -> Found:
    with torch.no_grad():
        past = model(prompt(12, seed=0)).past_key_values
        model.train()
        try:
            return {"logits": model(prompt(3, seed=1), past_key_values=past).logits}
        finally:
            model.eval()


def converted(model, dtype: torch.dtype) -> Found:
    with torch.no_grad():
        model.to(dtype)
        try:
            return {"logits": model(prompt(12, seed=0)).logits}
        finally:
            model.float()


def functional(model) -> Found:
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    loss = lambda p: torch.func.functional_call(model, p, (prompt(9, seed=2),)).logits.log_softmax(-1)[..., 7].sum()  # noqa: E731
    return {"gradient": torch.func.grad(loss)(parameters)[WEIGHT]}


def tangents(model) -> Found:
    import torch.autograd.forward_ad as forward_ad

    given = model.get_input_embeddings()(prompt(9, seed=2)).detach()
    with forward_ad.dual_level():
        out = model(inputs_embeds=forward_ad.make_dual(given, torch.ones_like(given))).logits
        return {"tangent": forward_ad.unpack_dual(out).tangent}


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def both(model, around) -> Found:
    with torch.no_grad():
        logits = chat(model, around)
    return logits | suffix_gradient(model, around=around)


def on_another_device(model) -> Found:
    """Where tensors that name no device would have no numbers."""
    ids = [prompt(length, seed=turn) for turn, length in enumerate(TURNS)]
    at = [torch.arange(sum(TURNS[:i]), sum(TURNS[: i + 1]))[None] for i in range(len(TURNS))]
    past, found = None, {}
    with torch.no_grad():
        for turn, (own, positions) in enumerate(zip(ids, at, strict=True)):
            with torch.device("meta"):
                out = model(own, position_ids=positions, past_key_values=past)
            past, found[f"turn {turn}"] = out.past_key_values, out.logits
    return found


def autocast(model, dtype: torch.dtype) -> Found:
    """How far each result is from the one without autocast: relative error norms, which must be those of plain transformers."""
    around = partial(torch.autocast, "cpu", dtype=dtype)
    with torch.no_grad():
        exact = chat(model, contextlib.nullcontext)
        found = {"all": chat(model, around), "some": chat(model, around, contextlib.nullcontext)}
    errors = {f"{name}, {turn}": (x.float() - exact[turn]).norm() / exact[turn].norm() for name in found for turn, x in found[name].items()}
    exact, cast = suffix_gradient(model)[WEIGHT], suffix_gradient(model, around=around)[WEIGHT]
    return errors | {"gradient": (cast - exact).norm() / exact.norm()}


ROWS = [
    Row("`torch.no_grad()`", lambda m: chat(m, torch.no_grad), "what `generate` runs in"),
    Row("`torch.inference_mode()`", lambda m: chat(m, torch.inference_mode), "no tensor of the cache becomes an inference tensor"),
    Row("inference mode in some forwards and not in others", every_mixture, "also around attach, reset and detach"),
    Row("recording a graph", graphs, "backward gives the gradients of plain transformers; what it can't is below"),
    Row("`torch.set_grad_enabled` in some forwards", turns_with_and_without, "a backward goes as far as the last forward with a graph"),
    Row("`requires_grad_(False)`, then `True`", frozen_then_not, "frozen parameters cost nothing more"),
    Row("`torch.autocast`, bf16", partial(autocast, dtype=torch.bfloat16), "pages hold what autocast has rounded, in the model's dtype",
        tolerance=0.01, family="qwen3_dense"),
    Row("`torch.compile(model)`, eager", partial(compiled, backend="eager"),
        "the cache is a break in the graph; `fullgraph=True` fails", long=True,
        oracle=uncompiled),
    Row("`torch.compile(model)`, aot_eager", partial(compiled, backend="aot_eager"), "as above", long=True, oracle=uncompiled),
    Row("`torch.compile(model)`, inductor", partial(compiled, backend="inductor"), "as above", long=True, tolerance=1e-4,
        oracle=uncompiled),
    Row("`torch.compile(model.forward)`", partial(compiled, backend="eager", method=True), "as above", long=True, oracle=uncompiled),
    Row("gradient checkpointing", checkpointing, "in eval mode the model does not checkpoint; forwards in train mode are the host's"),
    Row("`torch.utils.checkpoint` around a forward", checkpoint_around, "each of its two runs starts a new generation"),
    Row("`train()` and `eval()` between forwards", training_between_turns, "the conversation goes on after a training step"),
    Row("`torch.use_deterministic_algorithms(True)`", lambda m: both(m, deterministic), ""),
    Row("`torch.set_default_dtype(torch.float64)`", lambda m: both(m, double_by_default), "tensors of the cache name their dtype"),
    Row("`torch.set_default_device`", on_another_device, "tensors of the cache name their device"),
    Row("`FlopCounterMode`", lambda m: both(m, partial(FlopCounterMode, display=False)), "reading pages counts as nothing"),
    Row("`torch.profiler`", lambda m: both(m, torch.profiler.profile), "", long=True),
    Row("`torch.autograd.detect_anomaly()`", lambda m: both(m, partial(torch.autograd.detect_anomaly, check_nan=True)), "", long=True),
    Row("`torch.autograd.graph.save_on_cpu()`", lambda m: both(m, torch.autograd.graph.save_on_cpu), "", long=True),
    Row("the cache in a forward in train mode", cache_in_training, "call `eval()`", "in train mode"),
    Row("`model.to(dtype)` after attach", partial(converted, dtype=torch.bfloat16), "attach again", "attach again"),
    Row("`torch.func` (grad, vmap, ...)", functional, "`loss.backward()`, or `use_cache=False`", "inside torch.func"),
    Row("`torch.autograd.forward_ad`", tangents, "`loss.backward()`, or `use_cache=False`", "forward_ad.dual_level"),
]  # fmt: skip
