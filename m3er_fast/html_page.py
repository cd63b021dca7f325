"""Building blocks of self-contained HTML pages: no script, no external resource, light and dark, readable on a phone.

Bars and curves are SVG that stretches with the page. The numbers are shown next to them as text: nothing is conveyed by
colour or length alone.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

NARROW_SPACE = "\N{NARROW NO-BREAK SPACE}"
DASH = "\N{EN DASH}"

_MOST_NAME_LENGTH, _MOST_TEXT_LENGTH = 60, 300

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
.wide { overflow-x: auto; margin-bottom: .75rem; }
svg { display: block; width: 100%; }
.columns { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: 3px; text-align: center;
  font-size: clamp(.65rem, 2.6vw, .8rem); max-width: 30rem; }
td > div { white-space: nowrap; }
.columns { white-space: nowrap; }
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
.plot.square { max-width: 20rem; }
.plot.square svg { height: auto; aspect-ratio: 1; }
.plot .bar { fill: var(--bar); fill-opacity: .55; stroke: var(--page); vector-effect: non-scaling-stroke; }
.plot .ideal, .plot .before { fill: none; stroke: var(--quiet); vector-effect: non-scaling-stroke; }
.plot .before { stroke: var(--alarm); stroke-width: 2; stroke-dasharray: 5 3; }
.confusion td { padding: .3rem .5rem;
  background: color-mix(in srgb, var(--bar) calc(var(--share) * 45%), transparent); }
.confusion th[scope] { white-space: nowrap; }
summary { cursor: pointer; color: var(--quiet); font-size: .9rem; }
@media (max-width: 30rem) { body { padding: 1rem .9rem 2rem; } th, td { padding-right: .5rem; } }
"""


def page(title: str, body: str) -> str:
    """Return a whole page.

    Args:
        title: plain text.
        body: HTML.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], about: str = "", *, numbers: Sequence[int] = ()) -> str:
    """Return a table of cells that are HTML, in which text is escaped already.

    Args:
        heads: of the columns.
        rows: their cells.
        about: a line above the table, HTML too.
        numbers: the columns that hold numbers, which are aligned on the right.
    """

    def line(cells: Sequence[str], tag: str) -> str:
        marks = [' class="number"' if column in numbers else "" for column in range(len(cells))]
        return f"<tr>{''.join(f'<{tag}{mark}>{cell}</{tag}>' for mark, cell in zip(marks, cells, strict=True))}</tr>\n"

    note = f'<p class="quiet">{about}</p>\n' if about else ""
    body = "".join(line(row, "td") for row in rows)
    return (
        f'{note}<div class="wide"><table>\n<thead>{line(heads, "th")}</thead>\n<tbody>\n{body}</tbody></table></div>\n'
    )


def tiles(values: Sequence[tuple[str, str, str]]) -> str:
    """Return tiles of a name, a value and a note each, all of them HTML."""
    cells = "".join(f"<div><dt>{title}</dt><dd>{value}</dd><dd>{note}</dd></div>\n" for title, value, note in values)
    return f'<dl class="tiles">\n{cells}</dl>\n'


def share(value: float, largest: float = 1.0) -> str:
    """Return a share in percent, with a bar that is full at ``largest``."""
    width = 100 * value / largest if largest else 0
    return (
        f'<div class="share"><span>{percent(value)}</span>'
        '<svg viewBox="0 0 100 1" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" width="100" height="1"/><rect width="{width:.2f}" height="1"/></svg></div>'
    )


def text(value: str, most: int = _MOST_TEXT_LENGTH) -> str:
    """Return escaped text from a file, isolated so that it does not reorder the text around it."""
    return f'<bdi dir="ltr">{plain(value, most)}</bdi>'


def name(value: str) -> str:
    """Return a name from a file, as :func:`text` does, shortened to what fits into a column."""
    return text(value, _MOST_NAME_LENGTH)


def plain(value: str, most: int = _MOST_NAME_LENGTH) -> str:
    """Escape text from a file, for attributes too, shorten it, and make invisible and reordering characters visible."""
    if len(value) > most:
        value = f"{value[:most]}\N{HORIZONTAL ELLIPSIS}"
    return html.escape("".join(c if c.isprintable() or c == NARROW_SPACE else ascii(c)[1:-1] for c in value))


def number(value: int) -> str:
    """Return a number with its thousands apart."""
    return f"{value:,}".replace(",", NARROW_SPACE)


def plural(count: int, noun: str) -> str:
    """Return a number of things."""
    return f"{number(count)} {noun}{'' if count == 1 else 's'}"


def of(count: int, whole: int, noun: str) -> str:
    """Return a number of all the things that there are."""
    return f"{number(count)} of {plural(whole, noun)}"


def percent(value: float | None, *, sign: bool = True) -> str:
    """Return a share in percent; a dash for None."""
    if value is None:
        return DASH
    hundredths = 100 * value
    is_whole = hundredths in (0, 100)
    shown = f"{hundredths:.0f}" if is_whole else "&lt;0.1" if hundredths < 0.05 else f"{hundredths:.1f}"
    return f"{shown}{NARROW_SPACE}%" if sign else shown
