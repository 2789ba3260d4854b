"""Defaults of torch that a user may have changed, as contexts."""

import contextlib

import torch


@contextlib.contextmanager
def double_by_default():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
