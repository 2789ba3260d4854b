"""Rank 0 of a chat: reads what is said, has all ranks answer, shows the answer and the bytes of the cache."""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from transformers import TextStreamer

from pikv_ds.launch.output import human_bytes
from pikv_ds.launch.serving.control import Control

from .screen import Screen
from .spec import ChatSpec
from .talk import Talk
from .turns import Message, tokens_of_turn

HELP = (
    "/stats: numbers of the cache; /save FILE: the conversation with its cache, FILE.json: its words alone; /load FILE; "
    "/reset: begin anew; /quit"
)
DONE = {"save": "saved to", "load": "loaded"}
TICK_S = 1.0  # between two signs of life for the other ranks while nobody speaks
_LOOK_S = 0.25  # between two looks at the bytes while an answer streams


class Chat:
    def __init__(self, spec: ChatSpec, talk: Talk, control: Control, stdin: TextIO, stdout: TextIO) -> None:
        self.spec, self.talk, self.control, self.stdin = spec, talk, control, stdin
        self.screen = Screen(stdout)
        self.messages: list[Message] = []
        self.tokens: list[int] = []
        self.rows: list[dict[str, Any]] = []
        """Per answer: tokens, bytes by rank, tokens per second."""

    def run(self) -> list[dict[str, Any]]:
        """Until /quit, the end of the input, or Ctrl-C. Returns a row per answer."""
        self.screen.write(f"{HELP}\n")
        if self.spec.session is not None and Path(self.spec.session).exists():
            self._load(self.spec.session)
        try:
            while (line := self._ask()) is not None:
                command, _, rest = line.strip().partition(" ")
                if command == "/quit":
                    break
                if command.startswith("/"):
                    self._do(command, rest.strip())
                elif line.strip():
                    self._say(line.strip())
            if self.spec.session is not None and self.tokens:
                self._save(self.spec.session)
        except KeyboardInterrupt:
            self.screen.write("\n")
        finally:
            self.screen.close()
        return self.rows

    def _ask(self) -> str | None:
        """The next line; None at the end. The other ranks hear every TICK_S that this one is there."""
        self.screen.write("\n> ")
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=lambda: lines.put(self.stdin.readline()), daemon=True).start()
        while True:
            try:
                return lines.get(timeout=TICK_S) or None
            except queue.Empty:
                self.control.tell("tick")

    def _do(self, command: str, rest: str) -> None:
        if command == "/stats":
            self.control.tell("stats")
            self.screen.write("".join(f"rank {rank}: {stats}\n" for rank, stats in enumerate(self.control.collect(self.talk.stats()))))
        elif command == "/save":
            self._save(rest or "chat.json")
        elif command == "/load":
            self._load(rest)
        elif command == "/reset":
            self._forget()
        else:
            self.screen.write(f"{command} is no command. {HELP}\n")

    def _forget(self) -> None:
        self.control.tell("forget")
        self.talk.forget()
        self.messages, self.tokens = [], []
        self.screen.status("the cache is empty", stays=True)

    def _keep(self, what: str, name: str, note: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """Of the cache on all ranks; None: it did not work, and says why."""
        ordered = {"what": what, "path": str(Path(name).expanduser().resolve()), "note": note}
        self.control.tell(ordered)
        kept, why = self.control.collect(self.talk.keep(**ordered))[0]
        self.screen.write(f"not {DONE[what]}: {why}\n" if why else f"{DONE[what]} {name}\n")
        return kept

    def _load(self, name: str) -> None:
        note = self._keep("load", name)
        if note is not None:
            self.messages, self.tokens = note["messages"], note["tokens"]

    def _save(self, name: str) -> None:
        """Only for the user's eyes: mode 0600."""
        if not name.endswith(".json"):
            self._keep("save", name, {"messages": self.messages, "tokens": self.tokens})
            return
        document = {"messages": self.messages, "config": self.spec.block, "ranks": self.spec.ranks, "answers": self.rows}
        try:
            with open(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
                json.dump(document, file, indent=1)
        except OSError as error:
            self.screen.write(f"not saved: {error}\n")
            return
        self.screen.write(f"saved to {name}\n")

    def _say(self, text: str) -> None:
        messages = [*self.messages, {"role": "user", "content": text}]
        new = tokens_of_turn(self.talk.tokenizer, messages, self.tokens)
        if new is None:  # the template writes earlier turns otherwise now
            self._forget()
            new = tokens_of_turn(self.talk.tokenizer, messages, [])
        tokens = self.tokens + new
        if len(tokens) >= self.spec.max_length:
            self.screen.write(f"{len(tokens)} tokens, the model has {self.spec.max_length} positions: /reset begins anew\n")
            return
        self.control.tell(tokens)
        streamer = _Shown(self.talk.tokenizer, self.screen, self._look)
        reads = lambda done, total: self.screen.status(f"reading {done} of {total} tokens")  # noqa: E731
        own = self.talk.answer(tokens, streamer, reads)
        answers = self.control.collect(own)
        said = self.talk.tokenizer.decode(own.tokens[len(tokens) :], skip_special_tokens=True)
        self.messages, self.tokens = [*messages, {"role": "assistant", "content": said}], own.tokens
        by_rank = [answer.kv_bytes for answer in answers]
        row = {"tokens": len(own.tokens), "new_tokens": own.new_tokens, "kv_bytes_per_rank": by_rank, "kv_bytes_dense": own.kv_bytes_dense}
        self.rows.append(row | {"tokens_per_s": own.new_tokens / own.seconds})
        where = f"on the fullest of {len(by_rank)} ranks" if len(by_rank) > 1 else "on 1 rank"
        self.screen.status(
            f"KV {human_bytes(max(by_rank))} {where}, an ordinary cache {human_bytes(own.kv_bytes_dense)}; {len(own.tokens):,} tokens, "
            f"{own.new_tokens / own.seconds:.1f} tokens/s", stays=True,
        )  # fmt: skip

    def _look(self) -> None:
        self.screen.status(f"KV {human_bytes(self.talk.kv_bytes)} on rank 0")


class _Shown(TextStreamer):
    """Text to the screen as it comes; a look at the cache between tokens, now and then."""

    def __init__(self, tokenizer: Any, screen: Screen, look: Callable[[], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.screen, self.look, self.looked = screen, look, 0.0

    def put(self, value: Any) -> None:
        super().put(value)
        if self.screen.is_live and time.monotonic() - self.looked > _LOOK_S:
            self.looked = time.monotonic()
            self.look()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.screen.write(text + "\n" * stream_end)
