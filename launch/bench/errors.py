"""`pikv bench errors`: what each page format and the op that reads it cost in accuracy, against attention in fp64.

Keys and values go through `append` into pages and are read by `decode`, as in the cache; the newest tokens of the integer
formats are in their raw tail. Columns:
    k_error, v_error     ||x - decode(encode(x))|| / ||x||, beside the bound that the format declares for any input
    op_rms, op_max       error of the op alone, against fp64 on what the pages hold: relative RMS; largest element / RMS of the output
    op_lse               the same for lse, absolute
    out_rms, out_max     error of format and op together: against fp64 on the keys and values that were given
    lse                  the same for lse, absolute
    same_dtype, sdpa     raw formats: out rounded to the dtype of the model, and torch's scaled_dot_product_attention on the same inputs
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, NamedTuple

from pikv_ds.launch.output import print_table, write_json

if TYPE_CHECKING:
    import torch

MAX_LSE = 1e-3
MAX_OP_RMS = 1e-4  # int8, int4 and int2 read the query in 16 bits, about 3e-5; the others stay below 1e-6
MAX_OVER_SDPA = 1.1
_RAW = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_SHOWN = (
    ("k_error", "k_bound", "v_error", "v_bound", "op_rms", "op_lse"),
    ("out_rms", "out_max", "lse", "same_dtype", "sdpa", "over_sdpa"),
)


class Case(NamedTuple):
    heads: int
    group: int
    k_dim: int
    v_dim: int
    context: int
    latent: bool = False

    def __str__(self) -> str:
        kind = "latent " if self.latent else ""
        return f"{kind}L{self.context} Hkv{self.heads} G{self.group} D{self.k_dim}" + (f"/{self.v_dim}" if self.v_dim != self.k_dim else "")


CASES = (Case(8, 4, 128, 128, 4133), Case(4, 1, 64, 64, 1000), Case(2, 8, 96, 96, 333), Case(1, 16, 576, 512, 1061, latent=True))


def run(args: argparse.Namespace) -> int:
    """0; 1 when an error is larger than its limit."""
    rows = [row for case in CASES for row in case_rows(case)]
    for case in CASES:
        of_case = [row for row in rows if row["case"] == str(case)]
        for columns in _SHOWN:
            print_table(
                f"{case}, errors against fp64 ({of_case[0]['implementation']})",
                [{key: _round(row[key]) for key in ("format", *columns)} for row in of_case],
            )
    broken = [text for row in rows for text in breaches(row)]
    print("\n".join(broken) or "every error is within its limit")
    write_json(args.json, "bench errors", rows)
    return 1 if broken else 0


def breaches(row: dict[str, Any]) -> list[str]:
    """What is larger than it may be, in words."""
    limits = {"k_error": row["k_bound"], "v_error": row["v_bound"], "op_rms": MAX_OP_RMS, "op_lse": MAX_LSE}
    if row["format"] in _RAW:
        limits["lse"] = MAX_LSE  # nothing is lost in storing
    if row["format"] in ("bf16", "fp16"):
        limits["over_sdpa"] = MAX_OVER_SDPA  # in fp32 both are below 1e-6, and rounding decides which is smaller
    return [
        f"{row['format']}, {row['case']}: {name} is {row[name]:.2g}, the limit is {limit:.2g}"
        for name, limit in limits.items()
        if not row[name] <= limit
    ]


def case_rows(case: Case) -> list[dict[str, Any]]:
    """One row per format, and per pair of formats (K/V) or, of a latent layer, with raw rope columns.

    A model of fp32 or fp16 has pages of its dtype; the other formats store a bf16 model's.
    """
    import torch

    from pikv_ds.ops.format.formats import FORMATS
    from pikv_ds.ops.format.kernels import MIXED

    labels = [*FORMATS, *([f"{name}+rope" for name in FORMATS if name not in _RAW] if case.latent else MIXED)]
    return [_row(label, case, getattr(torch, _RAW.get(label, "bfloat16"))) for label in labels]


def _row(name: str, case: Case, dtype: torch.dtype) -> dict[str, Any]:
    import torch

    from pikv_ds import ops
    from pikv_ds.ops.reference import attend as ref_attend

    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    keys, _, values = name.removesuffix("+rope").partition("/")
    fmt = ops.PageFormat(keys, case.heads, case.k_dim, case.v_dim, 64, case.latent, v_name=values or None, rope_raw=name.endswith("+rope"))
    k = (draw(case.context, case.heads, case.k_dim) + draw(1, case.heads, case.k_dim)).to(dtype)  # keys have channels of large mean
    v = k[..., : case.v_dim] if case.latent else draw(case.context, case.heads, case.v_dim).to(dtype)
    q, scale = draw(1, case.heads * case.group, case.k_dim).to(dtype), case.k_dim**-0.5
    pages, table, seqlens, tail = store_pages(fmt, k, v)
    out, lse, _ = ops.decode(q, pages, fmt, table, seqlens, scale=scale, **tail)
    stored, stored_lse, _ = ref_attend.attend(q.double().unsqueeze(1), pages, fmt, table, seqlens, scale=scale, **tail)
    exact, exact_lse = _exact(q, k, v, scale)
    row = {
        "format": name, "case": str(case), "dtype": str(dtype).removeprefix("torch."), "implementation": _implementation(),
        "bytes_per_token": fmt.bytes_per_token, **_roundtrip(fmt, pages[table.flatten()], k, v),
        "op_rms": _rms(out, stored.squeeze(1)), "op_max": _largest(out, stored.squeeze(1)) / _size(exact),
        "op_lse": _largest(lse, stored_lse.squeeze(1)),
        "out_rms": _rms(out, exact), "out_max": _largest(out, exact) / _size(exact), "lse": _largest(lse, exact_lse),
        "same_dtype": None, "sdpa": None, "over_sdpa": None,
    }  # fmt: skip
    if name in _RAW:
        row |= {"same_dtype": _rms(out.to(dtype), exact), "sdpa": _rms(_sdpa(q, k, v), exact)}
        row["over_sdpa"] = row["same_dtype"] / row["sdpa"]
    return row


def _implementation() -> str:
    from pikv_ds.ops.build import load

    served = load.ensured("cpu")
    return f"cpu, {load.cpu_instruction_set()}" if served == "cpu" else served


def store_pages(fmt: Any, k: torch.Tensor, v: torch.Tensor) -> tuple:
    """k and v [L, H, D] appended to pages in shuffled order: pages, block_table, seqlens, and the tail as `decode` takes it."""
    import torch

    from pikv_ds import ops

    context, size = k.shape[0], fmt.page_size
    table = torch.randperm(-(-context // size), generator=torch.Generator().manual_seed(1)).int().to(k.device)
    pages, positions = ops.new_pages(fmt, len(table), k.device), torch.arange(context, dtype=torch.int32, device=k.device)
    slots = table[(positions // size).long()] * size + positions % size
    raw, rows = None, None
    if fmt.grouped:
        raw, rows = k.new_zeros(1, fmt.num_kv_heads, fmt.group, fmt.k_dim), torch.zeros_like(positions)
    ops.append(pages, fmt, k, v.contiguous(), positions, slots, tail=raw, tail_rows=rows)
    tail = {"tail": raw, "tail_rows": rows[:1]} if fmt.grouped else {}
    return pages, table.view(1, 1, -1), torch.tensor([[context]], dtype=torch.int32, device=k.device), tail


def _roundtrip(fmt: Any, pages: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, float]:
    """`pages` in the order of the tokens. Without the open group, whose keys are raw."""
    from pikv_ds import ops

    closed = k.shape[0] - (k.shape[0] % fmt.group if fmt.grouped else 0)
    found = {"k_bound": fmt.k_rel_error, "v_bound": fmt.v_rel_error}
    for part, x, decoded in zip("kv", (k, v), ops.decode_pages(pages, fmt), strict=True):
        found[f"{part}_error"] = _rms(decoded.transpose(1, 2).flatten(0, 1)[:closed], x[:closed].double())
    return {key: found[key] for key in ("k_error", "k_bound", "v_error", "v_bound")}


def _exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """out [1, Hq, Dv] and lse [1, Hq] in fp64."""
    grouped = q.double().view(k.shape[1], -1, q.shape[-1]) * scale
    scores = grouped @ k.double().permute(1, 2, 0)  # [H, G, L]
    out = scores.softmax(-1) @ v.double().transpose(0, 1)
    return out.view(1, q.shape[1], -1), scores.logsumexp(-1).view(1, -1)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """torch's attention in the dtype of its inputs, [1, Hq, Dv]; the query heads of a kv head are rows of one query."""
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    out = sdpa(q.view(1, k.shape[1], -1, q.shape[-1]), k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0))
    return out.reshape(1, q.shape[1], -1)


def _size(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def _rms(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def _largest(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (found.double() - expected).abs().max().item()


def _round(value: Any) -> Any:
    return float(f"{value:.2g}") if isinstance(value, float) else value
