"""How many entries each request may keep in each layer. Host arithmetic on plain numbers."""

from __future__ import annotations

from math import ceil

from pikv_ds.config.scheduling import SchedulingConfig
from pikv_ds.errors import ConfigError

PYRAMID_BETA = 20  # PyramidKV (arXiv 2406.02069, section 4.2): the last layer has 1 / beta of the mean


class Budgets:
    """Entries per (layer, request), from the "scheduling" block. L full-attention layers; layers with a window keep what it shows."""

    def __init__(self, config: SchedulingConfig, num_layers: int, page_size: int, num_shards: int, entry_bytes: float) -> None:
        """entry_bytes: bytes of one entry in all L layers together, what is kept per page included."""
        self.config, self.num_layers = config, num_layers
        self.least = least_entries(config.sink_tokens, config.recent_tokens, page_size, num_shards)
        self.fixed = config.budget_tokens
        if config.budget_bytes is not None:
            self.fixed = int(config.budget_bytes / entry_bytes)
        if self.fixed is not None and self.fixed < self.least:
            key, unit = ("budget_tokens", 1) if config.budget_bytes is None else ("budget_bytes", entry_bytes)
            raise ConfigError(
                f"pikv.scheduling.{key} = {getattr(config, key)}: legal is >= {ceil(self.least * unit)} with page_size {page_size} and "
                f"{num_shards} shards: room for the pages that can hold sink_tokens = {config.sink_tokens}, recent_tokens = "
                f"{config.recent_tokens} and what is being filled; lower these or the page size, or raise the budget"
            )

    def of(self, length: int) -> list[int]:
        """[L] entries that a request of `length` tokens may keep. A ratio never asks for less than what is always kept."""
        mean = self.fixed if self.fixed is not None else max(self.least, ceil(self.config.budget_ratio * length))
        if self.config.layer_budget == "uniform" or self.num_layers == 1:
            return [mean] * self.num_layers
        return pyramid(mean, self.least, self.num_layers)


def least_entries(sink_tokens: int, recent_tokens: int, page_size: int, num_shards: int) -> int:
    """The most entries that pinned pages of one request and layer can hold, wherever the shards put them."""
    beside = page_size - 1  # entries that share a page with a pinned one
    return sink_tokens + min(sink_tokens, num_shards) * beside + recent_tokens + num_shards * beside


def pyramid(mean: int, least: int, num_layers: int) -> list[int]:
    """Budgets that fall linearly from the first to the last layer and sum to at most num_layers * mean, none below `least`."""
    room = mean - least
    lowest = room / PYRAMID_BETA
    step = 2 * (room - lowest) / (num_layers - 1)
    return [least + int(2 * room - lowest - layer * step) for layer in range(num_layers)]
