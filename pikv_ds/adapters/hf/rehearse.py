"""A rehearsal for the policy kvzip: the model reads its prompt a second time, and forgets that it did."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pikv_ds.errors import ConfigError

from .argument_names import cache_argument
from .cache import HFCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def rehearse(model: PreTrainedModel, cache: HFCache, ids: torch.Tensor, *, chunk: int = 32) -> None:
    """Feed `ids` [B, T] after the prompt that the cache holds, count only what these queries attend to, and crop them again.

    Give the prompt without its first token, and call this before the first decode step. Positions go on after the prompt, so prompt and
    repetition together must fit the model's range. Every row has T tokens; all ranks call it alike.
    Raises: ConfigError for another policy, or when the prompt has been evicted from already.
    """
    core = cache.core
    if "peak" not in core.page_columns:
        raise ConfigError("rehearse() needs pikv.scheduling.method = 'kvzip': no other policy scores by it")
    if core.config.scheduling.prefill != "keep":
        raise ConfigError("rehearse() needs pikv.scheduling.prefill = 'keep': a prompt that was evicted from can't be repeated")
    core.clear_column("peak")
    with core.announce_crops(rehearsal=True):
        for part in ids.split(chunk, 1):
            model(part, **cache_argument(model, cache), logits_to_keep=1)
        cache.crop(-ids.shape[1])
