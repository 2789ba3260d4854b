"""The examples that fit weights: what they write is what the methods read, and has learned something."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pikv_ds
from pikv_ds import bundled

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    def example(name: str, *options: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *options])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return example


def generated(block: dict) -> dict:
    """Statistics of the bundled model after a prompt of 150 tokens and 4 steps with this block."""
    model, tokenizer = bundled.load()
    ids = torch.tensor([tokenizer(bundled.haystack(), add_special_tokens=False, verbose=False)["input_ids"][:150]])
    with torch.no_grad(), pikv_ds.attach(model, block) as cache:
        for part in ids.split(50, 1):
            token = model(part, past_key_values=cache).logits[:, -1:].argmax(-1)
        for _ in range(4):
            token = model(token, past_key_values=cache).logits.argmax(-1)
        return cache.stats()


SMALL = {"sink_tokens": 2, "recent_tokens": 8}


def test_quest_mlp(run, tmp_path):
    path = str(tmp_path / "mlp.safetensors")
    text = run("fit_quest_mlp.py", path, "--windows", "4", "--context", "192", "--steps", "120", "--facts")
    explained = [float(x) for x in text.rpartition("by layer: ")[2].split(",")]
    assert max(explained) > 0.15, text
    stats = generated({"page_size": 4, "scheduling": {"method": "quest_mlp", "path": path, "budget_ratio": 0.5, **SMALL}})
    assert stats["entries_evicted"] >= 4 * 70


def test_duo_heads(run, tmp_path):
    path = str(tmp_path / "heads.safetensors")
    run("fit_duo_heads.py", path, "--prompts", "2", "--context", "192")
    heads = load_file(path)["heads"]
    assert heads.shape == (4, 2) and heads.max() == 1 and heads.min() < 0.1, "heads differ"
    heads = {"method": "duo_heads", "path": path, "head_budget": "adaptive", "head_floor": 0.0}
    stats = generated({"page_size": 4, "scheduling": {**heads, "budget_ratio": 0.5, **SMALL}})
    assert stats["entries_evicted"] > 0
