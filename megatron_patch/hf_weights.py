"""Weights between Hugging Face (Qwen3-MoE, Mixtral) and Megatron-Core, sliced for tensor and expert parallelism, both ways.

One table of rules serves both directions. V vocabulary, H hidden, E experts, f expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import UnsupportedError
from pikv_ds.exchange.exchange import Exchange

from .hf_config import head_dim, moe_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One Megatron parameter and the Hugging Face tensors it is made of.

    cut: how tensor-parallel ranks share it: "all" (each has it), "rows", "columns", or "glu" (rows of gate and of up, each cut alone).
    experts: `name` has a {} for the local expert, and the joined tensor a leading dimension E.
    """

    name: str
    hf: tuple[str, ...]
    cut: str = "all"
    experts: bool = False
    join: Callable[..., Tensor] = lambda tensor: tensor
    split: Callable[[Tensor], tuple[Tensor, ...]] = lambda tensor: (tensor,)


def rules(hf_config) -> Iterator[Rule]:
    """Every parameter of the model."""
    groups, size = hf_config.num_key_value_heads, head_dim(hf_config)
    per_group = hf_config.num_attention_heads // groups

    def join_qkv(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Megatron's rows: per KV head [its query heads | k | v]."""
        parts = [q.view(groups, per_group * size, -1), k.view(groups, size, -1), v.view(groups, size, -1)]
        return torch.cat(parts, 1).flatten(0, 1)

    def split_qkv(qkv: Tensor) -> tuple[Tensor, ...]:
        parts = qkv.view(groups, (per_group + 2) * size, -1).split([per_group * size, size, size], 1)
        return tuple(part.flatten(0, 1) for part in parts)

    yield Rule(name="embedding.word_embeddings.weight", hf=("model.embed_tokens.weight",), cut="rows")
    yield Rule(name="decoder.final_layernorm.weight", hf=("model.norm.weight",))
    if not hf_config.tie_word_embeddings:
        yield Rule(name="output_layer.weight", hf=("lm_head.weight",), cut="rows")
    for i, has_experts in enumerate(moe_layers(hf_config)):
        m, h = f"decoder.layers.{i}.", f"model.layers.{i}."
        yield Rule(name=m + "input_layernorm.weight", hf=(h + "input_layernorm.weight",))
        yield Rule(name=m + "pre_mlp_layernorm.weight", hf=(h + "post_attention_layernorm.weight",))
        qkv = tuple(f"{h}self_attn.{x}_proj.weight" for x in "qkv")
        yield Rule(name=m + "self_attention.linear_qkv.weight", hf=qkv, cut="rows", join=join_qkv, split=split_qkv)
        yield Rule(name=m + "self_attention.linear_proj.weight", hf=(h + "self_attn.o_proj.weight",), cut="columns")
        if hf_config.model_type == "qwen3_moe":
            for x in "qk":
                yield Rule(name=f"{m}self_attention.{x}_layernorm.weight", hf=(f"{h}self_attn.{x}_norm.weight",))
        if has_experts:
            fc = m + "mlp.experts.local_experts.{}."
            yield Rule(name=m + "mlp.router.weight", hf=(h + "mlp.gate.weight",))
            yield Rule(name=fc + "linear_fc1.weight", hf=(h + "mlp.experts.gate_up_proj",), cut="glu", experts=True)
            yield Rule(name=fc + "linear_fc2.weight", hf=(h + "mlp.experts.down_proj",), cut="columns", experts=True)
        else:
            gate_up = (h + "mlp.gate_proj.weight", h + "mlp.up_proj.weight")
            yield Rule(name=m + "mlp.linear_fc1.weight", hf=gate_up, cut="glu", join=lambda *t: torch.cat(t), split=lambda t: t.chunk(2))
            yield Rule(name=m + "mlp.linear_fc2.weight", hf=(h + "mlp.down_proj.weight",), cut="columns")


def load_hf_weights(model: GPTModel, hf_config, weights: Mapping[str, Tensor]) -> None:
    """Fill this rank's part of `model` (see build_gpt). weights: the state_dict of the transformers model, experts fused as in memory.

    Raises: UnsupportedError when names or shapes of the two models do not match. Collectives: none.
    """
    own = dict(model.named_parameters())
    wanted = {name: rule for rule in rules(hf_config) for name in _names(rule, model)}
    if own.keys() != wanted.keys():
        differing = sorted(own.keys() ^ wanted.keys())
        raise UnsupportedError(
            f"the model and the configuration differ in {len(differing)} parameters, first {differing[0]!r}; build it with build_gpt "
            f"(local layers, SequentialMLP experts)"
        )
    used = {name for rule in wanted.values() for name in rule.hf} | {"lm_head.weight"}
    if weights.keys() - used or used - weights.keys() - {"lm_head.weight"}:
        differing = sorted(weights.keys() ^ used)
        raise UnsupportedError(
            f"the Hugging Face weights do not fit: {len(differing)} names differ, first {differing[0]!r}; pass model.state_dict() of "
            f"transformers >= 5"
        )
    for rule in rules(hf_config):
        whole = rule.join(*(weights[name] for name in rule.hf))
        group = model.pg_collection.expt_tp if rule.experts else model.pg_collection.tp
        if rule.experts:
            num_local = len(_names(rule, model))
            whole = whole[model.pg_collection.ep.rank() * num_local :][:num_local]
        part = _cut(whole, rule, group.rank(), group.size())
        for name, piece in zip(_names(rule, model), part if rule.experts else [part], strict=True):
            if own[name].shape != piece.shape:
                raise UnsupportedError(f"{name} has shape {tuple(own[name].shape)}, the weights give {tuple(piece.shape)}")
            with torch.no_grad():
                own[name].copy_(piece)


def gather_hf_weights(model: GPTModel, hf_config) -> dict[str, Tensor]:
    """The whole model as a transformers state_dict, on every rank. Collective over the tensor- and expert-parallel groups.

    Raises: PeerError on all ranks of a group when one of them is in a forward of a cache.
    """
    own, weights = dict(model.named_parameters()), {}
    device, groups = next(iter(own.values())).device, model.pg_collection
    for group in dict.fromkeys((groups.tp, groups.expt_tp, groups.ep)):
        Exchange(group, PiKVConfig().timeout_s, device).meet("gathering the weights of the model")  # a cache may use the same group
    for rule in rules(hf_config):
        names = _names(rule, model)
        part = torch.stack([own[name].detach() for name in names]) if rule.experts else own[names[0]].detach()
        whole = _uncut(_gather(part, model.pg_collection.expt_tp if rule.experts else model.pg_collection.tp), rule)
        if rule.experts:
            whole = torch.cat(_gather(whole, model.pg_collection.ep))
        weights.update(zip(rule.hf, (t.contiguous() for t in rule.split(whole)), strict=True))
    if hf_config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return weights


def _names(rule: Rule, model: GPTModel) -> list[str]:
    if not rule.experts:
        return [rule.name]
    return [rule.name.format(j) for j in range(model.config.num_moe_experts // model.pg_collection.ep.size())]


def _dim(rule: Rule) -> int:
    return -1 if rule.cut == "columns" else -2


def _cut(whole: Tensor, rule: Rule, rank: int, size: int) -> Tensor:
    if rule.cut == "all" or size == 1:
        return whole
    halves = whole.chunk(2, _dim(rule)) if rule.cut == "glu" else [whole]
    return torch.cat([half.chunk(size, _dim(rule))[rank] for half in halves], _dim(rule))


def _uncut(parts: list[Tensor], rule: Rule) -> Tensor:
    if rule.cut == "all":
        return parts[0]
    if rule.cut != "glu":
        return torch.cat(parts, _dim(rule))
    gates, ups = zip(*(part.chunk(2, _dim(rule)) for part in parts), strict=True)
    return torch.cat([*gates, *ups], _dim(rule))


def _gather(part: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    if group.size() == 1:
        return [part]
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return parts
