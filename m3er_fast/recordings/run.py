"""A run that turns recordings into a corpus: plan, workers, quarantine, summary, and a mark that it is complete."""

from __future__ import annotations

import glob
import json
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from threadpoolctl import threadpool_limits

from m3er_fast._validation import check_positive_int
from m3er_fast.corpus.base import CorpusError
from m3er_fast.corpus.files import is_hidden
from m3er_fast.corpus.parquet import write_shard
from m3er_fast.execution.engine import Engine, check_engine
from m3er_fast.execution.process_pool import run_in_processes
from m3er_fast.execution.run_folder import OutputMismatchError, RunFolder
from m3er_fast.execution.tasks import LostTask
from m3er_fast.recordings.frames import FrameExtractor, ReadsFiles
from m3er_fast.recordings.labels import Labels, read_labels_table
from m3er_fast.recordings.recognition import SpeechRecogniser
from m3er_fast.recordings.speech import WordTimer
from m3er_fast.recordings.summary import write_summary
from m3er_fast.recordings.utterances import Steps, check_steps, extract_recording
from m3er_fast.recordings.word_vectors import WordEncoder
from m3er_fast.recordings.words import TRANSCRIPT_SUFFIXES, Transcript, read_transcript
from m3er_fast.shards.plan import Checksum, QuarantinedShard, Shard, checksum_of, locate

# fmt: off
MEDIA_SUFFIXES = frozenset((
    ".3gp", ".asf", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".ts",
    ".webm", ".wmv",
    ".aac", ".aif", ".aiff", ".amr", ".flac", ".m4a", ".mka", ".mp3", ".oga", ".ogg", ".opus", ".wav", ".wma",
))
# fmt: on
"""Endings of the files in a folder that are taken for recordings."""

_INPUT_KEY, _REPORT_KEY = b"m3er_fast.input", b"m3er_fast.report"
_THREADS = 16  # checksums wait for storage, not for a core


class Recording(NamedTuple):
    """A recording of a run, with what its shard depends on."""

    name: str
    """Path below the folder of recordings, without the ending."""
    file: Shard
    transcript: Path | None
    transcript_checksum: str | None
    others: tuple[str, ...] = ()
    """Checksums of further files that extractors read for it."""

    @property
    def input(self) -> str:
        """What the shard was made from, in its metadata."""
        return " ".join((str(self.file.size), self.file.checksum, str(self.transcript_checksum), *self.others))


class ExtractProgress(NamedTuple):
    """The progress of a run."""

    done: int
    """Recordings, including those of an earlier run and those in quarantine."""
    recordings: int
    seconds: float
    """Of recordings that this run has extracted."""
    rate: float
    """Seconds of recordings per second."""
    seconds_left: float | None
    """Estimated from the bytes that are left; None before the first recording is done."""


@dataclass(frozen=True)
class ExtractSummary:
    """The result of a run."""

    recordings: int
    resumed: int
    """Recordings that an earlier run had finished."""
    extracted: int
    """Recordings that have a shard, including those of an earlier run."""
    utterances: int
    quarantined: tuple[QuarantinedShard, ...]
    seconds: float
    """That the run took."""


@dataclass(frozen=True)
class CorpusFolder(RunFolder):
    """A folder with one Parquet shard per recording. It can be pickled.

    Args:
        location: path of the folder, which need not exist.
        recordings: of the run.
        settings: how features are made, as JSON.
    """

    recordings: tuple[Recording, ...]
    settings: dict[str, Any]

    contents: ClassVar[str] = "features"
    kinds: ClassVar[dict[str, str]] = {
        "settings": "setting",
        "recordings": "set of recordings",
        "version": "version of m3er-fast",
    }
    shown: ClassVar[tuple[str, ...]] = ("settings", "version")

    def fingerprint(self) -> dict[str, Any]:
        """Return everything that the features depend on, as JSON."""
        from m3er_fast import __version__

        return {
            "version": __version__,
            "settings": self.settings,
            "recordings": [
                {"name": recording.file.name, "input": recording.input, "transcript": str(recording.transcript or "")}
                for recording in self.recordings
            ],
        }

    def comparable(self, fingerprint: dict[str, Any]) -> dict[str, Any]:
        """Compare recordings by name: a changed one is refused if it has a shard, but may repair one in quarantine."""
        entries = fingerprint.get("recordings")
        if isinstance(entries, list):
            entries = [entry.get("name") for entry in entries if isinstance(entry, dict)]
        return {**fingerprint, "recordings": entries}

    def report(self, recording: Recording) -> dict[str, Any] | None:
        """Return the report of a recording that has its shard already, or None.

        Raises:
            OutputMismatchError: the shard was made from another file of this name.
        """
        import pyarrow as pa
        import pyarrow.parquet

        try:
            with self.location.filesystem.open_input_file(self.location.join(recording.file.output_name)) as file:
                about = pyarrow.parquet.read_schema(file).metadata or {}
        except (OSError, pa.ArrowException):  # missing, or incomplete although it has its name
            return None
        if about.get(_INPUT_KEY, b"").decode() != recording.input:
            raise OutputMismatchError(
                f"{self.location} holds features of another recording: {recording.file.name} or its transcript has "
                "changed since, or the file of its features; name another folder"
            )
        report: dict[str, Any] = json.loads(about[_REPORT_KEY])
        return report


