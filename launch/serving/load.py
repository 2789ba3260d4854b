"""The runner of a backend; imports its host, and only that one."""

from __future__ import annotations

from pikv_ds.errors import ConfigError

from .runner import Runner
from .spec import ServeSpec


def load(spec: ServeSpec) -> Runner:
    """On all ranks; torch.distributed is initialised where there are several.

    Raises: ConfigError for a folder without weights or tokenizer, and what the host or the cache refuses.
    """
    runner: type
    if spec.backend == "hf":
        from .hf import HFRunner as runner
    else:
        from .megatron import MegatronRunner as runner
    try:
        return runner(spec)
    except ConnectionError:
        raise
    except OSError as error:  # how transformers says that a file is missing
        raise ConfigError(f"--model {spec.model}: {error}") from error
