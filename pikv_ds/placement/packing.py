"""Items onto packs of equal size so that the heaviest pack is light. Pure tensor functions, all layers at once.

L layers, E kinds (experts), M items, P packs of n = M / P places. The items of a kind are copies: equal weights, on different packs.
"""

from __future__ import annotations

import torch
from torch import Tensor

CLOSE = 1e-5  # of the mean pack: exchanges that gain less are not worth a move
ROUNDS = 32  # exchanges of a layer, at most
REACH = 96  # items of the lightest packs that an exchange looks at


def copies(weights: Tensor, num_items: int, most: int) -> Tensor:
    """How many items every kind becomes: [L, E] int64 >= 1, num_items in all, at most `most`; the heaviest copy is as light as can be.

    Args: weights [L, E] float >= 0, of a kind; its copies share it evenly. Needs E <= num_items <= E * most.
    """
    count = torch.ones_like(weights, dtype=torch.int64)
    for _ in range(num_items - weights.shape[1]):
        each = torch.where(count < most, weights / count, -1.0)
        count.scatter_add_(1, each.argmax(1, keepdim=True), torch.ones_like(count[:, :1]))
    return count


def pack(kinds: Tensor, weights: Tensor, num_kinds: int, num_packs: int, given: Tensor | None = None) -> Tensor:
    """The heaviest item first, each into the lightest pack that has a place for it and holds no copy of it yet.

    Args: kinds [L, M] int64 and weights [L, M] float of the items, in any order; given [L, M] int64, the pack of items that stay where they
        are, -1 = to be placed; None: none stays.

    Returns: [L, M] int64, the pack of every item. Copies share a pack only where no other has a place left (`part`).
    """
    num_layers, num_items = kinds.shape
    placed = torch.full_like(kinds, -1) if given is None else given
    in_line = torch.where(placed < 0, weights, torch.inf)  # those that stay come first
    order = in_line.argsort(dim=1, descending=True, stable=True)
    kind, weight, placed = (x.gather(1, order).T.contiguous() for x in (kinds, weights, placed))  # [M, L]
    load, left, held = _opened(kind, weight, placed, num_kinds, num_packs)
    first = int((placed >= 0).sum(0).min())
    layer = torch.arange(num_layers)
    at_pack, at_held = layer * num_packs, (kind + layer * num_kinds).unbind(0)
    of_kind, load_at, left_at = held.view(-1, num_packs), load.view(-1), left.view(-1)  # by layer and kind, by layer and pack
    several, far = _have_copies(kind, num_kinds), 2 * weight.sum() + 1
    places = list(placed.unbind(0))
    for item, heavy in enumerate(weight.unbind(0)[first:], first):
        seen = load
        if several[item]:  # packs that hold a copy come behind all others that have a place
            seen = torch.where(of_kind.index_select(0, at_held[item]), load + far, load)
        at = seen.argmin(1)
        if given is not None:
            waits = places[item] < 0
            at = torch.where(waits, at, places[item])
        here = at + at_pack
        room, now = left_at.index_select(0, here), load_at.index_select(0, here)
        if given is None:
            room -= 1
            now += heavy
            now.masked_fill_(room == 0, torch.inf)
        else:
            room = room - waits.to(room.dtype)
            now = torch.where(waits, torch.where(room == 0, torch.inf, now + heavy), now)
        left_at.index_copy_(0, here, room)
        load_at.index_copy_(0, here, now)
        if several[item]:
            held.view(-1).index_fill_(0, at_held[item] * num_packs + at, True)
        places[item] = at
    return torch.empty_like(kinds).scatter_(1, order, torch.stack(places).T)


