"""PiKV: an expert-sharded KV cache for Mixture-of-Experts models under DeepSpeed and Megatron-Core.

Importing this package loads no other library; each public name below is imported when it is first used.
"""

from importlib import import_module
from pathlib import Path

__version__ = "0.1.0"

# In a source checkout ops/, megatron_patch/ and launch/ lie beside this folder; setup.py maps them in when it installs.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "megatron_patch" / "__init__.py").is_file():
    __path__.append(str(_checkout))

_PUBLIC = {
    "PiKVConfig": "pikv_ds.config",
    "Cache": "pikv_ds.adapters.hf",
    "attach": "pikv_ds.adapters.hf",
    "initialize": "pikv_ds.adapters.deepspeed",
    "init_inference": "pikv_ds.adapters.deepspeed",
    "install": "pikv_ds.adapters.deepspeed",
    "uninstall": "pikv_ds.adapters.deepspeed",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'pikv_ds' has no attribute {name!r}; public names: {', '.join(_PUBLIC)}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
