"""The state machine: a drawn world, drawn operations, the invariants after each. Shrinks to the shortest life that breaks one."""

from __future__ import annotations

from collections import Counter

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from .checks import check
from .operations import OPERATIONS
from .operations.base import Operation
from .world import FLAVOURS, World

DONE: Counter[str] = Counter()
"""Operations of this process, by name."""


class CacheModel(RuleBasedStateMachine):
    world: World | None = None

    @initialize(
        size=st.sampled_from([2, 1, 4]),
        requests=st.sampled_from(["replicated", "distinct"]),
        flavour=st.sampled_from(FLAVOURS),
        page_size=st.sampled_from([1, 2, 4]),
        placement=st.sampled_from(["experts", "position", "xor"]),
        seed=st.integers(0, 2**31),
    )
    def begin(self, **drawn) -> None:
        self.world = World(**drawn)

    @invariant()
    def holds(self) -> None:
        if self.world is not None and not self.world.broken:
            check(self.world)


def _as_rule(one: Operation):
    def possible(machine: CacheModel) -> bool:
        world = machine.world
        return world is not None and world.broken == one.mends and one.possible(world)

    def apply(machine: CacheModel, data: st.DataObject) -> None:
        one.apply(machine.world, data)
        DONE[one.name] += 1

    apply.__name__ = one.name
    return precondition(possible)(rule(data=st.data())(apply))


for _name, _operation in OPERATIONS.items():
    setattr(CacheModel, _name, _as_rule(_operation))
