"""`pikv bench errors`: every error of the formats and of the op is within its limit, and an error that is not is named."""

import json

import pytest

from pikv_ds.launch.bench.errors import CASES, breaches
from pikv_ds.launch.cli import main
from pikv_ds.ops.format.formats import FORMATS
from pikv_ds.ops.format.kernels import MIXED


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("errors") / "errors.json"
    assert main(["bench", "errors", "--json", str(path)]) == 0
    return json.loads(path.read_text())["rows"]


def test_every_format_and_case_is_within_its_limits(rows):
    wide = [f"{name}+rope" for name, traits in FORMATS.items() if traits.levels or name.startswith("fp8") or name.startswith("fp4")]
    assert [(row["case"], row["format"]) for row in rows] == [
        (str(case), name) for case in CASES for name in [*FORMATS, *(wide if case.latent else MIXED)]
    ]
    for row in rows:
        assert not breaches(row)
        assert row["op_lse"] <= 1e-3 and row["k_error"] <= row["k_bound"] and row["v_error"] <= row["v_bound"]
        assert 0 < row["op_rms"] <= row["out_rms"] * 1.5 and 0 < row["op_max"] and 0 < row["out_max"]


def test_bf16_is_as_good_as_torch_in_the_same_dtype(rows):
    of_bf16 = [row for row in rows if row["format"] == "bf16"]
    assert len(of_bf16) == len(CASES)
    for row in of_bf16:
        assert row["dtype"] == "bfloat16" and row["same_dtype"] <= 1.1 * row["sdpa"] and row["lse"] <= 1e-3


def test_formats_rank_as_their_bits_do(rows):
    for case in CASES:
        error = {row["format"]: row["out_rms"] for row in rows if row["case"] == str(case)}
        assert error["bf16"] < error["int8"] < error["fp8_e4m3"] < error["int4"]


@pytest.mark.parametrize(
    ("column", "value"), [("op_rms", 2e-4), ("op_lse", 2e-3), ("lse", 2e-3), ("k_error", 0.1), ("over_sdpa", 1.2), ("op_rms", float("nan"))]
)
def test_a_breach_is_named(rows, column, value):
    row = next(row for row in rows if row["format"] == "bf16") | {column: value}
    (text,) = breaches(row)
    assert text.startswith(f"bf16, {CASES[0]}: {column} is ") and "the limit is" in text
