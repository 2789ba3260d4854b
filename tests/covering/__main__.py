"""Make the array anew: python -m tests.covering [--write]."""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

from .array import cover
from .asked import refusal
from .book import write

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--write", action="store_true", help="keep it")
args = parser.parse_args()
begin = time.perf_counter()
with tempfile.TemporaryDirectory() as folder:
    runs, refused = cover(partial(refusal, folder=Path(folder)))
print(f"{len(runs)} cases run, {len(refused)} pairs are refused; found in {time.perf_counter() - begin:.0f} s")
if args.write:
    write(runs, refused)
