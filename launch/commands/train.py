"""`pikv train`: train a learned part on what a frozen model computes over a text, and write one file that the "pikv" block loads."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pikv_ds.launch.training.engines import ENGINES, check_engine, engine_of

if TYPE_CHECKING:
    from pikv_ds.training.fit import Fitted
    from pikv_ds.training.part import LearnedPart


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("train", help="train a learned part (see `pikv methods`) and write its file")
    parser.add_argument("part", metavar="PART", help="what to train; `pikv methods` lists the parts")
    parser.add_argument("--model", metavar="DIR", help="transformers model folder (default: the bundled model)")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text, another than is measured on (default: a bundled one)")
    parser.add_argument("--out", metavar="FILE", required=True, help="safetensors file to write; curve and checkpoints lie beside it")
    parser.add_argument("--steps", type=int, default=400, metavar="N", help="optimizer steps (default 400)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of first weights, window order and what is drawn (default 0)")
    parser.add_argument("--lr", type=float, default=3e-3, metavar="X", help="highest rate (default 0.003)")
    parser.add_argument("--context", type=int, default=1024, metavar="N", help="tokens per window (default 1024)")
    parser.add_argument("--samples", type=int, metavar="N", help="windows of the text (default: all)")
    parser.add_argument("--facts", type=int, default=0, metavar="N", help="prompts that hide facts in the text and ask for one (default 0)")
    parser.add_argument(
        "--every", type=int, default=25, metavar="N", help="steps between held-out evaluations and checkpoints (default 25)"
    )
    parser.add_argument("--patience", type=int, default=8, metavar="N", help="evaluations without a better one before it stops; 0 = never")
    parser.add_argument("--engine", choices=ENGINES, default="local", help="what moves the weights (default local)")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes to train on (default 1)")
    parser.add_argument("--config", metavar="FILE", help="DeepSpeed's ds.json, for --engine deepspeed")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="option of the part, VALUE in JSON; may repeat")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the model (default float32)")
    parser.add_argument("--tensorboard", metavar="DIR", help="also write the curve there, through torch's writer")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints beside --out")


def run(args: argparse.Namespace) -> int:
    check_engine(args.engine, args.ranks, args.config)
    part, out, text = _part(args.part, args.set), _out(args.out), _text(args.text)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pikv_ds.adapters.hf.model_spec import load_model_config
    from pikv_ds.adapters.hf.record import Recorder
    from pikv_ds.bundled import model_path
    from pikv_ds.launch.device import own_device
    from pikv_ds.launch.evaluation.job import progress_bar
    from pikv_ds.launch.output import versions, write_json
    from pikv_ds.launch.training.curves import draw, tensorboard
    from pikv_ds.launch.training.data import repeated, windows_of
    from pikv_ds.training.engine import Optimizing
    from pikv_ds.training.export import export
    from pikv_ds.training.fit import FitPlan, fit
    from pikv_ds.training.part import PartLoss
    from pikv_ds.training.recorded import ModelFacts

    folder = Path(args.model).expanduser().resolve() if args.model else model_path()
    load_model_config(folder)
    write_row = tensorboard(Path(args.tensorboard) if args.tensorboard else None)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    train, held = windows_of(tokenizer, text, args.context, args.samples, args.facts, args.seed)
    if part.repeats:
        train, held = repeated(train), repeated(held)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype), local_files_only=True).eval().to(own_device())
    data, held_out = Recorder(model, *train), Recorder(model, *held)
    torch.manual_seed(args.seed)
    facts = ModelFacts.of(data.layers, data[0])
    module = part.build(facts)
    part.begin(module, data)
    engine = engine_of(args.engine, PartLoss(part, module), Optimizing(steps=args.steps, lr=args.lr), own_device())
    plan = FitPlan(
        steps=args.steps, seed=args.seed, every=args.every, patience=args.patience, folder=out.with_suffix(".fit"), resume=args.resume
    )
    with progress_bar(f"training {part.name} on {len(data)} windows", args.steps, sys.stdout, "steps") as advance:
        found = fit(part, engine, data, held_out, plan, lambda row: (write_row(row), advance(1)))
    about = {"model": folder.name, "text": "bundled" if args.text is None else Path(args.text).name, "context": str(args.context)}
    about |= {"versions": json.dumps(versions()), "fit": json.dumps(_fit_row(args, part, found, len(data)))}
    export(part, facts, found.weights, data.fingerprint(), about).save(out)
    _tell(out, found, draw(out.with_suffix(".png"), f"{part.name}, seed {args.seed}", found.curve))
    write_json(args.json, f"train {part.name}", found.curve, fit=[_fit_row(args, part, found, len(data))])
    return 0


def _fit_row(args: argparse.Namespace, part: LearnedPart, found: Fitted, windows: int) -> dict[str, Any]:
    parameters = sum(x.numel() for x in found.weights.values())
    row = {"part": part.name, "engine": args.engine, "seed": args.seed, "windows": windows, "steps": len(found.curve), "lr": args.lr}
    best = {name.removeprefix("held_out_"): value for name, value in found.best.items() if name.startswith("held_out_")}
    return row | {"parameters": parameters, "minutes": round(found.seconds / 60, 2), "best_step": found.best["step"], **best}


def _tell(out: Path, found: Fitted, drawn: bool) -> None:
    best = {name.removeprefix("held_out_"): round(value, 4) for name, value in found.best.items() if name.startswith("held_out_")}
    print(f"{len(found.curve)} steps in {found.seconds / 60:.1f} minutes; best after step {found.best['step']}, held out: {best}")
    print(f"wrote {out}" + (f" and {out.with_suffix('.png').name}" if drawn else "; no picture: matplotlib is not installed"))


def _part(name: str, given: list[str]) -> LearnedPart:
    import inspect

    from pikv_ds.errors import ConfigError
    from pikv_ds.training.parts import PARTS

    if name not in PARTS.names():
        raise ConfigError(f"no part {name!r} to train; legal are {', '.join(PARTS.names())}")
    legal = [p.name for p in inspect.signature(PARTS.get(name).__init__).parameters.values() if p.kind is p.KEYWORD_ONLY]
    options = {}
    for one in given:
        key, sign, value = one.partition("=")
        if not sign or key not in legal:
            raise ConfigError(f"--set {one}: legal is NAME=VALUE, with a name among {', '.join(legal)} for the part {name!r}")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    try:
        return PARTS.build(name, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--set {' '.join(given)}: {error}") from None


def _text(file: str | None) -> str:
    from pikv_ds.bundled import calibration_text

    if file is None:
        return calibration_text()
    if not Path(file).is_file():
        raise FileNotFoundError(f"no text file {file!r}; --text is a UTF-8 text")
    return Path(file).read_text(encoding="utf-8")


def _out(file: str) -> Path:
    out = Path(file).expanduser()
    if not out.parent.is_dir():
        raise FileNotFoundError(f"no folder {str(out.parent)!r} to write --out {file} to")
    return out
