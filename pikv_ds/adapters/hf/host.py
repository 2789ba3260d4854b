"""A model while PiKV caches are attached to it: hooks that all of its attachments share. They go with the last one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from pikv_ds.errors import UnsupportedError
from pikv_ds.spec import LayerSpec

from .anatomy import anatomy
from .attached import AttachedCache
from .attention import pikv_attention
from .binding import Binding, bind, unbind
from .cache import HFCache
from .conversation import Conversation
from .latent import Expansion
from .masks import pikv_mask
from .model_spec import read_model_spec
from .running import Running
from .weights_at import device_of


class Attached(Protocol):
    """What a host asks of its attachments (attachment.py)."""

    attached: AttachedCache | None
    live: WeakSet[Conversation]

    def count_step(self) -> None: ...


class Host:
    """One per model. `lock` is held while a forward runs through a cache, as the attention function is set on the whole model."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises: UnsupportedError."""
        self.model, self.name = model, type(model).__name__
        self.parts = parts = anatomy(model)
        self.decoder, self.layers, self.attentions = parts.decoder, parts.layers, parts.attentions
        self.specs: list[LayerSpec] = read_model_spec(model.config, parts.attentions, parts.at)
        self.attachments: list[Attached] = []
        self._of_config: PreTrainedConfig | None = None
        self._found: PreTrainedConfig | None = None
        self._values: dict[str, Any] = {}
        self.running = Running()
        self.lock = threading.RLock()
        self.hooks: list[Hooks] = []
        self.trained = 0
        """Forwards in train mode, and steps of an optimizer that says so: weights may be others since."""
        self.probe_s = 0.0
        """Seconds that its probe took (probe.py)."""

    @staticmethod
    def of(model: nn.Module) -> Host | None:
        """That of a model which has caches attached."""
        found = _HOSTS.get(model)
        return None if found is None else found()

    def stepped(self) -> None:
        """An optimizer has written to weights."""
        self.trained += 1

    def attention_at(self, at: int) -> nn.Module:
        """The attention module of a layer of the cache."""
        return self.attentions[self.parts.at.index(at)]

    @property
    def num_layers(self) -> int:
        """Of the decoder that a forward runs; generate() lowers the number for a while when it drafts with the first ones."""
        text = self._text
        number = self._values.get("num_hidden_layers")  # where it is no other name's: the attribute's own way there takes a microsecond
        return min(text.num_hidden_layers if number is None else number, len(self.parts.kinds))

    @property
    def _text(self) -> PreTrainedConfig:
        """What the decoder's configuration says of its text; looked up anew when it is another object, as that takes long."""
        config = self.decoder.config
        if self._of_config is not config:
            self._of_config, self._found = config, config.get_text_config(decoder=True)
            self._values = object.__getattribute__(self._found, "__dict__")
        return self._found

    @contextmanager
    def layers_limited(self, num_layers: int) -> Iterator[None]:
        """Forwards inside run the first layers alone, as generate() drafts with them."""
        text = self._text
        before, text.num_hidden_layers = text.num_hidden_layers, num_layers
        try:
            yield
        finally:
            text.num_hidden_layers = before

    @property
    def attached(self) -> AttachedCache | None:
        """What stands for forwards that are given no cache; None: the host's own cache does."""
        return next((one.attached for one in self.attachments if one.attached is not None), None)

    @property
    def device(self) -> torch.device:
        """Where its attention runs."""
        return device_of(self.attentions)

    def attachment_of(self, cache: HFCache) -> Attached:
        """Raises: UnsupportedError for a cache that has ended, or of another model."""
        cache.conversation.check()
        for attachment in self.attachments:
            if cache.conversation in attachment.live:
                return attachment
        raise UnsupportedError(
            f"this PiKV cache belongs to another model ({cache.conversation.model}) than the {self.name} that it was passed to; make one "
            "with pikv_ds.Cache(model, config), or new_cache() of what attach returned"
        )

    def add(self, attachment: Attached) -> None:
        self.attachments.append(attachment)
        if len(self.attachments) > 1:
            return
        AttentionInterface.register("pikv", pikv_attention)
        AttentionMaskInterface.register("pikv", pikv_mask)
        for i, (attention, index) in enumerate(zip(self.attentions, self.parts.at, strict=True)):
            expansion = Expansion(i) if self.specs[i].latent else None
            bind(attention, Binding(self.running, i, index, self.specs[i], not self.parts.kinds[index].stores, expansion))
        _HOSTS[self.model] = ref(self)

    def leave(self, attachment: Attached) -> None:
        """Idempotent."""
        if attachment not in self.attachments:
            return
        self.attachments.remove(attachment)
        if self.attachments:
            return
        for hooks in self.hooks:
            hooks.remove()
        for attention in self.attentions:
            unbind(attention)
        _HOSTS.pop(self.model, None)

    def __reduce_ex__(self, protocol):
        raise UnsupportedError(f"a {self.name} can't be copied or pickled while PiKV caches are attached to it; detach() them first")


class Hooks(Protocol):
    def remove(self) -> None: ...


_HOSTS: WeakKeyDictionary[nn.Module, ref[Host]] = WeakKeyDictionary()
