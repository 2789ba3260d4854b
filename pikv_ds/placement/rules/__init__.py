"""PLACEMENTS: rules for which shard an entry belongs to. One rule, one file, one decorator."""

from pikv_ds.registry import OUTSIDE, Registry, load_siblings

PLACEMENTS = Registry("placement", OUTSIDE)
load_siblings(__name__)
