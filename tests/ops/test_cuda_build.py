"""The CUDA library: compiled for sm_80 and sm_90, within the limits, loadable beside a CPU torch; the same text through NVRTC."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pikv_ds.launch.commands import _build_targets as build_targets
from pikv_ds.launch.commands import build as cmd_build
from pikv_ds.ops.build import ptxas
from pikv_ds.ops.build.compile import BuildError, ToolMissing, compiler_name
from pikv_ds.ops.build.cuda_build import ARCHITECTURES, cuda_library, nvcc
from pikv_ds.ops.format.kernels import built_dims, tensor_kernels
from pikv_ds.ops.nvrtc import compiler as nvrtc
from tests.long_form import LONG
from tests.ops.few_kernels import FULLEST_TENSOR, few_library

needs_nvcc = pytest.mark.skipif(shutil.which(nvcc()) is None, reason="nvcc is not installed")


def _python(code, **environment):
    env = os.environ | {"PYTHONPATH": os.getcwd()} | environment
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=1400)


RECORD = Path(__file__).resolve().parents[2] / "docs" / "results" / "build.json"
ATTENTION, TENSOR, LATENTS, OTHERS = 82, 85, 10, 15
KERNELS = ATTENTION + TENSOR + LATENTS + OTHERS
FEW = 6 + 7 + 5 + len(tensor_kernels(FULLEST_TENSOR, built_dims())) + OTHERS  # few_kernels.py


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads(RECORD.read_text())


@pytest.fixture
def compiled(monkeypatch) -> None:
    """The short form compiles few kernels (few_kernels.py)."""
    if not LONG:
        monkeypatch.setattr(build_targets, "cuda_library", few_library)


def assert_as_recorded(uses: list[ptxas.KernelUse], record: dict) -> None:
    """The registers of docs/results/build.json, when this is the nvcc that it was made with."""
    if record["rows"][0]["compiler"] == compiler_name(nvcc()):
        rows = {(row["kernel"], row["arch"]): row for row in record["rows"] if row.get("arch")}
        assert [use.row() | {"target": "cuda"} for use in uses] == [rows[use.kernel, use.arch] for use in uses]


def test_the_record_is_of_these_kernels(record):
    """What the short form does not compile was compiled when the record was made; after a change of the kernels:
    pikv build cuda --json docs/results/build.json."""
    assert record["sources"] == [{"target": "cuda", "digest": build_targets.kernel_digest()}], "the kernels changed: make the record again"
    row, *uses = record["rows"]
    assert row["target"] == "cuda" and row["status"] == "ok" and not any(use["breach"] or use["spill_bytes"] for use in uses)
    assert len({(use["kernel"], use["arch"]) for use in uses}) == len(uses) == len(ARCHITECTURES) * KERNELS
    assert max(use["registers"] for use in uses if use["kernel"].startswith("attend_kernel")) <= ptxas.MAX_REGISTERS


@needs_nvcc
@pytest.mark.slow
@pytest.mark.timeout(1500)  # nvcc
def test_kernels_keep_the_limits(monkeypatch, compiled, record):
    row, uses = build_targets.build_target("cuda")
    assert row["status"] == "ok", row["detail"]
    assert len(uses) == len(ARCHITECTURES) * (KERNELS if LONG else FEW) and {use.arch for use in uses} == {f"sm_{a}" for a in ARCHITECTURES}
    kinds = [use.kernel.partition("<")[0] for use in uses]
    if LONG:
        found = [kinds.count(name) for name in ("attend_kernel", "attend_tensor_kernel", "attend_latent_kernel")]
        assert found == [len(ARCHITECTURES) * n for n in (ATTENTION, TENSOR, LATENTS)]
    assert_as_recorded(uses, record)
    # The same log against a lower limit: the command fails and names the kernel.
    monkeypatch.setattr(ptxas, "MAX_REGISTERS", 100)
    row, _ = build_targets.build_target("cuda")
    assert row["status"] == "over the limits" and "attend_kernel<3, 128, 4, true> on sm_80: 1" in row["detail"]


@needs_nvcc
@pytest.mark.slow
@pytest.mark.timeout(1500)  # nvcc, if this is the first
def test_a_breach_is_the_exit_status(monkeypatch, tmp_path, compiled):
    monkeypatch.setattr(ptxas, "MAX_REGISTERS", 100)
    import argparse

    arguments = argparse.Namespace(target="cuda", json=str(tmp_path / "build.json"))
    assert cmd_build.run(arguments) == 1
    rows = json.loads((tmp_path / "build.json").read_text())["rows"]
    assert rows[0]["status"] == "over the limits" and any(row.get("breach") for row in rows[1:])


@needs_nvcc
@pytest.mark.slow
@pytest.mark.timeout(1500)  # nvcc, if this is the first
def test_it_loads_beside_a_cpu_torch():
    code = (
        "import torch; from pikv_ds.ops import library; from pikv_ds.ops.build import load; from tests.ops import few_kernels;"
        f"load.cuda_library = load.cuda_library if {LONG} else few_kernels.few_library; load.load_cuda(); "
        "print([n for n in library.SCHEMAS if not torch._C._dispatch_has_kernel_for_dispatch_key(f'pikv::{n}', 'CUDA')])"
    )
    result = _python(code)
    assert result.returncode == 0 and result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize("given", ["", "70", "80,", "sm_90"])
def test_unknown_architectures_are_refused(monkeypatch, given):
    monkeypatch.setenv("PIKV_CUDA_ARCH", given)
    with pytest.raises(ValueError, match="legal are 80, 90"):
        cuda_library()


def test_no_fast_math():
    assert not any("fast" in flag for flag in cuda_library().flags)


_LOG = """ptxas info    : Compiling entry function '_Z1fv' for 'sm_80'
ptxas info    : Function properties for _Z1fv
    16 bytes stack frame, {} bytes spill stores, {} bytes spill loads
