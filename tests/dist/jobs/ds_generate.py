"""Inference engines: AutoEP and replicated experts, init_inference, install, monitor, refusals. Argument: a folder."""

import copy
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.inference.v2.modules.interfaces import DSSelfAttentionRegistry
from transformers.utils import output_capturing

import pikv_ds
from pikv_ds.adapters.hf.argument_names import cache_of
from pikv_ds.errors import ConfigError, UnsupportedError
from tests.dist.jobs.ds_compare import MICRO, assert_same_text, generate, rank_prompt, ready, record_stats
from tests.dist.jobs.report import Report
from tests.tiny_models import prompt, tiny_model

AUTOEP = {**MICRO, "expert_parallel": {"enabled": True, "autoep_size": 2}}
folder = Path(next(arg for arg in sys.argv[1:] if not arg.startswith("--")))
report = Report()
host_functions = deepspeed.initialize, deepspeed.init_inference

# First, while torch.distributed is not up: init_inference has to start it.
with report.check("init_inference") as row:
    assert not dist.is_initialized()
    config = {"dtype": "fp32", "pikv": {"timeout_s": 77}}
    before = copy.deepcopy(config)
    engine = pikv_ds.init_inference(tiny_model("gpt_oss"), config, max_out_tokens=256)
    assert config == before and dist.get_world_size() == 2
    ids = rank_prompt("replicated")
    assert_same_text(row, generate(engine, ids), "gpt_oss", ids)
    record_stats(row, engine.pikv)

with report.check("the op is known to DeepSpeed"):
    assert get_accelerator().create_op_builder("PiKVOpBuilder").name == "pikv"

for family in ("qwen3_moe", "mixtral", "deepseek_v3"):
    config, model = {**AUTOEP, "pikv": {}}, tiny_model(family)
    before, registry = copy.deepcopy(config), dict(output_capturing._CAN_RECORD_REGISTRY)
    methods = dict(vars(type(output_capturing._CAN_RECORD_REGISTRY)))
    engine = ready(pikv_ds.initialize, model=model, config=config)
    for requests in ("replicated", "distinct"):
        with report.check(f"autoep {family} {requests}") as row:
            ids = rank_prompt(requests)
            assert_same_text(row, generate(engine.module, ids), family, ids)
            record_stats(row, engine.pikv)
        engine.pikv.reset()
    with report.check(f"autoep {family} leaves configuration and registry alone"):
        assert config == before
        assert dict(output_capturing._CAN_RECORD_REGISTRY) == registry
        assert dict(vars(type(output_capturing._CAN_RECORD_REGISTRY))) == methods
    with report.check(f"autoep {family} detach"):
        engine.pikv.detach()
        ids = rank_prompt("replicated")
        out = generate(engine.module, ids, synced_gpus=True)
        assert type(cache_of(out)).__name__ == "DynamicCache"

with report.check("replicated experts under initialize") as row:
    engine = ready(pikv_ds.initialize, model=tiny_model("olmoe"), config={**MICRO, "pikv": {}})
    ids = rank_prompt("distinct")
    assert_same_text(row, generate(engine.module, ids), "olmoe", ids)
    record_stats(row, engine.pikv)

with report.check("monitor"):
    csv = {"csv_monitor": {"enabled": True, "output_path": str(folder), "job_name": "run"}}
    engine = ready(pikv_ds.initialize, model=tiny_model("qwen3_moe"), config={**AUTOEP, **csv, "pikv": {"monitor": {"interval": 4}}})
    generate(engine.module, rank_prompt("distinct"))

with report.check("install"):
    pikv_ds.install()
    pikv_ds.install()
    assert deepspeed.initialize is not host_functions[0] and deepspeed.init_inference is not host_functions[1]
    assert get_accelerator().create_op_builder("PiKVOpBuilder").name == "pikv" and "pikv" in DSSelfAttentionRegistry.registry
    engine = ready(deepspeed.initialize, model=tiny_model("qwen3_moe"), config={**AUTOEP, "pikv": {}})
    ids = rank_prompt("replicated")
    assert_same_text({}, generate(engine.module, ids), "qwen3_moe", ids)
    assert engine.pikv.stats()["entries_appended"] > 0
    pikv_ds.uninstall()
    pikv_ds.uninstall()
    assert (deepspeed.initialize, deepspeed.init_inference) == host_functions
    assert type(get_accelerator().create_op_builder("PiKVOpBuilder")).__name__ != "PiKVOpBuilder"
    assert "pikv" not in DSSelfAttentionRegistry.registry

with report.check("disabled") as row:
    ids = prompt(13, seed=3)
    for block in ({}, {"pikv": {"enabled": False}}):
        runs = []
        for start in (deepspeed.initialize, pikv_ds.initialize):
            model = tiny_model("deepseek_v3", attention="sdpa")
            engine = ready(start, model=model, config={**AUTOEP, **block})
            out = generate(engine.module, ids, synced_gpus=True)
            assert model.config._attn_implementation == "sdpa" and "generate" not in vars(model)
            assert type(cache_of(out)).__name__ == "DynamicCache" and "pikv" not in vars(engine)
            runs.append(out)
        assert all(torch.equal(a, b) for a, b in zip(runs[0].logits, runs[1].logits, strict=True))
        plain = deepspeed.init_inference(tiny_model("qwen3_moe"), {"dtype": "fp32"})
        with_block = pikv_ds.init_inference(tiny_model("qwen3_moe"), {"dtype": "fp32", **block})
        a, b = generate(plain, ids), generate(with_block, ids)
        assert all(torch.equal(x, y) for x, y in zip(a.logits, b.logits, strict=True))


def refused(name: str, start, error: type, *words: str) -> None:
    with report.check(f"refused: {name}") as row:
        try:
            start()
        except error as refusal:
            row["message"] = str(refusal)
            assert all(word in row["message"] for word in words), row["message"]
        else:
            raise AssertionError(f"{name} was accepted")


qwen = tiny_model("qwen3_moe")
refused(
    "gpt-oss under AutoEP",
    lambda: pikv_ds.initialize(model=tiny_model("gpt_oss"), config={**AUTOEP, "pikv": {}}),
    UnsupportedError,
    "'gpt_oss'",
    "no preset",
    "replicated experts",
)
refused(
    "experts not divisible",
    lambda: pikv_ds.initialize(model=tiny_model("qwen3_moe", num_experts=7), config={**AUTOEP, "pikv": {}}),
    ConfigError,
    "autoep_size is 2",
    "7 experts",
)
refused(
    "unknown expert_parallel key",
    lambda: pikv_ds.initialize(model=qwen, config={**MICRO, "expert_parallel": {"enabled": True, "ep_size": 2}, "pikv": {}}),
    ConfigError,
    "'ep_size'",
    "autoep_size",
)
refused(
    "unknown pikv key",
    lambda: pikv_ds.initialize(model=qwen, config={**AUTOEP, "pikv": {"page_sise": 8}}),
    ConfigError,
    "page_sise",
    "page_size",
)
refused(
    "tensor parallel",
    lambda: pikv_ds.init_inference(qwen, {"dtype": "fp32", "pikv": {}, "mp_size": 2}),
    UnsupportedError,
    "mp_size is 2",
    "set mp_size to 1",
)
refused(
    "wrapped model",
    lambda: pikv_ds.initialize(model=torch.nn.Sequential(qwen), config={**MICRO, "pikv": {}}),
    UnsupportedError,
    "Sequential",
)

dist.barrier()
dist.destroy_process_group()
