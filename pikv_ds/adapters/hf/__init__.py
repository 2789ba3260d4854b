"""Hugging Face transformers: `attach`, and the Cache that it returns."""

import transformers

from pikv_ds.moved import moved

from .versions import check_hook_points

check_hook_points(transformers.__version__)  # before what follows fails on a name that is not there

from .anatomy import find_attentions  # noqa: E402
from .attach import Cache, attach  # noqa: E402

__all__ = ["Cache", "attach", "find_attentions"]

__getattr__ = moved(
    __name__,
    {
        "ConfigError": "pikv_ds.errors",
        "ExpertIds": "pikv_ds.adapters.hf.expert_ids",
        "ForwardHooks": "pikv_ds.adapters.hf.forward_hooks",
        "GenerateHooks": "pikv_ds.adapters.hf.generate_hooks",
        "HFCache": "pikv_ds.adapters.hf.cache",
        "HostPenalty": "pikv_ds.adapters.hf.host_penalty",
        "PiKVCache": "pikv_ds.cache.cache",
        "PiKVConfig": "pikv_ds.config.pikv",
        "UnsupportedError": "pikv_ds.errors",
        "bindings": "pikv_ds.adapters.hf:binding",
        "check_calibration": "pikv_ds.adapters.hf.fingerprint",
        "check_gates": "pikv_ds.adapters.hf.router_output",
        "check_has_experts": "pikv_ds.blueprint.routing",
        "check_rotations": "pikv_ds.adapters.hf.rotation",
        "count_experts": "pikv_ds.adapters.hf.expert_ids",
        "count_gate_experts": "pikv_ds.adapters.hf.router_output:count_router_experts",
        "find_router": "pikv_ds.adapters.hf.router_output",
        "load_gate": "pikv_ds.adapters.hf.expert_ids",
        "pikv_attention": "pikv_ds.adapters.hf.attention",
        "pikv_mask": "pikv_ds.adapters.hf.masks",
        "read_model_spec": "pikv_ds.adapters.hf.model_spec",
    },
)
