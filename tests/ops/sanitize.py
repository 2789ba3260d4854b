"""The CPU ops built with AddressSanitizer and UndefinedBehaviorSanitizer, through the matrix of tests/ops/matrix.py.

    python -m tests.ops.sanitize [--portable] [--long] [--json FILE]

--portable leaves the files with AVX instructions out, which take most of the time to build; tests/ops/test_sanitize.py runs that.
The sanitizer's runtime must be in a process before anything else, so this starts run_matrix in a new one with LD_PRELOAD. torch allocates
through malloc, so reads and writes beyond a tensor are seen, by the byte. The first finding ends the process with its stack.
"""

from __future__ import annotations

import os
import subprocess
import sys

from pikv_ds.ops.build.compile import build, cpu_library
from tests.ops.run_matrix import CPU_LIBRARY

FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1")


def environment(portable: bool) -> dict[str, str]:
    """Builds the library; what its process must be started with. Raises BuildError."""
    library = cpu_library((*FLAGS, "-DPK_PORTABLE") if portable else FLAGS)
    return os.environ | {
        CPU_LIBRARY: str(build(library)),
        "LD_PRELOAD": " ".join(_runtime(library.compiler, name) for name in ("asan", "ubsan")),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself is not free of leaks
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def _runtime(compiler: str, name: str) -> str:
    command = [compiler, f"-print-file-name=lib{name}.so"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main(arguments: list[str]) -> int:
    rest = [argument for argument in arguments if argument != "--portable"]
    return subprocess.run([sys.executable, "-m", "tests.ops.run_matrix", "cpu", *rest], env=environment(rest != arguments)).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
