"""What the figure "textbook : ours over B" shows: its panels, and their curves from runs.

Dimension legend: B samples of a batch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.report.figures import RatioCurve
from benchmarks.speed.harness import TEXTBOOK


class Panel(NamedTuple):
    """One kind of work over B: the time of a contestant divided by ours."""

    title: str
    group: str  # regular expression of its groups
    contestant: str = TEXTBOOK
    inverse: bool = False  # ours divided by the contestant
    least: float = 1.0  # a point below it is one that the reader must see
    name: str = ""  # in a table, if it is not the title

    def curve(self, label: str, rows: Iterable[Mapping[str, Any]]) -> RatioCurve:
        """Return the medians and quartiles in the results of one run, by B."""
        points = {}
        for row in rows:
            if row["contestant"] == self.contestant and re.search(self.group, row["group"]) and "time_to_ours" in row:
                quartiles = [row["time_to_ours"][name] for name in ("q1", "median", "q3")]
                points[row["samples"]] = [1.0 / value for value in quartiles[::-1]] if self.inverse else quartiles
        sizes = sorted(points)
        return RatioCurve(label, sizes, *([points[size][at] for size in sizes] for at in range(3)))

    def subject(self, curves: Sequence[RatioCurve]) -> str:
        """Return what the ranges of the curves are of."""
        sizes = [size for curve in curves for size in curve.sizes]
        over = f"{self.name or self.title}, B = {min(sizes):,} to {max(sizes):,}"
        return f"{over}: that time : clean" if self.inverse else over

    def range_of(self, curve: RatioCurve) -> str:
        """Return the range of a curve over B, with the batch where it is worst; nothing for an empty one."""
        if not curve.sizes:
            return ""
        worst = min(range(len(curve.sizes)), key=curve.median.__getitem__)
        low, high = curve.median[worst], max(curve.median)
        at = f"(B = {curve.sizes[worst]:,})"
        return f"{1 / high:.2f} to {1 / low:.2f} {at}" if self.inverse else f"{low:.2f} {at} to {high:.2f}"


_DIMS = "d=300/74/3[56]"
PANELS = (
    Panel("Loss and gradient, C = 6", r"^fusion loss and gradient, \d+ samples?, 6 classes, m3er$"),
    Panel("Statistics of the check", rf"^check, \d+ samples?, {_DIMS}, k=30, float32$"),
    Panel("Memory scan, forward, T = 20", rf"^memory scan, forward, B=\d+, T=20, {_DIMS}, M=3, h=32, u=128$"),
    Panel("Training step with Adam, T = 20", r"^training step with Adam, CMU-MOSEI, "),
    Panel("Inference, T = 20", r"^inference, CMU-MOSEI, "),
    Panel(
        *("Ours, clean : with a third lost", r"^inference with check and proxies, CMU-MOSEI, "),
        *("ours, a third lost", True, 0.5, "Inference, a third of the utterances lacking a modality"),
    ),
)
