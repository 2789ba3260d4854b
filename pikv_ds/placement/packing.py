"""Items onto packs of equal size so that the heaviest pack is light. Pure tensor functions, all layers at once.

L layers, E kinds (experts), M items, P packs of n = M / P places. The items of a kind are copies: equal weights, on different packs.
Packs are dealt to in rounds, which is n short steps in place of M, and then made even by swaps (swaps.py).
"""

from __future__ import annotations

import torch
from torch import Tensor


def copies(weights: Tensor, num_items: int, most: int) -> Tensor:
    """How many items every kind becomes: [L, E] int64 >= 1, num_items in all, at most `most`; the heaviest copy is as light as can be.

    Args: weights [L, E] float >= 0, of a kind; its copies share it evenly. Needs E <= num_items <= E * most.
    """
    count = torch.ones_like(weights, dtype=torch.int64)
    for _ in range(num_items - weights.shape[1]):
        each = torch.where(count < most, weights / count, -1.0)
        count.scatter_add_(1, each.argmax(1, keepdim=True), torch.ones_like(count[:, :1]))
    return count


def deal(weights: Tensor, num_packs: int, given: Tensor | None = None) -> Tensor:
    """In rounds: the heaviest items that are left, one to every pack with a place, the heaviest to the lightest.

    Args: weights [L, M] float of the items, in any order; given [L, M] int64, the packs of items that stay, -1 = to be placed; None: none
        stays.

    Returns: items [L, P, n] int64. Copies may share a pack: `part`.
    """
    num_layers, num_items = weights.shape
    pack_of, load, left = _opened(weights, num_packs, given)
    order = torch.where(pack_of < 0, weights, -1.0).argsort(dim=1, descending=True, stable=True)  # those to be placed come first
    heavy = weights.gather(1, order)
    dealt, seat = torch.zeros(num_layers, 1, dtype=torch.int64), torch.arange(num_packs)
    for _ in range(int(left.max())):
        packs = torch.where(left > 0, load, torch.inf).argsort(dim=1, stable=True)
        takes = (left > 0).sum(1, keepdim=True)
        at = (dealt + seat).clamp_max(num_items - 1)
        item, valid = order.gather(1, at), seat < takes
        load.scatter_add_(1, packs, heavy.gather(1, at) * valid)
        left.scatter_add_(1, packs, -valid.to(torch.int64))
        pack_of.scatter_(1, item, torch.where(valid, packs, pack_of.gather(1, item)))
        dealt += takes
    return pack_of.argsort(dim=1, stable=True).view(num_layers, num_packs, -1)


def _opened(weights: Tensor, num_packs: int, given: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Where items are [L, M], -1 = nowhere yet; load and places left of packs [L, P]."""
    load = weights.new_zeros(len(weights), num_packs)
    left = torch.full(load.shape, weights.shape[1] // num_packs, dtype=torch.int64)
    if given is None:
        return torch.full(weights.shape, -1, dtype=torch.int64), load, left
    stay, at = (given >= 0).to(torch.int64), given.clamp_min(0)
    return given.clone(), load.scatter_add_(1, at, weights * stay), left.scatter_add_(1, at, -stay)


def part(items: Tensor, kinds: Tensor, weights: Tensor) -> Tensor:
    """Swap copies that share a pack for the items of another pack that are nearest in weight, one in every layer at a time.

    Args: items [L, P, n] int64; kinds [L, M] int64 and weights [L, M] float of the items.

    Returns: items, changed. Raises: ValueError, when a kind has more copies than packs have room for.
    """
    items, left = items.clone(), torch.arange(len(items))
    while True:
        flat = items[left].flatten(1)
        kind = kinds[left].gather(1, flat).view(-1, *items.shape[1:])
        ordered, places = kind.sort(2)
        twice = ordered[:, :, 1:] == ordered[:, :, :-1]
        clash = twice.flatten(1).any(1)
        if not bool(clash.any()):
            return items
        left, flat, kind, ordered, places, twice = (x[clash] for x in (left, flat, kind, ordered, places, twice))
        first = twice.flatten(1).to(torch.uint8).argmax(1)
        pack, at = first // twice.shape[2], first % twice.shape[2] + 1
        mine = pack * items.shape[2] + places[torch.arange(len(left)), pack, at]
        theirs = _nearest(kind, weights[left].gather(1, flat).view_as(kind), pack, mine)
        whole = items.view(len(items), -1)
        whole[left, mine], whole[left, theirs] = whole[left, theirs], whole[left, mine]


def _nearest(kind: Tensor, weight: Tensor, pack: Tensor, mine: Tensor) -> Tensor:
    """[L] the place nearest in weight to place `mine` of `pack`, [L] each: of a pack without that kind, of a kind that `pack` is without.

    kind and weight [L, P, n]; places are counted over all packs."""
    layer = torch.arange(len(kind))
    own, heavy = kind.flatten(1)[layer, mine], weight.flatten(1)[layer, mine]
    known = torch.zeros(len(kind), int(kind.max()) + 1, dtype=torch.bool).scatter_(1, kind[layer, pack], True)
    legal = (kind != own[:, None, None]).all(2, keepdim=True) & ~known.gather(1, kind.flatten(1)).view_as(kind)
    cost, theirs = torch.where(legal, (weight - heavy[:, None, None]).abs(), torch.inf).flatten(1).min(1)
    if not bool(cost.isfinite().all()):
        raise ValueError("more copies of a kind than packs have room for")
    return theirs
