from typing import Literal

import torch
from torch import Tensor

from pikv_ds.codecs import CODECS
from pikv_ds.codecs.calibration import Moments
from pikv_ds.codecs.linear import LinearCodec, top_directions
from pikv_ds.codecs.maps import Linear, Transform
from pikv_ds.spec import LayerSpec


@CODECS.register("chunk_pca")
class ChunkPCA(LinearCodec):
    """Principal components of blocks of neighbouring channels (the paper's ChunkKV; not Liu et al.'s eviction of chunks of tokens).

    Each block of `block` channels keeps its first r block / D components around its mean: E||k - k_hat||^2 = sum over blocks of
    sum_{i>r_block} of the eigenvalues of the block's covariance. Its maps are block-diagonal: D / block times fewer numbers than lora's.
    Source: PiKV, arXiv 2508.06526, table 2 (C_Ch).
    Bytes per token and layer: those of `store` at width r, as lora.
    """

    def __init__(
        self,
        *,
        rank: int,
        calibration: str,
        store: str = "none",
        group: int | None = None,
        rope: Literal["post", "pre"] = "post",
        block: int = 16,
    ) -> None:
        super().__init__(rank=rank, calibration=calibration, store=store, group=group, rope=rope)
        if block < 1:
            raise ValueError(f"block = 1 or more channels, got {block}")
        self.block = block

    def maps(self, spec: LayerSpec) -> Transform:
        for what, dim in (("k_dim", spec.k_dim), ("v_dim", spec.v_dim)):
            if dim % self.block or self.rank * self.block % dim:
                fits = [b for b in range(1, dim + 1) if dim % b == 0 and self.rank * b % dim == 0]
                raise ValueError(
                    f"block = {self.block} cuts {what} = {dim} and rank = {self.rank} into {dim / self.block:g} blocks of "
                    f"{self.rank * self.block / dim:g} components: legal are {', '.join(map(str, fits))}"
                )
        return super().maps(spec)

    def fit(self, moments: Moments, rank: int) -> Linear:
        size, dim = self.block, moments.mean.shape[1]
        own = rank * size // dim
        blocks = [top_directions(moments.covariance[:, at : at + size, at : at + size], own) for at in range(0, dim, size)]
        encode, decode = (_block_diagonal([block[side] for block in blocks]) for side in (0, 1))
        return Linear(encode, decode, moments.mean)


def _block_diagonal(blocks: list[Tensor]) -> Tensor:
    """[H, sum a, sum b] of blocks [H, a, b]."""
    return torch.stack([torch.block_diag(*heads) for heads in zip(*blocks, strict=True)])
