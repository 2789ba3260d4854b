import torch
from torch import Tensor

from pikv_ds.policies import POLICIES
from pikv_ds.policies.base import Pages, TokenPolicy


@POLICIES.register("expected_attention")
class ExpectedAttention(TokenPolicy):
    """Keep what queries to come can be expected to attend to, if they are distributed like those so far.

    mu, C: mean and covariance of the queries before RoPE, from position `skip` on, each rotated by the mean rotation of the next `horizon`
        positions. a_h(entry) = softmax over entries of (mu_h k / sqrt(d) + k C_h k / 2 d)
    score(entry) = ||v||_2 mean over query heads of a_h; a page has the mean of its entries.

    Queries reach the cache rotated and are rotated back by their positions: `rope_theta` must be the model's, with all k_dim channels
    rotated in halves (Llama, Qwen, Mixtral). Reads keys and values back at each eviction; keeps Hq (k_dim + 1) k_dim numbers per request
    and layer.
    Source: Devoto et al., Expected Attention, arXiv 2510.00636; kvpress ExpectedAttentionPress.
    """

    observes_queries = True
    reads_model_queries = True  # to rotate them back by their positions
    needs_one_shard = True  # the softmax runs over all entries of a request

    def __init__(self, *, rope_theta: float = 10_000.0, horizon: int = 512, skip: int = 4) -> None:
        if rope_theta <= 1 or horizon < 1 or skip < 0:
            raise ValueError(f"rope_theta > 1, horizon >= 1, skip >= 0, got {rope_theta}, {horizon}, {skip}")
        self.rope_theta, self.horizon, self.skip = rope_theta, horizon, skip

    def row_values(self, num_q_heads: int, k_dim: int) -> dict[str, tuple[int, ...]]:
        return {"count": (), "sum": (num_q_heads, k_dim), "outer": (num_q_heads, k_dim, k_dim)}

    def observe_queries(self, rows: dict[str, Tensor], q: Tensor, lse: Tensor, positions: Tensor) -> None:
        counted = positions >= self.skip
        cos, sin = self._angles(positions, q.shape[-1])
        x, y = q.chunk(2, -1)
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
        q = torch.where(counted[..., None, None], torch.cat([x * cos + y * sin, y * cos - x * sin], -1), 0)
        rows["count"] += counted.sum(1)
        rows["sum"] += q.sum(1)
        rows["outer"] += torch.einsum("rthi,rthj->rhij", q, q)

    def entry_scores(self, pages: Pages) -> Tensor:
        mean, covariance = self._future(pages)
        k = pages.keys  # [R, S, C, Hkv, page_size, Dk]
        heads = k.shape[3]
        mean, covariance = mean.unflatten(1, (heads, -1)), covariance.unflatten(1, (heads, -1))
        logit = torch.einsum("rhgd,rschpd->rhgscp", mean, k)  # queries are scaled, so are mean and covariance
        logit += torch.einsum("rschpi,rhgij,rschpj->rhgscp", k, covariance, k) / 2
        real = pages.filled & (pages.slot_positions >= self.skip)
        logit = torch.where(real[:, None, None], logit, -torch.inf).flatten(3)
        share = torch.where(real[:, None, None].flatten(3), logit.softmax(-1), 0).unflatten(-1, real.shape[1:])
        norm = torch.linalg.vector_norm(pages.values, dim=-1).permute(0, 3, 1, 2, 4)  # [R, Hkv, S, C, page_size]
        return (share.mean(2) * norm).mean(1)

    def _future(self, pages: Pages) -> tuple[Tensor, Tensor]:
        """mu [R, Hq, Dk] and C [R, Hq, Dk, Dk], rotated to the positions to come."""
        rows = pages.rows
        count = rows["count"].clamp_min(1)
        mean = rows["sum"] / count[:, None, None]
        covariance = rows["outer"] / count[:, None, None, None] - mean.unsqueeze(-1) * mean.unsqueeze(-2)
        ahead = pages.lens.unsqueeze(1) + torch.arange(self.horizon, device=mean.device)
        cos, sin = (x.mean(1) for x in self._angles(ahead, mean.shape[-1]))
        half, rotation = cos.shape[1], torch.cat([cos, cos], -1).diag_embed()
        rotation[:, :half, half:] -= sin.diag_embed()
        rotation[:, half:, :half] += sin.diag_embed()
        return torch.einsum("rij,rhj->rhi", rotation, mean), torch.einsum("rik,rhkl,rjl->rhij", rotation, covariance, rotation)

    def _angles(self, positions: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """cos and sin [..., dim / 2] of the rotation at each position."""
        rate = self.rope_theta ** -(torch.arange(0, dim, 2, device=positions.device).float() / dim)
        angle = positions.clamp_min(0).float().unsqueeze(-1) * rate
        return angle.cos(), angle.sin()
