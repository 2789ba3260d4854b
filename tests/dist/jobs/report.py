"""What a job tells its test: one JSON line per check and rank, written as the check ends."""

import contextlib
import json
import os
import time
import traceback
from collections.abc import Iterator
from pathlib import Path


class Report:
    """Owns this rank's result file. Lines are flushed at once: a job that dies later has still reported."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self._path = Path(os.environ["PIKV_TEST_RESULTS"]) / f"rank{self.rank}.jsonl"

    def has_rank(self, rank: int) -> bool:
        """Has it ended a check?"""
        return self._path.with_name(f"rank{rank}.jsonl").exists()

    @contextlib.contextmanager
    def check(self, name: str) -> Iterator[dict]:
        """Run one check; values put in the yielded dict are in its row, and how many seconds it took.

        A failed assertion is recorded and the job goes on, because asserting is local and every rank still
        makes the same collectives. Any other exception is recorded and ends the rank.
        """
        row: dict = {"check": name, "rank": self.rank, "ok": True}
        started = time.monotonic()
        try:
            yield row
        except AssertionError:
            row |= {"ok": False, "error": traceback.format_exc()}
        except BaseException:
            self._write(row | {"ok": False, "error": traceback.format_exc()})
            raise
        self._write(row | {"seconds": round(time.monotonic() - started, 2)})

    def _write(self, row: dict) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
