"""One call of generate(): what goes in, what comes out, and how two outcomes differ."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .values import MAKERS, remove

DEFAULTS = {"max_new_tokens": 5, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
SCORES_OFF = 2e-5
"""How far scores and logits in fp32 may lie from plain transformers', by their size where that is over 1."""


@dataclass
class Call:
    """model: what generates; draft: the assistant; ids, mask: [B, T] the prompt."""

    model: PreTrainedModel
    draft: PreTrainedModel
    ids: Tensor
    mask: Tensor | None
    options: dict
    seed: int
    _folders: list[str] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return len(self.ids)

    def folder(self, make: Callable[[], str]) -> str:
        self._folders.append(make())
        return self._folders[-1]

    def run(self, cache=None) -> dict:
        """What generate() gave, as plain values and tensors; or the error: {"error", "says"}."""
        kept = [(one, copy.deepcopy(one.generation_config), one.config.num_hidden_layers) for one in (self.model, self.draft)]
        given = {**DEFAULTS, "attention_mask": self.mask, **({} if cache is None else {"past_key_values": cache})}
        try:
            options = {name: MAKERS[name](self, value) if name in MAKERS else value for name, value in self.options.items()}
            if "inputs_embeds" not in options:
                given["inputs"] = self.ids
            given |= options
            torch.manual_seed(self.seed)
            return self._plain_values(self.model.generate(**{k: v for k, v in given.items() if v is not None}), given)
        except Exception as error:  # noqa: BLE001  it is what this call gives, and is compared
            return {"error": type(error).__name__, "says": str(error), "raised": error}
        finally:
            for one, config, layers in kept:  # drafting with a schedule writes into the one, an error while it drafts leaves the other
                one.generation_config, one.config.num_hidden_layers = config, layers
            for path in self._folders:
                remove(path)

    def _plain_values(self, out, given: dict) -> dict:
        streamer = given.get("streamer")
        values = {"streamed": None if streamer is None else streamer.tokens}
        if isinstance(out, Tensor):
            return values | {"sequences": out}
        cache, hidden = out.get("past_key_values"), out.get("hidden_states")
        return values | {
            "sequences": out.sequences,
            "scores": out.get("scores"),
            "logits": out.get("logits"),
            "sequences_scores": out.get("sequences_scores"),
            "beam_indices": out.get("beam_indices"),
            "hidden_states": hidden if hidden is None else [self._of_tokens(layers) for layers in hidden],
            "length": None if cache is None else int(cache.get_seq_length()),
            "cache": cache,
        }

    def _of_tokens(self, layers: tuple[Tensor, ...]) -> list[Tensor]:
        """Hidden states [B, T, D] of a forward, but those of padding, which mean nothing."""
        mask = self.mask
        if mask is None or layers[0].shape[1] != mask.shape[1]:
            return list(layers)
        real = mask.repeat_interleave(len(layers[0]) // len(mask), 0)[..., None]
        return [layer * real for layer in layers]


def difference(expected: dict, got: dict) -> str | None:
    """What is not the same; None = nothing."""
    for name in ("streamed", "length"):
        if expected.get(name) != got.get(name):
            return f"{name}: {got.get(name)} instead of {expected.get(name)}"
    for name in ("sequences", "beam_indices", "sequences_scores", "scores", "logits", "hidden_states"):
        if (found := _differ(expected.get(name), got.get(name))) is not None:
            return f"{name}{found}"
    return None


def _differ(one, other) -> str | None:
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        if len(one) != len(other):
            return f": {len(other)} instead of {len(one)}"
        found = ((i, _differ(a, b)) for i, (a, b) in enumerate(zip(one, other, strict=True)))
        return next((f"[{i}]{what}" for i, what in found if what is not None), None)
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return None if one is other else f": {type(other).__name__} instead of {type(one).__name__}"
    if one.shape != other.shape:
        return f": {list(other.shape)} instead of {list(one.shape)}"
    if not one.is_floating_point():
        return None if torch.equal(one, other) else f": {other.tolist()} instead of {one.tolist()}"
    return None if torch.allclose(one, other, rtol=SCORES_OFF, atol=SCORES_OFF, equal_nan=True) else f": off by {_off(one, other)}"


def _off(one: Tensor, other: Tensor) -> float:
    return float(torch.where(one == other, 0.0, (one - other).abs()).nan_to_num(nan=float("inf")).max())
