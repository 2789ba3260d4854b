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
        self._originals: list[tuple[Patch, Any]] = []

    @property
    def in_place(self) -> bool:
        return bool(self._originals)

    def put(self, patches: Iterable[Patch]) -> None:
        for patch in list(patches):  # all of them are known before the first name changes
            self._originals.append((patch, vars(patch.owner).get(patch.name, _MISSING)))
            setattr(patch.owner, patch.name, patch.replacement)

    def take_back(self) -> None:
        """Raises: RuntimeError, and changes nothing, where somebody has replaced one of the names again, which would be lost."""
        for patch, _ in self._originals:
            current = vars(patch.owner).get(patch.name)
            if current is not patch.replacement:
                raise RuntimeError(
                    f"{patch.owner.__name__}.{patch.name} was replaced again after PiKV replaced it, by {current!r} of "
                    f"{getattr(current, '__module__', 'an unknown module')}; undo that first"
                )
        while self._originals:
            patch, original = self._originals.pop()
            if original is _MISSING:
                delattr(patch.owner, patch.name)
            else:
                setattr(patch.owner, patch.name, original)
