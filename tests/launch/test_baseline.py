"""`pikv baseline`: transformers' quantised caches under our tasks, beside ours; what is not installed is named."""

import importlib.util
import json

import pytest
import torch
from transformers import AutoConfig

from pikv_ds.bundled import model_path
from pikv_ds.errors import ConfigError
from pikv_ds.launch.cli import build_parser, main
from pikv_ds.launch.evaluation import baseline
from pikv_ds.launch.evaluation.hf_quantized import PACKAGES, HFCacheKind, bytes_of, tensors_of

SMALL = ["--context", "128", "--samples", "2", "--tasks", "ppl"]
INSTALLED = {"quanto": importlib.util.find_spec("optimum") is not None, "hqq": importlib.util.find_spec("hqq") is not None}


def test_rows_stand_beside_those_of_eval(tmp_path, monkeypatch):
    monkeypatch.setattr(baseline, "DECODED", 4)
    file = tmp_path / "rows.json"
    assert main(["baseline", *SMALL, "--caches", "fp8,pikv:int8", "--repeats", "1", "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    dense, fp8, ours = document["rows"]
    assert [dense["method"], fp8["method"], ours["method"]] == ["dense", "QuantizedCache fp8", "int8"] and set(dense) == set(fp8)
    elements = 4 * 2 * 2 * 32  # layers, K and V, heads, head_dim
    assert dense["bytes_per_token"] == 4 * elements
    assert fp8["bytes_per_token"] == elements + 4 * 2 * 4 / 256  # and a scale of K and of V per layer, for two windows of 128 tokens
    assert 0 < abs(fp8["ppl_change_pct"]) < 5 and fp8["kl"] > 0, "the quantised cache was not read"
    assert ours["config"] == {"compression": {"method": "int8"}} and ours["kl"] > 0 and ours["attention_impl"] != fp8["attention_impl"]
    assert document["command"].startswith("pikv baseline --caches fp8,pikv:int8 --repeats 1") and "--backend" not in document["command"]
    for row in document["rows"]:
        assert len(row["detail"]["step_ms_mean_by_repeat"]) == 1 and 0 < row["detail"]["step_ms_median"] <= row["detail"]["step_ms_most"]
        assert 0 < row["detail"]["step_cpu_ms_mean"] and 0 < row["detail"]["prompt_cpu_ms"]


@pytest.mark.parametrize("backend", [name for name, installed in INSTALLED.items() if not installed])
def test_a_missing_package_is_an_error_of_one_line_and_left_out_of_the_default_list(backend, capsys, monkeypatch):
    assert main(["baseline", *SMALL, "--caches", f"fp8,{backend}:4"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pikv baseline: --caches: QuantizedCache {backend} int4 needs the package {PACKAGES[backend]}: You need to")
    monkeypatch.setattr("pikv_ds.launch.commands.baseline.CACHES", f"{backend}:4,{backend}:2")
    assert main(["baseline", *SMALL]) == 0
    seen = capsys.readouterr()
    assert f"left out: QuantizedCache {backend} int4" in seen.err and f"left out: QuantizedCache {backend} int2" in seen.err
    assert "dense" in seen.out and "QuantizedCache" not in seen.out


@pytest.mark.skipif(not INSTALLED["hqq"], reason="hqq is not installed")
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", [8, 4, 2, 1])
def test_bytes_of_hqq(nbits, axis):
    """Codes, a scale and a zero per group of 64, and the raw tokens since the last encoding."""
    cache = HFCacheKind("hqq", nbits, axis).make(AutoConfig.from_pretrained(model_path()))
    x = torch.randn(2, 2, 64, 32, dtype=torch.bfloat16)
    cache.layers[0].update(x, x.clone())
    encoded = 2 * (x.numel() * nbits // 8 + 2 * 2 * x.numel() // 64)
    assert bytes_of(cache.layers[0]) == encoded
    keys, _ = cache.layers[0].update(x[:, :, :5], x[:, :, :5].clone())
    assert keys.shape == (2, 2, 69, 32) and bytes_of(cache.layers[0]) == encoded + 2 * 2 * 2 * 2 * 5 * 32


def test_a_storage_counts_once():
    whole = torch.zeros(6)
    assert bytes_of([whole, whole[3:], torch.zeros(2)]) == 4 * 8


def test_every_tensor_of_a_holder_is_found():
    a, b, c = torch.ones(2), torch.ones(3), torch.ones(4)
    assert [t.numel() for t in tensors_of({"meta": (a, {"scale": b}), "rest": [c, 5, None]})] == [2, 3, 4]


def test_refused():
    for given in ("quanto:3", "quanto", "fp8:8", "hqq:x", "awq:4", "hqq:4:-1", "quanto:4:1", "hqq:4:1:1", "fp8:0", ""):
        with pytest.raises(ConfigError, match=f"--caches '{given}': legal are quanto:4, quanto:2, hqq:8"):
            HFCacheKind.parse(given)
    with pytest.raises(ConfigError, match="int5"):
        baseline.parse("pikv:int5")
    for wrong, said in ((["--repeats", "-1"], "legal is 0 or more"), (["--repeats", "1"], "the last 128 tokens are timed")):
        args = build_parser().parse_args(["baseline", *SMALL, "--caches", "fp8", *wrong])
        with pytest.raises(ConfigError, match=said):
            args.run(args)
    args = build_parser().parse_args(["baseline", "--config", "{}"])
    with pytest.raises(ConfigError, match="--config with pikv baseline"):
        args.run(args)
