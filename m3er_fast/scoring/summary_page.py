"""The run summary as one HTML page: no script, no external resource, light and dark, readable on a phone.

Strings that come from files (names, ids, reasons) are escaped and shown as text. Bars and curves are SVG that stretches
with the page. The numbers are shown next to them as text: nothing is conveyed by colour or length alone.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

_MOST_QUARANTINED = 200  # shards in quarantine that are shown
_MOST_GROUPS, _LEAST_ROWS = 20, 10  # groups that are shown, and rows of the smallest, if any group has as many
_MOST_NAME_LENGTH, _MOST_TEXT_LENGTH = 60, 300
_AXIS_LIMITS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of shares
_NARROW_SPACE = "\N{NARROW NO-BREAK SPACE}"
_DASH = "\N{EN DASH}"

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1b1f24; --quiet: #57606a; --line: #d8dee4; --bar: #0072b2;
  --track: #eef1f4; --alarm: #b34700; --alarm-page: #fdf1e7; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --text: #e4e8ec; --quiet: #9aa5b1; --line: #333a42;
  --bar: #56b4e9; --track: #22272d; --alarm: #f0a35e; --alarm-page: #2a2016; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1.25rem 3rem; background: var(--page); color: var(--text);
  font: 15px/1.45 system-ui, sans-serif; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0; }
h2 { font-size: 1.1rem; margin: 2.25rem 0 .25rem; }
h3 { font-size: .95rem; font-weight: 600; margin: 0 0 .35rem; }
h3 span { font-weight: 400; }
p { margin: .25rem 0 .75rem; }
.quiet, th { color: var(--quiet); }
.quiet { font-size: .9rem; }
code { font: .85em ui-monospace, monospace; }
.status { border-left: 4px solid var(--bar); padding: .5rem .8rem; margin: 1rem 0; background: var(--track); }
.status.alarm { border-color: var(--alarm); background: var(--alarm-page); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.tiles div { border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem; }
.tiles dt { color: var(--quiet); font-size: .85rem; }
.tiles dd { margin: 0; font-size: 1.3rem; font-weight: 600; }
.tiles dd + dd { font-size: .85rem; font-weight: 400; color: var(--quiet); }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: 500; font-size: .85rem; padding: .25rem .8rem .25rem 0; vertical-align: bottom;
  overflow-wrap: normal; }
td { padding: .25rem .8rem .25rem 0; border-top: 1px solid var(--line); vertical-align: middle; }
th:last-child, td:last-child { padding-right: 0; }
td:first-child { min-width: clamp(6rem, 16vw, 9.5rem); }
.number { text-align: right; }
td.number { white-space: nowrap; }
.share { display: flex; flex-wrap: wrap; align-items: center; column-gap: .6rem; min-width: 4.5rem; }
.share span { flex: 0 0 4.2rem; white-space: nowrap; }
.share svg { flex: 1 1 5rem; height: .7rem; }
.share rect { fill: var(--bar); }
.share .track { fill: var(--track); }
.wide { overflow-x: auto; }
svg { display: block; width: 100%; }
.columns { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: 3px; text-align: center;
  font-size: clamp(.65rem, 2.6vw, .8rem); max-width: 40rem; }
.columns span { white-space: nowrap; }
.columns svg { height: 7rem; border-bottom: 1px solid var(--quiet); }
.columns rect { fill: var(--bar); }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1.25rem 1.5rem; }
.plot { display: grid; grid-template-columns: auto 1fr; column-gap: .4rem; font-size: .8rem; color: var(--quiet); }
.plot .scale { display: flex; flex-direction: column; justify-content: space-between; text-align: right; }
.plot svg { height: 6rem; border-left: 1px solid var(--line); border-bottom: 1px solid var(--quiet); }
.plot .area { fill: var(--bar); fill-opacity: .2; }
.plot .curve { fill: none; stroke: var(--bar); stroke-width: 2; vector-effect: non-scaling-stroke; }
.plot .grid { stroke: var(--line); vector-effect: non-scaling-stroke; }
.plot .hit { fill: transparent; }
.plot .ends { grid-column: 2; display: flex; justify-content: space-between; }
@media (max-width: 30rem) { body { padding: 1rem .9rem 2rem; } th, td { padding-right: .5rem; } }
"""


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
            _classes(summary["classes"]),
            _confidence(summary["confidence"], summary["utterances"]["scored"]),
            _modalities(summary),
            _order(summary),
            _groups(summary),
        ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>Run summary</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{''.join(parts)}</body>\n</html>\n"
    )


