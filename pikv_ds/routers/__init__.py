"""ROUTERS: rules for which shards a query reads. One method, one file, one decorator."""

from pikv_ds.registry import OUTSIDE, Registry, load_siblings

ROUTERS = Registry("router", OUTSIDE)
load_siblings(__name__)
ROUTERS.refuse(
    "hierarchical",
    "it was a method of our own and chose worse than 'bounds' (docs/results/methods.md); the paper's hierarchical router R_H is "
    "'two_stage'; use 'bounds' or 'two_stage'",
)
