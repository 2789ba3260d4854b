"""What Megatron-LM's training script does with Megatron-Core, in small: arguments, a trained model, its checkpoint folder; without PiKV."""

from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig

from pikv_ds.megatron_patch.cpu_compat import cuda_literals_on_cpu
from tests.long_form import LONG
from tests.megatron.models import positions, tiny_config

VOCAB = 2048  # the bundled tokenizer's
POSITIONS = 512
TRACKER = "latest_checkpointed_iteration.txt"


def arguments(**changes) -> Namespace:
    """Those that decide the model, under the names of Megatron-LM's parser, and some of the several hundred others, set as in a GPU run."""
    model = dict(
        num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=8, kv_channels=8, group_query_attention=True,
        num_query_groups=4, padded_vocab_size=VOCAB, max_position_embeddings=POSITIONS, position_embedding_type="rope", rotary_percent=1.0,
        rotary_base=50000, rotary_interleaved=False, use_rope_scaling=False, rope_scaling_factor=8.0, rope_type=None,
        untie_embeddings_and_output_weights=True, normalization="RMSNorm", norm_epsilon=1e-6, apply_layernorm_1p=False, qk_layernorm=True,
        swiglu=True, squared_relu=False, quick_geglu=False, add_bias_linear=False, add_qkv_bias=False, num_experts=8, moe_router_topk=2,
        moe_ffn_hidden_size=32, moe_layer_freq=1, moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=1e-2,
        moe_router_pre_softmax=False, multi_latent_attention=False, window_size=None, window_attn_skip_freq=None,
    )  # fmt: skip
    training = dict(
        params_dtype=torch.bfloat16, bf16=True, tensor_model_parallel_size=8, pipeline_model_parallel_size=4, context_parallel_size=2,
        sequence_parallel=True, transformer_impl="transformer_engine", moe_grouped_gemm=True, moe_permute_fusion=True,
        attention_dropout=0.1, hidden_dropout=0.1, fp8=None, recompute_granularity="selective", moe_token_dispatcher_type="flex",
        masked_softmax_fusion=True, no_persist_layer_norm=False, apply_rope_fusion=True, moe_input_jitter_eps=None, mtp_num_layers=None,
        is_hybrid_model=False, spec=None, heterogeneous_layers_config_path=None, data_path=["a", "b"], lr=3e-4,
    )  # fmt: skip
    return Namespace(**{**model, **training, **changes})


def config_of(args: Namespace, **options) -> TransformerConfig:
    """Written out by hand for the arguments above: the oracle of what PiKV reads from them."""
    names = ("num_layers", "ffn_hidden_size", "moe_router_topk", "moe_ffn_hidden_size", "moe_layer_freq", "kv_channels", "add_qkv_bias")
    own = {name: getattr(args, name) for name in names} | {"num_moe_experts": args.num_experts, "layernorm_epsilon": args.norm_epsilon}
    return tiny_config(**own | {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": args.moe_aux_loss_coeff} | options)


def decoder(config: TransformerConfig):
    return get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=config.normalization)


def build(args: Namespace, spec=None, **options) -> GPTModel:
    config = config_of(args, **options)
    return GPTModel(
        config,
        spec or decoder(config),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
    )


def train(model: GPTModel, batches: list[torch.Tensor]):
    """Adam with the distributed optimizer under Megatron's DDP. Returns the optimizer and the loss of every step."""
    with cuda_literals_on_cpu():
        ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(use_distributed_optimizer=True), model)
        optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-2, clip_grad=1.0, use_distributed_optimizer=True), [ddp])
        losses = []
        for ids in batches:
            ddp.zero_grad_buffer()
            optimizer.zero_grad()
            loss = ddp(ids, positions(ids), None, labels=ids.roll(-1, 1)).mean()
            loss.backward()
            finalize_model_grads([ddp])
            assert optimizer.step()[0], "the optimizer skipped the step"
            losses.append(loss.item())
    model.eval()
    return optimizer, losses


def metadata(**more) -> dict:
    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True), **more}


def save(model: GPTModel, folder: Path, args: Namespace, iteration: int | None, optimizer=None, **more) -> Path:
    """The folder of --save: weights, optimizer, random states and arguments in iter_*, or in release without an iteration; its tracker."""
    name = "release" if iteration is None else f"iter_{iteration:07d}"
    if dist.get_rank() == 0:
        (folder / name).mkdir(parents=True, exist_ok=True)
    dist.barrier()
    own = metadata(distrib_optim_sharding_type="fully_reshardable", **more)
    state = {"args": args, "checkpoint_version": 3.0, "iteration": iteration or 0, "model": model.sharded_state_dict(metadata=own)}
    if optimizer is not None:
        with cuda_literals_on_cpu():
            state["optimizer"] = optimizer.sharded_state_dict(state["model"], metadata=own)
    state["opt_param_scheduler"] = {"num_steps": 640, "max_lr": 3e-4}
    state["rng_state"] = dist_checkpointing.mapping.ShardedObject(
        "rng_state", [{"torch_rng_state": torch.get_rng_state()}], (dist.get_world_size(),), (dist.get_rank(),)
    )
    queue_from_a_fork()
    dist_checkpointing.save(state, str(folder / name))
    if dist.get_rank() == 0:
        (folder / TRACKER).write_text("release" if iteration is None else str(iteration))
    dist.barrier()
    return folder / name


def queue_from_a_fork() -> None:
    """Short form: the queue that writers of a rank answer through, from a process that is forked. Megatron-Core starts an interpreter for
    it, which costs as much as all else here."""
    if not LONG and getattr(filesystem_async, "_results_queue", False) is None:
        filesystem_async._results_queue = torch.multiprocessing.get_context("fork").Manager().Queue()


def load(model: GPTModel, weights: Path) -> None:
    """As Megatron-LM loads."""
    state = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=metadata())}, str(weights))
    model.load_state_dict(state["model"], strict=True)
    model.eval()
