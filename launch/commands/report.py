"""`pikv report`: what is installed here and which ops can run, in the style of ds_report."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
from typing import Any

from pikv_ds.launch.output import HOSTS, machine, package_version, print_table, versions, write_json
from pikv_ds.launch.tested_versions import OUTSIDE, tested_ranges, verdict

ABSENT = "no such device"
# import name -> (distribution names, what pikv_ds or a host would use it for)
_OPTIONAL = {
    "cupy": (("cupy-cuda13x", "cupy-cuda12x", "cupy"), "pikv_ds: CUDA ops compiled at run time through NVRTC, on a machine without nvcc"),
    "apex": (("apex",), "Megatron-Core: fused norms and optimizers; pikv train: FusedAdam on CUDA where DeepSpeed's is not built"),
    "transformer_engine": (("transformer-engine", "transformer_engine"), "Megatron-Core: fused layers on CUDA; pikv_ds uses local specs"),
    "flash_attn": (("flash-attn",), "pikv bench: a baseline on CUDA, raw pages only"),
    "flashinfer": (("flashinfer-python", "flashinfer"), "pikv bench: a baseline on CUDA, bf16 and fp8 pages"),
}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    subparsers.add_parser("report", help="show the environment and the ops that can run in it")


def run(args: argparse.Namespace) -> int:
    sections = {
        "environment": environment_rows(), "optional": optional_rows(), "op": op_rows(), "implementation": implementation_rows(),
    }  # fmt: skip
    print_table("Environment", sections["environment"])
    for row in sections["environment"]:
        if row["tested"].startswith(OUTSIDE):
            print(f"{row['what']} {row['found']} is outside of the versions that pikv_ds was tested with, {row['tested'][len(OUTSIDE) :]}.")
    print_table("Optional packages", sections["optional"])
    print_table("DeepSpeed C++/CUDA extension op, as in ds_report", sections["op"])
    served = sections["implementation"]
    shown = [{name: value for name, value in row.items() if name != "why not"} for row in served]
    print_table("What serves the tensors of a device: the first that can be built; PIKV_OPS forces one", shown)
    for row in served:
        if row["why not"] not in ("", ABSENT):
            print(f"{row['implementation']} does not serve {row['device']} tensors: {row['why not']}")
    sections["cpu"] = cpu_rows()
    print_table("Attention on the CPU", sections["cpu"])
    write_json(args.json, "report", [{"section": name, **row} for name, rows in sections.items() for row in rows])
    return 0


def environment_rows() -> list[dict[str, Any]]:
    import torch

    found: dict[str, Any] = versions()
    found |= {"torch CUDA": torch.version.cuda, "accelerator": _accelerator()}
    found |= {"compiler": _tool(os.environ.get("CXX", "g++")), "nvcc": _tool(_nvcc()), "ninja": _tool("ninja")}
    found |= {name: ", ".join(value) if isinstance(value, list) else value for name, value in machine().items()}
    packages, ranges = versions(), tested_ranges()
    return [
        {
            "what": name,
            "found": "not found" if value is None else str(value),
            "tested": verdict(name, packages.get(name), ranges) if name in HOSTS else "",
        }
        for name, value in found.items()
    ]


def optional_rows() -> list[dict[str, Any]]:
    """Imports none of them. "apex" is two projects."""
    from pikv_ds.training.apex import OTHER, is_nvidias

    rows, whose = [], {True: ", NVIDIA's", False: f", {OTHER}", None: ""}
    for module, (distributions, purpose) in _OPTIONAL.items():
        known = [version for name in distributions if (version := package_version(name)) is not None]
        present = importlib.util.find_spec(module) is not None
        state = (known[0] if known else "version unknown") if present else "not found"
        state += whose[is_nvidias()] if module == "apex" else ""
        rows.append({"package": module, "found": state, "would be used for": purpose})
    return rows


def op_rows() -> list[dict[str, Any]]:
    """The row of ds_report's table, asked from DeepSpeed. The `ds_report` command itself is another process and does not know the op."""
    if package_version("deepspeed") is None:
        return [{"op name": "pikv", "installed": "-", "compatible": "-", "used through": "pikv_ds.ops; deepspeed is not installed"}]
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder.all_ops import ALL_OPS
    from deepspeed.ops.op_builder.builder import probe_is_compatible

    from pikv_ds import ops

    known = "pikv" in ALL_OPS
    ops.register()
    try:
        builder = get_accelerator().create_op_builder("PiKVOpBuilder")
        return [{
            "op name": builder.name,
            "installed": "[YES]" if installed_ops[builder.name] else "[NO]",
            "compatible": "[OKAY]" if probe_is_compatible(ALL_OPS[builder.name], True) else "[NO]",
            "used through": f'get_accelerator().create_op_builder("{type(builder).__name__}"), pikv_ds.ops',
        }]  # fmt: skip
    finally:
        if not known:
            ops.unregister()


def implementation_rows() -> list[dict[str, Any]]:
    """Per device, the implementations in the order in which they are tried. Builds nothing: a compiled one is built at its first use."""
    import torch

    from pikv_ds.ops.build import builder, load

    rows = []
    for device, is_present in (("cpu", True), ("cuda", torch.cuda.is_available())):
        is_served = not is_present
        for name in load.candidates(device):
            installed = name == "torch" or builder.prebuilt(name)
            lacks = _why_not(name) if is_present else ABSENT
            compatible = not lacks
            rows.append({
                "device": device if is_present else f"{device} (none here)",
                "implementation": "torch reference" if name == "torch" else name,
                "installed": "[YES]" if installed else "[NO]",
                "compatible": "[OKAY]" if compatible else "[NO]",
                "serves": "yes" if compatible and not is_served else "no",
                "why not": lacks,
            })  # fmt: skip
            is_served = is_served or compatible
    return rows


def cpu_rows() -> list[dict[str, Any]]:
    """The kernel that reads pages, and whether memory for pages gets huge OS pages. Builds nothing."""
    from pikv_ds.ops.build import load
    from pikv_ds.ops.build.compile import built, cpu_library
    from pikv_ds.ops.memory import huge_pages

    if built(cpu_library()) is None:
        kernel, others = "not known before the ops are built (pikv build cpu)", ""
    else:
        kernels = load.cpu_kernels()
        kernel = _kernel()
        others = f"this processor also runs {', '.join(name for name, runs in kernels.items() if runs and name != kernel)}; "
        others += "PIKV_KERNEL forces one"
    return [
        {"what": "kernel", "found": kernel, "more": others},
        {"what": "huge pages", "found": huge_pages(), "more": "asked for from 2 MiB on"},
    ]


def _kernel() -> str:
    from pikv_ds.ops.build import load

    try:
        return load.cpu_instruction_set()
    except RuntimeError as error:
        return f"none: {error}"


def _why_not(name: str) -> str:
    """What an implementation lacks here: a tool, or code for one of the GPUs."""
    from pikv_ds.ops.build import builder, load
    from pikv_ds.ops.build.compile import BuildError

    if name == "cuda":
        try:
            load.check_gpus()
        except BuildError as error:
            return str(error)
    return builder.missing(name)


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
