import json
import shlex

import pytest
import torch

from pikv_ds import bundled
from pikv_ds.codecs import CODECS
from pikv_ds.launch import tested_versions
from pikv_ds.launch.cli import build_parser, main
from pikv_ds.launch.output import human_bytes, print_table
from pikv_ds.pages.estimate import dense_bytes, pikv_bytes
from pikv_ds.policies import POLICIES
from pikv_ds.routers import ROUTERS


def run_json(tmp_path, *argv, more=()):
    """Run a command with --json and give back what it wrote. more: what it writes besides rows."""
    path = tmp_path / "out.json"
    assert main([*argv, "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert list(document) == ["command", "versions", "machine", "rows", *more]
    assert document["command"] == shlex.join(argv)
    assert set(document["machine"]) == {"cpu", "cores", "memory_gib", "gpu"}
    assert document["versions"]["pikv-ds"] and document["versions"]["torch"]
    assert document["rows"]
    return document["rows"]


def test_every_subcommand_takes_json_and_runs():
    commands = build_parser()._subparsers._group_actions[0].choices
    assert {"config", "methods", "plan", "report"} <= set(commands)
    for parser in commands.values():
        assert callable(parser.get_default("run"))
        assert "--json" in parser.format_help()


def test_methods_lists_the_registries(tmp_path, capsys):
    rows = run_json(tmp_path, "methods", more=["parts"])
    listed = {(row["key"], row["name"]) for row in rows}
    for key, registry in (("compression", CODECS), ("routing", ROUTERS), ("scheduling", POLICIES)):
        assert {(f"{key}.method", name) for name in registry.names()} <= listed
    assert "routing.method" in capsys.readouterr().out


def test_config_schema_is_json(tmp_path, capsys):
    rows = run_json(tmp_path, "config", "--schema")
    assert json.loads(capsys.readouterr().out) == rows[0]["schema"]


def test_config_check(tmp_path, capsys):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text('{"train_batch_size": 1, "pikv": {"page_size": 16}}')
    bad.write_text('{"pikv": {"storage": {"n_tok": 3}}}')
    assert run_json(tmp_path, "config", "--check", str(good))[0]["page_size"] == 16
    assert main(["config", "--check", str(bad)]) == 2
    assert "pikv config: pikv.storage.n_tok = 3: legal is a power of two" in capsys.readouterr().err
    assert main(["config", "--check", str(tmp_path / "absent.json")]) == 2


def test_plan_of_the_bundled_model_is_the_estimate(tmp_path):
    rows = run_json(tmp_path, "plan", "--context", "1024", "--ranks", "2", "--dtype", "float32")
    from pikv_ds.adapters.hf.model_spec import load_model_config, read_model_spec

    layers = read_model_spec(load_model_config(bundled.model_path()))
    made = pikv_bytes(layers, [1024], ranks=2, codec=CODECS.build("none"), page_size=32, dtype=torch.float32)
    total = rows[-1]
    assert total["layer_kind"] == "total" and total["layers"] == 4
    assert total["dense_bytes"] == dense_bytes(layers, [1024], 4) == 1024 * 512 * 4
    assert (total["pikv_balanced_bytes"], total["pikv_worst_bytes"]) == (made.balanced, made.worst)
    # all 32 pages kept: S* = sqrt(1024 / (32 * 2)) = 4
    assert rows[0]["paper_k"] == 32 and rows[0]["paper_s_star"] == 4.0


def test_plan_of_a_codec_with_options(tmp_path):
    """2 kv heads x 2 x rank x 4 bytes and a position per token, and the bases of the request."""
    block = '{"method": "svd", "rank": 16}'
    total = run_json(tmp_path, "plan", "--context", "1024", "--ranks", "1", "--dtype", "float32", "--codec", block)[-1]
    assert total["pikv_balanced_bytes"] == 4 * (1024 * (2 * 2 * 16 * 4 + 4) + 2 * 16 * (32 + 32) * 4)


def test_plan_of_uneven_distinct_requests(tmp_path):
    total = run_json(tmp_path, "plan", "--context", "4096,128", "--ranks", "2", "--requests", "distinct")[-1]
    assert total["dense_bytes"] == 4096 * 1024  # the long request's rank, 1 KiB per token in bf16
    assert total["pikv_balanced_bytes"] == (4096 + 128) // 2 * (1024 + 4 * 4)


def test_plan_separates_kinds_of_layers(tmp_path):
    from transformers import AutoConfig

    AutoConfig.for_model("gpt_oss", dtype="bfloat16").save_pretrained(tmp_path / "model")
    rows = run_json(tmp_path, "plan", "--context", "32768", "--ranks", "4", "--model", str(tmp_path / "model"))
    assert [(row["layer_kind"], row["layers"], row["tokens_kept"]) for row in rows[:-1]] == [
        ("full 8x(64+64)", 18, 32768),
        ("sliding 128 8x(64+64)", 18, 127),
    ]
    assert rows[-1]["dense_bytes"] == 18 * (32768 + 127) * 1024 * 2


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_plan_of_a_configuration_without_a_dtype(tmp_path, capsys, dtype):
    from transformers import AutoConfig

    AutoConfig.for_model("qwen3_moe").save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    assert "dtype" not in json.loads(file.read_text())
    total = run_json(tmp_path, "plan", "--context", "64", "--ranks", "1", "--model", str(file), *(("--dtype", dtype) if dtype else ()))[-1]
    assert (total["dtype"], total["dtype_assumed"]) == (dtype or "bfloat16", dtype is None)
    assert ("has no dtype: bfloat16 is assumed" in capsys.readouterr().out) == (dtype is None)


@pytest.mark.parametrize(
    "extra, said",
    [
        (["--context", "8", "--codec", "zip"], "pikv.compression.method = 'zip': legal is one of 'adaptive', 'chunk_pca', 'crop'"),
        (["--context", "8", "--codec", '{"method": "svd", "rank": 40}'], "rank = 40 is larger than k_dim = 32"),
        (["--context", "8", "--codec", '{"method": '], "is not JSON"),
        (["--context", "8", "--page-size", "512"], "pikv.page_size = 512: legal is an integer >= 1 and <= 256"),
        (["--context", "8,9"], "--context has 2 lengths; legal is one, or one per rank (2)"),
        (["--context", "8", "--model", "absent"], "no model folder or config.json at 'absent'"),
    ],
)
def test_plan_says_what_is_wrong(capsys, extra, said):
    assert main(["plan", "--ranks", "2", *extra]) == 2
    assert said in capsys.readouterr().err


def test_report_names_what_is_missing(tmp_path):
    rows = run_json(tmp_path, "report")
    assert {row["section"] for row in rows} == {"environment", "optional", "op", "implementation", "cpu"}
    environment = {row["what"]: row["found"] for row in rows if row["section"] == "environment"}
    assert environment["torch"] != "not found"
    assert environment["accelerator"]
    optional = {row["package"]: row for row in rows if row["section"] == "optional"}
    assert {"cupy", "apex", "transformer_engine", "flash_attn", "flashinfer"} == set(optional)
    assert all(row["found"] and row["would be used for"] for row in optional.values())


def test_report_marks_hosts_outside_of_the_tested_range(tmp_path, capsys, monkeypatch):
    texts = [
        "transformers>=4.0,<5.0",
        'deepspeed>=0.19.2; python_version >= "3"',
        'torch>=99; python_version < "3"',
        "megatron-core>=0.16",
        "x; extra == 'y'",
    ]
    monkeypatch.setattr(tested_versions, "requires", lambda name: texts)
    environment = {row["what"]: row for row in run_json(tmp_path, "report") if row["section"] == "environment"}
    assert environment["transformers"]["tested"] == "OUTSIDE of >=4.0,<5.0"
    assert environment["deepspeed"]["tested"] == ">=0.19.2" and environment["torch"]["tested"] == environment["python"]["tested"] == ""
    said = capsys.readouterr().out
    found = environment["transformers"]["found"]
    assert f"transformers {found} is outside of the versions that pikv_ds was tested with, >=4.0,<5.0." in said.replace("\n", " ")
    assert "deepspeed 0" not in said.partition("is outside")[2]


def test_ranges_are_those_of_the_installed_requirements(monkeypatch):
    ranges = tested_versions.tested_ranges()
    if ranges is not None:  # not a checkout that nothing has installed
        assert {"torch", "deepspeed", "transformers", "megatron-core"} <= set(ranges) and "matplotlib" not in ranges

    def nothing(name):
        raise tested_versions.PackageNotFoundError(name)

    monkeypatch.setattr(tested_versions, "requires", nothing)
    assert tested_versions.tested_ranges() is None
    assert tested_versions.verdict("torch", "2.13.0", None).startswith("unknown") and tested_versions.verdict("torch", None, None) == ""


@pytest.mark.parametrize(("forced", "serving"), [(None, "cpu"), ("torch", "torch reference")])
def test_report_shows_the_op_as_ds_report_does_and_what_serves(tmp_path, capsys, monkeypatch, forced, serving):
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    if forced:
        monkeypatch.setenv("PIKV_OPS", forced)
    rows = run_json(tmp_path, "report")
    (op,) = (row for row in rows if row["section"] == "op")
    assert (op["op name"], op["installed"], op["compatible"]) == ("pikv", "[NO]", "[OKAY]") and "PiKVOpBuilder" in op["used through"]
    serving_cpu = {"section": "implementation", "device": "cpu", "serves": "yes"}
    assert [row["implementation"] for row in rows if serving_cpu.items() <= row.items()] == [serving]
    assert "pikv" in capsys.readouterr().out and "pikv" not in ALL_OPS, "the report leaves DeepSpeed as it was"


def test_report_without_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    rows = run_json(tmp_path, "report")
    (op,) = (row for row in rows if row["section"] == "op")
    serving = {row["implementation"]: row["serves"] for row in rows if row["section"] == "implementation" and row["device"] == "cpu"}
    assert op["compatible"] == "[NO]" and serving == {"cpu": "no", "torch reference": "yes"}


def test_human_bytes():
    assert [human_bytes(n) for n in (0, 1023, 1536, 3 * 2**30)] == ["0 B", "1023 B", "1.50 KiB", "3.00 GiB"]


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_tables_show_every_value_at_every_width(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    names = ["dense", "pikv", "dense-distinct", "pikv-distinct"]
    rows = [{"name": name, "per expert": "|".join(map(str, range(100, 109))), "n": 4492, "equal": True} for name in names]
    print_table("Bundled model [2 ranks]", rows)
    shown = capsys.readouterr().out
    assert "[2 ranks]" in shown
    # Cells may fold, so letters are counted instead of words.
    wanted = "".join(f"{row['name']}{row['per expert']}4,492True" for row in rows) + "".join(rows[0])
    for letter in set(wanted) - set("Bundled model [2 ranks]"):
        assert shown.count(letter) >= wanted.count(letter), letter
    assert "\u2026" not in shown
    assert max(map(len, shown.splitlines())) <= columns