def _opened(kind: Tensor, weight: Tensor, placed: Tensor, num_kinds: int, num_packs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packs as those leave them that stay: load [L, P], inf = full; places left [L, P]; which kinds they hold [L, E, P]. Items [M, L]."""
    num_items, num_layers = kind.shape
    stay, at = placed >= 0, placed.clamp_min(0)
    load = weight.new_zeros(num_layers, num_packs).scatter_add_(1, at.T, (weight * stay).T)
    left = num_items // num_packs - torch.zeros_like(load, dtype=torch.int64).scatter_add_(1, at.T, stay.T.to(torch.int64))
    held = torch.zeros(num_layers, num_kinds, num_packs, dtype=torch.bool)
    held[torch.arange(num_layers).expand_as(kind)[stay], kind[stay], placed[stay]] = True
    return load.masked_fill_(left == 0, torch.inf), left, held


def _have_copies(kind: Tensor, num_kinds: int) -> list[bool]:
    """Per item of [M, L]: in some layer it is one of several copies."""
    count = torch.zeros(kind.shape[1], num_kinds, dtype=torch.int64).scatter_add_(1, kind.T, torch.ones_like(kind.T))
    return (count.gather(1, kind.T) > 1).any(0).tolist()


def by_pack(packs: Tensor, num_packs: int) -> Tensor:
    """[L, P, n] int64, the items of every pack, from the pack of every item [L, M]."""
    return packs.argsort(dim=1, stable=True).view(packs.shape[0], num_packs, -1)


def exchange(items: Tensor, kinds: Tensor, weights: Tensor, enough: Tensor | None = None) -> Tensor:
    """Swap items of the heaviest pack for lighter ones elsewhere, as long as the heavier of both packs gets lighter.

    Args: items [L, P, n] int64, as of `by_pack`; kinds and weights [L, M]; enough [L] float, a weight of the heaviest pack that need not be
        improved on; None: go on.

    Returns: items, changed. Copies of a kind stay apart.
    """
    num_layers, num_packs, places = items.shape
    items = items.clone()
    kind, weight = (x.gather(1, items.flatten(1)).view_as(items) for x in (kinds, weights))
    several = bool((kinds.sort(1).values.diff(dim=1) == 0).any())
    layers = torch.arange(num_layers)
    least = weights.sum(1) / num_packs
    close = CLOSE * least
    enough = least if enough is None else enough
    for reach in dict.fromkeys((min(num_packs - 1, max(2, REACH // places)), num_packs - 1)):  # with few packs first, which costs little
        left = layers
        for _ in range(ROUNDS):
            left = left[weight[left].sum(2).amax(1) > enough[left] + close[left]]
            if not left.numel() or not reach:
                break
            gain, mine, theirs = _best_swap(kind[left], weight[left], reach, several)
            worth = gain > close[left]
            left, mine, theirs = left[worth], mine[worth], theirs[worth]
            for x in (items, kind, weight):
                flat = x.view(num_layers, -1)
                flat[left, mine], flat[left, theirs] = flat[left, theirs], flat[left, mine]
    return items


def _best_swap(kind: Tensor, weight: Tensor, reach: int, several: bool) -> tuple[Tensor, Tensor, Tensor]:
    """By how much the best swap with the `reach` lightest packs makes the heavier of two lighter, [L]; and the places [L] that it swaps,
    counted over all packs."""
    num_layers, num_packs, places = kind.shape
    layer = torch.arange(num_layers)
    load = weight.sum(2)
    top = load.argmax(1)
    light = load.topk(reach, largest=False).indices  # [L, K]
    over = (load[layer, top, None] - load.gather(1, light)).repeat_interleave(places, 1).unsqueeze(1)  # [L, 1, K * n]
    own, other = weight[layer, top], weight[layer[:, None], light].flatten(1)
    less = own.unsqueeze(2) - other.unsqueeze(1)  # [L, n, K * n] what the heaviest gives
    gain = torch.minimum(less, over - less)
    if several:
        same = kind[layer, top].unsqueeze(2) == kind[layer[:, None], light].flatten(1).unsqueeze(1)
        there = same.unflatten(2, (reach, places)).any(3).repeat_interleave(places, 2)  # that pack holds a copy of mine
        gain.masked_fill_(there | same.any(1, keepdim=True), -torch.inf)  # or mine one of that
    best = gain.flatten(1).argmax(1)
    mine, theirs = best // other.shape[1], best % other.shape[1]
    return gain.flatten(1)[layer, best], top * places + mine, light[layer, theirs // places] * places + theirs % places


def part(items: Tensor, kinds: Tensor, weights: Tensor) -> Tensor:
    """Swap copies that share a pack for the items of another pack that are nearest in weight. Layers without such are left alone."""
    items = items.clone()
    for layer in range(items.shape[0]):
        while (clash := _clash(kinds[layer][items[layer]])) is not None:
            pack, place = clash
            _swap_apart(items[layer], kinds[layer], weights[layer], pack, place)
    return items


def _clash(kind: Tensor) -> tuple[int, int] | None:
    """A place whose pack holds another copy of its item; kind [P, n]."""
    ordered, places = kind.sort(1)
    twice = (ordered[:, 1:] == ordered[:, :-1]).nonzero()
    return None if not len(twice) else (int(twice[0, 0]), int(places[twice[0, 0], twice[0, 1] + 1]))


def _swap_apart(items: Tensor, kinds: Tensor, weights: Tensor, pack: int, place: int) -> None:
    """In place: items [P, n] of one layer."""
    kind, weight = kinds[items], weights[items]
    lacks = (kind != kind[pack, place]).all(1, keepdim=True)  # packs without a copy of it
    unknown = ~torch.isin(kind, kind[pack])  # items that this pack has none of
    cost = torch.where(lacks & unknown, (weight - weight[pack, place]).abs(), torch.inf).flatten()
    best = int(cost.argmin())
    if not bool(cost[best].isfinite()):
        raise ValueError("more copies of a kind than packs have room for")
    other = divmod(best, items.shape[1])
    items[pack, place], items[other] = items[other].clone(), items[pack, place].clone()
