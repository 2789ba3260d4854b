"""`pikv train`: a file, a curve, a picture; killed and resumed; and what is refused before a model is loaded."""

import json

import pytest

from pikv_ds.codecs.part_file import PartFile
from pikv_ds.launch.cli import main

SMALL = ["--context", "128", "--samples", "6", "--steps", "6", "--every", "3"]


def test_a_part_is_trained_resumed_and_written(tmp_path, capsys):
    out, rows = tmp_path / "gate.safetensors", tmp_path / "rows.json"
    assert main(["train", "kv_gate", "--out", str(out), "--json", str(rows), "--facts", "8", *SMALL]) == 0
    document = json.loads(rows.read_text())
    assert [row["step"] for row in document["rows"]] == list(range(6)) and "held_out_objective" in document["rows"][2]
    file = PartFile.load(out, "kv_gate")
    assert len(file.layers) == 4 and len(file.fingerprint) == 4
    assert (file.about["model"], file.about["text"]) == ("model", "bundled") and "torch" in json.loads(file.about["versions"])
    assert json.loads(file.about["fit"])["parameters"] == sum(x.numel() for x in file.weights.values())
    assert out.with_suffix(".png").stat().st_size > 5000
    assert main(["train", "kv_gate", "--out", str(out), "--json", str(rows), "--facts", "8", *SMALL, "--resume"]) == 0
    assert json.loads(rows.read_text())["rows"] == document["rows"], "nothing was left to do"
    assert main(["train", "kv_gate", "--out", str(out), "--facts", "8", *SMALL[:-3], "7", "--every", "3", "--resume"]) == 2
    assert "steps = 6, this one has 7" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given, said",
    [
        (["kv_gates"], "no part 'kv_gates' to train; legal are "),
        (["kv_gate", "--engine", "megatron", "--ranks", "2", "--tp", "3"], "--tp 3 with --ranks 2"),
        (["kv_gate", "--ranks", "2"], "--ranks 2 with --engine local, which is one process"),
        (["kv_gate", "--config", "ds.json"], "--config ds.json is DeepSpeed's"),
        (["kv_gate", "--engine", "megatron", "--dtype", "bfloat16"], "--dtype bfloat16 with --engine megatron"),
        (["kv_gate", "--engine", "deepspeed", "--ep", "2"], 'experts are spread by "expert_parallel" in --config'),
        (["kv_gate", "--engine", "deepspeed", "--config", "none.json"], "no file 'none.json'"),
        (["kv_gate", "--ranks", "0"], "--ranks 0"),
        (["kv_gate", "--set", "page=16"], "legal is NAME=VALUE, with a name among page_size"),
        (["kv_gate", "--text", "/none.txt"], "no text file"),
    ],
)
def test_what_cannot_be_is_refused(given, said, tmp_path, capsys):
    assert main(["train", *given, "--out", str(tmp_path / "x.safetensors")]) == 2
    assert said in capsys.readouterr().err


def test_a_text_that_is_too_short_is_refused(tmp_path, capsys):
    (tmp_path / "short.txt").write_text("A few words.")
    assert main(["train", "kv_gate", "--text", str(tmp_path / "short.txt"), "--out", str(tmp_path / "x.safetensors")]) == 2
    assert "needs two windows" in capsys.readouterr().err
