"""The attention kernels of the CPU: which one serves, what is refused, and bits that must not depend on threads or on where pages lie."""

import pytest
import torch

from pikv_ds import ops
from pikv_ds.ops.build import load
from tests.ops.cases import answer, compare, make_case

pytestmark = pytest.mark.skipif(load.ensured("cpu") != "cpu", reason="the CPU ops are not served by the compiled library")
KERNELS = [name for name, runs in load.cpu_kernels().items() if runs]
FAST = {"int8": 1.6, "int4": 1.1, "int2": 1.1}  # what fast may add: times the error that the format has by itself


def test_the_kernel_is_the_one_that_is_named(monkeypatch):
    for name in KERNELS:
        monkeypatch.setenv("PIKV_KERNEL", name)
        assert load.cpu_instruction_set() == name
        assert load.kernel("cpu") == f"cpu {name}"


def test_names_that_are_none_or_cannot_run_are_refused(monkeypatch):
    monkeypatch.setenv("PIKV_KERNEL", "avx1024")
    with pytest.raises(RuntimeError, match="PIKV_KERNEL=avx1024 is not one of baseline, avx2"):
        load.cpu_instruction_set()
    with pytest.raises(RuntimeError, match="PIKV_KERNEL=avx1024 is not one of baseline, avx2"):
        _decode(make_case("int8", lens=(70,)))
    for name in set(load.cpu_kernels()) - set(KERNELS):
        monkeypatch.setenv("PIKV_KERNEL", name)
        with pytest.raises(RuntimeError, match=f"PIKV_KERNEL={name} cannot run on this processor"):
            load.cpu_instruction_set()


@pytest.mark.parametrize("kernel", KERNELS)
def test_bits_depend_on_neither_threads_nor_page_ids(kernel, monkeypatch):
    monkeypatch.setenv("PIKV_KERNEL", kernel)
    case = make_case("int4", lens=(9000, 100), k_dim=64)
    found = _decode(case)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(found, _decode(case), strict=True))
    finally:
        torch.set_num_threads(before)
    order = torch.randperm(len(case.pages), generator=torch.Generator().manual_seed(3))
    used = case.block_table < len(case.pages)
    case.pages = case.pages[order]
    case.block_table = torch.where(used, torch.argsort(order)[case.block_table.clamp(max=len(order) - 1).long()].int(), case.block_table)
    assert all(torch.equal(a, b) for a, b in zip(found, _decode(case), strict=True))


@pytest.mark.skipif("phases_amx" not in KERNELS, reason="this processor has no AMX")
@pytest.mark.parametrize("name", ["int8", "int4", "int2", "int8/int4"])
def test_tiles_give_the_bits_of_vectors(name, monkeypatch):
    case = make_case(name, lens=(200, 64, 3), group=4, k_dim=128)
    found = []
    for kernel in ("phases", "phases_amx"):
        monkeypatch.setenv("PIKV_KERNEL", kernel)
        found.append(_decode(case))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", list(FAST))
def test_fast_adds_what_is_declared(name, monkeypatch):
    """Against attention on what was given, not on what is stored."""
    if "phases" not in KERNELS:
        pytest.skip("only the kernels in phases have a fast way")
    monkeypatch.setenv("PIKV_KERNEL", "phases")
    case = make_case(name, lens=(1024,), heads=4, group=4, k_dim=128)
    exact = answer_on_given(case)
    high = (_decode(case)[0].double() - exact).norm() / exact.norm()
    case.fmt = ops.PageFormat(name, 4, 128, 128, case.fmt.page_size, fast=True)
    fast = (_decode(case)[0].double() - exact).norm() / exact.norm()
    assert high < fast <= FAST[name] * high, f"high {high:.3e}, fast {fast:.3e}"


def test_fast_is_as_high_where_nothing_is_integer(monkeypatch):
    case = make_case("bf16", lens=(130,))
    found = _decode(case)
    case.fmt = ops.PageFormat("bf16", case.fmt.num_kv_heads, case.fmt.k_dim, case.fmt.v_dim, case.fmt.page_size, fast=True)
    assert torch.equal(found[0], _decode(case)[0])
    compare(found[0], answer(case)[0], 1e-4, "out")


def answer_on_given(case):
    heads = case.fmt.num_kv_heads
    q = case.q.double().view(1, heads, -1, case.fmt.k_dim) * case.fmt.k_dim**-0.5
    k, v = (x.double().view(1, -1, heads, x.shape[-1]).transpose(1, 2) for x in (case.k, case.v))
    return ((q @ k.transpose(-1, -2)).softmax(-1) @ v).flatten(1, 2)


def _decode(case):
    out, lse, _ = ops.decode(
        case.q, case.pages, case.fmt, case.block_table, case.seqlens, scale=case.fmt.k_dim**-0.5, q_positions=case.q_positions, **case.extra
    )
    return out, lse
