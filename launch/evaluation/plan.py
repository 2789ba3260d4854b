"""Arguments of the command to an EvalSpec and its units. Everything that can be known before ranks start is checked here."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pikv_ds.adapters.hf.model_spec import load_model_config, read_model_spec
from pikv_ds.bundled import model_path
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import ConfigError

from .report import check_matplotlib
from .spec import TASKS, EvalSpec, Unit, fit_chunk


def read_spec(args: argparse.Namespace) -> tuple[EvalSpec, list[Unit]]:
    """The run that the arguments ask for: the dense cache first, then every configuration, each over all tasks.

    Raises: ConfigError, UnsupportedError, FileNotFoundError with what was given, what is legal and what to do.
    """
    tasks = _tasks(args.tasks)
    blocks = _blocks(args.sweep) if args.sweep else [block_of(args.config)]
    if args.report:
        check_matplotlib()
    model = Path(args.model).expanduser().resolve() if args.model else model_path()
    model_config = load_model_config(model)
    for name in ("samples", "batch", "ranks", "tp"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} {getattr(args, name)}: legal is 1 or more")
    layers = read_model_spec(model_config)
    _check_context(args.context, model_config)
    ep = expert_ranks(args, model_config)
    spec = EvalSpec(
        backend=args.backend,
        model=str(model),
        load=megatron_folder(args.load, args.backend),
        text=_file(args.text),
        context=args.context,
        chunk=fit_chunk(layers, args.context, args.chunk),
        samples=args.samples,
        batch=args.batch,
        seed=args.seed,
        dtype=args.dtype,
        requests=args.requests,
        ranks=args.ranks,
        tp=args.tp,
        ep=ep,
    )
    if spec.requests == "distinct" and spec.samples % spec.data_ranks:
        raise ConfigError(
            f"--samples {spec.samples} with --requests distinct: {spec.data_ranks} ranks take equal shares; "
            f"use a multiple of {spec.data_ranks}"
        )
    return spec, [Unit(task=task, block=chosen) for chosen in (None, *blocks) for task in tasks]


def _tasks(listed: str) -> list[str]:
    tasks = list(dict.fromkeys(filter(None, listed.split(","))))
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise ConfigError(f"--tasks {listed!r}: legal are {', '.join(TASKS)}, comma-separated")
    return tasks


def _blocks(file: str) -> list[dict[str, Any]]:
    """The blocks of a sweep, each once, in the file's order."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"no file {file!r}; --sweep is a JSON list of configurations")
    try:
        listed = json.loads(Path(file).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"--sweep {file} is not JSON: {error}") from None
    if not isinstance(listed, list):
        raise ConfigError(f"--sweep {file} holds a {type(listed).__name__}: legal is a JSON list of configurations")
    if not listed:
        raise ConfigError(f"--sweep {file} holds no configuration")
    blocks = []
    for idx, given in enumerate(listed):
        try:
            block = block_of(given)
        except ConfigError as error:
            raise ConfigError(f"--sweep {file}, entry {idx}: {error}") from None
        blocks += [block] if block not in blocks else []
    return blocks


def block_of(source: str | dict | None) -> dict[str, Any]:
    """The "pikv" block with all defaults filled in, from a file's name, from JSON or from what JSON held."""
    given: Any = source
    if isinstance(source, str) and source.lstrip().startswith("{"):
        try:
            given = json.loads(source)
        except json.JSONDecodeError as error:
            raise ConfigError(f"--config {source!r} is not JSON: {error}; quote it, or give a file") from None
        given = given.get("pikv", given)
    config = PiKVConfig.parse(given)
    if not config.enabled:
        raise ConfigError("--config: pikv.enabled is false; the dense cache is measured in any case, enable the block")
    return config.model_dump(mode="json")


def _check_context(context: int, model_config: Any) -> None:
    longest = getattr(model_config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context < 2 or (longest is not None and context > longest):
        raise ConfigError(f"--context {context}: legal for this model is 2 to {longest} (max_position_embeddings)")


def expert_ranks(args: argparse.Namespace, model_config: Any) -> int:
    """--ep, or its default: all data-parallel ranks, none for a model without experts."""
    if args.backend == "hf" and args.tp != 1:
        raise ConfigError(f"--tp {args.tp} with --backend hf: tensor parallelism under DeepSpeed is not supported; use --backend megatron")
    if args.ranks % args.tp:
        raise ConfigError(f"--ranks {args.ranks} is not a multiple of --tp {args.tp}")
    text = model_config.get_text_config(decoder=True)
    experts = next((count for name in ("num_local_experts", "num_experts", "n_routed_experts") if (count := getattr(text, name, None))), 1)
    ep = (args.ranks // args.tp if experts > 1 else 1) if args.ep is None else args.ep
    if ep < 1 or args.ranks % ep:
        raise ConfigError(f"--ep {ep}: legal with --ranks {args.ranks} are its divisors")
    if experts % ep:
        raise ConfigError(f"--ep {ep}: the {experts} experts of this model are divided over the ranks; legal are the divisors of {experts}")
    return ep


def megatron_folder(load: str | None, backend: str) -> str | None:
    if load is None:
        return None
    if backend != "megatron":
        raise ConfigError(f"--load {load} with --backend {backend}: dist checkpoints are Megatron's; use --backend megatron, or --model")
    if not (Path(load) / "metadata.json").is_file():
        raise FileNotFoundError(
            f"--load {load!r}: no Megatron dist checkpoint there (no metadata.json); give the folder that dist_checkpointing.save wrote"
        )
    return str(Path(load).expanduser().resolve())


def _file(text: str | None) -> str | None:
    if text is None:
        return None
    if not Path(text).is_file():
        raise FileNotFoundError(f"no text file {text!r}; --text is a UTF-8 text to measure on")
    return str(Path(text).resolve())
