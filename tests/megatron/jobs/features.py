"""Settings that change attention or routing, and settings that are refused. Arguments: tp,ep,etp."""

import contextlib
import sys
from unittest import mock

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.extensions import transformer_engine
from megatron.core.inference import utils as host_utils
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import Attention, CrossAttention
from megatron.core.transformer.moe.moe_layer import MoELayer

from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.errors import ConfigError, UnsupportedError
from pikv_ds.megatron_patch import PiKVInferenceContext, cpu_compat, disable_pikv, enable_pikv, pikv_layer_spec
from pikv_ds.megatron_patch.groups import expert_group
from pikv_ds.megatron_patch.layers import find_layers
from pikv_ds.megatron_patch.refusals import HEADS_WAIT
from tests.dist.jobs.report import Report
from tests.megatron.host_limits import check_host_limits, with_token_heads
from tests.megatron.hosts import engine_runs
from tests.megatron.masks import check_masks
from tests.megatron.models import causal_mask, local_spec, positions, start, tiny_config, tiny_model, tokens
from tests.megatron.penalty import check_penalty
from tests.megatron.runs import assert_conserved, decode, dense_is_forbidden, refused, step

ROWS, LENGTH = 3, 24
SETTINGS = {
    "sliding window": dict(window_size=(5, 0)),
    "sliding window in every other layer": dict(window_size=(5, 0), window_attn_skip_freq=2),
    "learnable softmax offset": dict(softmax_type="learnable"),
    "softmax off by one": dict(softmax_type="off-by-one", window_size=(5, 0), window_attn_skip_freq=2),
    "dropped tokens": dict(moe_expert_capacity_factor=0.3),
    "dropped tokens, padded to capacity": dict(moe_expert_capacity_factor=0.3, moe_pad_expert_input_to_capacity=True),
    "router in chunks": dict(mlp_chunks_for_prefill=3),
    "allgather dispatcher": dict(moe_token_dispatcher_type="allgather"),
    "dense first layer": dict(moe_layer_freq=[0, 1, 1]),
    "attention scale": dict(softmax_scale=0.5),
    "sigmoid router with expert bias": dict(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True),
}

# Also with ids that are known only after the layer's attention.
STAGED = ("sliding window", "dropped tokens", "router in chunks", "dense first layer")


def build(changes: dict):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    config = tiny_config(**changes)
    spec = None
    if "moe_layer_freq" in changes:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    model = tiny_model(config, spec)
    for name, parameter in model.named_parameters():
        if "softmax_offset" in name:
            parameter.data.normal_(1, 1, generator=torch.Generator().manual_seed(3))
    return model


def check_settings(report: Report, ids: torch.Tensor) -> None:
    for name, changes in SETTINGS.items():
        model = build(changes)
        for source in ("previous_layer", "true") if name in STAGED else ("previous_layer",):
            with report.check(f"{name}, ids {source}") as row:
                reference = decode(model, StaticInferenceContext(ROWS, LENGTH), ids, [9])
                enable_pikv(model, {"page_size": 2, "storage": {"expert_ids": source}})
                context = PiKVInferenceContext(ROWS, LENGTH, model=model)
                with dense_is_forbidden():
                    logits = decode(model, context, ids, [9])
                disable_pikv(model)
                row["difference"] = (logits - reference).abs().max().item()
                assert row["difference"] <= 1e-5, row["difference"]
                if "window" in changes:
                    assert context.stats()["entries_expired"] > 0
                if "window_size" not in changes:
                    assert_conserved(context, len(model.decoder.layers) * ids.numel())


def check_token_heads(report: Report, ids: torch.Tensor) -> None:
    """Multi-token prediction: the heads are there, and train; in an engine that does not speculate only the model runs."""
    with report.check("heads of multi-token prediction") as row:
        model = with_token_heads()
        classes, loss = [type(m) for m in model.mtp.modules()], training_loss(model, ids)
        with engine_runs():
            reference = decode(model, StaticInferenceContext(ROWS, LENGTH), ids, [9])
            enable_pikv(model, {"page_size": 2})
            context = PiKVInferenceContext(ROWS, LENGTH, model=model)
            with dense_is_forbidden():
                row["difference"] = (decode(model, context, ids, [9]) - reference).abs().max().item()
        assert row["difference"] <= 1e-5, row
        assert_conserved(context, len(model.decoder.layers) * ids.numel())
        assert [type(m) for m in model.mtp.modules()] == classes and torch.equal(training_loss(model, ids), loss)
        if hasattr(host_utils, "InferenceMode"):  # outside of an engine the host runs the heads as well, and fails, over any context
            context.reset()
            refused(RuntimeError, "must match", lambda: step(model, context, ids[:, :9]))
            disable_pikv(model)
            refused(RuntimeError, "must match", lambda: step(model, StaticInferenceContext(ROWS, LENGTH), ids[:, :9]))


def training_loss(model, ids: torch.Tensor) -> torch.Tensor:
    model.train()
    loss = model(ids, positions(ids), causal_mask(ids.shape[1]), labels=ids.roll(-1, 1)).detach()
    model.eval()
    return loss


