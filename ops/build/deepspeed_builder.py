"""PiKVOpBuilder: DeepSpeed's view of the compiled ops. Import only where DeepSpeed is there (build/builder.py does)."""

from __future__ import annotations

from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder.cpu.builder import CPUOpBuilder

from . import builder
from .compile import CSRC, cpu_library
from .cuda_build import cuda_library


class PiKVOpBuilder(CPUOpBuilder):
    """Names, sources and flags for DeepSpeed's reports; building is our own (build/compile.py), since each file has its instruction set.

    DeepSpeed's jit_load would compile every file with -march=native in one go: such a library crashes on an older CPU with the same cache.
    """

    BUILD_VAR = "DS_BUILD_PIKV"
    NAME = builder.NAME

    def __init__(self) -> None:
        super().__init__(name=self.NAME)

    def absolute_name(self) -> str:
        return builder.OPS

    @property
    def device(self) -> str:
        """The tensors of DeepSpeed's accelerator."""
        return get_accelerator().device_name()

    def sources(self) -> list[str]:
        libraries = [cpu_library(), *([cuda_library()] if self.device == "cuda" else [])]
        return sorted({str(CSRC / source.path) for library in libraries for source in library.sources})

    def include_paths(self) -> list[str]:
        return [str(CSRC / "include")]

    def cxx_args(self) -> list[str]:
        return list(cpu_library().flags)

    def nvcc_args(self) -> list[str]:
        return list(cuda_library().flags)

    def is_compatible(self, verbose: bool = False) -> bool:
        needed = "nvcc, or CuPy with NVRTC" if self.device == "cuda" else "a C++ compiler (g++ or CXX)"
        possible = any(builder.available(name) for name in (("cuda", "nvrtc") if self.device == "cuda" else ("cpu",)))
        if not possible and verbose:
            self.warning(f"PiKV ops need {needed}; without one they run in plain torch")
        return possible

    def load(self, verbose: bool = False):
        """The module pikv_ds.ops with the compiled kernels of the accelerator's tensors loaded."""
        if self.name not in self._loaded_ops:
            self._loaded_ops[self.name] = builder.load(self.device)
        return self._loaded_ops[self.name]

    def jit_load(self, verbose: bool = True):
        return self.load(verbose)
