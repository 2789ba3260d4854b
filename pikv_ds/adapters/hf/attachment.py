"""One "pikv" block on one model: what its caches share, and the stores that they are made of."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakSet, finalize, ref

import torch
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle

from pikv_ds.adapters.penalty import RouterPenalty
from pikv_ds.blueprint.routing import check_has_experts
from pikv_ds.cache.cache import PiKVCache
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import UnsupportedError
from pikv_ds.migration.along import Along, Holders
from pikv_ds.spec import LayerSpec

from .attached import AttachedCache
from .cache import HFCache
from .conversation import Conversation
from .expert_ids import ExpertIds, count_experts, load_gate
from .fingerprint import check_calibration
from .host import Host
from .host_penalty import HostPenalty
from .lockstep import lockstep_of
from .prefixes import Prefixes, check_prefix
from .rotation import check_rotations
from .router_output import check_gates, count_router_experts, find_routers
from .session import Session
from .session_tokens import SessionTokens
from .weights_at import dtype_of

SPARE_CORES = 4  # empty stores that wait for the next cache, per number of layers


class Attachment:
    """Makes caches of a model with one configuration and group. Its hooks on routers act only while a forward runs through one of them."""

    def __init__(self, host: Host, config: PiKVConfig, group: dist.ProcessGroup | None) -> None:
        """Raises: ConfigError, UnsupportedError; nothing is hooked then. Collectives: those of HostPenalty."""
        self.host, self.config, self.group = host, config, group
        specs: list[LayerSpec] = host.specs
        self.end_of_step_callbacks: list[Callable[[int], None]] = []
        self.hooks: list[RemovableHandle] = []
        """Of the one who attached; they go with this attachment's own."""
        self.steps = 0
        self.attached: AttachedCache | None = None
        """What stands for forwards that are given no cache; None: these are left to the host."""
        self.live: WeakSet[Conversation] = WeakSet()
        self.sessions: dict[str, Session] = {}
        self._spare: dict[int, list[PiKVCache]] = {}
        self._along: Along | str = "every rank has all experts, or they are those of DeepSpeed's own MoE layer, which stay where they are"
        self._over = False
        self._dtype, self._device = dtype_of(host.model), host.device
        check_prefix(config.storage.prefix, host.parts.kinds, host.name)
        num_ranks = 1 if group is None else dist.get_world_size(group)
        text = host.model.config.get_text_config(decoder=True)
        routers = find_routers(host.layers)
        check_gates(routers, num_ranks, config.storage.requests)
        num_experts = count_router_experts(routers) or count_experts(text)
        self._num_experts = num_experts or config.storage.num_shards or num_ranks
        self._num_shards = config.storage.num_shards or num_ranks
        gate = None
        if config.storage.expert_ids == "gate":
            width = specs[0].num_kv_heads * specs[0].k_dim
            gate = load_gate(config.storage.gate_path, len(specs), self._num_experts, width).to(self._device)
        core = self._core(len(specs))
        self._exchange = core.ranks
        check_has_experts(core.blueprint.router, num_experts, host.name)
        check_calibration(core, host.attentions)
        check_rotations(host.model, specs, core.rotations)
        penalty = RouterPenalty.named(config.routing.host_penalty)
        self.penalty: HostPenalty | None = None
        if penalty is not None:  # its hooks come first: entry homes follow the routers' final choice
            self.penalty = HostPenalty(penalty, core, routers, text.hidden_size, host.name)
        self._expert_ids = ExpertIds(config.storage.expert_ids, routers, host.attentions, gate, self.penalty)
        self._spare[len(specs)] = [core]
        self.lockstep = lockstep_of(group)
        self._number = self.lockstep.add(self)

    def follow(self, along: Along | str) -> None:
        """What moves with the shards of this attachment's caches from now on, or why nothing does."""
        self._along = along
        for core in (*(one.held_core for one in self.live), *(core for spare in self._spare.values() for core in spare)):
            core.follow(along)

    def _holders(self) -> Holders | None:
        """Of shards, where a cache that begins now has them: with what moves along. None = anywhere."""
        return None if isinstance(self._along, str) else self._along.holders(self._num_shards)

    def _core(self, num_layers: int) -> PiKVCache:
        core = PiKVCache(
            self.host.specs[:num_layers],
            self.config,
            num_experts=self._num_experts,
            dtype=self._dtype,
            device=self._device,
            group=self.group,
            holders=self._holders(),
        )
        core.follow(self._along)
        return core

    @property
    def num_layers(self) -> int:
        """Of the caches that are made now: fewer while generate() drafts with the first layers alone."""
        return self.host.num_layers

    def take_session(self, name: str) -> Conversation:
        """One that knows its tokens, and looks for no others that begin alike."""
        return self.take(tokens=SessionTokens(name))

    def take(self, num_layers: int | None = None, tokens: SessionTokens | None = None) -> Conversation:
        """A conversation of its own, empty. It gives its store back when the last that holds it goes. tokens: of a session."""
        if self._over:
            raise UnsupportedError(f"{self.host.name} was detached; attach it again to make caches")
        parts = self.host.parts.first(num_layers or self.num_layers)
        spare, holders = self._spare.setdefault(len(parts.at), []), self._holders()
        while spare and holders is not None and spare[-1].map.holders != holders:
            spare.pop()  # what it followed has moved since
        core = spare.pop() if spare else self._core(len(parts.at))
        prefix = self.config.storage.prefix
        prefixes = tokens
        if tokens is None and prefix.enabled:
            prefixes = Prefixes(ref(self.host), prefix.budget_tokens)
        conversation = Conversation(core, self.host.name, self._expert_ids, self.lockstep, self._number, parts, prefixes)
        conversation.probe_s, conversation.host = self.host.probe_s, ref(self.host)
        self.live.add(conversation)
        finalize(conversation, self._give_back, core).atexit = False
        return conversation

    def _give_back(self, core: PiKVCache) -> None:
        core.retire()
        spare = self._spare.setdefault(len(core.layers), [])
        if len(spare) < SPARE_CORES and not self._over:
            spare.append(core)
        if self.attached is None and not list(self.live) and not self._over:
            self._over = True
            self._remove()  # no collective: nobody knows when an object is collected

    def join(self, num_layers: int, *, in_a_loop: bool) -> Conversation:
        """The conversation of a cache that another rank opens.

        in_a_loop: the user's own, of lockstep(): what this rank would open next, where that is the same, as it may take part later. In
        generate() a rank never knows whether what the other opens will last.
        """
        attached = self.attached
        if in_a_loop and attached is not None and attached.waits and len(attached.layers) == num_layers:
            return attached.conversation
        conversation = self.take(num_layers)
        conversation.joined = True
        return conversation

    @torch.no_grad()
    def run_idle(self, conversation: Conversation) -> None:
        """A forward without tokens, for the other ranks of the group."""
        with self.host.layers_limited(len(conversation.layers)):
            self.host.model(**conversation.idle_inputs(), **{self.host.parts.cache_name: HFCache.of(conversation)})

    def count_step(self) -> None:
        self.steps += 1
        for callback in self.end_of_step_callbacks:
            callback(self.steps)

    def matches(self, config: PiKVConfig, group: dist.ProcessGroup | None) -> bool:
        return self.config == config and self.group is group

    def detach(self) -> None:
        """End all caches and take this attachment's hooks away; the model's own go with the last attachment. Idempotent."""
        if self._over:
            return
        self._over = True
        try:
            self.lockstep.leave(self._exchange)
        finally:
            self._remove()

    def _remove(self) -> None:
        with self.host.lock:
            for conversation in list(self.live):
                conversation.end("has ended: the model was detached")
            self._expert_ids.remove()
            for hook in self.hooks:
                hook.remove()
            if self.penalty is not None:
                self.penalty.remove()
            self._spare.clear()
            self.sessions.clear()
            self.host.leave(self)
