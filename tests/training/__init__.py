"""Learned parts: the loop, its checkpoints, the file, the parts themselves."""
