"""POOLS: kinds of page pools behind those of the codec. One kind, one file, one decorator; other distributions bring theirs."""

from pikv_ds.registry import OUTSIDE, Registry, load_siblings

POOLS = Registry("kind of page pool", OUTSIDE)
load_siblings(__name__)
