"""The tiny Qwen3 decoder with its MLPs replaced by DeepSpeed's own MoE layers: the same weights whatever the expert-parallel size."""

import torch
from deepspeed.moe.layer import MoE
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.tiny_models import COMMON, tiny_model

NUM_EXPERTS = 4


class Expert(nn.Module):
    def __init__(self, width: int = COMMON["hidden_size"], inner: int = 32) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.up(x)))


class MoEMLP(nn.Module):
    """DeepSpeed's layer returns (output, loss, counts); a decoder layer wants the output."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.moe = MoE(COMMON["hidden_size"], Expert(), num_experts=NUM_EXPERTS, **options)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.moe(hidden)[0]


# What makes routing in inference a function of the token: nothing is dropped, nothing is drawn, and one token is enough.
EXACT = dict(drop_tokens=False, use_rts=False, top2_2nd_expert_sampling=False, min_capacity=0)


def moe_model(k: int, ep_size: int = 1, rank: int = 0, **options) -> PreTrainedModel:
    """With ep_size > 1, `rank` holds the experts rank * E / ep_size ... of the same model."""
    model = tiny_model("qwen3_dense")
    per_rank = NUM_EXPERTS // ep_size
    for i, layer in enumerate(model.model.layers):
        mlp = MoEMLP(k=k, ep_size=ep_size, **{**EXACT, **options})
        draw = torch.Generator().manual_seed(100 + i)
        drawn = lambda shape, std: torch.randn(shape, generator=draw) * std  # noqa: B023, E731
        mlp.moe.deepspeed_moe.gate.wg.weight.data = drawn((NUM_EXPERTS, COMMON["hidden_size"]), 0.3)
        for expert in range(NUM_EXPERTS):
            weights = [drawn((32, COMMON["hidden_size"]), 0.2), drawn((COMMON["hidden_size"], 32), 0.2)]
            if expert // per_rank == rank:
                own = mlp.moe.deepspeed_moe.experts.deepspeed_experts[expert % per_rank]
                own.up.weight.data, own.down.weight.data = weights
        layer.mlp = mlp
    return model.eval()


def gates(model: PreTrainedModel) -> list[nn.Module]:
    return [layer.mlp.moe.deepspeed_moe.gate for layer in model.model.layers]


def routed_experts(output: tuple) -> Tensor:
    """[T] the expert of the largest weight that a TopKGate routed to. Sparse routes came with DeepSpeed 0.19.4; before that [T, E, C]."""
    if len(output) == 7:
        return output[3].gather(0, output[5].argmax(0, keepdim=True))[0].long()
    return output[1].sum(2).argmax(1)
