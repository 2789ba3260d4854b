"""How long a step takes: a part for the requests that decode, and a part for each token of a prompt in it. Learned from steps that ran."""

from __future__ import annotations

_MARGIN = 0.9  # of the decode target; steps are not all alike
_WEIGHT = 0.2  # of the newest step
_LEAST = 16  # tokens of a prompt that a step takes in any case, so that prompts get on


class Pace:
    """Milliseconds, moving averages. Before the first steps nothing is known: a chunk is short then."""

    def __init__(self) -> None:
        self.decode_ms: float | None = None
        self.token_ms: float | None = None

    def note(self, step_ms: float, prompt_tokens: int) -> None:
        """A step has run; prompt_tokens: on the rank that had most."""
        if not prompt_tokens:
            self.decode_ms = _mixed(self.decode_ms, step_ms)
        else:
            self.token_ms = _mixed(self.token_ms, max(step_ms - (self.decode_ms or 0.0), 0.05 * step_ms) / prompt_tokens)

    def chunk(self, tbt_ms: float, most: int) -> int:
        """Tokens of prompts that a step may take beside requests that decode, so that it ends within their target."""
        if self.token_ms is None:
            return min(most, 4 * _LEAST)
        left = _MARGIN * tbt_ms - (self.decode_ms or 0.0)
        return max(min(_LEAST, most), min(most, int(left / self.token_ms)))

    def prompt_ms(self, tokens: int) -> float:
        """Of a prompt that is still to be run."""
        return tokens * (self.token_ms or 0.0) + (self.decode_ms or 0.0)


def _mixed(old: float | None, new: float) -> float:
    return new if old is None else (1 - _WEIGHT) * old + _WEIGHT * new
