"""A Megatron-Core model that transformers' generate() can run: its stopping, sampling and logits processors, Megatron's forwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import GENERATION_CONFIG_NAME

from pikv_ds.adapters.hf.argument_names import IN_GENERATE
from pikv_ds.errors import UnsupportedError

from .backend import Session


class Group(NamedTuple):
    """Rows of a batch that have as many columns of padding on the left, and the session that holds them without it."""

    rows: list[int]
    padding: int
    session: Session


class GroupedCache(Cache):
    """The sessions of a batch. Rows are not moved and tokens not taken back: beams and drafts are refused by name."""

    def __init__(self, groups: list[Group]) -> None:
        super().__init__(layers=[])
        self.groups, self.columns = groups, 0  # columns fed so far, padding included

    def feed(self, ids: Tensor) -> Tensor:
        """ids [B, T] int64, the next columns of all rows -> logits [B, T, V] f32, zeros where a row is padding."""
        if len(ids) != sum(len(group.rows) for group in self.groups):
            self._refuse("more rows than prompts (num_beams, num_return_sequences)")
        logits, columns = None, ids.shape[1]
        for rows, padding, session in self.groups:
            hidden = min(max(padding - self.columns, 0), columns)
            if hidden == columns:
                continue
            found = session.feed(ids[rows, hidden:])
            logits = found.new_zeros(*ids.shape, found.shape[-1]) if logits is None else logits
            logits[rows, hidden:] = found
        self.columns += columns
        return logits

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def _refuse_rows(self, *args: Any, **kwargs: Any) -> None:
        self._refuse("moving rows (beams, contrastive decoding)")

    reorder_cache = batch_repeat_interleave = batch_select_indices = _refuse_rows

    def _refuse_crop(self, *args: Any, **kwargs: Any) -> None:
        self._refuse("taking tokens back (assisted decoding, prompt_lookup_num_tokens)")

    crop = activate_past_recording = _refuse_crop

    def _refuse(self, option: str) -> None:
        raise UnsupportedError(
            f"{option}: a generation under Megatron keeps one row per prompt and every token; leave the option out, or use pikv_ds"
        )


class MegatronCausalLM(PreTrainedModel, GenerationMixin):
    """Holds the Megatron model beside its own modules: there is nothing here to save, tie or move."""

    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, model: nn.Module, folder: str) -> None:
        """folder: where config.json and generation_config.json of the same weights are."""
        super().__init__(AutoConfig.from_pretrained(folder, local_files_only=True))
        if (Path(folder) / GENERATION_CONFIG_NAME).is_file():
            self.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        parameters = list(model.parameters())
        self._device, self._dtype = parameters[0].device, parameters[0].dtype
        self._count = sum(parameter.numel() for parameter in parameters)

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def num_parameters(self, *args: Any, **kwargs: Any) -> int:
        """Of this rank."""
        return self._count

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Tied, or not, when the Megatron model was built."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: GroupedCache | None = None,
        past_key_values: GroupedCache | None = None,
        use_cache: bool = True,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast:
        """The next columns of the rows that the cache holds. The mask is not read: the cache knows the padding.

        cache, past_key_values: two names of one argument; generate() of transformers before 5.24 gives the second.
        """
        cache = past_key_values if cache is None else cache
        if cache is None:
            raise UnsupportedError(
                "a forward without the cache of its generation (guidance_scale?): under Megatron tokens are fed to sessions only; "
                "leave the option out, or use the model pikv_ds"
            )
        return CausalLMOutputWithPast(logits=cache.feed(input_ids), **{IN_GENERATE: cache})
