"""PARTS: what can be trained. One part, one file, one decorator; its nn.Module lies with the method that runs it."""

from pikv_ds.registry import OUTSIDE, Registry, load_siblings

PARTS = Registry("learned part", OUTSIDE)
load_siblings(__name__)
