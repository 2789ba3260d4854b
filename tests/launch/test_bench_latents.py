import json

import pytest

from pikv_ds.launch.cli import main
from pikv_ds.ops.build import load


def test_the_table(tmp_path):
    if load.ensured("cpu") != "cpu" or not load.cpu_kernels()["vnni"]:
        pytest.skip("needs AVX512 with VNNI")
    file = tmp_path / "rows.json"
    assert main(["bench", "latents", "--context", "200", "--heads", "2", "--repeats", "1", "--json", str(file)]) == 0
    rows = {row["format"]: row for row in json.loads(file.read_text())["rows"]}
    assert {"bf16", "int8+rope", "int4+rope", "fp8_e4m3+rope"} <= set(rows)
    assert rows["bf16"]["bytes_per_token"] == 1152 and rows["int8+rope"]["bytes_per_token"] == 672
    assert all(row["plain_ms"] > 0 and row["hand_ms"] > 0 for row in rows.values())
