"""One rank of a chat: the model, one conversation in its cache, answers to what is said."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from pikv_ds.adapters.hf.attach import attach
from pikv_ds.errors import SessionError, UnsupportedError
from pikv_ds.launch.evaluation.hf import HFBackend, PiKVSession

from .spec import ChatSpec


class Answer(NamedTuple):
    """tokens: all of the conversation, the answer's at the end. kv_bytes: this rank's. seconds: from the first new token on."""

    tokens: list[int]
    new_tokens: int
    kv_bytes: int
    kv_bytes_dense: int
    seconds: float


class Talk:
    """All ranks make the same calls. Collective: building it, answer, forget."""

    def __init__(self, spec: ChatSpec) -> None:
        self.spec = spec
        backend = HFBackend(spec.for_backend(), spec.timeout_s)
        self.tokenizer, self.model = backend.tokenizer, backend.model
        self.attached = attach(self.model, spec.block, backend.group)
        self.cache = self.attached.new_cache()
        torch.manual_seed(spec.seed)  # ranks that draw must draw alike

    @torch.no_grad()
    def answer(self, tokens: list[int], streamer: Any = None, reads: Callable[[int, int], None] | None = None) -> Answer:
        """tokens: of the whole conversation; those that are in the cache already come first. reads: told how many of the new ones have
        been read, of how many. streamer: gets the new tokens. Raises: CapacityError and what generate() raises."""
        ids = torch.tensor([tokens], device=self.model.device)
        held, session = self.cache.columns, PiKVSession(self.model, self.cache)
        session.expect(ids.shape[1] - held)
        for start in range(held, ids.shape[1] - 1, self.spec.chunk):  # the last one is generate()'s
            part = ids[:, start : min(start + self.spec.chunk, ids.shape[1] - 1)]
            session.feed(part, last=True)
            if reads is not None:
                reads(start + part.shape[1] - held, ids.shape[1] - held)
        drawn = {"do_sample": True, "temperature": self.spec.temperature} if self.spec.temperature else {"do_sample": False}
        started = time.perf_counter()
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=self.cache, streamer=streamer,
            max_new_tokens=min(self.spec.new_tokens, self.spec.max_length - ids.shape[1]), **drawn,
        )  # fmt: skip
        seconds, stats = time.perf_counter() - started, self.cache.stats()
        return Answer(out[0].tolist(), out.shape[1] - ids.shape[1], stats["kv_bytes_allocated"], stats["kv_bytes_dense"], seconds)

    @property
    def kv_bytes(self) -> int:
        """Allocated on this rank."""
        return self.cache.stats()["kv_bytes_allocated"]

    def stats(self) -> dict[str, Any]:
        return self.cache.stats()

    def forget(self) -> None:
        """The next answer begins a new conversation."""
        self.cache = self.attached.new_cache()

    def keep(self, what: str, path: str, note: dict[str, Any] | None) -> tuple[dict[str, Any] | None, str | None]:
        """what: "save" or "load" the cache of the conversation. Returns: the note of a file, and why it did not work."""
        try:
            return (self.cache.load(path), None) if what == "load" else (self.cache.save(path, note) and note, None)
        except (SessionError, UnsupportedError) as error:
            return None, str(error)

    def close(self) -> None:
        self.attached.detach()
