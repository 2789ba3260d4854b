"""Names of the host that are replaced for a while: what stands there instead and why, put in place and taken back together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_MISSING = object()


@dataclass(frozen=True, slots=True)
class Patch:
    """One replaced name: `owner.name`, what stands there instead, and why it has to."""

    owner: Any
    name: str
    replacement: Any
    reason: str


class Patches:
    """Those of one feature: none of them in place, or all."""

    def __init__(self) -> None:
        self._originals: list[tuple[Any, str, Any]] = []

    @property
    def in_place(self) -> bool:
        return bool(self._originals)

    def put(self, patches: Iterable[Patch]) -> None:
        for patch in list(patches):  # all of them are known before the first name changes
            self._originals.append((patch.owner, patch.name, vars(patch.owner).get(patch.name, _MISSING)))
            setattr(patch.owner, patch.name, patch.replacement)

    def take_back(self) -> None:
        while self._originals:
            owner, name, original = self._originals.pop()
            if original is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
