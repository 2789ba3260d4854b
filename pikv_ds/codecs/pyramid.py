from collections.abc import Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from pikv_ds.codecs import CODECS
from pikv_ds.codecs.base import Heads
from pikv_ds.codecs.calibration import Calibration, Moments
from pikv_ds.codecs.linear import LinearCodec, squared_error, top_directions
from pikv_ds.codecs.maps import Linear, Transform
from pikv_ds.spec import LayerSpec


@CODECS.register("pyramid")
class Pyramid(LinearCodec):
    """A pyramid of averages over neighbouring channels (the paper's PyramidKV; not Cai et al.'s budgets per layer).

    P^l averages blocks of 2^l channels, an orthogonal projection. Stored are the D / 2^L averages of the top level, and of the details
    that lower levels add, P^(l-1) k - P^l k (Haar), the first principal directions over all levels together, up to r coefficients. What is
    lost are the other details, and r must be so large that on the calibration
        E||k - k_hat||^2 <= sum_{l=1..L} E||P^l k - k||^2 / 4^l,
    the bound of the paper's C_Py, for every layer, keys and values: a smaller rank is refused with the smallest that holds it.
    rank null: that one, for each layer and for keys and values by itself.
    Source: PiKV, arXiv 2508.06526, table 2; Haar details: Mallat, A Theory for Multiresolution Signal Decomposition, 1989.
    Bytes per token and layer: those of `store` at width r, as lora.
    """

    def __init__(
        self, *, calibration: str, rank: int | None = None, levels: int = 2, store: str = "none", group: int | None = None
    ) -> None:
        super().__init__(rank=8 if rank is None else rank, calibration=calibration, store=store, group=group)
        self.smallest = rank is None
        if not 1 <= levels <= 6:
            raise ValueError(f"levels = 1 to 6, got {levels}")
        self.levels = levels

    @classmethod
    def example(cls, samples: Sequence[Heads]) -> Self:
        """At the smallest widths."""
        return cls.on(Calibration.of([(Moments.of(heads.k, heads.q), Moments.of(heads.v)) for heads in samples]))

    def maps(self, spec: LayerSpec) -> Transform:
        for what, dim in (("k_dim", spec.k_dim), ("v_dim", spec.v_dim)):
            if dim % 2**self.levels:
                raise ValueError(f"levels = {self.levels} averages blocks of {2**self.levels} channels, and {what} is {dim}; use fewer")
        # All heads of the model decide, not those of this rank: pages of tensor-parallel ranks have the same width.
        whole = replace(spec, first_head=0, num_kv_heads=len(self.calibration.tensors[f"{spec.layer_idx}.k_mean"]))
        sides = [self._side(spec.layer_idx, name, moments) for name, moments in self._moments(whole)]
        return Transform(*(side.heads(spec.first_head, spec.num_kv_heads).to(torch.device("cpu")) for side in sides))

    def _moments(self, spec: LayerSpec) -> list[tuple[str, Moments]]:
        return [("keys", self.calibration.keys(spec)), ("values", self.calibration.values(spec))]

    def _side(self, layer_idx: int, name: str, moments: Moments) -> Linear:
        dim, bound = moments.mean.shape[1], self.bound(moments)
        for rank in range(-(-(dim >> self.levels) // 8) * 8, dim + 1, 8):
            found = self.fit(moments, rank)
            if bool((squared_error(moments, found) <= bound * (1 + 1e-9) + 1e-12).all()):
                break
        if self.smallest or rank == self.rank:
            return found
        if rank > self.rank:
            raise ValueError(
                f"rank = {self.rank} loses more of the {name} of layer {layer_idx} than sum ||P^l k - k||^2 / 4^l with {self.levels} "
                f"levels: legal is {rank} or more, or null for the smallest of each layer"
            )
        return self.fit(moments, self.rank)

    def bound(self, moments: Moments) -> Tensor:
        """sum_{l=1..L} E||P^l x - x||^2 / 4^l of every head, [H] f64."""
        eye = torch.eye(moments.mean.shape[1], dtype=torch.float64)
        residuals = [eye - averages(len(eye), level).mT @ averages(len(eye), level) for level in range(1, self.levels + 1)]
        return sum(torch.einsum("ij,hjk,ik->h", r, moments.second, r) / 4**level for level, r in enumerate(residuals, 1))

    def fit(self, moments: Moments, rank: int) -> Linear:
        dim = moments.mean.shape[1]
        top = averages(dim, self.levels)  # [D / 2^L, D], orthonormal rows
        detail = torch.eye(dim, dtype=torch.float64) - top.mT @ top  # projects onto what the top level leaves
        encode, _ = top_directions(detail @ moments.second @ detail, rank - len(top))
        encode = torch.cat([top.mT.expand(len(encode), -1, -1), encode], -1)
        return Linear(encode, encode.mT)


def averages(dim: int, level: int) -> Tensor:
    """[D / 2^l, D] f64, orthonormal rows: means of blocks of 2^l neighbours, times 2^(l/2)."""
    size = 2**level
    return torch.eye(dim // size, dtype=torch.float64).repeat_interleave(size, 1) / size**0.5
