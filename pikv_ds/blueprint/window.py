"""What two pools of pages (window.py) cannot do with this model, these blocks or these ranks: refused at construction, with the way out."""

from __future__ import annotations

from pikv_ds.codecs.base import Codec
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import ConfigError
from pikv_ds.routers.base import Router
from pikv_ds.spec import LayerSpec


def check_tiers(config: PiKVConfig, codec: Codec, layers: list[LayerSpec], page_size: int) -> None:
    """Raises: ConfigError."""
    block = config.compression
    if block.build_near() is None:
        return
    given = f"pikv.compression.method = {codec.name!r}"
    if codec.light is None:
        given = f"pikv.compression.raw_sink_tokens = {block.raw_sink_tokens}, raw_recent_tokens = {block.raw_recent_tokens}"
    if all(spec.window is not None for spec in layers):
        raise ConfigError(
            f"{given} on a model whose layers all have a sliding window: these keep one pool of pages, in the codec's format; leave it out"
        )
    if codec.per_request and config.routing.method != "all":
        raise ConfigError(
            f"{given} with pikv.compression.method = {codec.name!r} and pikv.routing.method = {config.routing.method!r}: a router "
            f"is told of keys when they are stored, and here they have no coefficients before they leave the raw window, as the basis of a "
            f"request is fitted after its forward; use routing 'all', a calibrated codec ('lora', 'crop'), or leave the raw window out"
        )
    if config.scheduling.head_budget != "shared":
        raise ConfigError(
            f"{given} with pikv.scheduling.head_budget = {config.scheduling.head_budget!r}: a page that holds one KV head has no second "
            f"pool in this version; legal is 'shared'"
        )
    if config.scheduling.budget_bytes is not None:
        raise ConfigError(
            f"{given} with pikv.scheduling.budget_bytes = {config.scheduling.budget_bytes}: entries have two sizes, so bytes do not say "
            f"how many stay; use budget_tokens or budget_ratio"
        )
    least = (block.raw_sink_tokens or 0) + (block.raw_recent_tokens or 0)
    budget = config.routing.budget_pages
    if budget is not None and budget * page_size < least:
        raise ConfigError(
            f"pikv.routing.budget_pages = {budget}: {budget} pages of {page_size} tokens are fewer than raw_sink_tokens + "
            f"raw_recent_tokens = {least} of pikv.compression, which every query reads; raise it or lower those"
        )
    if config.routing.exchange == "needed" and not config.routing.build().budgeted:
        raise ConfigError(
            f"{given} with pikv.routing.exchange = 'needed' and method {config.routing.method!r}: every query reads the raw pages, and a "
            f"router of shards does not say where these are; use exchange 'all', or a router with a budget"
        )
    if codec.light is not None:
        _check_attention(config, given)


def _check_attention(config: PiKVConfig, given: str) -> None:
    if config.storage.expert_ids == "true":
        raise ConfigError(
            f"{given} with pikv.storage.expert_ids = 'true': entries are stored after the queries of their forward have read, so the "
            f"attention they get is not known; use 'previous_layer'"
        )


def check_router(router: Router, *, summarises: bool) -> None:
    """summarises: it keeps something per page. Raises: ConfigError when it can't do so for pages that are demoted."""
    if summarises and type(router).moved is Router.moved:
        raise ConfigError(
            f"pikv.routing.method = {router.name!r} keeps summaries of pages and can't make them for pages that were encoded again "
            f"(Router.moved); use another router, or pikv.compression without raw_sink_tokens and raw_recent_tokens"
        )
