"""CODECS: formats in which pages store keys and values. One method, one file, one decorator."""

from pikv_ds.registry import OUTSIDE, Registry, load_siblings

CODECS = Registry("codec", OUTSIDE)
load_siblings(__name__)
