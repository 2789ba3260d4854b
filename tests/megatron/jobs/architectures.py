"""Models of many kinds, each written out by hand, saved, and built again from their arguments. Arguments: folder, layout, kinds..."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig

from pikv_ds.megatron_patch import PiKVInferenceContext, cpu_compat, enable_pikv
from pikv_ds.megatron_patch.args_config import read_architecture
from pikv_ds.megatron_patch.checkpoint import load_checkpoint
from pikv_ds.megatron_patch.checkpoint_folder import checkpoint_args
from tests.dist.jobs.report import Report
from tests.megatron import megatron_lm
from tests.megatron.jobs.key_layouts import draw
from tests.megatron.models import latent_config, local_spec, start, tiny_config, tokens
from tests.megatron.runs import decode, full_forward

LENGTH = 24
DENSE = dict(num_experts=None, num_query_groups=None, group_query_attention=False, qk_layernorm=False)
LATENT = dict(
    q_lora_rank=24, kv_lora_rank=16, qk_head_dim=8, qk_pos_emb_head_dim=8, v_head_dim=12, rope_type="rope", multi_latent_attention=True,
    group_query_attention=False, num_query_groups=None, rotary_base=10000,
)  # fmt: skip
# Kind -> what differs in the arguments; in TransformerConfig; in GPTModel. The latter two by hand: they are what the arguments mean.
KINDS: dict[str, tuple[dict, dict, dict]] = {
    "gpt-2": (
        DENSE | dict(normalization="LayerNorm", norm_epsilon=1e-5, swiglu=False, add_bias_linear=True, add_qkv_bias=True,
                     position_embedding_type="learned_absolute", untie_embeddings_and_output_weights=False),
        dict(num_moe_experts=None, moe_ffn_hidden_size=None, num_query_groups=8, qk_layernorm=False, normalization="LayerNorm",
             layernorm_epsilon=1e-5,
             gated_linear_unit=False, activation_func=torch.nn.functional.gelu, add_bias_linear=True, add_qkv_bias=True),
        dict(position_embedding_type="learned_absolute", share_embeddings_and_output_weights=True),
    ),
    "shared experts": (
        dict(moe_shared_expert_intermediate_size=48, moe_router_score_function="sigmoid", moe_router_pre_softmax=True, num_layers=3,
             moe_router_enable_expert_bias=True, moe_router_topk=3, moe_router_topk_scaling_factor=2.5, moe_layer_freq=[0, 1, 1],
             rotary_percent=0.5, moe_router_dtype="fp32"),
        dict(moe_shared_expert_intermediate_size=48, moe_router_score_function="sigmoid", moe_router_pre_softmax=True, num_layers=3,
             moe_router_enable_expert_bias=True, moe_router_topk=3, moe_router_topk_scaling_factor=2.5, moe_layer_freq=[0, 1, 1],
             moe_router_dtype="fp32"),
        dict(rotary_percent=0.5),
    ),
    "gamma from one": (dict(apply_layernorm_1p=True), {}, {}),
    "latent": (LATENT, dict(moe_ffn_hidden_size=32), {}),
}  # fmt: skip


def by_hand(args, kind: str) -> GPTModel:
    config, gpt = KINDS[kind][1:]
    own = dict(num_layers=args.num_layers, kv_channels=None if kind == "latent" else 8, layernorm_epsilon=1e-6) | config
    built: TransformerConfig = latent_config(**own) if kind == "latent" else tiny_config(**own)
    given = dict(position_embedding_type="rope", rotary_base=args.rotary_base) | gpt
    spec = megatron_lm.decoder(built) if kind != "latent" else local_spec(built)
    model = GPTModel(built, spec, vocab_size=megatron_lm.VOCAB, max_sequence_length=megatron_lm.POSITIONS, **given).eval()
    draw(model)
    for name, buffer in model.named_buffers():
        if "expert_bias" in name:
            buffer += torch.linspace(-1, 1, len(buffer))
    return model


def shift(model: GPTModel, by: float) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.RMSNorm):
            module.weight.data += by


def main() -> None:
    report = Report()
    cpu_compat.install()
    folder, layout = Path(sys.argv[1]), sys.argv[2]
    start(*map(int, layout.split(",")))
    ids = tokens(2, LENGTH, seed=3)
    for kind in sys.argv[3:]:
        args = megatron_lm.arguments(**KINDS[kind][0])
        source = by_hand(args, kind)
        reference = full_forward(source, ids)
        if kind == "gamma from one":
            shift(source, -1)
        megatron_lm.save(source, folder / kind, args, None)
        with report.check(f"{layout} {kind}") as row:
            architecture = read_architecture(checkpoint_args(folder / kind))
            model = architecture.build(**cpu_compat.cpu_config_options()).eval()
            load_checkpoint(model, folder / kind)
            architecture.finish(model)
            row["difference"] = (full_forward(model, ids) - reference).abs().max().item()
            assert row["difference"] <= (1e-5 if kind == "gamma from one" else 0), row
            enable_pikv(model, {"page_size": 4})
            logits = decode(model, PiKVInferenceContext(2, LENGTH, model=model), ids, [9])
            row["decoded"] = (logits - reference[:, 8:].transpose(0, 1)).abs().max().item()
            assert row["decoded"] <= 1e-4, row
    dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
