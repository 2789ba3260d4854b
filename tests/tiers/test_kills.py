"""Processes that are killed while they write page files leave nothing wrong behind. All 500: `python -m tests.tiers.kills`."""

import json
import subprocess
import sys

from tests.long_form import LONG


def test_killed_writers_leave_nothing_wrong():
    kills = 60 if LONG else 6
    command = [sys.executable, "-m", "tests.tiers.kills", "--kills", str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["kills"] == kills and not counts["wrong_tokens"] and not counts["errors"], counts
