"""The CPU aid alone: what it replaces it puts back. That Megatron-Core computes the right numbers with it is a check of jobs/decode.py."""

import subprocess
import sys
from unittest import mock

import pytest
import torch

from pikv_ds.megatron_patch import cpu_compat
from tests.megatron import documented

needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="does nothing with CUDA")


@needs_cpu
def test_uninstall_restores_every_name():
    before = [(p.owner, p.name, getattr(p.owner, p.name, None)) for p in cpu_compat.patches()]
    try:
        assert cpu_compat.install()
        assert torch.cuda.current_device() == torch.device("cpu")
        assert not cpu_compat.install(), "a second install must change nothing"
    finally:
        assert cpu_compat.uninstall()
    assert not cpu_compat.uninstall()
    changed = [name for owner, name, original in before if getattr(owner, name, None) is not original]
    assert not changed, changed


@needs_cpu
def test_the_documented_lines():
    def run() -> None:
        assert torch.cuda.current_device() == torch.device("cpu") and torch.ones(1, device="cuda").device.type == "cpu"

    original = torch.cuda.current_device
    made = documented.run("cpu_compat.install()", run=run)
    assert torch.cuda.current_device is original and made["options"]["use_cpu_initialization"]


def test_does_nothing_with_cuda():
    original = torch.cuda.current_device
    with mock.patch.object(torch.cuda, "is_available", lambda: True):
        assert not cpu_compat.install()
    assert torch.cuda.current_device is original


def test_import_replaces_nothing():
    code = (
        "import torch; before = torch.cuda.current_device; import sys, pikv_ds.megatron_patch.cpu_compat; "
        "assert torch.cuda.current_device is before and 'megatron' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_literals_mean_the_cpu_only_inside():
    if torch.cuda.is_available():
        pytest.skip("does nothing with CUDA")
    with cpu_compat.cuda_literals_on_cpu():
        x = torch.ones(2, device="cuda")
        assert x.cuda() is x and x.to("cuda").device.type == "cpu"
        assert x.type() == "torch.cuda.FloatTensor"
        assert not torch.empty_like(x, device="cpu", pin_memory=True).is_pinned() and x.pin_memory() is x
    assert x.type() == "torch.FloatTensor"
    for cuda_only in (lambda: torch.ones(2, device="cuda"), lambda: torch.empty_like(x, pin_memory=True), x.pin_memory):
        with pytest.raises((AssertionError, RuntimeError)):
            cuda_only()


@needs_cpu
def test_what_the_engines_ask_of_a_gpu():
    """Each raises without the aid, runs with it, and raises again afterwards. A kernel stands in for Triton's, which may not be there."""
    from megatron.core.inference import communication_utils
    from megatron.core.inference.contexts import dynamic_context
    from megatron.core.inference.engines import dynamic_engine

    def kernel(**arguments):
        raise AssertionError("All tensors must be on CUDA devices")

    ranges = []  # from 0.18 on the engine marks them by a function of Megatron's own, which does nothing until it is switched on
    if hasattr(dynamic_engine, "range_push"):
        ranges = [lambda: dynamic_engine.range_push("step"), lambda: dynamic_engine.range_pop()]
    calls = [*ranges, lambda: communication_utils._is_cuda(torch.ones(1))]

    def all_raise() -> None:
        for call in calls[len(ranges) :] if torch.version.cuda else calls:  # a CUDA build marks ranges without a GPU too
            with pytest.raises((AssertionError, RuntimeError)):
                call()

    with mock.patch.object(dynamic_context, "triton_append_key_value_cache", kernel):
        all_raise()
        try:
            assert cpu_compat.install()
            for call in calls:
                call()
            with pytest.raises(AssertionError):
                communication_utils._is_cuda(None)
            assert dynamic_context.triton_append_key_value_cache is None
        finally:
            assert cpu_compat.uninstall()
        all_raise()
        assert dynamic_context.triton_append_key_value_cache is kernel


@needs_cpu
def test_a_name_that_a_version_does_not_have_is_left_alone(monkeypatch):
    from megatron.core.inference import communication_utils

    monkeypatch.delattr(communication_utils, "_is_cuda")
    try:
        assert cpu_compat.install()
        assert not hasattr(communication_utils, "_is_cuda")
    finally:
        assert cpu_compat.uninstall()
