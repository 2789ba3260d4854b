import torch
from torch import Tensor

from pikv_ds.pages.pool import PagePool
from pikv_ds.pages.rows import RowColumn, Rows
from pikv_ds.routers import ROUTERS
from pikv_ds.routers.base import NewEntries, PageChange, PageQuery, Router

SUMMARY = "clusters"
FIRST_ROUNDS = 4  # of k-means over the first forward of a row; later keys move the centroids once
NUMBERS_AT_ONCE = 1 << 24  # of the distances of new keys to centroids


@ROUTERS.register("centroids")
class KeyCentroids(Router):
    """Pages by how many of their keys lie in which cluster of the request's post-RoPE keys: a gate on key geometry.

    score = sum over the query heads g of a kv head of  sum_c n_c exp(scale q_g mu_c) / Z_g,  the share of attention that a page would hold
    if every key were the centroid of its cluster; n_c = keys of the page in cluster c, Z_g the same sum over all entries.
    Clusters per row, layer and kv head by online k-means (MacQueen): seeded by equal stretches of the first forward, four rounds over it,
    then each forward moves the centroids once. A page keeps the counts of the clusters as they were when its keys came.
    Bytes per page and layer: num_kv_heads * clusters * 2; as metadata, which does not grow with the context, per request, layer and rank
    num_kv_heads * clusters * (k_dim + 1) * 4.
    """

    summarises = True
    whole_forwards = True  # the first one seeds the clusters

    def __init__(self, *, clusters: int = 16) -> None:
        if not 2 <= clusters <= 256:
            raise ValueError(f"clusters from 2 to 256, got {clusters}")
        self.clusters = clusters
        self.mean: dict[int, RowColumn] = {}  # layer -> [R, H, K, D] f32
        self.weight: dict[int, RowColumn] = {}  # layer -> [R, H, K] f32, keys so far
        self.seeded: dict[int, RowColumn] = {}  # layer -> [R] int64, positions below it seed the clusters; 0 = nothing seen
        self.seen: dict[int, int] = {}  # layer -> the version of the rows whose keys it has: in another one some row may be new

    def open(self, layer: int, pool: PagePool, num_shards: int, rows: Rows) -> None:
        self.rows, num_heads = rows, pool.fmt.num_kv_heads
        pool.add_summary(SUMMARY, (num_heads, self.clusters), torch.int16)
        self.mean[layer] = rows.tensor(f"{layer}.mean", (num_heads, self.clusters, pool.reader.k_dim))
        self.weight[layer] = rows.tensor(f"{layer}.weight", (num_heads, self.clusters))
        self.seeded[layer] = rows.tensor(f"{layer}.seeded", (), torch.int64)
        self.seen.pop(layer, None)

    def wrote(self, layer: int, pool: PagePool, new: NewEntries) -> None:
        """The clusters take in the keys of all shards: every rank computes the same ones."""
        k, own = new.k.float().masked_fill(~new.valid.view(-1, 1, 1), 0), self._seeds_or_nearest(layer, new)
        before = self.mean[layer].value, self.weight[layer].value
        self._take_in(layer, k, own, new, before)
        for _ in range(0 if self.seen.get(layer) == self.rows.version else FIRST_ROUNDS):
            own = self._nearest(layer, k, new.rows)
            self._take_in(layer, k, own, new, before)
        self.seen[layer] = self.rows.version
        _count_in(pool.summaries[SUMMARY], new.slot_mapping, own, pool.page_size)

    def rebuilt(self, layer: int, pool: PagePool, change: PageChange) -> None:
        """Pages of another pool are counted in the clusters as they are now. In another basis means are linear in the keys, and which
        cluster a key was counted in stays."""
        if change.basis is None:
            new = change.entries
            _count_in(pool.summaries[SUMMARY], new.slot_mapping, self._nearest(layer, new.k, new.rows), pool.page_size)
        else:
            (rows, by), mean = change.basis, self.mean[layer].value
            mean[rows] = torch.einsum("nhkr,nhrs->nhks", mean[rows], by)

    def _seeds_or_nearest(self, layer: int, new: NewEntries) -> Tensor:
        """[N, H] int64 cluster of each key."""
        seeded, positions = self.seeded[layer].value, new.positions.to(torch.int64).clamp_min(0)
        after = torch.zeros_like(seeded).scatter_reduce_(0, new.rows, torch.where(new.valid, positions + 1, 0), "amax")
        seeded.copy_(torch.where((seeded == 0) & (after > 0), after.clamp_min(self.clusters), seeded))
        until = seeded[new.rows]
        seed = (positions * self.clusters // until.clamp_min(1)).unsqueeze(1)
        near = self._nearest(layer, new.k.float(), new.rows)
        return torch.where((positions < until).unsqueeze(1), seed, near)

    def _nearest(self, layer: int, k: Tensor, rows: Tensor) -> Tensor:
        """[N, H] int64: the nearest centroid that has keys."""
        mean, weight, found = self.mean[layer].value, self.weight[layer].value, []
        bias = torch.where(weight > 0, -0.5 * mean.square().sum(-1), -torch.inf)  # max of k mu - mu^2 / 2
        step = max(1, NUMBERS_AT_ONCE // mean[:1].numel())
        for begin in range(0, k.shape[0], step):
            row = rows[begin : begin + step]
            found.append((torch.einsum("nhd,nhkd->nhk", k[begin : begin + step], mean[row]) + bias[row]).argmax(-1))
        return torch.cat(found)

    def _take_in(self, layer: int, k: Tensor, own: Tensor, new: NewEntries, before: tuple[Tensor, Tensor]) -> None:
        """Means of the keys before and the new ones."""
        mean, weight = before
        num_rows, num_heads, clusters, dim = mean.shape
        head = torch.arange(num_heads, device=k.device)
        cell = ((new.rows.unsqueeze(1) * num_heads + head) * clusters + own).flatten()
        count = new.valid.unsqueeze(1).expand(-1, num_heads).flatten().to(torch.float32)
        total = weight.flatten().index_add(0, cell, count)
        sums = (mean * weight.unsqueeze(-1)).view(-1, dim).index_add(0, cell, k.reshape(-1, dim))
        self.mean[layer].value = (sums / total.clamp_min(1).unsqueeze(-1)).view(mean.shape)
        self.weight[layer].value = total.view(weight.shape)

    def score(self, asked: PageQuery) -> Tensor:
        row, counts = asked.row_of_query(), asked.pool.summaries[SUMMARY]
        mean, weight = self.mean[asked.layer].value[row], self.weight[asked.layer].value[row]  # [Q, H, K, D], [Q, H, K]
        q = asked.q.float().unflatten(1, (mean.shape[1], -1))
        logits = asked.scale * torch.einsum("qhgd,qhkd->qhgk", q, mean)
        logits = logits.masked_fill((weight == 0).unsqueeze(2), -torch.inf)
        share = (logits + weight.clamp_min(1).log().unsqueeze(2)).softmax(-1).nan_to_num(0.0)  # of the attention, by cluster
        each = (share / weight.clamp_min(1).unsqueeze(2)).sum(2)  # [Q, H, K] of one key, summed over the heads of the group
        if not counts.shape[0]:
            return torch.zeros_like(asked.block_table, dtype=torch.float32)
        page = torch.where(asked.visible.flatten(0, 1), asked.block_table.squeeze(1), 0)
        held = counts[page].float()  # [N, C, H, K]
        return torch.einsum("nchk,nhk->nhc", held, each.repeat_interleave(page.shape[0] // each.shape[0], 0))


def _count_in(counts: Tensor, slot_mapping: Tensor, own: Tensor, page_size: int) -> None:
    """Add keys to the counts [P, H, K] of their pages; a page whose first slot is among them starts at 0."""
    num_pages = counts.shape[0]
    if not num_pages:
        return
    here = slot_mapping >= 0
    page = torch.where(here, slot_mapping // page_size, 0).to(torch.int64)
    opened = torch.zeros(num_pages + 1, dtype=torch.bool, device=page.device)
    opened[torch.where(here & (slot_mapping % page_size == 0), page, num_pages)] = True
    counts[page] = torch.where(opened[page].view(-1, 1, 1), 0, counts[page])
    head = torch.arange(own.shape[1], device=page.device)
    counts.index_put_((page.unsqueeze(1), head, own), here.to(counts.dtype).unsqueeze(1).expand_as(own), accumulate=True)
