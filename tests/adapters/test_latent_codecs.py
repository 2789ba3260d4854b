"""MLA latents in compressed records, in real DeepSeek-V2 and -V3 modules: the rotary part of the keys stays fp16 unless said otherwise."""

import pytest
import torch

import pikv_ds
from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.errors import ConfigError
from tests.dist.jobs.exact import assert_conserved, assert_same, generate_sharded
from tests.tiny_models import prompt, tiny_model

FAMILIES = ("deepseek_v2", "deepseek_v3")
CODECS = ("int8", "int4", "int2", "fp8_e4m3", "fp4_e2m1")
PROMPT, STEPS, V_DIM = 130, 14, 32
FP8 = {"compression": {"method": "fp8_e4m3"}}


def continuous_model(family: str):
    """All experts serve every token, so that logits follow from the cache continuously; rotary keys of 2.6 RMS beside latents of 1."""
    groups = {"topk_group": 2} if family == "deepseek_v3" else {}
    model = tiny_model(family, num_experts_per_tok=8, kv_lora_rank=V_DIM, qk_rope_head_dim=16, **groups)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "kv_a_proj_with_mqa" in name:
                parameter[V_DIM:] *= 4
    return model


@pytest.fixture(scope="module")
def models():
    """Per family a model, ids, and the logits of the last STEPS tokens from the model's own attention."""
    found = {}
    for family in FAMILIES:
        model, ids = continuous_model(family), prompt(PROMPT + STEPS, seed=2, batch=4)
        with torch.no_grad():
            found[family] = model, ids, model(ids).logits[:, PROMPT:]
    return found


def error(model, ids, dense, compression) -> tuple[float, dict]:
    """Of the logits of single steps after the prompt, relative, and the report of the cache with the formats of its pages."""
    with torch.no_grad(), pikv_ds.attach(model, {"compression": compression}) as cache:
        logits = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split([PROMPT, *[1] * STEPS], 1)]
        pools = CacheProbe(cache.core).all_pools
        stats = cache.stats() | {"formats": {pool.fmt.label for pool in pools}}
        pages = [pool.num_pages * pool.page_size * (pool.fmt.bytes_per_token + 4) for pool in pools]
        tails = [pool.tail.element_size() * len(pool.tail) * pool.fmt.tail_elements for pool in pools if pool.fmt.grouped]
        stats["declared"] = sum(pages) + sum(tails)
    return ((torch.cat(logits[1:], 1) - dense).norm() / dense.norm()).item(), stats


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_wide_rotary_part_is_nearer(models, family, codec):
    wide, stats = error(*models[family], {"method": codec})
    coded, narrow = error(*models[family], {"method": codec, "rope_raw": False})
    print(f"{family} {codec}: logits off by {wide:.2e}, {coded:.2e} without rope_raw")
    assert 0 < 1.05 * wide < coded, (wide, coded)
    assert (stats["formats"], narrow["formats"]) == ({f"{codec}+rope"}, {codec})
    assert stats["declared"] == stats["kv_bytes_allocated"] > narrow["kv_bytes_allocated"] == narrow["declared"]
    assert stats["attention_impl"] == f"pikv cpu {codec}"


@pytest.mark.parametrize(
    "block",
    [
        {"storage": {"num_shards": 3}},
        {"page_size": 4, "storage": {"num_shards": 2, "expert_ids": "lookahead"}},
        {"page_size": 8, "routing": {"method": "bounds", "metadata": "int8", "budget_ratio": 1.0}},
        {"page_size": 8, "scheduling": {"method": "h2o", "budget_tokens": 400, "sink_tokens": 4, "recent_tokens": 16}},
    ],
    ids=["shards", "lookahead", "router", "policy"],
)
def test_entries_are_coded_one_by_one_wherever_they_lie(models, block):
    """fp8 rounds every entry by itself, so nothing but the order of sums may change."""
    model, ids, _ = models["deepseek_v3"]
    alone = generate_sharded(model, ids[:2, :40], new_tokens=24, num_beams=1 if "routing" in block else 2, config=FP8)
    run = generate_sharded(model, ids[:2, :40], new_tokens=24, num_beams=1 if "routing" in block else 2, config=FP8 | block)
    assert_same(run, alone, 2e-5)


def test_eviction_and_selection_over_groups_with_raw_columns(models):
    """Pages of int4 groups leave and are read by int8 bounds: less is read and held."""
    model, ids, _ = models["deepseek_v3"]
    own = {"page_size": 32, "compression": {"method": "int4", "group": 32}}
    block = own | {
        "routing": {"method": "bounds", "metadata": "int8", "budget_pages": 2, "sink_tokens": 4, "recent_tokens": 32},
        "scheduling": {"method": "streaming_llm", "budget_tokens": 100, "sink_tokens": 4, "recent_tokens": 32},
    }
    whole = generate_sharded(model, ids, new_tokens=20, config=own)
    run = generate_sharded(model, ids, new_tokens=20, config=block)
    assert run.stats["entries_evicted"] > 0
    assert run.logits.isfinite().all() and run.stats["kv_bytes_allocated"] < whole.stats["kv_bytes_allocated"]
    assert_conserved(run.stats)


def test_two_pools_and_a_rotation_keep_the_rotary_part(models):
    model, ids, dense = models["deepseek_v3"]
    with pikv_ds.attach(model, {"compression": {"method": "adaptive"}}) as cache:
        formats = [pool.fmt.label for pool in CacheProbe(cache.core).all_pools]
    assert set(formats) == {"int8+rope", "int4+rope"}
    turned = {"method": "int4", "rotate": "hadamard"}
    with pikv_ds.attach(model, {"compression": turned}) as cache:
        encode = CacheProbe(cache.core).maps(0).k.encode[0]
    rotary = encode.shape[0] - V_DIM
    assert torch.equal(encode[V_DIM:, V_DIM:], torch.eye(rotary)) and not torch.equal(encode[:V_DIM, :V_DIM], torch.eye(V_DIM))
    for block in ({"method": "adaptive"}, turned, {"method": "int4", "raw_recent_tokens": 32}):
        assert 0 < error(model, ids, dense, block)[0] < 0.1


def test_asked_for_without_latents_it_is_refused():
    model = tiny_model("qwen3_moe")
    for block in (
        {"method": "int8", "rope_raw": True},
        {"method": "adaptive", "rope_raw": True},
        {"method": "int8", "v": {"method": "int4", "rope_raw": True}},
        {"layers": {"1": {"method": "fp8_e4m3", "rope_raw": True}}},
    ):
        with pytest.raises(ConfigError, match="rope_raw = true, and the layer stores keys and values of heads"):
            pikv_ds.attach(model, {"compression": block})
    with pytest.raises(ConfigError, match="rope_raw = null or false: 'none' and 'none' keep all columns"):
        pikv_ds.attach(model, {"compression": {"method": "adaptive", "light": "none", "heavy": "none", "rope_raw": True}})
    with pikv_ds.attach(model, {"compression": {"method": "int8"}}) as cache:
        assert {fmt.label for fmt in CacheProbe(cache.core).formats} == {"int8"}
