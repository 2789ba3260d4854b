"""Run Megatron-Core's MoE layers on CPU and gloo: an aid for tests and evaluation, never needed with CUDA.

install() replaces the few names through which Megatron-Core 0.16 insists on CUDA, uninstall() puts the originals back. With CUDA both
do nothing. Nothing is replaced at import. The layers must be built with `cpu_config_options()`: without the fused kernels.
"""

from __future__ import annotations

import contextlib
import importlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .patches import Patch, Patches

_patches = Patches()


def install() -> bool:
    """Make Megatron-Core run on this machine's CPU. Returns False, and changes nothing, with CUDA or when installed already."""
    if torch.cuda.is_available() or _patches.in_place:
        return False
    _patches.put(patches())
    return True


def uninstall() -> bool:
    """Put every original back. Returns False when nothing was installed."""
    if not _patches.in_place:
        return False
    _patches.take_back()
    return True


def cpu_config_options() -> dict[str, Any]:
    """TransformerConfig options without which a model can't be built or run on CPU: no fused kernel, no grouped GEMM."""
    from megatron.core.transformer import TransformerConfig

    fusions = ("gradient_accumulation", "masked_softmax", "bias_dropout", "bias_activation", "apply_rope", "moe_permute")
    options = {f"{name}_fusion": False for name in fusions}
    if "inference_moe_token_dispatcher_type" in TransformerConfig.__dataclass_fields__:
        options["inference_moe_token_dispatcher_type"] = "nccl"  # a dynamic context allocates for "nvls", its default from 0.18 on, at once
    return options | {"use_cpu_initialization": True, "moe_grouped_gemm": False, "persist_layer_norm": False}


def patches() -> list[Patch]:
    """Everything install() replaces. Imports Megatron-Core."""
    return [*_torch_patches(), *_rng_patches(), *_moe_patches(), *_mask_patches(), *_attention_patches(), *_inference_patches()]


class _Stream:
    """Stands for a stream and an event; a class, because other libraries name torch.cuda.Stream in annotations."""

    def __init__(self, *args, **kwargs) -> None:
        pass

    def _nothing(self, *args, **kwargs) -> None:
        return None

    wait_stream = wait_event = wait = synchronize = record = _nothing

    def record_event(self, *args) -> _Stream:
        return self

    def query(self) -> bool:
        return True

    def elapsed_time(self, *args) -> float:
        return 0.0


class _Event(_Stream):
    pass


def _torch_patches() -> list[Patch]:
    cuda, cpu, stream = torch.cuda, torch.device("cpu"), _Stream()
    streams = "the all-to-all dispatcher copies its counts on a side stream; the inference controller times with events"
    rng = "CudaRNGStatesTracker.add and the seeding of the inference engines"
    return [
        Patch(cuda, "current_device", lambda: cpu, "passed as device= by layers, router, mappings and contexts"),
        Patch(cuda, "set_device", lambda *args: None, "process setup of launch scripts"),
        Patch(cuda, "Stream", _Stream, streams),
        Patch(cuda, "Event", _Event, streams),
        Patch(cuda, "current_stream", lambda *args: stream, streams),
        Patch(cuda, "default_stream", lambda *args: stream, streams),
        Patch(cuda, "stream", lambda *args: contextlib.nullcontext(), streams),
        Patch(cuda, "synchronize", lambda *args: None, streams),
        Patch(cuda, "manual_seed", torch.manual_seed, rng),
        Patch(cuda, "get_rng_state", lambda *args, **kwargs: torch.get_rng_state(), rng),
        Patch(cuda, "set_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state), rng),
        Patch(cuda, "memory_stats", lambda *args: defaultdict(int), "engines say what they give back when they are suspended"),
        Patch(cuda.nvtx, "range_push", lambda *args: 0, "inference requests mark ranges"),
        Patch(cuda.nvtx, "range_pop", lambda *args: 0, "inference requests mark ranges"),
    ]


def _rng_patches() -> list[Patch]:
    from megatron.core.tensor_parallel import random

    @contextlib.contextmanager
    def fork(self, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        if name not in self.states_:
            raise RuntimeError(f"rng state {name!r} is not added; call model_parallel_cuda_manual_seed(seed) after the groups exist")
        outside = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outside)

    reason = "dropout, expert initialisation and recomputation fork the generator of the device, which is the CPU's here"
    return [
        Patch(random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state(), reason),
        Patch(random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state), reason),
        Patch(random.CudaRNGStatesTracker, "fork", fork, "the original warns on each use that the CPU's state changed inside a fork"),
    ]


