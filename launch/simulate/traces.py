"""What routers chose: ids [L, N, K] int64 of L MoE layers, N tokens, K experts of each, the primary one first. Recorded or drawn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pikv_ds.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DRAWN = ("uniform", "zipf")
WINDOW = 1024  # tokens that a model reads at once while it is recorded: what the bundled one was trained on


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    ids: Tensor
    num_experts: int
    name: str
    drawn_from: Tensor | None = None
    """[L, E] weights that the ids were drawn by; None: recorded."""

    @property
    def shares(self) -> Tensor:
        """[L, E] float64, how often each expert is the primary one."""
        counts = self.drawn_from
        if counts is None:
            counts = torch.stack([layer[:, 0].bincount(minlength=self.num_experts) for layer in self.ids])
        return counts.double() / counts.double().sum(1, keepdim=True)

    def __post_init__(self) -> None:
        ids = self.ids
        if ids.dim() != 3 or not ids.numel() or int(ids.min()) < 0 or int(ids.max()) >= self.num_experts:
            raise ConfigError(
                f"trace {self.name!r} has shape {list(ids.shape)}: legal is [layers, tokens, k], ids from 0 to {self.num_experts - 1}"
            )

    def of_layer(self, layer: int, first: int, count: int) -> Tensor:
        """[count, K] of tokens first, first + 1, ... of the router that names a layer's entries; the trace begins again at its end."""
        at = torch.arange(first, first + count) % self.ids.shape[1]
        return self.ids[layer % len(self.ids)][at]


def drawn(kind: str, *, layers: int, tokens: int, experts: int, k: int, seed: int) -> Trace:
    """uniform: every expert as likely. zipf: the i-th most popular of a layer with weight 1 / i. Choices of a token differ."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.ones(layers, experts)
    if kind == "zipf":
        weights = torch.stack([1 / (1 + torch.randperm(experts, generator=generator).float()) for _ in range(layers)])
    elif kind != "uniform":
        raise ConfigError(f"trace {kind!r} is not known: legal are {', '.join(DRAWN)}, 'bundled' and a file")
    ids = torch.stack([row.expand(tokens, -1).multinomial(k, generator=generator) for row in weights])
    return Trace(ids=ids, num_experts=experts, name=kind, drawn_from=weights)


def recorded(model: PreTrainedModel, token_ids: Tensor, name: str) -> Trace:
    """token_ids [1, N], read in windows of WINDOW tokens. Top k of every router's logits, the largest first."""
    config = model.config.get_text_config(decoder=True)
    found = []
    for at in range(0, token_ids.shape[1], WINDOW):
        with torch.no_grad():
            logits = model(token_ids[:, at : at + WINDOW], output_router_logits=True, use_cache=False).router_logits
        found.append(torch.stack([layer.topk(config.num_experts_per_tok, -1).indices for layer in logits]))
    return Trace(ids=torch.cat(found, 1), num_experts=logits[0].shape[-1], name=name)


def bundled(tokens: int) -> Trace:
    """What the bundled model's routers choose on its evaluation text."""
    from pikv_ds import bundled as model_of

    model, tokenizer = model_of.load()
    text = tokenizer(model_of.evaluation_text(), add_special_tokens=False, verbose=False, return_tensors="pt")["input_ids"]
    return recorded(model, text[:, :tokens], "bundled")


def read(path: str) -> Trace:
    """safetensors with "expert_ids" [layers, tokens] or [layers, tokens, k], as `pikv plan --placement` reads. Raises: ConfigError."""
    from pikv_ds.codecs.weights import read_file

    if not Path(path).is_file():
        raise ConfigError(f"--simulate {path}: there is no such file; legal are {', '.join(DRAWN)}, 'bundled' or a file of safetensors")
    try:
        tensors, about = read_file(path)
        ids = tensors["expert_ids"].long()
    except (KeyError, ValueError) as error:
        raise ConfigError(f"--simulate {path} is no trace: {error}") from None
    ids = ids.unsqueeze(-1) if ids.dim() == 2 else ids
    return Trace(ids=ids, num_experts=int(about.get("num_experts", int(ids.max()) + 1)), name=Path(path).name)
