"""Megatron-Core integration: PiKV in place of the dense KV cache. Importing this package patches and loads nothing.

enable_pikv(model, config) or pikv_layer_spec(spec, config), then PiKVInferenceContext(max_batch, max_length, model=model) instead of
StaticInferenceContext, or PiKVDynamicInferenceContext(model=model, ...) instead of DynamicInferenceContext; or install(config) once, for
scripts that make the host's own contexts. See docs/guide/megatron.md.
"""

from importlib import import_module

_PUBLIC = {
    "PiKVDynamicInferenceContext": "dynamic_context",
    "PiKVPackedContext": "packed_context",
    "PiKVInferenceContext": "context",
    "RouterPenalty": "penalty",
    "disable_pikv": "enable",
    "enable_pikv": "enable",
    "install": "drop_in",
    "pikv_layer_spec": "layer_spec",
    "uninstall": "drop_in",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(_PUBLIC)}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
