"""OPERATIONS: what may happen to a World. One operation, one file, one decorator; the machine takes all of them.

Demotion to another tier and copies of shards belong here once the cache has them: a file each, and what they change in checks.py.
"""

from importlib import import_module
from pkgutil import iter_modules

from .base import OPERATIONS

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["OPERATIONS"]
