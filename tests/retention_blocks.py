"""Options that retention policies need beyond a budget: weights and statistics in files, random and the same in every process."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from pikv_ds.codecs.part_file import PartFile, TrainedLayer
from pikv_ds.policies.entry_scorer import EntryScorer


def mlp_weights(*, layers: int, heads: int, width: int, hidden: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    shapes = {"w1": (layers, heads, hidden, width), "b1": (layers, heads, hidden), "w2": (layers, heads, hidden), "b2": (layers, heads)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def scorer_file(path: Path, *, layers: int, heads: int, width: int, hidden: int = 6, fingerprint: Sequence[torch.Tensor] = ()) -> None:
    """A part eviction_scorer, of no model without a fingerprint; its weights are random and large enough to tell entries apart."""
    known = (TrainedLayer(heads, width // 2, width // 2, heads),) * layers
    generator, scorer = torch.Generator().manual_seed(12), EntryScorer(known, hidden)
    weights = {name: torch.randn(x.shape, generator=generator) for name, x in scorer.state_dict().items()}
    PartFile(
        part="eviction_scorer", layers=known, options={"hidden": hidden}, weights=weights, fingerprint=list(fingerprint), about={}
    ).save(path)


def needed(name: str, folder: Path, *, layers: int, heads: int, width: int, fingerprint: Sequence[torch.Tensor] = ()) -> dict:
    """width: k_dim + v_dim. fingerprint: of the model that a trained part is for."""
    if name == "quest_mlp":
        path = folder / f"mlp_{layers}_{heads}_{width}.safetensors"
        save_file(mlp_weights(layers=layers, heads=heads, width=width), path)
        return {"path": str(path)}
    if name == "learned_scores":
        path = folder / f"scorer_{layers}_{heads}_{width}.safetensors"
        scorer_file(path, layers=layers, heads=heads, width=width, fingerprint=fingerprint)
        return {"path": str(path)}
    if name == "duo_heads":
        path = folder / f"heads_{layers}_{heads}.safetensors"
        save_file({"heads": (torch.arange(layers * heads) % 2).float().view(layers, heads)}, path)
        return {"path": str(path), "head_budget": "adaptive", "head_floor": 0.0}
    return {"drop_lower_tiers": True} if name == "flexgen" else {}
