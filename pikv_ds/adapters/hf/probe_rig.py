"""How a decoder runs in a probe: of each layer only what leads to its attention, and that on random hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from pikv_ds.errors import ConfigError, PeerError, UnsupportedError

from .host import Host

_REFUSALS = (UnsupportedError, ConfigError, PeerError)


class CannotProbe(Exception):
    """A module does not run as a probe runs it."""


class _Reached(Exception):
    """The attention of a layer has run: what comes behind it is left out."""


class Rig:
    """Replaces the forward of layers and attention modules inside of its `with` block."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.outputs: list[tuple[int, Tensor]] = []
        self.tuple_of = 0
        """How many things this decoder takes out of the tuple that a layer returns; 0 = a layer returns its hidden states."""
        self._shape: torch.Size | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Rig:
        last = {layer: i for i, layer in enumerate(self.host.layers)}  # a layer may have two attention modules
        replaced: dict[nn.Module, Callable] = {}
        for i, (layer, attention) in enumerate(zip(self.host.layers, self.host.attentions, strict=True)):
            replaced[attention] = partial(self._attend, i, attention.forward, last[layer] == i)
        for layer in self._all_layers():
            replaced.setdefault(layer, partial(self._run_layer, layer, layer.forward if layer in last else None))
        for module in self.host.decoder.modules():
            partitioned = [weight for weight in module.parameters(recurse=False) if hasattr(weight, "ds_id")]
            if partitioned:
                replaced[module] = partial(_gathered, partitioned, replaced.get(module, module.forward))
        for module, forward in replaced.items():
            self._stack.enter_context(_replaced(module, forward))
        return self

    def __exit__(self, *exc) -> None:
        self._stack.close()

    def settle(self, ids: Tensor, new_cache: Callable) -> None:
        """Find out how this decoder takes what its layers return. Raises: CannotProbe."""
        for self.tuple_of in (0, 1, 2):
            try:
                self.forward(ids, new_cache())
                return
            except CannotProbe as error:
                failed = error
        raise failed

    def forward(self, ids: Tensor, cache) -> list[tuple[int, Tensor]]:
        """The outputs of all attention modules for ids [B, T], in order: (layer, [B, T, width]). Raises: CannotProbe, what PiKV refuses."""
        self.outputs, self._shape = [], None
        try:
            self.host.decoder(ids, **{self.host.parts.cache_name: cache}, use_cache=True)
        except _REFUSALS:
            raise
        except Exception as error:  # of any kind: what a model does is not known here, and all of it is told
            raise CannotProbe(f"{type(error).__name__}: {error}") from error
        reached = [layer for layer, _ in self.outputs]
        if reached != list(range(len(self.host.attentions))):
            raise CannotProbe(f"of {len(self.host.attentions)} attention modules these ran: {reached}")
        return self.outputs

    def _all_layers(self) -> list[nn.Module]:
        """Of the decoder, also those without keys and values."""
        for module in self.host.decoder.modules():
            if isinstance(module, nn.ModuleList) and any(layer is self.host.layers[0] for layer in module):
                return list(module)
        return self.host.layers

    def _run_layer(self, layer: nn.Module, forward: Callable | None, *args, **kwargs) -> Tensor | tuple:
        hidden = _hidden(args, kwargs)
        if self._shape not in (None, hidden.shape):
            raise CannotProbe(f"hidden states of shape {tuple(self._shape)} become {tuple(hidden.shape)}")
        self._shape = hidden.shape
        if forward is not None:
            try:
                forward(*args, **kwargs)
            except _Reached:
                hook = getattr(layer, "_hf_hook", None)  # of accelerate, whose own end was left out
                if hook is not None:
                    hook.post_forward(layer, hidden)
            else:
                raise CannotProbe(f"{type(layer).__name__} does not call its attention module")
        return (hidden, None)[: self.tuple_of] if self.tuple_of else hidden

    def _attend(self, layer: int, forward: Callable, is_last: bool, *args, **kwargs) -> Tensor | tuple:
        hidden = _hidden(args, kwargs)
        generator = torch.Generator().manual_seed(1000 * layer + hidden.shape[1])
        random = torch.randn(hidden.shape, generator=generator).to(hidden)
        if "hidden_states" in kwargs:
            kwargs["hidden_states"] = random
        else:
            args = (random, *args[1:])
        output = forward(*args, **kwargs)
        self.outputs.append((layer, output[0] if isinstance(output, tuple) else output))
        if is_last:
            raise _Reached
        return output


def _hidden(args: tuple, kwargs: dict) -> Tensor:
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0] if args else None
    if not isinstance(hidden, Tensor):
        raise CannotProbe(f"a layer or attention module is called with {type(hidden).__name__} in place of hidden states")
    return hidden


def _gathered(weights: list[nn.Parameter], forward: Callable, *args, **kwargs):
    """A forward whose own weights ZeRO-3 has partitioned. Collectives: one gather."""
    from deepspeed.zero import GatheredParameters

    with GatheredParameters(weights):
        return forward(*args, **kwargs)


@contextmanager
def _replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before
