"""Pools of pages behind the one that entries are appended to, and when pages go there."""
