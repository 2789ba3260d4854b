"""What the CUDA library asks of its process: nothing that its own dependencies lack; and torch's stream at run time."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pikv_ds.ops.build.compile import CSRC, build
from pikv_ds.ops.build.cuda_build import cuda_library, nvcc
from tests.long_form import LONG
from tests.ops.few_kernels import few_library

TORCH = Path(torch.__file__).parent
needs = pytest.mark.skipif(any(shutil.which(tool) is None for tool in ("nm", "readelf", "ldd")), reason="binutils are not installed")


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def _symbols(library: Path, which: str) -> set[str]:
    """Without versions. Weak and strong ones."""
    return {line.split()[-1].partition("@")[0] for line in _said("nm", "-D", which, str(library)).splitlines()}


def _undefined_outside(library: Path) -> set[str]:
    """Names that no library of the DT_NEEDED closure defines, but for those that the compiler puts into every library."""
    closure = [Path(found) for found in re.findall(r"=> (/\S+)", _said("ldd", str(library)))]
    closure += [Path(found) for found in re.findall(r"^\s*(/\S+) \(0x", _said("ldd", str(library)), re.MULTILINE)]  # the loader itself
    missing = _symbols(library, "--undefined-only")
    for path in closure:
        missing -= _symbols(path, "--defined-only")
    return missing - {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__cxa_finalize"}


def _compile(to: Path, text: str, *flags: str) -> Path:
    source = to.with_suffix(".cpp")
    source.write_text(text)
    subprocess.run(["g++", "-std=c++17", "-shared", "-fPIC", "-o", str(to), str(source), *flags], check=True, timeout=300)
    return to


@needs
@pytest.mark.slow
@pytest.mark.skipif(shutil.which(nvcc()) is None, reason="nvcc is not installed")
@pytest.mark.timeout(1500)  # nvcc, if this is the first
def test_no_symbol_lies_outside_what_is_linked():
    assert _undefined_outside(build(cuda_library() if LONG else few_library())) == set()


@needs
def test_a_weak_reference_is_noticed(tmp_path):
    """As the library once had: null at run time, wherever its owner is loaded."""
    text = 'extern "C" __attribute__((weak)) int aoti_elsewhere(int); extern "C" int call() { return aoti_elsewhere(1); }'
    assert _undefined_outside(_compile(tmp_path / "libweak.so", text)) == {"aoti_elsewhere"}


_ASK = """import ctypes, sys, torch
provider, ours = sys.argv[1:]
if provider:
    ctypes.CDLL(provider)  # RTLD_LOCAL, as Python loads what torch._C links
ours = ctypes.CDLL(ours)
ours.pikv_stream_of.restype = ctypes.c_char_p
print(ours.pikv_stream_of(3).decode())
"""


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    """The look-up as the CUDA library has it, in a library that needs no nvcc."""
    text = f"""#include "{CSRC}/cuda/torch_stream.h"
#include <cstdio>
extern "C" const char* pikv_stream_of(int device) {{
  static char text[512];
  try {{ std::snprintf(text, sizeof text, "%p", pikv::current_stream(device)); }}
  catch (const std::exception& error) {{ std::snprintf(text, sizeof text, "%s", error.what()); }}
  return text;
}}
"""
    flags = (f"-I{TORCH / 'include'}", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}")
    return _compile(tmp_path_factory.mktemp("ours") / "libours.so", text, *flags, "-ltorch_cpu", "-lc10")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
@pytest.mark.skipif((TORCH / "lib" / "libtorch_cuda.so").exists(), reason="this torch is a CUDA build: its own library answers, and loads")
@pytest.mark.parametrize("present", [True, False])
def test_the_stream_is_found_in_a_torch_that_nobody_made_global(ours, tmp_path, present):
    """A library of the name of torch's, with the one function, loaded the way Python does it."""
    provider = _compile(
        tmp_path / "libtorch_cuda.so",
        'extern "C" int aoti_torch_get_current_cuda_stream(int device, void** stream) { *stream = (void*)(0x1000L + device); return 0; }',
        "-Wl,-soname,libtorch_cuda.so",
    )
    given = [str(provider) if present else "", str(ours)]
    result = subprocess.run([sys.executable, "-c", _ASK, *given], env=os.environ, capture_output=True, text=True, timeout=120)
    assert ("0x1003" if present else "libtorch_cuda is not loaded in this process") in result.stdout, result.stderr
