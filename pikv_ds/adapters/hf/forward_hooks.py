"""What happens before and after a decoder forward that uses a cache: read the host's masks and positions, plan, finish."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from pikv_ds.errors import UnsupportedError
from pikv_ds.exchange.digest import digest_there
from pikv_ds.modes import eager, refuse_transforms, untraced
from pikv_ds.staging import sent
from pikv_ds.step.step import LocalStep

from . import traced
from .argument_names import given_cache, given_name, renamed
from .attention_switch import AttentionSwitch
from .cache import HFCache
from .conversation import Conversation
from .host import Host
from .inputs import check_inputs, new_mask
from .masks import forget_masks
from .prefixes import Stored, stored_tokens, wrong_places
from .running import Chunk, Forward, Growth

Made = TypeVar("Made")


class ForwardHooks:
    """A pre-hook and a hook on the decoder. Forwards without a cache, and all forwards in train mode, are left to the host."""

    def __init__(self, host: Host) -> None:
        self.host, self.config = host, host.decoder.config
        self._names = [  # of positional arguments
            p.name for p in inspect.signature(host.decoder.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        self._cache_name = host.parts.cache_name
        self._switch = AttentionSwitch(self.config)
        self._handles = [
            host.decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            host.decoder.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self.abandon()

    @eager
    def _before(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        running = self.host.running.forward
        if running is not None and running.played and kwargs.get(self._cache_name) is running.cache:
            return None
        given = {**dict(zip(self._names, args, strict=False)), **kwargs} if args else kwargs
        self.host.trained += decoder.training
        cache = self._cache_of(given, decoder.training)
        if cache is None:
            return None
        refuse_transforms()
        check_inputs(decoder, given)
        self.abandon()
        self.host.running.check_expansions()
        conversation = cache.conversation
        local, growth = self._plan(conversation, given)  # what is refused here, other ranks need not hear of
        conversation.lockstep.before_forward(conversation)
        stored = None if conversation.prefixes is None else self._stored(conversation, given, local, growth)
        self.host.lock.acquire()
        try:
            self._start(cache, local, growth, stored)
        except BaseException:
            if self.host.running.forward is None:
                self.host.lock.release()
            self.abandon()
            raise
        if not args:
            return args, renamed(kwargs, self._cache_name, cache)
        at = self._names.index(self._cache_name)
        by_name = {**dict(zip(self._names[at:], args[at:], strict=False)), **kwargs}
        return args[:at], renamed(by_name, self._cache_name, cache)

    def _cache_of(self, given: dict, training: bool) -> HFCache | None:
        """The cache that a forward runs through; None = it is the host's affair."""
        past, attached = given_cache(given), self.host.attached
        if past is None:
            use_cache = given.get("use_cache")
            use_cache = getattr(self.config, "use_cache", True) if use_cache is None else use_cache
            if training or not use_cache or attached is None:
                return None
            return attached.unnamed(nested=bool(self.host.running.generations))
        if not isinstance(past, HFCache):
            if attached is None:
                return None
            self.refuse_foreign(past, given_name(given))
        self.host.attachment_of(past)
        if training:
            raise UnsupportedError("a PiKV cache was passed to a forward in train mode; call model.eval() first")
        return past.named()

    def refuse_foreign(self, past, name: str) -> NoReturn:
        """past: what was given as the cache, by this name, and is no PiKV cache."""
        what = "" if isinstance(past, Cache) else ", which is no Cache"
        raise UnsupportedError(
            f"the model is attached to PiKV but was called with a {type(past).__name__} as {name}{what}; pass no cache, or one of "
            "its own, or detach"
        )

    def _plan(self, conversation: Conversation, given: dict) -> tuple[LocalStep, Growth | None]:
        """What this rank brings to the forward, and what its rows grow by. Changes nothing. Raises: UnsupportedError, RuntimeError."""
        self.check_use(conversation)
        if conversation.packed is not None:
            tokens = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
            return conversation.packed.plan(conversation, tokens, given), None
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given["inputs_embeds"]
        rows, columns = tokens.shape[:2]
        if not columns:
            raise UnsupportedError(
                f"the forward has no tokens; {self._cache_name} holds {conversation.columns} columns already: give what is new as well"
            )
        if not conversation.fresh and rows != len(conversation.lens):
            raise UnsupportedError(
                f"the forward has {rows} rows, the cache {len(conversation.lens)}; select or repeat rows first, or start a new generation"
            )
        mask = new_mask(conversation, given.get("attention_mask"), rows, columns)
        # position_ids may be anything that the model takes: keys arrive rotated, and the cache goes by the order of tokens, as masks do.
        before = conversation.lens if not conversation.fresh else [0] * rows
        positions = torch.tensor(before, dtype=torch.int32).unsqueeze(1)
        if mask is None:
            num_new = [columns] * rows
            positions = positions if columns == 1 else positions + torch.arange(columns, dtype=torch.int32)
        else:
            num_new = mask.sum(1).tolist()
            positions = torch.where(mask, positions + mask.cumsum(1, dtype=torch.int32) - 1, -1)
        identity = not conversation.fresh and not conversation.touched
        core, value = conversation.core, 0
        park = None if conversation.prefixes is None else conversation.prefixes.plan(broken=conversation.broken)
        if core.ranks.size > 1 and (conversation.fresh or core.replicated):
            known = [positions, torch.tensor(before), torch.tensor(conversation.parent or [-1])]
            value = digest_there([tokens], known if park is None else [*known, torch.tensor(park)])
        prompt: list[int] = []
        if conversation.columns < conversation.prompt_columns:
            rest = max(0, conversation.prompt_columns - conversation.columns - columns)  # of columns, so at least as many tokens as come
            prompt = [kept + new + rest for kept, new in zip(before, num_new, strict=True)]
        local = LocalStep(
            num_rows=rows,
            num_columns=columns,
            num_new=num_new,
            parent=[-1] * rows if conversation.fresh else list(conversation.parent),
            keep=[0] * rows if conversation.fresh else list(before),
            positions=sent(positions, torch.int32, core.device),
            digest=value,
            identity=identity,
            fresh=conversation.fresh,
            prompt=prompt,
            park=park,
        )
        return local, (columns, mask, num_new)

    def _stored(self, conversation: Conversation, given: dict, local: LocalStep, growth: Growth | None) -> Stored | None:
        """What requests that begin alike must know of the forward; None: it stores nothing."""
        if local.idle or growth is None:
            return None
        hidden = (conversation.column_mask, growth[1])
        return Stored(stored_tokens(given, self._cache_name), growth[1], wrong_places(given, local.positions, hidden))

    def _start(self, cache: HFCache, local: LocalStep, growth: Growth | None, stored: Stored | None) -> None:
        conversation, core = cache.conversation, cache.core
        conversation.broken = True  # until the forward has finished
        core.begin_step(local)
        self._enter(cache, local, growth, stored)
        self.host.running.forward.plain = conversation.plain(local)

    def _enter(self, cache: HFCache, local: LocalStep, growth: Growth | None, stored: Stored | None) -> None:
        """The forward runs in this thread from now on."""
        conversation, core = cache.conversation, cache.core
        if local.idle:
            conversation.states.hold()
        windows = forget_masks()
        self.host.running.expansions = []
        whole = (growth is not None and growth[1] is None) or all(n == local.num_columns for n in local.num_new)
        chunk = Chunk(local.positions, None if whole else local.positions < 0)
        packed = conversation.packed
        self.host.running.forward = Forward(
            cache, conversation, core, chunk, growth, self._switch.name, packed, windows=windows, stored=stored
        )
        traced.entered(self.host)
        conversation.thread = threading.get_ident()
        conversation.expert_ids.begin(core, None if packed is None else packed.experts)
        self._switch.name = "pikv"

    def check_use(self, conversation: Conversation) -> None:
        if len(conversation.layers) != self.host.num_layers:
            raise UnsupportedError(
                f"this PiKV cache of {conversation.model} has {len(conversation.layers)} layers, the forward {self.host.num_layers} "
                "(num_hidden_layers); make a cache while the number is what it will be"
            )
        if conversation.broken and not conversation.fresh:
            raise RuntimeError(
                "an earlier forward failed midway, so the layers hold different tokens; call reset() on all ranks or start a new generation"
            )
        if conversation.generating not in (None, threading.get_ident()):
            raise UnsupportedError(
                f"this PiKV cache of {conversation.model} is in use by a generate() in another thread; give each thread a cache of "
                "its own: new_cache(), or none"
            )

    @untraced
    def _after(self, decoder: nn.Module, args: tuple, kwargs: dict, output) -> None:
        forward = self.host.running.forward
        if forward is None or kwargs.get(self._cache_name) is not forward.cache or forward.played:
            return
        self.abandon(unlock=False)
        try:
            if output is None:  # the forward raised; its error is on its way up
                return
            forward.core.end_step()
            self._finish(forward)
        finally:
            self.host.lock.release()
        self.host.attachment_of(forward.cache).count_step()

    def _finish(self, forward: Forward) -> None:
        """Account for a forward that has run and been stored."""
        conversation = forward.conversation
        conversation.states.let_go()
        self.host.running.note_expansions(conversation, later=forward.chunk.positions.shape[1] == 1)
        if forward.packed is not None:
            forward.packed.finish(conversation)
        else:
            if conversation.prefixes is not None:
                conversation.prefixes.ran(len(forward.growth[2]), forward.stored)
            conversation.finish_forward(*forward.growth, kept_step=self._keeps_step(conversation, forward.growth[2]))
        conversation.broken = False
        conversation.lockstep.opened(conversation)

    @eager
    def play(self, cache: HFCache, given: dict, positions: Tensor, run: Callable[[LocalStep], Made]) -> Made:
        """A forward whose layers, and whose steps of the cache, `run` runs: planned and finished as any.

        Args: given: arguments of the model by name. positions: where `run` keeps them, [B, T] int32.
        """
        self.abandon()
        self.host.attachment_of(cache)
        self.host.running.check_expansions()
        conversation = cache.conversation
        local, growth = self._plan(conversation, given)
        conversation.lockstep.before_forward(conversation)
        stored = None if conversation.prefixes is None else self._stored(conversation, given, local, growth)
        self.host.lock.acquire()
        try:
            self._enter(cache, local, growth, stored)
            forward = self.host.running.forward
            assert forward is not None, "it has just been entered"
            forward.played, forward.chunk = True, Chunk(positions)
            made = run(local)
            self._finish(forward)
        finally:
            self.abandon(unlock=False)
            self.host.lock.release()
        self.host.attachment_of(cache).count_step()
        return made

    def _keeps_step(self, conversation: Conversation, num_new: list[int]) -> bool:
        """A forward without any token; but in a generate() of this rank, a chunk of a prompt that is all padding, whose columns count."""
        if any(num_new):
            return False
        return conversation.idle or conversation.lockstep.runs_idle or not self.host.running.generations

    def abandon(self, *, unlock: bool = True) -> None:
        """Forget the forward that runs in this thread, if one does: the model is as between forwards. It was interrupted, or is done."""
        forward = self.host.running.forward
        if forward is None:
            return
        self.host.running.forward = None
        traced.left(self.host)
        self._switch.name = forward.host_attention
        forward.conversation.thread = None
        forward.conversation.expert_ids.end()
        if unlock:
            self.host.lock.release()
