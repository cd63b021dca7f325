"""The summary of a run over recordings: what was found in each, as JSON and as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from m3er_fast import html_page
from m3er_fast.execution.run_folder import RunFolder
from m3er_fast.shards.plan import QuarantinedShard

CONSENT = (
    "Features of a face and a voice are personal data: people must have agreed to this use of their recordings, and a "
    "prediction is a guess about what is shown, not about what is felt."
)

_NOTABLE_LOSS = 0.02  # the share of a recording's claimed seconds whose loss is pointed out
_WORDS_FROM = {"transcript": "transcript", "asr": "speech recognition"}
_MOST_ROWS = 500  # recordings that the page shows; the JSON has all


def write_summary(
    folder: RunFolder, reports: Mapping[str, dict[str, Any]], quarantined: Sequence[QuarantinedShard], seconds: float
) -> None:
    """Write ``_summary.json`` and ``_summary.html``.

    Args:
        folder: of the run.
        reports: of each recording that has a shard, by the name of its file.
        quarantined: the others, each with the reason.
        seconds: that the run took.

    Raises:
        OSError: they cannot be written.
    """
    from m3er_fast import __version__

    ordered = dict(sorted(reports.items()))
    summary = {
        "version": __version__,
        "recordings": ordered,
        "totals": {
            "recordings": len(ordered),
            "quarantined": len(quarantined),
            "utterances": sum(report["utterances"] for report in ordered.values()),
            "seconds": round(sum(report["seconds"] for report in ordered.values()), 3),
        },
        "quarantine": [entry._asdict() for entry in quarantined],
        "run": {
            "seconds": round(seconds, 3),
            "finished": datetime.now(UTC).isoformat(sep=" ", timespec="seconds"),
        },
    }
    folder.write_summary(summary, render(summary))


def render(summary: Mapping[str, Any]) -> str:
    """Return the page for a summary."""
    totals, run = summary["totals"], summary["run"]
    body = (
        "<h1>Recordings</h1>\n"
        f'<p class="quiet">Finished {html_page.text(run["finished"].replace("+00:00", " UTC"))}, m3er-fast '
        f"{html_page.text(summary['version'])}</p>\n{_status(summary)}"
        + html_page.tiles(
            [
                ("Recordings", f"{totals['recordings']}", f"{totals['quarantined']} in quarantine"),
                ("Utterances", f"{totals['utterances']}", ""),
                ("Recorded", _time(totals["seconds"]), f"extracted in {_time(run['seconds'])}"),
            ]
        )
        + _quarantine(summary["quarantine"])
        + _recordings(summary["recordings"])
        + f'<p class="quiet">{CONSENT}</p>\n'
    )
    return html_page.page("Recordings", body)


def problems(report: Mapping[str, Any]) -> list[str]:
    """Return what is notable about a recording, each in a few words."""
    found = []
    claimed = report["seconds_claimed"]
    for modality, none, ends in (("audio", "no sound", "the sound ends"), ("face", "no pictures", "the pictures end")):
        if modality not in report:
            continue
        of_modality = report[modality]
        if of_modality is None:
            found.append(none)
            continue
        if claimed and of_modality.get("seconds", claimed) < (1 - _NOTABLE_LOSS) * claimed:
            found.append(f"{ends} at {_time(of_modality['seconds'])} of {_time(claimed)}")
        if of_modality.get("damaged_packets"):
            found.append(f"{of_modality['damaged_packets']} damaged packets of {modality}")
    face = report.get("face") or {}
    if face.get("pictures") and face.get("without_face") == face["pictures"]:
        found.append("no face")
    elif any(int(count) > 1 for count in face.get("faces", {})):
        followed = face.get("followed", "the one that was largest first")
        found.append(f"more than one face: {followed} was followed")
    if claimed and face.get("ends", claimed) < (1 - _NOTABLE_LOSS) * claimed:
        found.append(f"{face['file']} ends at {_time(face['ends'])} of {_time(claimed)}")
    words = report.get("text")
    if words and not words["words"]:
        found.append("no words")
    if words and words["without_time"]:
        found.append(f"{words['without_time']} of {words['words']} words had no time and share that of their cue")
    return found


def _status(summary: Mapping[str, Any]) -> str:
    quarantined, notable = summary["quarantine"], sum(bool(problems(r)) for r in summary["recordings"].values())
    if quarantined:
        return f'<p class="status alarm"><strong>{len(quarantined)} could not be read</strong>; see below.</p>\n'
    if notable:
        return f'<p class="status">Every recording was read; {notable} of them with notes below.</p>\n'
    return '<p class="status">Every recording was read, without a note.</p>\n'


def _quarantine(entries: Sequence[Mapping[str, str]]) -> str:
    if not entries:
        return ""
    rows = [[html_page.name(entry["shard"]), html_page.text(entry["reason"])] for entry in entries[:_MOST_ROWS]]
    return "<h2>In quarantine</h2>\n" + html_page.table(["Recording", "Reason"], rows)


def _recordings(reports: Mapping[str, Mapping[str, Any]]) -> str:
    modalities = sorted({name for report in reports.values() for name in report["missing_steps"]})
    rows = []
    for name, report in list(reports.items())[:_MOST_ROWS]:
        text = report.get("text") or {}
        rows.append(
            [
                html_page.name(name),
                _time(report["seconds"]),
                f"{report['utterances']}",
                *(_share(report["missing_steps"].get(modality)) for modality in modalities),
                f"{text['unknown']} of {text['words']}" if text else html_page.DASH,
                _WORDS_FROM.get(str(report.get("words_from")), html_page.DASH),
                html_page.text("; ".join(problems(report))),
            ]
        )
    heads = ["Recording", "Length", "Utterances", *(f"{name}: empty steps" for name in modalities)]
    more = f"The first {_MOST_ROWS} of {len(reports)}. " if len(reports) > _MOST_ROWS else ""
    return "<h2>In each recording</h2>\n" + html_page.table(
        [*heads, "Unknown words", "Words from", "Notes"],
        rows,
        f"{more}A step is empty where no frame of the modality lies in it, such as a word without a face.",
        numbers=range(1, len(heads) + 1),
    )


def _share(value: float | None) -> str:
    return "unavailable" if value is None else f"{100 * value:.1f}{html_page.NARROW_SPACE}%"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if not (hours or minutes):
        return f"{seconds:.1f}{html_page.NARROW_SPACE}s"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
