"""What the "routing" block can't do, with the way out."""

from __future__ import annotations

from pikv_ds.config.wording import illegal
from pikv_ds.errors import ConfigError
from pikv_ds.routers.base import Router

from .facts import Facts
from .rule import Rule, said


def _given(facts: Facts) -> dict[str, float]:
    routing = facts.config.routing
    return {name: getattr(routing, name) for name in ("budget_ratio", "budget_pages") if getattr(routing, name) is not None}


def _takes_budget(facts: Facts) -> bool:
    return facts.methods.router.budgeted and not facts.methods.router.reads_all


def _no_budget(facts: Facts) -> str | None:
    for name, value in _given(facts).items() if not _takes_budget(facts) else ():
        reads = "reads every page" if facts.methods.router.reads_all else "reads whole shards"
        return illegal(f"routing.{name}", value, f"null with pikv.routing.method = {facts.config.routing.method!r}, which {reads}")
    return None


def _one_budget(facts: Facts) -> str | None:
    given, method = _given(facts), facts.config.routing.method
    if not _takes_budget(facts) or len(given) == 1:
        return None
    return illegal("routing", given or {"method": method}, f"one of budget_ratio and budget_pages with method {method!r}")


def _pinned(facts: Facts) -> str | None:
    routing = facts.config.routing
    pinned, budget = routing.sink_tokens + routing.recent_tokens, routing.budget_pages
    block_size = routing.block_size or facts.page_size
    if budget is None or budget * block_size >= pinned:
        return None
    listed = "pages" if routing.block_size is None else "blocks"
    return illegal(
        "routing.budget_pages", budget,
        f"at least {-(-pinned // block_size)}: {budget} {listed} of {block_size} tokens are fewer than sink_tokens "
        f"{routing.sink_tokens} + recent_tokens {routing.recent_tokens}, which every query reads; raise it or lower those",
    )  # fmt: skip


def _needed_of_all(facts: Facts) -> str | None:
    routing = facts.config.routing
    if routing.exchange == "all" or not facts.methods.router.reads_all:
        return None
    return illegal("routing.exchange", routing.exchange, f"'all' with pikv.routing.method = {routing.method!r}, which reads on every rank")


def _needed_replicated(facts: Facts) -> str | None:
    exchange = facts.config.routing.exchange
    if exchange == "all" or facts.config.storage.requests != "replicated":
        return None
    return illegal("routing.exchange", exchange, "'all' with pikv.storage.requests = 'replicated': every rank needs all partials")


def _experts(facts: Facts) -> str | None:
    storage = facts.config.storage
    if not facts.methods.router.needs_experts or (facts.methods.placement.reads_experts and storage.expert_ids not in ("hash", "true")):
        return None
    return illegal(
        "routing.method", facts.config.routing.method,
        f"a router that needs no experts with pikv.storage.placement = {storage.placement!r} and expert_ids = {storage.expert_ids!r}: "
        f"it reads the shard of the query's expert, so that must be known before attention (previous_layer, lookahead, gate) and say "
        f"where entries lie",
    )  # fmt: skip


def _penalty(facts: Facts) -> str | None:
    """A penalty on the model's routers acts on routers that name the entries' homes."""
    penalty, storage = facts.config.routing.host_penalty, facts.config.storage
    if not penalty.asked or (facts.methods.placement.reads_experts and storage.expert_ids not in ("hash", "gate")):
        return None
    return illegal(
        "routing.host_penalty", penalty.model_dump(),
        f"load 0 and miss 0 with pikv.storage.placement = {storage.placement!r} and expert_ids = {storage.expert_ids!r}: the model's "
        f"routers do not say where entries lie, so a penalty on them would cost quality and move nothing",
    )  # fmt: skip


def check_has_experts(router: Router, num_experts: int | None, model: str) -> None:
    """num_experts: of the model, None or 0 for a dense one. Raises: ConfigError when the router follows experts that do not exist.

    Hosts ask, once they have seen the model: a cache places the entries of a dense one by numbers that only look like experts.
    """
    if not num_experts and router.needs_experts:
        raise ConfigError(
            f"pikv.routing.method = {router.name!r} reads the shard of the query's expert, and {model} is a dense model without "
            f"experts; use a router of key geometry ('bounds', 'topk')",
            rule="router-follows-experts",
        )


BLOCK = (
    Rule(
        "router-takes-no-budget", "block", ("routing",), "a budget for a router that reads everything, or whole shards",
        "it would be ignored", "no budget, or a router that scores pages", _no_budget,
    ),
    Rule(
        "router-needs-one-budget", "block", ("routing",), "a router that scores pages, without a budget or with two",
        "something must say how much is read", "one of budget_ratio and budget_pages", _one_budget,
    ),
    Rule(
        "budget-holds-pinned-pages", "block", ("routing", "page_size"), "fewer budget_pages than sink_tokens and recent_tokens fill",
        "every query reads these, inside the budget", "more pages, or fewer pinned tokens", _pinned,
    ),
    Rule(
        "needed-exchange-reads-a-part", "block", ("routing",), "exchange 'needed' or 'routed' with a router that reads on every rank",
        "then every rank gets every query and has something to send back", "exchange 'all'", _needed_of_all,
    ),
    Rule(
        "needed-exchange-distinct", "block", ("routing", "storage"), "exchange 'needed' or 'routed' with replicated requests",
        "every rank has all queries and needs all partials", "exchange 'all'", _needed_replicated,
    ),
    Rule(
        "router-follows-experts", "block", ("routing", "storage"),
        "a router that reads the shard of the query's expert, where that is not known before attention or says nothing of entries' homes",
        "it would read shards at random; a dense model has no experts at all", "expert_ids previous_layer, lookahead or gate; or 'topk'",
        _experts,
    ),
    Rule(
        "penalty-moves-entries", "block", ("routing", "storage"),
        "a penalty on the model's routers where these do not say where entries lie",
        "it would cost quality and move nothing", "no penalty, or another placement or expert_ids", _penalty,
    ),
)  # fmt: skip
MODEL = (
    Rule(
        "router-fits-model", "model", ("routing", "storage"), "a router with weights of other layers or another number of shards",
        "a gate fits one placement", "weights fitted for this model and these shards",
        lambda facts: said(lambda: facts.methods.router.check(list(facts.layers), facts.num_shards)),
    ),
)  # fmt: skip
