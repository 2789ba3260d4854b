"""`pikv baseline`: transformers' quantised caches under our tasks; what is not installed is skipped and named."""

import importlib.util
import json

import pytest
import torch

from pikv_ds.errors import ConfigError
from pikv_ds.launch.cli import build_parser, main
from pikv_ds.launch.evaluation.hf_quantized import HFCacheKind, tensors_of

SMALL = ["--context", "128", "--samples", "2", "--tasks", "ppl"]


def test_rows_stand_beside_those_of_eval(tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert main(["baseline", *SMALL, "--caches", "fp8,quanto:4", "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    dense, fp8, *quanto = document["rows"]
    assert dense["method"] == "dense" and fp8["method"] == "QuantizedCache fp8" and set(dense) == set(fp8)
    elements = 4 * 2 * 2 * 32  # layers, K and V, heads, head_dim
    assert dense["bytes_per_token"] == 4 * elements
    assert fp8["bytes_per_token"] == elements + 4 * 2 * 4 / 256  # and a scale of K and of V per layer, for two windows of 128 tokens
    assert 0 < abs(fp8["ppl_change_pct"]) < 5 and fp8["kl"] > 0, "the quantised cache was not read"
    assert document["command"].startswith("pikv baseline --caches fp8,quanto:4") and "--backend" not in document["command"]
    if importlib.util.find_spec("optimum") is None:
        assert not quanto and "QuantizedCache quanto int4 is skipped: You need to install optimum-quanto" in capsys.readouterr().err
    else:
        assert quanto[0]["method"] == "QuantizedCache quanto int4" and quanto[0]["kl"] > 0


def test_every_tensor_of_a_holder_is_found():
    a, b, c = torch.ones(2), torch.ones(3), torch.ones(4)
    assert [t.numel() for t in tensors_of({"meta": (a, {"scale": b}), "rest": [c, 5, None]})] == [2, 3, 4]


def test_refused():
    for given in ("quanto:3", "quanto", "fp8:8", "hqq:x", "awq:4"):
        with pytest.raises(ConfigError, match=f"--caches '{given}': legal are quanto:4, quanto:2, hqq:8"):
            HFCacheKind.parse(given)
    args = build_parser().parse_args(["baseline", "--config", "{}"])
    with pytest.raises(ConfigError, match="--config with pikv baseline"):
        args.run(args)
