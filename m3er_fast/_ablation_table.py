"""The records of an ablation, and the tables that they are printed as."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from m3er_fast.corruption import PAPER_CORRUPTION
from m3er_fast.metrics import ClassificationReport, mean_std


@dataclass(frozen=True)
class AblationRow:
    """One row of Table 2, or a baseline beside it: an experiment's scores, one report per seed."""

    ineffectual: bool
    """Whether the test utterances had ineffectual modalities."""
    label: str
    reports: tuple[ClassificationReport, ...]

    def overall(self, metric: str) -> tuple[float, float | None]:
        """Return the mean and standard deviation of a score over seeds.

        Args:
            metric: "f1", "mean_accuracy", "accuracy" or "balanced_accuracy".
        """
        sources = [report.overall if metric in ("f1", "mean_accuracy") else report for report in self.reports]
        return mean_std(getattr(source, metric) for source in sources)


@dataclass(frozen=True)
class CheckQuality:
    """How well a modality check separates corrupted from clean modalities: a value per modality, averaged over seeds.

    A value is None if no seed has the utterances that it needs.
    """

    check: str
    auroc: dict[str, float | None]
    """Area under the ROC curve of the p-value; None if the modality was never, or always, corrupted."""
    detected: dict[str, float | None]
    """Share of corrupted modalities judged ineffectual."""
    false_alarms: dict[str, float | None]
    """Share of clean modalities judged ineffectual, in the same corrupted test split."""


@dataclass(frozen=True)
class AblationResult:
    """Table 2, the quality of the checks and proxies, and the settings."""

    rows: tuple[AblationRow, ...]
    checks: tuple[CheckQuality, ...]
    proxy_errors: dict[str, float]
    """Relative L2 error of each modality's proxy, regenerated from all other modalities, on the clean test split."""
    classes: tuple[str, ...]
    settings: dict[str, Any]
    corruption: str = PAPER_CORRUPTION
    """The name of the corruption of the ineffectual modalities."""
    baselines: tuple[AblationRow, ...] = ()
    """Rows of simpler models that were trained alike."""

    @property
    def all_rows(self) -> list[AblationRow]:
        """The rows with their baselines: those on clean utterances first."""
        return sorted([*self.rows, *self.baselines], key=lambda row: row.ineffectual)

    @property
    def other_corruption(self) -> str | None:
        """The name of the corruption, if it is not the paper's."""
        return None if self.corruption == PAPER_CORRUPTION else self.corruption

    def to_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        return {
            "rows": [_as_dict(row) for row in self.rows],
            "baselines": [_as_dict(row) for row in self.baselines],
            "checks": [vars(check) for check in self.checks],
            "proxy_errors": self.proxy_errors,
            "corruption": self.corruption,
            "settings": self.settings,
        }

    def to_markdown(self) -> str:
        """Return Table 2 with mean ± standard deviation over seeds, and two small tables for checks and proxies.

        The scores of all classes together come first, those of each class in a second table. The baselines stand below
        the rows on the same utterances. Rows with ineffectual modalities name the corruption, unless it is the paper's.
        """
        return "\n\n".join([self._overall_table(), self._class_table(), self._check_table(), self._proxy_table()])

    def overview(self) -> str:
        """Return what :meth:`to_markdown` does, without the scores of each class."""
        return "\n\n".join([self._overall_table(), self._check_table(), self._proxy_table()])

    def _overall_table(self) -> str:
        accuracy = self.rows[0].reports[0].accuracy_name.capitalize()
        return self._score_table(
            ["Overall F1", "Overall MA", accuracy],
            lambda report: [report.overall.f1, report.overall.mean_accuracy, report.accuracy],
        )

    def _class_table(self) -> str:
        return self._score_table(
            [f"{_escape(name)} {score}" for name in self.classes for score in ("F1", "MA")],
            lambda report: [score for row in report.per_class for score in (row.f1, row.mean_accuracy)],
        )

    def _score_table(self, heads: Sequence[str], scores: Callable[[ClassificationReport], Sequence[float]]) -> str:
        """Return a table with a row per experiment; a head that ends with F1 is of a number, all others of a share."""
        lines = [["Ineffectual modalities?", "Experiment", *heads], ["---", "---"] + ["---:"] * len(heads)]
        ineffectual = "Yes" if self.other_corruption is None else f"Yes: {self.other_corruption}"
        for row in self.all_rows:
            columns = zip(heads, zip(*map(scores, row.reports), strict=True), strict=True)
            cells = [_cell(values, percent=not head.endswith("F1")) for head, values in columns]
            lines.append([ineffectual if row.ineffectual else "No", row.label, *cells])
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

    def _check_table(self) -> str:
        lines = ["| Check | Modality | AUROC | Detected | False alarms |", "|---|---|---:|---:|---:|"]
        for check in self.checks:
            for name in check.auroc:
                cells = [
                    "–" if value is None else form.format(value)
                    for form, value in (
                        ("{:.3f}", check.auroc[name]),
                        ("{:.1%}", check.detected[name]),
                        ("{:.1%}", check.false_alarms[name]),
                    )
                ]
                lines.append(f"| {check.check} | {_escape(name)} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def _proxy_table(self) -> str:
        lines = ["| Proxy of | Relative L2 error |", "|---|---:|"]
        lines += [f"| {_escape(name)} | {error:.2%} |" for name, error in self.proxy_errors.items()]
        return "\n".join(lines)


def _as_dict(row: AblationRow) -> dict[str, Any]:
    reports = [report.to_dict() for report in row.reports]
    return {"ineffectual": row.ineffectual, "label": row.label, "seeds": reports}


def _escape(name: str) -> str:
    return name.replace("|", "\\|")


def _cell(values: Sequence[float], *, percent: bool = False) -> str:
    mean, deviation = mean_std(values)
    form = "{:.1%}" if percent else "{:.3f}"
    return form.format(mean) if deviation is None else f"{form.format(mean)} ± {form.format(deviation)}"
