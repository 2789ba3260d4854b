"""Scripts that make Megatron-Core's own inference contexts get PiKV's, without an edit: install(config) once, before they do.

A script makes its context before, or without, naming the model it is for; the model and the context meet in the inference wrapper, or in
the engine. That is where the model is enabled and the context learns of it.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable
from functools import wraps

from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
from megatron.core.inference.model_inference_wrappers.abstract_model_inference_wrapper import AbstractModelInferenceWrapper
from torch import nn

from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import ConfigError, UnsupportedError

from .base_context import PiKVContext
from .context import PiKVInferenceContext
from .dynamic_context import PiKVDynamicInferenceContext
from .enable import disable_pikv, enable_pikv
from .layers import find_layers
from .patches import Patch, Patches
from .penalty import RouterPenalty
from .refusals import refuse_config
from .subclass import is_pikv
from .version import check_feature

_patches = Patches()
_one_at_a_time = threading.RLock()
_asked: tuple[PiKVConfig, RouterPenalty | None] | None = None
_enabled: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # by install, so uninstall() disables them


def install(config=None, *, router_penalty: RouterPenalty | None = None) -> bool:
    """Until uninstall(), StaticInferenceContext(...) and DynamicInferenceContext(...) make PiKV contexts, also where a script has bound the
    names already, and inference wrappers and engines enable their model for PiKV. Idle expert-parallel ranks need no serving().

    Args:
        config: the "pikv" block: PiKVConfig, dict, JSON path, or None for the defaults.
        router_penalty: as in enable_pikv.

    Returns: False, and changes nothing, when the same is installed already. Local: every rank calls it.

    Raises:
        ConfigError: something else is installed, or a "pikv" block that is not legal here.
        UnsupportedError: a Megatron-Core version that PiKV can't hook into.
    """
    global _asked
    check_feature("attention and routing")
    config = PiKVConfig.parse(config)
    refuse_config(config)
    with _one_at_a_time:
        if _patches.in_place:
            if (config, router_penalty) != _asked:
                raise ConfigError("install() was called before, with another configuration; call uninstall() first")
            return False
        _asked = (config, router_penalty)
        _patches.put(patches())
    return True


def uninstall() -> bool:
    """Every name, and every model that install() enabled, is the host's again. Returns False when nothing was installed.

    Raises: RuntimeError, and changes nothing, where somebody has replaced one of these names after install().
    """
    global _asked
    with _one_at_a_time:
        if not _patches.in_place:
            return False
        _patches.take_back()
        _asked = None
        for model in list(_enabled):
            disable_pikv(model)
        _enabled.clear()
    return True


def patches() -> list[Patch]:
    """Everything install() replaces."""
    wrapper = AbstractModelInferenceWrapper
    found = [
        Patch(StaticInferenceContext, "__init__", _makes(StaticInferenceContext, PiKVInferenceContext), "scripts name the host's class"),
        Patch(DynamicInferenceContext, "__init__", _makes(DynamicInferenceContext, PiKVDynamicInferenceContext), "as the static one"),
        Patch(wrapper, "__init__", _meets_in_wrapper(wrapper.__init__), "model and context meet here"),
        Patch(DynamicInferenceEngine, "__init__", _meets_in_engine(DynamicInferenceEngine.__init__), "or here"),
    ]
    if hasattr(wrapper, "dummy_forward"):
        found.append(Patch(wrapper, "dummy_forward", _joins(wrapper.dummy_forward), "a rank without requests joins the others"))
    return found


def _makes(host: type, pikv: type) -> Callable:
    original = host.__init__

    @wraps(original)
    def __init__(self, *args, **kwargs) -> None:
        if type(self) is not host:
            original(self, *args, **kwargs)
            return
        self.__class__ = pikv
        pikv.__init__(self, *args, **kwargs)

    return __init__


def _meets_in_wrapper(original: Callable) -> Callable:
    @wraps(original)
    def __init__(self, *args, **kwargs) -> None:
        original(self, *args, **kwargs)
        _introduce(self.model, self.inference_context)

    return __init__


def _meets_in_engine(original: Callable) -> Callable:
    @wraps(original)
    def __init__(self, controller, context, *args, **kwargs) -> None:
        _introduce(controller.inference_wrapped_model.model, context)
        original(self, controller, context, *args, **kwargs)

    return __init__


def _joins(original: Callable) -> Callable:
    @wraps(original)
    def dummy_forward(self, *args, **kwargs):
        context = self.inference_context
        with context.serving() if isinstance(context, PiKVContext) else contextlib.nullcontext():
            return original(self, *args, **kwargs)

    return dummy_forward


def _introduce(model: nn.Module, context) -> None:
    if not isinstance(context, PiKVContext):
        raise UnsupportedError(
            f"the model is wrapped with a {type(context).__name__} while PiKV is installed: it was made before install(), or is a class of "
            f"its own, and would keep a dense cache; make it after install(), or call uninstall()"
        )
    if context.has_model:
        return
    if not is_pikv(find_layers(model)[0].attention):
        config, router_penalty = _asked
        enable_pikv(model, config, router_penalty=router_penalty)
        _enabled.add(model)
    context.bind(model)
