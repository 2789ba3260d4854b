"""The "offload" block: the tiers of every layer of a rank, their stores, and what has passed between them."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

from pikv_ds.blueprint.blueprint import Blueprint
from pikv_ds.config.blocks import Blocks
from pikv_ds.errors import UnsupportedError
from pikv_ds.ops import PageFormat
from pikv_ds.pages.far import FarStore, LayerTier
from pikv_ds.pages.pool import PagePool
from pikv_ds.pages.tiered import TieredPool

from .file_io import served
from .file_store import FileStore
from .folder import Folder
from .host_store import HostStore
from .two_stores import TwoStores


class Offload:
    """Owns the stores and the thread that reads them."""

    def __init__(self, blueprint: Blueprint, config: Blocks, device: torch.device, rank: int) -> None:
        """Raises: UnsupportedError for a device whose tiers are not available."""
        block, scheduling, policy = config.offload, config.scheduling, blueprint.policy
        if device.type != "cpu":
            raise UnsupportedError(
                f"pikv.offload.device_gib = {block.device_gib} with a cache on {device}: which pages are staged is decided on the host, "
                f"which would stop a device in every layer; this version has tiers on the CPU only; set device_gib to null"
            )
        self.sizes, self.block = blueprint.tier, block
        self.io = None if block.nvme_path is None else served(block.nvme_io)
        """The way of files, of FILE_IO; None: there are none."""
        self._folder = None if block.nvme_path is None else Folder(block.nvme_path, rank)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pikv-offload")
        self.tiers = {
            i: LayerTier(
                num_near=self.sizes.num_near, num_staged=self.sizes.num_staged, store=self._store(i, plan.pools[0].fmt),
                thread=self._thread, score=None if policy.keeps_all else policy.score, sink_tokens=scheduling.sink_tokens,
                recent_tokens=scheduling.recent_tokens, by_scores=block.prefetch == "scores",
            )
            for i, plan in enumerate(blueprint.pages.layers)
            if plan.spec.window is None
        }  # fmt: skip

    def _store(self, layer: int, fmt: PageFormat) -> FarStore:
        host = HostStore(fmt.record_bytes, self.sizes.num_host)
        if self._folder is None:
            return host
        file = FileStore(
            self._folder.path / f"layer{layer}.pages", fmt.record_bytes, self.sizes.num_file, self.io,
            sections=fmt.num_kv_heads, section_bytes=fmt.head.end,
        )  # fmt: skip
        return TwoStores(host, file) if self.sizes.num_host else file

    def numbers(self, pools: Iterable[PagePool]) -> dict[str, int]:
        """What stats() says of tiers: bytes now, and pages since the last generation began.

        staging: its bound, which it never leaves; far: bytes of records below; pages_wanted: far pages that were asked for, pages_missed:
        those of them that were not staged (a head's each where heads choose their own); fetched_bytes: what came into staging, ahead or
        not; pages_ahead: fetched before they were asked for, pages_used_ahead: those of them that were asked for.
        """
        tiered = [pool for pool in pools if isinstance(pool, TieredPool)]
        found = {
            "near_bytes": sum(pool.tier.num_near * pool.fmt.record_bytes for pool in tiered),
            "staging_bytes": sum(pool.staging_nbytes for pool in tiered),
            "far_bytes": sum(pool.num_far * pool.fmt.record_bytes for pool in tiered),
            "host_bytes": sum(tier.store.nbytes for tier in self.tiers.values()),
            "pages_wanted": sum(pool.staged.wanted for pool in tiered),
            "pages_missed": sum(pool.staged.fetched for pool in tiered),
            "fetched_bytes": sum(pool.bytes_fetched for pool in tiered),
            "pages_ahead": sum(pool.staged.ahead for pool in tiered),
            "pages_used_ahead": sum(pool.staged.used_ahead for pool in tiered),
        }
        return {f"offload_{name}": value for name, value in found.items()}
