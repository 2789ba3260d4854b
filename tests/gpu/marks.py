"""When the tests of this folder run: with a CUDA device. They have been run on none so far (docs/guide/cuda.md)."""

import pytest
import torch

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def gpu(test):
    for mark in needs_gpu:
        test = mark(test)
    return test
