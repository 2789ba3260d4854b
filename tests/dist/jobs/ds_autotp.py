"""DeepSpeed's tensor parallelism beside PiKV, on 2 or 4 ranks: tokens and logits are those of DeepSpeed's own AutoTP."""

import deepspeed
import torch
import torch.distributed as dist

import pikv_ds
from pikv_ds.adapters.deepspeed.autoep_shim import registry_shim
from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.errors import ConfigError, DivergedError, UnsupportedError
from tests.dist.jobs.ds_compare import MICRO, generate, ready
from tests.dist.jobs.report import Report
from tests.long_form import short_or_long
from tests.tiny_models import prompt, tiny_model

report = Report()
INFERENCE = {"dtype": "fp32"}
# AutoTP takes its patterns for `initialize` from transformers, whose plan for experts it does not know: the attention alone.
COLUMNS, ROWS = r".*self_attn\.(q|k|v|q_b|kv_b)_proj\.weight$", r".*self_attn\.o_proj\.weight$"
PATTERNS = [{"patterns": [ROWS], "partition_type": "row"}, {"patterns": [COLUMNS], "partition_type": "column"}]
AUTOTP = {"tensor_parallel": {"autotp_size": 2, "partition_config": {"use_default_specs": False, "layer_specs": PATTERNS}}}


def start(function, host: bool, model, config: dict, **more):
    """An engine of DeepSpeed's own, or of PiKV's with the block."""
    if function == "init_inference":
        return (deepspeed if host else pikv_ds).init_inference(model, config if host else {**config, "pikv": {"page_size": 4}}, **more)
    with registry_shim():
        return ready(
            (deepspeed if host else pikv_ds).initialize, model=model, config=config if host else {**config, "pikv": {"page_size": 4}}
        )


def compare(name: str, function: str, family: str, config: dict, group: list[int], mode: str, *, own_prompt: int = 0, **changes) -> None:
    """group: the ranks over which the cache is to be sharded; mode: as what the store sees their requests."""
    mpu = changes.pop("mpu", None)
    changes.setdefault("intermediate_size", 128)  # DeepSpeed before 0.19.8 cuts MLPs by 64 columns
    if mpu is not None:
        config = {**config, "tensor_parallel": {**config["tensor_parallel"], "mpu": mpu, "tp_group": mpu.group}}
    with report.check(name) as row:
        ids = prompt(13 + 6 * own_prompt, seed=3 + own_prompt)
        expected = generate(start(function, True, tiny_model(family, **changes), dict(config)).module, ids, synced_gpus=True)
        engine = start(function, False, tiny_model(family, **changes), dict(config))
        out = generate(engine.module, ids)
        row["tokens"] = out.sequences[0, ids.shape[1] :].tolist()
        assert torch.equal(out.sequences, expected.sequences), (row["tokens"], expected.sequences.tolist())
        row["max_logit_diff"] = max((a - b).abs().max().item() for a, b in zip(out.logits, expected.logits, strict=True))
        assert row["max_logit_diff"] <= 1e-5, row["max_logit_diff"]
        core = engine.pikv.core
        row["group"] = [0] if core.exchange.group is None else dist.get_process_group_ranks(core.exchange.group)
        row["heads"] = [(spec.first_head, spec.num_kv_heads) for spec in core.layers]
        row["stats"] = {key: engine.pikv.stats()[key] for key in ("entries_live", "entries_appended", "kv_bytes_dense")}
        assert core.exchange.size == len(group) and (len(group) == 1 or row["group"] == group), (row["group"], group)
        assert len(group) == 1 or CacheProbe(core).mode == mode, CacheProbe(core).mode
        engine.pikv.detach()


def refused(name: str, call, error: type, *words: str) -> None:
    with report.check(f"refused: {name}"):
        try:
            call()
        except error as refusal:
            assert all(word in str(refusal) for word in words), refusal
        else:
            raise AssertionError(f"{name} was accepted")


