"""The project's figures: functions that draw plain arrays into PNG files. Needs the extra ``m3er-fast[plot]``.

Figures use matplotlib's object interface: they open no window, touch no pyplot state and ignore the user's
matplotlibrc. The same input gives the same bytes.

Dimension legend: M modalities, C classes, d_m features of modality m.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

try:
    import matplotlib.style
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError("m3er_fast.plots needs matplotlib: pip install 'm3er-fast[plot]'") from error

_DPI = 150
_STYLE: list[str | dict[str, Any]] = [
    "default",
    {
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": "0.9",
        "hatch.linewidth": 0.6,
        "legend.edgecolor": "none",
        "text.parse_math": False,  # ids and class names may hold dollar signs
    },
]

# The palette of Okabe and Ito, distinguishable with every common form of colour blindness.
_BLUE, _ORANGE, _GREEN, _PURPLE, _SKY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9"
_MODALITY_COLORS = (_BLUE, _ORANGE, _GREEN, _PURPLE, _SKY)
_GROUP_COLORS = (_BLUE, _ORANGE)  # one dark and one light, to differ in grey too
_FUSED, _FADED = "0.25", "0.5"
# Classes: light and dark in turn, so that neighbours differ in grey too; beyond six they are hatched.
_CLASS_COLORS = (_BLUE, _ORANGE, _PURPLE, _SKY, "#D55E00", "#F0E442")
_HATCHES = ("", "///", "...")

_INEFFECTUAL: dict[str, Any] = {"facecolor": "0.9", "edgecolor": "0.55", "hatch": "/////"}

# Figure 7 keeps the slides' blue, red and green. They differ in shape and lightness too, for colour-blind readers.
_ORIGINAL: dict[str, Any] = {"color": "#1F4FA8", "linewidth": 2.0, "zorder": 3, "label": "original"}
_NOISY: dict[str, Any] = {
    "color": "#D62728",
    "linestyle": "none",
    "marker": "x",
    "markeredgewidth": 0.7,
    "markersize": 4,
    "zorder": 1.5,
    "label": "ineffectual (noise added)",
}
_REGENERATED: dict[str, Any] = {
    "color": "#2DBE50",
    "linestyle": "none",
    "marker": "o",
    "markersize": 3.5,
    "markeredgecolor": "#146C2E",
    "markeredgewidth": 0.5,
    "zorder": 2.5,
    "label": "regenerated",
}


@dataclass(frozen=True, eq=False)
class Example:
    """A classified sample for :func:`plot_examples`.

    Args:
        id: the sample's id in the corpus.
        label: its true class, one of ``classes``.
        classes: C class names.
        modalities: M modality names.
        probabilities: (M, C) in 0..1, from the head of each modality.
        fused: (C,) in 0..1, from the whole model.
        effective: (M,) bool, False for modalities that were judged ineffectual.
        weights: (M,) ≥ 0, the weight of each modality in the multiplicative fusion.

    Raises:
        ValueError: naming the argument, its value and what was wanted.
    """

    id: str
    label: str
    classes: tuple[str, ...]
    modalities: tuple[str, ...]
    probabilities: NDArray[Any]
    fused: NDArray[Any]
    effective: NDArray[np.bool_]
    weights: NDArray[Any]

    def __post_init__(self) -> None:
        if self.label not in self.classes:
            raise ValueError(f"label must be one of the classes {list(self.classes)}, got {self.label!r}")
        if not self.modalities:
            raise ValueError("modalities must hold at least one name, got none")
        modalities, classes = len(self.modalities), len(self.classes)
        for name, values in (
            ("probabilities", _numbers("probabilities", self.probabilities, (modalities, classes))),
            ("fused", _numbers("fused", self.fused, (classes,))),
        ):
            if values.min() < 0 or values.max() > 1:
                raise ValueError(f"{name} must lie in 0..1, got values from {values.min():g} to {values.max():g}")
        if _numbers("weights", self.weights, (modalities,)).min() < 0:
            raise ValueError(f"weights must not be negative, got {self.weights}")
        effective = np.asarray(self.effective)
        if effective.dtype != bool or effective.shape != (modalities,):
            raise ValueError(
                f"effective must be booleans of shape ({modalities},), got {effective.dtype} of shape {effective.shape}"
            )

    @property
    def prediction(self) -> str:
        """The class with the highest fused probability."""
        return self.classes[int(np.argmax(self.fused))]


@dataclass(frozen=True, eq=False)
class Timeline:
    """The predictions of a recording over time, for :func:`plot_timeline`.

    Args:
        title: of the recording.
        spans: (N, 2), start and end of each utterance in seconds.
        classes: C class names.
        probabilities: (N, C) in 0..1.
        modalities: M modality names.
        trusted: (N, M), 1 where a modality was judged effective, 0 where it was not, NaN where it is unavailable.
        abstained: (N,) bool, whether no modality was effective.
        level: (2, K) times in seconds, and the level of the sound there, from 0; K = 0 draws none.
        pictures: times in seconds, and (height, width, 3) pictures in 0..255.
    """

    title: str
    spans: NDArray[np.float64]
    classes: tuple[str, ...]
    probabilities: NDArray[Any]
    modalities: tuple[str, ...]
    trusted: NDArray[Any]
    abstained: NDArray[np.bool_]
    level: NDArray[Any]
    pictures: Sequence[tuple[float, NDArray[np.uint8]]] = ()


def plot_history(history: Mapping[str, Any], path: Path) -> None:
    """Draw the training and validation loss per epoch, with the best epoch marked.

    Args:
        history: ``train_loss`` and ``valid_loss``, one number per epoch, and ``best_epoch``, counted from 1.
        path: the PNG file to write.

    Raises:
        ValueError: if an entry is missing, empty or not finite, or the lengths differ.
    """
    with matplotlib.style.context(_STYLE):
        _save(_history_figure(history), path)


def plot_proxies(
    original: Mapping[str, ArrayLike],
    corrupted: Mapping[str, ArrayLike],
    regenerated: Mapping[str, ArrayLike],
    errors: Mapping[str, float],
    path: Path,
) -> None:
    """Draw one sample's feature vectors without noise, with noise and regenerated (Figure 7 of the M3ER paper).

    Noise at the paper's SNR of 0.01 is ten times as large as the signal. Each modality is therefore drawn twice: on
    the left at the scale of the noise, on the right without it, at the scale of the features. Features have no order
    of their own: they are sorted by their value without noise.

    Args:
        original: modality -> (d_m,) features without noise.
        corrupted: modality -> (d_m,) the same features with noise, judged ineffectual.
        regenerated: modality -> (d_m,) the proxy that replaces the features.
        errors: modality -> mean relative L2 error of the proxy ‖p − f‖ / ‖f‖ over many samples; 0.01 means 1 %.
        path: the PNG file to write.

    Raises:
        ValueError: if the mappings hold different modalities, shapes differ, or values are not finite.
    """
    with matplotlib.style.context(_STYLE):
        _save(_proxies_figure(original, corrupted, regenerated, errors), path)


def plot_examples(examples: Sequence[Example], path: Path) -> None:
    """Draw a row per classified sample: the probabilities, verdict and fusion weight of each modality.

    Figures 3 and 4 of the M3ER paper show the same for one correctly classified sample per class.

    Args:
        examples: samples of one model, with the same classes and modalities.
        path: the PNG file to write.

    Raises:
        ValueError: if there are no examples, or if their classes or modalities differ.
    """
    with matplotlib.style.context(_STYLE):
        _save(_examples_figure(examples), path)


def plot_ablation(groups: Mapping[str, Sequence[tuple[str, float, float | None]]], path: Path, *, metric: str) -> None:
    """Draw a bar per row of an ablation table, in groups of one colour each, the first row at the top.

    Args:
        groups: title -> (label, mean, standard deviation) per row; a standard deviation of None draws no whisker.
        path: the PNG file to write.
        metric: the name of the score, such as ``"Overall F1"``; it labels the axis.

    Raises:
        ValueError: if a group has no rows, a mean is not finite, or a standard deviation is negative or not finite.
    """
    with matplotlib.style.context(_STYLE):
        _save(_ablation_figure(groups, metric), path)


def plot_reliability(reports: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw a reliability diagram per report: the share of right answers in every bin of confidence.

    The bars are of the probabilities as they are, the dashed line of those before calibration, where there are any.

    Args:
        reports: title -> ``calibration`` and ``before_calibration``, as of ``ClassificationReport.to_dict``: mappings
            with ``answers``, ``confidence`` and ``accuracy`` per bin, and ``ece``; ``before_calibration`` may be None.
        path: the PNG file to write.

    Raises:
        ValueError: if there is no report.
    """
    if not reports:
        raise ValueError("reports must hold at least one report, got none")
    with matplotlib.style.context(_STYLE):
        _save(_reliability_figure(reports), path)


