"""Bugs planted in the product's sources, one at a time and in memory only, to see whether the tests notice them."""
