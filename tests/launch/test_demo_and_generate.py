"""`pikv demo` and `pikv generate` as a user runs them."""

import json
import sys

import pytest

from pikv_ds.launch.cli import main
from pikv_ds.launch.ranks import RanksFailed, run_ranks
from tests.dist.launcher import run_commands

# A machine that others use too takes minutes to start ranks; nothing here may hang for longer.
pytestmark = pytest.mark.timeout(660)


def pikv(*arguments: object, timeout_s: float = 600):
    return run_commands([[sys.executable, "-m", "pikv_ds.launch.cli", *map(str, arguments)]], ranks=1, timeout_s=timeout_s)


@pytest.mark.dist
@pytest.mark.slow
def test_demo_shows_the_same_tokens_in_half_the_bytes(tmp_path):
    file = tmp_path / "demo.json"
    result = pikv("demo", "--context", 400, "--new-tokens", 12, "--json", file)
    assert result.returncode == 0, result.describe()
    document = json.loads(file.read_text())
    assert document["command"].startswith("demo") and document["versions"]["deepspeed"]
    rows = {row["name"]: row for row in document["rows"]}
    assert list(rows) == ["dense", "pikv", "dense-distinct", "pikv-distinct"]
    assert all(row["tokens_equal"] and row["ranks"] == 2 and row["tokens_per_s"] > 0 for row in rows.values())
    assert all(row["max_logit_diff"] < 5e-5 for row in rows.values())
    assert rows["pikv"]["context_tokens"] == [400, 400] and rows["pikv-distinct"]["context_tokens"] == [400, 64]
    # 2 KV heads x 32 x K and V x 4 bytes, 4 layers; the last token is never fed back.
    assert rows["dense"]["kv_bytes_per_rank"] == [4 * 512 * (400 + 11)] * 2
    assert max(rows["pikv"]["kv_bytes_per_rank"]) < 0.7 * max(rows["dense"]["kv_bytes_per_rank"])
    for name in ("pikv", "pikv-distinct"):
        dense_entries = rows["dense" + name[4:]]["entries_per_rank"]
        total = dense_entries[0] if name == "pikv" else sum(dense_entries)
        assert sum(rows[name]["entries_per_rank"]) == total
        assert sum(map(sum, rows[name]["entries_per_expert"])) == total
    assert "question: What is the pass key?" in result.output and "answer:  ' 66048" in result.output


def test_demo_refuses_what_the_bundled_model_cannot_do(capsys):
    assert main(["demo", "--context", "9000"]) == 2
    assert "--context 9000: legal with --new-tokens 24 is 64 to 4072" in capsys.readouterr().err
    assert main(["demo", "--ranks", "3"]) == 2
    assert "--ranks 3" in capsys.readouterr().err
    assert main(["demo", "--new-tokens", "1"]) == 2


def test_generate_on_one_rank_streams_text_and_writes_rows(tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert (
        main(
            [
                "generate",
                "--prompt",
                "The king of",
                "--prompt",
                "In 1998 the",
                "--max-new-tokens",
                "8",
                "--dtype",
                "float32",
                "--json",
                str(file),
            ]
        )
        == 0
    )
    rows = json.loads(file.read_text())["rows"]
    out = capsys.readouterr().out
    assert [row["prompt"] for row in rows] == ["The king of", "In 1998 the"]
    for row in rows:
        assert row["prompt"] + row["text"] in out and row["new_tokens"] == 8
        assert row["stats"]["entries_live"] == 4 * (row["prompt_tokens"] + 7)


@pytest.mark.dist
@pytest.mark.slow
def test_generate_on_two_ranks_gives_the_text_of_one(tmp_path):
    prompts, config = tmp_path / "prompts.txt", tmp_path / "ds.json"
    prompts.write_text("word " * 150 + "\n")
    config.write_text(json.dumps({"expert_parallel": {"enabled": True, "autoep_size": 2}, "pikv": {"page_size": 16}}))
    common = ["--prompts-file", prompts, "--max-new-tokens", 8, "--dtype", "float32"]
    assert main([str(arg) for arg in ("generate", *common, "--json", tmp_path / "one.json")]) == 0
    result = pikv("generate", *common, "--ranks", 2, "--chunk", 64, "--config", config, "--json", tmp_path / "two.json")
    assert result.returncode == 0, result.describe()
    one, two = (json.loads((tmp_path / name).read_text())["rows"][0] for name in ("one.json", "two.json"))
    assert two["text"] == one["text"] and two["text"] in result.output
    assert len(two["kv_bytes_per_rank"]) == 2 and max(two["kv_bytes_per_rank"]) < one["kv_bytes_per_rank"][0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompts-file", "no_such_file.txt"], "no prompts file"),
        (["--model", "no_such_folder"], "no_such_folder"),
    ],
)
def test_generate_mistakes_are_told_before_ranks_start(arguments, message, capsys):
    assert main(["generate", "--ranks", "2", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_generate_checks_the_block_before_ranks_start(tmp_path, capsys):
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"pikv": {"page_sise": 8}}))
    assert main(["generate", "--ranks", "2", "--config", str(config)]) == 2
    assert "page_sise" in capsys.readouterr().err


@pytest.mark.dist
def test_failed_ranks_show_the_end_of_their_log():
    with pytest.raises(RanksFailed, match="(?s)json.tool on 1 ranks ended with status .*no_such_file"):
        run_ranks("json.tool", ["no_such_file"], 1)
