import json

from pikv_ds.launch.bench import merge as bench_merge
from pikv_ds.launch.cli import main


def test_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_merge, "SHAPES", {"decode": (1, 1), "chunk": (2, 5)})
    file = tmp_path / "rows.json"
    assert main(["bench", "merge", "--repeats", "2", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(row["shape"], row["sets"], row["from"]) for row in rows] == [
        (shape, sets, how) for shape in ("decode", "chunk") for sets in (2, 4, 8) for how in ("stack", "ranks")
    ]
    for row in rows:
        assert 0 < row["op_rms"] <= 1.02 * row["torch_rms"] < 1e-6 and row["op_lse"] <= 1e-6
        assert row["op_us"] > 0 and row["torch_us"] > 0 and row["p20"] <= row["op / torch"] <= row["p80"]
