"""`pikv report`: what is installed here and which ops can run, in the style of ds_report."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
from typing import Any

from pikv_ds.launch.output import machine, package_version, print_table, versions, write_json

# import name -> (distribution names, what pikv_ds or a host would use it for)
_OPTIONAL = {
    "cupy": (("cupy-cuda13x", "cupy-cuda12x", "cupy"), "compiling the CUDA ops at run time, without nvcc"),
    "apex": (("apex",), "fused norms and optimizers of Megatron-Core"),
    "transformer_engine": (("transformer-engine", "transformer_engine"), "fused layers of Megatron-Core on CUDA"),
    "flash_attn": (("flash-attn",), "attention inside a prompt on CUDA, and a baseline of the benchmarks"),
    "flashinfer": (("flashinfer-python", "flashinfer"), "a baseline of the benchmarks on CUDA"),
}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    subparsers.add_parser("report", help="show the environment and the ops that can run in it")


def run(args: argparse.Namespace) -> int:
    sections = {"environment": environment_rows(), "optional": optional_rows(), "op": op_rows()}
    print_table("Environment", sections["environment"])
    print_table("Optional packages", sections["optional"])
    print_table("Ops", sections["op"])
    write_json(args.json, "report", [{"section": name, **row} for name, rows in sections.items() for row in rows])
    return 0


def environment_rows() -> list[dict[str, Any]]:
    import torch

    found: dict[str, Any] = versions()
    found |= {"torch CUDA": torch.version.cuda, "accelerator": _accelerator()}
    found |= {"compiler": _tool(os.environ.get("CXX", "c++")), "nvcc": _tool(_nvcc()), "ninja": _tool("ninja")}
    found |= {name: ", ".join(value) if isinstance(value, list) else value for name, value in machine().items()}
    return [{"what": name, "found": "not found" if value is None else str(value)} for name, value in found.items()]


def optional_rows() -> list[dict[str, Any]]:
    rows = []
    for module, (distributions, purpose) in _OPTIONAL.items():
        known = [version for name in distributions if (version := package_version(name)) is not None]
        present = importlib.util.find_spec(module) is not None
        state = (known[0] if known else "version unknown") if present else "not found"
        rows.append({"package": module, "found": state, "would be used for": purpose})
    return rows


def op_rows() -> list[dict[str, Any]]:
    """One row per implementation of the ops: installed = its code is here, compatible = it can run on this machine."""
    import torch

    from pikv_ds import ops

    ours = {name: value for name, value in vars(ops).items() if not name.startswith("_") and callable(value)}
    functions = [name for name, value in ours.items() if value.__module__.startswith(ops.__name__)]
    new_enough = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 11)
    return [
        {"name": "torch reference", "installed": bool(functions), "compatible": new_enough, "ops": ", ".join(functions)}
    ]


def _accelerator() -> str:
    """Which accelerator DeepSpeed would choose."""
    if package_version("deepspeed") is None:
        return "unknown: deepspeed is not installed"
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    return f"{accelerator.device_name()} ({accelerator.communication_backend_name()})"


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return os.path.join(home, "bin", "nvcc") if home else "nvcc"


def _tool(command: str) -> str | None:
    """The line of `command --version` that carries the version; None when the tool is not there."""
    path = shutil.which(command)
    if path is None:
        return None
    shown = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=False)
    lines = [line.strip() for line in shown.stdout.splitlines() if line.strip()]
    return next((line for line in lines if "release" in line), lines[0] if lines else path)
