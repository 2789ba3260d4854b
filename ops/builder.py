"""The ops as DeepSpeed knows ops: PiKVOpBuilder, and register() to make DeepSpeed find it.

    pikv_ds.ops.register()
    get_accelerator().create_op_builder("PiKVOpBuilder").load().decode(...)

DeepSpeed looks builders up in a fixed list per accelerator, so register() wraps the two look-ups of the accelerator object and adds a row
to ds_report's table; unregister() puts everything back. pikv_ds.install(), an engine with the "pikv" block and `pikv report` call it.
Tested with DeepSpeed 0.19.8.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from types import ModuleType

NAME = "pikv"
BUILDER = "PiKVOpBuilder"
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


def prebuilt() -> bool:
    """Compiled at install (DS_BUILD_PIKV=1) from these sources for this torch."""
    from . import compile as building

    return building.prebuilt(building.cpu_library()).is_file()


def compiler() -> str | None:
    """The C++ compiler that would be used, or None."""
    from .compile import cpu_library

    command = cpu_library().compiler
    return command if shutil.which(command.split()[0]) else None


def load() -> ModuleType:
    """Build if needed, load, and return the module of the ops. Raises BuildError where DeepSpeed expects an error."""
    from . import load as loading

    loading.ensure("cpu")
    if loading.loaded()["cpu"] == "torch" and compiler() is None:
        raise RuntimeError("Unable to JIT load the pikv op: no C++ compiler; the plain torch version runs without this builder")
    return importlib.import_module(__package__)
