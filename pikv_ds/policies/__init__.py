"""POLICIES: rules for which pages stay when a budget is full. One method, one file, one decorator."""

from pikv_ds.registry import OUTSIDE, Registry, load_siblings

POLICIES = Registry("retention policy", OUTSIDE)
load_siblings(__name__)
