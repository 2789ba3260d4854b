"""Packs of items made even by swaps. Pure tensor functions, all layers at once.

L layers, M items, P packs of n = M / P places, as in packing.py; copies of a kind stay on different packs.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations

import torch
from torch import Tensor

CLOSE = 1e-5  # of the mean pack: swaps that gain less are not worth a move
DEALT, PAIRS, PARTS = 12, 8, 5  # rounds in which pairs of packs, so many in a layer, deal so many items of each anew, at most
ROUNDS = 32  # swaps of the heaviest pack of a layer, at most
FAR = 1e3  # times the heavier pack: a weight that no way of dealing evens out
REACH, WIDE = 96, 4096  # items of the lightest packs that such a swap looks at first, and pairs of items once no such swap is left


def even_out(items: Tensor, kinds: Tensor, weights: Tensor, enough: Tensor | None = None) -> Tensor:
    """Swap items between packs as long as the heavier of both gets lighter.

    Args: items [L, P, n] int64; kinds [L, M] int64 and weights [L, M] float of the items; enough [L] float, a weight of the heaviest pack
        that need not be improved on, and then only the heaviest pack swaps, which moves less; None: go on.

    Returns: items, changed.
    """
    num_layers, num_packs, places = items.shape
    packs = _Packs(items, kinds, weights, enough)
    if num_packs == 1:
        return packs.items
    if enough is None:
        order = torch.Generator().manual_seed(0)
        left = packs.above(torch.arange(num_layers))
        for turn in range(DEALT):
            if not left.numel():
                break
            _deal_pairs(packs, left, turn, torch.randperm(places, generator=order)[:PARTS])
            left = packs.above(left)
    for reach in dict.fromkeys(min(num_packs - 1, max(2, each)) for each in (REACH // places, WIDE // places**2)):
        left = packs.above(torch.arange(num_layers))
        for _ in range(ROUNDS):
            if not left.numel():
                break
            gain, mine, theirs = _best_swap(packs, left, reach)
            worth = gain > packs.close[left]
            packs.swap(mine[worth], theirs[worth])
            left = packs.above(left[worth])
    return packs.items


class _Packs:
    """Items, kinds, weights [L, P, n], loads [L, P] and, if there are copies, which packs hold which kinds [L, P, E]; swaps keep them so.

    A place is counted over all places of all packs of all layers, a pack over all packs of all layers.
    """

    def __init__(self, items: Tensor, kinds: Tensor, weights: Tensor, enough: Tensor | None) -> None:
        self.items = items.clone()
        self.kind, self.weight = (x.gather(1, items.flatten(1)).view_as(items) for x in (kinds, weights))
        self.load = self.weight.sum(2)
        least = weights.sum(1) / items.shape[1]
        self.close = CLOSE * least
        self.enough = (least if enough is None else enough) + self.close
        self.held: Tensor | None = None
        if bool((kinds.sort(1).values.diff(dim=1) == 0).any()):
            self.held = torch.zeros(*items.shape[:2], int(kinds.max()) + 1, dtype=torch.bool).scatter_(2, self.kind, True)

    def above(self, layer: Tensor) -> Tensor:
        """Those of these layers whose heaviest pack is not light enough."""
        return layer[self.load[layer].amax(1) > self.enough[layer]]

    def places(self, pack: Tensor) -> Tensor:
        """[..., n] of packs [...]."""
        return pack.unsqueeze(-1) * self.items.shape[2] + torch.arange(self.items.shape[2])

    def holds(self, pack: Tensor, place: Tensor) -> Tensor:
        """Whether a pack holds what lies at a place, where there are copies; shapes that broadcast."""
        assert self.held is not None
        return self.held.take(pack * self.held.shape[2] + self.kind.take(place))

    def swap(self, mine: Tensor, theirs: Tensor) -> None:
        """Items of places [K] each; a pack is in one swap at most."""
        self.rearrange(torch.stack([mine, theirs]), torch.stack([theirs, mine]), torch.stack([mine, theirs]) // self.items.shape[2])

    def rearrange(self, places: Tensor, sources: Tensor, packs: Tensor) -> None:
        """Every place has what lay at its source; packs [...]: all packs that have such places, once each."""
        if self.held is not None:
            rows = (packs * self.held.shape[2]).unsqueeze(-1)
            gone = rows + self.kind.take(self.places(packs))
            self.held.put_(gone, torch.zeros_like(gone, dtype=torch.bool))
        for x in (self.items, self.kind, self.weight):
            x.put_(places, x.take(sources))
        self.load.put_(packs, self.weight.take(self.places(packs)).sum(-1))
        if self.held is not None:
            held = rows + self.kind.take(self.places(packs))
            self.held.put_(held, torch.ones_like(held, dtype=torch.bool))


@cache
def _ways(parts: int) -> tuple[Tensor, Tensor]:
    """All ways to deal 2 * parts items to two: items in order, the first half to the one, [W, 2 * parts]; and which those are, f64 alike.
    The first item stays where it is, as both are alike."""
    dealt = [(0, *one) for one in combinations(range(1, 2 * parts), parts - 1)]
    order = torch.tensor([(*one, *(i for i in range(2 * parts) if i not in one)) for one in dealt])
    return order, torch.zeros(order.shape, dtype=torch.float64).scatter_(1, order[:, :parts], 1.0)


def _deal_pairs(packs: _Packs, layers: Tensor, turn: int, at: Tensor) -> None:
    """Heavy packs and light ones, two by two, deal the items of places `at` [s] anew, as evenly as can be: in the first turns all packs,
    then the heaviest and the lightest, every turn with others."""
    _, num_packs, places = packs.items.shape
    half, parts = num_packs // 2 if turn < 2 else min(PAIRS, num_packs // 2), len(at)
    order = packs.load[layers].argsort(dim=1, descending=True, stable=True) + layers.unsqueeze(1) * num_packs
    pair = torch.stack([order[:, :half], order[:, num_packs - half :].flip(1).roll(turn if turn % 2 else -turn, 1)], 2)  # [l, h, 2]
    place = pair.unsqueeze(3) * places + at  # [l, h, 2, s]
    weight, load = packs.weight.take(place), packs.load.take(pair)
    wanted = weight[:, :, 0].sum(2) + (load[:, :, 1] - load[:, :, 0]) / 2  # of what the heavy one is dealt
    if packs.held is not None:  # what the other holds a copy of stays: it weighs too much to be anywhere else
        stays = packs.holds(pair.flip(2).unsqueeze(3), place) * (FAR * load.amax((1, 2)))[:, None, None, None]
        weight = torch.stack([weight[:, :, 0] + stays[:, :, 0], weight[:, :, 1] - stays[:, :, 1]], 2)
        wanted = wanted + stays[:, :, 0].sum(2)
    order, dealt = _ways(parts)
    best = order[(weight.flatten(2) @ dealt.T - wanted.unsqueeze(2)).abs_().argmin(2)]  # [l, h, 2 * s]
    packs.rearrange(place, place.flatten(2).gather(2, best).view_as(place), pair)


def _best_swap(packs: _Packs, layers: Tensor, reach: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best swap of the heaviest pack with one of the `reach` lightest: by how much the heavier of both gets lighter, and the places
    that swap, [l] each."""
    _, num_packs, places = packs.items.shape
    load = packs.load[layers]
    (peak, top), (least, light) = load.max(1), load.topk(reach, largest=False)
    top, light = top + layers * num_packs, light + (layers * num_packs).unsqueeze(1)  # [l], [l, K]
    mine, theirs = packs.places(top), packs.places(light)  # [l, n], [l, K, n]
    own, other = packs.weight.take(mine).unsqueeze(2), packs.weight.take(theirs)
    if packs.held is not None:  # that pack holds a copy of mine, or mine one of that
        own = torch.where(packs.holds(light.unsqueeze(1), mine.unsqueeze(2)), -torch.inf, own)
        other.masked_fill_(packs.holds(top[:, None, None], theirs), torch.inf)
    less = own.unsqueeze(3) - other.unsqueeze(1)  # [l, n, K, n] what the heaviest gives
    gain = torch.minimum(less, (peak.unsqueeze(1) - least)[:, None, :, None] - less)
    gain, best = gain.flatten(1).max(1)
    pack = light.gather(1, (best // places % reach).unsqueeze(1)).squeeze(1)
    return gain, top * places + best // (reach * places), pack * places + best % places
