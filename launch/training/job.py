"""The work of `pikv train`: in the command's process, or one rank of it, started by a launcher with the arguments spec and error file."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from pikv_ds.launch.ranks import own_stdout
from pikv_ds.launch.training.given import out_of, part_of, text_of

if TYPE_CHECKING:
    from pikv_ds.training.fit import Fitted
    from pikv_ds.training.part import LearnedPart


def train(args: argparse.Namespace, stdout: TextIO | None) -> None:
    """args: of the command. The rank that writes has a stdout; ranks without one write nothing."""
    import torch
    from transformers import AutoTokenizer

    from pikv_ds.adapters.hf.model_spec import load_model_config
    from pikv_ds.bundled import model_path
    from pikv_ds.launch.evaluation.job import progress_bar
    from pikv_ds.launch.training.curves import tensorboard
    from pikv_ds.launch.training.data import repeated, windows_of
    from pikv_ds.launch.training.hosts import open_host
    from pikv_ds.training.engine import Optimizing
    from pikv_ds.training.fit import FitPlan, fit
    from pikv_ds.training.part import PartLoss
    from pikv_ds.training.recorded import ModelFacts

    part, out = part_of(args.part, args.set), out_of(args.out)
    folder = Path(args.model).expanduser().resolve() if args.model else model_path()
    load_model_config(folder)
    write_row = tensorboard(Path(args.tensorboard) if args.tensorboard and stdout else None)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    train, held = windows_of(tokenizer, text_of(args.text), args.context, args.samples, args.facts, args.seed)
    if part.repeats:
        train, held = repeated(train), repeated(held)
    host = open_host(args, folder)
    data, held_out = host.record(train), host.record(held)
    torch.manual_seed(args.seed)
    facts = ModelFacts.of(data.layers, data[0])
    module = part.build(facts)
    part.begin(module, data)
    engine = host.engine(PartLoss(part, module), Optimizing(steps=args.steps, lr=host.lr))
    plan = FitPlan(
        steps=args.steps, seed=args.seed, every=args.every, patience=args.patience, folder=out.with_suffix(".fit"), resume=args.resume
    )
    for said in filter(None, (host.said, getattr(engine, "said", ""))):
        if stdout is not None:
            print(said, file=stdout, flush=True)
    with progress_bar(f"training {part.name} on {len(data)} windows", args.steps, stdout, "steps") as advance:
        found = fit(part, engine, data, held_out, plan, lambda row: (write_row(row), advance(1)))
    if stdout is not None:
        _write(args, part, facts, found, host, len(data), folder, stdout)


def _write(
    args: argparse.Namespace, part: LearnedPart, facts: Any, found: Fitted, host: Any, windows: int, folder: Path, stdout: TextIO
) -> None:
    from pikv_ds.launch.output import versions, write_json
    from pikv_ds.launch.training.curves import draw
    from pikv_ds.training.export import export

    out, row = out_of(args.out), _fit_row(args, part, found, windows, host.lr)
    about = {"model": folder.name, "text": "bundled" if args.text is None else Path(args.text).name, "context": str(args.context)}
    about |= {"versions": json.dumps(versions()), "fit": json.dumps(row)}
    export(part, facts, found.weights, host.fingerprint, about).save(out)
    drawn = draw(out.with_suffix(".png"), f"{part.name}, seed {args.seed}", found.curve)
    best = {name: round(value, 4) for name, value in _best(found).items()}
    print(
        f"{len(found.curve)} steps in {found.seconds / 60:.1f} minutes; best after step {found.best['step']}, held out: {best}", file=stdout
    )
    picture = f" and {out.with_suffix('.png').name}" if drawn else "; no picture: matplotlib is not installed"
    print(f"wrote {out}{picture}", file=stdout)
    write_json(args.json, f"train {part.name}", found.curve, fit=[row])


def _fit_row(args: argparse.Namespace, part: LearnedPart, found: Fitted, windows: int, lr: float) -> dict[str, Any]:
    parameters = sum(x.numel() for x in found.weights.values())
    row = {"part": part.name, "engine": args.engine, "ranks": args.ranks, "seed": args.seed, "windows": windows, "lr": lr}
    row |= {"steps": len(found.curve), "parameters": parameters, "minutes": round(found.seconds / 60, 2)}
    return row | {"best_step": found.best["step"], **_best(found)}


def _best(found: Fitted) -> dict[str, float]:
    return {name.removeprefix("held_out_"): value for name, value in found.best.items() if name.startswith("held_out_")}


def main() -> None:
    stdout = own_stdout()
    from pikv_ds.launch.evaluation.job import as_rank
    from pikv_ds.launch.output import note_command_line

    spec, error_file = map(Path, sys.argv[1:3])
    args = argparse.Namespace(**json.loads(spec.read_text(encoding="utf-8")))
    note_command_line(args.words)
    with as_rank(error_file) as first:
        train(args, stdout if first else None)


if __name__ == "__main__":
    main()
