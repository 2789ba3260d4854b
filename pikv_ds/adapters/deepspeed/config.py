"""Find the "pikv" block in what a caller hands to DeepSpeed, the way DeepSpeed itself reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import deepspeed

from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import ConfigError

BLOCK = "pikv"


def initialize_config(call: Mapping[str, Any]) -> dict | None:
    """The DeepSpeed configuration of an `initialize` call, from whichever argument holds it; None if none does."""
    user_args = call.get("args")
    sources = (
        call.get("config"),
        call.get("config_params"),
        getattr(user_args, "deepscale_config", None),
        getattr(user_args, "deepspeed_config", None),
    )
    source = next((source for source in sources if source is not None), None)
    # DeepSpeed's own reader: JSON, hjson, base64, with duplicate keys refused.
    return None if source is None else deepspeed.load_ds_config(source)


def inference_config(config: Any) -> Any:
    """The configuration of an `init_inference` call, a JSON file read; other types are left for DeepSpeed to judge."""
    if not isinstance(config, str):
        return config
    with open(config, encoding="utf-8") as file:
        return json.load(file)


def inference_block(config: Any, options: Mapping[str, Any]) -> dict:
    """{"pikv": block} from the configuration or the keyword arguments of `init_inference`; {} if neither has it."""
    in_config = isinstance(config, dict) and BLOCK in config
    if in_config and BLOCK in options and config[BLOCK] != options[BLOCK]:
        raise ConfigError(
            f"init_inference got two different {BLOCK!r} blocks: {config[BLOCK]!r} in config and "
            f"{options[BLOCK]!r} as an argument; keep one of them"
        )
    source = config if in_config else options
    return {BLOCK: source[BLOCK]} if BLOCK in source else {}


def without_block(mapping: Any) -> Any:
    """A copy without the block; what is not a dict is returned as it is."""
    return {key: value for key, value in mapping.items() if key != BLOCK} if isinstance(mapping, dict) else mapping


def nested(ds_config: Mapping[str, Any], block: str, key: str) -> Any:
    """ds_config[block][key]; None where either is missing. A block may be an object with attributes."""
    value = ds_config.get(block)
    return value.get(key) if isinstance(value, Mapping) else getattr(value, key, None)


def pikv_config(ds_config: Mapping[str, Any] | None) -> PiKVConfig | None:
    """The validated block if it is there and enabled, else None: then DeepSpeed is to run untouched."""
    if not isinstance(ds_config, Mapping):
        return None
    if BLOCK not in ds_config:
        _check_misspelt(ds_config)
        return None
    config = PiKVConfig.parse(ds_config[BLOCK])
    return config if config.enabled else None


def _check_misspelt(ds_config: Mapping[str, Any]) -> None:
    # DeepSpeed ignores unknown top-level keys, so a misspelt block would silently leave the cache dense.
    for key in ds_config:
        letters = "".join(char for char in str(key).lower() if char.isalpha())
        if sorted(letters) == sorted(BLOCK) or letters in ("pikvds", "pikvconfig"):
            raise ConfigError(
                f"the DeepSpeed configuration has the key {key!r} and no key {BLOCK!r}; rename it to {BLOCK!r}, DeepSpeed would ignore it"
            )
