"""Files of the part kv_gate with random weights: the same in every process."""

from collections.abc import Sequence
from pathlib import Path

import torch

from pikv_ds.codecs.part_file import PartFile
from pikv_ds.routers.kv_gate import KVGate
from pikv_ds.spec import LayerSpec
from pikv_ds.training.parts import PARTS
from pikv_ds.training.recorded import ModelFacts


def random_gate(path: Path, layers: Sequence[LayerSpec], num_q_heads: int = 4, fingerprint: Sequence = (), **options) -> KVGate:
    """Writes the file and gives the module. num_q_heads: of every layer."""
    part = PARTS.build("kv_gate", **options)
    facts = ModelFacts(tuple(layers), (num_q_heads,) * len(layers), 64)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        gate = part.build(facts)
        for layer in gate.layers:
            torch.nn.init.normal_(layer.center, std=0.1)
            torch.nn.init.constant_(layer.log_step, -0.3)
    PartFile(
        part="kv_gate",
        layers=facts.trained_layers,
        options=part.options(),
        weights=gate.state_dict(),
        fingerprint=list(fingerprint),
        about={},
    ).save(path)
    return gate
