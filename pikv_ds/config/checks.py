"""Checks of the "pikv" block that need more than a line."""

from __future__ import annotations

import inspect
from typing import get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pikv_ds.errors import ConfigError
from pikv_ds.registry import Registry

from .block import MethodBlock
from .compression import CodecConfig
from .routing import RoutingConfig
from .scheduling import SchedulingConfig
from .storage import StorageConfig
from .wording import legal_words, problem, removed, unknown_key


def check_retention(block: SchedulingConfig) -> None:
    """`scheduling` names a budget in exactly one unit when its method evicts, and room for what is never evicted."""
    given = {name: getattr(block, name) for name in ("budget_tokens", "budget_ratio", "budget_bytes")}
    given = {name: value for name, value in given.items() if value is not None}
    if block.method == "none":
        for name, value in given.items():
            raise problem(f"scheduling.{name}", value, "null with pikv.scheduling.method = 'none', which never evicts; name another method")
    elif len(given) != 1:
        raise problem("scheduling", given, f"one of budget_tokens, budget_ratio, budget_bytes with method {block.method!r}")
    pinned = block.sink_tokens + block.recent_tokens
    if block.budget_tokens is not None and block.budget_tokens < pinned:
        raise problem(
            "scheduling.budget_tokens",
            block.budget_tokens,
            f">= {pinned}: sink_tokens = {block.sink_tokens} and recent_tokens = {block.recent_tokens} are part of it and always kept",
        )


def check_method(key: str, block: MethodBlock, registry: Registry) -> None:
    """The method of a block is registered, and the block's other keys are options of its constructor with values it takes."""
    if block.method in registry.removed:
        raise removed(f"{key}.method", block.method, registry.removed[block.method])
    if block.method not in registry.names():
        raise problem(f"{key}.method", block.method, f"one of {', '.join(map(repr, registry.names()))}")
    given, method = block.options, registry.get(block.method)
    parameters = [p for p in inspect.signature(method.__init__).parameters.values() if p.kind is p.KEYWORD_ONLY]
    options = [parameter.name for parameter in parameters]
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.name not in given:
            legal = f"a value: method {block.method!r} needs it"
            raise problem(f"{key}.{parameter.name}", None, legal)
    if not given:
        return
    types = get_type_hints(method.__init__)
    for name, value in given.items():
        if name not in options:
            raise unknown_key(f"{key}.{name}", value, f"pikv.{key} with method {block.method!r}", [*type(block).model_fields, *options])
        try:
            TypeAdapter(types[name], config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError:
            raise problem(f"{key}.{name}", value, legal_words(types[name])) from None
    try:
        registry.build(block.method, **given)
    except ValueError as error:
        raise problem(key, {"method": block.method, **given}, str(error)) from None


def check_ready(key: str, block: CodecConfig) -> None:
    """The files that a codec reads are there and hold what it needs."""
    try:
        block.own().ready()
    except ValueError as error:
        raise problem(key, {"method": block.method, **block.options}, str(error)) from None


def check_pools(key: str, block: CodecConfig) -> None:
    """Only the codec of all layers, keys and values can keep two pools of pages, or fit requests."""
    own = block.own()
    if own.light is None and not own.per_request:
        return
    others = [name for name in ("k", "v", "layers") if getattr(block, name, None)]
    if key != "compression" or others:
        where = f"pikv.{key}" if key != "compression" else f"pikv.compression.{others[0]}"
        why = "its bases belong to requests, and are fitted and turned for all at once" if own.per_request else "its two pools hold both"
        raise problem(f"{key}.method", block.method, f"another codec in {where}: this one serves keys and values of all layers, {why}")


def check_experts(routing: RoutingConfig, storage: StorageConfig) -> None:
    """A router that follows the model's experts finds entries where their experts are."""
    if not routing.build().needs_experts:
        return
    if storage.placement == "position" or storage.expert_ids in ("hash", "true"):
        raise problem(
            "routing.method", routing.method,
            f"a router that needs no experts with pikv.storage.placement = {storage.placement!r} and expert_ids = {storage.expert_ids!r}: "
            f"it reads the shard of the query's expert, so that must be known before attention (previous_layer, lookahead, gate) and say "
            f"where entries lie",
        )  # fmt: skip


def check_host_penalty(routing: RoutingConfig, storage: StorageConfig) -> None:
    """A penalty on the model's routers acts on routers that name the entries' homes."""
    if routing.host_penalty.build() is None:
        return
    if storage.placement == "position" or storage.expert_ids in ("hash", "gate"):
        raise problem(
            "routing.host_penalty", routing.host_penalty.model_dump(),
            f"load 0 and miss 0 with pikv.storage.placement = {storage.placement!r} and expert_ids = {storage.expert_ids!r}: the model's "
            f"routers do not say where entries lie, so a penalty on them would cost quality and move nothing",
        )  # fmt: skip


def check_has_experts(routing: RoutingConfig, num_experts: int | None, model: str) -> None:
    """num_experts: of the model, None or 0 for a dense one. Raises: ConfigError when the router follows experts that do not exist."""
    if not num_experts and routing.build().needs_experts:
        raise ConfigError(
            f"pikv.routing.method = {routing.method!r} reads the shard of the query's expert, and {model} is a dense model without "
            f"experts; use a router of key geometry ('bounds', 'topk')"
        )


def check_budget(routing: RoutingConfig, page_size: int) -> None:
    """A router that reads less than everything has exactly one budget, and the pages that every query reads fit into it."""
    given = {name: getattr(routing, name) for name in ("budget_ratio", "budget_pages") if getattr(routing, name) is not None}
    router = routing.build()
    if router.reads_all or not router.budgeted:
        for name, value in given.items():
            reads = "reads every page" if router.reads_all else "reads whole shards"
            raise problem(f"routing.{name}", value, f"null with pikv.routing.method = {routing.method!r}, which {reads}")
        return
    if len(given) != 1:
        raise problem(
            "routing", given or {"method": routing.method}, f"one of budget_ratio and budget_pages with method {routing.method!r}"
        )
    pinned, budget = routing.sink_tokens + routing.recent_tokens, routing.budget_pages
    if budget is not None and budget * page_size < pinned:
        raise problem(
            "routing.budget_pages", budget,
            f"at least {-(-pinned // page_size)}: {budget} pages of {page_size} tokens are fewer than sink_tokens {routing.sink_tokens} + "
            f"recent_tokens {routing.recent_tokens}, which every query reads; raise it or lower those",
        )  # fmt: skip


def check_exchange(routing: RoutingConfig, storage: StorageConfig) -> None:
    """Partials that need not come back exist where queries read a part, for requests of their own."""
    if routing.exchange == "all":
        return
    if routing.build().reads_all:
        raise problem(
            "routing.exchange", routing.exchange, f"'all' with pikv.routing.method = {routing.method!r}, which reads on every rank"
        )
    if storage.requests == "replicated":
        raise problem(
            "routing.exchange", routing.exchange, "'all' with pikv.storage.requests = 'replicated': every rank needs all partials"
        )
