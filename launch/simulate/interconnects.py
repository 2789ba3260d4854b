"""Named interconnects, each number with its source, and how long a collective takes on one at least. G ranks, r of them in a node."""

from __future__ import annotations

from dataclasses import dataclass

_NCCL = "NCCL src/graph/tuning.cc, ring with LL: base 6.6, hops 0.6 (NVLink), 1.0 (PCI), 2.7 (network)"
NCCL_BASE_US, NVLINK_US, PCI_US, NETWORK_US = 6.6, 0.6, 1.0, 2.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Interconnect:
    """Bandwidths in GB/s (1e9 bytes) of one rank and direction, as data sheets give them: no protocol, no contention."""

    ranks_per_node: int
    inner_gb_per_s: float
    outer_gb_per_s: float
    inner_us: float
    outer_us: float
    memory_gb_per_s: float
    """Of the device that goes with it."""
    source: str

    def nodes(self, ranks: int) -> int:
        return -(-ranks // self.ranks_per_node)

    def all_gather_us(self, ranks: int, block_bytes: float) -> float:
        """A ring, in which a node's ranks share what comes from other nodes. Every rank brings `block_bytes`."""
        if ranks == 1:
            return 0.0
        nodes, here = self.nodes(ranks), min(ranks, self.ranks_per_node)
        hops = (ranks - nodes) * self.inner_us + (nodes - 1) * self.outer_us
        inside = (ranks - 1) * block_bytes / self.inner_gb_per_s if here > 1 else 0.0
        outside = (ranks - here) * block_bytes / here / self.outer_gb_per_s
        return NCCL_BASE_US + hops + max(inside, outside) / 1e3

    def all_to_all_us(self, ranks: int, block_bytes: float) -> float:
        """Messages straight to every other rank, all at once. Every rank has `block_bytes` for each."""
        if ranks == 1:
            return 0.0
        here = min(ranks, self.ranks_per_node)
        inside = (here - 1) * block_bytes / self.inner_gb_per_s
        outside = (ranks - here) * block_bytes / self.outer_gb_per_s
        return NCCL_BASE_US + (self.outer_us if ranks > here else self.inner_us) + max(inside, outside) / 1e3


INTERCONNECTS = {
    "h100-ndr": Interconnect(
        ranks_per_node=8, inner_gb_per_s=450, outer_gb_per_s=50, inner_us=NVLINK_US, outer_us=NETWORK_US, memory_gb_per_s=3350,
        source=f"NVIDIA H100 SXM data sheet: NVLink 900 GB/s both ways, memory 3.35 TB/s; ConnectX-7 400 Gb/s per GPU; {_NCCL}",
    ),
    "a100-hdr": Interconnect(
        ranks_per_node=8, inner_gb_per_s=300, outer_gb_per_s=25, inner_us=NVLINK_US, outer_us=NETWORK_US, memory_gb_per_s=2039,
        source=f"NVIDIA A100 80GB SXM data sheet: NVLink 600 GB/s both ways, memory 2,039 GB/s; ConnectX-6 200 Gb/s per GPU; {_NCCL}",
    ),
    "gb200-nvl72": Interconnect(
        ranks_per_node=72, inner_gb_per_s=900, outer_gb_per_s=50, inner_us=NVLINK_US, outer_us=NETWORK_US, memory_gb_per_s=8000,
        source=f"NVIDIA GB200 NVL72 data sheet: NVLink 1.8 TB/s both ways, memory 8 TB/s; ConnectX-7 400 Gb/s per GPU; {_NCCL}",
    ),
    "pcie5-100gbe": Interconnect(
        ranks_per_node=8, inner_gb_per_s=63, outer_gb_per_s=12.5, inner_us=PCI_US, outer_us=NETWORK_US, memory_gb_per_s=864,
        source=f"PCI Express 5.0 x16: 63 GB/s each way; 100 Gb/s Ethernet per GPU; NVIDIA L40S data sheet: memory 864 GB/s; {_NCCL}",
    ),
}  # fmt: skip
