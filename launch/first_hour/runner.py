"""Steps, each in processes of its own with a limit: one that crashes, hangs or takes the context of its GPU ends nothing but itself.

Everything is written as it goes: the output of a step while it runs, and the table of all steps after each.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pikv_ds.launch.output import write_json
from pikv_ds.launch.ranks import end_group

LINES = 40  # of the digest
WIDTH = 180
_TAIL = 3  # lines of a failed step in the digest
_LEAST_S = 5.0  # of the budget, to start another step


@dataclass(frozen=True)
class Step:
    name: str
    commands: tuple[tuple[str, ...], ...]  # run beside each other; {out} is the folder of the results
    limit_s: float
    look_at: str  # what a reader should look at in its result
    needs: tuple[str, ...] = ()  # programs; without one of them the step is skipped
    environment: Mapping[str, str] = field(default_factory=dict)


def run_steps(steps: Sequence[Step], out: Path, budget_s: float, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """A row per step: status (ok, failed, over its limit, skipped, not run), seconds, last line. Never raises for what a step does."""
    out.mkdir(parents=True, exist_ok=True)
    ends, rows = time.monotonic() + budget_s, []
    for number, step in enumerate(steps, 1):
        left = ends - time.monotonic()
        absent = [name for name in step.needs if shutil.which(name) is None]
        if absent:
            row = _row(step, "skipped", 0.0, f"{', '.join(absent)} not found")
        elif left < _LEAST_S:
            row = _row(step, "not run", 0.0, f"the budget of {budget_s:g} s is spent")
        else:
            say(f"[{number}/{len(steps)}] {step.name}, at most {min(step.limit_s, left):.0f} s")
            row = _run(step, out, min(step.limit_s, left))
        rows.append(row)
        say(_line(row))
        write_json(str(out / "steps.json"), "gpu_first_hour", rows)
    return rows


def digest(rows: Sequence[Mapping[str, Any]], lines: int = LINES) -> list[str]:
    """At most `lines` lines: one per step, then the end of what failed, the first failures first."""
    found = [_line(row) for row in rows]
    for row in rows:
        if row["status"] in ("failed", "over its limit"):
            found += [f"  {row['step']}: {line}"[:WIDTH] for line in row["tail"]]
    return found[:lines]


def _run(step: Step, out: Path, limit_s: float) -> dict[str, Any]:
    started, environment = time.monotonic(), os.environ | dict(step.environment)
    logs = [out / (f"{step.name}.log" if len(step.commands) == 1 else f"{step.name}.{i}.log") for i in range(1, len(step.commands) + 1)]
    processes = []
    for command, log in zip(step.commands, logs, strict=True):
        filled = [part.replace("{out}", str(out)) for part in command]
        with log.open("w", encoding="utf-8") as file:
            file.write(f"$ {' '.join(filled)}\n")
            file.flush()
            processes.append(subprocess.Popen(filled, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                                              start_new_session=True))  # fmt: skip
    late = False
    for process in processes:
        try:
            process.wait(max(0.0, started + limit_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            late = True
            end_group(process)
    statuses = [process.returncode for process in processes]
    failed = next((i for i, status in enumerate(statuses) if status), 0)
    text = [line.strip() for line in logs[failed].read_text(encoding="utf-8", errors="replace").splitlines()[1:] if line.strip()]
    status = "over its limit" if late else "failed" if any(statuses) else "ok"
    told = text[-1] if text else "printed nothing"
    if status == "failed":
        bad = sum(1 for code in statuses if code)
        told = f"exit status {statuses[failed]}{f', {bad} of {len(statuses)} processes' if len(statuses) > 1 else ''}: {told}"
    return _row(step, status, time.monotonic() - started, told, tail=text[-_TAIL:], statuses=statuses, logs=[log.name for log in logs])


def _row(step: Step, status: str, seconds: float, told: str, **more: Any) -> dict[str, Any]:
    return {"step": step.name, "status": status, "seconds": round(seconds, 1), "told": told, "look_at": step.look_at, "tail": [], **more}


def _line(row: Mapping[str, Any]) -> str:
    return f"{row['status']:<14} {row['seconds']:>6.1f} s  {row['step']}: {row['told']}"[:WIDTH]
