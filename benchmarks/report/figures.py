"""Figures of the results: below the rates of the device, beside the baselines, and over sizes. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.style
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

_STYLE: list[str | dict[str, Any]] = [
    "default",
    {"font.size": 9, "axes.titlesize": 9, "axes.titlelocation": "left", "grid.color": "0.9", "axes.axisbelow": True}
    | {"axes.spines.top": False, "axes.spines.right": False, "legend.edgecolor": "none"},
]
# The palette of Okabe and Ito, distinct with every common form of colour blindness; markers distinguish the rest.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "0.3")
_MARKERS = "osD^vP*X"
_COLUMNS = 3


class Point(NamedTuple):
    """One result below the roof."""

    operation: str
    ours: bool
    bytes: int
    flops: int
    seconds: float


class Curve(NamedTuple):
    """One contestant over sizes."""

    label: str
    sizes: Sequence[float]
    values: Sequence[float]  # seconds or bytes
    exponent: float  # fitted power of the sizes


class RatioCurve(NamedTuple):
    """Ratios over the samples of a batch, with their quartiles."""

    label: str
    sizes: Sequence[int]
    low: Sequence[float]
    median: Sequence[float]
    high: Sequence[float]


def points(rows: Iterable[Mapping[str, Any]], titles: Mapping[str, str]) -> list[Point]:
    """Return a point for each result that states its bytes and operations."""
    return [
        Point(
            titles.get(row["operation"], row["operation"]),
            row["contestant"].startswith("ours"),
            row["bytes"],
            row["flops"],
            row["median"],
        )
        for row in rows
        if row.get("bytes") and row.get("flops")
    ]


def roofline(points: Sequence[Point], copy: float, rates: Mapping[str, float], path: Path) -> None:
    """Draw operations per second over operations per byte, below the rates at which the device copies and multiplies.

    Args:
        points: the results to draw.
        copy: bytes per second.
        rates: operations per second of each unit.
        path: the PNG file to write.

    Raises:
        ValueError: if there are no points.
    """
    if not points:
        raise ValueError("no result has bytes and operations to draw")
    with matplotlib.style.context(_STYLE):
        figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
        axes = figure.subplots()
        intensities = np.array([point.flops / point.bytes for point in points])
        x = np.geomspace(intensities.min() / 3, max(intensities.max(), *(r / copy for r in rates.values())) * 3, 200)
        levels: dict[float, list[str]] = {}
        for unit, rate in rates.items():
            levels.setdefault(rate, []).append(unit)
        for rate, units in levels.items():
            axes.plot(x, np.minimum(x * copy, rate), color="0.6", linewidth=1)
            axes.annotate(  # beside the axes, where no point can lie
                f"{', '.join(units)} {_rate(rate)}", (1, rate), (4, 0), xycoords=("axes fraction", "data"),
                textcoords="offset points", va="center", color="0.35", fontsize=7,
            )  # fmt: skip
        axes.annotate(
            f"copy {copy / 1e9:.3g} GB/s", (x[20], x[20] * copy), (-6, 4), textcoords="offset points",
            ha="right", color="0.35", fontsize=7,
        )  # fmt: skip
        operations = list(dict.fromkeys(point.operation for point in points))
        for number, operation in enumerate(operations):
            color, marker = _COLORS[number % len(_COLORS)], _MARKERS[number % len(_MARKERS)]
            for ours in (False, True):
                chosen = [p for p in points if p.operation == operation and p.ours == ours]
                axes.plot(
                    [p.flops / p.bytes for p in chosen],
                    [p.flops / p.seconds for p in chosen],
                    linestyle="none", marker=marker, zorder=3 if ours else 2, **_point_style(ours, color),
                )  # fmt: skip
        handles = [
            Line2D([], [], linestyle="none", marker=_MARKERS[n % len(_MARKERS)], color=_COLORS[n % len(_COLORS)])
            for n in range(len(operations))
        ]
        handles += [Line2D([], [], linestyle="none", marker="o", **_point_style(ours, "0.4")) for ours in (True, False)]
        names = [*operations, "ours", "baselines"]
        figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
        axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="operations per second")
        axes.grid()
        _save(figure, path)


def _point_style(ours: bool, color: str) -> dict[str, Any]:
    """Return the style of a point below the roof: ours is large and has a dark edge, a baseline is small and hollow."""
    if ours:
        return {"markersize": 7, "markerfacecolor": color, "markeredgecolor": "0.1", "markeredgewidth": 0.6}
    return {"markersize": 3.5, "markerfacecolor": "none", "markeredgecolor": color, "markeredgewidth": 0.8}


def ratios(rows: Sequence[tuple[str, str, float]], path: Path) -> None:
    """Draw the time of each baseline relative to ours as a point on a logarithmic axis; right of 1, ours is faster.

    There is one line per kind of work, which a group's name begins with. At its right stand its least and its largest
    ratio, with what else the name says, as far as it differs within the line.

    Args:
        rows: (group, baseline, time of the baseline divided by our time).
        path: the PNG file to write.

    Raises:
        ValueError: if there are no rows.
    """
    if not rows:
        raise ValueError("no group has ours and a baseline to draw")
    kinds: dict[str, list[tuple[list[str], float]]] = {}
    for group, baseline, ratio in rows:
        kind, sizes = split_group(group)
        kinds.setdefault(kind, []).append(([*sizes, baseline], ratio))
    with matplotlib.style.context(_STYLE):
        figure = Figure(figsize=(9, 0.9 + 0.36 * len(kinds)), dpi=150, layout="constrained")
        axes = figure.subplots()
        for y, found in enumerate(kinds.values()):
            common = set.intersection(*(set(parts) for parts, _ in found)) if len(found) > 1 else set()
            for color, marker, drawn in ((_COLORS[0], "o", _is_faster), (_COLORS[5], "X", _is_slower)):
                chosen = [ratio for _, ratio in found if drawn(ratio)]
                axes.plot(
                    chosen, [y] * len(chosen), linestyle="none", marker=marker, markersize=5, color=color, alpha=0.8
                )
            ends = (min(found, key=lambda entry: entry[1]), max(found, key=lambda entry: entry[1]))
            words = [
                "  ".join([f"{ratio:.2f}", *(part for part in parts if part not in common)])
                for parts, ratio in ends[: len(found)]
            ]
            # Beside the axes: next to its point, a label could reach over other points or the name of its line.
            axes.annotate(
                "\n".join(words), (1, y), (6, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                va="center", fontsize=7,
            )  # fmt: skip
        axes.set_yticks(range(len(kinds)), [f"{kind} ({len(found)})" for kind, found in kinds.items()])
        axes.set_ylim(len(kinds) - 0.5, -0.5)
        axes.axvline(1, color="0.3", linewidth=1)
        low, high = min(ratio for _, _, ratio in rows), max(ratio for _, _, ratio in rows)
        axes.set(xscale="log", xlabel="time of the baseline / our time", xlim=(min(low, 1) / 1.2, max(high, 1) * 1.2))
        # Label powers of two as plain numbers: so few decades hold too few powers of ten.
        axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(base=2, numticks=12))
        axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        _save(figure, path)


def split_group(group: str) -> tuple[str, list[str]]:
    """Return what kind of work a group's name says, the parts before the first number, and its sizes, the rest."""
    parts = group.split(", ")
    first = next((n for n, part in enumerate(parts) if any(c.isdigit() for c in part)), len(parts)) or 1
    return ", ".join(parts[:first]), parts[first:]


