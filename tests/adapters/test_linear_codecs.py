"""Linear codecs of full rank are the host's own numbers, whatever the family, the chunks and the ids; and what they refuse."""

import pytest
import torch

import pikv_ds
from pikv_ds.adapters.hf.anatomy import find_attentions
from pikv_ds.adapters.hf.fingerprint import key_norms
from pikv_ds.adapters.hf.model_spec import read_model_spec
from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.errors import ConfigError
from tests.calibrations import random_calibration
from tests.dist.jobs.exact import assert_same, generate, generate_sharded
from tests.tiny_models import prompt, tiny_model
from tests.trained_gates import random_gate

FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss")  # full attention, window, sinks and window; head_dim 16
FULL = {
    "lora": {"rank": 16, "fit": "attention"},
    "lora_plus": {"rank": 16, "fit": "attention"},
    "chunk_pca": {"rank": 16, "block": 8},
    "crop": {"rank": 16},
    "prune": {"rank": 16},
    "pyramid": {"rank": 16},
}


def calibration_of(model, folder) -> str:
    """A file of random statistics that knows the model."""
    specs = read_model_spec(model.config)
    norms = [key_norms(a, s.num_kv_heads) for a, s in zip(find_attentions(model), specs, strict=True)]
    path = folder / "calibration.safetensors"
    random_calibration(specs, norms).save(path)
    return str(path)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    found = {}
    for family in FAMILIES:
        model, ids = tiny_model(family), prompt(21, seed=2, batch=2)
        found[family] = (model, ids, calibration_of(model, tmp_path_factory.mktemp(family)), generate(model, ids, new_tokens=12))
    return found


@pytest.mark.parametrize("name", list(FULL))
@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_is_exact(models, family, name):
    model, ids, calibration, dense = models[family]
    block = {"page_size": 4, "storage": {"num_shards": 3}, "compression": {"method": name, "calibration": calibration, **FULL[name]}}
    run = generate_sharded(model, ids, new_tokens=12, config=block)
    assert_same(run, dense, 2e-5)


@pytest.mark.parametrize("storage", [{"expert_ids": "true"}, {"expert_ids": "lookahead"}, {"expert_ids": "hash", "placement": "position"}])
def test_full_rank_is_exact_wherever_ids_come_from(models, storage):
    model, ids, calibration, dense = models["qwen3_moe"]
    block = {"page_size": 4, "compression": {"method": "lora_plus", "rank": 16, "calibration": calibration, "rotate": "hadamard"}}
    run = generate_sharded(model, ids, new_tokens=12, config={**block, "storage": {"num_shards": 2, **storage}})
    assert_same(run, dense, 2e-5)


@pytest.mark.parametrize("columns", [[21], [7, 7, 7], [1] * 21], ids=str)
def test_full_rank_is_exact_in_chunks(models, columns):
    """Each later chunk merges stored coefficients with its own raw keys: a wrong lse would show here."""
    model, ids, calibration, _ = models["gpt_oss"]
    block = {"page_size": 4, "compression": {"method": "lora_plus", "rank": 16, "calibration": calibration}}
    with torch.no_grad():
        want = model(ids).logits
        with pikv_ds.attach(model, block) as cache:
            found = torch.cat([model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(columns, 1)], 1)
    assert (found - want).abs().max() <= 2e-5


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_a_rotation_alone_is_exact(family):
    model, ids = tiny_model(family), prompt(21, seed=2, batch=2)
    run = generate_sharded(model, ids, new_tokens=12, config={"page_size": 4, "compression": {"rotate": "hadamard"}})
    assert_same(run, generate(model, ids, new_tokens=12), 2e-5)


