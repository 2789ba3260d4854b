"""What happens before and after a decoder forward that uses the cache: read the host's masks and positions, plan, finish."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from pikv_ds.errors import UnsupportedError
from pikv_ds.exchange.digest import digest
from pikv_ds.step.step import LocalStep

from .binding import Chunk
from .cache import HFCache
from .expert_ids import ExpertIds
from .inputs import last_positions, new_mask


class ForwardHooks:
    """A pre-hook and a hook on the decoder. Forwards without a cache, and all forwards in train mode, are left to the host."""

    def __init__(self, model: nn.Module, decoder: nn.Module, cache: HFCache, expert_ids: ExpertIds) -> None:
        self.cache, self.expert_ids, self.config = cache, expert_ids, decoder.config
        self.chunk = Chunk()
        self._names = [  # of positional arguments
            p.name for p in inspect.signature(decoder.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        self._running: tuple | None = None  # what finish_forward needs, while a forward runs
        self._broken = False
        self._host_attention: str | None = None
        self._handles = [
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._restore_attention()

    def _before(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        past = given.get("past_key_values")
        if past is None:
            use_cache = given.get("use_cache")
            use_cache = getattr(self.config, "use_cache", True) if use_cache is None else use_cache
            if decoder.training or not use_cache:
                return None
            self.cache.begin_generation()
        elif past is not self.cache:
            raise UnsupportedError(
                f"the model is attached to a PiKV cache but was called with a {type(past).__name__}; "
                "pass no cache, or the one attach returned"
            )
        elif decoder.training:
            raise UnsupportedError("the PiKV cache was passed to a forward in train mode; call model.eval() first")
        if given.get("output_attentions"):
            raise UnsupportedError("output_attentions is set: attention weights are never materialised; unset it or detach")
        self._start(given)
        at = self._names.index("past_key_values")
        return args[:at], {**dict(zip(self._names[at:], args[at:], strict=False)), **kwargs, "past_key_values": self.cache}

    def _start(self, given: dict) -> None:
        cache = self.cache
        if self._broken and not cache.fresh:
            raise RuntimeError(
                "an earlier forward failed midway, so the layers hold different tokens; call reset() on all ranks or start a new generation"
            )
        self._broken = True  # until the forward has finished
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given["inputs_embeds"]
        rows, columns = tokens.shape[:2]
        if not cache.fresh and rows != len(cache.lens):
            raise UnsupportedError(
                f"the forward has {rows} rows, the cache {len(cache.lens)}; select or repeat rows first, or start a new generation"
            )
        mask = new_mask(cache, given.get("attention_mask"), rows, columns)
        before = cache.lens if not cache.fresh else [0] * rows
        positions = torch.tensor(before, dtype=torch.int32).unsqueeze(1)
        if mask is None:
            num_new = [columns] * rows
            positions = positions if columns == 1 else positions + torch.arange(columns, dtype=torch.int32)
        else:
            num_new = mask.sum(1).tolist()
            positions = torch.where(mask, positions + mask.cumsum(1, dtype=torch.int32) - 1, -1)
        last_position = last_positions(cache, given.get("position_ids"), mask, rows, columns)
        identity = not cache.fresh and not cache.touched
        value = 0
        if cache.core.ranks.size > 1 and (cache.fresh or cache.core.replicated):
            value = digest([tokens, positions, torch.tensor(before), torch.tensor(cache.parent or [-1])])
        device = cache.core.device
        local = LocalStep(
            num_rows=rows,
            num_columns=columns,
            num_new=num_new,
            parent=[-1] * rows if cache.fresh else list(cache.parent),
            keep=[0] * rows if cache.fresh else list(before),
            positions=positions.to(device),
            digest=value,
            identity=identity,
            fresh=cache.fresh,
        )
        cache.core.begin_step(local)
        self.chunk.positions = local.positions
        self.chunk.hidden = None if all(n == columns for n in num_new) else local.positions < 0
        self._running = (columns, mask, num_new, last_position)
        self.expert_ids.begin()
        self._host_attention, self.config._attn_implementation = self.config._attn_implementation, "pikv"

    def _after(self, decoder: nn.Module, args: tuple, kwargs: dict, output) -> None:
        if self._running is None:
            return
        running, self._running = self._running, None
        self.chunk.positions = None
        self._restore_attention()
        self.expert_ids.end()
        if output is None:  # the forward raised; its error is on its way up
            return
        self.cache.core.end_step()
        self.cache.finish_forward(*running)
        self._broken = False
        for callback in self.cache.end_of_step_callbacks:
            callback(self.cache.steps)

    def _restore_attention(self) -> None:
        if self._host_attention is not None:
            self.config._attn_implementation, self._host_attention = self._host_attention, None
