"""ROUTERS: rules for which shards a query reads. One method, one file, one decorator."""

from pikv_ds.registry import OUTSIDE, Registry, load_siblings

ROUTERS = Registry("router", OUTSIDE)
load_siblings(__name__)
