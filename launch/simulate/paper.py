"""The terms of the PiKV paper (arXiv 2508.06526, sections 3.1 and 3.5), as it states them. None of them describes this store."""

from __future__ import annotations

import math


def rank_bytes(width_bytes: float, tokens: int, ranks: int, kept: float, capacity: float) -> float:
    """M_kv(S) = (2d / rho) (L / (G S) + K S) of a layer and rank, 3.1. width_bytes: 2d / rho, an entry in bytes."""
    return width_bytes * (tokens / (ranks * capacity) + kept * capacity)


def best_capacity(tokens: int, ranks: int, kept: float) -> float:
    """S* = sqrt(L / (K G)), where M_kv is smallest."""
    return math.sqrt(tokens / (kept * ranks))


FPGA_MHZ, FPGA_GB_PER_S, CODEC_NS = 250.0, 460.0, 0.0
"""Ours, as the paper gives no board: a usual clock, the HBM2 of an AMD Alveo U280 (its data sheet), and a codec that costs nothing."""


def fpga_us(experts: int, read_experts: int, kept: float, entry_bytes: float) -> float:
    """T = T_route + k (T_Gamma + K (T_ddr + T_codec)), 3.5: T_route = ceil(E / 16) / f, T_Gamma = 2 / f, T_ddr = 2d' / B_mem."""
    clock_us = 1 / FPGA_MHZ
    entry_us = entry_bytes / FPGA_GB_PER_S / 1e3 + CODEC_NS / 1e3
    return math.ceil(experts / 16) * clock_us + read_experts * (2 * clock_us + kept * entry_us)


def fpga_bits(experts: int, read_experts: int, kept: float, capacity: float) -> float:
    """On the chip, 3.5: E S (32 + 48) for the page table Gamma and k K S 48 for metadata; weights of a codec are not counted."""
    return experts * capacity * 80 + read_experts * kept * capacity * 48
