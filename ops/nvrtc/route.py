"""route_pack, route_unpack and route_merge on kernels compiled by NVRTC: what csrc/cuda/route.cu does, in Python."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.ops import checks, route_checks
from pikv_ds.ops.reference.route import row_bytes, sections

from . import params as kp
from .launch import WARPS, launch, num_processors
from .params import padding


def route_pack(buffer: Tensor, need: Tensor, fields: list[Tensor], groups: list[int], own: int, dense: bool) -> Tensor:
    route_checks.route_pack(buffer, need, fields, groups, own)
    _check_places("route_pack", dense)
    num_groups, num_ranks, num_tokens = need.shape
    _run("route_pack", kp.Route(need=need.data_ptr(), K=num_groups, G=num_ranks, N=num_tokens), buffer, fields, groups)
    return need.new_full((num_ranks,), buffer.shape[1], dtype=torch.int64)


def route_unpack(buffer: Tensor, fields: list[Tensor], tokens: Tensor, counts: Tensor, groups: list[int], dense: bool) -> None:
    route_checks.route_unpack(buffer, fields, tokens, counts, groups)
    _check_places("route_unpack", dense)
    num_groups, num_ranks = counts.shape
    r = kp.Route(tokens=tokens.data_ptr(), counts=counts.data_ptr(), K=num_groups, G=num_ranks, N=tokens.shape[1] // max(num_ranks, 1))
    _run("route_unpack", r, buffer, fields, groups)


def route_merge(partials: Tensor, need: Tensor, order: list[int], dense: bool) -> tuple[Tensor, Tensor]:
    route_checks.route_merge(partials, need, order)
    _check_places("route_merge", dense)
    (num_ranks, num_tokens), (_, heads, width) = need.shape, partials.shape
    most = len(kp.RouteMerge().order)
    checks.require(num_ranks <= most, f"route_merge: {num_ranks} ranks, at most {most}")
    rows = num_ranks * num_tokens
    checks.require(rows <= partials.shape[0], f"route_merge: need asks for {rows} rows, partials have {partials.shape[0]}")
    out, lse = partials.new_empty(num_tokens, heads, width - 1), partials.new_empty(num_tokens, heads)
    m = kp.RouteMerge(partials.data_ptr(), need.data_ptr(), out.data_ptr(), lse.data_ptr(), num_ranks, num_tokens, heads, width - 1)
    m.order[:num_ranks] = order
    if lse.numel():
        launch("pages", "route_merge_kernel", (-(-lse.numel() // WARPS), 1), 0, m, partials.device)
    return out, lse


def _check_places(op: str, dense: bool) -> None:
    why = "on a device every token has a place (dense False), so that sizes are known"
    checks.require(not dense, f"{op}: dense messages are packed on the CPU; {why}")


def _run(op: str, r: kp.Route, buffer: Tensor, fields: list[Tensor], groups: list[int]) -> None:
    checks.require(len(fields) <= len(r.fields), f"{op}: {len(fields)} fields, at most {len(r.fields)}")
    starts, _ = sections([r.N] * (r.K + 1), row_bytes(fields, groups, r.K))
    r.buffer, r.most, r.num_fields = buffer.data_ptr(), buffer.shape[1], len(fields)
    for k in range(r.K):
        r.token_start[k] = starts[k + 1][0]
    places = [iter(starts[0]), *(iter(of_group[1:]) for of_group in starts[1:])]
    for i, (x, group) in enumerate(zip(fields, groups, strict=True)):
        width = x.shape[1:].numel() * x.element_size()
        r.fields[i] = kp.RouteField(x.data_ptr(), x.shape[0], width, next(places[group + 1]), padding(x.dtype), group)
    blocks = min(r.G * r.N, 8 * num_processors(buffer.device))
    if blocks:
        launch("pages", f"{op}_kernel", (blocks, r.num_fields + r.K), 0, r, buffer.device)
