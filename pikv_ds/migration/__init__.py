"""Shards change ranks while a cache is used: what moves, in slices or at once, as one transaction on all ranks."""
