"""ROUTERS: rules for which shards a query reads. One method, one file, one decorator."""

from pikv_ds.registry import Registry, load_siblings

ROUTERS = Registry("router")
load_siblings(__name__)
