from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from pikv_ds.codecs import CODECS
from pikv_ds.codecs.base import Heads
from pikv_ds.codecs.calibration import Calibration, Moments
from pikv_ds.codecs.linear import LinearCodec, top_directions
from pikv_ds.codecs.maps import Linear, Transform
from pikv_ds.spec import LayerSpec

QUERIES, RATE = 64, 3e-3  # per training step; of Adam


@CODECS.register("distill")
class Distill(LinearCodec):
    """A projection of keys that was trained, so that attention over what it keeps is the attention over the keys themselves.

    Minimises KL(softmax(q K^T / sqrt(D)) || softmax(q K_hat^T / sqrt(D))), the paper's C_Dis with attention as what teacher and
    student give, over encoder and decoder of every kv head; it starts from lora_plus fitted to attention, which values keep. The decoder
    is linear, so that it folds into the query, and the encoder with it: for a linear decoder the best code of a key, in any metric, is
    linear in the key.
    The calibration is of one rank: pikv calibrate --codec distill --rank R.
    Source: PiKV, arXiv 2508.06526, table 2 (C_Dis).
    Bytes per token and layer: those of `store` at width r, as lora.
    """

    learns = True

    def __init__(self, *, rank: int, calibration: str, store: str = "none", group: int | None = None) -> None:
        super().__init__(rank=rank, calibration=calibration, store=store, group=group)  # trained on rotated keys

    @classmethod
    def learn(cls, windows: Sequence[Heads], k: Moments, rank: int, scale: float, steps: int) -> dict[str, Tensor]:
        """What calibration keeps of a layer besides its moments. windows: of consecutive tokens each; scale: of the softmax."""
        maps = train(windows, _start(k, rank), scale, steps)
        return {"distill_encode": maps.encode, "distill_decode": maps.decode}

    @classmethod
    def example(cls, samples: Sequence[Heads]) -> Self:
        moments = [(Moments.of(heads.k, heads.q), Moments.of(heads.v)) for heads in samples]
        calibration = Calibration.of(moments)
        rank = max(8, min(min(heads.k.shape[-1], heads.v.shape[-1]) for heads in samples) // 16 * 8)
        for i, (heads, (k, _)) in enumerate(zip(samples, moments, strict=True)):
            calibration.add(i, cls.learn([heads], k, rank, heads.k.shape[-1] ** -0.5, 1))
        return cls.on(calibration, rank=rank)

    def fit(self, moments: Moments, rank: int) -> Linear:
        return _start(moments, rank)

    def maps(self, spec: LayerSpec) -> Transform:
        name = f"{spec.layer_idx}.distill_encode"
        if name not in self.calibration.tensors:
            raise ValueError(
                f"calibration = a file with a distilled projection, got {self.path!r}: pikv calibrate --codec distill --rank R"
            )
        encode, decode = (self.calibration.heads(f"distill_{part}", spec) for part in ("encode", "decode"))
        if decode.shape[1] != self.rank:
            raise ValueError(f"rank = {decode.shape[1]}, for which calibration {self.path!r} was trained, got {self.rank}")
        keys = Linear(encode, decode, self.calibration.keys(spec).mean).to(torch.device("cpu"))
        return Transform(keys, self.fit(self.calibration.values(spec), self.rank).to(torch.device("cpu")))


def _start(moments: Moments, rank: int) -> Linear:
    return Linear(*top_directions(moments.covariance, rank, moments.metric), moments.mean)


def train(windows: Sequence[Heads], start: Linear, scale: float, steps: int) -> Linear:
    """Adam on the mean KL of QUERIES queries of a window in turn, chosen by a fixed seed; what did best on the first window's is kept."""
    generator = torch.Generator().manual_seed(0)
    maps = start.to(windows[0].k.device)
    best, least = maps, float("inf")
    encode, decode = (x.clone().requires_grad_() for x in (maps.encode, maps.decode))
    optimizer = torch.optim.Adam([encode, decode], lr=RATE)
    held = _queries(windows[0], generator)
    with torch.enable_grad():
        for step in range(steps + 1):
            with torch.no_grad():
                found = Linear(encode.detach().clone(), decode.detach().clone(), maps.mean)
                loss = float(attention_kl(windows[0], held, found, scale)) if step % 10 == 0 or step == steps else float("inf")
                if loss < least:
                    best, least = found, loss
            window = windows[step % len(windows)]
            optimizer.zero_grad()
            attention_kl(window, _queries(window, generator), Linear(encode, decode, maps.mean), scale).backward()
            optimizer.step()
    return best


def _queries(window: Heads, generator: torch.Generator) -> Tensor:
    """Places of the queries of a step, in the second half of the window: they see most of it."""
    length = len(window.q)
    return torch.randint(length // 2, length, (min(QUERIES, length),), generator=generator).to(window.q.device)


def attention_kl(window: Heads, places: Tensor, maps: Linear, scale: float) -> Tensor:
    """0-d: mean over queries at `places` [n] and over query heads of KL(attention over k || attention over k_hat), causal."""
    k = window.k.float()
    q = window.q[places].float().unflatten(1, (k.shape[1], -1))  # [n, H, G, D]
    hidden = torch.arange(len(k), device=k.device) > places.view(-1, 1, 1, 1)
    k_hat = torch.einsum("nhr,hrd->nhd", torch.einsum("nhd,hdr->nhr", k - maps.mean, maps.encode), maps.decode) + maps.mean
    teacher, student = (
        # Not -inf: a weight of 0 times the difference of two infinities would be NaN, in the gradient too.
        torch.einsum("nhgd,thd->nhgt", scale * q, keys).masked_fill(hidden, -1e30).log_softmax(-1)
        for keys in (k, k_hat)
    )
    return (teacher.exp() * (teacher - student)).sum(-1).mean()
