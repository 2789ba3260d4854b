from collections.abc import Sequence
from dataclasses import replace
from typing import Self

import torch

from pikv_ds.codecs import CODECS
from pikv_ds.codecs.base import Codec, Heads
from pikv_ds.codecs.linear import check_rank, record_codec, refuse_latent
from pikv_ds.codecs.maps import Linear, Transform
from pikv_ds.codecs.request_maps import leading
from pikv_ds.spec import LayerSpec


@CODECS.register("svd")
class SVD(Codec):
    """Truncated singular value decomposition of a request's own keys and values, fitted while it runs; no calibration.

    K = U S W^T of a request, layer and kv head: c = W_{1:r}^T k, k_hat = W_{1:r} c, ||K - K_hat||^2 = sum_{i>r} sigma_i^2 (the paper's
    C_SVD) for a prompt that comes in one forward. A prompt in chunks is fitted to its first chunk, and again whenever the request has
    doubled, up to `fit_tokens` tokens; what is stored is rebased and loses what the old one had not kept
    (pikv_ds/tiers/bases.py). Requests that are forked keep their basis.
    Source: PiKV, arXiv 2508.06526, table 2; of keys and values as they come: Eckart and Young, 1936.
    Bytes per token and layer: those of `store` at width r, and per request 8 r head_dim num_kv_heads for its bases, with as much again
    times head_dim / r for its sums until they are fixed.
    """

    per_request = True

    def __init__(self, *, rank: int, store: str = "none", group: int | None = None, fit_tokens: int = 1024) -> None:
        check_rank(rank)
        if fit_tokens < 1:
            raise ValueError(f"fit_tokens = 1 or more, got {fit_tokens}")
        self.rank, self.record, self.fit_tokens = rank, record_codec(store, group), fit_tokens
        self.group = self.record.group

    @classmethod
    def example(cls, samples: Sequence[Heads]) -> Self:
        """At half the width."""
        return cls(rank=max(8, min(min(heads.k.shape[-1], heads.v.shape[-1]) for heads in samples) // 16 * 8))

    @property
    def preferred_page_size(self) -> int:
        return self.record.preferred_page_size

    def format_name(self, dtype: torch.dtype) -> str:
        return self.record.format_name(dtype)

    def stored(self, spec: LayerSpec) -> LayerSpec:
        refuse_latent(self.name, spec)
        for what, dim in (("k_dim", spec.k_dim), ("v_dim", spec.v_dim)):
            if self.rank > dim:
                raise ValueError(f"rank = {self.rank} is larger than {what} = {dim} (head_dim): legal is a multiple of 8 up to {dim}")
        return replace(spec, k_dim=self.rank, v_dim=self.rank)

    def request_bytes(self, spec: LayerSpec) -> int:
        return 4 * spec.num_kv_heads * self.rank * (spec.k_dim + spec.v_dim)  # of settled bases, f32

    def request_maps(self, spec: LayerSpec, heads: Heads) -> Transform:
        bases = (leading(torch.einsum("nhi,nhj->hij", x.double(), x.double()), self.rank) for x in (heads.k, heads.v))
        return Transform(*(Linear(basis, basis.mT) for basis in bases))

    def declared_errors(self, spec: LayerSpec, page_size: int, dtype: torch.dtype) -> tuple[float, float]:
        """What any request may lose: a projection never more than all, and the record's rounding."""
        fmt, rounding = self.page_format(spec, page_size, dtype), torch.finfo(dtype).eps
        return 1 + fmt.k_rel_error + rounding, 1 + fmt.v_rel_error + rounding
