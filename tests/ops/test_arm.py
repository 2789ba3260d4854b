"""The plain C++ of the CPU ops for 64-bit Arm, which has no kernel of its own: it compiles, and attention runs, where a cross-compiler and
qemu are there (Debian: g++-aarch64-linux-gnu, qemu-user-static)."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pikv_ds.ops.build.compile import CSRC, cpu_library

CROSS = "aarch64-linux-gnu-g++"
pytestmark = pytest.mark.skipif(shutil.which(CROSS) is None, reason=f"no cross-compiler: {CROSS}")
MAIN = Path(__file__).parent / "arm_attend.cpp"


def test_every_file_compiles():
    library = cpu_library(("-DPK_PORTABLE",))
    quick = [flag for flag in library.flags if flag != "-O3"]

    def compiled(source):
        command = [CROSS, *quick, "-O0", "-fsyntax-only", *source.flags, str(CSRC / source.path)]
        return source.path, subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    with ThreadPoolExecutor(2) as pool:
        for path, result in pool.map(compiled, library.sources):
            assert result.returncode == 0, f"{path}: {result.stderr[:2000]}"


def test_attention_runs(tmp_path):
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if emulator is None:
        pytest.skip("no emulator: qemu-aarch64-static")
    program = tmp_path / "attend"
    sources = [str(MAIN), str(CSRC / "cpu/attend_generic.cpp")]
    flags = ["-O2", "-std=c++17", "-static", "-fopenmp-simd", "-DPK_ATTEND=attend_baseline", f"-I{CSRC}"]
    subprocess.run([CROSS, *flags, *sources, "-o", str(program)], check=True, timeout=300)
    result = subprocess.run([emulator, str(program)], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert float(result.stdout.split()[-1]) < 1e-5, result.stdout