def plot_timeline(timeline: Timeline, path: Path) -> None:
    """Draw the predictions of a recording over time, and when each modality was trusted.

    From above: some pictures, the level of the sound, the probabilities of the classes on top of each other, and a
    band per modality: full where it was trusted, hatched where it was not, empty where it is unavailable.

    Args:
        timeline: of at least one utterance.
        path: the PNG file to write.

    Raises:
        ValueError: if there is no utterance, or shapes do not fit.
    """
    with matplotlib.style.context(_STYLE):
        _save(_timeline_figure(timeline), path)


def _history_figure(history: Mapping[str, Any]) -> Figure:
    missing = [name for name in ("train_loss", "valid_loss", "best_epoch") if name not in history]
    if missing:
        raise ValueError(f"history must hold train_loss, valid_loss and best_epoch, but lacks {', '.join(missing)}")
    train = _numbers("history['train_loss']", history["train_loss"], (None,))
    valid = _numbers("history['valid_loss']", history["valid_loss"], (len(train),))
    best = history["best_epoch"]
    if not isinstance(best, int) or not 1 <= best <= len(train):
        raise ValueError(f"history['best_epoch'] must be an epoch from 1 to {len(train)}, got {best!r}")
    epochs = np.arange(1, len(train) + 1)
    marker = "." if len(train) <= 40 else None

    figure = Figure(figsize=(7, 4), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    axes.plot(epochs, train, color=_BLUE, linestyle="--", marker=marker, label="training")
    axes.plot(epochs, valid, color=_ORANGE, linewidth=2, marker=marker, label="validation")
    axes.axvline(best, color="0.4", linewidth=1, linestyle=":")
    axes.plot(
        best,
        valid[best - 1],
        linestyle="none",
        marker="o",
        markersize=9,
        markerfacecolor="none",
        markeredgecolor="black",
        label=f"best: {valid[best - 1]:.4g} at epoch {best}",
    )
    axes.set(xlabel="epoch", ylabel="loss")
    axes.xaxis.set_major_locator(_integer_ticks(9))
    axes.grid(axis="y")
    axes.legend()
    return figure


def _proxies_figure(
    original: Mapping[str, ArrayLike],
    corrupted: Mapping[str, ArrayLike],
    regenerated: Mapping[str, ArrayLike],
    errors: Mapping[str, float],
) -> Figure:
    modalities = list(original)
    if not modalities:
        raise ValueError("original must hold at least one modality, got none")
    for name, mapping in (("corrupted", corrupted), ("regenerated", regenerated), ("errors", errors)):
        if set(mapping) != set(modalities):
            raise ValueError(f"{name} must hold the modalities of original, {modalities}, got {list(mapping)}")

    figure = Figure(figsize=(12, 0.8 + 2.0 * len(modalities)), dpi=_DPI, layout="constrained")
    grid = figure.subplots(len(modalities), 2, squeeze=False, width_ratios=(1, 2.4))
    for modality, (wide, close) in zip(modalities, grid, strict=True):
        before = _numbers(f"original[{modality!r}]", original[modality], (None,))
        noisy = _numbers(f"corrupted[{modality!r}]", corrupted[modality], before.shape)
        proxy = _numbers(f"regenerated[{modality!r}]", regenerated[modality], before.shape)
        error = float(_numbers(f"errors[{modality!r}]", errors[modality], ()))
        if error < 0:
            raise ValueError(f"errors[{modality!r}] must not be negative, got {error}")
        order = np.argsort(before, kind="stable")
        for axes, lines in (
            (wide, ((before, _ORIGINAL), (noisy, _NOISY), (proxy, _REGENERATED))),
            (close, ((before, _ORIGINAL), (proxy, _REGENERATED))),
        ):
            for values, style in lines:
                axes.plot(values[order], **style)
            axes.set_xlim(-0.5, len(before) - 0.5)
            axes.xaxis.set_major_locator(_integer_ticks(8))
            axes.grid(axis="y")
        wide.set_ylabel(f"{_shorten(modality, 20)}\nstandardised value")
        wide.set_title("at the scale of the noise")
        close.set_title(f"at the scale of the features; mean relative L2 error {_percentage(error)}")
    for axes in grid[-1]:
        axes.set_xlabel("feature, sorted by its original value")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


def _examples_figure(examples: Sequence[Example]) -> Figure:
    if not examples:
        raise ValueError("examples must hold at least one example, got none")
    modalities, classes = examples[0].modalities, examples[0].classes
    for example in examples:
        if (example.modalities, example.classes) != (modalities, classes):
            raise ValueError(
                f"examples must share their modalities and classes: {example.id!r} has {example.modalities} and "
                f"{example.classes}, but {examples[0].id!r} has {modalities} and {classes}"
            )
    largest_weight = max(1.0, *(float(np.max(example.weights)) for example in examples))
    columns = len(modalities) + 2
    row_height = 0.9 + 0.17 * max(len(classes), len(modalities))

    figure = Figure(figsize=(1.6 + 1.6 * columns, row_height * len(examples)), dpi=_DPI, layout="constrained")
    bands = figure.subfigures(len(examples), 1, squeeze=False)[:, 0]
    for example, band in zip(examples, bands, strict=True):
        heading = (
            f"{_shorten(example.label, 20)}, predicted {_shorten(example.prediction, 20)}: {_shorten(example.id, 32)}"
        )
        band.suptitle(heading, x=0.01, ha="left", fontsize=10, fontweight="bold")
        *heads, whole, weighing = band.subplots(1, columns)
        for m, axes in enumerate(heads):
            verdict, color = ("effective", "black") if example.effective[m] else ("ineffectual", _FADED)
            axes.set_title(f"{_shorten(modalities[m], 20)}\n{verdict}", color=color)
            _draw_bars(axes, example.probabilities[m], [_bar_style(example, m)] * len(classes), 1.0)
        whole.set_title("fused")
        _draw_bars(whole, example.fused, [{"color": _FUSED}] * len(classes), 1.0)
        for axes in (*heads, whole):
            axes.set_yticks(range(len(classes)), [])
        heads[0].set_yticks(range(len(classes)), [_shorten(name, 20) for name in classes])
        for name, text in zip(classes, heads[0].get_yticklabels(), strict=True):
            text.set_color("black" if name == example.label else _FADED)
        weighing.set_title("weight")
        _draw_bars(weighing, example.weights, [_bar_style(example, m) for m in range(len(modalities))], largest_weight)
        weighing.set_yticks(range(len(modalities)), [_shorten(name, 12) for name in modalities])
    if not all(example.effective.all() for example in examples):
        figure.legend(handles=[Patch(label="judged ineffectual", **_INEFFECTUAL)], loc="outside lower left")
    return figure


def _reliability_figure(reports: Mapping[str, Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(4 * len(reports), 4.6), dpi=_DPI, layout="constrained")
    for axes, (title, report) in zip(figure.subplots(1, len(reports), squeeze=False)[0], reports.items(), strict=True):
        after, before = report["calibration"], report["before_calibration"]
        bins = len(after["answers"])
        edges = np.arange(bins) / bins
        heights = np.array([np.nan if value is None else value for value in after["accuracy"]], dtype=np.float64)
        label = f"{'after calibration' if before else 'model'}: ECE {after['ece']:.3f}"
        axes.bar(edges, heights, width=1 / bins, align="edge", color=_SKY, edgecolor="white", label=label)
        axes.plot([0, 1], [0, 1], color="0.4", linewidth=1, linestyle=":")
        if before:
            points = [(c, a) for c, a in zip(before["confidence"], before["accuracy"], strict=True) if c is not None]
            label = f"before: ECE {before['ece']:.3f}"
            axes.plot(*zip(*points, strict=True), color=_ORANGE, linestyle="--", marker=".", label=label)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", aspect="equal")
        axes.set_title(_shorten(title, 40))
        axes.grid()
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13))  # below: bars reach every corner
    figure.axes[0].set_ylabel("share of right answers")
    return figure