# --- sections ---


def _head(summary: Mapping[str, Any]) -> str:
    run = summary["run"]
    finished = run["finished"].replace("+00:00", " UTC")
    return (
        "<h1>Run summary</h1>\n"
        f'<p class="quiet">Finished {_text(finished)}, engine {_text(run["engine"])}, m3er-fast '
        f"{_text(summary['version'])}, model <code>{_text(summary['signature'][:12])}</code></p>\n"
    )


def _status(summary: Mapping[str, Any]) -> str:
    shards, rows = summary["shards"], summary["utterances"]
    problems = []
    if shards["quarantined"]:
        problems.append(f"{_of(shards['quarantined'], shards['corpus'], 'shard')} could not be read")
    if rows["errors"]:
        problems.append(f"{_of(rows['errors'], rows['rows'], 'utterance')} could not be scored")
    if not problems:
        count = _number(rows["rows"])
        message = f"Every utterance was scored ({count})." if rows["rows"] else "The corpus has no utterances."
        return f'<p class="status">{message}</p>\n'
    return f'<p class="status alarm"><strong>Not everything was scored:</strong> {", and ".join(problems)}.</p>\n'


def _tiles(summary: Mapping[str, Any]) -> str:
    rows, shards, run = summary["utterances"], summary["shards"], summary["run"]
    rate = run["rows_per_second"]
    resumed = f"; {_plural(run['resumed'], 'shard')} scored by earlier runs" if run["resumed"] else ""
    tiles = [
        ("Utterances scored", _number(rows["scored"]), f"{_plural(rows['errors'], 'error')}"),
        ("Shards scored", _number(shards["scored"]), f"{_number(shards['quarantined'])} in quarantine"),
        (
            "Utterances per second",
            _number(round(rate)) if rate and run["rows"] else _DASH,
            f"{_number(run['rows'])} in {_duration(run['seconds'])}{resumed}",
        ),
        ("Mean confidence", _percent(summary["confidence"]["mean"]), "probability of the predicted class"),
        (
            "Abstained",
            _percent(rows["abstained"] / rows["scored"] if rows["scored"] else None),
            _plural(rows["abstained"], "utterance"),
        ),
    ]
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd><dd>{note}</dd></div>\n" for name, value, note in tiles)
    return f'<dl class="tiles">\n{cells}</dl>\n'


def _quarantine(entries: Sequence[Mapping[str, Any]]) -> str:
    if not entries:
        return ""
    rows = [
        (_name(entry["shard"]), _text(entry["reason"].removeprefix(f"{entry['shard']}: ")))
        for entry in entries[:_MOST_QUARANTINED]
    ]
    rest = len(entries) - len(rows)
    about = f"The first {len(rows)}; {rest} more are in <code>_quarantine.json</code>." if rest else ""
    return f"<h2>Quarantine</h2>\n{_table(('Shard', 'Reason'), rows, about)}"


def _errors(entries: Sequence[Mapping[str, Any]], count: int) -> str:
    if not entries:
        return ""
    rows = [(_name(entry["shard"]), _number(entry["row"]), _text(entry["error"])) for entry in entries]
    rest = count - len(rows)
    about = f"The first {len(rows)}; {_number(rest)} more are in the column <code>error</code>." if rest else ""
    heads = ("Shard", "Row, from 0", "Reason")
    table = _table(heads, rows, about, numbers=(1,))
    return f"<h2>Utterances that could not be scored</h2>\n{table}"


def _classes(classes: Sequence[Mapping[str, Any]]) -> str:
    largest = max(entry["share"] for entry in classes)
    rows = [
        (
            _name(entry["name"]),
            _share(entry["share"], largest),
            _number(entry["predictions"]),
            _percent(entry["mean_probability"]),
        )
        for entry in classes
    ]
    heads = ("Class", "Predicted for", "Utterances", "Mean probability")
    return f"<h2>Classes</h2>\n{_table(heads, rows, numbers=(2, 3))}"


