"""The scores of a model on a corpus as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from m3er_fast import html_page as h
from m3er_fast import report_sections

_MOST_GROUPS = 20  # that are shown of a split


def render(evaluation: Mapping[str, Any]) -> str:
    """Return the page for ``CorpusEvaluation.to_dict``."""
    clean, *corrupted = evaluation["conditions"]
    body = [_head(evaluation)]
    for part in reversed(clean["splits"]):  # test comes last, and first on the page
        body.append(f"<h2>{_split_title(part['split'])}, clean</h2>\n{report_sections.details(part['report'])}")
        body.append(_groups(part))
    body.append(_conditions(evaluation["conditions"]))
    if corrupted:
        body.append(_under_paper_noise(corrupted))
    return h.page("Evaluation", "".join(body))


def _head(evaluation: Mapping[str, Any]) -> str:
    splits = evaluation["conditions"][0]["splits"]
    sizes = ", ".join(f"{part['split']} {h.number(part['report']['overall']['support'])}" for part in splits)
    temperature = evaluation["temperature"]
    scaled = "not calibrated" if temperature == 1 else f"calibrated by a temperature of {temperature:.3g}"
    return (
        f'<h1>Evaluation</h1>\n<p class="quiet">m3er-fast {h.text(evaluation["version"])}; labelled utterances: '
        f"{sizes}; {scaled}</p>\n"
    )


def _split_title(split: str) -> str:
    return "All utterances" if split == "all" else f"Split {h.name(split)}"


def _conditions(conditions: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of all scores: a row per condition and split."""
    rows = []
    for condition in conditions:
        for part in condition["splits"]:
            report = part["report"]
            before = report["before_calibration"]
            rows.append(
                (
                    h.name(condition["corruption"] or "clean"),
                    h.name(part["split"]),
                    f"{report['overall']['f1']:.3f}",
                    h.percent(report["overall"]["mean_accuracy"]),
                    h.share(report.get("accuracy", report.get("exact_match"))),
                    h.percent(report["balanced_accuracy"]),
                    f"{report['calibration']['ece']:.3f}",
                    f"{before['ece']:.3f}" if before else h.DASH,
                    h.percent(part["abstained"]),
                )
            )
    accuracy = "Exact match" if "exact_match" in conditions[0]["splits"][0]["report"] else "Accuracy"
    heads = ("Corruption", "Split", "F1", "MA", accuracy, "Balanced accuracy", "ECE", "ECE before", "Abstained")
    about = "A corruption spoils at least one modality, but never all, of about 75 % of the utterances."
    table = h.table(heads, rows, about if len(conditions) > 1 else "", numbers=(2, 3, 5, 6, 7, 8))
    return f"<h2>Corruptions</h2>\n{table}"


def _under_paper_noise(corrupted: Sequence[Mapping[str, Any]]) -> str:
    """Return the details of the last split under the first corruption."""
    condition = corrupted[0]
    part = condition["splits"][-1]
    title = f"{_split_title(part['split'])}, {h.name(condition['corruption'])}"
    return f"<h2>{title}</h2>\n{report_sections.details(part['report'])}"


def _groups(part: Mapping[str, Any]) -> str:
    groups = sorted(part["groups"], key=lambda group: (group["accuracy"], group["name"]))
    if not groups:
        return ""
    accuracy = "Exact match" if "exact_match" in part["report"] else "Accuracy"
    rows = [
        (
            h.name(group["name"]),
            h.number(group["utterances"]),
            f"{group['f1']:.3f}",
            h.percent(group["mean_accuracy"]),
            h.share(group["accuracy"]),
            f"{group['ece']:.3f}",
            f"{group['ece_by_chance']:.3f}",
        )
        for group in groups[:_MOST_GROUPS]
    ]
    heads = ("Group", "Utterances", "F1", "MA", accuracy, "ECE", "ECE by chance")
    about = f"{h.of(len(rows), len(groups), 'group')}, those with the lowest {accuracy.lower()}."
    return f"<h3>Groups</h3>\n{h.table(heads, rows, about, numbers=(1, 2, 3, 5, 6))}"