def test_a_low_rank_stores_less_and_changes_logits(models):
    model, ids, calibration, dense = models["qwen3_moe"]
    block = {"page_size": 4, "compression": {"method": "lora_plus", "rank": 8, "calibration": calibration}}
    exact = generate_sharded(model, ids, new_tokens=12, config={"page_size": 4})
    run = generate_sharded(model, ids, new_tokens=12, config=block)
    assert run.difference(dense) > 1e-3
    assert run.stats["kv_bytes_allocated"] < 0.56 * exact.stats["kv_bytes_allocated"]  # (128 + 4) / (256 + 4), padding included


def test_beams_and_windows_at_full_rank(models):
    model, ids, calibration, _ = models["mixtral"]
    block = {"page_size": 4, "compression": {"method": "lora_plus", "rank": 16, "calibration": calibration}}
    want = generate(model, ids, new_tokens=10, num_beams=3)
    assert_same(generate_sharded(model, ids, new_tokens=10, num_beams=3, config=block), want, 2e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("columns", [[21], [5, 16], [7, 7, 7], [1] * 21], ids=str)
def test_svd_of_full_rank_is_exact_through_its_turns(models, family, columns):
    """A prompt in chunks changes its bases: what is stored is turned with them. Requests are fitted up to 14 tokens."""
    model, ids, _, _ = models[family]
    block = {"page_size": 4, "storage": {"num_shards": 3}, "compression": {"method": "svd", "rank": 16, "fit_tokens": 14}}
    with torch.no_grad():
        want = model(ids).logits
        with pikv_ds.attach(model, block) as cache:
            found = torch.cat([model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(columns, 1)], 1)
            probe = CacheProbe(cache.core)
            pages = sum(pool.nbytes for pool in probe.all_pools)
            kept = 2 * 2 * 2 * 2 * 16 * 16 * 4  # layers, sides, rows, heads, head_dim, rank, bytes: the sums are gone
            assert cache.stats()["kv_bytes_allocated"] == pages + probe.bases_bytes == pages + kept
    assert (found - want).abs().max() <= 2e-5


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}], ids=str)
def test_svd_follows_beams(models, options):
    model, ids, _, _ = models["mixtral"]
    block = {"page_size": 4, "compression": {"method": "svd", "rank": 16, "store": "none", "fit_tokens": 64}}
    want = generate(model, ids, new_tokens=24, **options)
    assert_same(generate_sharded(model, ids, new_tokens=24, config=block, **options), want, 2e-5)


def test_what_svd_cannot_be_combined_with(models):
    svd = {"method": "svd", "rank": 16}
    for block, said in (
        ({"compression": {"rank": 24, "method": "svd"}}, "rank = 24 is larger than k_dim = 16"),
        ({"compression": {**svd, "k": {"method": "int8"}}}, "another codec in pikv.compression.k.* its bases belong to requests"),
        ({"compression": {"v": svd}}, "another codec in pikv.compression.v.* its bases belong to requests"),
        ({"compression": {"layers": {"0": svd}}}, "another codec in pikv.compression.layers.0.* its bases belong to requests"),
        ({"compression": svd, "scheduling": {"method": "expected_attention", "budget_tokens": 128}}, "it needs the model's own queries"),
    ):
        with pytest.raises(ConfigError, match=said):
            pikv_ds.attach(models["qwen3_moe"][0], block)


def test_keys_and_values_and_layers_by_codecs_of_their_own(models):
    model, ids, calibration, dense = models["qwen3_moe"]
    linear = {"method": "lora", "rank": 16, "calibration": calibration}
    for compression in ({"v": linear}, {"k": linear}, {"layers": {"1": linear}}, {**linear, "layers": {"0": {"method": "none"}}}):
        run = generate_sharded(model, ids, new_tokens=12, config={"page_size": 4, "compression": compression})
        assert_same(run, dense, 2e-5)


def refused(models, compression, family="qwen3_moe"):
    with pytest.raises(ConfigError) as error:
        pikv_ds.attach(models[family][0], {"compression": compression})
    return str(error.value)