ptxas info    : Used {} registers, used 1 barriers, 664 bytes cmem[0]
"""


@pytest.mark.parametrize("numbers, breach", [((0, 0, 168), ""), ((0, 0, 169), "169 registers > 168"), ((8, 12, 90), "spills 20 bytes")])
def test_limits(numbers, breach):
    (use,) = ptxas.parse(_LOG.format(*numbers))
    assert (use.arch, use.registers, use.stack_bytes, use.breach()) == ("sm_80", numbers[2], 16, breach)


@pytest.mark.parametrize("lost", ["Used", "spill stores"])
def test_a_log_without_the_numbers_is_refused(lost):
    text = "\n".join(line for line in _LOG.format(0, 0, 100).splitlines() if lost not in line)
    with pytest.raises(ValueError, match="ptxas gave no"):
        ptxas.parse(text)


@pytest.mark.parametrize("target, status", [("cuda", "missing"), ("nvrtc", "missing")])
def test_a_missing_tool_fails_alone_and_is_skipped_under_all(target, status, monkeypatch, capsys):
    import argparse

    monkeypatch.setenv("CUDA_HOME", "/nonexistent")

    def absent():
        raise ToolMissing("the package cupy was not found; install cupy-cuda13x")

    monkeypatch.setattr(nvrtc, "compiler", absent)
    assert cmd_build.run(argparse.Namespace(target=target, json=None)) == 1
    assert "was not found; install" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(cmd_build, "TARGETS", (target,))
    assert cmd_build.run(argparse.Namespace(target="all", json=None)) == 0
    assert "skipped" in capsys.readouterr().out


@pytest.fixture
def with_nvrtc():
    try:
        return nvrtc.version()
    except ToolMissing as missing:
        pytest.skip(str(missing))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["int8", "pages"])
def test_nvrtc_compiles_the_same_text(with_nvrtc, part, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path, names = nvrtc.cached_part(part, "90")
    assert path.read_bytes()[:4] == b"\x7fELF" and set(names) == set(nvrtc.PARTS[part].kernels)
    assert nvrtc.cached_part(part, "90") == (path, names)
    uses = ptxas.parse(nvrtc.compile_part(part, "80").log)
    assert len(uses) == len(names) and not [use for use in uses if use.breach()]


def test_nvrtc_shows_its_errors(with_nvrtc, monkeypatch):
    monkeypatch.setattr(nvrtc, "source", lambda part: "__global__ void f() { undeclared = 1; }")
    with pytest.raises(BuildError, match="undeclared"):
        nvrtc.compile_part("pages", "90")


def test_nvrtc_needs_no_include():
    assert "#include" not in "".join(nvrtc.source(part) for part in nvrtc.PARTS)


def test_emulation_serves_the_whole_interface():
    code = (
        "import torch; from pikv_ds import ops; from pikv_ds.ops.build import load; fmt = ops.PageFormat('bf16', 1, 32, 32, 4);"
        "pages = ops.new_pages(fmt, 2);"
        "k = torch.randn(3, 1, 32); ops.append(pages, fmt, k, k, torch.arange(3), torch.tensor([4, 5, 6]));"
        "out, lse, _ = ops.decode(torch.zeros(1, 2, 32), pages, fmt, torch.tensor([[[1]]]), torch.tensor([[3]]), scale=1.0);"
        "torch.testing.assert_close(out[0, 1], k[:, 0].bfloat16().float().mean(0)); print(load.loaded(), round(float(lse[0, 0].exp()), 4))"
    )
    result = _python(code, PIKV_OPS="emu")
    assert "{'cpu': 'emu'} 3.0" in result.stdout, result.stderr
