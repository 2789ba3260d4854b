"""What every op asks of its tensors first: that they are on one device. csrc/cpu/devices.h refuses the same with the same words."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps

from .checks import require

_NAME = re.compile(r"(\w+)$")


def one_device(op: str, schema: str, call: Callable) -> Callable:
    """`call` behind a look at where its tensors are. Tensors and lists of tensors come first in every schema.

    A kernel that is given a pointer of another device reads whatever lies there, and on CUDA the process loses its context. torch itself
    compares devices only inside its own ops, and sends a call to CUDA when any of its tensors is there.
    """
    names = [_NAME.search(part).group(1) for part in schema[1 : schema.index(") ->")].split(", ") if part.startswith("Tensor")]

    @wraps(call)
    def checked(*args):
        at, first = None, ""
        for name, given in zip(names, args, strict=False):
            if given is None:
                continue
            for x in given if isinstance(given, (list, tuple)) else (given,):
                if at is None:
                    at, first = x.device, name
                elif x.device != at:
                    require(False, f"{op}: {name} is on {x.device}, {first} on {at}; all tensors of a call must be on one device")
        return call(*args)

    return checked