def test_what_is_refused_at_construction(models, tmp_path):
    own, other = models["qwen3_moe"][2], models["gpt_oss"][2]
    lora = {"method": "lora", "rank": 16, "calibration": own}
    assert "rank = 24 is larger than k_dim = 16" in refused(models, {**lora, "rank": 24})
    assert "multiple of 8" in refused(models, {**lora, "rank": 12})
    assert "No such file" in refused(models, {**lora, "calibration": str(tmp_path / "none.safetensors")})
    assert "made with other weights" in refused(models, {**lora, "calibration": other})
    assert "is larger than" in refused(models, {"k": {**lora, "rank": 24}})
    text = tmp_path / "text.safetensors"
    text.write_text("not a tensor file")
    assert "readable safetensors" in refused(models, {**lora, "calibration": str(text)})
    for store in ("lora", "svd", "adaptive"):
        assert "store = one of 'fp4_e2m1', 'fp8_e4m3', 'int2'" in refused(models, {**lora, "store": store})
        assert "store = one of" in refused(models, {"method": "svd", "rank": 16, "store": store})
    assert "got 'svd'" in refused(models, {"method": "adaptive", "heavy": "svd"})
    assert "group = null with store 'none'" in refused(models, {**lora, "group": 64})
    assert "layers.7" in refused(models, {"layers": {"7": {"method": "none"}}})


def test_methods_that_need_the_models_own_queries_are_refused(models, tmp_path):
    random_gate(tmp_path / "gate.safetensors", read_model_spec(models["qwen3_moe"][0].config))
    for compression in ({"method": "lora", "rank": 16, "calibration": models["qwen3_moe"][2]}, {"rotate": "hadamard"}):
        for block in (
            {"scheduling": {"method": "expected_attention", "budget_tokens": 80}},
            {"routing": {"method": "learned", "path": str(tmp_path / "gate.safetensors"), "budget_ratio": 0.5}},
        ):
            with pytest.raises(ConfigError, match="it needs the model's own queries|fitted to the model's own queries"):
                pikv_ds.attach(models["qwen3_moe"][0], {**block, "compression": compression})


def test_another_geometry_and_a_latent_are_refused(models, tmp_path):
    wide = tiny_model("qwen3_moe", head_dim=32)
    with pytest.raises(ConfigError, match="holds 2 KV heads of width 16 and 16 in layer 0, the model has 2 of 32 and 32"):
        pikv_ds.attach(wide, {"compression": {"method": "lora", "rank": 16, "calibration": models["qwen3_moe"][2]}})
    latent = tiny_model("deepseek_v3")
    with pytest.raises(ConfigError, match="stores a latent"):
        pikv_ds.attach(latent, {"compression": {"method": "lora", "rank": 16, "calibration": models["qwen3_moe"][2]}})
    with pytest.raises(ConfigError, match="its values are columns of its keys"):
        pikv_ds.attach(latent, {"compression": {"v": {"method": "none"}}})


def test_weights_in_another_dtype_are_the_same_model(models):
    model = tiny_model("qwen3_moe").to(torch.bfloat16)
    with pikv_ds.attach(model, {"compression": {"method": "lora", "rank": 16, "calibration": models["qwen3_moe"][2]}}) as cache:
        assert CacheProbe(cache.core).formats[0].name == "bf16"


def test_keys_and_values_in_record_formats_of_their_own(models):
    model, ids, calibration, _ = models["qwen3_moe"]
    low = {"method": "lora_plus", "rank": 8, "store": "int8", "calibration": calibration}
    for compression, label in (({"method": "int8", "v": {"method": "fp8_e4m3"}}, "int8/fp8_e4m3"), ({"v": low}, "fp32/int8")):
        with pikv_ds.attach(model, {"compression": compression}) as cache, torch.no_grad():
            found = torch.cat([model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(7, 1)], 1)
            formats = CacheProbe(cache.core).formats
        assert {fmt.label for fmt in formats} == {label} and bool(found.isfinite().all())