def _confidence(confidence: Mapping[str, Any], scored: int) -> str:
    histogram = confidence["histogram"]
    largest, width = max(histogram), 100 // len(histogram)
    columns = []
    for index, count in enumerate(histogram):
        height = 100 * count / largest if largest else 0
        columns.append(
            f"<div><span>{_percent(count / scored, sign=False)}</span>"
            f'<svg viewBox="0 0 1 100" preserveAspectRatio="none" aria-hidden="true">'
            f'<rect y="{100 - height:.1f}" width="1" height="{height:.1f}"/></svg>'
            f"{width * index}{_DASH}{width * (index + 1)}</div>\n"
        )
    return (
        '<h2>Confidence</h2>\n<p class="quiet">Share of utterances by the probability of their predicted class, '
        f'both in percent.</p>\n<div class="columns">\n{"".join(columns)}</div>\n'
    )


def _modalities(summary: Mapping[str, Any]) -> str:
    rows = [
        (
            _name(entry["name"]),
            _share(entry["share"]),
            _reasons(entry, summary["utterances"]["scored"]),
            _number(entry["ineffectual"]),
            _number(entry["p_value_0"]),
        )
        for entry in summary["modalities"]
    ]
    about = (
        "Judged ineffectual, or missing. Why: the symptom that was furthest from the training data, with its share of "
        "the utterances. A modality that does not belong fits none of the others. One without any signal has the "
        "p-value 0."
    )
    heads = ("Modality", "Ineffectual in", "Why", "Utterances", f"With p{_NARROW_SPACE}={_NARROW_SPACE}0")
    return f"<h2>Ineffectual modalities</h2>\n{_table(heads, rows, about, numbers=(3, 4))}"


def _reasons(entry: Mapping[str, Any], scored: int) -> str:
    """Return the reasons why a modality was ineffectual, each with its share of the scored utterances."""
    found = [(_name(reason["reason"]), reason["rows"]) for reason in entry["reasons"]]
    missing = entry["ineffectual"] - sum(rows for _, rows in found)
    if missing:
        found = sorted([*found, ("missing", missing)], key=lambda reason: -reason[1])
    return "".join(f"<div>{reason}: {_percent(rows / scored)}</div>" for reason, rows in found) or _DASH


def _order(summary: Mapping[str, Any]) -> str:
    parts = [part for part in summary["order"] if part["rows"]]
    if len(parts) < 2:
        return ""
    names = [entry["name"] for entry in summary["modalities"]]
    curves = {name: [_ratio(part["ineffectual"][name], part["scored"]) for part in parts] for name in names}
    abstained = [_ratio(part["abstained"], part["scored"]) for part in parts]
    top = _axis_limit(share for shares in (*curves.values(), abstained) for share in shares if share is not None)
    panels = [(f"{_plain(name)} ineffectual", shares) for name, shares in curves.items()] + [("Abstained", abstained)]
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
        where = f"utterances {_number(left + 1)} to {_number(right)}, from {_plain(part['shard'])} row {part['row']}"
        hits.append(
            f'<rect class="hit" x="{left}" width="{right - left}" height="100">'
            f"<title>{_percent(share)} of {where}</title></rect>"
        )
        if share is None:
            drawn = False
            continue
        y = f"{100 - 100 * share / top:.2f}"
        curve.append(f"{'L' if drawn else 'M'}{left} {y}H{right}")
        area.append(f"M{left} 100V{y}H{right}V100Z")
        drawn = True
    known = [share for share in shares if share is not None]
    span = f"{_percent(min(known))} to {_percent(max(known))}" if known else _DASH
    return (
        f'<div><h3>{title} <span class="quiet">{span}</span></h3>\n<div class="plot">'
        f'<div class="scale"><span>{_percent(top)}</span><span>0</span></div>'
        f'<svg viewBox="0 0 {row} 100" preserveAspectRatio="none" role="img" aria-label="{title}, {span}">'
        f'<path class="grid" d="M0 50H{row}M0 0H{row}"/><path class="area" d="{"".join(area)}"/>'
        f'<path class="curve" d="{"".join(curve)}"/>{"".join(hits)}</svg>'
        f'<div class="ends"><span>1</span><span>utterance {_number(row)}</span></div></div></div>\n'
    )