def extract(
    recordings: str | Path,
    out: str | Path,
    extractors: Mapping[str, FrameExtractor],
    *,
    encoder: WordEncoder | None = None,
    timer: WordTimer | None = None,
    recogniser: SpeechRecogniser | None = None,
    labels: str | Path | None = None,
    transcripts: str | Path | None = None,
    steps: Steps = "words",
    resume: bool = False,
    engine: Engine = "local",
    address: str | None = None,
    workers: int | None = None,
    progress: Callable[[ExtractProgress], None] | None = None,
) -> ExtractSummary:
    """Turn recordings into a corpus: a folder with one Parquet shard per recording, for audit, train and score.

    A recording that cannot be read is put in quarantine with the reason; the others are extracted. A worker holds the
    features of one recording at a time, and only a piece of its sound and pictures.

    Args:
        recordings: a folder, with the folders in it, or one file. Files in a folder are recordings if their names have
            one of :data:`MEDIA_SUFFIXES`.
        out: the folder to write to.
        extractors: modality -> its extractor, such as ``{"audio": SoundFeatures(), "face": FaceFeatures()}``.
        encoder: of the words, for the modality ``text``; None leaves it out.
        timer: of words that have no time; None spreads them over their cue.
        recogniser: of the words of recordings without a transcript; None leaves them without words.
        labels: a table of utterances (:func:`~m3er_fast.recordings.labels.read_labels_table`). Recordings that it does
            not name are left out. Without one, each cue of a transcript is an utterance, or else the whole recording.
        transcripts: their folder; None looks beside each recording. A transcript has the name of its recording.
        steps: "words", or a number of seconds.
        resume: continue an interrupted run in ``out``; an empty or missing folder starts a new one.
        engine: "local" (processes of this machine) or "ray"; both leave the same bytes.
        address: of a Ray cluster; None starts Ray on this machine.
        workers: processes, or Ray workers; None is one process, or as many Ray workers as there is room for.
        progress: called after every recording.

    Raises:
        ValueError: there is no recording, two have the same name, an argument is out of range, or ``out`` is not empty
            and ``resume`` is False.
        OutputMismatchError: ``out`` is to be resumed, but was made with other recordings, settings or version.
        OSError: ``out`` cannot be written to, for example for lack of space. Finished shards stay.
    """
    start = time.perf_counter()
    check_steps(steps)
    if engine == "local":
        check_engine(engine, address, None)
        if workers is not None:
            check_positive_int("workers", workers)
    else:
        check_engine(engine, address, workers)
    table = None if labels is None else read_labels_table(labels)
    readers = [extractor for extractor in extractors.values() if isinstance(extractor, ReadsFiles)]
    found, unnamed = _plan(Path(recordings), None if transcripts is None else Path(transcripts), table, readers)
    settings = describe(extractors, encoder, steps, timer, recogniser)
    folder = CorpusFolder(locate(out), tuple(found), settings)
    job = _Job(folder, dict(extractors), encoder, timer, recogniser, table, steps)
    try:
        pickle.dumps(job)
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        raise ValueError(f"extractors and encoder must be sent to other processes, but {error}") from error
    with _cluster(address):
        folder.begin(resume=resume)
        counter = _Counter(job, unnamed, progress)
        pending = counter.skip_finished()
        results = _results(job, pending, engine, workers)
        try:
            with closing(results):  # type: ignore[type-var]
                for index, result in results:
                    counter.add(pending[index], result)
        finally:  # an interrupted run leaves its complete quarantine list too
            counter.write_quarantine()
        write_summary(folder, counter.reports, counter.quarantined, time.perf_counter() - start)
        folder.finish()
    return ExtractSummary(
        recordings=len(found),
        resumed=counter.resumed,
        extracted=len(counter.reports),
        utterances=sum(report["utterances"] for report in counter.reports.values()),
        quarantined=tuple(counter.quarantined),
        seconds=time.perf_counter() - start,
    )


