"""A device that any machine has: `far`. Its tensors lie in host memory and are computed there, but are not the host's.

torch is told that they are on "meta", a device whose tensors go nowhere without a dispatch. So every op on them comes by here, and what
would go between host and device on a GPU is seen where it happens: reads, uploads, shapes that depend on values. What CUDA would refuse,
an op on tensors of both, is refused.

Why not another way: one device for both could not tell `.cpu()` from nothing at all, a backend under PrivateUse1 would need every op once
more, and marks on tensors would be lost by the first view.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from pikv_ds import staging
from pikv_ds.ops.build import load

FAR = torch.device("meta")
ROOT = Path(__file__).resolve().parents[2]
aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
SHAPES = {"nonzero", "masked_select", "bincount", "_unique2", "unique_dim", "unique_consecutive", "histc", "nonzero_numpy"}
"""Ops whose results are as long as values say: the host waits to know how long."""


class FarTensor(Tensor):
    """held: the same numbers, where they are computed."""

    held: Tensor
    is_meta = False  # it has numbers

    @staticmethod
    def __new__(cls, held: Tensor) -> FarTensor:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=FAR
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:
        return f"far {self.held!r}"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return Far()._run(function, args, dict(kwargs or {}))  # behind the device's back, as when a cache is given back at last


class Far(TorchDispatchMode):
    """While it is entered there is a device `far`, and `stops` counts what keeps the host waiting for it.

    stops: (kind, place) -> times; kinds are "read", "upload" (from memory that is not pinned, which waits as a read does) and "shape".
    queued: the same of copies that nobody waits for. waits: places where the host waits for such a copy of an earlier step; for one of
    this step it is a stop like others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stops: Counter[tuple[str, str]] = Counter()
        self.queued: Counter[tuple[str, str]] = Counter()
        self.waits: Counter[str] = Counter()
        self.step = 0
        self._pinned: WeakSet[torch.UntypedStorage] = WeakSet()

    def clear(self) -> None:
        self.stops.clear(), self.queued.clear(), self.waits.clear()

    def next_step(self) -> None:
        self.step += 1

    def total(self, kind: str | None = None) -> int:
        return sum(n for (found, _), n in self.stops.items() if kind in (None, found))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in PINNED:
            return PINNED[function](self, args[0])
        if _is_composite(function):  # inference mode hands them on whole
            with self:
                return function.decompose(*args, **(kwargs or {}))
        return self._run(function, args, dict(kwargs or {}))

    def _run(self, function, args: tuple, kwargs: dict):
        flat = tree_flatten((args, kwargs))[0]
        far = [x for x in flat if isinstance(x, FarTensor)]
        near = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, FarTensor)]
        device, result_is_far = kwargs.get("device"), bool(far)
        if device is not None:
            result_is_far = torch.device(device).type == FAR.type
            kwargs["device"] = torch.device("cpu")
        pin = kwargs.pop("pin_memory", False)
        self._note(function, args, kwargs, far, near, result_is_far)
        known = {id(x.held): x for x in far}
        held_args, held_kwargs = tree_map(_held, (args, kwargs))
        made = function(*held_args, **held_kwargs)
        if pin:
            self._pin(made)

        def wrapped(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if id(x) in known:
                return known[id(x)]
            return FarTensor(x) if result_is_far else x

        return tree_map(wrapped, made)

    def _note(self, function, args: tuple, kwargs: dict, far: list, near: list, result_is_far: bool) -> None:
        name = function._schema.name
        if function in (aten._to_copy.default, aten.copy_.default):
            to, source = (args[0], args[1]) if function is aten.copy_.default else (None, args[0])
            to_far, from_far = (result_is_far if to is None else isinstance(to, FarTensor)), isinstance(source, FarTensor)
            blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            if to_far and not from_far:
                # a number of the host's that is filled in is an argument of a kernel
                if source.dim() or function is aten._to_copy.default:
                    self._copy("upload", blocking or not self._is_pinned(source))
            elif from_far and not to_far:
                self._copy("read", blocking or not (to is None or self._is_pinned(to)))
            return
        if not far:
            return
        if function in READS:
            self._copy("read", True)
        elif name.removeprefix("aten::") in SHAPES or (name == "aten::repeat_interleave" and kwargs.get("output_size") is None):
            self._copy("shape", True)
        elif name in ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"):
            indices = [x for x in args[1] if x is not None]
            if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
                scalar = name != "aten::index" and args[2].numel() == 1 and not isinstance(args[2], FarTensor)
                if not scalar:  # else it is a masked_fill
                    self._copy("shape", True)
            if isinstance(args[0], FarTensor) and any(not isinstance(x, FarTensor) for x in indices):
                self._copy("upload", True)
        elif any(x.dim() for x in near) and not name.startswith("c10d::"):
            raise RuntimeError(f"{function} of tensors on the device and tensors of the host ({_place()})")

    def _copy(self, kind: str, stops: bool) -> None:
        (self.stops if stops else self.queued)[kind, _place()] += 1

    def _pin(self, x: Tensor) -> Tensor:
        self._pinned.add(x.untyped_storage())
        return x

    def _is_pinned(self, x: Tensor) -> bool:
        return x.untyped_storage() in self._pinned

    # ---- what goes by without a dispatch -------------------------------------------------------------------------------------

    @contextmanager
    def entered(self, patch: pytest.MonkeyPatch) -> Iterator[Far]:
        """As `with self`; torch.tensor, which asks nobody on "meta", and the events of `staging` as well."""
        plain = torch.tensor

        def tensor(data, *, dtype=None, device=None, pin_memory=False, requires_grad=False):
            made = plain(data, dtype=dtype, device="cpu", requires_grad=requires_grad)
            if pin_memory:
                self._pin(made)
            return made.to(device) if device is not None and torch.device(device).type == FAR.type else made

        patch.setattr(torch, "tensor", tensor)
        patch.setattr(staging, "_marked", lambda device: _Mark(self))
        patch.setitem(load._loaded, FAR.type, load.ensured("cpu"))
        with self:
            yield self


PINNED = {
    aten.is_pinned.default: lambda far, x: far._is_pinned(x),
    aten._pin_memory.default: lambda far, x: far._pin(x.clone()),
    aten.pin_memory.default: lambda far, x: far._pin(x.clone()),
}


class _Mark:
    """A place in the device's queue. Far tensors are there at once, so it is reached when somebody waits for it."""

    def __init__(self, far: Far) -> None:
        self.far, self.step = far, far.step

    def synchronize(self) -> None:
        if self.step == self.far.step:
            self.far._copy("read", True)
        else:
            self.far.waits[_place()] += 1


def _is_composite(function) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd")


def _held(x: Any) -> Any:
    return x.held if isinstance(x, FarTensor) else x


def _place() -> str:
    """The line that asked: the innermost one that is neither torch's nor of these tests."""
    for frame in reversed(traceback.extract_stack()):
        path = frame.filename
        if "/torch/" in path or path.startswith(str(ROOT / "tests" / "device")):
            continue
        short = path.removeprefix(f"{ROOT}/")
        if "site-packages/" in short:
            short = short.split("site-packages/")[1]
        if short.startswith(("<", "pikv_ds/modes.py", "pikv_ds/staging.py")) or "functools.py" in short:
            continue
        return f"{short}:{frame.lineno} {frame.name}"
    return "nowhere"


def to_far(module: torch.nn.Module) -> torch.nn.Module:
    """Its parameters and buffers lie far away, in place. Call it with the device entered."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(FarTensor(parameter.detach()), requires_grad=False)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = FarTensor(buffer)
    return module
