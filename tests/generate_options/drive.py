"""Start cases in processes, and read what came of them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.dist.launcher import JobTimeout, run_gloo

AT_ONCE_S = 60


def outcomes(cases: dict[str, dict], ranks: int, *, seconds_each: float = 30.0) -> Iterator[tuple[str, dict]]:
    """(name, {"status", "says", ...}) of each case; of a case that ends a process or hangs too."""
    left = dict(cases)
    while left:
        with tempfile.TemporaryDirectory(prefix="pikv_cases_") as folder:
            given, taken = Path(folder) / "cases.json", Path(folder) / "outcomes.jsonl"
            given.write_text(json.dumps(list(left.items())))
            failure = None
            try:
                result = run_gloo("generate_options.py", [given, taken], ranks=ranks, timeout_s=AT_ONCE_S + seconds_each * len(left))
                failure = result.describe() if result.returncode else None
            except JobTimeout as error:
                failure = str(error)
            assert taken.exists(), f"no case was begun\n{failure}"
            rows = [json.loads(line) for line in taken.read_text().splitlines()]
        for row in rows:
            left.pop(row["name"])
            yield row["name"], whole(row)
        if left and failure is None:
            failure = "the processes ended without a result"
        if left:
            name = next(iter(left))
            left.pop(name)
            yield name, {"status": "ended its process", "says": failure[-1500:]}


ORDER = ("same error", "served", "tie", "refused", "peer error", "wrong")


def whole(row: dict) -> dict:
    """The outcome of all ranks: the worst of theirs. Where plain transformers raises in the midst of a rank's forward the others, which
    need that forward, may end in PeerError; nowhere else."""
    worst = max(row["ranks"], key=lambda one: ORDER.index(one["status"]))
    if worst["status"] == "peer error":
        raises = [one for one in row["ranks"] if one["status"] == "same error"]
        worst = {**worst, "status": "wrong"} if not raises else raises[0]
    return {**worst, "seconds": row["seconds"]}
