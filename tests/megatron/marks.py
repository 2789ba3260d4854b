"""Marks of the tests that start jobs."""

import pytest
import torch

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the jobs run on CPU and gloo; with CUDA cpu_compat does nothing")
