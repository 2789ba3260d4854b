"""The parts of the CUDA benchmark that can run without a device: its pages hold what its baselines read."""

import pytest
import torch

from pikv_ds.launch.bench import ops_cuda as bench
from pikv_ds.launch.bench.ops import FORMATS
from pikv_ds.launch.bench.runs import DIM, GROUP, HEADS
from pikv_ds.launch.cli import main

B, L = 2, 512
LIMITS = {
    "bf16": 1e-5, "int8": 0.02, "int4": 0.3, "int2": 1.0, "fp8_e4m3": 0.06, "fp4_e2m1": 0.2, "int8/int4": 0.2, "int4/int2": 0.8
}  # fmt: skip


@pytest.fixture(scope="module")
def qkv():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).bfloat16()  # noqa: E731
    return draw(B, HEADS * GROUP, DIM), draw(B, HEADS, L, DIM), draw(B, HEADS, L, DIM)


@pytest.mark.parametrize("name", FORMATS)
def test_pages_hold_the_keys_of_the_baselines(qkv, name):
    expected = bench._first_in_f64(*qkv)
    call, nbytes = bench._paged(name, *qkv)
    error, dense = bench._error(call(), expected), bench._error(bench._sdpa(*qkv)(), expected)
    print(f"{name}: {error:.1e}, sdpa in bf16 {dense:.1e}, {nbytes / (B * L):.0f} bytes per token")
    assert error < LIMITS[name] and 0 < dense < 0.01


def test_pages_of_other_libraries(qkv):
    _, k, _ = qkv
    order = torch.randperm(B * L // 16)
    pages = bench._repaged(k, 16, order)
    back = pages[order].unflatten(0, (B, -1)).transpose(1, 2).flatten(2, 3)
    assert torch.equal(back, k)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(capsys):
    assert main(["bench", "ops", "--device", "cuda"]) == 1
    assert "this torch sees no CUDA device" in capsys.readouterr().out