def _is_faster(ratio: float) -> bool:
    return ratio >= 1


def _is_slower(ratio: float) -> bool:
    return ratio < 1


def over_batch(panels: Sequence[tuple[str, float, Sequence[RatioCurve]]], path: Path) -> None:
    """Draw ratios over the samples of a batch, one panel per kind of work and one curve per run.

    Below a panel's least ratio the ground is grey and points are crosses.

    Args:
        panels: (title, least ratio, curves) of each kind of work.
        path: the PNG file to write.

    Raises:
        ValueError: if there is no point.
    """
    curves = [curve for _, _, curves in panels for curve in curves if curve.sizes]
    if not curves:
        raise ValueError("no result beside the textbook to draw over B")
    values = [value for curve in curves for value in (*curve.low, *curve.high)]
    low, high = (2.0 ** round_(math.log2(v)) for round_, v in ((math.floor, min(values)), (math.ceil, max(values))))
    low, high = min(low, 0.5), max(high, 2.0)
    with matplotlib.style.context(_STYLE):
        rows = math.ceil(len(panels) / _COLUMNS)
        figure = Figure(figsize=(9, 0.4 + 2.4 * rows), dpi=150, layout="constrained")
        grid = figure.subplots(rows, _COLUMNS, sharey=True, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (title, least, curves) in zip(grid.flat, panels, strict=False):
            axes.axhspan(low / 2, least, color="0.92", linewidth=0)
            axes.axhline(least, color="0.3", linewidth=1)
            for number, curve in enumerate(curves):
                _ratios_over_batch(axes, curve, least, number)
            axes.set_title(title)
            axes.set(xscale="log", yscale="log", ylim=(low / 1.15, high * 1.15))
            axes.grid()
            sizes = sorted({size for curve in curves for size in curve.sizes})
            # Every size has a point, but not each a label: they would overlap.
            shown = [size for size in sizes if size in (sizes[0], sizes[-1]) or math.log2(size) % 3 == 0]
            axes.set_xticks(shown, [f"{size:,}" for size in shown])
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_minor_locator(matplotlib.ticker.NullLocator())
            axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(base=2, numticks=12))
            axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        for axes in grid[-1]:
            axes.set_xlabel("B, samples")
        for axes in grid[:, 0]:
            axes.set_ylabel("textbook : ours")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        handles.append(Line2D([], [], linestyle="none", marker="X", color="0.3"))
        figure.legend(handles, [*labels, "below the line"], loc="outside lower center", ncols=8, frameon=False)
        _save(figure, path)


