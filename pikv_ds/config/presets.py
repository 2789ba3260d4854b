"""Named configurations: `"preset": NAME` in the "pikv" block stands for the keys below; keys given beside it override them.

A block that names a `method` of its own replaces the preset's block; other keys are laid over it one by one.
`paper_*` are the configurations A to G of the authors' README (NoakLiu/PiKV), with the quality and ratio claimed there. The claims are
kept to be shown beside what is measured; docs/results/methods.md has both.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from .wording import problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """block: keys of the "pikv" block. needs: keys to give beside the preset, in which "..." stands for a file of `pikv calibrate`.

    claimed_*: of the authors' configuration, lowest and highest figure; None = not theirs.
    """

    what: str
    block: dict[str, Any]
    needs: dict[str, Any] | None = None
    claimed_drop_pct: tuple[float, float] | None = None
    claimed_ratio: tuple[float, float] | None = None


_DUO = {"method": "duo", "budget_ratio": 0.5}

PRESETS: dict[str, Preset] = {
    "accurate": Preset(what="8-bit entries: no measurable loss", block={"compression": {"method": "int8"}}),
    "balanced": Preset(what="4-bit entries", block={"compression": {"method": "int4"}}),
    "small": Preset(
        what="4-bit entries, half of them kept",
        block={"compression": {"method": "int4"}, "scheduling": {"method": "quest", "budget_ratio": 0.5}},
    ),
    "paper_a": Preset(
        what="accuracy-first: EPLB router, no compression, Duo (of each layer by itself, h2o: shards hold other entries in each layer)",
        block={
            "storage": {"num_shards": 4},
            "routing": {"method": "entropy", "top_k": 2},
            "scheduling": {"method": "h2o", "budget_ratio": 0.5},
        },
        claimed_drop_pct=(0.8, 1.3),
        claimed_ratio=(2.2, 2.2),
    ),
    "paper_b": Preset(
        what="balanced: top-k router, PyramidKV of keys and FastV (crop) of values, rank 16 (for heads of 32), AdaKV",
        block={
            "storage": {"num_shards": 4},
            "routing": {"method": "topk", "top_k": 2},
            "compression": {"method": "pyramid", "v": {"method": "crop", "rank": 16}},
            "scheduling": {"method": "adakv", "budget_ratio": 0.6},
        },
        needs={"compression": {"calibration": "...", "v": {"calibration": "..."}}},
        claimed_drop_pct=(1.4, 1.7),
        claimed_ratio=(2.5, 3.5),
    ),
    "paper_c": Preset(
        what="maximal compression: distilled encoder of keys, rank 16, LoRA of values, rank 8 (for heads of 32)",
        block={"compression": {"method": "lora", "rank": 8, "k": {"method": "distill", "rank": 16}}},
        needs={"compression": {"calibration": "...", "k": {"calibration": "..."}}},
        claimed_drop_pct=(9.5, 12.5),
        claimed_ratio=(2.8, 4.8),
    ),
    "paper_d": Preset(
        what="routing only: PiKV's cache-aware router",
        block={"storage": {"num_shards": 4}, "routing": {"method": "cache_aware", "top_k": 2}},
        claimed_drop_pct=(1.3, 1.5),
        claimed_ratio=(1.0, 1.0),
    ),
    "paper_e": Preset(
        what="compression only: ChunkKV (block PCA) of keys, rank 8, SVD (fitted offline) of values, rank 16 (for heads of 32)",
        block={"compression": {"method": "chunk_pca", "rank": 8, "v": {"method": "lora", "rank": 16}}},
        needs={"compression": {"calibration": "...", "v": {"calibration": "..."}}},
        claimed_drop_pct=(4.8, 5.5),
        claimed_ratio=(2.6, 3.7),
    ),
    "paper_f": Preset(
        what="scheduling only: Duo",
        block={"scheduling": _DUO},
        claimed_drop_pct=(1.2, 1.6),
        claimed_ratio=(1.0, 2.0),
    ),
    "paper_g": Preset(
        what="baseline: nothing left out, nothing compressed", block={}, claimed_drop_pct=(0.0, 0.0), claimed_ratio=(1.0, 1.0)
    ),
}


def expand(block: dict[str, Any]) -> dict[str, Any]:
    """The block without its `preset`, whose keys are written out. Raises: an error for a validator, naming the presets."""
    name = block.get("preset")
    if name is None:
        return block
    if not isinstance(name, str) or name not in PRESETS:
        raise problem("preset", name, f"one of {', '.join(map(repr, PRESETS))}, or null")
    return overlay(PRESETS[name].block, {key: value for key, value in block.items() if key != "preset"})


def overlay(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`; where both hold an object it is laid on key by key, but one that names a method replaces the other."""
    made = deepcopy(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(made.get(key), dict)
        made[key] = overlay(made[key], value) if both and "method" not in value else value
    return made
