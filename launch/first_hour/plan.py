"""The steps of each stage, for a GPU or, with device "cpu", as a rehearsal on the emulator and the CPU ops with next to no work.

A stage fits into ten minutes. Order: what ends a process first, then what is wrong, then how fast it is.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pikv_ds
from pikv_ds.launch.device import ALLOCATOR, let_memory_grow
from pikv_ds.ops.build.cuda_build import ARCHITECTURES

from .runner import Step

STAGES = (1, 2, 3)
OPS = (
    "decode",
    "prefill_cached",
    "append",
    "merge",
    "migrate",
    "page_bounds",
    "page_score",
    "pack",
    "route_pack",
    "route_merge",
    "assign_slots",
    "checksum",
)
SHARDS = 12  # of the long matrix, beside each other: its f64 reference takes minutes of a core
CHECKOUT = Path(pikv_ds.__file__).resolve().parents[1]


def steps_of(stage: int, device: str, capability: tuple[int, int] | None = None) -> list[Step]:
    """capability: of the GPU; the library is compiled for it alone, where it is one that is compiled for."""
    asked = dict(os.environ)
    let_memory_grow(asked)
    environment = {"PYTHONPATH": str(CHECKOUT)} | {name: asked[name] for name in ALLOCATOR if name in asked}
    if capability is not None and f"{capability[0]}0" in ARCHITECTURES:
        environment["PIKV_CUDA_ARCH"] = f"{capability[0]}0"
    made = {1: _does_it_run, 2: _how_fast, 3: _whole_system}[stage](device)
    return [replace(step, environment=environment | dict(step.environment)) for step in made]


def _python(module: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *arguments)


def _one(name: str, command: tuple[str, ...], limit_s: float, look_at: str, needs: tuple[str, ...] = (), **environment: str) -> Step:
    return Step(name, (command,), limit_s, look_at, needs, environment)


def _forced(device: str) -> dict[str, str]:
    """Nothing but the compiled library may serve what is timed. Checks need the host's ops as well, so they do not get it."""
    return {"PIKV_OPS": "cuda"} if device == "cuda" else {}


def _matrix(device: str, *arguments: str) -> tuple[str, ...]:
    return _python("tests.ops.run_matrix", "cuda" if device == "cuda" else "emu", *arguments, "--keep-going")


def _pikv(*arguments: str) -> tuple[str, ...]:
    return _python("pikv_ds.launch.cli", *arguments)


def _does_it_run(device: str) -> list[Step]:
    gpu = device == "cuda"
    each = tuple(_matrix(device, "--op", op, "--points", "16" if gpu else "1", "--json", f"{{out}}/op_{op}.json")
                 for op in OPS)  # fmt: skip
    sanitizer = ("compute-sanitizer", "--error-exitcode=9")
    return [
        _one("ceilings", _python("pikv_ds.launch.first_hour.ceilings", "--device", device, "--json", "{out}/ceilings.json"), 60,
             "what this card copies and reads"),
        _one("build", _pikv("build", "cuda" if gpu else "emu", "--json", "{out}/build.json"), 240,
             "status ok, registers as in docs/results/build.json, largest error on the device"),
        Step("each-op", each, 90, "which op crashes: each runs in a process of its own"),
        _one("matrix", _matrix(device, *(() if gpu else ("--points", "4")), "--json", "{out}/matrix.json"), 120,
             "no failed point; raw formats below 1e-5"),
        _one("step", _python("pytest", "-q", "-x", "tests/gpu/test_step.py"), 120, "a replayed graph equals the eager step; who syncs"),
        _one("memcheck", (*sanitizer, "--tool=memcheck", *_matrix(device, "--points", "60")), 110, "no access outside a buffer",
             ("compute-sanitizer",)),
        _one("racecheck", (*sanitizer, "--tool=racecheck", *_matrix(device, "--points", "24")), 110, "no hazard in shared memory",
             ("compute-sanitizer",)),
        _one("bench-quick", _sweep(device, 60), 90, "share of the copy rate of bf16, and int8 over bf16", **_forced(device)),
    ]  # fmt: skip


