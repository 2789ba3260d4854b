"""The "pikv" block: keys, ranges, checks of one block. Knows pydantic, no method and no torch."""

from pikv_ds.moved import moved

from .pikv import MonitorConfig, OffloadConfig, PiKVConfig
from .storage import StorageConfig

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
        "check_budget": "pikv_ds.config.checks",
        "check_companion": "pikv_ds.config.storage",
        "check_exchange": "pikv_ds.config.checks",
        "check_experts": "pikv_ds.config.checks",
        "check_host_penalty": "pikv_ds.config.checks",
        "check_method": "pikv_ds.config.checks",
        "check_pools": "pikv_ds.config.checks",
        "check_ready": "pikv_ds.config.checks",
        "check_retention": "pikv_ds.config.checks",
        "check_table": "pikv_ds.config.storage",
        "describe": "pikv_ds.config.wording",
        "expand": "pikv_ds.config.presets",
        "problem": "pikv_ds.config.wording",
    },
)
