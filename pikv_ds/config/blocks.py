"""The blocks of the "pikv" configuration as data: what the rules of pikv_ds/blueprint and the cache read."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .block import Block
from .compression import CompressionConfig
from .offload import OffloadConfig
from .ops import OpsConfig
from .pools import PoolConfig
from .presets import PRESETS
from .routing import RoutingConfig
from .scheduling import SchedulingConfig
from .storage import MonitorConfig, StorageConfig


class Blocks(Block):
    preset: str | None = Field(
        None,
        description="Name of a configuration; replaced by its keys when the block is read, the keys given beside it override them.",
        json_schema_extra={"enum": [*PRESETS, None]},
    )
    enabled: bool = Field(True, description="false: nothing is patched and the host runs as without the block.")
    page_size: int | None = Field(None, ge=1, le=256, description="Tokens per page; null = the codec's preference.")
    timeout_s: float = Field(300, gt=0, allow_inf_nan=False, description="Longest wait for another rank, in seconds.")
    probe: Literal["auto", "always", "never"] = Field(
        "auto",
        description="When attached to a transformers model, run its attention on random hidden states, beside PiKV, and refuse what "
        "differs: always, never, or (auto) where a class is not transformers' own or a weight not ordinary (adapters, quantised).",
    )
    storage: StorageConfig = Field(StorageConfig(), description=StorageConfig.__doc__)
    routing: RoutingConfig = Field(RoutingConfig(), description=RoutingConfig.__doc__)
    compression: CompressionConfig = Field(CompressionConfig(), description=CompressionConfig.__doc__)
    scheduling: SchedulingConfig = Field(SchedulingConfig(), description=SchedulingConfig.__doc__)
    pools: tuple[PoolConfig, ...] = Field((), strict=False, description=PoolConfig.__doc__)
    offload: OffloadConfig = Field(OffloadConfig(), description=OffloadConfig.__doc__)
    ops: OpsConfig = Field(OpsConfig(), description=OpsConfig.__doc__)
    monitor: MonitorConfig = Field(MonitorConfig(), description=MonitorConfig.__doc__)
