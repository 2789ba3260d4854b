import torch
from torch import Tensor

from pikv_ds.codecs.weights import read_weights
from pikv_ds.errors import ConfigError
from pikv_ds.pages.pool import PagePool
from pikv_ds.pages.rows import Rows
from pikv_ds.routers import ROUTERS
from pikv_ds.routers.base import PageQuery
from pikv_ds.routers.shard_router import ShardRouter
from pikv_ds.spec import LayerSpec


@ROUTERS.register("learned")
class LearnedGate(ShardRouter):
    """Shards by a gate that was fitted elsewhere (the paper's R_A; inference only).

    g = W_layer q, q all query heads in a row. `path`: safetensors file with "gate" [num_layers, num_shards, num_q_heads * head_dim]. Its
    shards are those of the cache: a gate fits one placement and one num_shards.
    Source: PiKV, arXiv 2508.06526, table 1.
    """

    reads_model_queries = True

    def __init__(self, *, path: str, top_k: int = 1) -> None:
        super().__init__(top_k=top_k)
        self.path = path
        self.gate = read_weights(path, {"gate": ("num_layers", "num_shards", "num_q_heads * head_dim")})["gate"].float()

    def check(self, layers: list[LayerSpec], num_shards: int) -> None:
        for layer in range(len(layers)):
            if layer >= self.gate.shape[0] or num_shards != self.gate.shape[1]:
                raise ConfigError(
                    f"pikv.routing.path = {self.path!r} holds a gate of {self.gate.shape[0]} layers and {self.gate.shape[1]} shards; this "
                    f"cache has layer {layer} and {num_shards} shards (pikv.storage.num_shards): use a gate fitted for them"
                )

    def open(self, layer: int, pool: PagePool, num_shards: int, rows: Rows) -> None:
        super().open(layer, pool, num_shards, rows)
        self.gate = self.gate.to(pool.device)

    def logits(self, asked: PageQuery) -> Tensor:
        q, gate = asked.q.float().flatten(1), self.gate[asked.layer]
        if q.shape[1] != gate.shape[1]:
            raise ConfigError(
                f"pikv.routing.path = {self.path!r} holds a gate of width {gate.shape[1]}; the queries of layer {asked.layer} have "
                f"{q.shape[1]} numbers (query heads x head_dim, of this tensor-parallel rank)"
            )
        empty = self.counts[asked.layer].value[asked.row_of_query()] == 0
        return (q @ gate.T).masked_fill(empty, -torch.inf)
