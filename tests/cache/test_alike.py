"""The facts that ranks compare when they open a cache."""

import torch

from pikv_ds import PiKVConfig
from pikv_ds.cache.alike import alike
from pikv_ds.ops.build import load


def test_the_kernel_is_compared_unless_a_mixture_is_allowed(monkeypatch):
    facts = lambda **ops: dict(alike(PiKVConfig(ops=ops), [], 1, torch.float32, None, torch.device("cpu")))  # noqa: E731
    own = facts()
    assert own["attention kernel"] == load.kernel("cpu") and own["pikv.ops.precision"] == "'high'"
    assert "attention kernel" not in facts(mixed_kernels=True)
    if load.ensured("cpu") == "cpu":
        monkeypatch.setenv("PIKV_KERNEL", "baseline")
        assert facts()["attention kernel"] == "cpu baseline"