def _cluster(address: str | None) -> AbstractContextManager[None]:
    if address is None:
        return nullcontext()
    from m3er_fast.execution.ray_pool import ray_cluster

    return ray_cluster(address)


def _results(
    job: _Job, pending: Sequence[Recording], engine: Engine, workers: int | None
) -> Iterator[tuple[int, _Result | LostTask]]:
    """Run the job in workers, and yield (index, result) of each recording as it finishes."""
    if engine == "local":
        return run_in_processes(job, pending, workers or 1)
    from m3er_fast.execution.ray_pool import run_tasks  # not above: it takes torch in, which no worker needs

    return run_tasks(_Cancellable(job), pending, workers=workers)


def describe(
    extractors: Mapping[str, FrameExtractor],
    encoder: WordEncoder | None,
    steps: Steps,
    timer: WordTimer | None = None,
    recogniser: SpeechRecogniser | None = None,
) -> dict[str, Any]:
    """Return everything that the features of a corpus depend on but its recordings, as JSON.

    Raises:
        ValueError: an extractor describes itself by something that JSON has no form for.
    """
    described = {modality: extractor.describe() for modality, extractor in extractors.items()}
    text = {} if encoder is None else {"text": encoder.describe()}
    words = {} if timer is None else {"word_times": timer.describe()}
    if recogniser is not None:
        words["recognised_words"] = recogniser.describe()
    try:
        # As it is read back: with lists for tuples.
        settings: dict[str, Any] = json.loads(
            json.dumps({"steps": steps, **words, "modalities": {**text, **described}})
        )
    except TypeError as error:
        raise ValueError(f"extractors must describe themselves as JSON: {error}") from error
    return settings


class _Result(NamedTuple):
    """The outcome of one recording."""

    report: dict[str, Any]
    reason: str | None = None
    """Why it is put in quarantine; None if it has its shard."""


@dataclass(frozen=True)
class _Job:
    """Extracts one recording after the other. It can be pickled."""

    folder: CorpusFolder
    extractors: dict[str, FrameExtractor]
    encoder: WordEncoder | None
    timer: WordTimer | None
    recogniser: SpeechRecogniser | None
    labels: Labels | None
    steps: Steps

    def __call__(self, recording: Recording) -> _Result:
        try:
            transcript = self._transcript(recording)
            # Products by another number of threads round differently, and workers would wait for each other.
            with threadpool_limits(1):
                extracted = extract_recording(
                    recording.file.path,
                    self.extractors,
                    encoder=self.encoder,
                    transcript=transcript,
                    utterances=None if self.labels is None else self.labels.utterances[recording.name],
                    steps=self.steps,
                    name=recording.name,
                    classes=() if self.labels is None else self.labels.classes,
                )
        except (CorpusError, FileNotFoundError, PermissionError) as error:
            return _Result({}, " ".join(str(error).split()))
        report = {
            **extracted.report,
            "utterances": len(extracted.corpus),
            "transcript": None if recording.transcript is None else recording.transcript.name,
            "words_from": None if transcript is None else "asr" if recording.transcript is None else "transcript",
        }
        about = {
            _INPUT_KEY: recording.input.encode(),
            _REPORT_KEY: json.dumps(report).encode(),
        }
        with self.folder.atomic_file(recording.file.output_name) as file:
            write_shard(replace(extracted.corpus, extraction=self.folder.settings), file, about)
        return _Result(report)

    def _transcript(self, recording: Recording) -> Transcript | None:
        path = Path(recording.file.path)
        if recording.transcript is None:
            return None if self.recogniser is None else self.recogniser.transcribe(path)
        transcript = read_transcript(recording.transcript)
        return transcript if self.timer is None else self.timer.time(path, transcript)


class _Cancellable(NamedTuple):
    """A job for workers that may be asked to stop; a recording is finished first."""

    job: _Job

    def __call__(self, task: Recording, is_canceled: Callable[[], bool]) -> _Result:
        return self.job(task)


