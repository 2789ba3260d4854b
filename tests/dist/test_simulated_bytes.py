"""Bytes of `pikv plan --simulate` are those that 2 and 4 ranks of the bundled model hold and send."""

import pytest

from tests.dist.launcher import run_gloo


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 4])
def test_simulated_bytes_are_the_measured_ones(ranks):
    job = run_gloo("simulated_bytes.py", ranks=ranks, timeout_s=240)
    for requests in ("replicated", "distinct"):
        for placement in ("experts", "position"):
            rows = job.check(f"{requests} {placement}")
            assert max(row["kv_bytes"] for row in rows) <= rows[0]["fullest"] and rows[0]["wire_bytes"] > 0