def check_homes(report: Report, ids: torch.Tensor) -> None:
    """With a shard per expert every entry must lie in the shard of the expert its router chose, token by token."""
    for source, chunks in (("true", 1), ("true", 3), ("previous_layer", 1), ("previous_layer", 3)):
        with report.check(f"entries are at their experts, ids {source}, {chunks} chunks"):
            model = build(dict(mlp_chunks_for_prefill=chunks))
            chosen: list[list[torch.Tensor]] = [[] for _ in model.decoder.layers]
            for layer, taken in zip(model.decoder.layers, chosen, strict=True):
                layer.mlp.router.register_forward_hook(lambda _m, _a, out, taken=taken: taken.append(out[0].argmax(-1).view(-1, ROWS).T))
            enable_pikv(model, {"storage": {"expert_ids": source, "num_shards": 8, "capacity_tokens": 1000}})
            context = PiKVInferenceContext(ROWS, LENGTH, model=model)
            decode(model, context, ids, [9])
            probe = CacheProbe(context.core)
            for i in range(probe.num_layers):
                homes = probe.homes(i)
                routed = i if source == "true" else i - 1
                at = torch.arange(LENGTH).expand(ROWS, -1) % 8 if routed < 0 else torch.cat(chosen[routed], 1)
                own = homes.view(-1, ROWS, homes.shape[1])[dist.get_rank() % (homes.shape[0] // ROWS), :, :LENGTH]
                assert torch.equal(own, at), f"layer {i}"


@contextlib.contextmanager
def setting(config, **changes):
    with contextlib.ExitStack() as stack:
        for name, value in changes.items():
            stack.enter_context(mock.patch.object(config, name, value))
        yield


def check_refusals(report: Report, ids: torch.Tensor) -> None:
    model = build({})
    classes = [type(m) for m in model.modules()]
    with report.check("settings refused by name"):
        for changes in (
            dict(context_parallel_size=2),
            dict(cuda_graph_impl="local"),
            dict(flash_decode=True),
            dict(sequence_parallel=True),
            *([] if HEADS_WAIT else [dict(mtp_num_layers=1)]),
            dict(window_size=(4, 4)),
        ):
            with setting(model.config, **changes):
                refused(UnsupportedError, next(iter(changes)), lambda: enable_pikv(model))
        refused(ConfigError, "'gate'", lambda: enable_pikv(model, {"storage": {"expert_ids": "gate", "gate_path": "gate.safetensors"}}))
        refused(ConfigError, "enabled", lambda: enable_pikv(model, {"enabled": False}))
        assert [type(m) for m in model.modules()] == classes, "a refusal must leave the model as it was"
    with report.check("versions refused"):
        with mock.patch.object(megatron.core, "__version__", "0.15.2"):
            refused(UnsupportedError, "0.15.2 is older than 0.16; tested with megatron-core 0.16.0, 0.16.1", lambda: enable_pikv(model))
        moved = "_adjust_key_value_for_inference"
        with mock.patch.object(megatron.core, "__version__", "0.99.0"), mock.patch.object(Attention, moved, lambda self, x: x):
            refused(
                UnsupportedError,
                f"0.99.0 cannot serve attention and routing: Attention.{moved} takes (self, x)",
                lambda: enable_pikv(model),
            )
    with report.check("specifications refused"):
        refused(UnsupportedError, "GPTModel", lambda: pikv_layer_spec(model))
        refused(UnsupportedError, "MoELayer", lambda: pikv_layer_spec(local_spec(model.config).submodules.mlp))
        cross = local_spec(model.config)
        cross.submodules.self_attention.module = CrossAttention
        refused(UnsupportedError, "CrossAttention", lambda: pikv_layer_spec(cross))
        missing = local_spec(model.config)
        missing.submodules.self_attention.submodules.core_attention = transformer_engine.TEDotProductAttention
        refused(UnsupportedError, "Transformer Engine, which is not installed", lambda: pikv_layer_spec(missing))
        refused(UnsupportedError, "once", lambda: pikv_layer_spec(pikv_layer_spec(local_spec(model.config))))
    enable_pikv(model)
    with report.check("process groups and shards refused"):
        layers = find_layers(model)
        for layer in layers:
            assert isinstance(layer.moe, MoELayer)
        groups = ProcessGroupCollection(tp=layers[0].attention.pg_collection.tp, cp=layers[0].attention.pg_collection.cp)
        bare = [mock.Mock(moe=None, attention=mock.Mock(pg_collection=groups))]
        with mock.patch.object(parallel_state, "get_expert_model_parallel_group", lambda **_: None):
            refused(UnsupportedError, "no expert-parallel process group", lambda: expert_group(bare))
        if dist.get_world_size() > 1:
            refused(ConfigError, "num_shards = 3", lambda: PiKVInferenceContext(1, 8, model=model, config={"storage": {"num_shards": 3}}))
    with report.check("calls refused"), torch.no_grad():
        context = PiKVInferenceContext(ROWS, LENGTH, model=model)
        refused(ValueError, "max_batch_size", lambda: step(model, PiKVInferenceContext(2, LENGTH, model=model), ids[:, :9]))
        refused(ValueError, "max_sequence_length", lambda: step(model, PiKVInferenceContext(ROWS, 8, model=model), ids[:, :9]))
        context.sequence_len_offset = 5
        refused(UnsupportedError, "sequence_len_offset = 5", lambda: step(model, context, ids[:, :1]))
        context.reset()
        step(model, context, ids[:, :9])
        refused(UnsupportedError, "2 rows, 3 are stored", lambda: step(model, context, ids[:2, 9:10]))
        disable_pikv(model)
        refused(UnsupportedError, "layer 1 allocates a dense cache", lambda: step(model, context, ids[:, :9]))


def main() -> None:
    report = Report()
    cpu_compat.install()
    start(*map(int, sys.argv[1].split(",")))
    ids = tokens(ROWS, LENGTH, seed=5 + parallel_state.get_data_parallel_rank())
    check_settings(report, ids)
    if HEADS_WAIT:
        check_token_heads(report, ids)
    check_homes(report, ids)
    check_refusals(report, ids)
    check_masks(report, ids)
    check_penalty(report, ids)
    check_host_limits(report, ids)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
