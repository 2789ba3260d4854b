"""Registers and spills of kernels, from what `ptxas -v` prints, and the limits they must keep."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import asdict, dataclass

MAX_REGISTERS = 168  # of a thread in a block of 128: three blocks share a multiprocessor's 65,536
MAX_TENSOR_REGISTERS = 255  # two blocks, of the kernels on tensor cores: tiles of keys and values wait in registers

_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(sm_\w+)'")
_SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")


@dataclass(frozen=True)
class KernelUse:
    kernel: str
    arch: str
    registers: int
    stack_bytes: int
    spill_bytes: int  # stores and loads

    def breach(self) -> str:
        """What is wrong with it; empty if nothing is."""
        if self.spill_bytes:
            return f"spills {self.spill_bytes} bytes"
        most = MAX_TENSOR_REGISTERS if self.kernel.startswith(("attend_tensor_kernel", "attend_latent_kernel")) else MAX_REGISTERS
        return f"{self.registers} registers > {most}" if self.registers > most else ""

    def row(self) -> dict[str, object]:
        return asdict(self) | {"breach": self.breach()}


def parse(log: str) -> list[KernelUse]:
    """One entry per kernel and architecture, sorted. Raises ValueError on a log that names a kernel without its registers."""
    found, name, spill = [], None, None
    for line in log.splitlines():
        if entry := _ENTRY.search(line):
            if name is not None:
                raise ValueError(f"ptxas gave no registers for {name}")
            name, spill = entry.groups(), None
        elif match := _SPILL.search(line):
            spill = [int(x) for x in match.groups()]
        elif (match := _USED.search(line)) and name is not None:
            if spill is None:
                raise ValueError(f"ptxas gave no spills for {name}")
            found.append((*name, int(match[1]), spill[0], spill[1] + spill[2]))
            name = None
    if name is not None:
        raise ValueError(f"ptxas gave no registers for {name}")
    readable = _demangle([entry[0] for entry in found])
    return sorted((KernelUse(readable[k], *rest) for k, *rest in found), key=lambda use: (use.kernel, use.arch))


def _demangle(names: list[str]) -> dict[str, str]:
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None or not names:
        return {name: name for name in names}
    shown = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    return {name: re.sub(r"^void |pikv::|\(.*", "", text) for name, text in zip(names, shown, strict=True)}
