"""The "pools" list: further pools of pages."""

from __future__ import annotations

from pydantic import Field

from .block import MethodBlock


class PoolConfig(MethodBlock):
    """A pool behind the one before. Other keys are the options of its kind."""

    method: str = Field(description="Kind of pool; other distributions bring them, see docs/CONTRIBUTING.md.")
