"""The survey: every causal-LM family of transformers, plain beside attached. `python -m tests.survey [--only NAME ...] [--write FILE]`.

Each family runs in a process of its own, with a limit of time: what hangs or dies is a row too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections import Counter
from pathlib import Path

import torch
import transformers
from transformers.utils import logging

from .compare import TOLERANCE, survey
from .configs import FAMILIES
from .results import SURVEYED

SECONDS = 120


def run_alone(family: str) -> dict:
    """survey(family) in a forked process."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(family, theirs))
    process.start()
    theirs.close()
    try:
        row = ours.recv() if ours.poll(SECONDS) else {"outcome": "wrong", "why": f"no answer within {SECONDS} s"}
    except EOFError:
        row = {"outcome": "wrong", "why": "the process died"}
    process.kill()
    process.join()
    return {"family": family} | row


def _child(family: str, out) -> None:
    out.send(survey(family))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.survey", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=FAMILIES, metavar="NAME")
    parser.add_argument("--write", type=Path, metavar="FILE", help="the rows as JSON")
    args = parser.parse_args()
    logging.set_verbosity_error()
    rows = []
    for family in args.only:
        rows.append(run_alone(family))
        print(f"{family}: {rows[-1]['outcome']}. {rows[-1]['why']}", flush=True)
    counts = Counter(row["outcome"] for row in rows)
    print(", ".join(f"{counts[outcome]} {outcome}" for outcome in (*SURVEYED, "not in it")))
    if args.write:
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        args.write.write_text(json.dumps({"versions": versions, "tolerance": TOLERANCE, "rows": rows}, indent=1) + "\n")
    return counts["wrong"] > 0


if __name__ == "__main__":
    sys.exit(main())
