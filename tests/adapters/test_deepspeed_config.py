"""Finding and refusing: what the DeepSpeed adapter decides before DeepSpeed runs. One process, no group."""

import argparse
import copy
import json

import pytest

from pikv_ds.adapters.deepspeed.autoep import check_expert_parallel, legal_keys
from pikv_ds.adapters.deepspeed.autotp import check_inference_tp, check_initialize_tp, fit_requests
from pikv_ds.adapters.deepspeed.config import inference_block, initialize_config, pikv_config, without_block
from pikv_ds.adapters.deepspeed.refusals import check_inference, check_initialize, check_model
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import ConfigError, UnsupportedError
from tests.tiny_models import tiny_model

BLOCK = {"page_size": 8}


@pytest.mark.parametrize("where", ["config", "config_params", "args.deepspeed_config", "args.deepscale_config"])
@pytest.mark.parametrize("form", ["dict", "json", "hjson"])
def test_block_is_found_wherever_deepspeed_reads_it(where, form, tmp_path):
    source = {"train_micro_batch_size_per_gpu": 1, "pikv": BLOCK}
    if form != "dict":
        path = tmp_path / "ds.json"
        comment = "# hjson has comments\n" if form == "hjson" else ""
        path.write_text(comment + json.dumps(source))
        source = str(path)
    call = {"args": argparse.Namespace(**{where.removeprefix("args."): source})} if "." in where else {where: source}
    assert pikv_config(initialize_config(call)).page_size == 8


def test_no_block_and_disabled_block_mean_untouched():
    assert pikv_config(initialize_config({})) is None
    assert pikv_config({"train_batch_size": 1}) is None
    assert pikv_config({"pikv": {"enabled": False}}) is None


def test_disabled_block_is_still_validated():
    with pytest.raises(ConfigError, match="page_sise"):
        pikv_config({"pikv": {"enabled": False, "page_sise": 8}})


@pytest.mark.parametrize("key", ["PiKV", "pkiv", "pikv_ds", "pikv-config"])
def test_misspelt_block_is_not_ignored(key):
    with pytest.raises(ConfigError, match=f"has the key '{key}' and no key 'pikv'"):
        pikv_config({key: BLOCK, "train_batch_size": 1})


def test_inference_block_from_config_or_keyword():
    config = {"dtype": "fp32", "pikv": BLOCK}
    before = copy.deepcopy(config)
    assert inference_block(config, {}) == inference_block(None, {"pikv": BLOCK}) == {"pikv": BLOCK}
    assert inference_block({"dtype": "fp32"}, {}) == {}
    assert without_block(config) == {"dtype": "fp32"} and config == before
    with pytest.raises(ConfigError, match="two different 'pikv' blocks"):
        inference_block(config, {"pikv": {"page_size": 16}})


def test_wrapped_and_foreign_models_are_refused():
    import torch

    with pytest.raises(UnsupportedError, match="Sequential, not a transformers PreTrainedModel"):
        check_model(torch.nn.Sequential())
    check_model(tiny_model("qwen3_moe"))


class TwoModelRanks:
    def get_model_parallel_world_size(self):
        return 2


@pytest.mark.parametrize(
    "ds_config, mpu, message",
    [
        ({"sequence_parallel_size": 2}, None, "sequence_parallel_size is 2"),
        ({"hybrid_engine": {"enabled": True}}, None, "hybrid_engine.enabled is true"),
        ({}, TwoModelRanks(), r"mpu.get_model_parallel_world_size\(\) is 2"),
    ],
)
def test_initialize_refusals_name_key_and_value(ds_config, mpu, message):
    with pytest.raises(UnsupportedError, match=message):
        check_initialize(ds_config, tiny_model("qwen3_moe"), mpu)


def test_zero3_is_refused_for_latent_attention_only():
    zero3 = {"zero_optimization": {"stage": 3}}
    check_initialize(zero3, tiny_model("qwen3_moe"))
    with pytest.raises(UnsupportedError, match="stage is 3 and the model type is 'deepseek_v3'"):
        check_initialize(zero3, tiny_model("deepseek_v3"))


@pytest.mark.parametrize(
    "ds_config, message",
    [
        ({"replace_with_kernel_inject": True}, "replace_with_kernel_inject is true"),
        ({"kernel_inject": True}, "kernel_inject is true"),
        ({"enable_cuda_graph": True}, "enable_cuda_graph is true"),
    ],
)
def test_inference_refusals_name_key_and_value(ds_config, message):
    with pytest.raises(UnsupportedError, match=f"{message}.*pikv.enabled to false"):
        check_inference(ds_config)
    check_inference({"tensor_parallel": {"tp_size": 1}, "mp_size": 1, "kernel_inject": False})


