"""The cache of one model on one rank. The only folder of the core that knows all the others."""

from pikv_ds.moved import moved

from .cache import PiKVCache

__all__ = ["PiKVCache"]

__getattr__ = moved(
    __name__,
    {
        "Agreed": "pikv_ds.step.agreement",
        "Agreement": "pikv_ds.step.agreement",
        "DistinctStep": "pikv_ds.cache.distinct:DistinctWay",
        "Exchange": "pikv_ds.exchange.exchange",
        "LayerSpec": "pikv_ds.spec",
        "LocalStep": "pikv_ds.step.step",
        "Partial": "pikv_ds.step.query",
        "PiKVConfig": "pikv_ds.config.pikv",
        "Placement": "pikv_ds.placement.placement",
        "PoolReader": "pikv_ds.cache.reader:Reader",
        "Query": "pikv_ds.step.query",
        "ReplicatedStep": "pikv_ds.cache.replicated:ReplicatedWay",
        "RequestBases": "pikv_ds.tiers.bases",
        "Retention": "pikv_ds.retention.retention",
        "Routed": "pikv_ds.placement.placement",
        "Selection": "pikv_ds.selection.selection",
        "Staged": "pikv_ds.step.query:LateEntries",
        "StepPlan": "pikv_ds.step.step:Step",
        "Tables": "pikv_ds.pages.layers:RankPages",
        "Tiers": "pikv_ds.tiers.window:RawWindow",
        "Waiting": "pikv_ds.step.query:LateLse",
        "Writer": "pikv_ds.cache.writer",
        "Written": "pikv_ds.pages.events",
        "digest": "pikv_ds.exchange.digest",
        "load": "pikv_ds.ops.build:load",
    },
)
