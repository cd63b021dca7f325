"""Sections of an HTML page that show a classification report: its classes, confusion matrix and reliability diagram."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from m3er_fast import html_page as h

_MOST_CONFUSED = 20  # classes of a confusion matrix that is shown


def tiles(report: Mapping[str, Any]) -> str:
    """Return the scores of all classes together.

    Args:
        report: as of ``ClassificationReport.to_dict``, and so in all functions here.
    """
    overall, calibration, before = report["overall"], report["calibration"], report["before_calibration"]
    is_multi = "exact_match" in report
    questions = "with every question right" if is_multi else "predictions that are right"
    was = f"{before['ece']:.3f} before calibration" if before else "not calibrated"
    return h.tiles(
        [
            ("F1", f"{overall['f1']:.3f}", "mean over the classes"),
            ("MA", h.percent(overall["mean_accuracy"]), "mean over the classes"),
            (
                "Exact match" if is_multi else "Accuracy",
                h.percent(report["exact_match" if is_multi else "accuracy"]),
                questions,
            ),
            ("Balanced accuracy", h.percent(report["balanced_accuracy"]), "mean recall"),
            ("ECE", f"{calibration['ece']:.3f}", f"{was}; {calibration['ece_by_chance']:.3f} by chance"),
            ("Mean confidence", h.percent(calibration["mean_confidence"]), "probability of the answers"),
        ]
    )


def classes(report: Mapping[str, Any]) -> str:
    """Return a table with a row per class."""
    rows = [
        (h.name(row["name"]), h.number(row["support"]), f"{row['f1']:.3f}", h.percent(row["mean_accuracy"]))
        for row in report["per_class"]
    ]
    return h.table(("Class", "Utterances", "F1", "MA"), rows, numbers=(1, 2, 3))


def confusion(report: Mapping[str, Any]) -> str:
    """Return the confusion matrix, or nothing if there is none or it is too large to read."""
    matrix, names = report["confusion"], [row["name"] for row in report["per_class"]]
    if matrix is None or len(names) > _MOST_CONFUSED:
        return ""
    cells = [
        f'<th scope="row">{h.name(name)}</th>'
        + "".join(
            f'<td class="number" style="--share:{count / max(sum(row), 1):.3f}">{h.number(count)}'
            f'<span class="quiet"> {h.percent(count / sum(row) if sum(row) else None)}</span></td>'
            for count in row
        )
        for name, row in zip(names, matrix, strict=True)
    ]
    heads = "".join(f'<th class="number">{h.name(name)}</th>' for name in names)
    return (
        '<h3>Confusion matrix</h3>\n<p class="quiet">A row per true class, a column per predicted class; shares of the '
        f'row.</p>\n<div class="wide"><table class="confusion">\n<thead><tr><th></th>{heads}</tr></thead>\n<tbody>'
        f"{''.join(f'<tr>{row}</tr>' for row in cells)}</tbody></table></div>\n"
    )


def reliability(report: Mapping[str, Any]) -> str:
    """Return the reliability diagram, with its numbers."""
    after, before = report["calibration"], report["before_calibration"]
    bins = len(after["answers"])
    total = sum(after["answers"])
    bars = []
    for i, (count, accuracy) in enumerate(zip(after["answers"], after["accuracy"], strict=True)):
        if not count:
            continue
        about = f"{h.plural(count, 'answer')} with confidence {h.percent(after['confidence'][i])}: "
        bars.append(
            f'<rect class="bar" x="{100 * i / bins:.2f}" width="{100 / bins:.2f}" y="{100 - 100 * accuracy:.2f}" '
            f'height="{100 * accuracy:.2f}"><title>{about}{h.percent(accuracy)} right</title></rect>'
        )
    line = "" if before is None else f'<path class="before" d="{_line(before)}"/>'
    legend = "Bars: share of right answers" + ("." if before is None else ", after calibration. Dashed: before.")
    rows = [
        (
            f"{h.percent(i / bins)} to {h.percent((i + 1) / bins)}",
            h.number(count),
            h.percent(count / total),
            h.percent(after["confidence"][i]),
            h.percent(after["accuracy"][i]),
        )
        for i, count in enumerate(after["answers"])
        if count
    ]
    numbers = h.table(("Confidence", "Answers", "Share", "Mean", "Right"), rows, numbers=(1, 2, 3, 4))
    return (
        f'<h3>Reliability</h3>\n<p class="quiet">{legend} On the diagonal, answers are right as often as they are sure.'
        '</p>\n<div class="plot square"><div class="scale"><span>right</span><span>0</span></div>'
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
        f'aria-label="Reliability diagram, expected calibration error {after["ece"]:.3f}">'
        f'{"".join(bars)}<path class="grid" d="M0 50H100M50 0V100"/><path class="ideal" d="M0 100L100 0"/>{line}</svg>'
        '<div class="ends"><span>0</span><span>confidence</span><span>1</span></div></div>\n'
        f"<details><summary>Numbers</summary>\n{numbers}</details>\n"
    )


def _line(calibration: Mapping[str, Any]) -> str:
    points = [
        f"{100 * confidence:.2f} {100 - 100 * accuracy:.2f}"
        for confidence, accuracy in zip(calibration["confidence"], calibration["accuracy"], strict=True)
        if confidence is not None
    ]
    return f"M{'L'.join(points)}"


def details(report: Mapping[str, Any]) -> str:
    """Return everything about a report."""
    side_by_side: Sequence[str] = [f"<div>{part}</div>\n" for part in (confusion(report), reliability(report)) if part]
    return f'{tiles(report)}{classes(report)}<div class="panels">\n{"".join(side_by_side)}</div>\n'
