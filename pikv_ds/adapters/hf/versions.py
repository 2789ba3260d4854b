"""Which transformers this adapter runs on: what it hooks into is checked by name before anything of it is imported."""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from types import ModuleType

from packaging.version import Version

from pikv_ds.errors import UnsupportedError

OLDEST, BEYOND = "5.19", "5.25"
"""The tested range, BEYOND excluded: setup.py's, and docs/reference/hosts.md has a row for each of its versions."""

HOOK_POINTS = {
    "transformers": ("AttentionInterface", "AttentionMaskInterface", "DynamicCache", "GenerationMixin", "PreTrainedModel"),
    "transformers.GenerationMixin": (
        "generate",
        "prepare_inputs_for_generation",
        "_prepare_cache_for_generation",
        "_has_unfinished_sequences",
    ),
    "transformers.cache_utils": (
        "Cache",
        "CacheLayerMixin",
        "DYNAMIC_LAYER_TYPE_MAPPING",
        "DynamicLayer",
        "DynamicSlidingWindowLayer",
        "LinearAttentionAndFullAttentionLayer",
        "LinearAttentionAndSlidingWindowAttentionLayer",
        "LinearAttentionLayer",
        "get_layer_types_and_kwargs",
    ),
    "transformers.integrations.deepspeed": ("is_deepspeed_zero3_enabled",),
    "transformers.integrations.sdpa_attention": ("sdpa_attention_forward",),
    "transformers.masking_utils": ("causal_mask_function", "sdpa_mask"),
}
"""Where -> what the adapter takes from there. A hook that is found by a signature is checked where it is looked for (argument_names.py)."""


def check_hook_points(installed: str) -> None:
    """Raises: UnsupportedError below the tested range, and in or above it where a hook point is missing."""
    if Version(installed) < Version(OLDEST):
        raise UnsupportedError(f"transformers {installed} is older than what PiKV was tested with; {_remedy()}")
    missing = [f"{where}.{name}" for where, names in HOOK_POINTS.items() for name in names if not hasattr(_there(where), name)]
    if missing:
        raise UnsupportedError(f"transformers {installed} has no {', '.join(missing)}, which PiKV hooks into; {_remedy()}")


@cache
def warn_if_untested(installed: str) -> None:
    """A warning, once per process, above the tested range."""
    if Version(installed) >= Version(BEYOND):  # its own previews too
        warnings.warn(
            f"transformers {installed} is newer than what PiKV was tested with; its hook points are all there. In doubt: {_remedy()}",
            stacklevel=4,
        )


def _remedy() -> str:
    return f"tested are {OLDEST} up to, and without, {BEYOND}: pip install 'transformers>={OLDEST},<{BEYOND}'"


def _there(where: str) -> ModuleType | type | None:
    owner, _, name = where.rpartition(".")
    try:
        return import_module(where)
    except ModuleNotFoundError:
        return getattr(import_module(owner), name, None) if owner else None
