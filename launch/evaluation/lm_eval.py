"""lm-eval with a PiKV cache: registers the models `pikv_ds` (transformers) and `pikv_megatron` and calls lm-eval's own command line.

python -m pikv_ds.launch.evaluation.lm_eval --model pikv_ds --model_args pretrained=DIR,config=FILE --tasks NAME --include_path FOLDER
torchrun --nproc-per-node 2 -m pikv_ds.launch.evaluation.lm_eval --model pikv_megatron --model_args ep=2 --tasks NAME ...

model_args, all optional: pretrained (model folder; the bundled model), config (file with the "pikv" block; the defaults), dense (true: the
host's own cache), load (Megatron dist checkpoint), chunk (tokens per forward, 32), max_length, dtype (auto), tp, ep, and what
harness.OF_HFLM names of lm-eval's own model. All ranks run the same requests.
"""

from __future__ import annotations

import sys

from pikv_ds.errors import ConfigError
from pikv_ds.launch.cli import TOLD
from pikv_ds.launch.device import let_memory_grow

HOSTS = {"pikv_ds": "hf", "pikv_megatron": "megatron"}


def register() -> None:
    """Make the models known to lm-eval. Raises ConfigError when it, or what its own hf model needs, is not installed."""
    try:
        from lm_eval.api.registry import register_model
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ConfigError(f"lm-eval can't be imported ({error}); pip install 'pikv-ds[eval]', which is lm-eval[hf]>=0.4.9,<0.5") from None
    from pikv_ds.launch.evaluation.harness import cache_lm

    for name, host in HOSTS.items():
        register_model(name)(cache_lm(HFLM, host))


def main() -> int:
    try:
        let_memory_grow()
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except TOLD as error:
        print(f"lm_eval: {error}", file=sys.stderr)
        return 2
    except ValueError as error:
        if not str(error).startswith("Tasks not found"):
            raise
        print(f"lm_eval: {error}; --include_path FOLDER adds task files of your own", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
