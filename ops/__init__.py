"""Ops of the PiKV cache: one Python function per op, a torch implementation beside any compiled one. Imports torch, nothing else of pikv_ds."""
