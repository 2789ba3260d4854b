"""The "pikv" module of DeepSpeed's inference v2: instantiated by name, run on CPU over DeepSpeed's own ragged batch, against SDPA."""

import pytest
import torch
from deepspeed.inference.v2.inference_utils import DtypeEnum
from deepspeed.inference.v2.modules import ConfigBundle
from deepspeed.inference.v2.modules.configs import DSSelfAttentionConfig, MaskingType, PositionalEmbeddingType, RotateHalfConfig
from deepspeed.inference.v2.modules.interfaces import DSSelfAttentionRegistry
from deepspeed.inference.v2.ragged import DSSequenceDescriptor, DSStateManagerConfig, RaggedBatchWrapper
from torch.nn.functional import scaled_dot_product_attention as sdpa

import pikv_ds
from pikv_ds.errors import UnsupportedError

HQ, HKV, D = 8, 2, 32


class CpuBatch(RaggedBatchWrapper):
    """DeepSpeed's ragged batch; only its buffers are allocated here, since its own allocator has no CPU version."""

    def __init__(self, tokens=256, sequences=8):
        self._config = DSStateManagerConfig(max_ragged_batch_size=tokens, max_ragged_sequence_count=sequences, max_context=256)
        for name, shape, dtype in (
            ("_input_ids", (tokens,), torch.int64), ("_batch_metadata_storage", (2,), torch.int32),
            ("_token_to_seq_storage", (tokens,), torch.int32), ("_inflight_seq_descriptors", (sequences, 4), torch.int32),
            ("_kv_ptrs", (sequences,), torch.int64),
        ):  # fmt: skip
            setattr(self, name, torch.zeros(shape, dtype=dtype))
            setattr(self, f"{name}_shadow", torch.zeros(shape, dtype=dtype))
        self._is_padded = False
        self.clear()


class Sequence:
    """A sequence of DeepSpeed's, and all of its queries, keys and values so far."""

    def __init__(self, number):
        self.ids = torch.full((1, 16), -1, dtype=torch.int32)
        self.descriptor = DSSequenceDescriptor(number, (self.ids,), (self.ids.clone(),))
        self.q_k_v = torch.empty(0, HQ + 2 * HKV, D)


@pytest.fixture(autouse=True)
def installed():
    assert "pikv" not in DSSelfAttentionRegistry.registry
    pikv_ds.install()
    yield
    pikv_ds.uninstall()
    assert "pikv" not in DSSelfAttentionRegistry.registry


def config_for(dtype=torch.float32, **changes):
    given = {"max_tokens": 256, "n_heads_q": HQ, "n_heads_kv": HKV, "head_size": D, "max_sequences": 8, "scale_factor": D**-0.5,
             "input_dtype": DtypeEnum(dtype), "output_dtype": DtypeEnum(dtype)}  # fmt: skip
    return DSSelfAttentionConfig(**given | changes)


def instantiate(config, **implementation):
    return DSSelfAttentionRegistry.instantiate_config(ConfigBundle(name="pikv", config=config, implementation_config=implementation))


def expected(sequence, count, rotate=lambda x: x):
    """Dense causal attention of the last `count` tokens."""
    q, k, v = sequence.q_k_v.transpose(0, 1).split([HQ, HKV, HKV])
    mask = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()
    out = sdpa(rotate(q)[None], rotate(k)[None], v[None], attn_mask=mask, enable_gqa=True)[0]
    return out[:, -count:].transpose(0, 1).flatten(1)


