"""route_pack, route_unpack and route_merge against what they are for, token by token, and against the reference.

Each takes `op`, which gives the op under test by name, and the device to run it on, and returns the error found.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pikv_ds.ops import library, route_bytes
from tests.ops.cases import compare, compare_lse

FIELDS = [(-1, (3,), torch.int32), (-1, (), torch.uint8), (0, (2, 5), torch.bfloat16), (0, (7,), torch.uint8), (1, (4,), torch.float32),
          (1, (), torch.int64)]  # fmt: skip
GROUPS = [group for group, _, _ in FIELDS]


def random_fields(rows: int, generator: torch.Generator) -> list[Tensor]:
    """Any bits."""
    return [
        torch.randint(256, (rows * torch.Size(shape).numel() * dtype.itemsize,), dtype=torch.uint8, generator=generator)
        .view(dtype)
        .view(rows, *shape)
        for _, shape, dtype in FIELDS
    ]


def widths(group: int) -> list[int]:
    return [torch.Size(shape).numel() * dtype.itemsize for own, shape, dtype in FIELDS if own == group]


def bits(x: Tensor) -> Tensor:
    return x.cpu().contiguous().view(-1).view(torch.uint8)


def delivered(buffers: list[Tensor], sizes: list[list[int]], to: int) -> Tensor:
    """What rank `to` has got: message `to` of every rank, with anything behind it."""
    most = buffers[0].shape[1]
    received = torch.full((len(buffers), most), 0xCD, dtype=torch.uint8)
    for rank, (buffer, size) in enumerate(zip(buffers, sizes, strict=True)):
        begin = sum(size[:to])
        received[rank, : size[to]] = buffer.view(-1)[begin : begin + size[to]].cpu()
    return received


def check_route(ranks: int, tokens: int, share: float, dense: bool, op: Callable, device: str) -> float:
    """Every rank packs, every rank unpacks: each row is where its token says, with its bits, on the ranks that need it and no other."""
    generator = torch.Generator().manual_seed(ranks * 100 + tokens)
    there = lambda x: x.to(device, copy=True)  # noqa: E731
    own = [max(tokens - rank, 0) for rank in range(ranks)]  # tokens of each rank
    fields = [random_fields(n, generator) for n in own]
    needs = [torch.rand(2, ranks, tokens, generator=generator) < share for _ in range(ranks)]
    for need, n in zip(needs, own, strict=True):
        need[..., n:] = False
    most = route_bytes(widths(-1), [(tokens, widths(0)), (tokens, widths(1))], tokens)
    buffers, sizes = [], []
    for rank in range(ranks):
        buffers.append(torch.full((ranks, most), 0xAB, dtype=torch.uint8, device=device))
        sizes.append(op("route_pack")(buffers[-1], there(needs[rank]), list(map(there, fields[rank])), GROUPS, rank, dense).tolist())
        for to, size in enumerate(sizes[-1]):
            counts = [int(needs[rank][group, to].sum()) for group in (0, 1)]
            expected = route_bytes(widths(-1), [(counts[0], widths(0)), (counts[1], widths(1))], tokens)
            assert size == (expected if dense and to != rank else most), (rank, to, size)
    for to in range(ranks):
        received = there(delivered(buffers, sizes, to))
        found = [torch.zeros(ranks * tokens, *shape, dtype=dtype, device=device) for _, shape, dtype in FIELDS]
        token = torch.zeros(2, ranks * tokens, dtype=torch.int32, device=device)
        counts = torch.zeros(2, ranks, dtype=torch.int32, device=device)
        op("route_unpack")(received, found, token, counts, GROUPS, dense)
        asked = torch.stack([need[:, to] for need in needs], 1)  # [K, G, N]
        everyone = torch.arange(ranks * tokens).view(ranks, tokens)
        for group in (0, 1):
            listed = everyone[asked[group]] if dense else torch.where(asked[group], everyone, -1).flatten()
            padded = torch.nn.functional.pad(listed, (0, ranks * tokens - listed.numel()), value=-1)
            assert torch.equal(token[group].cpu().long(), padded), f"tokens of group {group} on rank {to}"
            assert counts[group].tolist() == (asked[group].sum(1).tolist() if dense else [tokens] * ranks)
        for i, (group, shape, dtype) in enumerate(FIELDS):
            whole = torch.full((ranks, tokens, *shape), -1).to(dtype)
            for rank, n in enumerate(own):
                whole[rank, :n] = fields[rank][i]
            whole = whole.flatten(0, 1)
            expected = torch.zeros_like(whole)
            if group < 0:
                expected = whole
            else:
                listed = token[group].cpu().long()
                expected[listed >= 0] = whole[listed[listed >= 0]]
            assert torch.equal(bits(found[i]), bits(expected)), f"field {i} on rank {to}"
    return 0.0


def check_route_merge(ranks: int, tokens: int, dim: int, dense: bool, op: Callable, device: str) -> float:
    """As merge with 0 and -inf for the ranks that were not asked."""
    generator = torch.Generator().manual_seed(dim + tokens)
    need = torch.rand(ranks, tokens, generator=generator) < 0.6
    if tokens:
        need[:, 0] = False
    order = torch.randperm(ranks, generator=generator).tolist()
    whole = torch.randn(ranks, tokens, 3, dim + 1, generator=generator)
    whole[..., -1] *= 20
    whole[torch.rand(whole.shape[:3], generator=generator) < 0.2] = 0
    whole[..., -1][whole.abs().sum(-1) == 0] = -torch.inf
    partials = whole[need] if dense else whole.flatten(0, 1).clone()
    if not dense:
        partials[~need.flatten()] = torch.nan  # never read
    found = op("route_merge")(partials.to(device), need.to(device), order, dense)
    whole[~need] = 0
    whole[..., -1][~need] = -torch.inf
    expected = library.REFERENCE["merge"](whole[order][..., :-1].contiguous(), whole[order][..., -1].contiguous())
    compare_lse(found[1].cpu(), expected[1].double(), 1e-5, "lse")
    return compare(found[0].cpu(), expected[0].double(), 1e-6, "out")
