"""The source paper's model of a decode step, fitted to measured steps: T = (d k B / rho) (2 / beta + eta / gamma), eta <= 2.

d: KV width, k: entries read per request, B: requests, rho: how many times smaller than 2 bytes per element K and V are stored. With
S = 4 d k B / rho, the stored bytes of K and V that a step reads, and beta, gamma in bytes/s of them:

    T = S / beta + (eta / 2) S / gamma

beta is the memory's bandwidth, gamma the rate at which codes become numbers; eta = 0 for raw entries and at most 2, K and V decoded once
each. `paper`: that, with eta = 2 for every format that is decoded. `extended`: eta for each format by itself, 2 for the slowest, and a time
per step and per request that the paper's form has no place for.

Least squares of the relative errors, (fitted - measured) / measured, with no negative coefficient.
Source: PiKV, arXiv 2508.06526, section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from statistics import median
from typing import Any, NamedTuple

ETA_MAX = 2.0


class Point(NamedTuple):
    """A measured step. stored_bytes: of K and V, of all layers and requests. decoded: entries are not raw."""

    format: str
    decoded: bool
    requests: int
    stored_bytes: int
    seconds: float


def fit(points: Sequence[Point]) -> dict[str, dict[str, Any]]:
    """{"paper": ..., "extended": ...}: beta and gamma in GB/s (None = that term is 0), eta by format, seconds outside the form, and the
    relative error of every point in the order given.

    Raises: ValueError for points that do not tell the terms apart.
    """
    raw = {point.stored_bytes for point in points if not point.decoded}
    coded = list(dict.fromkeys(point.format for point in points if point.decoded))
    if len(raw) < 2 or not coded:
        raise ValueError(
            f"{len(raw)} sizes of raw entries and {len(coded)} formats that are decoded: at least 2 and 1 tell beta and gamma apart"
        )
    paper = _solve(points, [[p.stored_bytes, p.stored_bytes * p.decoded] for p in points])
    wide = [[p.stored_bytes, 1, p.requests, *(p.stored_bytes * (p.format == name) for name in coded)] for p in points]
    extended = _solve(points, wide)
    read, step, request, *by_format = extended[0]
    slowest = max(by_format)
    eta = {name: ETA_MAX * own / slowest if slowest else 0.0 for name, own in zip(coded, by_format, strict=True)}
    return {
        "paper": _described(paper[0][0], paper[0][1], dict.fromkeys(coded, ETA_MAX), 0.0, 0.0, paper[1]),
        "extended": _described(read, slowest, eta, step, request, extended[1]),
    }


def predict(model: dict[str, Any], point: Point) -> float:
    """Seconds of a step by a fitted model."""
    rate = lambda gbps: 0.0 if gbps is None else 1e-9 / gbps  # noqa: E731
    decode = model["eta"].get(point.format, 0.0) / ETA_MAX * rate(model["gamma_gbps"])
    outside = model["seconds_per_step"] + model["seconds_per_request"] * point.requests
    return outside + point.stored_bytes * (rate(model["beta_gbps"]) + decode)


def _described(read: float, decode: float, eta: dict[str, float], step: float, request: float, errors: list[float]) -> dict[str, Any]:
    return {
        "beta_gbps": 1e-9 / read if read else None,
        "gamma_gbps": 1e-9 / decode if decode else None,
        "eta": eta,
        "seconds_per_step": step,
        "seconds_per_request": request,
        "relative_errors": errors,
        "median_abs_error": median(map(abs, errors)),
        "max_abs_error": max(map(abs, errors)),
    }


def _solve(points: Sequence[Point], terms: list[list[float]]) -> tuple[list[float], list[float]]:
    """Coefficients >= 0 of the terms that make the sum of squared relative errors least, and these errors.

    Of all sets of terms that may be above 0, the best whose own least squares has no negative coefficient: exact for a handful.
    """
    import torch

    seconds = torch.tensor([point.seconds for point in points], dtype=torch.float64)
    relative = torch.tensor(terms, dtype=torch.float64) / seconds.unsqueeze(1)
    scale = relative.abs().amax(0).clamp_min(1e-300)
    matrix, ones, best = relative / scale, torch.ones(len(points), 1, dtype=torch.float64), None
    for size in range(1, matrix.shape[1] + 1):
        for chosen in map(list, combinations(range(matrix.shape[1]), size)):
            found = torch.linalg.lstsq(matrix[:, chosen], ones, driver="gelsd").solution
            error = ((matrix[:, chosen] @ found - ones) ** 2).sum().item()
            if bool((found >= 0).all()) and (best is None or error < best[0] * (1 - 1e-12)):
                best = (error, chosen, found)
    assert best is not None, "a single term that is positive everywhere always fits with a positive coefficient"
    coefficients = torch.zeros(matrix.shape[1], dtype=torch.float64)
    coefficients[best[1]] = best[2].squeeze(1)
    errors = (matrix @ coefficients - 1).tolist()
    return (coefficients / scale).tolist(), errors