@pytest.mark.parametrize(
    "ds_config, ranks, message",
    [
        ({"tensor_parallel": {"tp_size": 2}}, 4, "tensor_parallel.tp_size is 2 and the job has 4 ranks"),
        ({"tp": {"tp_size": 4}}, 4, "tp.tp_size is 4 and .* has 2 KV heads"),
        ({"mp_size": 2}, 1, "mp_size is 2 and the job has 1 ranks"),
        ({"mpu": TwoModelRanks()}, 2, "mpu is set .*tensor_parallel.tp_group"),
    ],
)
def test_tensor_parallel_refusals_of_inference(ds_config, ranks, message):
    with pytest.raises(UnsupportedError, match=message):
        check_inference_tp(ds_config, tiny_model("qwen3_moe"), ranks, None)
    check_inference_tp({"tensor_parallel": {"tp_size": 1}, "mp_size": 1}, tiny_model("qwen3_moe"), ranks, None)
    check_inference_tp({"tensor_parallel": {"tp_size": 2}}, tiny_model("qwen3_moe"), 2, None)


@pytest.mark.parametrize(
    "family, changes, autoep, moe, message",
    [
        ("qwen3_moe", {"num_key_value_heads": 1}, None, None, "autotp_size is 2 and .* has 1 KV heads"),
        ("qwen3_moe", {"num_key_value_heads": 3, "num_attention_heads": 6}, 2, None, "beside an expert_parallel block.* 3 KV heads"),
        ("gpt_oss", {}, None, None, "attention sinks"),
        ("qwen3_dense", {}, None, 2, "MoE layers of ep_size 2"),
    ],
)
def test_tensor_parallel_refusals_of_initialize(family, changes, autoep, moe, message):
    model = tiny_model(family, **changes)
    with pytest.raises(UnsupportedError, match=message):
        check_initialize_tp({"tensor_parallel": {"autotp_size": 2}}, model, autoep, moe)
    check_initialize_tp({"tensor_parallel": {"autotp_size": 1}}, model, autoep, moe)


def test_peers_of_one_group_are_distinct_requests():
    config = PiKVConfig()
    assert fit_requests(config, [0, 2], [0, 1]) is config
    assert fit_requests(config, [0, 1, 2, 3], [0, 1]).storage.requests == "distinct"
    with pytest.raises(ConfigError, match=r"'replicated'.*\[0, 1\] are tensor-parallel peers"):
        fit_requests(PiKVConfig(storage={"requests": "replicated"}), [0, 1], [0, 1])


def expert_parallel(**keys):
    return {"expert_parallel": {"enabled": True, **keys}}


def test_expert_parallel_absent_or_disabled():
    model = tiny_model("gpt_oss")
    assert check_expert_parallel({}, model) is None
    assert check_expert_parallel({"expert_parallel": {"enabled": False, "autoep_size": 2}}, model) is None


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_expert_parallel_accepted(family, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert check_expert_parallel(expert_parallel(autoep_size=2), tiny_model(family)) == 2


def test_unknown_expert_parallel_key_is_named_with_the_legal_ones():
    with pytest.raises(ConfigError, match="unknown key 'ep_size'.*autoep_size"):
        check_expert_parallel(expert_parallel(ep_size=2), tiny_model("qwen3_moe"))
    assert {"enabled", "autoep_size", "preset_model", "use_grouped_mm"} <= set(legal_keys())


def test_model_without_preset_is_refused_before_deepspeed_runs():
    with pytest.raises(UnsupportedError, match="'gpt_oss'.*no preset.*replicated experts"):
        check_expert_parallel(expert_parallel(autoep_size=1), tiny_model("gpt_oss"))


def test_experts_not_divisible(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"autoep_size is 3 and model.layers.0.mlp has 8 experts.*\[1, 2, 4, 8\]"):
        check_expert_parallel(expert_parallel(autoep_size=3), tiny_model("qwen3_moe"))


def test_autoep_size_must_divide_the_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"autoep_size is 4 and the job has 2 rank\(s\)"):
        check_expert_parallel(expert_parallel(autoep_size=4), tiny_model("qwen3_moe"))


def test_detection_leaves_the_model_as_it_was():
    model = tiny_model("deepseek_v3")
    before = {name: type(module) for name, module in model.named_modules()}
    check_expert_parallel(expert_parallel(autoep_size=1), model)
    assert {name: type(module) for name, module in model.named_modules()} == before
