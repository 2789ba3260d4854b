"""PiKVCache driven directly: queries, keys and values that only the row, the forward and the layer decide.

B rows, T columns, H heads, D head_dim. Rows are numbered over all ranks; with distinct requests a rank has its share of them.
"""

import torch
from torch import Tensor

from pikv_ds.cache.cache import PiKVCache
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.spec import LayerSpec
from pikv_ds.step.step import LocalStep
from tests.recorded import probe
from tests.recorded.files import with_files
from tests.recorded.result import Result

HEADS, KV_HEADS, DIM, EXPERTS = 4, 2, 16, 8
KINDS = {
    "full": {},
    "window": {"window": 20},
    "latent": {"num_kv_heads": 1, "k_dim": DIM + 8, "latent": True},
}


def spec(idx: int, kind: str) -> LayerSpec:
    return LayerSpec(layer_idx=idx, **{"num_kv_heads": KV_HEADS, "k_dim": DIM, "v_dim": DIM} | KINDS[kind])


def run(config: dict, feed: dict, group, folder) -> Result:
    """feed: layers, kinds of them; script, pairs (what, argument), see Run."""
    layers = [spec(i, kind) for i, kind in enumerate(feed["layers"])]
    made = PiKVConfig(**with_files(config, folder, layers))
    cache = PiKVCache(layers, made, num_experts=EXPERTS, dtype=torch.float32, device=torch.device("cpu"), group=group)
    return Run(cache, made, group).play(feed["script"])


class Run:
    """Plays a script. Arguments are of all rows: prefill and chunk take the new tokens of each, decode how many times, fork the row that
    each continues, crop how many tokens each loses."""

    def __init__(self, cache: PiKVCache, config: PiKVConfig, group) -> None:
        self.cache, self.true_ids = cache, config.storage.expert_ids == "true"
        self.distinct = config.storage.requests == "distinct" and group is not None
        self.rank, self.size = (group.rank(), group.size()) if group is not None else (0, 1)
        self.outputs: list[Tensor] = []
        self.forwards = 0

    def play(self, script: list[tuple[str, object]]) -> Result:
        for what, argument in script:
            getattr(self, what)(argument)
        return Result(
            outputs=self.outputs,
            kept=probe.kept(self.cache),
            numbers=probe.numbers(self.cache),
            bytes_after_reset=probe.bytes_after_reset(self.cache),
        )

    def prefill(self, num_new: list[int]) -> None:
        """New requests."""
        share = len(num_new) // self.size if self.distinct else len(num_new)
        first = self.rank * share if self.distinct else 0
        self.rows = list(range(first, first + share))
        self.lens, self.parent, self.fresh, self.touched = [0] * share, [-1] * share, True, False
        self._forward(num_new)

    def chunk(self, num_new: list[int]) -> None:
        self._forward(num_new)

    def decode(self, times: int) -> None:
        for _ in range(times):
            self._forward([1] * (max(self.rows) + 1))

    def fork(self, parents: list[int]) -> None:
        self.parent = list(parents)
        self.rows, self.lens, self.touched = list(range(len(parents))), [self.lens[i] for i in parents], True

    def crop(self, tokens: int) -> None:
        self.lens, self.touched = [n - tokens for n in self.lens], True

    def hold(self, announced: bool) -> None:
        """True: crops are announced, as in assisted decoding, until False."""
        (probe.announce_crops if announced else probe.end_crops)(self.cache)

    def _forward(self, num_new_of_all: list[int]) -> None:
        num_new = [num_new_of_all[row] for row in self.rows]
        columns, count = max(num_new), len(self.rows)
        index = torch.arange(columns) - columns
        positions = torch.stack([torch.where(index >= -n, at + index + n, -1) for at, n in zip(self.lens, num_new, strict=True)])
        identity = not self.fresh and not self.touched
        self.cache.begin_step(
            LocalStep(
                num_rows=count, num_columns=columns, num_new=num_new, parent=self.parent, keep=list(self.lens),
                positions=positions.to(torch.int32), digest=self.forwards, identity=identity, fresh=self.fresh,
            )
        )  # fmt: skip
        for layer in self.cache.layers:
            self._layer(layer, positions)
        self.cache.end_step()
        self.lens = [at + n for at, n in zip(self.lens, num_new, strict=True)]
        self.parent, self.fresh, self.touched = list(range(count)), False, False
        self.forwards += 1

    def _layer(self, layer: LayerSpec, positions: Tensor) -> None:
        q, k, v, ids = self._draw(layer, positions.shape[1])
        padding = (positions < 0)[..., None]
        k, v = (x.masked_fill(padding[..., None], torch.nan) for x in (k, v))  # what is padding must reach nothing
        partial = self.cache.attend(layer.layer_idx, q, k, v, scale=DIM**-0.5, v_dim=layer.v_dim, expert_ids=ids)
        if self.true_ids:
            self.cache.name_experts(layer.layer_idx, ids)
        self.outputs += [partial.lse.masked_fill(padding, 0), partial.out.masked_fill(padding[..., None], 0)]

    def _draw(self, layer: LayerSpec, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q [B, T, H, D], k and v [B, T, Hkv, D], expert ids [B * T]."""
        made = []
        for row in self.rows:
            generator = torch.Generator().manual_seed(1000 * row + 10 * self.forwards + layer.layer_idx)
            shapes = (HEADS, layer.k_dim), (layer.num_kv_heads, layer.k_dim), (layer.num_kv_heads, layer.stored_v_dim)
            made.append([torch.randn(columns, *shape, generator=generator) for shape in shapes])
            made[-1].append(torch.randint(EXPERTS, (columns,), generator=generator))
        q, k, v, ids = (torch.stack(side) for side in zip(*made, strict=True))
        return q, k, v, ids.flatten()
