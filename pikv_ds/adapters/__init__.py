"""Adapters: the only part of pikv_ds that imports a host (transformers, deepspeed). One file per host."""
