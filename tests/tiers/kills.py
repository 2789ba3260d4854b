"""Processes that are killed while they write page files, and what the next one finds: `python -m tests.tiers.kills --kills 500`.

Every child is forked, and killed with SIGKILL a random time after a random number of words. It opens the page file that the last one left,
checks every page that the manifest lists against what its slot and write must hold ("served"), and goes on writing and committing. What was
written and is in no manifest that was heard of would have to be computed again ("recomputed"). In turns with that a child decodes with its
pages in files of the same folder; each token that it says is compared with those of a run in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from pikv_ds.errors import PageFileError
from pikv_ds.tiers.file_io import ThreadIO
from pikv_ds.tiers.page_file import PageFile
from tests.harness.checks import Answers
from tests.harness.driver import Driver, layer, ragged
from tests.harness.offloading import tiers

RECORD, SLOTS = 3000, 40
LAYERS = [layer(0, dim=16)]


def payload(slot: int, serial: int) -> np.ndarray:
    return np.full(RECORD, (slot * 37 + serial * 101) % 253, dtype=np.uint8)


def write_pages(path: Path, say) -> None:
    """Says "p CHECKED" once what the last process left is checked, "w PAGES" before each write, "c" after each commit; does not end."""
    try:
        file = PageFile.open(path, RECORD, ThreadIO())
    except (FileNotFoundError, PageFileError) as error:
        if path.exists() and "no manifest" not in str(error) and "head" not in str(error):
            raise
        file = PageFile.create(path, RECORD, ThreadIO())
    assert not file.dropped, file.dropped
    for slot, page in file.pages.items():
        assert np.array_equal(file.read([page])[0], payload(slot, page.serial)), f"slot {slot}: not what was committed"
    say(f"p {len(file.pages)}")
    pick = random.Random(os.getpid())
    while True:
        free = [slot for slot in range(SLOTS) if slot not in file.busy]
        slots = pick.sample(free, min(len(free), 8))
        say(f"w {len(slots)}")
        first = file._serial
        file.write(slots, np.stack([payload(slot, first + 1 + i) for i, slot in enumerate(slots)]))
        file.release(pick.sample(sorted(file.pages), len(file.pages) // 3))
        file.commit()
        say("c")


def decode(offload: dict, say) -> None:
    """Says a token per step."""
    answers = Answers()
    driver = Driver(LAYERS, offload=offload, checks=[answers])
    driver.new_generation()
    for mask in [ragged([12])] * 6 + [ragged([1])] * 40:
        driver.forward(mask)
        say(f"t {int(answers.last[1][0, -1].flatten().argmax())}")


def run_child(work, words: int, delay: float) -> tuple[list[str], int]:
    """What it said, and its exit status; killed `delay` seconds after so many words."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        status = 1
        try:
            work(lambda words: os.write(writer, f"{words}\n".encode()))
            status = 0
        except Exception as error:  # noqa: BLE001 - the parent counts it
            os.write(writer, f"e {type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "r") as said:
        found = [line for _, line in zip(range(words), said, strict=False)]
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        return "".join([*found, said.read()]).split("\n")[:-1], status


def kill(kills: int, folder: Path, longest_s: float) -> dict[str, int]:
    page = tiers(LAYERS, 12, 4)["device_gib"] / 12
    offload = tiers(LAYERS, 12, 4, host=0, nvme_path=str(folder / "nvme"), nvme_gib=page * 60)
    wanted: list[str] = []
    decode({}, wanted.append)
    pick, counts = random.Random(0), {"kills": 0, "commits": 0, "served": 0, "recomputed": 0, "tokens": 0, "wrong_tokens": 0, "errors": 0}
    while counts["kills"] < kills:
        writes = bool(counts["kills"] % 2)
        work = (lambda say: write_pages(folder / "saved", say)) if writes else (lambda say: decode(offload, say))
        said, status = run_child(work, pick.randint(0, 18 if writes else 9), pick.uniform(0, longest_s))
        counts["kills"] += os.WIFSIGNALED(status)
        counts["commits"] += said.count("c")
        counts["served"] += sum(int(words[2:]) for words in said if words.startswith("p "))
        after = said[max((i + 1 for i, words in enumerate(said) if words == "c"), default=0) :]
        counts["recomputed"] += sum(int(words[2:]) for words in after if words.startswith("w "))
        tokens = [words for words in said if words.startswith("t ")]
        counts["tokens"] += len(tokens)
        counts["wrong_tokens"] += sum(one != other for one, other in zip(tokens, wanted, strict=False))
        errors = [words for words in said if words.startswith("e ")]
        counts["errors"] += len(errors)
        if errors:
            print(errors[0], file=sys.stderr)
    folders = list((folder / "nvme").glob("pikv-*-*"))
    assert len(folders) <= 1, f"folders of dead processes have stayed: {folders}"
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--longest", type=float, default=0.02, help="seconds between the last word and the kill, at most (default 0.02)")
    parser.add_argument("--json", default=None, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        counts = kill(args.kills, Path(folder), args.longest)
    print(json.dumps(counts))
    if args.json is not None:
        found = {"command": f"python -m tests.tiers.kills --kills {args.kills}", "rows": [counts]}
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    return int(bool(counts["wrong_tokens"] or counts["errors"]))


if __name__ == "__main__":
    sys.exit(main())
