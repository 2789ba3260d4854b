"""Tokens -> text as they come, and stop strings in it; the bytes of a token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

_CONTEXT = 6  # tokens of the prompt that the first new one is decoded with: some tokenizers drop a leading space


class TextOut:
    """The text of one request. What could be the beginning of a stop string, or half a character, waits."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._ids = list(prompt[-_CONTEXT:])
        self._from, self._read = 0, len(self._ids)
        self.text = ""
        self.given = 0
        """Characters that clients have been given."""
        self.stopped = False

    def push(self, token: int) -> None:
        """Sets `stopped` once a stop string is complete; it is no part of the text, nor is what comes after it."""
        self._ids.append(token)
        self._take(last=False)

    def finish(self) -> None:
        """No further token comes: what waits goes out."""
        if not self.stopped:
            self._take(last=True)

    def _take(self, *, last: bool) -> None:
        decode = self._tokenizer.decode
        old = decode(self._ids[self._from : self._read], skip_special_tokens=True)
        new = decode(self._ids[self._from :], skip_special_tokens=True)
        if new.endswith("\ufffd") and not last:  # half a character
            return
        before = len(self.text)
        self.text += new[len(old) :]
        self._from, self._read = self._read, len(self._ids)
        longest = max(map(len, self._stops), default=1)
        found = [at for stop in self._stops if (at := self.text.find(stop, max(0, before - longest))) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def take(self, *, last: bool) -> str:
        """What is new and can be given to a client."""
        end = len(self.text) if last or self.stopped else len(self.text) - self._waits()
        given, self.given = self.given, max(end, self.given)
        return self.text[given : self.given]

    def _waits(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        lengths = (n for stop in self._stops for n in range(min(len(stop) - 1, len(self.text)), 0, -1) if self.text.endswith(stop[:n]))
        return max(lengths, default=0)


def bytes_of(tokenizer: Any, token: int) -> list[int] | None:
    """UTF-8 of a token. Half a character has bytes of its own, for clients to join with the next token's; None: they can't be known."""
    text = tokenizer.decode([token])
    if "\ufffd" not in text:
        return list(text.encode())
    piece = str(tokenizer.convert_ids_to_tokens(token))
    if fallback := re.fullmatch("<0x([0-9A-F]{2})>", piece):
        return [int(fallback[1], 16)]
    found = [_byte_alphabet().get(letter) for letter in piece]
    if None in found or bytes(found).decode(errors="replace") != text:
        return None
    return found


@cache
def _byte_alphabet() -> dict[str, int]:
    """The letters that byte-level tokenizers write bytes with."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}
