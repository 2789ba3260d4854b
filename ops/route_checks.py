"""What route_pack, route_unpack and route_merge refuse. csrc/cpu/route_layout.h refuses the same with the same words."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import PACKED, require


def route_pack(buffer, need, fields, groups, own) -> None:
    require(need.dtype == torch.bool and need.dim() == 3 and need.is_contiguous(), f"route_pack: need must be contiguous torch.bool "
            f"[groups, ranks, tokens], got {need.dtype} {list(need.shape)}")  # fmt: skip
    (K, G, N), widths = need.shape, _routed("route_pack", buffer, fields, groups, need.shape[0])
    require(K <= 4 and G == buffer.shape[0], f"route_pack: need has {K} groups and {G} ranks, buffer has room for 4 and {buffer.shape[0]}")
    require(0 <= own < G, f"route_pack: own = {own} of {G} ranks")
    for i, x in enumerate(fields):
        require(x.shape[0] <= N, f"route_pack: field {i} has {x.shape[0]} rows, need {N} tokens")
    _fits("route_pack", buffer, widths, N)


def route_unpack(buffer, fields, tokens, counts, groups) -> None:
    require(counts.dtype == torch.int32 and counts.dim() == 2 and counts.is_contiguous(), f"route_unpack: counts must be contiguous "
            f"torch.int32 [groups, ranks], got {counts.dtype} {list(counts.shape)}")  # fmt: skip
    (K, G), widths = counts.shape, _routed("route_unpack", buffer, fields, groups, counts.shape[0])
    require(
        K <= 4 and G == buffer.shape[0], f"route_unpack: counts has {K} groups and {G} ranks, buffer has room for 4 and {buffer.shape[0]}"
    )
    given = f"{tokens.dtype} {list(tokens.shape)}"
    require(tokens.dtype == torch.int32 and tokens.dim() == 2 and tokens.is_contiguous() and tokens.shape[0] == K
            and tokens.shape[1] % max(G, 1) == 0,
            f"route_unpack: tokens must be contiguous torch.int32 [{K}, {G} * tokens], got {given}")  # fmt: skip
    for i, x in enumerate(fields):
        require(x.shape[0] == tokens.shape[1], f"route_unpack: field {i} has {x.shape[0]} rows, tokens {tokens.shape[1]}")
    _fits("route_unpack", buffer, widths, tokens.shape[1] // max(G, 1))


def route_merge(partials, need, order) -> None:
    require(partials.dtype == torch.float32 and partials.dim() == 3 and partials.shape[2] > 0 and partials.is_contiguous(),
            f"route_merge: partials must be contiguous torch.float32 [rows, heads, width + 1], got {partials.dtype} "
            f"{list(partials.shape)}")  # fmt: skip
    require(need.dtype == torch.bool and need.dim() == 2 and need.is_contiguous(), f"route_merge: need must be contiguous torch.bool "
            f"[ranks, tokens], got {need.dtype} {list(need.shape)}")  # fmt: skip
    require(sorted(order) == list(range(need.shape[0])), f"route_merge: order must name {need.shape[0]} ranks once, got {list(order)}")


def _routed(op: str, buffer: Tensor, fields: list[Tensor], groups, num_groups: int) -> list[list[int]]:
    """Bytes of a row of each section."""
    require(buffer.dtype == torch.uint8 and buffer.dim() == 2 and buffer.is_contiguous(),
            f"{op}: buffer must be contiguous uint8 [ranks, bytes], got {buffer.dtype} {list(buffer.shape)}")  # fmt: skip
    require(len(groups) == len(fields), f"{op}: {len(fields)} fields need as many groups, got {len(groups)}")
    widths: list[list[int]] = [[], *([4] for _ in range(num_groups))]
    for i, (x, group) in enumerate(zip(fields, groups, strict=True)):
        require(x.dim() >= 1 and x.is_contiguous(), f"{op}: field {i} must be contiguous [rows, ...], got {list(x.shape)}")
        require(x.dtype in PACKED, f"pack: a field must be float64, float32, bfloat16, float16 or an integer, got {x.dtype}")
        require(
            (groups[i - 1] if i else -1) <= group < num_groups, f"{op}: groups must ascend from -1 to {num_groups - 1}, got {group} at {i}"
        )
        widths[group + 1].append(x.shape[1:].numel() * x.element_size())
    return widths


def _fits(op: str, buffer: Tensor, widths: list[list[int]], num_tokens: int) -> None:
    most, room = 16, buffer.shape[1]
    for width in (width for of_group in widths for width in of_group):
        most = -(-(most + num_tokens * width) // 16) * 16
    require(most <= room and room % 16 == 0,
            f"{op}: a message of {num_tokens} tokens takes {most} bytes, buffer has {room} for each; a multiple of 16")  # fmt: skip
