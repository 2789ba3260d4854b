"""One process of a side. Arguments: the tree whose pikv_ds it must run, a name of decodes.DECODES.

Started as a file, so that `decodes` comes from beside it and pikv_ds from PYTHONPATH. It answers in JSON, a line each: the folder of its
pikv_ds once it is ready, then one block of steps for every number of steps read from stdin. It ends when stdin does.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from decodes import DECODES, Step

WARM_UP = 16  # steps before the first block
LEAD_IN = 2  # steps before every block, not timed: the other sides have used the caches of the CPU, ranks have not started together


def main() -> None:
    tree, name = Path(sys.argv[1]).resolve(), sys.argv[2]
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1, encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    import torch

    import pikv_ds

    package = Path(pikv_ds.__file__).resolve().parent
    if not package.is_relative_to(tree):
        raise SystemExit(f"pikv_ds was imported from {package}, not from {tree}")
    torch.set_num_threads(1)
    with DECODES[name].open() as step:
        for _ in range(WARM_UP):
            step()
        gc.collect()
        gc.freeze()  # collections of the blocks look at what steps make, not at the libraries
        print(json.dumps({"package": str(package)}), file=answers)
        digest = hashlib.sha256()
        for line in sys.stdin:
            print(json.dumps(block(step, int(line), digest)), file=answers)
    os._exit(0)  # gloo's threads may abort when one rank is gone before the other


def block(step: Step, steps: int, digest: Any) -> dict[str, Any]:
    """Time some steps: wall_ms is the median step, cpu_ms the mean one, over all threads. digest: of all outputs compared so far."""
    for _ in range(LEAD_IN):
        step()
    gc.collect()
    wall_ns = []
    cpu_ns = time.process_time_ns()
    for _ in range(steps):
        started = time.perf_counter_ns()
        output = step()
        wall_ns.append(time.perf_counter_ns() - started)
    cpu_ns = time.process_time_ns() - cpu_ns
    digest.update(output.contiguous().numpy().tobytes())
    return {"wall_ms": median(wall_ns) / 1e6, "cpu_ms": cpu_ns / steps / 1e6, "digest": digest.hexdigest()}


if __name__ == "__main__":
    main()