class Layout:
    """A user's own mpu: ranks 2 n and 2 n + 1 are tensor-parallel peers."""

    def __init__(self) -> None:
        groups = [dist.new_group([first, first + 1]) for first in range(0, dist.get_world_size(), 2)]
        self.group = groups[dist.get_rank() // 2]

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.group


deepspeed.init_distributed()
rank, world = dist.get_rank(), dist.get_world_size()
tp = {**INFERENCE, "tensor_parallel": {"tp_size": world}}
fold = lambda size: {**MICRO, **AUTOTP, "expert_parallel": {"enabled": True, "autoep_size": size}}  # noqa: E731
alike = [rank % 2, rank % 2 + 2][: world // 2]  # ranks that hold the same heads when two are peers
if world == 2:
    for family in short_or_long(["qwen3_moe", "deepseek_v3"], ["qwen3_moe", "mixtral", "deepseek_v3"]):
        compare(f"init_inference {family}", "init_inference", family, tp, [rank], "local")
    compare("initialize", "initialize", "qwen3_dense", {**MICRO, "tensor_parallel": {"autotp_size": 2}}, [rank], "local")
    for family in short_or_long(["deepseek_v3"], ["qwen3_moe", "deepseek_v3"]):
        compare(f"folded {family}", "initialize", family, fold(2), [0, 1], "distinct")
    refused(
        "replicated peers",
        lambda: pikv_ds.initialize(model=tiny_model("qwen3_moe"), config={**fold(2), "pikv": {"storage": {"requests": "replicated"}}}),
        ConfigError, "'replicated'", "[0, 1]", "tensor-parallel peers",
    )  # fmt: skip
    refused("sinks", lambda: start("init_inference", False, tiny_model("gpt_oss"), tp), UnsupportedError, "sinks", "tp_size is 2")
    few = tiny_model("qwen3_moe", num_key_value_heads=1)
    refused("one head", lambda: start("init_inference", False, few, tp), UnsupportedError, "1 KV heads")
    named = {**INFERENCE, "tensor_parallel": {"tp_size": "two"}}
    refused("a size in words", lambda: start("init_inference", False, tiny_model("qwen3_moe"), named), ConfigError, "tp_size is 'two'")
    engine = start("init_inference", False, tiny_model("qwen3_moe", intermediate_size=128), {**tp, "tensor_parallel": {"tp_size": "2"}})
    refused(
        "cut twice", lambda: start("init_inference", False, engine.module, dict(tp)), UnsupportedError, "has cut this Qwen3MoeForCausalLM"
    )
    own = lambda columns: generate(engine.module, prompt(columns, seed=rank))  # noqa: E731
    refused("other tokens on a peer", lambda: own(13), DivergedError, "rank 0 [1, 13], rank 1 [1, 13]", "different tokens")
    refused("other lengths on a peer", lambda: own(13 + 5 * rank), DivergedError, "rank 0 [1, 13], rank 1 [1, 18]")
    with report.check("a detached model is the host's"):
        hooks = len(engine.module._forward_pre_hooks)
        engine.pikv.detach()
        assert len(engine.module._forward_pre_hooks) == hooks - 1
else:
    compare("init_inference", "init_inference", "qwen3_moe", tp, [rank], "local", num_key_value_heads=4)
    halves = {**INFERENCE, "tensor_parallel": {"tp_size": 2}}
    refused("two of four", lambda: start("init_inference", False, tiny_model("qwen3_moe"), halves), UnsupportedError, "4 ranks", "mpu")
    layout = Layout()
    for mode in ("replicated", "distinct"):
        own = rank // 2 if mode == "distinct" else 0
        for family in ("qwen3_moe", "deepseek_v3"):
            compare(f"mpu {family} {mode}", "init_inference", family, halves, alike, mode, own_prompt=own, mpu=layout)
        compare(f"initialize {mode}", "initialize", "qwen3_moe", {**MICRO, **AUTOTP}, alike, mode, own_prompt=own)
    for size in (2, 4):
        members = list(range(4)) if size == 4 else [rank // 2 * 2, rank // 2 * 2 + 1]
        for own, which in ((0, "alike"), (rank // 2, "own")):
            compare(f"folded ep {size} {which}", "initialize", "qwen3_moe", fold(size), members, "distinct", own_prompt=own)

dist.barrier()
dist.destroy_process_group()
