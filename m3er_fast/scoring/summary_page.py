"""The run summary as one HTML page.

Strings that come from files (names, ids, reasons) are escaped and shown as text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from m3er_fast import html_page as h
from m3er_fast import report_sections

_MOST_QUARANTINED = 200  # shards in quarantine that are shown
_MOST_GROUPS, _LEAST_ROWS = 20, 10  # groups that are shown, and rows of the smallest, if any group has as many
_WORRYING_ABSTENTION = 0.25  # share of utterances
_LEAST_FOR_ALARM = 20  # utterances; fewer may well share a class
_AXIS_LIMITS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of shares


def render(summary: Mapping[str, Any]) -> str:
    """Return the page for a summary."""
    parts = [
        _head(summary),
        _status(summary),
        _tiles(summary),
        _quarantine(summary["quarantine"]),
        _errors(summary["errors"], summary["utterances"]["errors"]),
    ]
    if summary["utterances"]["scored"]:
        parts += [
            *([_classes(summary["classes"]), _confidence(summary)] if _decided(summary) else []),
            _labels(summary["report"]),
            _modalities(summary),
            _order(summary),
            _groups(summary),
        ]
    return h.page("Run summary", "".join(parts))


# --- sections ---


def _head(summary: Mapping[str, Any]) -> str:
    run = summary["run"]
    finished = run["finished"].replace("+00:00", " UTC")
    return (
        "<h1>Run summary</h1>\n"
        f'<p class="quiet">Finished {h.text(finished)}, engine {h.text(run["engine"])}, m3er-fast '
        f"{h.text(summary['version'])}, model <code>{h.text(summary['signature'][:12])}</code></p>\n"
    )


def _status(summary: Mapping[str, Any]) -> str:
    shards, rows = summary["shards"], summary["utterances"]
    problems = []
    if shards["quarantined"]:
        problems.append(f"{h.of(shards['quarantined'], shards['corpus'], 'shard')} could not be read")
    if rows["errors"]:
        problems.append(f"{h.of(rows['errors'], rows['rows'], 'utterance')} could not be scored")
    count = h.number(rows["rows"])
    message = f"Every utterance was scored ({count})." if rows["rows"] else "The corpus has no utterances."
    if problems:
        message = f"<strong>Not everything was scored:</strong> {', and '.join(problems)}."
    doubts = _doubts(summary)
    alarm = " alarm" if problems or doubts else ""
    return f'<p class="status{alarm}">{" ".join((message, *doubts))}</p>\n'


def _doubts(summary: Mapping[str, Any]) -> list[str]:
    """Return what makes scores as a whole doubtful, each as a sentence."""
    rows, decided = summary["utterances"], _decided(summary)
    doubts = []
    if rows["scored"] >= _LEAST_FOR_ALARM and rows["abstained"] >= _WORRYING_ABSTENTION * rows["scored"]:
        share = h.percent(rows["abstained"] / rows["scored"])
        doubts.append(f"<strong>The model abstained from {share} of them:</strong> no modality was effective there.")
    only = [entry["name"] for entry in summary["classes"] if entry["predictions"] == decided]
    if decided >= _LEAST_FOR_ALARM and only and len(summary["classes"]) > 1:
        doubts.append(f"<strong>Every prediction is {h.name(only[0])}.</strong>")
    if doubts:
        doubts.append(
            "Is the corpus like the training data? <code>m3er-fast audit CORPUS --model RUN</code> says more."
        )
    return doubts


def _decided(summary: Mapping[str, Any]) -> int:
    """Return the number of utterances that were scored and not abstained from."""
    return int(summary["utterances"]["scored"] - summary["utterances"]["abstained"])


def _tiles(summary: Mapping[str, Any]) -> str:
    rows, shards, run = summary["utterances"], summary["shards"], summary["run"]
    rate = run["rows_per_second"]
    resumed = f"; {h.plural(run['resumed'], 'shard')} scored by earlier runs" if run["resumed"] else ""
    shown = [
        ("Utterances scored", h.number(rows["scored"]), f"{h.plural(rows['errors'], 'error')}"),
        ("Shards scored", h.number(shards["scored"]), f"{h.number(shards['quarantined'])} in quarantine"),
        (
            "Utterances per second",
            h.number(round(rate)) if rate and run["rows"] else h.DASH,
            f"{h.number(run['rows'])} in {_duration(run['seconds'])}{resumed}",
        ),
        ("Mean confidence", h.percent(summary["confidence"]["mean"]), "probability of the predicted class"),
        (
            "Abstained",
            h.percent(rows["abstained"] / rows["scored"] if rows["scored"] else None),
            h.plural(rows["abstained"], "utterance"),
        ),
    ]
    return h.tiles(shown)


def _quarantine(entries: Sequence[Mapping[str, Any]]) -> str:
    if not entries:
        return ""
    rows = [
        (h.name(entry["shard"]), h.text(entry["reason"].removeprefix(f"{entry['shard']}: ")))
        for entry in entries[:_MOST_QUARANTINED]
    ]
    rest = len(entries) - len(rows)
    about = f"The first {len(rows)}; {rest} more are in <code>_quarantine.json</code>." if rest else ""
    return f"<h2>Quarantine</h2>\n{h.table(('Shard', 'Reason'), rows, about)}"


def _errors(entries: Sequence[Mapping[str, Any]], count: int) -> str:
    if not entries:
        return ""
    rows = [(h.name(entry["shard"]), h.number(entry["row"]), h.text(entry["error"])) for entry in entries]
    rest = count - len(rows)
    about = f"The first {len(rows)}; {h.number(rest)} more are in the column <code>error</code>." if rest else ""
    heads = ("Shard", "Row, from 0", "Reason")
    table = h.table(heads, rows, about, numbers=(1,))
    return f"<h2>Utterances that could not be scored</h2>\n{table}"


def _classes(classes: Sequence[Mapping[str, Any]]) -> str:
    largest = max(entry["share"] for entry in classes)
    rows = [
        (
            h.name(entry["name"]),
            h.share(entry["share"], largest),
            h.number(entry["predictions"]),
            h.percent(entry["mean_probability"]),
        )
        for entry in classes
    ]
    heads = ("Class", "Predicted for", "Utterances", "Mean probability")
    about = "Utterances that the model abstained from are left out, here and under confidence."
    return f"<h2>Classes</h2>\n{h.table(heads, rows, about, numbers=(2, 3))}"


def _labels(report: Mapping[str, Any] | None) -> str:
    if report is None:
        return ""
    count = h.plural(report["overall"]["support"], "utterance")
    return (
        f'<h2>Beside the labels</h2>\n<p class="quiet">Of {count} with a label.</p>\n{report_sections.details(report)}'
    )


def _confidence(summary: Mapping[str, Any]) -> str:
    histogram, decided, report = summary["confidence"]["histogram"], _decided(summary), summary["report"]
    largest, width = max(histogram), 100 // len(histogram)
    columns = []
    for index, count in enumerate(histogram):
        height = 100 * count / largest if largest else 0
        columns.append(
            f"<div><span>{h.percent(count / decided, sign=False)}</span>"
            f'<svg viewBox="0 0 1 100" preserveAspectRatio="none" aria-hidden="true">'
            f'<rect y="{100 - height:.1f}" width="1" height="{height:.1f}"/></svg>'
            f"{width * index}{h.DASH}{width * (index + 1)}</div>\n"
        )
    beside = ""
    if report is not None:
        calibration = report["calibration"]
        beside = (
            f" Where there are labels, the mean confidence is {h.percent(calibration['mean_confidence'])}, with an "
            f"expected calibration error (ECE) of {calibration['ece']:.3f}."
        )
    return (
        '<h2>Confidence</h2>\n<p class="quiet">Share of utterances by the probability of their predicted class, '
        f'both in percent.{beside}</p>\n<div class="columns">\n{"".join(columns)}</div>\n'
    )


def _modalities(summary: Mapping[str, Any]) -> str:
    rows = [
        (
            h.name(entry["name"]),
            h.share(entry["share"]),
            _reasons(entry, summary["utterances"]["scored"]),
            h.number(entry["ineffectual"]),
            h.number(entry["p_value_0"]),
        )
        for entry in summary["modalities"]
    ]
    about = (
        "Judged ineffectual, or missing. Why: the symptom that was furthest from the training data, with its share of "
        "the utterances. A modality that does not belong fits none of the others. One without any signal has the "
        "p-value 0."
    )
    heads = ("Modality", "Ineffectual in", "Why", "Utterances", f"With p{h.NARROW_SPACE}={h.NARROW_SPACE}0")
    return f"<h2>Ineffectual modalities</h2>\n{h.table(heads, rows, about, numbers=(3, 4))}"


def _reasons(entry: Mapping[str, Any], scored: int) -> str:
    """Return the reasons why a modality was ineffectual, each with its share of the scored utterances."""
    found = [(h.name(reason["reason"]), reason["rows"]) for reason in entry["reasons"]]
    missing = entry["ineffectual"] - sum(rows for _, rows in found)
    if missing:
        found = sorted([*found, ("missing", missing)], key=lambda reason: -reason[1])
    return "".join(f"<div>{reason}: {h.percent(rows / scored)}</div>" for reason, rows in found) or h.DASH


def _order(summary: Mapping[str, Any]) -> str:
    parts = [part for part in summary["order"] if part["rows"]]
    if len(parts) < 2:
        return ""
    names = [entry["name"] for entry in summary["modalities"]]
    curves = {name: [_ratio(part["ineffectual"][name], part["scored"]) for part in parts] for name in names}
    abstained = [_ratio(part["abstained"], part["scored"]) for part in parts]
    top = _axis_limit(share for shares in (*curves.values(), abstained) for share in shares if share is not None)
    panels = [(f"{h.plain(name)} ineffectual", shares) for name, shares in curves.items()] + [("Abstained", abstained)]
    plots = "".join(_panel(title, shares, parts, top) for title, shares in panels)
    return (
        "<h2>Over the corpus</h2>\n"
        f'<p class="quiet">Shares in {len(parts)} parts of the corpus, in the order of its shards, on a common scale. '
        f'Hover over a part to see where it begins.</p>\n<div class="panels">\n{plots}</div>\n'
    )


def _panel(title: str, shares: Sequence[float | None], parts: Sequence[Mapping[str, Any]], top: float) -> str:
    """Return a step curve of shares up to ``top`` over utterances, with gaps where nothing was scored."""
    curve, area, hits, row = [], [], [], 0
    drawn = False
    for share, part in zip(shares, parts, strict=True):
        left, right = row, row + part["rows"]
        row = right
        where = f"utterances {h.number(left + 1)} to {h.number(right)}, from {h.plain(part['shard'])} row {part['row']}"
        hits.append(
            f'<rect class="hit" x="{left}" width="{right - left}" height="100">'
            f"<title>{h.percent(share)} of {where}</title></rect>"
        )
        if share is None:
            drawn = False
            continue
        y = f"{100 - 100 * share / top:.2f}"
        curve.append(f"{'L' if drawn else 'M'}{left} {y}H{right}")
        area.append(f"M{left} 100V{y}H{right}V100Z")
        drawn = True
    known = [share for share in shares if share is not None]
    span = f"{h.percent(min(known))} to {h.percent(max(known))}" if known else h.DASH
    return (
        f'<div><h3>{title} <span class="quiet">{span}</span></h3>\n<div class="plot">'
        f'<div class="scale"><span>{h.percent(top)}</span><span>0</span></div>'
        f'<svg viewBox="0 0 {row} 100" preserveAspectRatio="none" role="img" aria-label="{title}, {span}">'
        f'<path class="grid" d="M0 50H{row}M0 0H{row}"/><path class="area" d="{"".join(area)}"/>'
        f'<path class="curve" d="{"".join(curve)}"/>{"".join(hits)}</svg>'
        f'<div class="ends"><span>1</span><span>utterance {h.number(row)}</span></div></div></div>\n'
    )


def _groups(summary: Mapping[str, Any]) -> str:
    groups = summary["groups"]
    if groups is None:
        return ""
    names = [entry["name"] for entry in summary["modalities"]]
    is_labelled = summary["report"] is not None
    named = [group for group in groups["named"] if group["scored"]]
    least = _LEAST_ROWS if any(group["scored"] >= _LEAST_ROWS for group in named) else 1

    def ineffectual(group: Mapping[str, Any]) -> float:
        return float(sum(group["ineffectual"].values()) / (len(names) * group["scored"]))

    def says_something(group: Mapping[str, Any]) -> bool:
        return bool(is_labelled or ineffectual(group) or group["abstained"])

    shown = sorted(
        (group for group in named if group["scored"] >= least and says_something(group)),
        key=lambda group: (-ineffectual(group), group["name"]),
    )
    rows = [
        (
            h.name(group["name"]),
            h.number(group["scored"]),
            *(h.share(group["ineffectual"][name] / group["scored"]) for name in names),
            h.percent(group["abstained"] / group["scored"]),
            *([h.percent(_ratio(group["right"], group["labelled"]))] if is_labelled else []),
        )
        for group in shown[:_MOST_GROUPS]
    ]
    shown_groups = f"{h.of(len(rows), len(named), 'group')}, those with the largest share of ineffectual modalities"
    notes = [f"{shown_groups} among groups of {least} utterances or more." if least > 1 else f"{shown_groups}."]
    if named and not shown:
        notes = ["No group has ineffectual modalities."]
    if groups["others"]:
        notes.append(f"Not listed: {h.plural(groups['others']['rows'], 'utterance')} in further groups.")
    if groups["rows_without"]:
        notes.append(f"Without a group: {h.plural(groups['rows_without'], 'utterance')}.")
    if groups["unreadable"]:
        first = groups["unreadable"][0]
        notes.append(
            f"The groups of some shards could not be read, such as {h.name(first['shard'])}: {h.text(first['reason'])}"
        )
    heads = ("Group", "Utterances", *(f"{h.name(name)} ineffectual" for name in names), "Abstained")
    last = ("Right",) if is_labelled else ()
    if not rows:
        return f'<h2>Groups</h2>\n<p class="quiet">{" ".join(notes)}</p>\n'
    table = h.table((*heads, *last), rows, " ".join(notes), numbers=(1, len(heads) - 1, len(heads)))
    return f"<h2>Groups</h2>\n{table}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _axis_limit(shares: Any) -> float:
    """Return the upper end of an axis for all shares."""
    largest = max(shares, default=0.0)
    return next(limit for limit in _AXIS_LIMITS if largest <= limit)
