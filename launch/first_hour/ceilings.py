"""What this machine is and how fast its memory is: the ceilings that every other number of the hour is compared with."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from statistics import median

import torch

from pikv_ds.launch.bench.clock import Clock
from pikv_ds.launch.output import print_table, write_json


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pikv_ds.launch.first_hour.ceilings", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--mib", type=int, help="size of the buffers (default 1024, on a CPU 16)")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    rates = copy_and_read(args.device, (args.mib or (1024 if args.device == "cuda" else 16)) << 20)
    row = {"device": _device(args.device), "torch": torch.__version__, "torch CUDA": torch.version.cuda, **_tools(), **rates}
    print_table("This machine", [{"what": name, "found": str(value)} for name, value in row.items()])
    write_json(args.json, "ceilings", [row])
    print(f"{row['device']}: copies {rates['copy_gbps']:.0f} GB/s (read plus written), reads {rates['read_gbps']:.0f} GB/s")
    return 0


def copy_and_read(device: str, nbytes: int, repeats: int = 9) -> dict[str, float]:
    """copy_gbps: bytes read plus bytes written of a copy; read_gbps: of a sum that writes nothing. Medians."""
    source = torch.ones(nbytes // 4, dtype=torch.float32, device=device)
    target, clock = torch.empty_like(source), Clock(device)
    copy = median(clock.each(lambda: target.copy_(source), repeats))
    read = median(clock.each(lambda: source.sum(), repeats))
    return {"copy_gbps": 2 * source.nbytes / copy / 1e6, "read_gbps": source.nbytes / read / 1e6}


def _device(device: str) -> str:
    if device == "cpu":
        return "cpu"
    found = torch.cuda.get_device_properties(0)
    return f"{found.name}, sm_{found.major}{found.minor}, {found.multi_processor_count} SMs, {found.total_memory >> 30} GiB"


def _tools() -> dict[str, str | None]:
    """Driver, and the tools that later steps use; None = not there."""
    found: dict[str, str | None] = {name: shutil.which(name) for name in ("nvcc", "ncu", "compute-sanitizer")}
    found = {name: None if path is None else "found" for name, path in found.items()}
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit", "--format=csv,noheader"]
    try:
        found["driver, clocks, power"] = (
            subprocess.run(query, capture_output=True, text=True, timeout=30, check=False).stdout.strip() or None
        )
    except FileNotFoundError:
        found["driver, clocks, power"] = None
    return found


if __name__ == "__main__":
    sys.exit(main())
