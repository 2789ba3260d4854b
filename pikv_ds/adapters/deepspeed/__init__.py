"""DeepSpeed: `initialize`, `init_inference`, `install`."""

from pikv_ds.moved import moved

from .initialize import init_inference, initialize, install, uninstall

__all__ = ["init_inference", "initialize", "install", "uninstall"]

__getattr__ = moved(
    __name__,
    {
        "MonitorWriter": "pikv_ds.adapters.deepspeed.monitor",
        "PiKVConfig": "pikv_ds.config.pikv",
        "all_ranks": "pikv_ds.adapters.deepspeed.groups",
        "attach": "pikv_ds.adapters.hf.attach",
        "check_expert_parallel": "pikv_ds.adapters.deepspeed.autoep",
        "check_inference": "pikv_ds.adapters.deepspeed.refusals",
        "check_initialize": "pikv_ds.adapters.deepspeed.refusals",
        "check_model": "pikv_ds.adapters.deepspeed.refusals",
        "check_moe_layers": "pikv_ds.adapters.deepspeed.moe",
        "expert_group_members": "pikv_ds.adapters.deepspeed.autoep",
        "host_function": "pikv_ds.adapters.deepspeed.install",
        "inference_block": "pikv_ds.adapters.deepspeed.config",
        "inference_config": "pikv_ds.adapters.deepspeed.config",
        "initialize_config": "pikv_ds.adapters.deepspeed.config",
        "moe_group_members": "pikv_ds.adapters.deepspeed.moe",
        "open_groups": "pikv_ds.adapters.deepspeed.moe",
        "own_group": "pikv_ds.adapters.deepspeed.groups",
        "pikv_config": "pikv_ds.adapters.deepspeed.config",
        "register": "pikv_ds.adapters.deepspeed.register",
        "registry_shim": "pikv_ds.adapters.deepspeed.autoep_shim",
        "replace": "pikv_ds.adapters.deepspeed.install",
        "restore": "pikv_ds.adapters.deepspeed.install",
        "unregister": "pikv_ds.adapters.deepspeed.register",
        "without_block": "pikv_ds.adapters.deepspeed.config",
    },
)
