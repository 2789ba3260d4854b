"""rope "pre" on transformers models: the rotation is the model's own or refused, and at full rank nothing changes."""

from dataclasses import replace

import pytest
import torch

import pikv_ds
from pikv_ds import bundled
from pikv_ds.adapters.hf.anatomy import find_attentions
from pikv_ds.adapters.hf.calibrate import calibrate, check_rotation
from pikv_ds.adapters.hf.fingerprint import key_norms
from pikv_ds.adapters.hf.model_spec import read_model_spec
from pikv_ds.adapters.hf.rotation import inv_freq_of
from pikv_ds.codecs.rope import rotate
from pikv_ds.errors import ConfigError, UnsupportedError
from tests.calibrations import random_calibration
from tests.dist.jobs.exact import assert_same, generate, generate_sharded
from tests.tiny_models import prompt, tiny_model

FAMILIES = ("qwen3_moe", "mixtral")  # full attention; window of 8
TOKENS = 256


def calibration_of(model, folder, rotations=None) -> str:
    """A file of random statistics that knows the model and, unless others are given, its rotations."""
    specs = read_model_spec(model.config)
    norms = [key_norms(a, s.num_kv_heads) for a, s in zip(find_attentions(model), specs, strict=True)]
    path = folder / "calibration.safetensors"
    random_calibration(specs, norms, rotations or [inv_freq_of(model.config, spec) for spec in specs]).save(path)
    return str(path)