def _sweep(device: str, budget_s: int, *more: str) -> tuple[str, ...]:
    return _pikv(
        "bench", "ops", "--device", device, "--sweep", "--quick", "--budget", str(budget_s), "--json", "{out}/bench_quick.json", *more
    )


def _how_fast(device: str) -> list[Step]:
    gpu = device == "cuda"
    sweep = ("bench", "ops", "--device", device, "--sweep", "--budget", "330" if gpu else "1", "--json", "{out}/sweep.json")
    ncu = ("ncu", "--clock-control", "none", "--set", "full", "-k", "regex:attend|merge", "-c", "8", "-f", "-o", "{out}/ncu")
    beside = ("bench", "ops", "--device", "cuda", "--quick", "--json", "{out}/beside.json")
    return [
        _one("sweep", _pikv(*sweep, *(() if gpu else ("--quick",))), 360, "int8 and int4 over bf16, shares by batch, merge, pages of 16",
             **_forced(device)),
        *([_one("beside", _pikv(*beside), 100, "beside SDPA, flex_attention, FlashInfer and flash-attn where installed", **_forced(device))]
          if gpu else []),
        _one("ncu", (*ncu, *_sweep(device, 60)), 110, "issue slots, DRAM share, stalls, occupancy of attention and merge", ("ncu",),
             **_forced(device)),
    ]  # fmt: skip


def _whole_system(device: str) -> list[Step]:
    gpu = device == "cuda"
    where = ("--device", device)
    small = () if gpu else ("--context", "64", "--steps", "2")
    of = {  # arguments by benchmark, besides the device
        "model": ("--quick",) if gpu else (*small, "--batch", "1", "2", "--formats", "bfloat16", "int8"),
        "select": () if gpu else (*small, "--layers", "1", "--codecs", "none"),
        "latents": () if gpu else ("--context", "128", "--repeats", "1"),
        "decode": ("--model", "wide", *(("--context", "8192", "--dtype", "bfloat16") if gpu else small)),
    }
    bench = {kind: _pikv("bench", kind, *where, *given, "--json", f"{{out}}/{kind}.json") for kind, given in of.items()}
    profile = _python("pikv_ds.launch.first_hour.profile", *where, *(() if gpu else ("--quick",)), "--json", "{out}/profile.json")
    steps = [
        _one("profile", profile, 60, "kernels per layer and syncs per step"),
        _one("two-ranks", _python("tests.gpu.two_ranks", *where, "--json", "{out}/two_ranks.json"), 90,
             "tokens of two ranks on one GPU, over gloo, are those of one"),
        _one("model", bench["model"], 60, "steps of a cache, by format"),
        _one("select", bench["select"], 60, "reading 1/16 of the pages against all"),
        _one("latents", bench["latents"], 60, "MLA by record format"),
        _one("decode", bench["decode"], 90, "a step beside DynamicCache and SDPA"),
    ]  # fmt: skip
    steps = [replace(step, environment=_forced(device) if step.name != "two-ranks" else {}) for step in steps]
    return [_long_matrix(device), *_only_on_a_gpu()[: 1 if gpu else 0], *steps, *_only_on_a_gpu()[1 if gpu else 2 :]]


def _long_matrix(device: str) -> Step:
    """In as many processes as there are cores to serve; a rehearsal takes a few points of it."""
    number, points = (SHARDS, ("--long",)) if device == "cuda" else (1, ("--points", "24"))
    shards = (_matrix(device, *points, "--shard", f"{i}/{number}", "--json", f"{{out}}/long_{i}.json") for i in range(1, number + 1))
    return Step("long-matrix", tuple(shards), 240, "no failed point of any shard", environment={"OMP_NUM_THREADS": "1"})


def _only_on_a_gpu() -> list[Step]:
    return [
        _one("end-to-end", _python("pytest", "-q", "-k", "cuda", "tests/gpu/test_end_to_end.py"), 120, "tokens_same"),
        _one(
            "nvrtc", _python("tests.ops.run_matrix", "nvrtc", "--keep-going", "--json", "{out}/nvrtc.json"), 90, "the same matrix by NVRTC"
        ),
    ]
