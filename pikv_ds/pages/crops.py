"""How far a row can be cropped: not to where a window or a budget has taken entries that a shorter row would still hold. Host phase."""

from __future__ import annotations

from pikv_ds.spec import LayerSpec

from .rows import RowChange, Rows


class CropLimits:
    """Owns, per row, how many tokens it had when it last lost entries."""

    def __init__(self, layers: list[LayerSpec], rows: Rows) -> None:
        self.windows = [(spec.window, i) for i, spec in enumerate(layers) if spec.window is not None]
        self.evicted_at = rows.ints("evicted_at")  # tokens of a row when a budget last took entries of it
        self.expired_at = rows.ints("expired_at")  # window layers dropped what a query after this many tokens of a row can't see
        rows.limit(self.check)

    def note_expiry(self, lens: list[int], margin: int) -> None:
        """Window layers have dropped what rows of these lengths can't see; `margin` tokens may still be cropped back."""
        self.expired_at.values = [max(expired_at, n - margin) for expired_at, n in zip(self.expired_at.values, lens, strict=True)]

    def note_eviction(self, lens: list[int], lost: list[bool]) -> None:
        """Rows of these lengths have just lost entries to their budget, or not."""
        self.evicted_at.values = [n if gone else at for gone, n, at in zip(lost, lens, self.evicted_at.values, strict=True)]

    def check(self, change: RowChange) -> None:
        """Raises: RuntimeError for a crop too far, on all ranks alike."""
        for parent, keep in zip(change.parent, change.keep, strict=True):
            if parent >= 0:
                self._refuse_behind_the_window(keep, self.expired_at.values[parent], change.lens[parent])
                self._refuse_behind_an_eviction(keep, self.evicted_at.values[parent], change.lens[parent])

    def _refuse_behind_the_window(self, keep: int, expired_at: int, length: int) -> None:
        if self.windows and keep < expired_at and expired_at >= min(self.windows)[0]:
            window, i = min(self.windows)
            raise RuntimeError(
                f"crop to {keep} of {length} tokens: layer {i} has dropped entries that its window of {window} showed there; "
                f"announce crops before the forward that they undo (cache.activate_past_recording(), as assisted generation does)"
            )

    def _refuse_behind_an_eviction(self, keep: int, evicted_at: int, length: int) -> None:
        if keep < evicted_at:
            raise RuntimeError(
                f"crop to {keep} of {length} tokens: entries were evicted (pikv.scheduling) at {evicted_at} tokens, "
                f"which a request of {keep} tokens would still hold; announce crops before the forward that they undo "
                f"(cache.activate_past_recording(), as assisted generation does)"
            )
