"""PiKVOpBuilder: DeepSpeed's view of the CPU library. Import only where DeepSpeed is there (builder.py does)."""

from __future__ import annotations

from deepspeed.ops.op_builder.builder import OpBuilder
from deepspeed.ops.op_builder.cpu.builder import CPUOpBuilder

from . import builder
from .compile import CSRC, build, cpu_library


class PiKVOpBuilder(CPUOpBuilder):
    """Names, sources and flags for DeepSpeed's reports; building is our own (compile.py), since each file has its instruction set.

    DeepSpeed's jit_load would compile every file with -march=native in one go: such a library crashes on an older CPU with the same cache.
    """

    BUILD_VAR = "DS_BUILD_PIKV"
    NAME = builder.NAME

    def __init__(self) -> None:
        super().__init__(name=self.NAME)

    def absolute_name(self) -> str:
        return __package__

    def sources(self) -> list[str]:
        return sorted({str(CSRC / source.path) for source in cpu_library().sources})

    def include_paths(self) -> list[str]:
        return [str(CSRC / "include")]

    def cxx_args(self) -> list[str]:
        return list(cpu_library().flags)

    def is_compatible(self, verbose: bool = False) -> bool:
        possible = builder.prebuilt() or builder.compiler() is not None
        if not possible and verbose:
            self.warning("PiKV ops need a C++ compiler (g++ or CXX); without one they run in plain torch")
        return possible

    def load(self, verbose: bool = False):
        """The module pikv_ds.ops with its compiled kernels loaded."""
        if self.name not in OpBuilder._loaded_ops:
            OpBuilder._loaded_ops[self.name] = builder.load()
        return OpBuilder._loaded_ops[self.name]

    def jit_load(self, verbose: bool = True):
        build(cpu_library())
        return self.load(verbose)
