"""`pikv bench layouts`: bytes and error of our page formats beside KIVI's layout, on the keys, values and queries of a model.

KIVI (arXiv 2402.02750): keys per channel over groups of 32 tokens, values per token over groups of 32 channels, each group with an fp16
scale and zero; a residual of tokens stays raw in 2 bytes: the last T mod 128 keys, and the last 128 values. Ours (ops/format/formats.py):
keys per channel over 64 tokens, values per token over the whole head, the open group of keys raw. Columns:
    bytes_per_token      over all layers, at this context: records with their positions and padding, and what is raw
    compression          2 bytes x elements / bytes
    k_error, v_error     ||x - stored x|| / ||x|| over all layers, raw entries included
    out_error            of the attention of the last 32 queries, against fp64 on the same keys and values unquantised
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, NamedTuple

from pikv_ds.launch.output import print_table, write_json

if TYPE_CHECKING:
    from torch import Tensor

GROUP, RESIDUAL, QUERIES = 32, 128, 32
_RAW = ("fp32", "bf16", "fp16")


class Stored(NamedTuple):
    """What a layout gives back of k and v [T, H, D], and the bytes it takes."""

    k: Tensor
    v: Tensor
    nbytes: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", help="transformers model folder (default: the bundled model)")
    parser.add_argument("--text", metavar="FILE", help="text whose keys and values are stored (default: the bundled one)")
    parser.add_argument("--context", type=int, default=4096, metavar="T", help="tokens (default 4096)")


def run(args: argparse.Namespace) -> int:
    from pikv_ds.ops.format.formats import FORMATS

    layers = _heads(args)
    rows = [
        _row(f"KIVI int{bits}, residual {residual}", layers, lambda k, v, b=bits, r=residual: kivi(k, v, b, r))
        for bits in (4, 2)
        for residual in (RESIDUAL, 0)
    ]
    rows += [_row(f"ours {name}", layers, lambda k, v, n=name: ours(k, v, n)) for name in FORMATS if name not in _RAW]
    title = f"{len(layers)} layers, {len(layers[0][1])} tokens, {layers[0][1].shape[1]} KV heads of {layers[0][1].shape[2]}"
    print_table(title, [{key: float(f"{value:.3g}") if isinstance(value, float) else value for key, value in row.items()} for row in rows])
    write_json(args.json, f"bench layouts --context {args.context}", [{"shape": title} | row for row in rows])
    return 0


def kivi(k: Tensor, v: Tensor, bits: int, residual: int = RESIDUAL) -> Stored:
    """k and v [T, H, D] in KIVI's layout; D must be a multiple of 32. With residual 0 only an open group of keys is raw."""
    import torch

    tokens, heads, width = k.shape
    closed_k = tokens - tokens % (residual or GROUP)
    closed_v = max(tokens - residual, 0)
    codes_k = _rounded(k[:closed_k].reshape(-1, GROUP, heads, width), bits, 1).reshape(closed_k, heads, width)
    codes_v = _rounded(v[:closed_v].reshape(closed_v, heads, -1, GROUP), bits, 3).reshape(closed_v, heads, v.shape[2])
    per_group = lambda elements: elements * bits // 8 + elements // GROUP * 4  # noqa: E731
    nbytes = per_group(codes_k.numel()) + per_group(codes_v.numel()) + 2 * (k[closed_k:].numel() + v[closed_v:].numel())
    return Stored(torch.cat([codes_k, k[closed_k:].float()]), torch.cat([codes_v, v[closed_v:].float()]), nbytes)


def ours(k: Tensor, v: Tensor, name: str) -> Stored:
    """k and v [T, H, D] appended to pages of a format, as the cache does it."""
    import torch

    from pikv_ds import ops
    from pikv_ds.ops.format.formats import FORMATS

    from .errors import store_pages

    fmt = ops.PageFormat(name, k.shape[1], k.shape[2], v.shape[2], FORMATS[name].preferred_page_size)
    pages, table, _, tail = store_pages(fmt, k, v)
    read_k, read_v = (x.transpose(1, 2).flatten(0, 1)[: len(k)].float() for x in ops.decode_pages(pages[table.flatten()], fmt))
    nbytes = pages.nbytes
    if fmt.grouped:
        closed = len(k) - len(k) % fmt.group
        read_k = torch.cat([read_k[:closed], k[closed:].float()])
        nbytes += tail["tail"].nbytes
    return Stored(read_k, read_v, nbytes)


