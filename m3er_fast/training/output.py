"""The folder of a finished run: model, card, history and plots."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from m3er_fast.atomic_files import replacing
from m3er_fast.corruption import PAPER_CORRUPTION
from m3er_fast.fitting.statistics import ModelStatistics
from m3er_fast.fusion import M3ERFusion
from m3er_fast.metrics import ClassificationReport
from m3er_fast.training.data import TrainingData
from m3er_fast.training.fingerprint import ResumeMismatchError, check_fingerprint
from m3er_fast.training.state import CHECKPOINT_FILE, resuming_from

HISTORY_FILE = "history.json"
HISTORY_PLOT = "history.png"
RELIABILITY_PLOT = "reliability.png"
LAST_EPOCH_FILE = "last_epoch.pt"
"""The last checkpoint of a finished run, from which it can go on."""


def is_finished(out: Path) -> bool:
    """Return whether a folder holds a finished run: its history is written last, and its checkpoint then renamed."""
    return (out / HISTORY_FILE).exists() and not (out / CHECKPOINT_FILE).exists()


def find_checkpoint(out: Path) -> Path | None:
    """Return the checkpoint from which the run in a folder goes on, if there is one."""
    return next((path for path in (out / CHECKPOINT_FILE, out / LAST_EPOCH_FILE) if path.exists()), None)


def read_run(out: Path, fingerprint: dict[str, Any]) -> tuple[M3ERFusion, dict[str, Any]] | None:
    """Return the model and the history of a finished run, or None if the training that is asked for goes on from it.

    Raises:
        ResumeMismatchError: if it belongs to another training or is damaged.
    """
    with resuming_from(out / HISTORY_FILE):
        history: dict[str, Any] = json.loads((out / HISTORY_FILE).read_text())
        check_fingerprint(history["fingerprint"], fingerprint, out, len(history["train_loss"]))
        history["best_epoch"]  # missing in a damaged file
        if history["fingerprint"] != fingerprint:
            if not (out / LAST_EPOCH_FILE).exists():
                raise ResumeMismatchError(f"{out} cannot go on: {LAST_EPOCH_FILE} is missing. Begin anew (--no-resume)")
            return None
    return M3ERFusion.from_pretrained(out), history


def write_run(
    out: Path, model: M3ERFusion, history: dict[str, Any], data: TrainingData, statistics: ModelStatistics | None
) -> None:
    """Write everything that a finished run holds."""
    reports = {
        "validation split": data.report(model),
        "validation split, corrupted": data.report(model, corruption=PAPER_CORRUPTION),
    }
    scored = {name: report for name, report in reports.items() if report is not None}
    _save(out, model, history, data, statistics, list(scored.values()))
    _write_plots(out, history, scored)
    with replacing(out / HISTORY_FILE) as partial:
        partial.write_text(json.dumps(history, indent=2) + "\n")
    if (out / CHECKPOINT_FILE).exists():
        (out / CHECKPOINT_FILE).replace(out / LAST_EPOCH_FILE)


def _save(
    out: Path,
    model: M3ERFusion,
    history: dict[str, Any],
    data: TrainingData,
    statistics: ModelStatistics | None,
    reports: Sequence[ClassificationReport],
) -> None:
    """Save the model with a card that describes its training data and its scores on the validation split."""
    (out / "README.md").unlink(missing_ok=True)  # save_pretrained keeps the card of an earlier training
    best = history["best_epoch"]
    about = (
        f"{data.describe()} were held out to choose the epoch. Best epoch: {best} of {len(history['valid_loss'])}, "
        f"with a validation loss of {history['valid_loss'][best - 1]:.4f}."
    )
    if statistics is not None:
        about += f" Standardiser, modality check and proxies were fitted separately, to {statistics.rows} utterances."
    metrics = _describe_scores(*reports) if reports else None
    model.save_pretrained(out, model_card_kwargs={"data": about, "metrics": metrics})


def _describe_scores(clean: ClassificationReport, corrupted: ClassificationReport) -> str:
    chosen = "The epoch was chosen on this split" + (
        ", and the temperature fitted to it" if clean.before_calibration else ""
    )
    return (
        f"On the validation split, with modality check and proxies on. {chosen}, so the scores are optimistic:\n\n"
        f"{clean.to_markdown()}\n\n"
        "The same with the paper's corruption, white noise on at least one modality of about 75 % of the utterances:"
        f"\n\n{corrupted.to_markdown()}"
    )


def _write_plots(out: Path, history: dict[str, Any], reports: Mapping[str, ClassificationReport]) -> None:
    try:
        from m3er_fast.plots import plot_history, plot_reliability
    except ImportError:  # pictures need an extra; history.json and the card hold the same numbers
        return
    plot_history(history, out / HISTORY_PLOT)
    if reports:
        plot_reliability({name: report.to_dict() for name, report in reports.items()}, out / RELIABILITY_PLOT)
