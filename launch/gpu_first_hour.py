"""The first hour on a GPU, in three stages of at most ten minutes: does it run, how fast, the whole system.

    python -m pikv_ds.launch.gpu_first_hour --stage 1 --out DIR [--budget SECONDS]

From a checkout. Every step is a process of its own with a limit, and the next runs whatever became of it. DIR/steps.json is written after
each step, its output while it runs; the last 40 lines tell the story. docs/guide/cuda.md says what to look at.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

STAGE_S = 540.0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pikv_ds.launch.gpu_first_hour", description=__doc__.splitlines()[0])
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), required=True, help="1: does it run; 2: how fast; 3: the whole system")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for everything that is found; made if need be")
    parser.add_argument("--budget", type=float, default=STAGE_S, metavar="SECONDS", help=f"for the stage (default {STAGE_S:g})")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal on the emulator, no GPU needed")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps only")
    args = parser.parse_args(argv)
    from pikv_ds.launch.first_hour.plan import CHECKOUT, steps_of
    from pikv_ds.launch.first_hour.runner import digest, run_steps

    if not (CHECKOUT / "tests" / "ops" / "run_matrix.py").is_file():
        parser.error("the checks lie in the repository's tests, which an installed package does not have; run it from a checkout")
    capability = _capability() if args.device == "cuda" else None
    if args.device == "cuda" and capability is None:
        parser.error("torch sees no CUDA device here; --device cpu rehearses the stage on the emulator")
    steps = steps_of(args.stage, args.device, capability)
    unknown = set(args.only or ()) - {step.name for step in steps}
    if unknown:
        parser.error(f"stage {args.stage} has no step {', '.join(sorted(unknown))}; it has {', '.join(step.name for step in steps)}")
    rows = run_steps([step for step in steps if args.only is None or step.name in args.only], args.out, args.budget, _say)
    print(f"---- stage {args.stage} on {args.device}; everything is in {args.out}")
    print("\n".join(digest(rows)))
    return 1 if any(row["status"] in ("failed", "over its limit") for row in rows) else 0


def _capability() -> tuple[int, int] | None:
    """Of the first GPU. Asked in a process of its own: this one keeps no context on the card."""
    import subprocess

    code = "import torch; print(*torch.cuda.get_device_capability() if torch.cuda.is_available() else ())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False).stdout.split()
    return (int(found[0]), int(found[1])) if len(found) == 2 else None


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
