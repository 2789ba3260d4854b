"""How far a row can be cropped: not to where a window or a budget has taken entries that a shorter row would still hold. Host phase."""

from __future__ import annotations

from pikv_ds.spec import LayerSpec
from pikv_ds.step.agreement import Agreed


class CropLimits:
    """Owns, per row, how many tokens it had when it last lost entries."""

    def __init__(self, layers: list[LayerSpec]) -> None:
        self.windows = [(spec.window, i) for i, spec in enumerate(layers) if spec.window is not None]
        self.reset(0)

    def reset(self, num_rows: int) -> None:
        """A new generation begins."""
        self.evicted_at = [0] * num_rows  # tokens of a row when a budget last took entries of it
        self.settled = [0] * num_rows  # window layers dropped what a query after this many tokens of a row can't see

    def note_expiry(self, lens: list[int], margin: int) -> None:
        """Window layers have dropped what rows of these lengths can't see; `margin` tokens may still be cropped back."""
        self.settled = [max(settled, n - margin) for settled, n in zip(self.settled, lens, strict=True)]

    def note_eviction(self, lens: list[int], lost: list[bool]) -> None:
        """Rows of these lengths have just lost entries to their budget, or not."""
        self.evicted_at = [n if gone else at for gone, n, at in zip(lost, lens, self.evicted_at, strict=True)]

    def remap(self, agreed: Agreed, lens: list[int]) -> None:
        """Rows are forked, cropped or dropped as agreed. lens: tokens of every row before. Raises: RuntimeError for a crop too far."""
        self._refuse_behind_the_window(agreed, lens)
        self._refuse_behind_an_eviction(agreed, lens)

    def _refuse_behind_the_window(self, agreed: Agreed, lens: list[int]) -> None:
        for parent, keep in zip(agreed.parent, agreed.keep, strict=True):
            if self.windows and parent >= 0 and keep < self.settled[parent] and self.settled[parent] >= min(self.windows)[0]:
                window, i = min(self.windows)
                raise RuntimeError(
                    f"crop to {keep} of {lens[parent]} tokens: layer {i} has dropped entries that its window of {window} showed there; "
                    f"announce crops before the forward that they undo (cache.activate_past_recording(), as assisted generation does)"
                )
        self.settled = [self.settled[parent] if parent >= 0 else 0 for parent in agreed.parent]

    def _refuse_behind_an_eviction(self, agreed: Agreed, lens: list[int]) -> None:
        for parent, keep in zip(agreed.parent, agreed.keep, strict=True):
            if parent >= 0 and keep < self.evicted_at[parent]:
                raise RuntimeError(
                    f"crop to {keep} of {lens[parent]} tokens: entries were evicted (pikv.scheduling) at {self.evicted_at[parent]} tokens, "
                    f"which a request of {keep} tokens would still hold; announce crops before the forward that they undo "
                    f"(cache.activate_past_recording(), as assisted generation does)"
                )
        self.evicted_at = [self.evicted_at[parent] if parent >= 0 else 0 for parent in agreed.parent]
