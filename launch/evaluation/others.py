"""Caches and methods of others as rows beside ours: QuantizedCache of transformers, presses of kvpress. Packages that need not be there."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pikv_ds.errors import ConfigError

from .backend import Memory, Session
from .hf import DenseSession, HFBackend
from .hf_quantized import HFCacheKind, QuantizedSession, bytes_of

PRESSES = {
    "snapkv": "SnapKVPress", "tova": "TOVAPress", "knorm": "KnormPress", "streaming_llm": "StreamingLLMPress",
    "expected_attention": "ExpectedAttentionPress", "keydiff": "KeyDiffPress",
}  # fmt: skip


class Other(Protocol):
    """evicts: entries are left out. package: what has to be installed, None = nothing more."""

    evicts: bool

    @property
    def name(self) -> str: ...

    @property
    def package(self) -> str | None: ...

    def check(self) -> None:
        """Raises: ConfigError with the package that is missing."""

    def session(self, backend: HFBackend) -> contextlib.AbstractContextManager[Session]: ...


def parse_other(text: str) -> Other:
    """From "hqq:4" and what else HFCacheKind.parse takes, or "kvpress:NAME:SHARE", SHARE of a prompt kept. Raises: ConfigError."""
    if not text.startswith("kvpress:"):
        return Quantized(HFCacheKind.parse(text, option="--baseline"))
    name, _, share = text.removeprefix("kvpress:").partition(":")
    try:
        kept = float(share)
    except ValueError:
        kept = 0.0
    if name not in PRESSES or not 0 < kept <= 1:
        raise ConfigError(f"--baseline {text!r}: legal is kvpress:NAME:SHARE, NAME of {', '.join(PRESSES)}, SHARE kept in (0, 1]")
    return Press(name, kept)


@dataclass(frozen=True, slots=True)
class Quantized:
    kind: HFCacheKind
    evicts = False

    @property
    def name(self) -> str:
        return self.kind.name

    @property
    def package(self) -> str | None:
        return self.kind.package

    def check(self) -> None:
        if self.package is not None and importlib.util.find_spec(self.package.replace("-", ".")) is None:
            raise ConfigError(f"--baseline: {self.name} needs the package {self.package}, which is not installed")

    @contextlib.contextmanager
    def session(self, backend: HFBackend) -> Iterator[Session]:
        yield QuantizedSession(backend.model, self.kind.make(backend.model.config), backend.layers)


@dataclass(frozen=True, slots=True)
class Press:
    """A press of kvpress: once a prompt has been run, in one forward, `kept` of its entries stay; what follows is kept whole."""

    method: str
    kept: float
    evicts = True

    @property
    def name(self) -> str:
        return f"kvpress {self.method} {self.kept:g}"

    @property
    def package(self) -> str:
        return "kvpress"

    def check(self) -> None:
        if importlib.util.find_spec("kvpress") is None:
            raise ConfigError(f"--baseline: {self.name} needs the package kvpress, which is not installed")
        try:
            importlib.import_module("kvpress")
        except ImportError as error:  # installed by itself, beside a transformers that it does not ask for
            raise ConfigError(f"--baseline: {self.name}: kvpress is installed and can't be imported: {error}") from None

    @contextlib.contextmanager
    def session(self, backend: HFBackend) -> Iterator[Session]:
        import kvpress

        yield _Pressed(backend.model, getattr(kvpress, PRESSES[self.method])(compression_ratio=1 - self.kept))


class _Pressed(DenseSession):
    whole = True

    def __init__(self, model: Any, press: Any) -> None:
        super().__init__(model)
        self.press, self.tokens = press, 0

    def feed(self, ids: Tensor, *, last: bool = False) -> Tensor:
        # Places in the text: by itself the model would count the entries that are left. The press asks for them by their older name.
        places = torch.arange(self.tokens, self.tokens + ids.shape[1], device=self.model.device)
        given = {"position_ids": places.expand(len(ids), -1), "cache_position": places} | (
            {"logits_to_keep": 1} if last and self.keeps else {}
        )
        with contextlib.nullcontext() if self.tokens else self.press(self.model):
            logits = self.model(ids.to(self.model.device), past_key_values=self.cache, use_cache=True, **given).logits
        self.tokens += ids.shape[1]
        return (logits[:, -1:] if last else logits).float()

    def memory(self) -> Memory:
        left = super().memory()  # of what the press has left
        dense = left.dense * self.tokens // max(self.cache.get_seq_length(), 1)
        return Memory(bytes_of(self.cache.layers) if self.tokens else 0, dense, left.attention_impl)


class Beside:
    """The backend of a run, with another cache wherever a configuration of ours would be; the dense one is the run's own."""

    def __init__(self, backend: HFBackend, other: Other) -> None:
        self.backend, self.other = backend, other
        self.name, self.tokenizer, self.layers = backend.name, backend.tokenizer, backend.layers
        self.data_rank, self.model = backend.data_rank, backend.model

    def evicts(self, block: dict[str, Any] | None) -> bool:
        return block is not None and self.other.evicts

    @contextlib.contextmanager
    def session(self, block: dict[str, Any] | None, rows: int, length: int) -> Iterator[Session]:
        with self.backend.session(None, rows, length) if block is None else self.other.session(self.backend) as session:
            yield session


def named(row: dict[str, Any], other: Other) -> dict[str, Any]:
    """The row of a Beside, with the name of the cache and the version of its package."""
    from pikv_ds.launch.output import package_version

    package = other.package and f"{other.package} {package_version(other.package)}"
    left_out = {"entries_read": None, "mass_recall": None} if other.evicts else {}
    return row | {"method": other.name, "config": {"cache": other.name, "package": package}} | left_out
