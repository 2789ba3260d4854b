"""Arguments that a model passes along to its attention: what the host's own would honour is refused, the rest is ignored."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import cache

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pikv_ds.errors import UnsupportedError

# What pikv_attention itself takes, and what says only what PiKV does in any case.
_TAKEN = {
    "module",
    "query",
    "key",
    "value",
    "attention_mask",
    "scaling",
    "dropout",
    "sliding_window",
    "s_aux",
    "softcap",
    "is_causal",
    "kwargs",
}
# What other attention functions than eager and sdpa honour: packed sequences of flash attention, and names of older versions.
_ELSEWHERE = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "position_bias", "head_mask", "block_mask", "score_mod"}


def check_arguments(module: nn.Module, arguments: dict) -> None:
    """arguments: what attention of `module` was given by name besides what it takes. Raises: UnsupportedError, naming it."""
    if refusable(type(module).__module__).isdisjoint(arguments):
        return
    for name, argument in arguments.items():
        if argument is not None and argument is not False and name in refusable(type(module).__module__):
            raise UnsupportedError(
                f"attention argument {name!r} is set ({_brief(argument)}) and PiKV does not handle it; unset it or detach"
            )


@cache
def refusable(modeling: str) -> frozenset[str]:
    """Names of arguments of a modeling file's attention that are refused when they are set."""
    return honoured(modeling) | _ELSEWHERE


@cache
def honoured(modeling: str) -> frozenset[str]:
    """What eager attention of a modeling file, or sdpa, do something with: parameters, and keywords that their code names."""
    functions = [sdpa_attention_forward, getattr(sys.modules[modeling], "eager_attention_forward", None)]
    return frozenset().union(*(_named(function) for function in functions if function is not None)) - _TAKEN


def _named(function: Callable) -> set[str]:
    code = inspect.unwrap(function).__code__
    named = {constant for constant in code.co_consts if isinstance(constant, str) and constant.isidentifier()}
    return (set(inspect.signature(function).parameters) | named) - {"output_attentions"}  # refused for the whole forward


def _brief(argument) -> str:
    return f"tensor {tuple(argument.shape)}" if isinstance(argument, Tensor) else repr(argument)
