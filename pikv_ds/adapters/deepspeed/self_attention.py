"""A self-attention module for DeepSpeed's inference v2 (FastGen) that keeps K and V in PiKV pages.

    pikv_ds.install()
    attention = DSSelfAttentionRegistry.instantiate_config(ConfigBundle(name="pikv", config=attention_config))

DeepSpeed's heuristics do not pick it: `instantiate_attention` in inference/v2/modules/heuristics.py always names
"dense_blocked_attention". A model implementation has to instantiate it as above, and give it pages (`new_kv_cache`) in the place of
DeepSpeed's BlockedKVCache. It runs on CPU and CUDA tensors; on a CUDA device it has not been run. Tested with DeepSpeed 0.19.8.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from deepspeed.inference.v2.inference_utils import DtypeEnum
from deepspeed.inference.v2.modules.configs import DSSelfAttentionConfig, MaskingType, PositionalEmbeddingType
from deepspeed.inference.v2.modules.interfaces import DSSelfAttentionBase
from deepspeed.inference.v2.ragged import RaggedBatchWrapper
from torch import Tensor

from pikv_ds import ops
from pikv_ds.errors import UnsupportedError
from pikv_ds.ops.format.formats import FORMATS

_RAW = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Tables(NamedTuple):
    """Where the tokens of a ragged batch of S sequences are: built once per forward, read by every layer."""

    block_table: Tensor  # [S, 1, max_pages] int32
    seqlens: Tensor  # [S, 1] int32, with the tokens of this forward
    slot_mapping: Tensor  # [num_tokens] int32
    positions: Tensor  # [num_tokens] int32
    runs: list[tuple[int, Tensor, Tensor]]  # (tokens per sequence T, sequences [R], their tokens [R, T])


class PiKVSelfAttention(DSSelfAttentionBase):
    """Writes the new keys and values with `ops.append`, then attends with `ops.decode`, or `ops.prefill_cached` for several tokens.

    implementation_config: {"format": name, "page_size": tokens}. The default format is the raw one of the input dtype; "fp8_e4m3" halves
    it. The integer formats are refused: they keep a raw tail per sequence, and a RaggedBatchWrapper does not say which sequence is which.
    """

    @staticmethod
    def name() -> str:
        return "pikv"

    @staticmethod
    def supports_config(config: DSSelfAttentionConfig) -> bool:
        """Causal attention in fp32, bf16 or fp16, without positional embedding or with rotary frequencies made here."""
        rotary, embedding = config.positional_embedding_config, PositionalEmbeddingType(config.positional_embedding_type)
        return (
            MaskingType(config.masking_type) == MaskingType.causal
            and DtypeEnum(config.input_dtype).value in _RAW
            and DtypeEnum(config.output_dtype).value in _RAW
            and embedding in (PositionalEmbeddingType.none, PositionalEmbeddingType.rotate_half)
            and not (rotary is not None and rotary.use_trained_freqs)
        )

    def __init__(self, config: DSSelfAttentionConfig, implementation_config: dict[str, Any]) -> None:
        super().__init__(config, implementation_config)
        name = implementation_config.get("format", _RAW[DtypeEnum(config.input_dtype).value])
        if name in FORMATS and FORMATS[name].levels:
            raise UnsupportedError(
                f"PiKV pages of format {name!r} keep a raw tail per sequence, for which DeepSpeed's ragged batch has no place; "
                "use 'fp8_e4m3', or the format of the input dtype"
            )
        page_size = implementation_config.get("page_size") or FORMATS[name].preferred_page_size
        self.page_format = ops.PageFormat(name, config.n_heads_kv, config.head_size, config.head_size, page_size)
        self._tables: Tables | None = None

    @property
    def kv_block_size(self) -> int:
        return self.page_format.page_size

    @property
    def q_block_size(self) -> int:
        return 1

    def new_kv_cache(self, num_blocks: int, device: torch.device | str | None = None) -> Tensor:
        """Pages of one layer, uint8 [num_blocks, record_bytes]: the kv_cache of `forward`."""
        return ops.new_pages(self.page_format, num_blocks, device)

    def build_atoms(self, ragged_batch: RaggedBatchWrapper) -> None:
        """Read the batch's sequences and block ids, once per forward and before it. Sync: reads the block ids to the host."""
        described = ragged_batch.inflight_seq_descriptors(on_device=False)[: ragged_batch.current_sequences].cpu()
        device = ragged_batch.inflight_seq_descriptors().device
        start, counts, seen = described[:, :3].long().unbind(1)
        lens, size = seen + counts, self.page_format.page_size
        pointers = ragged_batch.kv_ptrs(on_device=False)[: len(lens)].tolist()
        num_pages = (lens + size - 1) // size
        table = torch.zeros(len(lens), int(num_pages.max()), dtype=torch.int64)
        for row, (pointer, used) in enumerate(zip(pointers, num_pages.tolist(), strict=True)):
            table[row, :used] = _ids_at(pointer, used, device)
        sequence = torch.repeat_interleave(torch.arange(len(lens)), counts)
        positions = torch.arange(len(sequence)) - start[sequence] + seen[sequence]
        slots = table[sequence, positions // size] * size + positions % size
        runs = []
        for count in counts.unique().tolist():
            chosen = (counts == count).nonzero().flatten()
            runs.append((count, chosen.to(device), (start[chosen, None] + torch.arange(count)).to(device)))
        table, lens, slots, positions = (x.int().to(device) for x in (table.unsqueeze(1), lens.unsqueeze(1), slots, positions))
        self._tables = Tables(table, lens, slots, positions, runs)

    def forward(self, q_k_v: Tensor, kv_cache: Tensor, batch: RaggedBatchWrapper, inv_freqs: Tensor | None = None) -> Tensor:
        """Store and attend.

        Args:
            q_k_v: [num_tokens, (n_heads_q + 2 * n_heads_kv) * head_size], tokens of a sequence next to each other. Rows beyond the
                batch's tokens (DeepSpeed's padding) are not read.
            kv_cache: pages of this layer, changed; see `new_kv_cache`.
            batch: not read; `build_atoms` has read it.

        Returns: [num_tokens, n_heads_q * head_size] in the output dtype, 0 in rows of padding.
        """
        config, tables = self._config, self._tables
        if inv_freqs is not None:
            raise UnsupportedError("PiKV's attention makes its rotary frequencies itself; leave inv_freqs out")
        heads = [config.n_heads_q, config.n_heads_kv, config.n_heads_kv]
        num_tokens = len(tables.positions)
        q, k, v = q_k_v[:num_tokens].view(num_tokens, sum(heads), config.head_size).split(heads, 1)
        if PositionalEmbeddingType(config.positional_embedding_type) == PositionalEmbeddingType.rotate_half:
            q, k = self._rotate(q, tables.positions), self._rotate(k, tables.positions)
        q, fmt, scale = q.contiguous(), self.page_format, config.scale_factor
        ops.append(kv_cache, fmt, k.contiguous(), v.contiguous(), tables.positions, tables.slot_mapping)
        out = q.new_zeros(len(q_k_v), *q.shape[1:], dtype=torch.float32)
        for count, sequences, tokens in tables.runs:
            table, seqlens = tables.block_table[sequences], tables.seqlens[sequences]
            if count == 1:
                found, _, _ = ops.decode(q[tokens[:, 0]], kv_cache, fmt, table, seqlens, scale=scale)
                out[tokens[:, 0]] = found
            else:
                asked = tables.positions[tokens]
                out[tokens], _ = ops.prefill_cached(q[tokens], kv_cache, fmt, table, seqlens, asked, scale=scale, causal=True)
        return out.flatten(1).to(DtypeEnum(config.output_dtype).value)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotary embedding of the first rotate_dim columns of x [num_tokens, heads, head_size], halves paired."""
        rotary = self._config.positional_embedding_config
        dim = rotary.rotate_dim or self._config.head_size
        frequency = rotary.theta_base ** (-torch.arange(0, dim, 2, device=x.device) / dim)
        angle = (positions.unsqueeze(-1) * frequency).unsqueeze(1)
        first, second, rest = x.float().split([dim // 2, dim // 2, x.shape[-1] - dim], -1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1).to(x.dtype)


class _DeviceIds:
    """int32 numbers at an address of a CUDA device, in the words of the CUDA array interface."""

    def __init__(self, pointer: int, count: int) -> None:
        self.__cuda_array_interface__ = {"data": (pointer, True), "shape": (count,), "typestr": "<i4", "version": 3}


def _ids_at(pointer: int, count: int, device: torch.device) -> Tensor:
    """DeepSpeed hands block ids over as the address of an int32 list: [count] int64 on the host."""
    if device.type == "cpu":
        return torch.frombuffer((ctypes.c_int32 * count).from_address(pointer), dtype=torch.int32).long()
    return torch.as_tensor(_DeviceIds(pointer, count), device=device).cpu().long()
