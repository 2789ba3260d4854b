"""KVGate: what a query head would give to the keys of a page, from codes of a few bits. Trained as the part "kv_gate", run by `learned`.

N keys, Q queries, H kv heads, G query heads of each, D key width, r code width, P entries of a page, C pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from pikv_ds.codecs.part_file import TrainedLayer

STEP = {2: 0.996, 4: 0.335}
"""Standard deviations between levels, by bits, where a fit begins: the least squared error for normal numbers."""


class GateLayer(nn.Module):
    """One layer: key -> code of r numbers of `bits`, query -> r numbers per head; their product stands for the logit, up to what a head
    gives to all keys alike.

    code = clamp(floor(z), -2^(bits-1), 2^(bits-1) - 1), z = W (k - center) / step;  k~ = step (code + 1/2);  logit ~ V_g q . k~
    """

    def __init__(self, heads: int, group: int, dim: int, rank: int, bits: Literal[2, 4], totals: int) -> None:
        super().__init__()
        self.bits, self.rank = bits, rank
        self.center = nn.Parameter(torch.zeros(heads, dim))
        self.encode = nn.Parameter(torch.nn.init.orthogonal_(torch.empty(heads, dim, dim))[..., :rank].contiguous())
        self.query = nn.Parameter(self.encode.detach()[:, None].repeat(1, group, 1, 1))
        self.log_step = nn.Parameter(torch.zeros(heads, rank))
        self.total = nn.Parameter(torch.randn(heads, group, totals, dim) * 0.1)
        self.total_bias = nn.Parameter(torch.zeros(heads, group, totals))

    @torch.no_grad()
    def begin(self, keys: Tensor, q: Tensor) -> None:
        """First weights from keys [N, H, D] and queries [M, H, G, D]: of all maps of rank r those that lose least of q k, by squared error.

        With keys centered and A A^T, B B^T the second moments of queries and keys: A^T B = U S V^T, encode = B^-T V S^1/2 of r columns, and
        query = A^-T U S^1/2.
        """
        self.center.copy_(keys.mean(0))
        k = (keys - self.center).double()
        queries = q.double().transpose(1, 2).flatten(0, 1)
        roots = [torch.linalg.cholesky(torch.einsum("nhi,nhj->hij", x, x) / len(x) + 1e-6 * torch.eye(x.shape[-1])) for x in (queries, k)]
        u, s, v = torch.linalg.svd(roots[0].mT @ roots[1])
        root = s[:, None, : self.rank].sqrt()
        self.encode.copy_(torch.linalg.solve(roots[1].mT, v.mT[..., : self.rank] * root))
        self.query.copy_(torch.linalg.solve(roots[0].mT, u[..., : self.rank] * root)[:, None].expand_as(self.query))
        self.log_step.copy_((STEP[self.bits] * torch.einsum("nhd,hdr->nhr", k, self.encode.double()).std(0)).log())

    def of_heads(self, first: int, count: int) -> GateLayer:
        """The kv heads of a tensor-parallel rank."""
        if first == 0 and count == self.center.shape[0]:
            return self
        _, group, dim, _ = self.query.shape
        own = GateLayer(count, group, dim, self.rank, self.bits, self.total.shape[2])
        own.load_state_dict({name: x[first : first + count] for name, x in self.state_dict().items()})
        return own.requires_grad_(False)

    def codes(self, keys: Tensor) -> Tensor:
        """keys [..., H, D] -> [..., H, r] f32 whole numbers from 0 to 2^bits - 1. Gradients pass as if they were not rounded."""
        z = torch.einsum("...hd,hdr->...hr", keys - self.center, self.encode) * torch.exp(-self.log_step)
        z = z + 2.0 ** (self.bits - 1)
        rounded = z.floor().clamp(0, 2**self.bits - 1)
        held = (z - 0.5).clamp(-0.5, 2**self.bits - 0.5)
        return held + (rounded - held).detach()

    def queries(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """q [..., H, G, D], times the softmax scale -> what meets codes [..., H, G, r], and what is added to every product [..., H, G]."""
        met = torch.einsum("...hgd,hgdr->...hgr", q, self.query) * torch.exp(self.log_step)[:, None]
        return met, (0.5 - 2.0 ** (self.bits - 1)) * met.sum(-1)

    def totals(self, q: Tensor) -> Tensor:
        """q as in `queries` -> [..., H, G], log of what the head gives to all keys of a request, guessed from the query alone."""
        return (torch.einsum("...hgd,hgnd->...hgn", q, self.total) + self.total_bias).logsumexp(-1)

    def forward(self, q: Tensor, keys: Tensor) -> Tensor:
        """q [Q, H, G, D] times scale; keys [T, H, D], T = C * P -> log scores of keys per head, [Q, H, G, T]."""
        met, added = self.queries(q)
        return torch.einsum("qhgr,thr->qhgt", met, self.codes(keys)) + (added - self.totals(q)).unsqueeze(-1)


class KVGate(nn.Module):
    """All layers. A page has the share of the attention that its keys would get, summed over the query heads of a kv head."""

    def __init__(self, layers: Sequence[TrainedLayer], *, bits: Literal[2, 4] = 2, rank: int | None = None, totals: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            GateLayer(x.num_kv_heads, x.num_q_heads // x.num_kv_heads, x.k_dim, rank or x.k_dim, bits, totals) for x in layers
        )

    def forward(self, layer: int, q: Tensor, keys: Tensor, page_size: int) -> Tensor:
        """q [Q, H, G, D] times scale, keys [C * P, H, D] -> log scores of full pages [Q, H, C]."""
        logits = self.layers[layer](q, keys)
        return logits.unflatten(-1, (-1, page_size)).logsumexp((2, 4))


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes [..., r] whole numbers from 0 to 2^bits - 1 -> [..., r bits / 8] uint8, the first in the lowest bits."""
    shifts = torch.arange(0, 8, bits, device=codes.device)
    return (codes.to(torch.int32).unflatten(-1, (-1, 8 // bits)) << shifts).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """packed [..., B] uint8 -> [..., 8 B / bits] f32."""
    every = torch.arange(256, device=packed.device).unsqueeze(1) >> torch.arange(0, 8, bits, device=packed.device)
    table = (every & (2**bits - 1)).float()
    return table.index_select(0, packed.flatten().to(torch.int32)).view(*packed.shape[:-1], -1)
