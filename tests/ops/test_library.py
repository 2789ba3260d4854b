"""Schemas, fakes, torch.compile, and the choice of implementation."""

import subprocess
import sys

import pytest
import torch

from pikv_ds import ops
from pikv_ds.ops import library, load
from tests.ops.cases import make_case

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def _decode_args(name="int8", **options):
    case = make_case(name, lens=(70, 5), k_dim=32)
    return (case.q, case.pages, case.block_table, case.seqlens, case.q_positions, None, case.extra.get("tail"), case.extra.get("tail_rows"),
            *library.layout(case.fmt), 0.2, 10, True, 0)  # fmt: skip


def _opcheck(name, args):
    result = torch.library.opcheck(getattr(torch.ops.pikv, name), args, raise_exception=False)
    assert set(result.values()) == {"SUCCESS"}, result


@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_opcheck(name):
    args = _decode_args(name)
    load.ensure("cpu")
    _opcheck("decode", args)
    q = torch.randn(2, 3, *args[0].shape[1:])
    asked = torch.zeros(2, 3, dtype=torch.int32)
    _opcheck("prefill_cached", (q, *args[1:4], asked, *args[6:15], 0.2, 0, True, 0))
    fmt = make_case(name, lens=(70, 5), k_dim=32).fmt
    k = torch.randn(3, 2, 32)
    slots = torch.tensor([0, -1, 1], dtype=torch.int32)
    rows = torch.zeros(3, dtype=torch.int32) if fmt.grouped else None
    _opcheck("append", (args[1].clone(), args[6], k, k.clone(), slots.clone(), slots, rows, *library.layout(fmt)))
    _opcheck("merge", (torch.randn(4, 2, 8), torch.randn(4, 2)))
    ids = torch.tensor([0, 1], dtype=torch.int32)
    _opcheck("migrate", (torch.zeros(2, 64, dtype=torch.uint8), torch.ones(3, 64, dtype=torch.uint8), ids, ids.clone()))
    bounds = torch.zeros(args[1].shape[0], 2, 2, 32)
    _opcheck("page_bounds", (bounds, args[1], slots, args[6], rows, *library.layout(fmt)))
    _opcheck("page_score", (args[0], bounds, args[2].clamp_max(2), args[3].clamp_max(64), fmt.page_size, 0.2))


def test_opcheck_of_pack():
    load.ensure("cpu")
    fields, index = [torch.randn(4, 2, 3).bfloat16(), torch.arange(4, dtype=torch.int32)], torch.tensor([1, -1, 3], dtype=torch.int32)
    buffer = torch.zeros(3, 16, dtype=torch.uint8)
    _opcheck("pack", (buffer, fields, index, [0, 12], [16, 16], [3, 3]))
    _opcheck("unpack", (buffer, [x.clone() for x in fields], index, [0, 12], [16, 16]))


def test_torch_compile_fullgraph():
    case = make_case("bf16", lens=(70, 5), k_dim=32)

    class Attention(torch.nn.Module):
        def forward(self, q, pages, block_table, seqlens):
            out, lse, _ = ops.decode(q * 2, pages, case.fmt, block_table, seqlens, scale=0.2)
            return out + 1, lse

    args = (case.q, case.pages, case.block_table, case.seqlens)
    compiled = torch.compile(Attention(), fullgraph=True, backend="aot_eager")(*args)
    expected = Attention()(*args)
    assert torch.equal(compiled[0], expected[0]) and torch.equal(compiled[1], expected[1])


def _python(code, **environment):
    import os

    env = os.environ | {"PYTHONPATH": os.getcwd()} | environment
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


_MERGE = """import torch
from pikv_ds import ops
from pikv_ds.ops import load
{}
ops.merge(torch.zeros(2, 8), torch.zeros(2))
print(load.loaded())
"""


def test_import_loads_nothing_and_first_use_does():
    result = _python(_MERGE.format("assert not load.loaded()"))
    assert "{'cpu': 'cpu'}" in result.stdout, result.stderr


def test_forced_to_torch():
    result = _python(_MERGE.format("pass"), PIKV_OPS="torch")
    assert "{'cpu': 'torch'}" in result.stdout and "Warning" not in result.stderr, result.stderr


def test_a_missing_compiler_is_named_once_and_torch_takes_over(tmp_path):
    code = _MERGE.format("pass") + "ops.merge(torch.zeros(2, 8), torch.zeros(2))"
    result = _python(code, CXX="no-such-compiler", TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert "{'cpu': 'torch'}" in result.stdout, result.stderr
    assert result.stderr.count("'no-such-compiler' was not found; install it") == 1
    assert result.stderr.count("the ops run in plain torch, slower") == 1


@pytest.mark.parametrize(
    ("choice", "message"),
    [("cpu", "'no-such-compiler' was not found"), ("fast", "PIKV_OPS='fast' is not one of torch, cpu")],
)
def test_forcing_what_cannot_be_is_an_error(choice, message, tmp_path):
    result = _python(_MERGE.format("pass"), PIKV_OPS=choice, CXX="no-such-compiler", TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert result.returncode and message in result.stderr, result.stderr
