"""What each step of the method brings: the slides' Table 2, and Figures 3, 4 and 7, on any corpus.

Dimension legend: N utterances, M modalities, T time steps, d_m features of modality m, C classes.
"""

from __future__ import annotations

import json
import platform
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from m3er_fast.atomic_files import replacing
from m3er_fast.check import ModalityCheck
from m3er_fast.config import CheckConfig, M3ERConfig, Statistic
from m3er_fast.corpus.base import NO_LABEL, Corpus
from m3er_fast.corpus.splits import ensure_validation
from m3er_fast.corruption import paper_protocol
from m3er_fast.fusion import M3ERFusion
from m3er_fast.metrics import ClassificationReport, auroc, mean_std
from m3er_fast.reference import fusion_weights
from m3er_fast.standardize import StandardizedBatch
from m3er_fast.training import Prediction, check_modalities, default_config, evaluate, train

ORIGINAL = "Original multiplicative fusion (Liu et al. 2018)"
FULL = "M3ER"
NO_PROXY = "M3ER – proxy feature vector"
NEITHER = "M3ER – modality check step – proxy feature vector"
ORACLE = "M3ER with the true mask"
_OTHER_CHECK = {
    "combined": "M3ER with the combined check",
    "correlation": "M3ER with the correlation check (the paper's)",
}


@dataclass(frozen=True)
class AblationRow:
    """One row of Table 2: an experiment's scores, one report a seed."""

    ineffectual: bool
    """Whether the test utterances had ineffectual modalities."""
    label: str
    reports: tuple[ClassificationReport, ...]

    def overall(self, metric: str) -> tuple[float, float | None]:
        """Mean and standard deviation over seeds of "f1", "mean_accuracy", "accuracy" or "balanced_accuracy"."""
        sources = [report.overall if metric in ("f1", "mean_accuracy") else report for report in self.reports]
        return mean_std(getattr(source, metric) for source in sources)


@dataclass(frozen=True)
class CheckQuality:
    """How well a modality check tells corrupted modalities from clean ones, one value a modality, mean over seeds."""

    check: str
    auroc: dict[str, float | None]
    """Of the p-value; None where a modality was never, or always, corrupted."""
    detected: dict[str, float | None]
    """Share of corrupted modalities judged ineffectual."""
    false_alarms: dict[str, float | None]
    """Share of clean modalities judged ineffectual, in the same corrupted test split."""


@dataclass(frozen=True)
class AblationResult:
    """Table 2 and what stands behind it."""

    rows: tuple[AblationRow, ...]
    checks: tuple[CheckQuality, ...]
    proxy_errors: dict[str, float]
    """Relative L2 error of the proxy of each modality, regenerated from all others, on the clean test split."""
    classes: tuple[str, ...]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "rows": [
                {
                    "ineffectual": row.ineffectual,
                    "label": row.label,
                    "seeds": [report.to_dict() for report in row.reports],
                }
                for row in self.rows
            ],
            "checks": [vars(check) for check in self.checks],
            "proxy_errors": self.proxy_errors,
            "settings": self.settings,
        }

    def to_markdown(self) -> str:
        """Table 2 with mean ± standard deviation over seeds, and two small tables on the check and the proxies."""
        names = [_escape(name) for name in self.classes]
        header = ["Ineffectual modalities?", "Experiment"]
        header += [f"{name} {score}" for name in [*names, "Overall"] for score in ("F1", "MA")] + ["Accuracy"]
        lines = [header, ["---", "---"] + ["---:"] * (len(header) - 2)]
        for row in self.rows:
            cells = ["Yes" if row.ineffectual else "No", row.label]
            for c in range(len(names)):
                cells.append(_cell([report.per_class[c].f1 for report in row.reports]))
                cells.append(_cell([report.per_class[c].mean_accuracy for report in row.reports], percent=True))
            cells.append(_cell([report.overall.f1 for report in row.reports]))
            cells.append(_cell([report.overall.mean_accuracy for report in row.reports], percent=True))
            cells.append(_cell([report.accuracy for report in row.reports], percent=True))
            lines.append(cells)
        tables = ["\n".join(f"| {' | '.join(cells)} |" for cells in lines), self._check_table(), self._proxy_table()]
        return "\n\n".join(tables)

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


