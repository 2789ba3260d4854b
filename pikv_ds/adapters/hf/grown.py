"""Masks that generate() makes of those before: what they show is known without reading them."""

from __future__ import annotations

from weakref import ref

from torch import Tensor


class GrownMask:
    """Of one conversation: the mask that its last forward was given, and what generate() has appended to it since.

    transformers makes the mask of a decode step of the one before and columns of ones. That it is this mask, and has not been written to,
    is all that is asked: on a device, reading it would keep the host waiting in every step.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._met = self._made = _Kept(None)
        self._lens: list[int] = []

    def meets(self, mask: object) -> None:
        """The next forward has been given this mask, and it is understood."""
        self._met, self._made = _Kept(mask), _Kept(None)

    def ran(self, lens: list[int]) -> None:
        """It has run: rows hold so many tokens."""
        self._lens = list(lens)

    def grows(self, before: object, after: object) -> None:
        """generate() has appended columns of ones to a mask."""
        if self._met.is_still(before):
            self._made = _Kept(after)

    def shows(self, mask: Tensor, lens: list[int], rows: int, cached: int, columns: int) -> bool:
        """Whether all new columns of `mask` are known to be real tokens, and the cached ones to be as the cache has them."""
        return self._made.is_still(mask) and lens == self._lens and mask.shape == (rows, cached + columns)


class _Kept:
    """A tensor as it was; of anything else, such as a dict of masks, nothing is known. Who keeps it does not keep it alive."""

    def __init__(self, x: object) -> None:
        self._x, self._version = (ref(x), _version(x)) if isinstance(x, Tensor) else (None, 0)

    def is_still(self, x: object) -> bool:
        return isinstance(x, Tensor) and self._x is not None and self._x() is x and _version(x) == self._version


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version  # nobody counts writes to inference tensors
