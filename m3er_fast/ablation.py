"""The contribution of each step of the method, on any corpus: the slides' Table 2, and Figures 3, 4 and 7.

Dimension legend: N utterances, M modalities.
"""

from __future__ import annotations

import json
import platform
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from m3er_fast._ablation_figures import Regenerated, draw_ablation, draw_proxies, examples, regenerate
from m3er_fast._ablation_table import AblationResult, AblationRow, CheckQuality
from m3er_fast._validation import check_positive_int
from m3er_fast.atomic_files import replacing
from m3er_fast.baselines import fit_baselines, labelled_part, utterances_of
from m3er_fast.check import ModalityCheck
from m3er_fast.config import CheckConfig, LossConfig, M3ERConfig, Statistic
from m3er_fast.corpus.base import Corpus
from m3er_fast.corpus.splits import ensure_validation
from m3er_fast.corruption import PAPER_CORRUPTION
from m3er_fast.evaluation import (
    Prediction,
    corrupt_corpus,
    evaluate,
    find_corruption,
    labels_of,
    standardize_corpus,
)
from m3er_fast.fusion import M3ERFusion
from m3er_fast.metrics import ClassificationReport, auroc, classification_report, mean_std
from m3er_fast.operands import Variant
from m3er_fast.training import HISTORY_FILE, EpochRecord, default_config, train

__all__ = [
    "FULL",
    "MODIFIED",
    "NEITHER",
    "NO_PROXY",
    "ORACLE",
    "ORIGINAL",
    "UNFINISHED",
    "AblationResult",
    "AblationRow",
    "CheckQuality",
    "Regenerated",
    "corrupt_corpus",
    "draw_proxies",
    "examples",
    "regenerate",
    "run_ablation",
]

UNFINISHED = "unfinished"
"""The folder of the trainings of an ablation that has not written its results."""
ORIGINAL = "Original multiplicative fusion (Liu et al. 2018)"
MODIFIED = "M3ER with the modified loss (the paper's)"
FULL = "M3ER"
NO_PROXY = "M3ER – proxy feature vector"
NEITHER = "M3ER – modality check step – proxy feature vector"
ORACLE = "M3ER with the true mask"
_OTHER_CHECK = {
    "combined": "M3ER with the combined check",
    "correlation": "M3ER with the correlation check (the paper's)",
}


class _Experiment(NamedTuple):
    """What a row of Table 2 stands for."""

    ineffectual: bool
    label: str


class _CheckOutcome(NamedTuple):
    """The verdicts of a check on one seed's corrupted test split."""

    truth: NDArray[np.bool_]  # (N, M), the corrupted modalities
    prediction: Prediction


class _Watch:
    """Tells the caller of an ablation what it does, and how many epochs of how many are done.

    A training that stops early counts in full once the next one begins.
    """

    def __init__(
        self,
        say: Callable[[str], None] | None,
        moved: Callable[[int, int], None] | None,
        *,
        trainings: int,
        epochs: int,
    ) -> None:
        self.say = say or (lambda line: None)
        self._moved = moved or (lambda done, total: None)
        self._epochs, self._total = epochs, trainings * epochs
        self._begun = 0

    def next_training(self) -> Callable[[EpochRecord], None]:
        """Return the callback of the next training's epochs."""
        before = self._begun * self._epochs
        self._begun += 1
        return lambda record: self._moved(before + record.epoch, self._total)


class _Run(NamedTuple):
    """The result of one seed."""

    model: M3ERFusion
    noisy: Corpus  # the test split, corrupted
    truth: NDArray[np.bool_]  # (N, M), the corrupted modalities
    predictions: dict[_Experiment, Prediction]
    baselines: dict[_Experiment, ClassificationReport]


