"""The goals of this project: ratios to the textbook and to other baselines of the same run, and shares of the floor.

A goal covers every group that its expression finds, and the worst of these groups counts. The report says which goals
are met. The reference, which carries every option, counts for no goal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

Quantity = Literal["ratio", "slowdown", "share_of_floor", "seconds", "bytes_per_second", "error", "idle_share"]
_AT_MOST = ("slowdown", "seconds", "error", "idle_share")


class Goal(NamedTuple):
    """One number to reach, on one kind of device."""

    subject: str
    kind: Literal["cpu", "cuda"]
    group: str  # regular expression of the groups that it covers
    quantity: Quantity
    limit: float
    baseline: str | None = None  # for a ratio: its time divided by the contestant's; for a slowdown the reverse
    contestant: str = "ours"
    former: str = ""  # the goal that this one replaces, in words

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
            case "slowdown":
                ratio = row["ratios"].get(self.baseline)
                return None if ratio is None else 1.0 / ratio
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
            case "ratio" | "slowdown":
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


TEXTBOOK, COMPILED = "textbook", "textbook, compiled"
_FAISS = "faiss flat (search alone)"
_LOSS = r"^fusion loss and gradient, "
_CHECK = r"^check, "
_TRAINING = r"^training step with Adam, CMU-MOSEI, "
_INFERENCE = r"^inference, CMU-MOSEI, "
_SMALL, _MIDDLE, _LARGE = r"B=(1|8|32),", r"B=(1|8|32|64),", r"B=(128|256|512),"
_CCA = "^CCA fit, 20,000 rows of 300 and 74, k"

CPU = (
    Goal("loss and gradient, any size", "cpu", _LOSS, "ratio", 1.0, TEXTBOOK),
    Goal(
        "loss and gradient, 65536 × 6",
        *("cpu", f"{_LOSS}65536 samples", "ratio", 3.0, TEXTBOOK),
        former="≥ 3 × the reference",
    ),
    Goal(
        "loss and gradient, 65536 × 6",
        *("cpu", f"{_LOSS}65536 samples", "ratio", 1.0, COMPILED),
        former="≥ 1.2 × the reference, compiled",
    ),
    Goal("statistics of the check, any size", "cpu", _CHECK, "ratio", 1.0, TEXTBOOK),
    Goal(
        "statistics of the check, 8192 samples",
        *("cpu", f"{_CHECK}8192 samples", "ratio", 1.7, TEXTBOOK),
        former="≥ 1.7 × the definition, eager",
    ),
    Goal("statistics of sequences, any size", "cpu", "^sequences, ", "ratio", 1.0, TEXTBOOK),
    Goal(
        "memory scan, forward and training step, any size",
        *("cpu", "^memory scan, ", "ratio", 1.0, TEXTBOOK),
        former="forward ≥ 1 × the reference; ≥ 1.5 × at B ≤ 64, T = 20",
    ),
    Goal("training step with Adam, any corpus", "cpu", "^training step with Adam, ", "ratio", 1.0, TEXTBOOK),
    Goal("training step with Adam, B ≤ 64", "cpu", _TRAINING + _MIDDLE, "ratio", 1.5, TEXTBOOK),
    Goal("training step with Adam, B = 128 to 512", "cpu", _TRAINING + _LARGE, "ratio", 1.1, TEXTBOOK),
    Goal("inference, any size", "cpu", "^inference, ", "ratio", 1.0, TEXTBOOK),
    Goal("inference, B ≤ 32", "cpu", _INFERENCE + _SMALL, "ratio", 1.5, TEXTBOOK),
    Goal(
        "inference, a third of the utterances lacking a modality",
        *("cpu", "^inference with check and proxies, ", "slowdown", 2.0, "ours", "ours, a third lost"),
    ),
    Goal("CCA fit, 20,000 × 300 and 74", "cpu", _CCA, "ratio", 1.0, TEXTBOOK, former="the same"),
    Goal(
        "CCA fit of float64 rows",
        "cpu",
        "^CCA fit, 20,000 rows of 300 and 74, float64",
        "ratio",
        1.0,
        TEXTBOOK,
        former="the same",
    ),
    Goal("CCA fit, 20,000 × 300 and 74", "cpu", _CCA, "ratio", 1000.0, "scikit-learn CCA", former="the same"),
    Goal("CCA fit, correlations", "cpu", _CCA, "error", 1e-6, former="≤ error 1.0e-09, always in float64"),
    Goal(
        "16 nearest of 100,000 × 300",
        *("cpu", "^16 nearest of 100000 x 300, 1000", "ratio", 1.3, _FAISS),
        former="the same",
    ),
    Goal(
        "local weights, 1000 queries, K = 16",
        *("cpu", r"least squares, 1000 queries, K=16, (300 -> 74|74 -> 300)", "ratio", 2.0),
        *("scikit-learn barycenter_weights", "ours, affine"),
        former="the same",
    ),
    Goal(
        "Parquet to tensors, checksums verified",
        *("cpu", "Parquet to tensors", "bytes_per_second", 5e9),
        former="the same",
    ),
    Goal(
        "Parquet to tensors, checksums ignored",
        *("cpu", "Parquet to tensors", "bytes_per_second", 5e9, None, "ours, checksums ignored"),
        former="the same",
    ),
)

_SMALL_SCAN = "B=32, T=20"
GPU = (
    Goal("loss and gradient, 1M × 6", "cuda", "1M samples, 6 classes", "share_of_floor", 0.85),
    Goal("loss and gradient, 1M × 6", "cuda", "1M samples, 6 classes", "ratio", 6.0, TEXTBOOK),
    Goal("loss and gradient, 1M × 6", "cuda", "1M samples, 6 classes", "ratio", 1.5, COMPILED),
    Goal("loss and gradient, C ≥ 1024", "cuda", "(1024|32768|131072) classes", "share_of_floor", 0.9),
    Goal("check, 65536 samples, k = 30", "cuda", "check, 65536 samples", "share_of_floor", 0.6),
    Goal("check, 65536 samples, k = 30", "cuda", "check, 65536 samples", "ratio", 5.0, TEXTBOOK),
    Goal("check, 65536 samples, k = 30", "cuda", "check, 65536 samples", "ratio", 1.8, COMPILED),
    Goal("16 nearest of 1M × 768, missed", "cuda", "16 nearest of 1000000 x 768", "error", 1e-4),
    Goal("local least squares, 65536 queries, K = 32", "cuda", "65536 queries, K=32", "seconds", 1e-3),
    Goal("local least squares, 65536 queries, K = 32", "cuda", "65536 queries, K=32", "ratio", 4.0, TEXTBOOK),
    Goal("local least squares, 65536 queries, K = 32", "cuda", "65536 queries, K=32", "ratio", 2.5, COMPILED),
    Goal("local least squares, weights", "cuda", "least squares, ", "error", 1e-3),
    Goal("memory scan forward, B = 32, T = 20", "cuda", f"forward, {_SMALL_SCAN}", "seconds", 120e-6),
    Goal("memory scan training step, B = 32, T = 20", "cuda", f"step, {_SMALL_SCAN}", "seconds", 350e-6),
    Goal("memory scan, B = 32, T = 20", "cuda", _SMALL_SCAN, "ratio", 30.0, TEXTBOOK),
    Goal("memory scan, B = 32, T = 20", "cuda", _SMALL_SCAN, "ratio", 8.0, "textbook, graphed", "ours, graphed"),
    Goal("memory scan forward, B = 8192, T = 100", "cuda", "forward, B=8192, T=100", "share_of_floor", 0.4),
    Goal("CCA fit, 1M × 300 and 74 on the GPU", "cuda", "CCA fit, 1M rows of 300 and 74", "share_of_floor", 0.5),
    Goal("scoring, beside its reading alone", "cuda", "^scoring, ", "ratio", 0.8, "reading alone"),
    Goal("scoring, the GPU", "cuda", "^scoring, ", "idle_share", 0.1),
)