def _moe_patches() -> list[Patch]:
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    original = token_dispatcher.all_to_all

    def all_to_all(group, tensor, output_splits=None, input_splits=None, *args, **kwargs):
        splits = [s.tolist() if hasattr(s, "tolist") else s for s in (output_splits, input_splits)]
        return original(group, tensor, *splits, *args, **kwargs)

    found = [Patch(token_dispatcher, "all_to_all", all_to_all, "splits stay tensors when they are on the CPU already; gloo wants lists")]
    if not hasattr(moe_utils, "te_general_gemm"):
        found.append(Patch(moe_utils, "te_general_gemm", None, "0.16.1 reads this name although it binds it only with Transformer Engine"))
    return found


def _mask_patches() -> list[Patch]:
    from megatron.core.fusions import fused_softmax
    from megatron.core.transformer import utils

    def on_cpu(function):
        def build(*args):
            with cuda_literals_on_cpu():
                return function(*args)

        return build

    names = ("get_default_causal_mask", "get_sliding_window_causal_mask")
    replaced = {name: on_cpu(getattr(utils, name)) for name in names}
    return [Patch(owner, name, replaced[name], "device='cuda' is written out") for owner in (utils, fused_softmax) for name in names]


def _attention_patches() -> list[Patch]:
    from megatron.core.transformer import attention, multi_latent_attention

    found = [
        Patch(
            attention,
            "is_fa_min_version",
            lambda *args: True,
            "dynamic batching asserts flash-attn >= 2.7.3, also where PiKV's attention runs",
        )
    ]
    if multi_latent_attention.HAVE_TE and not isinstance(multi_latent_attention.TELinear, type):
        found.append(
            Patch(multi_latent_attention, "HAVE_TE", False, "0.16.1 takes Transformer Engine for installed when its classes are mocks")
        )
    return found


def _inference_patches() -> list[Patch]:
    """Of names that modules of megatron.core.inference hold; versions differ in which, and a name that is not there is not replaced."""
    wanted = [
        ("engines.dynamic_engine", "range_push", lambda *args: 0, "bound by name: torch.cuda.nvtx raises without CUDA"),
        ("engines.dynamic_engine", "range_pop", lambda *args: 0, "as range_push"),
        ("text_generation_controllers.text_generation_controller", "range_push", lambda *args: 0, "as in the engine, from 0.18 on"),
        ("text_generation_controllers.text_generation_controller", "range_pop", lambda *args: 0, "as range_push"),
        ("communication_utils", "_is_cuda", _is_there, "pipeline stages assert that what they send lies on a GPU"),
        (
            "contexts.dynamic_context",
            "triton_append_key_value_cache",
            None,
            "with Triton installed and no GPU the dense dynamic context would launch its kernel; without it, it writes in plain torch",
        ),
    ]
    found = []
    for module, name, replacement, reason in wanted:
        owner = importlib.import_module(f"megatron.core.inference.{module}")
        if getattr(owner, name, None) is not None:
            found.append(Patch(owner, name, replacement, reason))
    return found


def _is_there(tensor: torch.Tensor | None) -> None:
    assert tensor is not None


class _LiteralsOnCPU(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if kwargs.get("pin_memory"):  # without CUDA there is no memory to pin for
            kwargs["pin_memory"] = False
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        if func is torch.Tensor.to:
            args = tuple(torch.device("cpu") if _is_cuda(arg) else arg for arg in args)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The optimizer compares type strings with torch.cuda.FloatTensor and its kin.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


def _is_cuda(device) -> bool:
    return isinstance(device, str | torch.device) and str(device).startswith("cuda")


@contextlib.contextmanager
def cuda_literals_on_cpu() -> Iterator[None]:
    """Inside, device="cuda" and .cuda() mean the CPU and nothing is pinned: for Megatron's optimizer and engines. Nothing with CUDA."""
    with contextlib.nullcontext() if torch.cuda.is_available() else _LiteralsOnCPU():
        yield
