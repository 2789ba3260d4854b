"""From loads to a better placement: which rank holds which expert, how often, and what has to move. Pure tensor functions, on the CPU.

L layers, E experts, G ranks of n slots each. A plan is `slots` [L, G, n] int64 (slots.py), ascending in a rank. The load of an expert is
what its rank must do for it: bytes of KV, entries read, FLOPs, or a weighted sum; the ranks that hold copies of an expert share it evenly.
A slot may be of no use: it repeats an expert of its rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .packing import copies, deal, part
from .slots import count_moves, heaviest, held, rank_loads
from .swaps import even_out

SLACK = 0.02  # of the heaviest rank, that a plan may give away to move less
TRIES, ITEMS, NOISE = 10, 3200, 0.05  # the worst layers are packed again, 10 times or more, so many items in all, by weights that far off
DONE = 1e-5  # layers that near to what is possible are not


def balance(
    loads: Tensor,
    num_ranks: int,
    *,
    num_slots: int | None = None,
    num_nodes: int = 1,
    num_groups: int | None = None,
    present: Tensor | None = None,
    slack: float = SLACK,
) -> Tensor:
    """A plan whose heaviest rank is light in every layer, near to the present one.

    Args:
        loads: [L, E] float or int >= 0.
        num_slots: of all ranks, E or more; what is above E are copies of hot experts. Default E.
        num_nodes: copies of an expert stay within the node of its group, and nodes are balanced before their ranks.
        num_groups: neighbouring experts that share a node (group-limited routing). Default: each is its own.
        present: slots [L, G, n] of now; None: nothing is placed yet, so moves do not matter.
        slack: by how much the heaviest rank may be heavier than it could be, relative, where that spares moves.

    Returns: slots [L, G, n]. Equal for equal arguments, so that every rank can make it. Raises: ValueError.
    """
    num_layers, num_experts = loads.shape
    num_slots, num_groups = num_slots or num_experts, num_groups or num_experts
    _check(loads, num_ranks, num_slots, num_nodes, num_groups, present)
    loads = loads.to(torch.float64)
    if num_nodes == 1:
        return _within(loads, num_ranks, num_slots, present, slack)
    members = _nodes(loads, num_nodes, num_groups, present, slack)  # [L, nodes, E / nodes] experts, ascending
    inside = loads.gather(1, members.flatten(1)).view(num_layers * num_nodes, -1)
    known = None if present is None else _renumbered(present, members)
    slots = _within(inside, num_ranks // num_nodes, num_slots // num_nodes, known, slack)
    experts = members.flatten(0, 1).gather(1, slots.flatten(1))
    return experts.view(num_layers, num_ranks, -1).sort(2).values


def _within(loads: Tensor, num_ranks: int, num_slots: int, present: Tensor | None, slack: float) -> Tensor:
    """`balance` without nodes; loads f64."""
    count = copies(loads, num_slots, num_ranks)
    if present is None:
        return _free(loads, count, num_ranks, num_slots).sort(2).values
    enough = _possible(loads, count, num_ranks) * (1 + slack)
    slots = present.clone()
    heavy = (heaviest(loads, slots) > enough).nonzero().squeeze(1)  # a plan that is light enough stays
    if heavy.numel():
        slots[heavy] = _arranged(loads[heavy], count[heavy], num_ranks, num_slots, present=present[heavy], enough=enough[heavy])
    hard = heavy[heaviest(loads[heavy], slots[heavy]) > enough[heavy]]  # what is possible may not be: there the best plan says what is
    if hard.numel():
        slots[hard] = _near_or_best(loads[hard], count[hard], num_ranks, num_slots, present[hard], slack)
    return slots.sort(2).values


def _free(loads: Tensor, count: Tensor, num_ranks: int, num_slots: int) -> Tensor:
    """The lightest plan, wherever experts are now."""
    slots = _arranged(loads, count, num_ranks, num_slots)
    return slots if num_slots == loads.shape[1] else _tried_again(loads, count, slots)


def _near_or_best(loads: Tensor, count: Tensor, num_ranks: int, num_slots: int, present: Tensor, slack: float) -> Tensor:
    """The lightest plan by the ranks of now, or one of fewer moves within the slack of it."""
    num_experts = loads.shape[1]
    best = _relabelled(_free(loads, count, num_ranks, num_slots), present, num_experts)
    enough = heaviest(loads, best) * (1 + slack)
    near = _arranged(loads, count, num_ranks, num_slots, present=present, enough=enough)
    worth = (heaviest(loads, near) <= enough) & (count_moves(present, near, num_experts) <= count_moves(present, best, num_experts))
    return torch.where(worth[:, None, None], near, best)


def _possible(loads: Tensor, count: Tensor, num_ranks: int) -> Tensor:
    """[L]: no plan of so many copies has a lighter heaviest rank."""
    return torch.maximum(loads.sum(1) / num_ranks, (loads / count).amax(1))


def _arranged(
    loads: Tensor,
    count: Tensor,
    num_ranks: int,
    num_slots: int,
    *,
    present: Tensor | None = None,
    enough: Tensor | None = None,
    noise: float = 0.0,
) -> Tensor:
    """Slots [L, G, n], not in order. count [L, E] copies; noise: how far the weights that items are ordered by are off."""
    num_layers, num_experts = loads.shape
    idle = num_slots - count.sum(1)
    if most := int(idle.max()):  # an item for every slot
        count = torch.cat([count, (torch.arange(most) < idle.unsqueeze(1)).to(torch.int64)], 1)
        loads = torch.nn.functional.pad(loads, (0, most))
    num_kinds = loads.shape[1]
    kinds = torch.repeat_interleave(torch.arange(num_kinds).repeat(num_layers), count.flatten()).view(num_layers, num_slots)
    weights = (loads / count.clamp_min(1)).gather(1, kinds)
    given, order_by = None if present is None else _kept(kinds, count, present, num_experts), weights
    if noise:
        drawn = torch.rand(num_layers, num_kinds, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # alike for copies
        order_by = weights * (1 + noise * drawn.gather(1, kinds))
    items = even_out(part(deal(order_by, num_ranks, given), kinds, weights), kinds, weights, enough)
    slots = kinds.gather(1, items.flatten(1)).view_as(items)
    return torch.where(slots < num_experts, slots, slots.amin(2, keepdim=True))


def _tried_again(loads: Tensor, count: Tensor, slots: Tensor) -> Tensor:
    """Slots, and better ones of the layers that ended farthest from what is possible: all tries at once, with items in other orders and
    with other copies."""
    num_layers, num_ranks, places = slots.shape
    num_slots = num_ranks * places
    tries = max(TRIES, min(8 * TRIES, ITEMS // (num_layers * num_slots)))
    reached = heaviest(loads, slots)
    far = reached / _possible(loads, count, num_ranks).clamp_min(torch.finfo(torch.float64).tiny)
    stuck = far.argsort(descending=True, stable=True)[: max(1, ITEMS // (tries * num_slots))]
    stuck = stuck[far[stuck] > 1 + DONE]
    if not stuck.numel():
        return slots
    ways = [count[stuck], *_other_counts(loads[stuck], count[stuck], slots[stuck])]
    tries = tries // len(ways) * len(ways)
    counts = torch.stack(ways).repeat(tries // len(ways), 1, 1).flatten(0, 1)
    tried = _arranged(loads[stuck].repeat(tries, 1), counts, num_ranks, num_slots, noise=NOISE)
    again, which = heaviest(loads[stuck].repeat(tries, 1), tried).view(tries, -1).min(0)
    best = tried.view(tries, -1, *tried.shape[1:])[which, torch.arange(len(stuck))]
    slots[stuck] = torch.where((again < reached[stuck])[:, None, None], best, slots[stuck])
    return slots


def _other_counts(loads: Tensor, count: Tensor, slots: Tensor) -> list[Tensor]:
    """Four other ways to make copies, [L, E] each: one more of the heaviest or second heaviest in the heaviest rank, for one that is missed
    least; and without the one or the other of the two copies that are missed least."""
    missed = torch.where(count > 1, loads / (count - 1).clamp_min(1), torch.inf)  # the weight of a copy, if there were one less
    top = slots[torch.arange(len(slots)), rank_loads(loads, slots).argmax(1)]  # [L, n]
    heavy = top.gather(1, (loads / count).gather(1, top).topk(min(2, top.shape[1]), 1).indices)
    ways = []
    for more in heavy.split(1, 1):
        least, spared = missed.scatter(1, more, torch.inf).min(1, keepdim=True)
        can = ((count.gather(1, more) < slots.shape[1]) & least.isfinite()).to(torch.int64)
        ways.append(count.scatter_add(1, more, can).scatter_add(1, spared, -can))
    for _ in range(2):
        least, spared = missed.min(1, keepdim=True)
        ways.append(count.scatter_add(1, spared, -least.isfinite().to(torch.int64)))
        missed = missed.scatter(1, spared, torch.inf)
    return ways


def _kept(kinds: Tensor, count: Tensor, present: Tensor, num_experts: int) -> Tensor:
    """[L, M] int64: the ranks where items are now, -1 for those that are new; of an expert with fewer copies than now the last ones go."""
    ordered = present.sort(2).values
    again = torch.nn.functional.pad(ordered[:, :, 1:] == ordered[:, :, :-1], (1, 0))  # in a slot of no use
    experts, slots = ordered.masked_fill(again, num_experts).flatten(1).sort(dim=1, stable=True)  # by expert, then rank
    now = torch.zeros(len(count), num_experts + 1, dtype=torch.int64).scatter_add_(1, experts, torch.ones_like(experts))
    copy = torch.arange(kinds.shape[1]) - (count.cumsum(1) - count).gather(1, kinds)  # the which-th copy an item is
    at = (now.cumsum(1) - now).gather(1, kinds) + copy
    rank = slots.gather(1, at.clamp_max(slots.shape[1] - 1)) // present.shape[2]
    return torch.where(copy < now.gather(1, kinds), rank, -1)


def _relabelled(slots: Tensor, present: Tensor, num_experts: int) -> Tensor:
    """The same packs, given to the ranks that hold most of them: pairs that are each other's best match first, until all have one."""
    now, then = (held(each, num_experts).to(torch.float32) for each in (present, slots))
    common = now.transpose(1, 2) @ then  # [L, now, pack]
    num_layers, num_ranks = common.shape[:2]
    rank = torch.arange(num_ranks)
    common -= (rank - rank.unsqueeze(1)) % num_ranks / (2 * num_ranks)  # of equals the next pack, so that ranks do not ask for the same one
    pack_of = torch.full((num_layers, num_ranks), -1)
    while bool((pack_of < 0).any()):
        pack = common.argmax(2)
        match = (common.argmax(1).gather(1, pack) == rank) & (pack_of < 0)
        pack_of = torch.where(match, pack, pack_of)
        taken = torch.zeros(num_layers, num_ranks).scatter_add_(1, pack, match.to(torch.float32)) > 0
        common.masked_fill_(match.unsqueeze(2) | taken.unsqueeze(1), -1.0)
    return slots[torch.arange(num_layers)[:, None], pack_of]


