"""The goals of this project: ratios to baselines of the same run, and shares of the floor.

A goal covers every group that its expression finds, and the worst of these groups counts. The report says which goals
are met.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

Quantity = Literal["ratio", "share_of_floor", "seconds", "bytes_per_second", "error", "idle_share"]
_AT_MOST = ("seconds", "error", "idle_share")


class Goal(NamedTuple):
    """One number to reach, on one kind of device."""

    subject: str
    kind: Literal["cpu", "cuda"]
    group: str  # regular expression of the groups that it covers
    quantity: Quantity
    limit: float
    baseline: str | None = None  # for a ratio, which is the time of this contestant divided by ours
    contestant: str = "ours"

    def worst(self, rows: Iterable[dict[str, Any]]) -> float | None:
        """Return the worst value in the results of one run; None if they lack these groups or this baseline."""
        found = [
            value
            for row in rows
            if row["contestant"] == self.contestant and re.search(self.group, row["group"])
            if (value := self._value(row)) is not None
        ]
        if not found:
            return None
        return max(found) if self.quantity in _AT_MOST else min(found)

    def _value(self, row: dict[str, Any]) -> float | None:
        match self.quantity:
            case "ratio":
                return row["ratios"].get(self.baseline)
            case "seconds":
                return row["median"]
            case "bytes_per_second":
                return row["bytes"] / row["median"]
            case _:
                return row.get(self.quantity)

    def met(self, value: float) -> bool:
        """Return whether ``value`` reaches the goal."""
        return value <= self.limit if self.quantity in _AT_MOST else value >= self.limit

    def shown(self, value: float) -> str:
        """Return ``value`` as text in the goal's unit."""
        match self.quantity:
            case "ratio":
                return f"{value:.2f} ×" if value < 100 else f"{value:.0f} ×"
            case "share_of_floor":
                return f"{value:.0%} of the floor's rate"
            case "seconds":
                return f"{value * 1e6:.0f} µs"
            case "bytes_per_second":
                return f"{value / 1e9:.2g} GB/s"
            case "idle_share":
                return f"{value:.0%} idle"
            case _:
                return f"error {value:.1e}"

    def wanted(self) -> str:
        """Return the limit in words."""
        sign = "≤" if self.quantity in _AT_MOST else "≥"
        return f"{sign} {self.shown(self.limit)}" + (f" {self.baseline}" if self.baseline else "")


_FAISS = "faiss flat (search alone)"
_LOSS = r"loss and gradient, 65536 samples, 6 classes, "
_CCA = "CCA fit, 20,000 rows of 300 and 74"

CPU = (
    Goal("loss and gradient, 65536 × 6", "cpu", _LOSS, "ratio", 3.0, "eager"),
    Goal("loss and gradient, 65536 × 6", "cpu", _LOSS, "ratio", 1.2, "compiled"),
    Goal("check, 8192 samples, k = 30", "cpu", "check, 8192 samples", "ratio", 1.7, "eager"),
    Goal("CCA fit, 20,000 × 300 and 74, k = 30", "cpu", _CCA, "ratio", 1000.0, "scikit-learn CCA"),
    Goal("CCA fit, 20,000 × 300 and 74, k = 30", "cpu", _CCA, "ratio", 1.0, "torch covariance + SVD"),
    Goal("CCA fit, 20,000 × 300 and 74, k = 30", "cpu", _CCA, "ratio", 1.0, "torch covariance + SVD, float64"),
    Goal("CCA fit, correlations", "cpu", _CCA, "error", 1e-9),
    Goal("16 nearest of 100,000 × 300", "cpu", "16 nearest of 100000 x 300, 1000", "ratio", 1.3, _FAISS),
    Goal(
        "local weights, 1000 queries, K = 16",
        "cpu",
        r"least squares, 1000 queries, K=16, (300 -> 74|74 -> 300)",
        "ratio",
        2.0,
        "scikit-learn barycenter_weights",
        "ours, affine",
    ),
    Goal("memory scan forward, any B and T", "cpu", "memory scan, forward", "ratio", 1.0, "eager"),
    Goal("memory scan forward, B ≤ 64, T = 20", "cpu", r"scan, forward, B=(1|32), T=20,", "ratio", 1.5, "eager"),
    Goal("Parquet to tensors, checksums verified", "cpu", "Parquet to tensors", "bytes_per_second", 5e9),
    Goal(
        "Parquet to tensors, checksums ignored",
        "cpu",
        "Parquet to tensors",
        "bytes_per_second",
        5e9,
        contestant="ours, checksums ignored",
    ),
)

_SMALL_SCAN = "B=32, T=20"
GPU = (
    Goal("loss and gradient, 1M × 6", "cuda", "1M samples, 6 classes", "share_of_floor", 0.85),
    Goal("loss and gradient, 1M × 6", "cuda", "1M samples, 6 classes", "ratio", 6.0, "eager"),
    Goal("loss and gradient, 1M × 6", "cuda", "1M samples, 6 classes", "ratio", 1.5, "compiled"),
    Goal("loss and gradient, C ≥ 1024", "cuda", "(1024|32768|131072) classes", "share_of_floor", 0.9),
    Goal("check, 65536 samples, k = 30", "cuda", "check, 65536 samples", "share_of_floor", 0.6),
    Goal("check, 65536 samples, k = 30", "cuda", "check, 65536 samples", "ratio", 5.0, "eager"),
    Goal("check, 65536 samples, k = 30", "cuda", "check, 65536 samples", "ratio", 1.8, "compiled"),
    Goal("16 nearest of 1M × 768, missed", "cuda", "16 nearest of 1000000 x 768", "error", 1e-4),
    Goal("local least squares, 65536 queries, K = 32", "cuda", "65536 queries, K=32", "seconds", 1e-3),
    Goal("local least squares, 65536 queries, K = 32", "cuda", "65536 queries, K=32", "ratio", 4.0, "eager"),
    Goal("local least squares, 65536 queries, K = 32", "cuda", "65536 queries, K=32", "ratio", 2.5, "compiled"),
    Goal("local least squares, weights", "cuda", "least squares, ", "error", 1e-3),
    Goal("memory scan forward, B = 32, T = 20", "cuda", f"forward, {_SMALL_SCAN}", "seconds", 120e-6),
    Goal("memory scan training step, B = 32, T = 20", "cuda", f"step, {_SMALL_SCAN}", "seconds", 350e-6),
    Goal("memory scan, B = 32, T = 20", "cuda", _SMALL_SCAN, "ratio", 30.0, "eager"),
    Goal("memory scan, B = 32, T = 20", "cuda", _SMALL_SCAN, "ratio", 8.0, "eager, graphed", "ours, graphed"),
    Goal("memory scan forward, B = 8192, T = 100", "cuda", "forward, B=8192, T=100", "share_of_floor", 0.4),
    Goal("CCA fit, 1M × 300 and 74 on the GPU", "cuda", "CCA fit, 1M rows of 300 and 74", "share_of_floor", 0.5),
    Goal("scoring, beside its reading alone", "cuda", "^scoring, ", "ratio", 0.8, "reading alone"),
    Goal("scoring, the GPU", "cuda", "^scoring, ", "idle_share", 0.1),
)
