"""The gate that comes with the package: it is of the bundled model, and finds what `bounds` does not in the same bytes."""

import pytest
import torch

import pikv_ds
from pikv_ds import bundled
from pikv_ds.adapters.hf.record import Recorder
from pikv_ds.bundled.recall import Prose, recall_prompt
from pikv_ds.codecs.part_file import PartFile
from pikv_ds.errors import ConfigError
from pikv_ds.training.attended import attended, chosen
from pikv_ds.training.parts import PARTS

BLOCK = {"page_size": 16, "routing": {"method": "learned", "budget_ratio": 0.125, "sink_tokens": 4, "recent_tokens": 16}}


def test_it_holds_more_of_the_attention_of_answers_than_its_first_weights():
    """On facts and text that it was not trained on; the oracle is above both."""
    model, tokenizer = bundled.load()
    prose = Prose(tokenizer, bundled.evaluation_text())
    prompt = recall_prompt(prose, 512, kind="code", depth=0.4, seed=11)
    ids = torch.tensor([prompt.ids])
    window, at = Recorder(model, ids)[0], torch.arange(512 - prompt.question_tokens, 512)
    file = PartFile.load(bundled.trained_path(), "kv_gate")
    part, held = PARTS.build("kv_gate", **file.options), {}
    from pikv_ds.routers.kv_gate import KVGate

    trained, first = (KVGate(file.layers, bits=2, rank=None, totals=4).requires_grad_(False) for _ in range(2))
    trained.load_state_dict(dict(file.weights))
    part.begin(first, [Recorder(model, torch.tensor([prose.ids[:512]]))[0]])
    for i, layer in enumerate(window.layers):
        seen = attended(layer, at, 16, 4, 16)
        scores = {"trained": trained(i, seen.q, seen.keys, 16), "first": first(i, seen.q, seen.keys, 16), "oracle": seen.mass}
        for name, score in scores.items():
            held.setdefault(name, []).append((seen.mass * chosen(score, seen, at, 0.125, 16)).sum(-1).mean())
    means = {name: float(torch.stack(x).mean()) for name, x in held.items()}
    assert means["first"] + 0.01 < means["trained"] <= means["oracle"] + 1e-6, means


def test_the_model_runs_with_it_and_another_is_refused():
    model, tokenizer = bundled.load()
    block = {**BLOCK, "routing": {**BLOCK["routing"], "path": str(bundled.trained_path())}}
    ids = torch.tensor([tokenizer(bundled.haystack(), add_special_tokens=False, verbose=False)["input_ids"][:300]])
    with torch.no_grad(), pikv_ds.attach(model, block) as cache:
        for part in ids.split(32, 1):
            assert torch.isfinite(model(part, past_key_values=cache).logits).all()
        assert cache.stats()["entries_read"] < 0.6 * cache.stats()["entries_visible"]
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.endswith("layers.2.self_attn.k_proj.weight")).mul_(1.2)
    with pytest.raises(ConfigError, match=r"pikv.routing.path = .* was trained on other weights \(model\): the key projection of layer 2"):
        pikv_ds.attach(model, block)


def test_no_other_part_comes_with_the_package():
    with pytest.raises(FileNotFoundError, match="no trained 'eviction' comes with the package, only kv_gate"):
        bundled.trained_path("eviction")
