"""One file of a trained gate, any number of ranks, both hosts: the same pages are read."""

import pytest
import torch

from pikv_ds import bundled
from pikv_ds.adapters.hf.record import Recorder
from tests.dist.launcher import run_gloo
from tests.long_form import LONG
from tests.trained_gates import random_gate

pytestmark = [
    pytest.mark.dist,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(torch.cuda.is_available(), reason="Megatron-Core on CPU and gloo: cpu_compat leaves CUDA alone"),
]
SHORT = [("deepspeed", 1), ("megatron", 2)]


def test_the_same_pages_are_read(tmp_path):
    file = tmp_path / "gate.safetensors"
    model, _ = bundled.load(torch.float32)
    recorder = Recorder(model, torch.zeros(1, 8, dtype=torch.int64))
    random_gate(file, recorder.layers, model.config.num_attention_heads, recorder.fingerprint())
    found = {}
    for host, ranks in [(host, ranks) for host in ("deepspeed", "megatron") for ranks in (1, 2, 4)] if LONG else SHORT:
        rows = run_gloo("trained_selection.py", [host, file], ranks=ranks, timeout_s=200).check("selection")
        assert len({row["digest"] for row in rows}) == 1 and rows[0]["keys"] > 100 and rows[0]["pages"] > 1000
        found[host, ranks] = rows[0]["digest"]
    assert len(set(found.values())) == 1, found