def _groups(summary: Mapping[str, Any]) -> str:
    groups = summary["groups"]
    if groups is None:
        return ""
    names = [entry["name"] for entry in summary["modalities"]]
    named = [group for group in groups["named"] if group["scored"]]
    least = _LEAST_ROWS if any(group["scored"] >= _LEAST_ROWS for group in named) else 1

    def ineffectual(group: Mapping[str, Any]) -> float:
        return float(sum(group["ineffectual"].values()) / (len(names) * group["scored"]))

    shown = sorted(
        (group for group in named if group["scored"] >= least), key=lambda group: (-ineffectual(group), group["name"])
    )
    rows = [
        (
            _name(group["name"]),
            _number(group["scored"]),
            *(_share(group["ineffectual"][name] / group["scored"]) for name in names),
            _percent(group["abstained"] / group["scored"]),
        )
        for group in shown[:_MOST_GROUPS]
    ]
    shown_groups = f"{_of(len(rows), len(named), 'group')}, those with the largest share of ineffectual modalities"
    notes = [f"{shown_groups} among groups of {least} utterances or more." if least > 1 else f"{shown_groups}."]
    if groups["others"]:
        notes.append(f"Not listed: {_plural(groups['others']['rows'], 'utterance')} in further groups.")
    if groups["rows_without"]:
        notes.append(f"Without a group: {_plural(groups['rows_without'], 'utterance')}.")
    if groups["unreadable"]:
        first = groups["unreadable"][0]
        notes.append(
            f"The groups of some shards could not be read, such as {_name(first['shard'])}: {_text(first['reason'])}"
        )
    heads = ("Group", "Utterances", *(f"{_name(name)} ineffectual" for name in names), "Abstained")
    table = _table(heads, rows, " ".join(notes), numbers=(1, len(heads) - 1))
    return f"<h2>Groups</h2>\n{table}"


# --- building blocks; text arguments of tables are already escaped ---


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], about: str = "", *, numbers: Sequence[int] = ()) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        marks = [' class="number"' if column in numbers else "" for column in range(len(cells))]
        return f"<tr>{''.join(f'<{tag}{mark}>{cell}</{tag}>' for mark, cell in zip(marks, cells, strict=True))}</tr>\n"

    text = f'<p class="quiet">{about}</p>\n' if about else ""
    body = "".join(line(row, "td") for row in rows)
    return (
        f'{text}<div class="wide"><table>\n<thead>{line(heads, "th")}</thead>\n<tbody>\n{body}</tbody></table></div>\n'
    )


def _share(share: float, largest: float = 1.0) -> str:
    """Return a share in percent, with a bar that is full at ``largest``."""
    width = 100 * share / largest if largest else 0
    return (
        f'<div class="share"><span>{_percent(share)}</span>'
        '<svg viewBox="0 0 100 1" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" width="100" height="1"/><rect width="{width:.2f}" height="1"/></svg></div>'
    )


def _text(value: str, most: int = _MOST_TEXT_LENGTH) -> str:
    """Return escaped text from a file, isolated so that it does not reorder the text around it."""
    return f'<bdi dir="ltr">{_plain(value, most)}</bdi>'


def _name(value: str) -> str:
    return _text(value, _MOST_NAME_LENGTH)


def _plain(text: str, most: int = _MOST_NAME_LENGTH) -> str:
    """Escape text from a file, for attributes too, shorten it, and make invisible and reordering characters visible."""
    if len(text) > most:
        text = f"{text[:most]}\N{HORIZONTAL ELLIPSIS}"
    return html.escape("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text))


def _number(value: int) -> str:
    return f"{value:,}".replace(",", _NARROW_SPACE)


def _plural(count: int, noun: str) -> str:
    return f"{_number(count)} {noun}{'' if count == 1 else 's'}"


def _of(count: int, whole: int, noun: str) -> str:
    return f"{_number(count)} of {_plural(whole, noun)}"


def _percent(share: float | None, *, sign: bool = True) -> str:
    if share is None:
        return _DASH
    percent = 100 * share
    shown = f"{percent:.0f}" if percent in (0, 100) else "&lt;0.1" if percent < 0.05 else f"{percent:.1f}"
    return f"{shown}{_NARROW_SPACE}%" if sign else shown


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
