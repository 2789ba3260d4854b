"""The transformers side of a PiKVCache: a Cache whose layers hand new keys and values to the attention function and store nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from pikv_ds.cache.cache import PiKVCache
from pikv_ds.cache.stats import stats
from pikv_ds.errors import ConfigError

from .host_penalty import HostPenalty


class PiKVLayer(CacheLayerMixin):
    """One layer. update() keeps the new keys and values until the attention function of the same layer takes them."""

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, owner: HFCache, window: int | None) -> None:
        super().__init__()
        self.owner = owner
        self.is_sliding = window is not None
        self.new: tuple[Tensor, Tensor] | None = None
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate: pages belong to the PiKVCache."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.new = (key_states, value_states)
        return key_states, value_states

    def take(self) -> tuple[Tensor, Tensor]:
        new, self.new = self.new, None
        return new

    def get_seq_length(self) -> int:
        return self.owner.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.columns + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # the name of the abstract method in transformers 5.0

    def reset(self) -> None:
        self.new = None


class HFCache(Cache):
    """What `attach` returns: a transformers cache over the expert-sharded store, and its controls.

    The model uses it for every generate() and every forward with a cache while attached. Leaving the `with` block, or detach(),
    gives the model back unchanged and frees the store. A new generation starts empty by itself.
    """

    def __init__(self, core: PiKVCache) -> None:
        super().__init__(layers=[PiKVLayer(self, spec.window) for spec in core.layers])
        self.core = core
        self.end_of_step_callbacks: list[Callable[[int], None]] = []
        self.steps = 0
        self.penalty: HostPenalty | None = None
        self._detach: Callable[[], None] | None = None
        self._crops = ExitStack()  # holds announce_crops() of a speculative generation
        self.begin_generation()

    # ---- controls ------------------------------------------------------------------------------------------------------------

    def __enter__(self) -> HFCache:
        return self

    def __exit__(self, *exc) -> None:
        self.detach()

    def stats(self) -> dict:
        """Plain numbers of this rank, see pikv_ds.cache.stats.stats. Sync: reads the device. Needs no other rank."""
        return stats(self.core, len(self.lens), self.columns)

    def reset(self) -> None:
        """Drop all entries and return their memory. All ranks of the group must call it at the same point."""
        self.core.reset()
        for layer in self.layers:
            layer.reset()  # what a forward that broke off left between update() and attention
        self.begin_generation()

    def detach(self) -> None:
        """Remove every hook and free the store; the model is as before attach. Idempotent."""
        if self._detach is not None:
            undo, self._detach = self._detach, None
            undo()
            self.core.reset()

    def add_misses(self, layer: int, misses: Tensor) -> None:
        """Count entries of a layer that had to be fetched, per expert [E]; for routing.host_penalty. The same numbers on all ranks."""
        if self.penalty is None:
            raise ConfigError("add_misses without pikv.routing.host_penalty: nothing would read them")
        self.penalty.misses[layer] += misses.to(self.penalty.misses)

    def lockstep(self, active: bool) -> bool:
        """True while any rank of the group is active. For own loops: every rank calls it once per iteration.

        while cache.lockstep(have_work): model(**(my_inputs if have_work else cache.idle_inputs()))
        """
        flags = self.core.ranks.gather_ints([int(active)], self.core.device, "lockstep") if self.core.ranks.size > 1 else [[active]]
        return any(flag for (flag,) in flags)

    def idle_inputs(self) -> dict:
        """Inputs of a forward that stores nothing, changes nothing and whose output means nothing: for a rank that only keeps step."""
        rows = max(len(self.lens), 1)
        mask = torch.ones(rows, self.columns, dtype=torch.bool) if self.column_mask is None else self.column_mask
        return {
            "input_ids": torch.zeros(rows, 1, dtype=torch.int64, device=self.core.device),
            "attention_mask": torch.nn.functional.pad(mask, (0, 1)).to(self.core.device),
            "position_ids": torch.zeros(rows, 1, dtype=torch.int64, device=self.core.device),
            "past_key_values": self,
        }

    # ---- rows, as transformers moves them ------------------------------------------------------------------------------------

    def begin_generation(self) -> None:
        """The next forward starts new requests on this rank."""
        self.columns = 0  # token columns fed so far, padding included: what transformers calls the sequence length
        self.lens: list[int] = []  # stored tokens per row
        self.parent: list[int] = []  # pending fork: the row each row continues, in the rows of the last forward
        self.last_position = None  # [B] position_ids of the last real token of each row
        self.column_mask: Tensor | None = None  # [B, columns] which columns are real tokens, on the host; None = all of them
        self.fresh = True
        self.idle = False
        self.touched = False  # parent or lens changed since the last forward
        self.end_past_recording()

    def select_rows(self, index: list[int]) -> None:
        """Row i continues row index[i]; takes effect with the next forward."""
        if self.fresh:
            return
        self.parent = [self.parent[i] for i in index]
        self.lens = [self.lens[i] for i in index]
        self.column_mask = None if self.column_mask is None else self.column_mask[index]
        self.last_position = self.last_position[index]
        self.touched = self.touched or index != list(range(len(self.parent)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select_rows(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = torch.arange(len(self.lens))[indices.cpu()]  # accepts a boolean mask as well
        self.select_rows(rows.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select_rows([i for i in range(len(self.lens)) for _ in range(repeats)])

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last columns; a negative number, as DynamicCache takes it. crop(0) ends a speculative forward."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the number of columns to remove as a negative integer")
        remove = min(-tokens_to_remove, self.columns)
        if remove:
            real = [remove] * len(self.lens)
            if self.column_mask is not None:
                real = self.column_mask[:, self.columns - remove :].sum(1).tolist()
                self.column_mask = self.column_mask[:, : self.columns - remove]
            self.lens = [n - r for n, r in zip(self.lens, real, strict=True)]
            self.last_position = self.last_position - torch.tensor(real)
            self.columns -= remove
            self.touched = self.touched or any(real)
        self.core.note_crop()

    def activate_past_recording(self) -> None:
        """Assisted decoding will crop: keep what leaves a sliding window until then."""
        self._crops.enter_context(self.core.announce_crops())

    def end_past_recording(self) -> None:
        self._crops.close()

    def finish_forward(self, num_columns: int, new_mask: Tensor | None, num_new: list[int], last_position: Tensor) -> None:
        """Account for a forward that has run: B rows grew by num_columns columns, num_new of them real per row (mask None: all).

        A forward without any real token leaves the rows as they were: it only kept step.
        """
        if self.fresh:
            self.lens, self.column_mask = [0] * len(num_new), None
        self.parent = list(range(len(num_new)))
        self.last_position = last_position
        self.fresh = self.touched = False
        if any(num_new):
            if new_mask is not None or self.column_mask is not None:
                old = torch.ones(len(num_new), self.columns, dtype=torch.bool) if self.column_mask is None else self.column_mask
                new = torch.ones(len(num_new), num_columns, dtype=torch.bool) if new_mask is None else new_mask
                self.column_mask = torch.cat([old, new], 1)
            self.lens = [n + new for n, new in zip(self.lens, num_new, strict=True)]
            self.columns += num_columns
        self.steps += 1
