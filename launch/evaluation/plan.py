"""Arguments of the command to an EvalSpec and its units. Everything that can be known before ranks start is checked here."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from pikv_ds.adapters.hf.model_spec import load_model_config
from pikv_ds.bundled import model_path
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import ConfigError

from .model_facts import ModelFacts, facts_of, facts_of_checkpoint, has_args
from .report import check_matplotlib
from .spec import TASKS, EvalSpec, Unit, fit_chunk
from .tokenizer import tokenizer_path


def read_spec(args: argparse.Namespace) -> tuple[EvalSpec, list[Unit]]:
    """The run that the arguments ask for: the dense cache first, then every configuration, each over all tasks.

    Raises: ConfigError, UnsupportedError, FileNotFoundError with what was given, what is legal and what to do.
    """
    tasks = _tasks(args.tasks)
    blocks = _blocks(args.sweep) if args.sweep else [block_of(args.config)]
    if args.report:
        check_matplotlib()
    source = source_of(args)
    for name in ("samples", "batch", "ranks", "tp", "prefill_chunk", "scored"):
        if (given := getattr(args, name)) is not None and given < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {given}: legal is 1 or more")
    _check_context(args.context, source.facts.longest)
    if args.scored is not None and args.scored > args.context // 2:
        raise ConfigError(f"--scored {args.scored}: legal with --context {args.context} is 1 to {args.context // 2}, half of the window")
    others = _others(args)
    ep = expert_ranks(args, source.facts.experts)
    spec = EvalSpec(
        backend=args.backend,
        model=source.model,
        load=source.load,
        tokenizer=source.tokenizer,
        text=_file(args.text),
        context=args.context,
        chunk=fit_chunk(source.facts.layers, args.context, args.chunk, args.scored),
        prefill_chunk=args.prefill_chunk,
        scored=args.scored,
        template=False if args.plain_prompts else None,
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
    units = [Unit(task=task, block=chosen) for chosen in (None, *blocks) for task in tasks]
    return spec, units + [Unit(task=task, block=None, other=other) for other in others for task in tasks if task != "bytes"]


def _others(args: argparse.Namespace) -> list[str]:
    """Names of the caches of --baseline. Raises: ConfigError, also where a package of one is missing."""
    if getattr(args, "baseline", None) is None:
        return []
    if args.backend != "hf" or args.ranks != 1:
        raise ConfigError(f"--baseline {args.baseline}: they run on one rank of --backend hf, here are {args.ranks} of {args.backend}")
    from .others import parse_other

    names = args.baseline.split(",")
    for name in names:
        parse_other(name).check()
    return names


class Source(NamedTuple):
    """Where a model comes from: names as EvalSpec has them, and what is known of the model."""

    model: str
    load: str | None
    tokenizer: str | None
    facts: ModelFacts


def source_of(args: argparse.Namespace) -> Source:
    """args: backend, model, load, tokenizer. Raises: ConfigError, UnsupportedError, FileNotFoundError."""
    load = megatron_folder(args.load, args.backend)
    if args.tokenizer is not None:
        if load is None or args.model is not None:
            raise ConfigError(
                f"--tokenizer {args.tokenizer}: it goes with --load, a Megatron checkpoint whose arguments say what the model is, and "
                f"without --model, a transformers folder, which has a tokenizer of its own"
            )
        return Source(load, load, str(tokenizer_path(args.tokenizer)), facts_of_checkpoint(load))
    if load is not None and args.model is None and has_args(load):
        raise ConfigError(
            f"--load {args.load}: this checkpoint says itself what model it is of; give --tokenizer T beside it, or in --model a "
            f"transformers folder of the same model"
        )
    model = Path(args.model).expanduser().resolve() if args.model else model_path()
    return Source(str(model), load, None, facts_of(load_model_config(model)))


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


def _check_context(context: int, longest: int | None) -> None:
    if context < 2 or (longest is not None and context > longest):
        raise ConfigError(f"--context {context}: legal for this model is 2 to {longest} (max_position_embeddings)")


def expert_ranks(args: argparse.Namespace, experts: int) -> int:
    """--ep, or its default: all data-parallel ranks, none for a model without experts."""
    if args.backend == "hf" and args.tp != 1:
        raise ConfigError(f"--tp {args.tp} with --backend hf: tensor parallelism under DeepSpeed is not supported; use --backend megatron")
    if args.ranks % args.tp:
        raise ConfigError(f"--ranks {args.ranks} is not a multiple of --tp {args.tp}")
    ep = (args.ranks // args.tp if experts > 1 else 1) if args.ep is None else args.ep
    if ep < 1 or args.ranks % ep:
        raise ConfigError(f"--ep {ep}: legal with --ranks {args.ranks} are its divisors")
    if experts % ep:
        raise ConfigError(f"--ep {ep}: the {experts} experts of this model are divided over the ranks; legal are the divisors of {experts}")
    return ep


def megatron_folder(load: str | None, backend: str) -> str | None:
    """The folder with the weights, which the tracker file of --load names: a later iteration does not come between."""
    if load is None:
        return None
    if backend != "megatron":
        raise ConfigError(f"--load {load} with --backend {backend}: dist checkpoints are Megatron's; use --backend megatron, or --model")
    from pikv_ds.megatron_patch.checkpoint_folder import find_weights

    return str(find_weights(load).resolve())


def _file(text: str | None) -> str | None:
    if text is None:
        return None
    if not Path(text).is_file():
        raise FileNotFoundError(f"no text file {text!r}; --text is a UTF-8 text to measure on")
    return str(Path(text).resolve())
