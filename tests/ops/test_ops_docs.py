"""docs/reference/formats.md, docs/results/ops.md: the table is the committed result, its variables are those that the ops read."""

import json
import re
from pathlib import Path

from pikv_ds.launch.bench.errors import CASES
from pikv_ds.launch.cli import build_parser
from pikv_ds.ops.format.formats import FORMATS

ROOT = Path(__file__).resolve().parents[2]
TEXT = "".join((ROOT / "docs" / name).read_text() for name in ("reference/formats.md", "results/ops.md"))


def test_the_table_of_formats_is_the_committed_result():
    rows = json.loads((ROOT / "docs/results/bench_errors.json").read_text())["rows"]
    shown = lambda x: f"{x:.1e}" if x else "0"  # noqa: E731
    for row in rows:
        if row["case"] != str(CASES[0]):
            continue
        columns = [shown(row[key]) for key in ("k_bound", "k_error", "v_bound", "v_error", "op_rms", "out_rms")]
        size = FORMATS[row["format"].partition("/")[0]].preferred_page_size
        line = f"| {row['format']} | {row['bytes_per_token']:,.0f} | {size} | {' | '.join(columns)} |"
        assert line in TEXT, line


def test_every_variable_that_the_ops_read_is_explained():
    sources = [path for pattern in ("ops/**/*.py", "ops/csrc/*/*", "setup.py") for path in ROOT.glob(pattern)]
    read = set().union(*(re.findall(r'(?:environ\b[^"\n]{0,8}|getenv\()"(\w+)"', path.read_text()) for path in sources))
    read |= set(re.findall(r'"(\w+)" in os.environ', (ROOT / "ops/build/compile.py").read_text()))
    assert {"PIKV_OPS", "PIKV_CPU", "CXX"} <= read
    assert {name for name in read if f"`{name}`" not in TEXT} == set()


def test_its_commands_parse():
    for command in re.findall(r"^pikv ([^#\n]+)", TEXT, re.MULTILINE):
        build_parser().parse_args(command.replace("FILE", "x.json").split())
