"""The ops as DeepSpeed knows ops: PiKVOpBuilder, and register() to make DeepSpeed find it.

    pikv_ds.ops.register()
    get_accelerator().create_op_builder("PiKVOpBuilder").load().decode(...)

DeepSpeed looks builders up in a fixed list per accelerator, so register() wraps the two look-ups of the accelerator object and adds a row
to ds_report's table; unregister() puts everything back. pikv_ds.install(), an engine with the "pikv" block and `pikv report` call it.
Tested with DeepSpeed 0.19.8.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

NAME = "pikv"
BUILDER = "PiKVOpBuilder"
OPS = "pikv_ds.ops"  # what load() gives
_LOOKUPS = ("create_op_builder", "get_op_builder")


def builder_class() -> type:
    """PiKVOpBuilder; imports DeepSpeed."""
    return importlib.import_module(f"{__package__}.deepspeed_builder").PiKVOpBuilder


def register() -> None:
    """Make DeepSpeed's accelerator, ALL_OPS and installed_ops know the builder. Calling it again does nothing."""
    from deepspeed import git_version_info
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops.op_builder import all_ops

    accelerator = get_accelerator()
    if getattr(accelerator, "_pikv_registered", False):
        return
    ours = builder_class()
    create, get = (getattr(accelerator, name) for name in _LOOKUPS)
    accelerator.create_op_builder = lambda name: ours() if name == BUILDER else create(name)
    accelerator.get_op_builder = lambda name: ours if name == BUILDER else get(name)
    accelerator._pikv_registered = True
    all_ops.ALL_OPS[NAME] = ours()
    git_version_info.installed_ops[NAME] = prebuilt()


def unregister() -> None:
    """Undo register(); nothing of it is left. Calling it without register() does nothing."""
    if "deepspeed.ops.op_builder.all_ops" not in sys.modules:
        return
    from deepspeed import git_version_info
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops.op_builder import all_ops

    accelerator = get_accelerator()
    if not getattr(accelerator, "_pikv_registered", False):
        return
    for name in (*_LOOKUPS, "_pikv_registered"):
        delattr(accelerator, name)  # the instance attributes; the methods of the class show again
    all_ops.ALL_OPS.pop(NAME, None)
    git_version_info.installed_ops.pop(NAME, None)


def prebuilt(implementation: str = "cpu") -> bool:
    """Compiled at install (DS_BUILD_PIKV=1) from these sources for this torch. Only cpu and cuda are."""
    from .compile import cpu_library
    from .compile import prebuilt as place
    from .cuda_build import cuda_library

    library = {"cpu": cpu_library, "cuda": cuda_library}.get(implementation)
    return library is not None and place(library()).is_file()


def available(implementation: str) -> bool:
    """One of load.CHOICES is installed, or what builds it is here. Builds nothing; says nothing about a device."""
    return not missing(implementation)


def missing(implementation: str) -> str:
    """What would have to be installed for it; empty when nothing is missing."""
    from pikv_ds.ops.nvrtc import compiler as nvrtc

    from .compile import ToolMissing, compiler_version, cpu_library
    from .cuda_build import emu_library
    from .cuda_build import nvcc as cuda_compiler

    if implementation == "torch" or prebuilt(implementation):
        return ""
    needs = {
        "nvrtc": nvrtc.compiler,
        "cpu": lambda: compiler_version(cpu_library().compiler),
        "emu": lambda: compiler_version(emu_library().compiler),
        "cuda": lambda: compiler_version(cuda_compiler()),
    }
    try:
        needs[implementation]()
    except ToolMissing as absent:
        return str(absent)
    return ""


def load(device: str = "cpu") -> ModuleType:
    """Build if needed and load what serves tensors of `device`. Returns the module of the ops; raises where DeepSpeed expects an error."""
    from . import load as loading

    candidates = [name for name in loading.candidates(device) if name != "torch"]
    if loading.ensured(device) == "torch" and candidates and not any(available(name) for name in candidates):
        raise RuntimeError(
            f"Unable to JIT load the pikv op: nothing is here to build {' or '.join(candidates)} with; "
            f"the plain torch version runs without this builder"
        )
    return importlib.import_module(OPS)
