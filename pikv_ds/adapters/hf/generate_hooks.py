"""generate() on an attached model: use the PiKV cache, keep all ranks in step, know when this rank has finished."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from pikv_ds.errors import UnsupportedError

from .cache import HFCache


class GenerateHooks:
    """Three instance attributes over the model's methods; remove() deletes them again."""

    def __init__(self, model: PreTrainedModel, cache: HFCache) -> None:
        self.model, self.cache = model, cache
        self._generate = model.generate
        self._prepare_cache = model._prepare_cache_for_generation
        self._unfinished = model._has_unfinished_sequences
        model.generate = self.generate
        model._prepare_cache_for_generation = self.prepare_cache
        model._has_unfinished_sequences = self.has_unfinished_sequences

    def remove(self) -> None:
        for name in ("generate", "_prepare_cache_for_generation", "_has_unfinished_sequences"):
            self.model.__dict__.pop(name, None)

    def generate(self, *args, **kwargs):
        """generate with synced_gpus on more than one rank: every forward is a collective, so no rank may stop early."""
        if self.cache.core.ranks.size > 1:
            if kwargs.get("synced_gpus") is False:
                raise UnsupportedError(
                    "synced_gpus=False with a PiKV cache over several ranks: a rank that stops early leaves the others waiting"
                )
            kwargs["synced_gpus"] = True
        self.cache.idle = False
        try:
            return self._generate(*args, **kwargs)
        finally:
            self.cache.idle = False
            self.cache.end_past_recording()

    def prepare_cache(self, generation_config, model_kwargs: dict, generation_mode, batch_size: int, max_cache_length: int):
        given = model_kwargs.get("past_key_values")
        if given is None and generation_config.use_cache is not False:
            if generation_config.cache_implementation is not None:
                raise UnsupportedError(
                    f"cache_implementation = {generation_config.cache_implementation!r} asks for "
                    "another cache while the model is attached to PiKV; "
                    f"unset it, or detach"
                )
            self.cache.begin_generation()
            model_kwargs["past_key_values"] = self.cache
            if generation_config.is_assistant:
                self.cache.activate_past_recording()
            return None
        return self._prepare_cache(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)

    def has_unfinished_sequences(self, this_peer_finished: bool, synced_gpus: bool, device) -> bool:
        """Whether this rank's loop goes on. A finished rank stays here and runs idle forwards until the whole group has finished.

        transformers would let it run its loop on with dummy tokens; assisted decoding then asks its assistant for -1 tokens.
        """
        if not synced_gpus or self.cache.core.ranks.size == 1 or is_deepspeed_zero3_enabled():
            # ZeRO-3 gathers parameters over the whole world and keeps it in step itself; a finished rank's dummy tokens are not stored.
            self.cache.idle = bool(synced_gpus and this_peer_finished)
            return self._unfinished(this_peer_finished, synced_gpus, device)
        while self.cache.lockstep(not this_peer_finished):
            if not this_peer_finished:
                return True
            self.model(**self.cache.idle_inputs())
        return False
