import json

from pikv_ds.launch.bench import step as bench_step
from pikv_ds.launch.cli import main


def test_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_step, "LAYERS", (1, 2))
    file = tmp_path / "rows.json"
    assert main(["bench", "step", "--context", "96", "--turns", "2", "--profile", "--json", str(file)]) == 0
    one, two, split, *found = json.loads(file.read_text())["rows"]
    for row in (one, two):
        assert row["python_us"] == row["pikv_us"] - row["bare_us"] - row["ops_us"] and row["steps"] == 2 * bench_step.TURN
        assert 0 < row["ops_us"] < row["pikv_us"]
    assert 1.2 * one["ops_us"] < two["ops_us"] < 4 * one["ops_us"], "the ops of every layer are there"
    assert split["python_us_per_layer"] == two["python_us"] - one["python_us"]
    calls = {row["function"]: row["calls"] for row in found}
    assert calls["pikv_ds/adapters/hf/attention.py: pikv_attention"] == 2, "a call in each layer"
    assert split["calls_per_step"] == sum(calls.values())
