"""outcomes.json: what was recorded, and on which machine. One rank of a case is one line, so that a diff names it."""

import json
from importlib.metadata import version
from pathlib import Path

import torch

from tests.recorded import probe

PATH = Path(__file__).with_name("outcomes.json")
PACKAGES = ("torch", "transformers", "megatron-core")


def machine() -> dict[str, str]:
    """What decides about the last bit."""
    kernels = {"kernel": probe.kernel(), "torch_kernels": torch.backends.cpu.get_cpu_capability()}
    return {"cpu": _cpu()} | kernels | {name: version(name) for name in PACKAGES}


def _cpu() -> str:
    """Model name, family, model and stepping of the first core."""
    names = ("model name", "cpu family", "model", "stepping")
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    return ", ".join(facts.get(name, "unknown") for name in names)


def read(path: Path = PATH) -> dict:
    return json.loads(path.read_text())


def write(path: Path, about: dict, outcomes: dict[str, list[dict]]) -> None:
    line = lambda value: json.dumps(value, separators=(",", ":"))  # noqa: E731
    cases = [f"{json.dumps(name)}: [\n" + ",\n".join(map(line, ranks)) + "\n]" for name, ranks in outcomes.items()]
    path.write_text(f'{{"machine": {json.dumps(about)},\n"cases": {{\n' + ",\n".join(cases) + "\n}}\n")
