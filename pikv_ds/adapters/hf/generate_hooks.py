"""generate() on an attached model: use a PiKV cache, keep all ranks in step, know when this rank has finished."""

from __future__ import annotations

import threading

from torch import Tensor
from transformers.generation.utils import GenerationMixin
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from pikv_ds.errors import UnsupportedError

from .argument_names import IN_GENERATE, given_cache, given_name, renamed
from .cache import HFCache
from .forward_hooks import ForwardHooks
from .host import Host
from .running import Generation

PATCHED = ("generate", "_prepare_cache_for_generation", "_has_unfinished_sequences", "_update_model_kwargs_for_generation", "_prefill")


class GenerateHooks:
    """Instance attributes over the model's methods; remove() deletes them again."""

    def __init__(self, host: Host, forwards: ForwardHooks) -> None:
        self.host, self.forwards = host, forwards
        model = host.model
        self._generate = model.generate
        self._prepare_cache = model._prepare_cache_for_generation
        self._unfinished = model._has_unfinished_sequences
        model.generate = self.generate
        model._prepare_cache_for_generation = self.prepare_cache
        model._has_unfinished_sequences = self.has_unfinished_sequences
        self._update = model._update_model_kwargs_for_generation
        if getattr(self._update, "__func__", None) is GenerationMixin._update_model_kwargs_for_generation:  # known to append ones
            model._update_model_kwargs_for_generation = self.update_arguments

        self._prefill = model._prefill
        model._prefill = self.prefill

    def remove(self) -> None:
        for name in PATCHED:
            self.host.model.__dict__.pop(name, None)

    def generate(self, *args, **kwargs):
        """generate with synced_gpus on more than one rank: every forward is a collective, so no rank may stop early."""
        given = given_cache(kwargs)
        if kwargs.get("cache_implementation") == "paged" and self.host.attached is not None:
            raise UnsupportedError(
                "cache_implementation = 'paged' is continuous batching, which has a cache of its own; unset it, or detach"
            )
        if given is not None and not isinstance(given, HFCache) and self.host.attached is not None:
            self.forwards.refuse_foreign(given, given_name(kwargs))  # before this rank's draft model runs, or any collective
        if isinstance(given, HFCache):
            kwargs = renamed(kwargs, IN_GENERATE, given)
        cache = given if isinstance(given, HFCache) else self.host.attached
        generation = Generation()
        if cache is not None and cache.core.ranks.size > 1:
            if kwargs.get("synced_gpus") is False:
                raise UnsupportedError(
                    "synced_gpus=False with a PiKV cache over several ranks: a rank that stops early leaves the others waiting"
                )
            generation.synced_by_us = not kwargs.get("synced_gpus")
            kwargs["synced_gpus"] = True
        self.host.running.generations.append(generation)
        try:
            if cache is None or cache.core.ranks.size == 1 or is_deepspeed_zero3_enabled():
                made = self._generate(*args, **kwargs)
            else:
                with cache.conversation.lockstep.generating(cache.core.ranks):
                    made = self._generate(*args, **kwargs)
            self.host.running.check_expansions()  # of the last forward
            return made
        finally:
            self.forwards.abandon()  # a forward that Ctrl-C broke off
            self.host.running.generations.remove(generation)
            if generation.cache is not None:
                conversation = generation.cache.conversation
                conversation.idle, conversation.generating, conversation.prompt_columns = False, None, 0
                if not generation.is_assistant:  # an assistant goes on with its cache, after a crop
                    conversation.end_past_recording()

    def prepare_cache(self, generation_config, model_kwargs: dict, generation_mode, batch_size: int, max_cache_length: int):
        given, attached, running = model_kwargs.get(IN_GENERATE), self.host.attached, self.host.running
        made = given is None and generation_config.use_cache is not False and attached is not None
        if made:
            if generation_config.cache_implementation is not None:
                raise UnsupportedError(
                    f"cache_implementation = {generation_config.cache_implementation!r} asks for another cache while the model is attached "
                    "to PiKV; unset it, or detach"
                )
            cache = attached.unnamed(nested=len(running.generations) > 1)
        elif isinstance(given, HFCache):
            self.host.attachment_of(given)
            cache = given.named()
        else:
            return self._prepare_cache(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
        cache.conversation.drafts = bool(generation_config.is_assistant)
        self._check_last_column(model_kwargs.get("attention_mask"), cache)
        model_kwargs[IN_GENERATE] = cache
        if running.generations:
            generation = running.generations[-1]
            generation.cache, generation.is_assistant = cache, generation_config.is_assistant
            self.forwards.check_use(cache.conversation)
            cache.conversation.generating = threading.get_ident()
        mask = model_kwargs.get("attention_mask")
        if generation_config.prefill_chunk_size and isinstance(mask, Tensor) and mask.dim() == 2:
            cache.conversation.prompt_columns = mask.shape[1]
        if generation_config.is_assistant:
            cache.activate_past_recording()
        return None if made else self._prepare_cache(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)

    def prefill(self, input_ids: Tensor, generation_config, model_kwargs: dict, *args, **kwargs):
        """The first forward of a generation: transformers leaves out the columns that its cache holds already."""
        cache, mask = model_kwargs.get(IN_GENERATE), model_kwargs.get("attention_mask")
        columns = mask.shape[-1] if isinstance(mask, Tensor) else getattr(generation_config, "_mask_length", -1)  # of a mask of ones
        if isinstance(cache, HFCache) and columns == input_ids.shape[1] and model_kwargs.get("inputs_embeds") is None:
            cache.conversation.reuse(input_ids, mask)
        return self._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def update_arguments(self, outputs, model_kwargs: dict, *args, **kwargs) -> dict:
        """Note which mask the next forward gets, so that it need not be read (grown.py)."""
        before = model_kwargs.get("attention_mask")
        updated = self._update(outputs, model_kwargs, *args, **kwargs)
        generations = self.host.running.generations
        cache = generations[-1].cache if generations else None
        if cache is not None and before is not None:
            cache.conversation.grown.grows(before, updated.get("attention_mask"))
        return updated

    def _check_last_column(self, mask, cache: HFCache) -> None:
        """Sync: with a mask, one read. Raises: UnsupportedError."""
        windows = not cache.conversation.drafts and any(spec.window is not None for spec in cache.core.layers)
        if windows and isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask[:, -1].all()):
            raise UnsupportedError(
                "attention_mask hides the last column of a row, from which its next token would come, and the model has layers with a "
                "sliding window; pad rows on the left"
            )

    def has_unfinished_sequences(self, this_peer_finished: bool, synced_gpus: bool, device) -> bool:
        """Whether this rank's loop goes on. A finished rank leaves it, and keeps step in Lockstep.generating.

        transformers would let it run its loop on with dummy tokens; assisted decoding then asks its assistant for -1 tokens.
        """
        generations = self.host.running.generations
        cache = generations[-1].cache if generations else None
        if cache is None and generations and generations[-1].synced_by_us and not is_deepspeed_zero3_enabled():
            return not this_peer_finished  # use_cache=False: its forwards are none of the group's
        if cache is None or not synced_gpus or cache.core.ranks.size == 1:
            return self._unfinished(this_peer_finished, synced_gpus, device)
        if is_deepspeed_zero3_enabled():
            # ZeRO-3 gathers parameters over the whole world and keeps it in step itself; a finished rank's dummy tokens are not stored.
            cache.conversation.idle = bool(this_peer_finished)
            return self._unfinished(this_peer_finished, synced_gpus, device)
        return not this_peer_finished
