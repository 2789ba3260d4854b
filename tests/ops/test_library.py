"""Schemas, fakes, torch.compile, and the choice of implementation."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pikv_ds import ops
from pikv_ds.ops import library
from pikv_ds.ops.build import load
from pikv_ds.ops.build.compile import BuildError
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
    _opcheck("page_score", (args[0], bounds, args[2].clamp_max(2), args[3].clamp_max(64), None, fmt.page_size, 0.2))


def test_opcheck_of_pack():
    load.ensure("cpu")
    fields, index = [torch.randn(4, 2, 3).bfloat16(), torch.arange(4, dtype=torch.int32)], torch.tensor([1, -1, 3], dtype=torch.int32)
    buffer = torch.zeros(3, 16, dtype=torch.uint8)
    _opcheck("pack", (buffer, fields, index, [0, 12], [16, 16], [3, 3]))
    _opcheck("unpack", (buffer, [x.clone() for x in fields], index, [0, 12], [16, 16]))


def test_opcheck_of_routes():
    load.ensure("cpu")
    need, fields = torch.tensor([[[True, False], [True, True]]]), [torch.randn(2, 3)]
    buffer = torch.zeros(2, 64, dtype=torch.uint8)
    _opcheck("route_pack", (buffer, need, fields, [0], 0, False))
    ops.route_pack(buffer, need, fields, groups=[0], own=0, dense=False)
    tokens, counts = torch.zeros(1, 4, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int32)
    _opcheck("route_unpack", (buffer, [torch.zeros(4, 3)], tokens, counts, [0], False))
    _opcheck("route_merge", (torch.randn(4, 2, 9), need[0], [0, 1], False))


def test_opcheck_of_checksum():
    load.ensure("cpu")
    _opcheck("checksum", (torch.arange(64, dtype=torch.uint8),))


def test_every_op_is_checked():
    """A new op needs an opcheck of its own."""
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    checked = set(re.findall(r'opcheck\((?:"|torch\.ops\.pikv\.)(\w+)', text))
    assert set(library.SCHEMAS) <= checked, set(library.SCHEMAS) - checked


@pytest.mark.parametrize("name", list(library.SCHEMAS))
def test_what_a_schema_says_it_changes_is_what_changes(name):
    """Ops that change their arguments name them as (a!); what an op returns is never one of its arguments."""
    schema = getattr(torch.ops.pikv, name).default._schema
    written = [x.name for x in schema.arguments if x.alias_info is not None and x.alias_info.is_write]
    changed = {"append": ["pages", "tail"], "migrate": ["target"], "page_bounds": ["bounds"], "pack": ["buffer"], "unpack": ["fields"],
               "route_pack": ["buffer"], "route_unpack": ["fields", "tokens", "counts"],
               "assign_slots": ["counts", "block_table", "free_top", "refcount"]}  # fmt: skip
    assert written == changed.get(name, [])
    assert (schema.returns or written) and all(x.alias_info is None for x in schema.returns)


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


@pytest.mark.parametrize(
    ("name", "backend"), [("bf16", "aot_eager"), ("int8", "aot_eager"), pytest.param("int8", "inductor", marks=pytest.mark.slow)]
)
def test_torch_compile_of_a_decode_step(name, backend):
    """append, then decode of what it has written: the compiled graph keeps their order and writes the caller's pages and tail."""
    fmt = make_case(name, lens=(70, 5), k_dim=32).fmt

    class Step(torch.nn.Module):
        def forward(self, q, k, v, pages, tail, table, seqlens, slots, rows):
            positions = seqlens.flatten()
            ops.append(pages, fmt, k * 2, v, positions, slots, tail=tail, tail_rows=rows)
            out, lse, _ = ops.decode(q, pages, fmt, table, seqlens + 1, scale=0.2, tail=tail, tail_rows=rows)
            return out + 1, lse, seqlens + 1

    def three_steps(step):
        case = make_case(name, lens=(70, 5), k_dim=32)
        size, table, seqlens = fmt.page_size, case.block_table, case.seqlens
        table = table.where(table < case.pages.shape[0], 0)  # one spare column: a page of its own is not needed for three tokens
        generator, found = torch.Generator().manual_seed(2), []
        for _ in range(3):
            k, v = (torch.randn(2, 2, 32, generator=generator).bfloat16() for _ in "kv")
            at = seqlens.flatten().long()
            slots = table[torch.arange(2), 0, at // size] * size + (at % size).int()
            out, lse, seqlens = step(
                case.q, k, v, case.pages, case.extra.get("tail"), table, seqlens, slots.int(), case.extra.get("tail_rows")
            )
            found += [out, lse]
        return [*found, case.pages, *([case.extra["tail"].nan_to_num()] if case.extra else [])]

    eager, compiled = three_steps(Step()), three_steps(torch.compile(Step(), fullgraph=True, backend=backend))
    for a, b in zip(eager, compiled, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(eager[-2 if name == "int8" else -1], make_case(name, lens=(70, 5), k_dim=32).pages)


def _python(code, **environment):
    import os

    env = os.environ | {"PYTHONPATH": os.getcwd()} | environment
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


_MERGE = """import torch
from pikv_ds import ops
from pikv_ds.ops.build import load
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


_SECOND_CHOICE = """import warnings, torch
from pikv_ds.ops.build import load
from pikv_ds.ops.build.compile import BuildError

def refuse():
    raise BuildError("nvcc failed (exit status 2): no such macro")

load.BACKENDS["cuda"] = load.Backend("cuda", refuse)
load.BACKENDS["nvrtc"] = load.Backend("cuda", lambda: None)
with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    assert load.ensure("cuda") and load.ensured("cuda") == "nvrtc"
print(len(heard), heard[0].message)
print(load.passed_over("cuda"))
assert load.passed_over("cpu") == ""
"""


def test_a_second_choice_says_why_the_first_does_not_serve():
    result = _python(_SECOND_CHOICE)
    said, kept = result.stdout.strip().splitlines()
    assert said.startswith("1 pikv: the ops on 'cuda' tensors run by 'nvrtc', not as preferred: cuda: nvcc failed"), result.stderr
    assert kept == "cuda: nvcc failed (exit status 2): no such macro"


def test_stats_say_what_was_passed_over(tmp_path):
    code = (
        "from tests.harness.driver import Driver, layer; from pikv_ds.cache.stats import stats; "
        "import warnings; warnings.simplefilter('ignore'); said = stats(Driver([layer(0)]).cache, 1, 1); "
        "print(said['attention_impl'], '|', said['ops_passed_over'])"
    )
    result = _python(code, CXX="no-such-compiler", TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert result.stdout.startswith("pikv torch fp32 | cpu: 'no-such-compiler' was not found"), result.stderr


@pytest.mark.parametrize(("capability", "fits"), [((8, 0), True), ((8, 9), True), ((9, 0), True), ((7, 5), False), ((10, 0), False)])
def test_a_gpu_that_the_library_has_no_code_for_is_named(capability, fits):
    if fits:
        load.check_covered("A GPU", capability, ("80", "90"))
        return
    with pytest.raises(BuildError, match=rf"A GPU is an sm_{capability[0]}{capability[1]}, and the library has code for sm_80, sm_90 only"):
        load.check_covered("A GPU", capability, ("80", "90"))
    with pytest.raises(BuildError):
        load.check_covered("A GPU", (8, 0), ("90",))


@pytest.mark.parametrize(
    ("choice", "message"),
    [("cpu", "'no-such-compiler' was not found"), ("fast", "PIKV_OPS='fast' is not one of torch, cpu")],
)
def test_forcing_what_cannot_be_is_an_error(choice, message, tmp_path):
    result = _python(_MERGE.format("pass"), PIKV_OPS=choice, CXX="no-such-compiler", TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert result.returncode and message in result.stderr, result.stderr