def _ratios_over_batch(axes: Axes, curve: RatioCurve, least: float, number: int) -> None:
    color, marker = _COLORS[number % len(_COLORS)], _MARKERS[number % len(_MARKERS)]
    axes.vlines(curve.sizes, curve.low, curve.high, color=color, linewidth=3, alpha=0.35)
    style = ("-", "--", ":", "-.")[number % 4]
    axes.plot(
        curve.sizes, curve.median, linestyle=style, linewidth=1.2, marker=marker, markersize=4, color=color,
        label=curve.label,
    )  # fmt: skip
    below = [(size, value) for size, value in zip(curve.sizes, curve.median, strict=True) if value < least]
    if below:
        axes.plot(
            *zip(*below, strict=True), linestyle="none", marker="X", markersize=9, color=color, markeredgecolor="0.1",
            zorder=4,
        )  # fmt: skip


def scaling(panels: Sequence[tuple[str, str, Sequence[Curve], Sequence[Curve]]], path: Path) -> None:
    """Draw time and, below it, peak memory over each size; every curve has its fitted exponent.

    The place of a panel without curves stays empty.

    Args:
        panels: (title, name of the size, curves of seconds, curves of bytes) of each size.
        path: the PNG file to write.
    """
    with matplotlib.style.context(_STYLE):
        columns = min(len(panels), _COLUMNS)
        blocks = math.ceil(len(panels) / columns)
        figure = Figure(figsize=(3.2 * columns, 5.2 * blocks), dpi=120, layout="constrained")
        grid = figure.subplots(2 * blocks, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_visible(False)
        for number, (title, size, seconds, memory) in enumerate(panels):
            block, column = divmod(number, columns)
            above, below = grid[2 * block, column], grid[2 * block + 1, column]
            _curves(above, seconds, 1.0, "seconds")
            _curves(below, memory, 1e6, "peak memory, MB")
            above.set_title(title)
            (below if memory else above).set_xlabel(size)
        _save(figure, path)


def _curves(axes: Axes, curves: Sequence[Curve], unit: float, label: str) -> None:
    if not curves:
        return
    for number, curve in enumerate(curves):
        values = np.maximum(np.asarray(curve.values, dtype=float), 1e-9) / unit
        axes.plot(
            curve.sizes, values, marker=_MARKERS[number], markersize=4, linewidth=1, color=_COLORS[number],
            label=f"{curve.label}: {curve.exponent:.2f}",
        )  # fmt: skip
    axes.set_visible(True)
    axes.set(xscale="log", yscale="log", ylabel=label)
    # From one power of ten to another, so that at least two are labelled.
    low, high = axes.dataLim.intervaly
    axes.set_ylim(10 ** math.floor(math.log10(low)), 10 ** (math.floor(math.log10(high)) + 1))
    sizes = curves[0].sizes
    if max(sizes) < 10 * min(sizes):  # fewer than two powers of ten to label
        axes.set_xticks(sizes, map(str, sizes))
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.grid()
    axes.legend(title="exponent", fontsize=7, title_fontsize=7)


def _rate(rate: float) -> str:
    return f"{rate / 1e12:.3g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.3g} GFLOP/s"


def _save(figure: Figure, path: Path) -> None:
    # By default matplotlib writes its version; without it, the file depends on the picture alone.
    figure.savefig(path, format="png", metadata={"Software": None})
