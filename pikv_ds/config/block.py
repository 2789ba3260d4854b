"""What all blocks of the "pikv" configuration have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Block(BaseModel):
    # strict: "32" is not a number and true is not 1; a typo in JSON must not be guessed at.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)
