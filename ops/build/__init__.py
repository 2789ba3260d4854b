"""Compiling, loading and choosing the implementation of the ops."""