def run_ablation(
    corpus: Corpus,
    config: M3ERConfig | None = None,
    *,
    seeds: int = 5,
    out: str | Path | None = None,
    corruption: str = PAPER_CORRUPTION,
    baselines: bool = True,
    resume: bool = True,
    device: str = "auto",
    progress: Callable[[str], None] | None = None,
    moved: Callable[[int, int], None] | None = None,
    resumed: Callable[[str], None] | None = None,
) -> AblationResult:
    """Train with both losses and test with and without each step, on clean and on corrupted utterances.

    The corruption is the slides' by default: white noise at an SNR of 0.01 on at least one modality of 75 % of the test
    utterances, but never on all modalities. Another kind replaces the noise, in the same modalities of the same
    utterances. Each seed trains two models. All rows but one share the weights of the model that ``config`` describes.
    The other model has the modified loss if ``config`` has the original one, and the original loss otherwise. Two rows
    are not in the slides: one with the other kind of check (the paper's correlation, or ours), and one with the true
    corruption mask, which is the result that a perfect check would give.

    The baselines of :mod:`m3er_fast.baselines`, trained alike, show what the method is worth on this corpus. They have
    no check: they take every modality as it comes.

    Args:
        corpus: with labels and the splits train and test; a validation split is taken from train if there is none.
        config: settings of the full model; None takes the defaults for the corpus.
        seeds: trainings of each model, with seeds from ``config.training.seed`` on.
        out: a folder for table.md, table.json and, if matplotlib is installed, the figures. Until they are written it
            holds the trainings in ``unfinished``: after an interruption the same call goes on, to the same results.
        corruption: the kind of corruption, by its name in ``corruption.KINDS``, such as ``"freeze"``, or by name and
            severity, such as ``"gain:mild"``.
        baselines: fit the baselines too.
        resume: go on with the trainings in ``out``; False begins anew.
        device: trains M3ER, as for :func:`m3er_fast.training.train`.
        progress: called with a line of text at every stage.
        moved: called after every epoch of M3ER with the number of epochs that are done and that there will be at most.
        resumed: called once, with a line of text, if an earlier call has begun the trainings.

    Raises:
        ResumeMismatchError: if those trainings are of another corpus or configuration, naming what differs.
        ValueError: if the corpus lacks labels, a split, or the groups that the corruption needs; if the configuration
            lacks the check or the proxies; or if there is no such corruption.
    """
    config = default_config(corpus) if config is None else config
    if config.check is None or config.proxy is None:
        raise ValueError("config must have both the check and the proxies, for an ablation to remove them")
    check_positive_int("seeds", seeds)
    find_corruption(corpus, corruption)
    test = corpus.subset("test")
    if not len(test):
        raise ValueError("the corpus has no test split to score")
    if not test.labelled.any():
        raise ValueError("the test split has no labels to score")
    corpus = ensure_validation(corpus, seed=config.training.seed)
    if out is not None:  # a folder that cannot be written to is an error now, not after hours
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        _begin(out / UNFINISHED, 2 * seeds, resume, resumed)
    watch = _Watch(progress, moved, trainings=2 * seeds, epochs=config.training.epochs)
    reports: dict[_Experiment, list[ClassificationReport]] = {}
    outcomes: dict[str, list[_CheckOutcome]] = {}
    baseline_reports: dict[_Experiment, list[ClassificationReport]] = {}
    first: _Run | None = None
    other = _other_statistic(config.check)
    for number in range(seeds):
        seed = config.training.seed + number
        settings = config.replace(training=replace(config.training, seed=seed))
        folder = None if out is None else out / UNFINISHED / f"seed-{seed}"
        which = f"seed {number + 1} of {seeds}"
        run = _train_and_predict(corpus, settings, corruption, baselines, folder, device, watch, which)
        for experiment, prediction in run.predictions.items():
            assert prediction.report is not None
            reports.setdefault(experiment, []).append(prediction.report)
        for experiment, report in run.baselines.items():
            baseline_reports.setdefault(experiment, []).append(report)
        for statistic, label in ((config.check.statistic, FULL), (other, _OTHER_CHECK[other])):
            prediction = run.predictions[_Experiment(True, label)]
            outcomes.setdefault(statistic, []).append(_CheckOutcome(run.truth, prediction))
        first = first or run
    assert first is not None
    errors, frames = regenerate(first.model, test)
    result = AblationResult(
        rows=_rows(reports),
        checks=tuple(_check_quality(name, test, values) for name, values in outcomes.items()),
        proxy_errors=errors,
        classes=corpus.classes,
        settings=_describe(corpus, config, seeds),
        corruption=corruption,
        baselines=_rows(baseline_reports),
    )
    if out is not None:
        with replacing(out / "table.md") as partial:
            partial.write_text(result.to_markdown() + "\n", encoding="utf-8")
        with replacing(out / "table.json") as partial:
            partial.write_text(json.dumps(result.to_dict(), indent=2) + "\n")
        chosen = examples(first.model, first.noisy, first.truth, first.predictions[_Experiment(True, FULL)])
        draw_ablation(result, frames, chosen, out)
        done = (out / UNFINISHED).rename(out / f".{UNFINISHED}.done")  # at once, where removing takes several steps
        shutil.rmtree(done)
    return result


def _begin(folder: Path, trainings: int, resume: bool, resumed: Callable[[str], None] | None) -> None:
    """Make the folder of trainings, or say how many of them are finished."""
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    begun = list(folder.glob("seed-*/*"))
    if begun and resumed is not None:
        finished = sum((path / HISTORY_FILE).exists() for path in begun)
        resumed(f"{finished} of {trainings} trainings are finished")
    folder.mkdir(exist_ok=True)


def _rows(reports: dict[_Experiment, list[ClassificationReport]]) -> tuple[AblationRow, ...]:
    return tuple(
        AblationRow(ineffectual=experiment.ineffectual, label=experiment.label, reports=tuple(values))
        for experiment, values in reports.items()
    )