def _rounded(x: Tensor, bits: int, dim: int) -> Tensor:
    """Asymmetric codes over `dim`, decoded again, f32; scale and zero rounded to fp16, as they are stored."""
    x = x.float()
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).half().float()
    zero = low.half().float()
    codes = ((x - zero) / scale.clamp_min(1e-8)).round().clamp(0, 2**bits - 1)
    return codes * scale + zero


def _row(name: str, layers: list[tuple[Tensor, Tensor, Tensor]], store) -> dict[str, Any]:
    elements = nbytes = 0
    wrong, size = [0.0] * 3, [0.0] * 3
    for q, k, v in layers:
        stored = store(k, v)
        elements, nbytes = elements + k.numel() + v.numel(), nbytes + stored.nbytes
        pairs = [(stored.k, k), (stored.v, v), (attention(q, stored.k, stored.v), attention(q, k, v))]
        for i, (found, expected) in enumerate(pairs):
            wrong[i] += (found.double() - expected.double()).square().sum().item()
            size[i] += expected.double().square().sum().item()
    errors = [(a / b) ** 0.5 for a, b in zip(wrong, size, strict=True)]
    tokens = len(layers[0][1])
    return {
        "layout": name, "bytes_per_token": nbytes / tokens, "compression": 2 * elements / nbytes,
        "k_error": errors[0], "v_error": errors[1], "out_error": errors[2],
    }  # fmt: skip


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[N, Hq, D] f64: the last N queries of T tokens over the keys up to their own, softmax scale D ** -0.5."""
    import torch

    tokens, heads = k.shape[:2]
    grouped = q.double().unflatten(1, (heads, -1)) * k.shape[2] ** -0.5
    scores = torch.einsum("nhgd,thd->nhgt", grouped, k.double())
    own = torch.arange(tokens - len(q), tokens, device=k.device)
    scores = scores.masked_fill(torch.arange(tokens, device=k.device) > own.view(-1, 1, 1, 1), -torch.inf)
    return torch.einsum("nhgt,thd->nhgd", scores.softmax(-1), v.double()).flatten(1, 2)


def _heads(args: argparse.Namespace) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Per layer: the last queries [32, Hq, D], keys and values [T, H, D] (after RoPE) of a window of the text, bf16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pikv_ds.adapters.hf.anatomy import find_attentions
    from pikv_ds.adapters.hf.calibrate import heads_shown
    from pikv_ds.bundled import evaluation_text, model_path
    from pikv_ds.errors import ConfigError

    folder = args.model or model_path()
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    text = evaluation_text()
    if args.text is not None:
        with open(args.text, encoding="utf-8") as file:
            text = file.read()
    ids = AutoTokenizer.from_pretrained(folder, local_files_only=True)(text)["input_ids"]
    longest = min(model.config.get_text_config(decoder=True).max_position_embeddings, len(ids))
    if not RESIDUAL <= args.context <= longest:
        raise ConfigError(f"--context {args.context}: legal for this model and text is {RESIDUAL} to {longest}")
    seen: dict[int, tuple] = {}
    keep = lambda i: lambda q, k, v: seen.update({i: (q[-QUERIES:].bfloat16(), k.bfloat16(), v.bfloat16())})  # noqa: E731
    with heads_shown(model, {attention: keep(i) for i, attention in enumerate(find_attentions(model))}), torch.no_grad():
        model(torch.tensor([ids[: args.context]]), use_cache=False)
    layers = [seen[i] for i in range(len(seen))]
    if layers[0][1].shape[2] % GROUP:
        raise ConfigError(f"KIVI's layout groups {GROUP} channels of a value, and this model's head_dim is {layers[0][1].shape[2]}")
    return layers
