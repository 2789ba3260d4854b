"""Checkpoints whose keys other layers, or another grouping of keys, have written. Arguments: folder, layout, what was saved...

What this process saves it saves by Megatron-Core's own code, and every rank loads it into local layers with SequentialMLP experts.
"""

import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer

from pikv_ds.megatron_patch import cpu_compat, enable_pikv
from pikv_ds.megatron_patch.checkpoint import load_checkpoint
from tests.dist.jobs.report import Report
from tests.megatron import megatron_lm
from tests.megatron.models import draw_weights, latent_config, start, tiny_model, tokens
from tests.megatron.runs import full_forward

# What Transformer Engine's layers save where local layers save other names: sharded keys of a local layer -> of one of theirs.
OF_TE = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}  # and pre_mlp_layernorm before experts
OF_DENSE_TE = OF_TE | {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
OF_LATENT_TE = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}


MIXED = [1, 0, 1, 1]  # which layers have experts; as a list it makes Megatron-Core save keys by layer
FREQUENCY = {"te": 1, "singleton": 1}


def arguments(frequency: int | list[int] = MIXED):
    return megatron_lm.arguments(num_layers=4, moe_layer_freq=frequency)


def build(kind: str, frequency: int | list[int] = MIXED, changed: dict[str, str] | None = None) -> GPTModel:
    """changed: names that a layer's keys are saved under."""
    if kind == "latent":
        model = tiny_model(latent_config(qk_layernorm=True, num_layers=2 * parallel_state.get_pipeline_model_parallel_world_size()))
    else:
        model = megatron_lm.build(arguments(frequency))
    for layer in model.decoder.layers:
        if changed is not None:
            dense = changed is OF_TE and not isinstance(layer.mlp, MoELayer)
            layer.submodules_config = replace(layer.submodules_config, sharded_state_dict_keys_map=OF_DENSE_TE if dense else changed)
    return model.eval()


def draw(model: GPTModel, seed: int = 0) -> None:
    """Weights that show a norm, a bias or an expert that went elsewhere."""
    draw_weights(model)
    generator = torch.Generator().manual_seed(seed + 7 * parallel_state.get_pipeline_model_parallel_rank())
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1


def save_grouped(folder: Path) -> GPTModel:
    """GroupedMLP of Megatron-Core 0.16, which needs a CUDA library to run, and none to hold weights. Returns the same model without."""
    source = build("gpt")
    draw(source)
    with mock.patch("megatron.core.transformer.moe.grouped_gemm_util.grouped_gemm_is_available", lambda: True):
        config = megatron_lm.config_of(arguments(), moe_grouped_gemm=True)
        grouped = megatron_lm.build(arguments(), megatron_lm.decoder(config), moe_grouped_gemm=True)
    values = source.state_dict()
    for name, parameter in grouped.named_parameters():
        if name.endswith((".experts.weight1", ".experts.weight2")):
            parameter.data.copy_(_grouped(values, name, parameter.shape))
        else:
            parameter.data.copy_(values[name])
    megatron_lm.save(grouped, folder, megatron_lm.arguments(), None)
    return source


def _grouped(values: dict, name: str, shape: torch.Size) -> torch.Tensor:
    """As its forward reads them: experts one after the other, each [in, out]."""
    stem, linear = name.removesuffix(name[-8:]), {"1": "linear_fc1", "2": "linear_fc2"}[name[-1]]
    own = [key for key in values if key.startswith(f"{stem}.local_experts.") and key.endswith(f"{linear}.weight")]
    return torch.stack([values[f"{stem}.local_experts.{idx}.{linear}.weight"].T for idx in range(len(own))]).reshape(shape)


def saved(what: str, folder: Path) -> GPTModel:
    """The model that was saved, in the way that `what` names."""
    if what == "grouped":
        return save_grouped(folder)
    changed = {"te": OF_TE, "te by layer": OF_TE, "latent te": OF_LATENT_TE}.get(what)
    model = build("latent" if "latent" in what else "gpt", FREQUENCY.get(what, MIXED), changed)
    draw(model)
    megatron_lm.save(model, folder, megatron_lm.arguments(), None, **({"singleton_local_shards": True} if what == "singleton" else {}))
    return model


def main() -> None:
    report = Report()
    cpu_compat.install()
    folder, layout = Path(sys.argv[1]), sys.argv[2]
    start(*map(int, layout.split(",")))
    ids = tokens(2, 24, seed=3)
    for what in sys.argv[3:]:
        source = saved(what, folder / what)
        with report.check(f"{layout} {what}") as row, torch.no_grad():
            model = enable_pikv(build("latent" if "latent" in what else "gpt", [1] * 4 if what in FREQUENCY else MIXED))
            before = full_forward(model, ids) if parallel_state.get_pipeline_model_parallel_world_size() == 1 else None
            load_checkpoint(model, folder / what)
            own, other = model.state_dict(), source.state_dict()
            assert own.keys() == other.keys()
            different = [name for name in own if own[name] is not None and not torch.equal(own[name], other[name])]
            assert not different, different
            if before is not None:
                reference = full_forward(source, ids)
                row["changed"] = (before - reference).abs().max().item()
                assert row["changed"] > 0.05 and torch.equal(full_forward(model, ids), reference), row
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
