"""The decode steps that the gate times: the real path on few and narrow layers, where the Python of a step shows in its time.

The worker imports this file from beside it, against either tree. So it uses only names that both have: pikv_ds.attach, PiKVConfig,
pikv_ds.cache.PiKVCache, pikv_ds.plan.LocalStep, pikv_ds.spec.LayerSpec and pikv_ds.bundled. torch is imported late: the gate itself only
reads the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

HEADS, GROUP, DIM = 2, 4, 32  # of the layers of `routed` and `distinct`: KV heads, query heads per KV head, width
DRAWN = 64  # different tokens that they decode, in turns

Step = Callable[[], Any]  # runs one decode step; returns its output, an f32 tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """open: builds the model or the cache and fills it."""

    what: str
    ranks: int
    open: Callable[[], AbstractContextManager[Step]]


@contextmanager
def exact() -> Iterator[Step]:
    """The bundled model, attached: all of 1,024 tokens of a text in f32, and then the text goes on."""
    import torch

    import pikv_ds
    from pikv_ds import bundled

    model, tokenizer = bundled.load()
    text = tokenizer(bundled.evaluation_text()[:60_000], add_special_tokens=False, verbose=False)
    ids, at = torch.tensor([text["input_ids"]]), count(1024)

    def step() -> torch.Tensor:
        token = next(at) % ids.shape[1]
        return model(ids[:, token : token + 1], past_key_values=cache).logits

    with torch.inference_mode(), pikv_ds.attach(model) as cache:
        model(ids[:, :1024], past_key_values=cache)
        yield step


@contextmanager
def routed() -> Iterator[Step]:
    """The core alone: int8 entries of 4,096 tokens, of which a query reads 24 pages that their bounds choose."""
    import torch

    block = {"compression": {"method": "int8"}, "routing": {"method": "bounds", "budget_pages": 24}}
    with torch.inference_mode():
        yield _core_step(block, layers=8, tokens=4096)


@contextmanager
def distinct() -> Iterator[Step]:
    """The core on two ranks, a request each, one token apart: h2o watches every query and one of both evicts a page in every step."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    scheduling = {"method": "h2o", "budget_tokens": 256}
    block = {"page_size": 2, "timeout_s": 60, "storage": {"requests": "distinct"}, "scheduling": scheduling}
    with torch.inference_mode():
        yield _core_step(block, layers=2, tokens=512 + rank, group=dist.group.WORLD, seed=rank)


DECODES = {
    "exact": Decode(what="attached model, 4 layers, nothing left out", ranks=1, open=exact),
    "routed": Decode(what="core, 8 layers, int8 and the router bounds", ranks=1, open=routed),
    "distinct": Decode(what="core, 2 layers, 2 ranks, own requests, h2o", ranks=2, open=distinct),
}


def _core_step(block: dict, *, layers: int, tokens: int, group=None, seed: int = 0) -> Step:
    """A step of a PiKVCache that holds `tokens` random entries of one request."""
    import torch

    from pikv_ds import PiKVConfig
    from pikv_ds.cache import PiKVCache
    from pikv_ds.spec import LayerSpec

    generator = torch.Generator().manual_seed(seed)
    specs = [LayerSpec(layer_idx=i, num_kv_heads=HEADS, k_dim=DIM, v_dim=DIM) for i in range(layers)]
    cache = PiKVCache(specs, PiKVConfig(**block), num_experts=8, dtype=torch.float32, device=torch.device("cpu"), group=group)

    def draw(length: int) -> list[torch.Tensor]:
        """q, k, v [1, length, heads, DIM]."""
        return [torch.randn(1, length, heads, DIM, generator=generator) for heads in (HEADS * GROUP, HEADS, HEADS)]

    _forward(cache, *draw(tokens), stored=0)
    drawn, at = [draw(1) for _ in range(DRAWN)], count(tokens)

    def step() -> torch.Tensor:
        stored = next(at)
        return _forward(cache, *drawn[stored % DRAWN], stored=stored)

    return step


def _forward(cache, q, k, v, *, stored: int):
    """One forward of one request, `stored` tokens of which came before. Returns the last layer's output [1, T, Hq, DIM]."""
    import torch

    from pikv_ds.plan import LocalStep

    tokens = k.shape[1]
    positions = torch.arange(stored, stored + tokens, dtype=torch.int32).unsqueeze(0)
    cache.begin_step(
        LocalStep(
            num_rows=1, num_columns=tokens, num_new=[tokens], parent=[0 if stored else -1], keep=[stored], positions=positions,
            digest=0, identity=stored > 0, fresh=stored == 0,
        )
    )  # fmt: skip
    for layer in range(len(cache.layers)):
        out = cache.attend(layer, q, k, v, scale=DIM**-0.5, v_dim=DIM, expert_ids=None)[0]
    cache.end_step()
    return out