def run_ablation(
    corpus: Corpus,
    config: M3ERConfig | None = None,
    *,
    seeds: int = 5,
    out: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> AblationResult:
    """Train with both losses and test with and without each step, on clean and on corrupted utterances.

    The corruption is the slides': white noise at an SNR of 0.01 on at least one modality of 75 % of the test
    utterances, never on all. Each seed trains two models, whose weights all its rows share. Beside the slides' rows
    stand the other kind of check (the paper's correlation, or ours) and the true corruption mask, which is what a
    perfect check would give.

    Args:
        corpus: with labels and the splits train and test; a validation split is carved out of train if there is none.
        config: settings of the full model; None takes the defaults for the corpus.
        seeds: trainings of each model, with seeds from ``config.training.seed`` on.
        out: a folder for table.md, table.json and, if matplotlib is there, the figures.
        progress: called with a line of text now and then.

    Raises:
        ValueError: if the corpus lacks labels or a split, or the configuration lacks the check or the proxies.
    """
    config = default_config(corpus) if config is None else config
    if config.check is None or config.proxy is None:
        raise ValueError("config: an ablation takes steps away, so it needs both the check and the proxies")
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    test = corpus.subset("test")
    if not len(test):
        raise ValueError("the corpus has no test split to score")
    if test.target is None or (test.target == NO_LABEL).all():
        raise ValueError("the test split has no labels to score")
    corpus = ensure_validation(corpus, seed=config.training.seed)
    if out is not None:  # where nothing can be written it is said now, not after hours
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
    say = progress or (lambda line: None)
    reports: dict[tuple[bool, str], list[ClassificationReport]] = {}
    quality: dict[str, list[tuple[NDArray[np.bool_], Prediction]]] = {}
    first: _Run | None = None
    other = _other_statistic(config.check)
    for number in range(seeds):
        seed = config.training.seed + number
        settings = config.replace(training=replace(config.training, seed=seed))
        run = _train_and_predict(corpus, settings, say, f"seed {number + 1} of {seeds}")
        for key, prediction in run.predictions.items():
            assert prediction.report is not None
            reports.setdefault(key, []).append(prediction.report)
        quality.setdefault(config.check.statistic, []).append((run.truth, run.predictions[True, FULL]))
        quality.setdefault(other, []).append((run.truth, run.predictions[True, _OTHER_CHECK[other]]))
        first = first or run
    assert first is not None
    errors, pictures = regenerate(first.model, test)
    result = AblationResult(
        rows=tuple(AblationRow(*key, tuple(values)) for key, values in reports.items()),
        checks=tuple(_check_quality(name, test, values) for name, values in quality.items()),
        proxy_errors=errors,
        classes=corpus.classes,
        settings=_describe(corpus, config, seeds),
    )
    if out is not None:
        with replacing(out / "table.md") as partial:
            partial.write_text(result.to_markdown() + "\n", encoding="utf-8")
        with replacing(out / "table.json") as partial:
            partial.write_text(json.dumps(result.to_dict(), indent=2) + "\n")
        chosen = examples(first.model, first.noisy, first.truth, first.predictions[True, FULL])
        _draw(result, pictures, chosen, out)
    return result


class _Run(NamedTuple):
    """What one seed gives."""

    model: M3ERFusion
    noisy: Corpus  # the test split, corrupted
    truth: NDArray[np.bool_]  # (N, M), where it is
    predictions: dict[tuple[bool, str], Prediction]  # by row of Table 2


def _train_and_predict(corpus: Corpus, config: M3ERConfig, say: Callable[[str], None], which: str) -> _Run:
    """Train with both losses, and predict every row of Table 2."""
    assert config.check is not None
    test = corpus.subset("test")
    say(f"{which}: training with the original loss")
    original = train(corpus, config.replace(loss=replace(config.loss, variant="original"))).model
    say(f"{which}: training M3ER")
    model = train(corpus, config).model
    noisy, truth = corrupt_corpus(model, test, config.training.seed)
    with_other = model.ablated(check=_fit_other_check(model, config.check, corpus.subset("train")))
    say(f"{which}: scoring")
    predictions = {
        (False, ORIGINAL): evaluate(original, test),
        (False, FULL): evaluate(model, test),
        (True, NEITHER): evaluate(model.ablated(check=False, proxy=False), noisy),
        (True, NO_PROXY): evaluate(model.ablated(proxy=False), noisy),
        (True, FULL): evaluate(model, noisy),
        (True, _OTHER_CHECK[_other_statistic(config.check)]): evaluate(with_other, noisy),
        (True, ORACLE): evaluate(model, noisy, effective=~truth),
    }
    return _Run(model, noisy, truth, predictions)


def corrupt_corpus(model: M3ERFusion, corpus: Corpus, seed: int) -> tuple[Corpus, NDArray[np.bool_]]:
    """The corpus under the paper's protocol, applied to standardised features, and the (N, M) mask of what it hit."""
    batch = _standardize(model, corpus)
    features = dict(zip(corpus.features, batch.features, strict=True))
    noisy, truth = paper_protocol(features, seed, lengths=batch.lengths, available=batch.available)
    raw = model.standardizer.unstandardize([noisy[name] for name in corpus.features])
    mask = batch.frame_valid
    changed = {}
    for m, (name, values) in enumerate(corpus.features.items()):
        hit = (mask[:, :, m] & truth[:, m, None])[:, :, None].numpy()
        changed[name] = np.where(hit, raw[m].to(torch.float32).numpy(), values)
    return replace(corpus, features=changed), truth.numpy()


@dataclass(frozen=True)
class Regenerated:
    """One frame of a modality as Figure 7 draws it, in standardised features."""

    original: NDArray[np.float32]  # (d_m,)
    corrupted: NDArray[np.float32]
    proxy: NDArray[np.float32]


def regenerate(model: M3ERFusion, corpus: Corpus, *, seed: int = 0) -> tuple[dict[str, float], dict[str, Regenerated]]:
    """Regenerate each modality from all others, as if it alone were lost.

    Returns:
        For each modality that can be regenerated: the relative L2 error, mean ‖proxy − original‖ / mean ‖original‖
        over all valid frames of utterances with another modality; and a frame of median error beside its noisy version.
    """
    if model.proxy_generator is None:
        raise ValueError("the model has no proxies to look at")
    batch = _standardize(model, corpus)
    noise = torch.Generator().manual_seed(seed)
    errors: dict[str, float] = {}
    frames: dict[str, Regenerated] = {}
    for m, name in enumerate(corpus.features):
        others = batch.available.clone()
        others[:, m] = False
        replaced, abstained, _ = model.proxy_generator.proxy_batch(batch, others)
        wanted = batch.frame_valid[:, :, m] & ~abstained[:, None]
        original, proxy = batch.features[m][wanted], replaced[m][wanted]
        if not len(original):
            continue
        distance = (proxy - original).norm(dim=1)
        errors[name] = float(distance.mean() / original.norm(dim=1).mean().clamp(min=1e-30))
        middle = int(distance.argsort()[len(distance) // 2])
        frame = original[middle]
        noisy = frame + 10.0 * frame.square().mean().sqrt() * torch.randn(frame.shape, generator=noise)
        frames[name] = Regenerated(frame.numpy(), noisy.numpy(), proxy[middle].numpy())
    return errors, frames


def draw_proxies(errors: dict[str, float], frames: dict[str, Regenerated], path: Path) -> None:
    """Figure 7 from what :func:`regenerate` gave; nothing is drawn without matplotlib, or without any frame."""
    try:
        from m3er_fast.plots import plot_proxies
    except ImportError:  # the pictures are an extra; the tables hold the numbers
        return
    if frames:
        original, corrupted, proxy = (
            {name: getattr(frame, field) for name, frame in frames.items()}
            for field in ("original", "corrupted", "proxy")
        )
        plot_proxies(original, corrupted, proxy, errors, path)


def examples(
    model: M3ERFusion, corpus: Corpus, truth: NDArray[np.bool_], prediction: Prediction
) -> list[dict[str, Any]]:
    """For Figures 3 and 4: of each class the surest right answer, one with an ineffectual modality where there is one.

    Returns:
        One dict a class that was ever answered right: the fields of ``plots.Example``.
    """
    if corpus.target is None:
        return []
    if corpus.task == "multi":
        is_true = corpus.target == 1
    else:
        labels = corpus.target if corpus.task == "single" else corpus.target.argmax(axis=1)
        is_true = labels[:, None] == np.arange(len(corpus.classes))
    answer = prediction.probabilities.argmax(axis=1)
    loss = model.config.loss
    chosen = []
    for c, label in enumerate(corpus.classes):
        right = np.flatnonzero((answer == c) & is_true[:, c])
        if not len(right):
            continue
        seen = (truth & ~prediction.effective)[right].any(axis=1)
        surest = np.lexsort((prediction.probabilities[right, c], seen))[-1]
        row = int(right[surest])
        # Rounded to 0 or 1, a probability would have an infinite logarithm.
        own = torch.from_numpy(prediction.modality_probabilities[:, row : row + 1]).double().clamp(1e-300, 1 - 1e-16)
        available = torch.from_numpy(prediction.available[row : row + 1])
        weights = fusion_weights(
            own.log(), torch.log1p(-own), variant=loss.variant, beta=loss.beta, available=available
        )
        chosen.append(
            {
                "id": str(corpus.ids[row]),
                "label": label,
                "classes": corpus.classes,
                "modalities": corpus.modalities,
                "probabilities": prediction.modality_probabilities[:, row],
                "fused": prediction.probabilities[row],
                "effective": prediction.effective[row],
                "weights": (weights[:, 0, c] * available[0]).numpy(),
            }
        )
    return chosen


def _standardize(model: M3ERFusion, corpus: Corpus) -> StandardizedBatch:
    check_modalities(model, corpus)
    return model.standardize(corpus.features, corpus.lengths, corpus.available)


def _other_statistic(config: CheckConfig) -> Statistic:
    return "combined" if config.statistic == "correlation" else "correlation"


def _fit_other_check(model: M3ERFusion, config: CheckConfig, training: Corpus) -> ModalityCheck:
    """The paper's correlation check, unweighted, or the combined one where the model has the paper's."""
    statistic = _other_statistic(config)
    options = vars(
        replace(config, statistic=statistic, component_weights=None if statistic == "correlation" else "canonical")
    )
    batch = _standardize(model, training)
    with warnings.catch_warnings():  # the model's own check has said it
        warnings.simplefilter("ignore", UserWarning)
        return ModalityCheck(model.input_dims, **options).fit_batches(lambda: [batch])


def _check_quality(name: str, test: Corpus, outcomes: Sequence[tuple[NDArray[np.bool_], Prediction]]) -> CheckQuality:
    columns: dict[str, dict[str, float | None]] = {"auroc": {}, "detected": {}, "false_alarms": {}}
    for m, modality in enumerate(test.modalities):
        values: dict[str, list[float]] = {key: [] for key in columns}
        for truth, prediction in outcomes:
            there = prediction.available[:, m]
            hit, lost = truth[there, m], ~prediction.effective[there, m]
            if hit.any() and not hit.all():
                values["auroc"].append(auroc(-prediction.p_value[there, m], hit))
            if hit.any():
                values["detected"].append(float(lost[hit].mean()))
            if not hit.all():
                values["false_alarms"].append(float(lost[~hit].mean()))
        for key, numbers in values.items():
            columns[key][modality] = mean_std(numbers)[0] if numbers else None
    return CheckQuality(name, **columns)


def _describe(corpus: Corpus, config: M3ERConfig, seeds: int) -> dict[str, Any]:
    from m3er_fast import __version__

    return {
        "m3er_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "seeds": seeds,
        "utterances": {split: len(corpus.subset(split)) for split in ("train", "valid", "test")},
        "input_dims": corpus.input_dims,
        "classes": corpus.classes,
        "config": config.to_dict(),
    }


def _draw(
    result: AblationResult,
    frames: dict[str, Regenerated],
    chosen: list[dict[str, Any]],
    out: Path,
) -> None:
    try:
        from m3er_fast import plots
    except ImportError:  # the pictures are an extra; the tables hold the numbers
        return
    bars = [(f"{row.label}{' *' if row.ineffectual else ''}", *row.overall("f1")) for row in result.rows]
    plots.plot_ablation(bars, out / "ablation.png", metric="Overall F1 (* = with ineffectual modalities)")
    draw_proxies(result.proxy_errors, frames, out / "figure7.png")
    if chosen:
        plots.plot_examples([plots.Example(**fields) for fields in chosen], out / "figure3.png")


def _escape(name: str) -> str:
    return name.replace("|", "\\|")


def _cell(values: Sequence[float], *, percent: bool = False) -> str:
    mean, deviation = mean_std(values)
    form = "{:.1%}" if percent else "{:.3f}"
    return form.format(mean) if deviation is None else f"{form.format(mean)} ± {form.format(deviation)}"