def _train_and_predict(
    corpus: Corpus,
    config: M3ERConfig,
    corruption: str,
    baselines: bool,
    folder: Path | None,
    device: str,
    watch: _Watch,
    which: str,
) -> _Run:
    """Train with both losses, each in a part of ``folder``, and predict every row of Table 2."""
    assert config.check is not None
    test = corpus.subset("test")
    variant, other_loss = _other_loss(config.loss)
    watch.say(f"{which}: training with the {'modified' if variant == 'm3er' else 'original'} loss")
    contrast = train(
        corpus,
        config.replace(loss=replace(config.loss, variant=variant)),
        out=folder and folder / f"loss-{variant}",
        device=device,
        progress=watch.next_training(),
    ).model
    watch.say(f"{which}: training M3ER")
    model = train(corpus, config, out=folder and folder / "m3er", device=device, progress=watch.next_training()).model
    noisy, truth = corrupt_corpus(model, test, config.training.seed, corruption=corruption)
    with_other = model.ablated(check=_fit_other_check(model, config.check, corpus.subset("train")))
    other = _OTHER_CHECK[_other_statistic(config.check)]
    watch.say(f"{which}: {'baselines and scoring' if baselines else 'scoring'}")
    predictions = {
        _Experiment(False, other_loss): evaluate(contrast, test),
        _Experiment(False, FULL): evaluate(model, test),
        _Experiment(True, NEITHER): evaluate(model.ablated(check=False, proxy=False), noisy),
        _Experiment(True, NO_PROXY): evaluate(model.ablated(proxy=False), noisy),
        _Experiment(True, FULL): evaluate(model, noisy),
        _Experiment(True, other): evaluate(with_other, noisy),
        _Experiment(True, ORACLE): evaluate(model, noisy, effective=~truth),
    }
    reports = {}
    if baselines:
        reports = _score_baselines(model, corpus, noisy, folder and folder / "baselines")
    return _Run(model, noisy, truth, predictions, reports)


def _score_baselines(
    model: M3ERFusion, corpus: Corpus, noisy: Corpus, folder: Path | None
) -> dict[_Experiment, ClassificationReport]:
    """Fit the baselines, and score them on the test split: all of them as it is, those that fuse also corrupted."""
    found = fit_baselines(model, corpus, folder=folder)
    reports = {}
    for ineffectual, test in ((False, corpus), (True, noisy)):
        known = labelled_part(test, "test")
        utterances = utterances_of(model, known)
        for baseline in found:
            if baseline.fuses or not ineffectual:
                reports[_Experiment(ineffectual, baseline.label)] = classification_report(
                    baseline.probabilities(utterances), labels_of(known), known.classes, task=known.task
                )
    return reports


def _other_loss(config: LossConfig) -> tuple[Variant, str]:
    """Return the loss that M3ER's row is compared with, and the label of its row."""
    return ("m3er", MODIFIED) if config.variant == "original" else ("original", ORIGINAL)


def _other_statistic(config: CheckConfig) -> Statistic:
    return "combined" if config.statistic == "correlation" else "correlation"


def _fit_other_check(model: M3ERFusion, config: CheckConfig, training: Corpus) -> ModalityCheck:
    """Fit the paper's correlation check, unweighted, or the combined one if the model has the paper's."""
    statistic = _other_statistic(config)
    options = vars(
        replace(config, statistic=statistic, component_weights=None if statistic == "correlation" else "canonical")
    )
    batch = standardize_corpus(model, training)
    with warnings.catch_warnings():  # the model's own check has warned already
        warnings.simplefilter("ignore", UserWarning)
        return ModalityCheck(model.input_dims, **options).fit_batches(lambda: [batch])


def _check_quality(name: str, test: Corpus, outcomes: Sequence[_CheckOutcome]) -> CheckQuality:
    """Measure a check in each modality; the mean over seeds leaves out those that lack the utterances needed."""
    quality = CheckQuality(name, auroc={}, detected={}, false_alarms={})
    for m, modality in enumerate(test.modalities):
        areas, detected, false_alarms = [], [], []
        for truth, prediction in outcomes:
            present = prediction.available[:, m]
            corrupted, rejected = truth[present, m], ~prediction.effective[present, m]
            if corrupted.any() and not corrupted.all():
                areas.append(auroc(-prediction.p_value[present, m], corrupted))
            if corrupted.any():
                detected.append(float(rejected[corrupted].mean()))
            if not corrupted.all():
                false_alarms.append(float(rejected[~corrupted].mean()))
        quality.auroc[modality] = mean_std(areas)[0] if areas else None
        quality.detected[modality] = mean_std(detected)[0] if detected else None
        quality.false_alarms[modality] = mean_std(false_alarms)[0] if false_alarms else None
    return quality


def _describe(corpus: Corpus, config: M3ERConfig, seeds: int) -> dict[str, Any]:
    """Return the settings that the result is recorded with."""
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
