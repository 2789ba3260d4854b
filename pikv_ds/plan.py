"""The old place of `LocalStep`, `Source` and `StepPlan`: import them from pikv_ds.step."""

from pikv_ds.placement.placement import hash_expert
from pikv_ds.step.step import LocalStep, Source, StepPlan

__all__ = ["LocalStep", "Source", "StepPlan", "hash_expert"]