def _timeline_figure(timeline: Timeline) -> Figure:
    spans = _numbers("spans", timeline.spans, (None, 2))
    rows, classes, modalities = len(spans), len(timeline.classes), len(timeline.modalities)
    probabilities = _numbers("probabilities", timeline.probabilities, (rows, classes))
    trusted = np.asarray(timeline.trusted, dtype=np.float64)
    if not rows or trusted.shape != (rows, modalities):
        raise ValueError(f"trusted must be of shape ({rows}, {modalities}) with N ≥ 1, got {trusted.shape}")
    # Utterances that do not sum to 1, those of yes/no questions, are drawn in proportion.
    shares = probabilities / np.maximum(probabilities.sum(axis=1, keepdims=True), 1e-12)
    heights = [*([1.0] if timeline.pictures else []), *([0.7] if timeline.level.size else []), 2.4, 0.3 * modalities]
    figure = Figure(figsize=(10, 0.9 + 1.2 * sum(heights)), dpi=_DPI, layout="constrained")
    remaining = list(figure.subplots(len(heights), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0])
    start, end = float(spans[:, 0].min()), float(spans[:, 1].max())
    if timeline.pictures:
        _draw_pictures(remaining.pop(0), timeline.pictures, start, end)
    if timeline.level.size:
        axes = remaining.pop(0)
        axes.fill_between(timeline.level[0], 0, timeline.level[1], color=_FADED, linewidth=0)
        axes.set(ylabel="sound", yticks=[], ylim=(0, None))
    stack, bands = remaining
    bottom = np.zeros(rows)
    widths = spans[:, 1] - spans[:, 0]
    for number, name in enumerate(timeline.classes):
        stack.bar(
            spans[:, 0],
            shares[:, number],
            widths,
            bottom,
            align="edge",
            color=_CLASS_COLORS[number % len(_CLASS_COLORS)],
            hatch=_HATCHES[number // len(_CLASS_COLORS) % len(_HATCHES)],
            edgecolor="white",
            linewidth=0.4,
            label=_shorten(name, 20),
        )
        bottom += shares[:, number]
    for row in np.flatnonzero(timeline.abstained):
        stack.text(spans[row].mean(), 0.5, "abstained", rotation=90, ha="center", va="center", fontsize=8)
    stack.set(ylim=(0, 1), ylabel="probability")
    stack.legend(loc="upper left", bbox_to_anchor=(1, 1))
    verdicts: dict[bool | None, dict[str, Any]] = {
        True: {"facecolor": _GREEN, "edgecolor": "0.3", "label": "trusted"},
        False: {"facecolor": "white", "edgecolor": "0.3", "hatch": "////", "label": "not trusted"},
        None: {"facecolor": "white", "edgecolor": "0.6", "linestyle": ":", "label": "unavailable"},
    }
    for (row, m), value in np.ndenumerate(trusted):
        verdict = None if np.isnan(value) else bool(value)
        bands.barh(m, widths[row], 0.7, spans[row, 0], linewidth=0.5, **verdicts[verdict])
    bands.set(yticks=range(modalities), yticklabels=[_shorten(name, 16) for name in timeline.modalities])
    bands.set(ylim=(modalities - 0.4, -0.6), xlim=(start, end), xlabel="seconds")
    bands.legend(handles=[Patch(**style) for style in verdicts.values()], loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(_shorten(timeline.title, 80), x=0.01, ha="left", fontsize=10)
    return figure


def _draw_pictures(axes: Axes, pictures: Sequence[tuple[float, NDArray[np.uint8]]], start: float, end: float) -> None:
    """Draw pictures in a row, each with its middle at its time, and as wide as all of them fit beside each other."""
    width = (end - start) / len(pictures) * 0.95
    for time, picture in pictures:
        axes.imshow(picture, extent=(time - width / 2, time + width / 2, 0, 1), aspect="auto")
    axes.set(ylim=(0, 1))
    axes.axis("off")


def _bar_style(example: Example, m: int) -> dict[str, Any]:
    """Return the modality's colour, or hatched grey if it was judged ineffectual."""
    if example.effective[m]:
        return {"color": _MODALITY_COLORS[m % len(_MODALITY_COLORS)]}
    return _INEFFECTUAL


def _draw_bars(axes: Axes, values: NDArray[Any], styles: Sequence[dict[str, Any]], largest: float) -> None:
    """Draw horizontal bars from the top, each with its number, on a scale from 0 to ``largest``."""
    for row, (value, style) in enumerate(zip(values, styles, strict=True)):
        axes.barh(row, value, height=0.75, **style)
        axes.annotate(f"{value:.2f}", (value, row), (2, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_xlim(0, 1.3 * largest)  # the number of a full bar needs room
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=8)


def _ablation_figure(groups: Mapping[str, Sequence[tuple[str, float, float | None]]], metric: str) -> Figure:
    if not groups or not all(groups.values()):
        raise ValueError(f"groups must hold at least one row each, got {dict(groups)}")
    rows = [row for group in groups.values() for row in group]
    means = _numbers("the means of groups", [mean for _, mean, _ in rows], (None,))
    stds = _numbers("the standard deviations of groups", [std or 0.0 for _, _, std in rows], means.shape)
    if stds.min() < 0:
        raise ValueError(f"the standard deviations of groups must not be negative, got {stds.min():g}")
    low, high = min(0.0, (means - stds).min()), max(0.0, (means + stds).max())
    span = high - low or 1.0

    lines = len(groups) + sum(textwrap.fill(label, 45).count("\n") + 1 for label, _, _ in rows)
    height = 0.8 + 0.16 * (len(rows) + len(groups)) + 0.2 * lines
    figure = Figure(figsize=(8, height), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    places: list[int] = []
    y = 0
    for number, (title, group) in enumerate(groups.items()):
        axes.annotate(title, (low, y), (3, 0), textcoords="offset points", va="center", fontweight="bold")
        for label, mean, std in group:
            y += 1
            places.append(y)
            axes.barh(y, mean, height=0.65, color=_GROUP_COLORS[number % len(_GROUP_COLORS)], label=label)
            text, end = f"{mean:.3f}", mean
            if std is not None:
                axes.errorbar(mean, y, xerr=std, color="black", linewidth=1.2, capsize=3)
                text, end = f"{text} ± {std:.3f}", mean + std
            axes.annotate(text, (max(end, 0.0), y), (5, 0), textcoords="offset points", va="center", fontsize=8)
        y += 1
    axes.set_yticks(places, [textwrap.fill(label, 45) for label, _, _ in rows])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(y - 0.4, -0.6)
    axes.set_xlabel(metric)
    axes.set_xlim(low, low + 1.25 * span)  # room for the numbers at the right of the bars
    axes.grid(axis="x")
    return figure


def _save(figure: Figure, path: Path) -> None:
    # By default matplotlib writes its version into the file, which should depend on the picture alone.
    figure.savefig(path, format="png", metadata={"Software": None})


def _numbers(name: str, values: Any, shape: tuple[int | None, ...]) -> NDArray[np.float64]:
    """Return ``values`` as finite, non-empty float64 of the given shape, in which None stands for any length."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of numbers, got {values!r}") from error
    fits = array.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, array.shape, strict=True))
    if not fits or array.size == 0:
        wanted = str(shape).replace("None", "at least 1")
        raise ValueError(f"{name} must have shape {wanted}, got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return array


def _integer_ticks(most: int) -> MaxNLocator:
    """Return a locator of at most about ``most`` ticks, on round whole numbers."""
    return MaxNLocator(most, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)


def _percentage(share: float) -> str:
    """Format a share with two significant digits, without decimals from 10 % on: 0.0012 %, 8.3 %, 130 %."""
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"


def _shorten(text: str, length: int) -> str:
    """Cut a text in the middle to at most ``length`` characters: ids and names differ at both ends."""
    if len(text) <= length:
        return text
    half = (length - 1) // 2
    return f"{text[: length - 1 - half]}…{text[-half:]}"
