"""One mutant in a process of its own, forked from one that has imported the product and the tests. Nothing on disk changes.

The bug is planted by giving every function of the file the code that the changed text compiles to, wherever it is referred to. So a mutant
costs what its tests cost up to the first that fails: no import, no start of pytest, and no walk over what the process held before.
"""

from __future__ import annotations

import gc
import importlib
import os
import resource
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import CodeType, FunctionType

from .mutant import ROOT, Mutant

CPU_S, WALL_S = 60, 600
PYTEST = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "--no-header", "--tb=line")
WITHOUT = "not emu"  # what runs under emulation is compiled from other sources than those that are changed
KILLED, SURVIVED = "killed", "survived"


def run(mutant: Mutant | None, tests: Sequence[str], log: Path) -> tuple[str, float]:
    """How it ended and the CPU seconds it took: "survived" (all tests pass), "killed" (a test fails, by its name in the log), "killed by a
    limit" (it hangs). mutant None: the sources as they are. Raises: RuntimeError, when pytest could not run."""
    began = time.monotonic()
    process = os.fork()
    if not process:
        _child(mutant, tests, log)
    status, usage = _wait(process, began + WALL_S)
    cpu = usage.ru_utime + usage.ru_stime
    if os.WIFSIGNALED(status):
        return f"{KILLED} by a limit", cpu
    code = os.WEXITSTATUS(status)
    if code == 0:
        return SURVIVED, cpu
    if code != 1:
        raise RuntimeError(f"{mutant and mutant.name}: exit {code}\n{log.read_text(errors='replace')[-3000:]}")
    return KILLED, cpu


_functions: dict[str, list[FunctionType]] = {}
"""Of this process when it was warm, by file."""


def warm(files: Iterable[str]) -> None:
    """Import tests, and with them the product and what pytest loads; load the compiled ops. What is there now is walked over once, here."""
    import pytest
    from hypothesis import Phase, settings

    # A mutant is killed by the first example that fails: the smallest one is nobody's concern. Loaded before the tests take it over.
    settings.register_profile("mutants", phases=(Phase.explicit, Phase.generate), derandomize=True, database=None, deadline=None)
    settings.load_profile("mutants")
    files = list(files)
    for file in files:
        importlib.import_module(file.partition("::")[0].removesuffix(".py").replace("/", "."))
    from pikv_ds.ops.build import load

    load.ensured("cpu")
    with redirect_stdout(StringIO()):
        pytest.main([*PYTEST, "--collect-only", *files[:1]])
    settings.load_profile("mutants")  # conftest.py has loaded its own
    for one in gc.get_objects():
        if isinstance(one, FunctionType):
            _functions.setdefault(one.__code__.co_filename, []).append(one)
    gc.freeze()


def _wait(process: int, deadline: float) -> tuple[int, resource.struct_rusage]:
    while True:
        done, status, usage = os.wait4(process, os.WNOHANG)
        if done:
            return status, usage
        if time.monotonic() > deadline:
            os.killpg(process, signal.SIGKILL)
            _, status, usage = os.wait4(process, 0)
            return status, usage
        time.sleep(0.05)


def _child(mutant: Mutant | None, tests: Sequence[str], log: Path) -> None:
    """Does not return."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 5))
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(out, 1)
    os.dup2(out, 2)
    code = 5
    try:
        import pytest

        if mutant is not None:
            _plant(ROOT / mutant.place.file, mutant.text)
        sys.argv = ["pytest"]
        code = int(pytest.main([*PYTEST, "-k", WITHOUT, *tests]))
    finally:
        sys.stdout.flush()
        os._exit(code)


def _plant(path: Path, text: str) -> None:
    """Every function of `path` that this process has runs the code of `text` from now on. Raises: ValueError when none is another."""
    made = {code.co_qualname: code for code in _codes(compile(text, str(path), "exec", dont_inherit=True))}
    changed = 0
    later = [one for one in gc.get_objects() if isinstance(one, FunctionType) and one.__code__.co_filename == str(path)]
    for one in (*_functions.get(str(path), ()), *later):
        if one.__code__.co_qualname in made:
            new = made[one.__code__.co_qualname]
            changed += (new.co_code, new.co_consts, new.co_names) != (one.__code__.co_code, one.__code__.co_consts, one.__code__.co_names)
            one.__code__ = new
    if not changed:
        raise ValueError(f"no function of {path} runs other code: plant the bug within one")


def _codes(code: CodeType) -> Iterator[CodeType]:
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield each
            yield from _codes(each)
