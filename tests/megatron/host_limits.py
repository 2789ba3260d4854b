"""Settings that PiKV refuses by name, shown to be beyond the host too: Megatron-Core's local layers on CPU, over its own static cache."""

from unittest import mock

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
from megatron.core.models.T5 import T5Model
from megatron.core.models.T5.t5_spec import get_t5_decoder_with_local_block_spec, get_t5_encoder_with_local_block_spec

from pikv_ds.megatron_patch.refusals import HEADS_WAIT
from tests.dist.jobs.report import Report
from tests.megatron.hosts import engine_runs
from tests.megatron.models import VOCAB, causal_mask, local_spec, tiny_config, tiny_model
from tests.megatron.runs import decode, full_forward, refused, step

ROWS, LENGTH, PROMPT = 2, 12, 8


def check_host_limits(report: Report, ids: torch.Tensor) -> None:
    ids = ids[:ROWS, :LENGTH]
    with report.check("the host can't build it"):
        refused(AssertionError, "only supported by TEDotProductAttention", lambda: tiny_model(tiny_config(context_parallel_size=2)))
        split = tiny_config()
        split.sequence_parallel = True  # where there are no tensor-parallel ranks the configuration itself would refuse
        refused(AssertionError, "sequence parallel not supported", lambda: tiny_model(split))
        refused(AssertionError, "does not support cudagraphs", lambda: tiny_model(tiny_config(cuda_graph_impl="local")))
        refused(RuntimeError, "CUDA", torch.cuda.CUDAGraph)  # "dummy base class CUDAGraph", or no driver for a build with CUDA
    with report.check("the host can't decode with it"), engine_runs():
        refused(AssertionError, "flash_attn_with_kvcache", lambda: in_decode_mode(tiny_model(tiny_config(flash_decode=True)), ids))
        if not HEADS_WAIT:
            refused(RuntimeError, "must match", lambda: decode(with_token_heads(), StaticInferenceContext(ROWS, LENGTH), ids, [PROMPT]))
        refused(RuntimeError, "must match", lambda: with_positions_of_three_axes(ids))
        refused(RuntimeError, "must match", lambda: with_cross_attention(ids))
        core = tiny_model(tiny_config()).decoder.layers[0].self_attention.core_attention
        q, kv = torch.zeros(4, 1, 8, 8), torch.zeros(4, 1, 4, 8)
        refused(AssertionError, "Packed sequence", lambda: core(q, kv, kv, None, packed_seq_params=mock.Mock()))
        refused(AssertionError, "bias is not supported", lambda: core(q, kv, kv, None, attention_bias=q))
    with report.check("a window that looks ahead is no longer the model when tokens come one by one"):
        model = tiny_model(tiny_config(window_size=(4, 4)))
        full = full_forward(model, ids)
        cached = decode(model, StaticInferenceContext(ROWS, LENGTH), ids, [PROMPT])
        assert (cached[0] - full[:, PROMPT - 1]).abs().max() > 0.01 and (cached[-1] - full[:, -1]).abs().max() > 0.01


def in_decode_mode(model, ids: torch.Tensor) -> torch.Tensor:
    """A prompt, then a token in the mode that the engines switch to."""
    context = StaticInferenceContext(ROWS, LENGTH)
    decode(model, context, ids[:, :PROMPT], [PROMPT])
    context.enable_decode_mode()
    with torch.no_grad():
        return step(model, context, ids[:, PROMPT : PROMPT + 1])


def with_token_heads():
    config = tiny_config(mtp_num_layers=1)
    spec = local_spec(config)
    return tiny_model(config, spec, mtp_block_spec=get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False))


def with_positions_of_three_axes(ids: torch.Tensor) -> torch.Tensor:
    """M-RoPE: a prompt runs, the token after it does not."""
    model = tiny_model(tiny_config(mrope_section=[1, 1, 2]), position_embedding_type="mrope")
    context, at = StaticInferenceContext(ROWS, LENGTH), torch.arange(LENGTH).expand(3, ROWS, -1)
    with torch.no_grad():
        model(ids[:, :PROMPT], at[..., :PROMPT], causal_mask(PROMPT), inference_context=context, runtime_gather_output=True)
        context.increment_sequence_len_offset(PROMPT)
        return model(ids[:, PROMPT : PROMPT + 1], at[..., PROMPT : PROMPT + 1], None, inference_context=context, runtime_gather_output=True)


def with_cross_attention(ids: torch.Tensor) -> torch.Tensor:
    """An encoder-decoder: in a context keys of the encoder's output lie where those of the tokens do, under the same layer's number, so a
    prompt runs and the token after it does not. Megatron's T5InferenceWrapper passes no context."""
    dense = dict(num_moe_experts=None, moe_ffn_hidden_size=None, expert_model_parallel_size=1)
    config = tiny_config(**dense, num_query_groups=8, qk_layernorm=False, normalization="LayerNorm")
    specs = (get_t5_encoder_with_local_block_spec(config.num_layers), get_t5_decoder_with_local_block_spec(config.num_layers))
    model = T5Model(config, config, *specs, vocab_size=VOCAB, max_sequence_length=LENGTH, parallel_output=False).eval()
    context = StaticInferenceContext(ROWS, 4 * LENGTH)

    def forward(start: int, end: int) -> torch.Tensor:
        encoder, both = (torch.zeros(ROWS, 1, queries, LENGTH, dtype=torch.bool) for queries in (LENGTH, end - start))
        return model(ids, ids[:, start:end], encoder, causal_mask(end - start, start), both, inference_context=context)

    with torch.no_grad():
        forward(0, PROMPT)
        context.increment_sequence_len_offset(PROMPT)
        return forward(PROMPT, PROMPT + 1)
