"""The "offload" block: how much of the cache is in the device's memory, and where the rest is."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from .block import Block
from .wording import problem

EXPERTS = (
    '"scores" or "none": pages are not placed by the experts that a router will name, so these say nothing of the pages that will be read'
)


class OffloadConfig(Block):
    """Slower tiers. Pages beyond device_gib go to host memory, and from there to files; nothing is dropped, and queries read as before."""

    device_gib: float | None = Field(
        None, gt=0, description="Memory of the device for page records of a rank, in GiB; null = no tiers: all pages lie there."
    )
    host_gib: float = Field(0, ge=0, description="Host memory of a rank for pages that do not fit, in GiB.")
    nvme_path: str | None = Field(None, min_length=1, description="Folder for pages that do not fit into host_gib either.")
    nvme_gib: float = Field(0, ge=0, description="Bytes of a rank in that folder, in GiB.")
    nvme_io: Literal["threads", "async_io", "auto"] = Field(
        "threads",
        description="How files are read and written: by threads of ours through the system's page cache, past it by DeepSpeed's async_io "
        '(needs libaio), or by that where it can be had and threads elsewhere ("auto"). The files are the same.',
    )
    staging_mib: float = Field(64, gt=0, description="Memory of the device in which pages from below are read, in MiB over all layers.")
    prefetch: Literal["scores", "none", "experts"] = Field(
        "none",
        description='Pages that are fetched before a query asks: what the router scored next best in the step before ("scores"), or none. '
        '"experts" is refused in this version.',
    )

    @property
    def enabled(self) -> bool:
        return self.device_gib is not None

    @model_validator(mode="after")
    def _check(self) -> Self:
        below = self.host_gib > 0 or self.nvme_path is not None
        if below and not self.enabled:
            raise problem("offload.device_gib", None, "a number of GiB with host_gib or nvme_path: what is beyond it goes there")
        if self.enabled and not below:
            raise problem("offload.host_gib", self.host_gib, "above 0 with device_gib, or an nvme_path: pages beyond it must go somewhere")
        if (self.nvme_path is None) != (self.nvme_gib == 0):
            raise problem("offload.nvme_gib", self.nvme_gib, "above 0 with an nvme_path, and 0 without one")
        if self.prefetch == "experts":
            raise problem("offload.prefetch", self.prefetch, EXPERTS)
        if self.nvme_path is None and self.nvme_io != "threads":
            raise problem("offload.nvme_io", self.nvme_io, '"threads" without an nvme_path: there are no files')
        return self