class _Counter:
    """Counts the recordings of a run, keeps their reports, and tells the progress."""

    def __init__(
        self, job: _Job, unnamed: Sequence[QuarantinedShard], progress: Callable[[ExtractProgress], None] | None
    ) -> None:
        self._folder, self._progress = job.folder, progress
        self.reports: dict[str, dict[str, Any]] = {}
        self._quarantine = list(unnamed)
        self.resumed = 0
        self._seconds = 0.0
        self._bytes = self._all_bytes = 0
        self._start = time.perf_counter()

    @property
    def quarantined(self) -> list[QuarantinedShard]:
        """The recordings in quarantine, by name."""
        return sorted(self._quarantine)

    def skip_finished(self) -> list[Recording]:
        """Count the recordings that an earlier run finished, and return the others."""
        recordings = self._folder.recordings
        with ThreadPoolExecutor(_THREADS) as pool:
            found = list(pool.map(self._folder.report, recordings))
        pending = []
        for recording, report in zip(recordings, found, strict=True):
            if report is None:
                pending.append(recording)
            else:
                self.reports[recording.file.name] = report
        self.resumed = len(self.reports)
        self._all_bytes = sum(recording.file.size for recording in pending)
        self._start = time.perf_counter()
        if self.resumed:
            self._tell()
        return pending

    def add(self, recording: Recording, result: _Result | LostTask) -> None:
        """Count the outcome of a recording."""
        self._bytes += recording.file.size
        if result.reason is not None:
            self._quarantine.append(QuarantinedShard(recording.file.name, result.reason))
            self.write_quarantine()
        elif isinstance(result, _Result):
            self.reports[recording.file.name] = result.report
            self._seconds += result.report["seconds"]
        self._tell()

    def write_quarantine(self) -> None:
        """Write the quarantine list, unless it is empty."""
        if self._quarantine:
            self._folder.quarantine(self.quarantined)

    def _tell(self) -> None:
        if self._progress is None:
            return
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        left = elapsed * (self._all_bytes - self._bytes) / self._bytes if self._bytes else None
        done = len(self.reports) + len(self._quarantine)
        recordings = len(self._folder.recordings)
        self._progress(ExtractProgress(min(done, recordings), recordings, self._seconds, self._seconds / elapsed, left))


def _plan(
    source: Path, transcripts: Path | None, labels: Labels | None, readers: Sequence[ReadsFiles]
) -> tuple[list[Recording], list[QuarantinedShard]]:
    """Return the recordings of a run, and the names in the labels that are those of no recording."""
    from pyarrow import fs

    if source.is_dir():
        paths = sorted(path for path in source.rglob("*") if _is_recording(path, source))
        root = source
    elif source.is_file():
        paths, root = [source], source.parent
    else:
        raise CorpusError(f"{source}: no such file or folder")
    if not paths:
        raise CorpusError(f"{source}: holds no recording, such as a .mp4 or .wav file")
    named: dict[str, Path] = {}
    for path in paths:
        name = path.relative_to(root).with_suffix("").as_posix()
        if name in named:
            raise CorpusError(f"{named[name]} and {path} are recordings of the same name")
        named[name] = path
    missing: list[QuarantinedShard] = []
    if labels is not None:
        unknown = [name for name in labels.utterances if name not in named]
        missing = [QuarantinedShard(name, "the labels name it, but there is no such recording") for name in unknown]
        named = {name: path for name, path in named.items() if name in labels.utterances}
        if not named:
            raise CorpusError(
                f"{source}: the labels name none of its recordings, but {', '.join(unknown[:3]) or 'nothing'}"
            )
    for reader in readers:
        owners: dict[Path, Path] = {}
        for path in named.values():
            other = reader.file_of(path)
            if other is not None and owners.setdefault(other, path) is not path:
                raise CorpusError(
                    f"{other} would be of {owners[other]} and of {path}: name a folder, with one for each"
                )
    filesystem = fs.LocalFileSystem()

    def checked(path: Path, kind: Checksum) -> tuple[int, str]:
        size = path.stat().st_size
        return size, checksum_of(filesystem, str(path), size, kind)

    def recording(name: str, path: Path) -> Recording:
        file = Shard(path.relative_to(root).as_posix(), str(path.absolute()), *checked(path, "sampled"))
        words = transcript_of(path.with_suffix("") if transcripts is None else transcripts / name)
        others = [other for reader in readers if (other := reader.file_of(path)) is not None]
        return Recording(
            name,
            file,
            words,
            None if words is None else checked(words, "full")[1],
            tuple(checked(other, "full")[1] for other in others),
        )

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(recording, named.keys(), named.values())), missing


def _is_recording(path: Path, root: Path) -> bool:
    parts = path.relative_to(root).parts
    return path.suffix.lower() in MEDIA_SUFFIXES and not any(map(is_hidden, parts)) and path.is_file()


def transcript_of(stem: Path) -> Path | None:
    """Return the transcript of a recording, or None if it has none.

    Args:
        stem: path of the recording without its ending. Of several transcripts, one with times of words is taken.
    """
    for suffix in TRANSCRIPT_SUFFIXES:
        found = [
            path for path in sorted(stem.parent.glob(f"{glob.escape(stem.name)}.*")) if path.suffix.lower() == suffix
        ]
        if found and found[0].stem == stem.name:
            return found[0].absolute()
    return None
