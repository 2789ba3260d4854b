"""What all blocks of the "pikv" configuration have in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Block(BaseModel):
    # strict: "32" is not a number and true is not 1; a typo in JSON must not be guessed at.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)


class MethodBlock(Block):
    """A block that names a method. Keys that it does not declare are options of that method."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, validate_default=True)
    method: str

    @property
    def options(self) -> dict[str, Any]:
        return self.model_extra or {}
