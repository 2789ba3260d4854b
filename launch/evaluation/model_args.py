"""lm-eval's --model_args to the run they ask for: an EvalSpec and the "pikv" block."""

from __future__ import annotations

from typing import Any

from pikv_ds.errors import ConfigError
from pikv_ds.launch.ranks import started_ranks

from .spec import EvalSpec

OPTIONS = ("config", "load", "chunk", "dtype", "tp", "ep")
LENGTH_OF_NONE = 2048  # lm-eval's, for a model that names no limit
SHORTEST = 32  # with less, `pikv eval` has no chunk short enough; here a continuation is fed apart from its context
DTYPES = ("float32", "bfloat16", "float16")


def run_of(
    host: str, pretrained: str | None, max_length: int | None, options: dict[str, Any], also: tuple[str, ...]
) -> tuple[EvalSpec, dict[str, Any]]:
    """On the ranks of the launcher, or on one.

    Args: options: of OPTIONS, as `pikv eval` takes them; dtype "auto", the default, is the one that the model's configuration names.
        also: names that are legal beside them, for the message.

    Raises: ConfigError, UnsupportedError, FileNotFoundError.
    """
    from pikv_ds.adapters.hf.model_spec import load_model_config
    from pikv_ds.bundled import model_path
    from pikv_ds.launch.cli import build_parser
    from pikv_ds.launch.evaluation.plan import read_spec

    unknown = sorted(options.keys() - OPTIONS)
    if unknown:
        legal = ("pretrained", "dense", "max_length", *OPTIONS, *also)
        raise ConfigError(f"model_args has the key {unknown[0]!r}, which this model does not take; legal: {', '.join(legal)}")
    config = load_model_config(pretrained or model_path())
    length = max_length or getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or LENGTH_OF_NONE
    given = {
        "backend": host,
        "model": pretrained,
        "context": max(length, SHORTEST),
        "ranks": started_ranks() or 1,
        **options,
        "dtype": _dtype(options.get("dtype", "auto"), config),
    }
    words = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    spec, units = read_spec(build_parser().parse_args(["eval", "--tasks", "ppl", *words]))
    return spec, units[-1].block


def _dtype(given: Any, config: Any) -> str:
    named = config.get_text_config(decoder=True).dtype if given == "auto" else given
    name = str(named).removeprefix("torch.")
    if name in DTYPES:
        return name
    source = f"the configuration of the model names {named}" if given == "auto" else f"dtype = {given!r}"
    raise ConfigError(f"{source}: legal dtypes are auto, {', '.join(DTYPES)}; give dtype=float32 in model_args, or another of them")