def block(calibration, **options) -> dict:
    return {"page_size": 4, "compression": {"method": "lora_plus", "rank": 16, "rope": "pre", "calibration": calibration} | options}


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_is_exact(family, options, tmp_path):
    model, ids = tiny_model(family), prompt(21, seed=2, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0  # left padding
    config = block(calibration_of(model, tmp_path)) | {"storage": {"num_shards": 3}}
    run = generate_sharded(model, ids, mask, new_tokens=10, config=config, **options)
    assert_same(run, generate(model, ids, mask, new_tokens=10, **options), 1e-5)
    assert run.stats["attention_impl"] == "pikv torch fp32"


@pytest.mark.parametrize("blocks", [
    {"routing": {"method": "bounds", "budget_pages": 60}}, {"scheduling": {"method": "h2o", "budget_tokens": 40}},
    {"compression": {"raw_sink_tokens": 2, "raw_recent_tokens": 5}, "routing": {"method": "centroids", "budget_pages": 60}},
], ids=["bounds", "h2o", "raw window, centroids"])  # fmt: skip
def test_full_rank_is_exact_with_what_looks_at_keys(blocks, tmp_path):
    """Beams, left padding, shards; a budget that holds everything."""
    model, ids = tiny_model("qwen3_moe"), prompt(21, seed=2, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    pins = {"sink_tokens": 2, "recent_tokens": 6}
    config = block(calibration_of(model, tmp_path), **blocks.get("compression", {})) | {"storage": {"num_shards": 3}}
    config |= {name: blocks[name] | pins for name in ("routing", "scheduling") if name in blocks}
    run = generate_sharded(model, ids, mask, new_tokens=10, config=config, num_beams=3)
    assert_same(run, generate(model, ids, mask, new_tokens=10, num_beams=3), 1e-5)
    assert run.stats["attention_impl"].startswith("pikv torch")


@pytest.fixture(scope="module")
def calibrated():
    """The bundled model, a window of text, and the calibration on it."""
    model, tokenizer = bundled.load()
    ids = tokenizer(bundled.calibration_text()[:8_000], add_special_tokens=False, verbose=False)["input_ids"][: 2 * TOKENS]
    windows = torch.tensor(ids).view(2, TOKENS)
    return model, windows, calibrate(model, windows, lambda done: None, {})


def test_bundled_model_at_full_rank(calibrated, tmp_path):
    model, windows, found = calibrated
    found.save(tmp_path / "c.safetensors")
    config = {"compression": {"method": "lora", "rank": 32, "rope": "pre", "calibration": str(tmp_path / "c.safetensors")}}
    with torch.no_grad():
        want = model(windows).logits
        with pikv_ds.attach(model, config) as cache:
            parts = windows.split([100, 100, 50, *[1] * 6], 1)
            got = torch.cat([model(part, past_key_values=cache, use_cache=True).logits for part in parts], 1)
    assert (got - want).abs().max() <= 5e-5


def test_the_statistics_are_those_of_keys_before_the_rotation(calibrated):
    """As the layer computes them before it rotates: k_norm(k_proj(x)). They take up less of the space than rotated ones."""
    model, windows, found = calibrated
    attention, kept = model.model.layers[1].self_attn, []
    hook = attention.k_norm.register_forward_hook(lambda module, args, out: kept.append(out.flatten(0, 1).double()))
    with torch.no_grad():
        model(windows)
    hook.remove()
    spec, k = read_model_spec(model.config)[1], torch.cat(kept)
    moments = found.unrotated_keys(spec)
    assert torch.allclose(moments.mean, k.mean(0), atol=1e-4)
    assert torch.allclose(moments.second, torch.einsum("nhi,nhj->hij", k, k) / len(k), atol=1e-3)
    tails = [torch.linalg.eigvalsh(x.second)[:, :16].sum() / x.energy.sum() for x in (moments, found.keys(spec))]
    print(f"energy beyond 16 of 32 directions: {float(tails[0]):.4f} before, {float(tails[1]):.4f} after the rotation")
    assert tails[0] < 0.3 * tails[1]


def test_a_rotation_that_is_not_undone_is_found_out(calibrated):
    """Whatever the configuration says: what counts is what happens to keys of the same tokens further on."""
    model, windows, _ = calibrated
    specs = read_model_spec(model.config)
    own = [inv_freq_of(model.config, spec) for spec in specs]
    check_rotation(model, specs, own)
    with pytest.raises(UnsupportedError, match="layer 2 of .* does not rotate its keys by halves"):
        check_rotation(model, specs, [*own[:2], own[2] * 1.01, own[3]])
    wrong = tiny_model("qwen3_moe")
    rotary = wrong.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq * 0  # a model without positions that says it has them
    found = calibrate(wrong, prompt(32, seed=1, batch=1), lambda done: None, {})
    assert "does not rotate its keys" in found.about["rope"] and "0.inv_freq" not in found.tensors


def test_other_rotations_are_refused_by_name(tmp_path):
    model = tiny_model("qwen3_moe")
    spec = read_model_spec(model.config)[0]
    path = calibration_of(model, tmp_path)
    for change, said in (
        ({"rope_type": "linear", "factor": 2.0}, "has rope_type 'linear'"),
        ({"partial_rotary_factor": 0.5}, "has partial_rotary_factor 0.5"),
        ({"rope_theta": 20_000.0}, "undoes another rotation than layer 0 has"),
    ):
        model.config.rope_parameters = {"rope_type": "default", "rope_theta": 10_000.0} | change
        for window in ({}, {"raw_recent_tokens": 4}):  # un-rotated keys in the only pool, or in the far one
            with pytest.raises(ConfigError, match=said):
                pikv_ds.attach(model, block(path, **window))
    with pytest.raises(UnsupportedError, match="a latent"):
        inv_freq_of(model.config, replace(spec, latent=True))
    yarn = tiny_model("gpt_oss")
    with pytest.raises(ConfigError, match="has rope_type 'yarn'; only 'default' is undone; legal is 'post'"):
        pikv_ds.attach(yarn, block(calibration_of(yarn, tmp_path, [torch.ones(8)] * 2)))
    found = calibrate(yarn, prompt(16, seed=1, batch=1), lambda done: None, {})
    found.save(tmp_path / "yarn.safetensors")
    with pytest.raises(ConfigError, match="before their rotation: layer 0 of model_type 'gpt_oss' has rope_type 'yarn'"):
        pikv_ds.attach(yarn, block(str(tmp_path / "yarn.safetensors")))


def test_turned_keys_are_those_of_transformers():
    model = tiny_model("mixtral")
    x, at = torch.randn(1, 9, 2, 16), torch.arange(300, 309)
    cos, sin = model.model.rotary_emb(x, at[None])
    half = torch.cat([-x[..., 8:], x[..., :8]], -1)
    want = x * cos.unsqueeze(2) + half * sin.unsqueeze(2)
    assert (rotate(x, at[None], inv_freq_of(model.config, read_model_spec(model.config)[0])) - want).abs().max() < 1e-6
