"""Which row of a cache is which request, from one packed forward to the next."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .runner import Piece

Rows = tuple[list[int], list[int], list[int], list[int]]
"""Per row: the row of the last forward that it continues (-1: it is new), tokens that stay, tokens that come; tokens of its prompt where
they have not all been stored before, else 0. The last is empty where it has 0 only."""


class RowOrder:
    """Of one rank. Requests that are neither dropped nor run stay as they are."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.wanted = torch.zeros(1, dtype=torch.int64, device=device)
        """[W] int64, the tokens of the next forward whose logits are asked for."""
        self._stored: dict[int, int] = {}
        """Request -> tokens stored, in the order of rows."""
        self._prompt: dict[int, int] = {}
        """Request -> tokens of its prompt."""
        self._where: dict[int, slice] = {}

    def plan(self, pieces: Sequence[Piece], drop: Sequence[int]) -> tuple[Rows, Tensor]:
        """Rows of the next forward, which must run, and its tokens [1, N]; N = 1 where nothing comes."""
        at = {number: row for row, number in enumerate(self._stored)}
        by_number = {piece.number: piece for piece in pieces}
        stay = {number: count for number, count in self._stored.items() if number not in drop}
        parent, keep, new, prompt = [], [], [], []
        self._prompt = {number: self._prompt[number] for number in stay} | {number: piece.prompt for number, piece in by_number.items()}
        tokens: list[int] = []
        wanted: list[int] = []
        self._where, self._stored = {}, {}
        for number in [*stay, *(number for number in by_number if number not in stay)]:
            piece = by_number.get(number)
            if piece is None:
                piece = Piece(number, [], stay[number], -1, all_logits=False)
            parent.append(at.get(number if piece.source < 0 else piece.source, -1))
            keep.append(piece.start)
            new.append(len(piece.tokens))
            prompt.append(self._prompt[number] if piece.start < self._prompt[number] else 0)
            tokens += piece.tokens
            self._stored[number] = piece.start + len(piece.tokens)
            asked = range(len(tokens) - (len(piece.tokens) if piece.all_logits else min(1, len(piece.tokens))), len(tokens))
            if asked:
                self._where[number] = slice(len(wanted), len(wanted) + len(asked))
                wanted += asked
        self.wanted = torch.tensor(wanted or [0], device=self.device)
        return (parent, keep, new, prompt if any(prompt) else []), torch.tensor([tokens or [0]], device=self.device)

    def logits(self, logits: Tensor) -> dict[int, Tensor]:
        """Those that were wanted [W, V], by request, in f32."""
        return {number: logits[each].float() for number, each in self._where.items()}
