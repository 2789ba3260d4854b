"""Which rule refuses a case, asked of the code."""

from __future__ import annotations

from pathlib import Path

import torch

from pikv_ds.blueprint.blueprint import Blueprint
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import ConfigError

from .settings import EXPERTS, Case, blocks, layers_of


def refusal(case: Case, folder: Path) -> str | None:
    """The rule's name; None: a cache can be built. Touches no device memory."""
    try:
        config = PiKVConfig(**blocks(case, folder))
        Blueprint.of(config, layers_of(case), torch.float32, num_experts=EXPERTS)
    except ConfigError as error:
        assert isinstance(error.rule, str), f"refused, and no rule is named: {error}"
        return error.rule
    return None