def forwards(attention, steps, num_blocks=24, dtype=torch.float32, rotate=lambda x: x, padding=0):
    """Each step names the sequences of a ragged batch and their new tokens. Yields what the module says and what SDPA says."""
    generator = torch.Generator().manual_seed(0)
    pages, free = attention.new_kv_cache(num_blocks), torch.randperm(num_blocks, generator=generator).int().tolist()
    sequences, batch = {}, CpuBatch()
    for step in steps:
        batch.clear()
        given = []
        for name, count in step.items():
            sequence = sequences.setdefault(name, Sequence(len(sequences)))
            needed = -(-(sequence.descriptor.seen_tokens + count) // attention.kv_block_size) - sequence.descriptor.cur_allocated_blocks
            sequence.descriptor.extend_kv_cache(torch.tensor([free.pop() for _ in range(needed)], dtype=torch.int32))
            sequence.descriptor.pre_forward(count)
            batch.insert_sequence(sequence.descriptor, torch.zeros(count, dtype=torch.int64))
            new = torch.randn(count, HQ + 2 * HKV, D, generator=generator).to(dtype).float()
            sequence.q_k_v = torch.cat([sequence.q_k_v, new])
            given.append(new.flatten(1))
        batch.finalize()
        attention.build_atoms(batch)
        rows = torch.cat([*given, torch.full((padding, given[0].shape[1]), torch.nan)]).to(dtype)
        out = attention(rows, pages, batch)
        for name in step:
            sequences[name].descriptor.post_forward()
        assert out.dtype == dtype and not out[len(out) - padding :].any()
        yield out[: len(out) - padding].float(), torch.cat([expected(sequences[name], n, rotate) for name, n in step.items()])


STEPS = ({"a": 20, "b": 3}, {"c": 17, "a": 1}, {"a": 1, "b": 1, "c": 1}, {"b": 5, "c": 5, "a": 40})


@pytest.mark.parametrize("padding", [0, 7])
def test_against_sdpa(padding):
    attention = instantiate(config_for(), page_size=16)
    assert attention.name() == "pikv" and attention.kv_block_size == 16
    for found, dense in forwards(attention, STEPS, padding=padding):
        torch.testing.assert_close(found, dense, rtol=1e-5, atol=1e-5)


def test_rotary_embedding():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    embedding = LlamaRotaryEmbedding(LlamaConfig(hidden_size=HQ * D, num_attention_heads=HQ, rope_theta=1e4))

    def rotate(x):  # [H, L, D]
        cos, sin = embedding(x[None], torch.arange(x.shape[1])[None])
        return apply_rotary_pos_emb(x[None], x[None], cos, sin)[0][0]

    rotary = {"positional_embedding_type": PositionalEmbeddingType.rotate_half, "positional_embedding_config": RotateHalfConfig()}
    for found, dense in forwards(instantiate(config_for(**rotary)), STEPS, rotate=rotate):
        torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "format_name", "tolerance"), [(torch.bfloat16, "bf16", 5e-3), (torch.float32, "fp8_e4m3", 0.08)])
def test_other_formats(dtype, format_name, tolerance):
    for found, dense in forwards(instantiate(config_for(dtype), format=format_name), STEPS, dtype=dtype):
        error = ((found - dense).norm() / dense.norm()).item()
        print(f"{format_name}: {error:.1e}")
        assert error <= tolerance


def test_deepspeeds_heuristics_do_not_pick_it(monkeypatch):
    """What the docs say: instantiate_attention asks for DeepSpeed's own module by name."""
    from deepspeed.inference.v2.modules import heuristics

    asked = []
    monkeypatch.setattr(DSSelfAttentionRegistry, "instantiate_config", lambda bundle: asked.append(bundle.name))
    heuristics.instantiate_attention(config_for(), None)
    assert asked == ["dense_blocked_attention"]


@pytest.mark.parametrize(
    "changes",
    [
        {"masking_type": MaskingType.local},
        {"positional_embedding_type": PositionalEmbeddingType.alibi},
        {"positional_embedding_config": RotateHalfConfig(use_trained_freqs=True)},
        {"input_dtype": DtypeEnum.int8},
    ],
)
def test_what_it_cannot_do_is_not_supported(changes):
    with pytest.raises(ValueError, match="is not supported by"):
        instantiate(config_for(**changes))


def test_formats_with_a_tail_are_refused():
    with pytest.raises(UnsupportedError, match="'int4' keep a raw tail per sequence"):
        instantiate(config_for(), format="int4")
