"""Where a chat is shown: text as it comes, and a status line that stays at the bottom of a terminal."""

from __future__ import annotations

import os
import shutil
from typing import TextIO

_UP, _DOWN, _SAVE, _BACK, _CLEAR = "\x1b[A", "\n", "\x1b7", "\x1b8", "\x1b[2K"


class Screen:
    """On a terminal the last line is kept out of what scrolls. Elsewhere a status is one line of text, where it is asked to stay."""

    def __init__(self, stdout: TextIO) -> None:
        self.stdout = stdout
        self.is_live = stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        if self.is_live:
            self._rows = shutil.get_terminal_size().lines
            self._put(_DOWN + _SAVE + f"\x1b[1;{self._rows - 1}r" + _BACK + _UP)

    def write(self, text: str) -> None:
        self._put(text)

    def status(self, text: str, *, stays: bool = False) -> None:
        """stays: also where there is no line for it."""
        if self.is_live:
            size = shutil.get_terminal_size()
            if size.lines != self._rows:
                self._rows = size.lines
                self._put(_SAVE + f"\x1b[1;{self._rows - 1}r" + _BACK)
            self._put(_SAVE + f"\x1b[{self._rows};1H{_CLEAR}\x1b[2m{text[: size.columns - 1]}\x1b[0m" + _BACK)
        elif stays:
            self._put(f"[{text}]\n")

    def close(self) -> None:
        """The terminal is as before."""
        if self.is_live:
            self._put(_SAVE + f"\x1b[r\x1b[{self._rows};1H{_CLEAR}" + _BACK)

    def _put(self, text: str) -> None:
        self.stdout.write(text)
        self.stdout.flush()
