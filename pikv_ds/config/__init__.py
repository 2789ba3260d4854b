"""The "pikv" block: keys, ranges, checks of one block. Knows pydantic, no method and no torch."""

from pikv_ds.moved import moved

from .offload import OffloadConfig
from .pikv import PiKVConfig
from .storage import MonitorConfig, StorageConfig

__all__ = ["MonitorConfig", "OffloadConfig", "PiKVConfig", "StorageConfig"]

__getattr__ = moved(
    __name__,
    {
        "Block": "pikv_ds.config.block",
        "CompressionConfig": "pikv_ds.config.compression",
        "ConfigError": "pikv_ds.errors",
        "PRESETS": "pikv_ds.config.presets",
        "RoutingConfig": "pikv_ds.config.routing",
        "SchedulingConfig": "pikv_ds.config.scheduling",
        "check_companion": "pikv_ds.config.checks",
        "check_table": "pikv_ds.config.checks",
        "describe": "pikv_ds.config.wording",
        "expand": "pikv_ds.config.presets",
        "problem": "pikv_ds.config.wording",
    },
)
