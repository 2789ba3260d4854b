"""Turn a module of the host into a PiKV one by its class alone: no wrapper, so that no parameter, buffer or checkpoint key is renamed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps

from torch import nn

ClassMaker = Callable[[type], type]


def pikv_class(make: ClassMaker) -> ClassMaker:
    """Decorator of a function host class -> subclass of it; one subclass per host class, named after it.

    The host must be the only base: Python changes an instance's class only between classes of one layout, which a mixin may alter.
    """

    @cache
    @wraps(make)
    def made(host: type) -> type:
        subclass = make(host)
        subclass.__name__ = subclass.__qualname__ = f"PiKV{host.__name__}"
        subclass.pikv_host_class = host
        return subclass

    return made


def is_pikv_class(cls: type) -> bool:
    return hasattr(cls, "pikv_host_class")


def is_pikv(module: nn.Module) -> bool:
    return is_pikv_class(type(module))


def put_on(module: nn.Module, make: ClassMaker) -> None:
    if not is_pikv(module):
        module.__class__ = make(type(module))


def take_off(module: nn.Module) -> None:
    """The host's class again, and none of the attributes that PiKV left on the module."""
    if is_pikv(module):
        module.__class__ = type(module).pikv_host_class
        for name in [name for name in vars(module) if name.startswith("pikv_")]:
            delattr(module, name)
