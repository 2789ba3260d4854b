"""A store that grows by the reference's append, and its bounds by the page_bounds under test."""

import torch

from pikv_ds.ops import library
from pikv_ds.ops.format.bound_codes import bounds_shape
from pikv_ds.ops.reference import append as ref_append
from pikv_ds.ops.reference import formats as ref_formats
from tests.ops.cases import format_of

P = 64  # page size


class Grown:
    """A store of two tables that grows in steps, with its bounds; pages come in no order."""

    def __init__(self, name, dtype, heads=2, dim=32, latent=False, seed=0, device="cpu", v_dim=None, block_size=0):
        self.device, self.block = device, [block_size] if block_size else []
        self.fmt = format_of(name, 1 if latent else heads, dim, v_dim or dim, P, latent)
        self.generator = torch.Generator().manual_seed(seed)
        self.pages = torch.full((12, self.fmt.record_bytes), 0xFF, dtype=torch.uint8)
        self.bounds = torch.full(
            (12 * P // (block_size or P), *bounds_shape(self.fmt, dtype)), -1 if dtype == torch.int8 else torch.nan, dtype=dtype
        )
        self.table = torch.randperm(12, generator=self.generator).view(2, 6)
        self.lens = [0, 0]
        self.extra = {"tail": torch.zeros(2, self.fmt.num_kv_heads, P, dim, dtype=torch.bfloat16)} if self.fmt.grouped else {}

    def step(self, count, page_bounds=library.REFERENCE["page_bounds"], scale=1.0):
        """`count` new tokens, dealt to the tables or stored elsewhere; `page_bounds` is the op under test, on `device`."""
        owner = torch.randint(3, (count,), generator=self.generator)
        slots = torch.full((count,), -1, dtype=torch.int32)
        for i, n in enumerate(owner.tolist()):
            if n < 2 and self.lens[n] < 6 * P:
                slots[i] = int(self.table[n, self.lens[n] // P]) * P + self.lens[n] % P
                self.lens[n] += 1
        k, v = (
            torch.randn(count, self.fmt.num_kv_heads, dim, generator=self.generator) * scale for dim in (self.fmt.k_dim, self.fmt.v_dim)
        )
        rows = {"tail_rows": owner.clamp_max(1).int()} if self.extra else {}
        ref_append.append(self.pages, self.fmt, k, v, torch.arange(count, dtype=torch.int32), slots, **self.extra, **rows)
        bounds = self.bounds.to(self.device)
        cache = [self.pages, slots, self.extra.get("tail"), rows.get("tail_rows")]
        page_bounds(bounds, *(None if x is None else x.to(self.device) for x in cache), *library.layout(self.fmt), *self.block)
        self.bounds = bounds.cpu()

    def keys(self, n):
        """Keys of table n as decode reads them, [H, len, D] f32."""
        length, fmt = self.lens[n], self.fmt
        used = self.pages[self.table[n, : -(-length // P)]]
        k = ref_formats.decode_pages(used, fmt)[0].transpose(0, 1).flatten(1, 2)[:, :length].clone()
        if fmt.grouped and length % fmt.group:
            k[:, length - length % fmt.group :] = self.extra["tail"][n, :, : length % fmt.group].float()
        return k
