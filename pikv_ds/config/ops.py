"""The "ops" block: how the compiled ops compute."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .block import Block


class OpsConfig(Block):
    """How the compiled ops compute."""

    precision: Literal["high", "fast"] = Field(
        "high",
        description="high: an op adds less than 1e-4 to the error of its format. fast: CPU kernels may round queries and weights that meet "
        "integer pages to one byte, for speed; the errors are in docs/reference/formats.md. Other devices compute as with high.",
    )
    mixed_kernels: bool = Field(
        False,
        description="true: ranks may run different CPU kernels (docs/reference/formats.md), whose results differ in their last bits.",
    )
