"""The layers of a cache object as a transformers model meets them: PiKV's, which store nothing, beside those that keep a state.

A convolution or a recurrence keeps a state of fixed size instead of keys and values. It stays in transformers' own layer, on this rank; it
follows the rows, and a forward that only keeps step leaves it as it was.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NoReturn, Protocol
from weakref import ref

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from pikv_ds.errors import UnsupportedError

from . import traced
from .layer_kinds import EmptyLayer, LayerKind


class Owner(Protocol):
    """The Conversation whose layers these are."""

    model: str
    columns: int
    thread: int | None
    ended: str | None

    def check(self) -> None: ...


class PiKVLayer(CacheLayerMixin):
    """One layer. update() keeps the new keys and values until the attention function of the same layer takes them."""

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, conversation: ref[Owner], window: int | None) -> None:
        super().__init__()
        self._conversation = conversation
        self.is_sliding = window is not None
        self.new: tuple[Tensor, Tensor] | None = None
        self.is_initialized = True
        self.at = -1
        """Its place among the layers of the cache."""

    @property
    def conversation(self) -> Owner:
        conversation = self._conversation()
        if conversation is None:
            raise UnsupportedError("this layer belongs to a PiKV cache that is gone: keep the cache object itself")
        conversation.check()
        return conversation

    @property
    def keys(self) -> NoReturn:
        raise UnsupportedError("the model reads keys or values of its cache (cross-attention?); PiKV gives them to attention only")

    @keys.setter
    def keys(self, nothing: None) -> None:
        """transformers' own constructor."""

    values = keys

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate: pages belong to the PiKVCache."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if is_dynamo_compiling() and not torch.is_grad_enabled():
            traced.bring(key_states, value_states, self.at)
            return key_states, value_states
        conversation = self._conversation()
        if conversation is None or conversation.ended is not None:
            conversation = self.conversation  # says why not
        if conversation.thread != threading.get_ident():
            raise UnsupportedError(
                f"a PiKV cache of {conversation.model} was given to a forward that does not run through PiKV: another model, or one that "
                "is detached; pass it to the model that it belongs to"
            )
        self.new = (key_states, value_states)
        return key_states, value_states

    def take(self) -> tuple[Tensor, Tensor] | None:
        new, self.new = self.new, None
        return new

    def get_seq_length(self) -> int:
        return self.conversation.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.conversation.columns + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # the name of the abstract method in transformers 5.0

    def reset(self) -> None:
        self.new = None


class StateLayer(LinearAttentionLayer):
    """The states of one layer, [B, ...] each, in the dictionaries of transformers' own class."""

    _KEPT = ("conv_states", "recurrent_states", "is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state")

    def __init__(self, number_of_states: int) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        self._held: tuple[dict, ...] | None = None

    def begin(self) -> None:
        """New rows, of another number perhaps: nothing is left of the old ones."""
        LinearAttentionLayer.__init__(self, number_of_states=self.number_of_states)
        self._held = None

    @property
    def tensors(self) -> list[Tensor]:
        return [x for states in (self.conv_states, self.recurrent_states) for x in states.values() if x is not None]

    def select(self, index: list[int]) -> None:
        """Row i continues row index[i]."""
        for states in (self.conv_states, self.recurrent_states):
            for number, state in states.items():
                if state is not None:
                    states[number] = state[torch.tensor(index, device=state.device)]

    def take_back(self, columns: int) -> None:
        """Forget the last columns. Raises: UnsupportedError for a recurrence, which can't."""
        if columns and any(self.is_recurrent_states_initialized.values()):
            raise UnsupportedError(
                "a layer with a recurrent state can't forget tokens (assisted decoding, crop): transformers' own cache can't either. "
                "Generate without an assistant"
            )
        if self.record_past and any(self.is_conv_states_initialized.values()):
            LinearAttentionLayer.crop(self, -columns)
        elif columns:
            raise UnsupportedError(
                "a layer with the state of a convolution can forget tokens only where that was announced: assisted decoding"
            )

    def stop_recording(self) -> None:
        """No crop is announced any more."""
        if self.record_past:
            self.take_back(0)
            self.record_past = False

    def hold(self) -> None:
        """What the next forward does to the states is undone by let_go()."""
        copied = lambda states: {number: x.clone() if isinstance(x, Tensor) else x for number, x in states.items()}  # noqa: E731
        self._held = tuple(copied(getattr(self, name)) for name in self._KEPT)

    def let_go(self) -> None:
        if self._held is not None:
            for name, states in zip(self._KEPT, self._held, strict=True):
                setattr(self, name, states)
            self._held = None


class HybridLayer(PiKVLayer, StateLayer):
    """Keys and values, and a state beside them."""

    def __init__(self, conversation: ref[Owner], window: int | None, number_of_states: int) -> None:
        PiKVLayer.__init__(self, conversation, window)
        StateLayer.__init__(self, number_of_states)

    def lazy_initialization(self, *args, **kwargs) -> None:
        if kwargs:  # of a state; keys and values come as positional arguments
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def reset(self) -> None:
        PiKVLayer.reset(self)


def cache_layers(conversation: ref[Owner], kinds: Sequence[LayerKind], windows: dict[int, int | None]) -> list:
    """One per layer of the model's cache. windows: of the layers that PiKV keeps keys and values of, by their index."""
    made = []
    for index, kind in enumerate(kinds):
        if index in windows:
            made.append(HybridLayer(conversation, windows[index], kind.states) if kind.states else PiKVLayer(conversation, windows[index]))
        else:
            made.append(StateLayer(kind.states) if kind.states else EmptyLayer())
        made[-1].at = index
    return made


class States:
    """All states of a cache object."""

    def __init__(self, layers: Sequence) -> None:
        self.layers = [layer for layer in layers if isinstance(layer, StateLayer)]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for layer in self.layers for x in layer.tensors)

    def begin(self) -> None:
        for layer in self.layers:
            layer.begin()

    def select(self, index: list[int]) -> None:
        for layer in self.layers:
            layer.select(index)

    def take_back(self, columns: int) -> None:
        for layer in self.layers:
            layer.take_back(columns)

    def record(self) -> None:
        for layer in self.layers:
            layer.activate_past_recording()

    def stop_recording(self) -> None:
        for layer in self.layers:
            layer.stop_recording()

    def hold(self) -> None:
        for layer in self.layers:
            layer.hold()

    def let_go(self) -> None:
        for layer in self.layers:
            layer.let_go()
