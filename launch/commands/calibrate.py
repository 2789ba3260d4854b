"""`pikv calibrate`: the statistics of a model's keys and values that calibrated codecs need, in one pass over a text."""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from pikv_ds.codecs.calibration import Calibration
    from pikv_ds.codecs.linear import LinearCodec
    from pikv_ds.spec import LayerSpec

TRAINING_WINDOWS = 4


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("calibrate", help="statistics of a model's keys and values, for codecs that need them")
    parser.add_argument("--model", metavar="DIR", help="transformers model folder (default: the bundled model)")
    parser.add_argument("--text", metavar="FILE", help="text to run the model on, another than is measured on (default: a bundled one)")
    parser.add_argument("--codec", metavar="NAME", required=True, help="calibrated codec, see `pikv methods`")
    parser.add_argument("--out", metavar="FILE", required=True, help="safetensors file to write")
    parser.add_argument(
        "--rank", type=int, metavar="R", help="rank to report errors for, and that 'distill' is trained for (default: half)"
    )
    parser.add_argument(
        "--context", type=int, default=1024, metavar="N", help="tokens per window, as long as later requests (default 1024)"
    )
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="training steps per layer, of 'distill' (default 300)")
    parser.add_argument("--samples", type=int, default=32, metavar="N", help="windows, evenly over the text (default 32, or all there are)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights (default float32)")


def run(args: argparse.Namespace) -> int:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pikv_ds.adapters.hf.calibrate import calibrate
    from pikv_ds.adapters.hf.model_spec import load_model_config, read_model_spec
    from pikv_ds.bundled import model_path
    from pikv_ds.launch.device import own_device
    from pikv_ds.launch.evaluation.job import progress_bar
    from pikv_ds.launch.output import print_table, write_json
    from pikv_ds.launch.training.given import out_of, text_of

    codec = _codec(args.codec)
    text, out = text_of(args.text), out_of(args.out)
    folder = Path(args.model).expanduser().resolve() if args.model else model_path()
    layers = read_model_spec(load_model_config(folder))
    rank = _rank(args.rank, layers)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    windows = _windows(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], args.context, args.samples)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype), local_files_only=True).eval()
    model = model.to(own_device())
    about = {"model": folder.name, "text": "bundled" if args.text is None else Path(args.text).name, "context": str(args.context)}
    with progress_bar(f"calibrating {args.codec}", len(windows), sys.stdout) as advance:
        found = calibrate(model, windows, advance, about)
    if codec.learns:
        learn(codec, model, windows[:TRAINING_WINDOWS], found, layers, rank, args.steps)
    found.save(out)
    rows = [error_row(codec, found, spec, rank) for spec in layers]
    print_table(f"{args.codec}, rank {rank}: share of the energy that is lost, {len(windows)} windows of {args.context} tokens", rows)
    print(f"wrote {out}")
    write_json(args.json, "calibrate", rows)
    return 0


def learn(
    codec: type[LinearCodec], model: Any, windows: Tensor, found: Calibration, layers: list[LayerSpec], rank: int, steps: int
) -> None:
    """Train what the codec learns, layer by layer, on the heads of a few windows."""
    from pikv_ds.adapters.hf.anatomy import find_attentions
    from pikv_ds.adapters.hf.calibrate import heads_of
    from pikv_ds.launch.evaluation.job import progress_bar

    attentions, heads = find_attentions(model), heads_of(model, windows)
    with progress_bar(f"training {codec.name}", len(layers), sys.stdout, "layers") as advance:
        for spec, attention, own in zip(layers, attentions, heads, strict=True):
            scale = getattr(attention, "scaling", None) or spec.k_dim**-0.5
            found.add(spec.layer_idx, codec.learn(own, found.keys(spec), rank, scale, steps))
            advance(1)


def error_row(codec: type[LinearCodec], calibration: Any, spec: LayerSpec, rank: int) -> dict[str, Any]:
    """E||x - x_hat||^2 / E||x||^2 of a layer's keys and values, before rounding, on the calibration text.

    k_lost_pre: of keys before their rotation (rope "pre"), None for a codec or a model without.
    """
    from pikv_ds.codecs.linear import lost_share

    built = codec.on(calibration, rank=rank)
    maps, before = built.transform(spec), None
    if f"{spec.layer_idx}.inv_freq" in calibration.tensors and "rope" in inspect.signature(codec.__init__).parameters:
        unrotated = codec.on(calibration, rank=rank, rope="pre").transform(spec)
        before = round(lost_share(calibration.unrotated_keys(spec), unrotated.k), 6)
    return {
        "layer": spec.layer_idx,
        "k_rank": maps.k.rank,
        "v_rank": maps.v.rank,
        "k_lost": round(lost_share(calibration.keys(spec), maps.k), 6),
        "k_lost_pre": before,
        "v_lost": round(lost_share(calibration.values(spec), maps.v), 6),
    }


def _codec(name: str) -> type[LinearCodec]:
    from pikv_ds.codecs import CODECS
    from pikv_ds.errors import ConfigError

    calibrated = [known for known, codec in CODECS.items() if codec.calibrated]
    if name not in calibrated:
        raise ConfigError(f"--codec {name!r}: legal are {', '.join(calibrated)}; the other codecs need no calibration")
    return CODECS.get(name)


def _rank(rank: int | None, layers: list[LayerSpec]) -> int:
    from pikv_ds.errors import ConfigError

    width = min(min(spec.k_dim, spec.v_dim) for spec in layers)
    rank = max(8, width // 16 * 8) if rank is None else rank
    if rank % 8 or not 8 <= rank <= width:
        raise ConfigError(f"--rank {rank}: legal for this model is a multiple of 8 from 8 to {width}")
    return rank


def _windows(ids: list[int], context: int, samples: int) -> Tensor:
    """[N, context] int64, without overlap, spread evenly over the text."""
    import torch

    from pikv_ds.errors import ConfigError

    available = len(ids) // context if context > 0 else 0
    if samples < 1 or available < 1:
        raise ConfigError(
            f"--context {context} and --samples {samples}: legal are 1 or more of each, and the text has {len(ids):,} tokens, so at most a "
            f"context of that length"
        )
    chosen = [i * available // min(samples, available) for i in range(min(samples, available))]
    return torch.tensor([ids[i * context : (i + 1) * context] for i in chosen])
