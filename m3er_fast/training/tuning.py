"""`tune`: a random search over settings, whose trials Ray Tune runs beside each other."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch

from m3er_fast._validation import check_choice, check_number, check_positive_int
from m3er_fast.atomic_files import replacing
from m3er_fast.config import M3ERConfig
from m3er_fast.corpus.base import Corpus
from m3er_fast.execution.ray_pool import check_ray, ray_session
from m3er_fast.training.data import MemoryData
from m3er_fast.training.device import find_device
from m3er_fast.training.fingerprint import ResumeMismatchError, check_fingerprint, run_fingerprint
from m3er_fast.training.loop import TrainingError
from m3er_fast.training.run import default_config, train
from m3er_fast.training.search_space import SearchSpace, Settings
from m3er_fast.training.stream import StreamedCorpus

BEST_FILE, TRIALS_FILE, TABLE_FILE = "best.json", "trials.jsonl", "trials.csv"
_MOST_RESTARTS = 1  # of a trial whose process was lost
_SHOWN = 10  # trials that are printed

TuningMetric = Literal["f1", "mean_accuracy", "accuracy", "balanced_accuracy"]


class Trial(NamedTuple):
    """The outcome of one trial."""

    number: int
    settings: Settings
    """The values that differ from the settings of trial 0."""
    score: float | None
    """On the validation split; None if the trial failed."""
    epochs: int
    """Epochs trained."""
    seconds: float
    error: str
    """Why there is no score, or an empty text."""


@dataclass(frozen=True)
class TuningResult:
    """The trials of a search, and the settings of the best one."""

    config: M3ERConfig
    """The settings of the best trial."""
    trials: tuple[Trial, ...]
    """By number."""
    metric: TuningMetric

    @property
    def best(self) -> Trial:
        """The trial of the highest score, the first of several."""
        return _best(self.trials)

    def to_markdown(self) -> str:
        """Return a table of the best trials and of trial 0, with the settings that they tried."""
        ranked = sorted(self.trials, key=lambda trial: (-_rank(trial), trial.number))
        shown = ranked[:_SHOWN]
        shown += [trial for trial in ranked[_SHOWN:] if trial.number == 0]
        names = list(dict.fromkeys(name for trial in self.trials for name in trial.settings))
        heads = ["Trial", f"Validation {self.metric}", "Epochs", "Seconds", *(name.split(".")[-1] for name in names)]
        lines = [heads, ["---:"] * len(heads)]
        for trial in shown:
            score = "failed" if trial.score is None else f"{trial.score:.4f}"
            values = [_shown(trial.settings[name]) if name in trial.settings else "" for name in names]
            lines.append([str(trial.number), score, str(trial.epochs), f"{trial.seconds:.1f}", *values])
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def tune(
    corpus: Corpus | StreamedCorpus,
    config: M3ERConfig | None = None,
    *,
    out: str | Path,
    space: Mapping[str, Any] | None = None,
    trials: int = 20,
    seconds: float | None = None,
    metric: TuningMetric = "f1",
    seed: int = 0,
    resume: bool = True,
    device: str = "auto",
    address: str | None = None,
    workers: int | None = None,
    progress: Callable[[Trial], None] | None = None,
    resumed: Callable[[int], None] | None = None,
) -> TuningResult:
    """Search for the settings with the best score on the validation split. The test split is never looked at.

    Trial 0 has the settings of ``config``. All others change some of them, drawn at random (Bergstra and Bengio 2012)
    from ``seed`` and the trial's number alone. Each is one :func:`train`, with its early stopping. What a trial found
    is kept at once: an interrupted search goes on with the trials that are missing, and one with more trials or more
    time goes on from a finished one.

    The best of many scores is flattered by chance, the more the smaller the validation split. Compare the settings with
    those of trial 0 on data that the search has not seen, for example by :func:`m3er_fast.ablation.run_ablation`.

    Args:
        corpus: as of :func:`train`.
        config: all settings that are not searched; None takes :func:`default_config`.
        out: the folder, which receives best.json (the settings of the best trial, for ``train --config``), trials.jsonl
            and trials.csv.
        space: the searched settings, as of :class:`SearchSpace`; None takes its default.
        trials: number of trials, trial 0 included.
        seconds: the time after which no further trial is waited for; None is no limit. Trials that are cut are lost.
        metric: the score: overall "f1" or "mean_accuracy", "accuracy", or "balanced_accuracy".
        seed: of what is drawn. Trainings are seeded by ``config.training.seed``, all alike.
        resume: keep the trials that ``out`` holds; False begins anew.
        device: as of :func:`train`. With GPUs, each trial has one.
        address: of a Ray cluster; None starts Ray on this machine.
        workers: number of trials at a time; None is as many as there is room for.
        progress: called in this process after every trial.
        resumed: called once with the number of trials that an earlier search has done, if it has done any.

    Raises:
        ValueError: an argument is out of range, or the corpus cannot be trained on.
        ResumeMismatchError: ``out`` holds a search of another corpus, configuration, space, metric or seed.
        TrainingError: not one trial has a score.
        ImportError: Ray Tune is missing.
    """
    check_positive_int("trials", trials)
    if seconds is not None:
        check_number("seconds", seconds, 0.0, exclusive=True)
    check_choice("metric", metric, get_args(TuningMetric))
    config = default_config(corpus) if config is None else config
    data = MemoryData(corpus, config.training.seed) if isinstance(corpus, Corpus) else corpus
    searched = SearchSpace(space, config)
    out = Path(out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    asked = {**run_fingerprint(config, data.fingerprint(), None), "metric": metric, "search seed": seed}
    asked["space"] = json.loads(json.dumps(dict(space) if space is not None else None))
    notes = _Notes(out / TRIALS_FILE, asked)
    done = notes.read() if resume else {}
    notes.begin(done)
    if done and resumed is not None:
        resumed(len(done))
    missing = [number for number in range(trials) if number not in done]
    if address is None:
        find_device(device)
    try:
        for trial in _run(corpus, config, searched, missing, seconds, metric, seed, device, address, workers):
            done[trial.number] = trial
            notes.add(trial)
            if progress is not None:
                progress(trial)
    finally:
        found = tuple(done[number] for number in sorted(done) if number < trials)
        if any(trial.score is not None for trial in found):
            result = TuningResult(config.with_settings(_best(found).settings), found, metric)
            _write(result, out)
    if all(trial.score is None for trial in found):
        reason = found[0].error if found else f"none ended within {seconds} s"
        raise TrainingError(f"not one of {trials} trials has a score: {reason}")
    return result


def _run(
    corpus: Corpus | StreamedCorpus,
    config: M3ERConfig,
    space: SearchSpace,
    numbers: list[int],
    seconds: float | None,
    metric: TuningMetric,
    seed: int,
    device: str,
    address: str | None,
    workers: int | None,
) -> Iterator[Trial]:
    """Yield the outcome of each trial as soon as it is known, in any order."""
    if not numbers:
        return
    ray = check_ray(workers)
    # Read when Ray Tune is imported: it would write further tables beside ours, and print one of its own.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    try:
        from ray import tune as ray_tune
    except ImportError as error:
        raise ImportError(f"tuning needs more of Ray ({error}): pip install 'm3er-fast[ray]'") from error
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    ended: queue.SimpleQueue[Trial | BaseException | None] = queue.SimpleQueue()

    class Told(ray_tune.Callback):
        """Passes on what a trial found when it has found it."""

        def __reduce__(self) -> tuple[Any, ...]:
            return object, ()  # Ray Tune keeps a copy in its notes, which tells nobody

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
            if "outcome" in result:
                ended.put(Trial(**result["outcome"]))

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            number = trial.config["number"]
            ended.put(Trial(number, space.draw(number, seed), None, 0, 0.0, "its process was lost; out of memory?"))

    threads = torch.get_num_threads()
    with ray_session(address, workers), tempfile.TemporaryDirectory(prefix="m3er-tune-") as storage:
        gpus = int(device.startswith("cuda") or (device == "auto" and ray.cluster_resources().get("GPU", 0) > 0))
        trainable = ray_tune.with_parameters(
            _train_one, corpus=corpus, config=config, space=space, metric=metric, seed=seed, device=device,
            threads=threads,
        )  # fmt: skip
        tuner = ray_tune.Tuner(
            ray_tune.with_resources(trainable, {"cpu": 1 if gpus else threads, "gpu": gpus}),
            param_space={"number": ray_tune.grid_search(numbers)},
            tune_config=ray_tune.TuneConfig(max_concurrent_trials=workers, time_budget_s=seconds),
            run_config=ray_tune.RunConfig(
                storage_path=storage,
                callbacks=[Told()],
                verbose=0,
                failure_config=ray_tune.FailureConfig(max_failures=_MOST_RESTARTS),
            ),
        )

        def fit() -> None:
            try:
                tuner.fit()
                ended.put(None)
            except BaseException as error:
                ended.put(error)

        thread = threading.Thread(target=fit, daemon=True)  # so that trials are told, and an interrupt comes, at once
        thread.start()
        while (event := ended.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event
        thread.join()


def _train_one(
    chosen: Mapping[str, Any],
    *,
    corpus: Corpus | StreamedCorpus,
    config: M3ERConfig,
    space: SearchSpace,
    metric: TuningMetric,
    seed: int,
    device: str,
    threads: int,
) -> None:
    """Train with the settings of a trial, and report its outcome."""
    from ray import tune as ray_tune

    torch.set_num_threads(threads)
    number, start, epochs = chosen["number"], time.monotonic(), 0
    settings = space.draw(number, seed)
    score, error = None, ""

    def count(record: Any) -> None:
        nonlocal epochs
        epochs = record.epoch
        ray_tune.report({"epoch": epochs, "valid_loss": record.valid_loss})  # a chance to be stopped

    try:
        tried = config.with_settings(settings)
        result = train(corpus, tried, device=device, progress=count)
        data = MemoryData(corpus, tried.training.seed) if isinstance(corpus, Corpus) else corpus
        score = _score(data.report(result.model), metric)
    except (ValueError, TrainingError, MemoryError, torch.OutOfMemoryError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    outcome = Trial(number, settings, score, epochs, round(time.monotonic() - start, 3), error)
    ray_tune.report({"outcome": outcome._asdict()})


def _score(report: Any, metric: TuningMetric) -> float:
    source = report.overall if metric in ("f1", "mean_accuracy") else report
    return float(getattr(source, metric))


def _rank(trial: Trial) -> float:
    return -math.inf if trial.score is None or math.isnan(trial.score) else trial.score


def _best(trials: tuple[Trial, ...]) -> Trial:
    return max(trials, key=lambda trial: (_rank(trial), -trial.number))


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


class _Notes:
    """The file of trials: a line with what was asked for, and one per trial.

    Args:
        path: of the file.
        asked: everything that decides the outcome of a trial.
    """

    def __init__(self, path: Path, asked: dict[str, Any]) -> None:
        self._path, self._asked = path, asked

    def read(self) -> dict[int, Trial]:
        """Return the trials of an earlier search, by number. A last line that was cut is left out.

        Raises:
            ResumeMismatchError: it was another search, or the file is damaged.
        """
        if not self._path.exists():
            return {}
        first, *lines = self._path.read_text(encoding="utf-8").split("\n")
        try:
            found = json.loads(first)
            trials = [Trial(**json.loads(line)) for line in lines[:-1]]
        except (TypeError, ValueError) as error:
            raise ResumeMismatchError(f"{self._path} is damaged ({error}): begin anew (--no-resume)") from error
        check_fingerprint(found, self._asked, self._path.parent, sys.maxsize)  # nor of other epochs
        return {trial.number: trial for trial in trials}

    def begin(self, trials: Mapping[int, Trial]) -> None:
        """Write what was asked for and these trials, in place of what there is."""
        with replacing(self._path) as partial:
            lines = [self._asked, *(trial._asdict() for trial in trials.values())]
            partial.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")

    def add(self, trial: Trial) -> None:
        """Add a trial."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(trial._asdict())}\n")


def _write(result: TuningResult, out: Path) -> None:
    """Write the settings of the best trial, and the table of all trials."""
    with replacing(out / BEST_FILE) as partial:
        partial.write_text(json.dumps(result.config.to_dict(), indent=2) + "\n", encoding="utf-8")
    names = list(dict.fromkeys(name for trial in result.trials for name in trial.settings))
    with replacing(out / TABLE_FILE) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["trial", result.metric, "epochs", "seconds", *names, "error"])
        for trial in result.trials:
            values = [trial.settings.get(name, "") for name in names]
            rows.writerow([trial.number, trial.score, trial.epochs, trial.seconds, *values, trial.error])
