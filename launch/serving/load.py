"""The runner of a backend; imports its host, and only that one."""

from __future__ import annotations

from .runner import Runner
from .spec import ServeSpec


def load(spec: ServeSpec) -> Runner:
    """On all ranks; torch.distributed is initialised where there are several."""
    if spec.backend == "hf":
        from .hf import HFRunner

        return HFRunner(spec)
    from .megatron import MegatronRunner

    return MegatronRunner(spec)
