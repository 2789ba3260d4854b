"""`pikv eval`: quality and bytes of a configuration, measured through the store.

A run is a list of units (a configuration or the dense cache, and a task). Backends give sessions, which take tokens and return logits;
tasks drive sessions and do not know the backend. docs/guide/measuring.md defines every column.
"""
