"""Every file that includes torch compiles against the oldest torch that setup.py takes, not only the one that is installed.

The kernels include nothing of torch, so a C++ compiler sees all of it: the launchers as the host emulation compiles them.
"""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from pikv_ds.ops.build.compile import CSRC, cpu_library
from pikv_ds.ops.build.cuda_build import emu_library, nvcc
from tests.long_form import LONG
from tests.ops.torch_headers import headers, oldest_torch

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def include() -> str:
    found = headers(oldest_torch())
    if isinstance(found, str):
        pytest.skip(found)
    return f"-I{found}"


def _includes_torch(path: str) -> bool:
    return "torch/csrc" in (CSRC / path).read_text()


def _commands(include: str) -> dict[str, list[str]]:
    """One check of its syntax per file."""
    cpu = {s.path: (cpu_library(), s) for s in cpu_library().sources if _includes_torch(s.path)}
    launchers = {s.path: (emu_library(), s) for s in emu_library().sources if _includes_torch(s.path)}
    return {
        path: ["g++", *(flag for flag in library.flags if not flag.startswith("-I") and flag != "-O3"), *source.flags, include,
               "-fsyntax-only", str(CSRC / path)]
        for path, (library, source) in (cpu | launchers).items()
    }  # fmt: skip


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    return "\n".join(line for line in result.stderr.splitlines() if "error" in line)[:2000] if result.returncode else ""


def test_the_oldest_torch_is_enough(include):
    commands = _commands(include)
    assert {path.split("/")[0] for path in commands} == {"cpu", "cuda"} and len(commands) >= 11
    with ThreadPoolExecutor(2) as pool:
        failed = dict(zip(commands, pool.map(_run, commands.values()), strict=True))
    assert not any(failed.values()), failed


def test_what_only_newer_torches_have_is_noticed(include, tmp_path):
    text = "#include <torch/csrc/stable/tensor.h>\nvoid f(int32_t e) { STABLE_TORCH_ERROR_CODE_CHECK(e); }\n"
    (tmp_path / "newer.cpp").write_text(text)
    assert "STABLE_TORCH_ERROR_CODE_CHECK" in _run(["g++", "-std=c++17", include, "-fsyntax-only", str(tmp_path / "newer.cpp")])


@pytest.mark.skipif(not LONG or shutil.which(nvcc()) is None, reason="long form: PIKV_TEST_LONG=1, with nvcc")
def test_nvcc_too(include):
    """The launcher that includes most, as the CUDA library compiles it: what -DPK_HOST_EMU leaves out is in arguments.h."""
    from pikv_ds.ops.build.cuda_build import cuda_library

    flags = [flag for flag in cuda_library().flags if not flag.startswith(("-I", "-gencode", "-O3", "-Xptxas"))]
    command = [nvcc(), *flags, include, "-gencode=arch=compute_90,code=sm_90", "-c", "-o", "/dev/null", str(CSRC / "cuda" / "slots.cu")]
    assert not _run(command)
