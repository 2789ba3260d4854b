"""Which device a launched rank works on, chosen before a model is loaded; and what it asks of torch's CUDA allocator.

There is no GPU here: torch is told how many there are.
"""

import ast
from pathlib import Path

import pytest
import torch

from pikv_ds.launch import device, ranks

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.fixture
def machine(monkeypatch):
    """A machine with GPUs, and the variables of a launcher; gives the list of devices that were made the current one."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)

    def use(gpus, **variables):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE", "DS_ACCELERATOR"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return chosen

    return use


@pytest.mark.parametrize(
    ("gpus", "variables", "where", "current"),
    [
        (0, {}, "cpu", []),
        (2, {}, "cuda", [0]),
        (4, {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}, "cuda", [3]),
        (2, {"LOCAL_RANK": "1", "LOCAL_SIZE": "2", "WORLD_SIZE": "4"}, "cuda", [1]),
        (1, {"LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "cpu", []),
        (2, {"LOCAL_RANK": "1", "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}, "cpu", []),
    ],
)
def test_a_rank_takes_its_own_gpu(machine, gpus, variables, where, current):
    chosen = machine(gpus, **variables)
    assert device.own_device() == where and chosen == current


def test_no_launcher_names_a_gpu_before_it_has_chosen_one():
    """A bare "cuda" is the first GPU for every rank. Benchmarks run in one process."""
    for path in LAUNCH.rglob("*.py"):
        if path.name == "device.py" or path.parent.name == "bench":
            continue
        for call in [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]:
            moves = isinstance(call.func, ast.Attribute) and call.func.attr in ("to", "from_pretrained", "cuda")
            words = [node.value for node in ast.walk(call) if isinstance(node, ast.Constant)]
            assert not (moves and any(isinstance(word, str) and word.startswith("cuda") for word in words)), f"{path}:{call.lineno}"


def test_memory_may_grow_unless_the_user_says_otherwise(monkeypatch):
    for given in device.ALLOCATOR:
        monkeypatch.delenv(given, raising=False)
    asked: dict[str, str] = {}
    device.let_memory_grow(asked)
    assert asked == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert ranks.rank_environment(2)["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    for given in device.ALLOCATOR:
        own = {given: "max_split_size_mb:512"}
        device.let_memory_grow(own)
        assert own == {given: "max_split_size_mb:512"}
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:native")
    assert "PYTORCH_CUDA_ALLOC_CONF" not in ranks.rank_environment(2)
