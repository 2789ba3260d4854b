"""The old place of `LocalStep`, `Source` and `Step`, which was `StepPlan`: import them from pikv_ds.step."""

from pikv_ds.placement.placement import hash_expert
from pikv_ds.step.step import LocalStep, Source
from pikv_ds.step.step import Step as StepPlan

__all__ = ["LocalStep", "Source", "StepPlan", "hash_expert"]
