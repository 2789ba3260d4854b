"""`pikv calibrate`: what it writes is what the model computes; one file for both hosts' keys; refusals."""

import json

import pytest
import torch
from transformers import DynamicCache

from pikv_ds import bundled
from pikv_ds.codecs import CODECS, calibration
from pikv_ds.launch.cli import main
from pikv_ds.launch.commands.calibrate import error_row
from pikv_ds.spec import LayerSpec

SPEC = LayerSpec(layer_idx=1, num_kv_heads=2, k_dim=32, v_dim=32)
SMALL = ["--context", "128", "--samples", "2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrate")
    file, rows = folder / "calibration.safetensors", folder / "rows.json"
    assert main(["calibrate", "--codec", "distill", "--steps", "2", *SMALL, "--out", str(file), "--json", str(rows)]) == 0
    return file, json.loads(rows.read_text())["rows"]


def test_the_moments_are_those_of_the_keys_and_values_in_a_cache(made):
    found = calibration.load(str(made[0]))
    model, tokenizer = bundled.load()
    ids = tokenizer(bundled.calibration_text(), add_special_tokens=False, verbose=False)["input_ids"]
    windows = [ids[i * (len(ids) // 128) // 2 * 128 :][:128] for i in range(2)]
    parts = []
    with torch.no_grad():
        for window in windows:
            cache = DynamicCache(config=model.config)
            model(torch.tensor([window]), past_key_values=cache, use_cache=True)
            parts.append((cache.layers[1].keys[0].double(), cache.layers[1].values[0].double()))  # [H, N, D]
    for side, moments in enumerate((found.keys(SPEC), found.values(SPEC))):
        x = torch.cat([part[side] for part in parts], 1)
        assert torch.allclose(moments.mean, x.mean(1), atol=1e-4)
        assert torch.allclose(moments.second, x.mT @ x / x.shape[1], atol=1e-3)
    weight = model.model.layers[1].self_attn.o_proj.weight.detach().double().view(192, 2, 4, 32)
    assert torch.allclose(found.values(SPEC).metric[1], sum(weight[:, 1, g].mT @ weight[:, 1, g] for g in range(4)) / 4, atol=1e-4)
    assert found.about["tokens"] == "256" and found.about["context"] == "128" and found.num_layers == 4


def test_it_holds_what_the_codec_learns_and_says_what_is_lost(made):
    file, rows = made
    assert calibration.load(str(file)).heads("distill_decode", SPEC).shape == (2, 16, 32)
    assert all(row["k_lost_pre"] is None for row in rows), "distill is trained on rotated keys"
    assert [row["layer"] for row in rows] == [0, 1, 2, 3] and all(0 < row[side] < 0.6 for row in rows for side in ("k_lost", "v_lost"))


def test_less_is_lost_of_keys_before_their_rotation(made):
    found = calibration.load(str(made[0]))
    for name in ("lora", "lora_plus", "chunk_pca"):
        row = error_row(CODECS.get(name), found, SPEC, 16)
        assert 0 < row["k_lost_pre"] < 0.5 * row["k_lost"], row


def test_a_distilled_file_serves_other_codecs_but_no_other_rank(made, capsys):
    block = {"compression": {"method": "lora_plus", "rank": 24, "calibration": str(made[0])}}
    options = ["--context", "64", "--samples", "1", "--chunk", "1", "--tasks", "ppl"]
    assert main(["eval", "--config", json.dumps(block), *options]) == 0
    block["compression"]["method"] = "distill"
    assert main(["eval", "--config", json.dumps(block), *options]) == 2
    assert "rank = 16, for which calibration" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--codec", "int8"], "--codec 'int8': legal are chunk_pca, crop"),
        (["--codec", "lora", "--rank", "12"], "--rank 12: legal for this model is a multiple of 8 from 8 to 32"),
        (["--codec", "lora", "--rank", "40"], "--rank 40: legal for this model is a multiple of 8 from 8 to 32"),
        (["--codec", "lora", "--text", "absent.txt"], "no text file 'absent.txt'"),
        (["--codec", "lora", "--context", "1000000"], "the text has"),
        (["--codec", "lora", "--model", "absent"], "no model folder or config.json"),
    ],
    ids=lambda value: "_".join(value[2:]) if isinstance(value, list) else "",
)
def test_bad_arguments(options, said, tmp_path, capsys):
    assert main(["calibrate", "--out", str(tmp_path / "c.safetensors"), *options]) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_no_folder_to_write_to(tmp_path, capsys):
    assert main(["calibrate", "--codec", "lora", "--out", str(tmp_path / "absent" / "c.safetensors")]) == 2
    assert "no folder" in capsys.readouterr().err
