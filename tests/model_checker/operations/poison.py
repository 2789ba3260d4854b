from __future__ import annotations

from hypothesis import strategies as st

from tests.model_checker import checks
from tests.model_checker.world import World

from .base import Operation, operation


@operation
class Poison(Operation):
    """NaN into every slot that holds no live entry: no later answer may notice."""

    def possible(self, world: World) -> bool:
        return not world.fresh and not world.moving

    def apply(self, world: World, data: st.DataObject) -> None:
        checks.poison(world)
