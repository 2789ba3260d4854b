"""The matrix under AddressSanitizer and UndefinedBehaviorSanitizer: python -m tests.ops.sanitize runs it with the AVX files too."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.long_form import LONG
from tests.ops.run_matrix import CPU_LIBRARY
from tests.ops.sanitize import environment

RUNTIME = shutil.which("g++") and subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif(not RUNTIME or not Path(RUNTIME).is_absolute(), reason="g++ with its sanitizer libraries is not installed")
def test_the_matrix_is_clean():
    env = environment(portable=True)
    assert b"__asan_report_load4" in Path(env[CPU_LIBRARY]).read_bytes(), "the library was built without the sanitizer"
    command = [sys.executable, "-m", "tests.ops.run_matrix", "cpu", *([] if LONG else ["--shard", "1/3"])]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and "Overriding" not in done.stderr, done.stderr[-4000:]
    assert "checksum" in done.stdout
