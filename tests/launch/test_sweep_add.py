"""`pikv sweep --add`: rows grow in the file itself, and what it holds is not measured again, on another machine either."""

import json

import pytest

from pikv_ds.launch.cli import main
from pikv_ds.launch.evaluation.grown import key_of_item, key_of_row
from pikv_ds.launch.evaluation.sweep import items_of, read_sweep
from tests.launch.test_sweep import SHORT, parse, small

PPL = {"options": {**SHORT, "scored": 64, "prefill_chunk": 128}, "tasks": ["ppl"]}


def test_rows_are_added_and_those_that_are_there_are_kept(tmp_path, capsys):
    file, out = small(tmp_path, runs=[PPL]), tmp_path / "rows.json"
    words = ["sweep", str(file), "--add", "--workers", "1", "--json", str(out)]
    assert main(words) == 0
    document = json.loads(out.read_text())
    assert [row["detail"]["label"] for row in document["rows"]] == ["dense", "four bits", "raw"]
    assert all(row["detail"]["cpu_s"] > 0 and row["detail"]["cpu"] == document["machine"]["cpu"] for row in document["rows"])

    items = items_of(read_sweep(file), None, False, parse, {})
    assert [key_of_item(item) for item in items] == [key_of_row(row) for row in document["rows"]]

    # From another machine, of an older version: it stays. A row less and a longer list: both are measured.
    document["machine"]["cpu"], document["versions"]["pikv-ds"] = "another", "0.0.0"
    for row in document["rows"]:
        del row["detail"]["cpu"]
    lost = document["rows"].pop()
    document["rows"][1]["ppl"] = 1.0
    out.write_text(json.dumps(document))
    entries = json.loads(file.read_text())["families"]["own"]["entries"]
    small(tmp_path, runs=[PPL], entries=[*entries, {"label": "eight bits", "pikv": {"compression": {"method": "int8"}}}])
    assert main(words) == 0
    rows = {row["detail"]["label"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["dense", "four bits", "raw", "eight bits"] and rows["four bits"]["ppl"] == 1.0
    assert rows["raw"]["ppl"] == pytest.approx(lost["ppl"], abs=1e-3)
    assert rows["four bits"]["detail"]["cpu"] == "another" != rows["raw"]["detail"]["cpu"]
    assert "4 units, 2 of them measured already" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.json", "sweep.json"]


def test_a_row_is_found_by_all_that_decides_it(tmp_path):
    """Another label, length, seed or block is another unit."""
    document = read_sweep(small(tmp_path, runs=[PPL]))
    item = items_of(document, None, False, parse, {})[1]
    others = [items_of(document, None, False, parse, {}, None, 512)[1]]
    for name, value in (("seed", 7), ("samples", 4), ("scored", 32), ("prefill_chunk", 64), ("dtype", "bfloat16"), ("chunk", 4)):
        run = {"options": PPL["options"] | {name: value}, "tasks": ["ppl"]}
        others.append(items_of(read_sweep(small(tmp_path, runs=[run])), None, False, parse, {})[1])
    others.append(items_of(read_sweep(small(tmp_path, runs=[PPL | {"pikv": {"page_size": 64}}])), None, False, parse, {})[1])
    others.append(item._replace(label="of another name"))
    keys = [key_of_item(other) for other in (item, *others)]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(("text", "said"), [("{", "it is not JSON"), ('{"rows": [{"detail": {}}]}', "other rows than those of a sweep")])
def test_other_files_are_not_added_to(tmp_path, capsys, text, said):
    (tmp_path / "rows.json").write_text(text)
    assert main(["sweep", str(small(tmp_path)), "--add", "--json", str(tmp_path / "rows.json")]) == 2
    assert said in capsys.readouterr().err and (tmp_path / "rows.json").read_text() == text
    assert main(["sweep", str(small(tmp_path)), "--add"]) == 2
    assert "--add without --json" in capsys.readouterr().err
