"""How much of the KV cache lies in each memory tier: FlexGen's linear cost model with the cache as the only thing placed. Pure arithmetic.

Tiers are ordered from the fastest (the device) to the slowest. Source: Sheng et al., FlexGen, arXiv 2303.06865, section 4.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LAYERS_IN_FLIGHT = 2
"""One layer is attended to while the next one is on its way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    name: str
    capacity_bytes: float
    """Free for KV."""
    bytes_per_s: float
    """Of the device: reading its own memory. Of any other: the link from it to the tier above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierPlan:
    shares: tuple[float, ...]
    """Of every layer's cache, per tier; they sum to 1."""
    seconds: tuple[float, ...]
    """Of one decode step, per tier: reading on the device, the link of the others."""

    @property
    def step_s(self) -> float:
        return max(self.seconds)


def plan_tiers(kv_bytes: float, num_layers: int, tiers: Sequence[Tier], *, compute_s: float = 0.0) -> TierPlan:
    """The shares s of the shortest decode step; among equal ones those that lie in the fastest tiers.

    step = max(kv / b_0 + compute, max over i >= 1 of kv (s_i + s_i+1 + ...) / b_i), where all of it overlaps and what lies below passes
        through every tier above
    subject to kv s_i + F kv (s_i+1 + ...) / L <= capacity_i and sum s = 1, F = min(2, L) layers in flight.
    A larger s_i shortens every term and loosens every constraint of the tiers below, so filling them in order is optimal, and no linear
    program has to be solved (FlexGen places weights and activations as well and needs one).

    Our reading: weights stay where the host has them; attention over all entries runs on the device; new entries, one per step, cost
    nothing beside the cache.

    Raises: ValueError when the tiers together do not hold the cache.
    """
    if kv_bytes <= 0 or num_layers < 1 or not tiers or compute_s < 0:
        raise ValueError(f"kv_bytes > 0, num_layers >= 1, a tier, compute_s >= 0: got {kv_bytes}, {num_layers}, {len(tiers)}, {compute_s}")
    in_flight = min(LAYERS_IN_FLIGHT, num_layers) / num_layers
    shares, rest = [], 1.0
    for tier in tiers:
        room = tier.capacity_bytes / kv_bytes
        if room >= rest:
            share = rest
        elif in_flight == 1.0 or room < in_flight * rest:
            share = None
        else:  # s + in_flight (rest - s) = room
            share = (room - in_flight * rest) / (1 - in_flight)
        if share is None or (tier is tiers[-1] and share < rest):
            raise ValueError(
                f"the tiers do not hold {kv_bytes:.4g} bytes of KV: {rest:.1%} of it is left for {tier.name!r} and below; it has room for "
                f"{room:.1%} and needs {in_flight:.1%} of what lies below it for layers on their way; give it more, or add a tier"
            )
        shares.append(share)
        rest -= share
    below = [sum(shares[i:]) for i in range(len(tiers))]
    seconds = [kv_bytes * share / tier.bytes_per_s for share, tier in zip(below, tiers, strict=True)]
    return TierPlan(shares=tuple(shares), seconds=(seconds[0] + compute_s, *seconds[1:]))
