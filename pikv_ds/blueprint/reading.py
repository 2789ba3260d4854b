"""What reading a "pikv" block asks: whether its methods combine, and their page size. Each call builds every method it needs once."""

from __future__ import annotations

from pikv_ds.config.blocks import Blocks

from .facts import Facts
from .methods import codec_of
from .rules import enforce


def check(config: Blocks) -> None:
    """Raises: ConfigError."""
    enforce(Facts.of(config), "block")


def page_size_of(config: Blocks) -> int:
    """Tokens per page: what the block says, or what the codec prefers."""
    return codec_of(config.compression).page_size(config.page_size)