def _nodes(loads: Tensor, num_nodes: int, num_groups: int, present: Tensor | None, slack: float) -> Tensor:
    """[L, nodes, E / nodes] int64: the experts of every node, whole groups, ascending."""
    num_experts, size = loads.shape[1], loads.shape[1] // num_groups
    now = None
    if present is not None:  # a group is where most of its copies are; a plan of before keeps it whole
        copies_in = held(present, num_experts).view(len(loads), num_groups, size, num_nodes, -1).sum((2, 4))
        now = _even(copies_in.argmax(2), num_nodes)
    groups = _within(loads.view(len(loads), num_groups, size).sum(2), num_nodes, num_groups, now, slack)
    return (groups.unsqueeze(3) * size + torch.arange(size)).flatten(2)


def _even(node: Tensor, num_nodes: int) -> Tensor | None:
    """[L, nodes, n] from the node of every group [L, groups]; None where nodes do not hold as many."""
    per_node = node.shape[1] // num_nodes
    if any(len(set(row.bincount(minlength=num_nodes).tolist())) != 1 for row in node):
        return None
    return node.argsort(dim=1, stable=True).view(len(node), num_nodes, per_node)


def _renumbered(present: Tensor, members: Tensor) -> Tensor | None:
    """Slots of now [L * nodes, G / nodes, n] by the numbers of experts within their node; None where some have changed nodes."""
    num_layers, num_nodes, _ = members.shape
    by_node = present.view(num_layers * num_nodes, -1)
    inside = torch.searchsorted(members.flatten(0, 1), by_node).clamp_max(members.shape[2] - 1)
    if not bool((members.flatten(0, 1).gather(1, inside) == by_node).all()):
        return None
    return inside.view(num_layers * num_nodes, present.shape[1] // num_nodes, -1)


def _check(loads: Tensor, num_ranks: int, num_slots: int, num_nodes: int, num_groups: int, present: Tensor | None) -> None:
    num_experts = loads.shape[1]
    if not bool((loads >= 0).all()) or (loads.is_floating_point() and not bool(loads.isfinite().all())):
        raise ValueError("loads must be finite and not negative")
    if num_ranks % num_nodes or num_groups % num_nodes or num_experts % num_groups:
        raise ValueError(
            f"num_nodes = {num_nodes} must divide num_ranks = {num_ranks} and num_groups = {num_groups}, which must divide "
            f"{num_experts} experts"
        )
    if num_slots % num_ranks or not num_experts <= num_slots <= num_experts * (num_ranks // num_nodes):
        raise ValueError(
            f"num_slots = {num_slots} for {num_experts} experts on {num_ranks} ranks: legal is a multiple of {num_ranks} from "
            f"{num_experts} to {num_experts * (num_ranks // num_nodes)}, one copy of an expert per rank (of its node)"
        )
    if present is not None and present.shape != (loads.shape[0], num_ranks, num_slots // num_ranks):
        raise ValueError(f"present has shape {list(present.shape)}, not [{loads.shape[0]}, {num_ranks}, {num_slots // num_ranks}]")
