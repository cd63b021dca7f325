"""The summary of a run, counted from its folder of scores: the first thing to look at when a run has finished.

``_summary.json``, and ``_summary.html``, a self-contained page of the same, are written when every shard is scored or
in quarantine. Everything but the key ``run`` depends only on the model and the corpus, so a run that was interrupted
and resumed has the same summary as one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from m3er_fast.execution.threads import map_in_order
from m3er_fast.metrics import ClassificationReport
from m3er_fast.scoring.counts import Counts, MapFunction, RowCounts, ScoreCounts, count_scores
from m3er_fast.scoring.shard import ScoringJob
from m3er_fast.scoring.summary_page import render
from m3er_fast.shards.plan import QuarantinedShard, Shard

_THREADS = 4
# Parts that the corpus is divided into, and the fewest rows of one: the shares of fewer rows say little.
_MOST_PARTS, _LEAST_ROWS = 100, 50


class RunRecord(NamedTuple):
    """The facts that differ between runs that leave the same scores."""

    engine: str
    rows: int  # utterances scored by this run, excluding earlier ones
    seconds: float  # from the call to the last shard
    resumed: int  # shards that an earlier run had finished
    finished: str  # date and time, UTC


def map_in_threads(function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Any]:
    """Call a function with every task in a few threads, and yield the results in the order of the tasks."""
    return map_in_order(lambda task, _: function(task), tasks, _THREADS)


def write_summary(
    job: ScoringJob,
    rows: Mapping[str, int],
    quarantined: Sequence[QuarantinedShard],
    run: RunRecord,
    map_tasks: MapFunction = map_in_threads,
) -> None:
    """Count a complete folder of scores, and write ``_summary.json`` and ``_summary.html`` to it.

    Args:
        job: the run's.
        rows: number of rows of every shard that has scores.
        quarantined: the other shards, in the order of the corpus.
        run: written unchanged, with its rate.
        map_tasks: calls a function for some shards at a time; the result does not depend on it.

    Raises:
        CorpusError: scores cannot be read back.
        OSError: the summary cannot be written.
    """
    summary = summarize(job, rows, quarantined, map_tasks)
    summary["run"] = {**run._asdict(), "rows_per_second": _ratio(run.rows, run.seconds)}
    job.output.write_summary(summary, render(summary))


def summarize(
    job: ScoringJob,
    rows: Mapping[str, int],
    quarantined: Sequence[QuarantinedShard],
    map_tasks: MapFunction = map_in_threads,
) -> dict[str, Any]:
    """Return the content of ``_summary.json``, as docs/scoring_summary.md lists it, without ``run``.

    The arguments are those of :func:`write_summary`.

    Raises:
        CorpusError: scores cannot be read back.
    """
    from m3er_fast import __version__

    shards = [shard for shard in job.plan.shards if shard.name in rows]
    starts = np.cumsum([0, *(rows[shard.name] for shard in shards)])
    edges = _part_edges(int(starts[-1]))
    found = count_scores(job, shards, starts, edges, map_tasks)
    total = RowCounts.view(found.total)
    decided = int(total.scored - total.abstained)
    return {
        "version": __version__,
        "signature": job.output.signature,
        "utterances": {
            "rows": int(starts[-1]),
            "scored": int(total.scored),
            "errors": int(starts[-1] - total.scored),
            "abstained": int(total.abstained),
        },
        "shards": {
            "corpus": len(job.plan.shards),
            "scored": len(shards),
            "quarantined": len(quarantined),
        },
        "classes": [
            {
                "name": name,
                "predictions": found.predictions[name],
                "share": _ratio(found.predictions[name], decided),
                "mean_probability": _ratio(probability, decided),
            }
            for name, probability in zip(found.columns.classes, found.probability, strict=True)
        ],
        "confidence": {"mean": _ratio(found.confidence, decided), "histogram": found.histogram.tolist()},
        "modalities": [
            {
                "name": name,
                "ineffectual": int(ineffectual),
                "share": _ratio(ineffectual, total.scored),
                "reasons": [
                    {"reason": reason, "rows": rows}
                    for reason, rows in sorted(reasons.items(), key=lambda entry: (-entry[1], entry[0]))
                ],
                "p_value_0": int(p_value_0),
            }
            for name, ineffectual, reasons, p_value_0 in zip(
                found.columns.modalities, total.ineffectual, found.reasons, found.p_value_0, strict=True
            )
        ],
        "order": [
            {**_position(shards, starts, int(edge)), **_named_counts(found, counts)}
            for edge, counts in zip(edges[:-1], found.order, strict=True)
        ],
        "groups": _group_counts(found),
        "report": _report(found),
        "quarantine": [entry._asdict() for entry in quarantined],
        "errors": [entry._asdict() for entry in found.errors],
    }


def _position(shards: Sequence[Shard], starts: Counts, row: int) -> dict[str, Any]:
    """Return the shard, and the row of it, of a row of the whole corpus."""
    index = int(np.searchsorted(starts, row, side="right")) - 1
    return {"shard": shards[index].name, "row": row - int(starts[index])}


def _named_counts(found: ScoreCounts, counts: Counts) -> dict[str, Any]:
    view = RowCounts.view(counts)
    judged = {} if found.answers is None else {"labelled": int(view.labelled), "right": int(view.right)}
    return {
        "rows": int(view.rows),
        "scored": int(view.scored),
        "abstained": int(view.abstained),
        "ineffectual": dict(zip(found.columns.modalities, view.ineffectual.tolist(), strict=True)),
        **judged,
    }


def _report(found: ScoreCounts) -> dict[str, Any] | None:
    """Return the scores beside the labels of the corpus, or None if none of them can be used."""
    if found.answers is None or not found.answers.support.any():
        return None
    return ClassificationReport.of_counts(found.answers).to_dict()


def _group_counts(found: ScoreCounts) -> dict[str, Any] | None:
    """Return the counts by group, or None if no shard has groups."""
    if not found.groups and not found.unread_groups:
        return None
    others = found.groups.get(None)
    in_groups = sum(int(RowCounts.view(counts).rows) for counts in found.groups.values())
    return {
        "named": [
            {"name": name, **_named_counts(found, counts)} for name, counts in found.groups.items() if name is not None
        ],
        "others": None if others is None else _named_counts(found, others),
        "rows_without": int(RowCounts.view(found.total).rows) - in_groups,
        "unreadable": [entry._asdict() for entry in found.unread_groups],
    }


def _ratio(part: float, whole: float) -> float | None:
    """Return a ratio, or None where it is undefined, since JSON has no NaN."""
    ratio = float(part / whole) if whole else math.nan
    return ratio if math.isfinite(ratio) else None


def _part_edges(rows: int) -> Counts:
    """Return (parts + 1,): the number of the first row of each part of the corpus, and the number of rows."""
    parts = min(max(rows // _LEAST_ROWS, 1), _MOST_PARTS) if rows else 0
    return np.arange(parts + 1) * rows // max(parts, 1)
