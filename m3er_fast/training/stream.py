"""A corpus larger than memory: its shards are read in random order, and shuffled in blocks.

An epoch reads the shards one after the other, in an order of its own. Consecutive utterances of this stream form blocks
of one size, and each block is shuffled as a whole. Which utterances a batch holds thus follows from the seed and the
number of the batch, so an interrupted epoch goes on at any batch without reading those before its block.

Dimension legend: N utterances, B utterances of a batch, M modalities, T time steps, d features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3er_fast._validation import check_positive_int
from m3er_fast.corpus.base import NO_LABEL, SPLITS, Corpus, CorpusError, naming
from m3er_fast.corpus.files import decoding
from m3er_fast.corpus.parquet import (
    DecodedRows,
    classes_named,
    decode_rows,
    extraction_of,
    labels_are_names,
    labels_from_table,
    modality_columns,
    read_splits,
)
from m3er_fast.evaluation import Prediction, corrupt_corpus, evaluate
from m3er_fast.fitting.fit import fit_statistics
from m3er_fast.fitting.training_rows import make_reader
from m3er_fast.fusion import M3ERFusion
from m3er_fast.metrics import ClassificationReport, classification_report
from m3er_fast.shards.page_cache import drop_from_page_cache, memory_bytes, outgrows_page_cache
from m3er_fast.shards.plan import Location, Shard, Source, plan_shards
from m3er_fast.shards.prefetch import Prefetch
from m3er_fast.shards.reader import read_windows
from m3er_fast.training.data import Split, TrainingBatch, balancing_weights
from m3er_fast.training.fingerprint import text_digest

if TYPE_CHECKING:
    import pyarrow as pa

_BLOCK_BYTES = 256 * 2**20
_REPORT_BATCH = 512
_THREADS = 16  # reading labels waits for storage, not for a core


def fits_into_memory(corpus: Source) -> bool:
    """Return whether a corpus may be read as a whole: reading and splitting it takes thrice the size of its files.

    Raises:
        CorpusError: there is no such corpus.
    """
    # Not of what is free at the moment: a training that goes on must read its corpus as it began.
    return 3 * sum(shard.size for shard in plan_shards(corpus).shards) < memory_bytes()


class StreamedCorpus:
    """A corpus that is read shard by shard whenever it is needed, for ``train``.

    Memory holds three blocks at most: one that is used, one that is ready, and one that is read. Standardiser, check
    and proxies are fitted by :func:`m3er_fast.scoring.fit_statistics`.

    Args:
        corpus: a folder of Parquet or Arrow IPC files, or one file: a local path, a URI, or a pair of a
            ``pyarrow.fs.FileSystem`` and a path. It needs labels and a column ``split``.
        buffer: utterances of a block; None takes as many as 256 MiB of the files hold.

    Raises:
        CorpusError: if the corpus cannot be read, has no splits, or its shards contradict each other.
        ValueError: if ``buffer`` is not a positive int, the corpus has no labels, or a split that training needs has no
            labelled utterance.
    """

    def __init__(self, corpus: Source, *, buffer: int | None = None) -> None:
        if buffer is not None:
            check_positive_int("buffer", buffer)
        self._source, plan = corpus, plan_shards(corpus)
        self.input_dims = make_reader(plan, None).input_dims
        with ThreadPoolExecutor(_THREADS) as pool:
            contents = list(pool.map(partial(_read_content, plan.corpus), plan.shards))
        with naming(str(plan.corpus)):
            self.classes, self.task = _agree_on_labels(contents)
            self.extraction = contents[0].extraction
            if any(content.extraction != self.extraction for content in contents):
                raise CorpusError("its shards were extracted from recordings in different ways")
        rows = sum(content.rows for content in contents)
        size = sum(shard.size for shard in plan.shards)
        self.buffer = buffer or max(1, _BLOCK_BYTES * rows // max(1, size))
        self._plan = plan
        self._class_count = np.zeros(len(self.classes))
        for content in contents:
            columns = [self.classes.index(name) for name in content.classes]
            self._class_count[columns] += content.class_count
        reader = _Reader(plan.corpus, self.input_dims, self.classes, self.task, not outgrows_page_cache(plan))
        self.training, self.validation, self.test = (
            StreamedSplit(
                partial(reader.read, split=split),
                [(content.shard, content.labelled[split]) for content in contents if content.labelled[split]],
                self.buffer,
            )
            for split in SPLITS
        )
        for name, part in (("train", self.training), ("valid", self.validation)):
            if not part.rows:
                raise ValueError(f"the {name} split has no labelled utterance")

    def class_weights(self) -> tuple[float, ...]:
        """Return the weights that make the classes of the training split count alike."""
        return balancing_weights(self._class_count)

    def fit(self, model: M3ERFusion) -> None:
        """Learn standardiser, check and proxies of a model from the training split.

        Raises:
            CorpusError: if an utterance cannot be read.
        """
        statistics = fit_statistics(self._source, model.config, input_dims=self.input_dims)
        if statistics.quarantined:
            raise CorpusError(statistics.quarantined[0].reason)
        if statistics.errors:
            raise CorpusError(f"{self._plan.corpus}: {statistics.errors} utterances cannot be read")
        statistics.apply(model)

    def fingerprint(self) -> dict[str, Any]:
        """Return everything of the corpus that decides the result of a training, by name."""
        return {
            "reading": "streamed",
            "modalities": [f"{name} ({dim})" for name, dim in self.input_dims.items()],
            "classes": list(self.classes),
            "task": self.task,
            "shards": text_digest(f"{shard.name} {shard.size} {shard.checksum}" for shard in self._plan.shards),
            "buffer": self.buffer,
        }

    def report(
        self, model: M3ERFusion, *, split: Split | None = None, corruption: str | None = None
    ) -> ClassificationReport:
        """Return a model's scores on a split, by default that of validation, as it is or with a corruption of a name.

        Each batch is corrupted by itself, with a seed of its own.
        """
        answers: list[Prediction] = []
        targets = []
        for number, batch in enumerate((split or self.validation).in_order(_REPORT_BATCH)):
            part = self._corpus_of(batch)
            if corruption is not None:
                part, _ = corrupt_corpus(model, part, seed=number, corruption=corruption)
            answers.append(evaluate(model, part))
            targets.append(batch.target.numpy())
        uncalibrated = [answer.uncalibrated for answer in answers if answer.uncalibrated is not None]
        return classification_report(
            np.concatenate([answer.probabilities for answer in answers]),
            np.concatenate(targets),
            self.classes,
            task=self.task,
            uncalibrated=np.concatenate(uncalibrated) if uncalibrated else None,
        )

    def _corpus_of(self, batch: TrainingBatch) -> Corpus:
        """Return the utterances of a batch, without their labels."""
        return Corpus(
            ids=np.arange(len(batch.lengths)).astype(str),
            features={name: values.numpy() for name, values in batch.features.items()},
            lengths=batch.lengths.numpy(),
            available=batch.available.numpy(),
            target=None,
            classes=self.classes,
            task=self.task,
        )

    def describe(self) -> str:
        """Return the sizes of both splits in words, for the model card."""
        return f"{self.training.rows} labelled utterances, streamed from shards; {self.validation.rows} others"


class StreamedSplit:
    """The labelled utterances of a split, read from shards.

    Args:
        read: yields the utterances of a shard, some at a time.
        shards: with their numbers of utterances, all positive.
        buffer: utterances of a block.
    """

    def __init__(
        self, read: Callable[[Shard], Iterator[_Piece]], shards: Sequence[tuple[Shard, int]], buffer: int
    ) -> None:
        self._read, self._shards, self._buffer = read, shards, buffer

    @property
    def rows(self) -> int:
        """Number of labelled utterances."""
        return sum(rows for _, rows in self._shards)

    def in_order(self, size: int) -> Iterator[TrainingBatch]:
        """Yield all batches in the order of the corpus."""
        return self._batches(size, self._shards, 0, lambda number, rows: np.arange(rows))

    def shuffled(self, size: int, order: torch.Generator, start: int = 0) -> Iterator[TrainingBatch]:
        """Yield all batches from number ``start`` on, in a random order."""
        seed = int(torch.randint(2**62, (), generator=order).item())
        shards = np.random.default_rng(seed).permutation(len(self._shards))
        return self._batches(
            size,
            [self._shards[number] for number in shards],
            start,
            lambda number, rows: np.random.default_rng((seed, number)).permutation(rows),
        )

    def _batches(
        self,
        size: int,
        shards: Sequence[tuple[Shard, int]],
        start: int,
        order: Callable[[int, int], NDArray[np.int64]],
    ) -> Iterator[TrainingBatch]:
        """Yield the batches of a stream of shards; ``order`` permutes a block of a number and a size."""
        of_block = max(1, self._buffer // size)  # batches
        first, begun = divmod(start, of_block)
        with Prefetch(self._blocks(shards, of_block * size, first)) as blocks:
            for number, block in enumerate(blocks, first):
                rows = order(number, len(block))
                for begin in range(begun * size, len(rows), size):
                    # Within a batch the order makes no difference, and memory is read forwards.
                    yield block.batch(np.sort(rows[begin : begin + size]))
                begun = 0

    def _blocks(self, shards: Sequence[tuple[Shard, int]], block_rows: int, first: int) -> Iterator[_Block]:
        """Yield the blocks of a stream of shards, from number ``first`` on."""
        ends = np.cumsum([rows for _, rows in shards])
        begin = int(np.searchsorted(ends, first * block_rows, side="right"))
        skipped = first * block_rows - (int(ends[begin - 1]) if begin else 0)
        block = _Block()
        for shard, rows in shards[begin:]:
            found = 0
            for piece in self._read(shard):
                found += len(piece.target)
                taken = min(skipped, len(piece.target))
                skipped -= taken
                while taken < len(piece.target):
                    stop = min(len(piece.target), taken + block_rows - len(block))
                    block.append(piece, taken, stop)
                    taken = stop
                    if len(block) == block_rows:
                        yield block
                        block = _Block()
            if found != rows:
                raise CorpusError(f"{shard.name}: the corpus has changed while it was read")
        if len(block):
            yield block


class _Piece(NamedTuple):
    """Consecutive labelled utterances of a split."""

    rows: DecodedRows
    target: NDArray[Any]  # (N,) or (N, C)
    input_dims: dict[str, int]


class _Block:
    """Utterances that are shuffled together: parts of pieces, one after the other."""

    def __init__(self) -> None:
        self._pieces: list[_Piece] = []
        self._ends = [0]  # of the pieces in the block, after its beginning
        self._offsets: list[int] = []  # what to add to a row of the block for the row of a piece

    def __len__(self) -> int:
        return self._ends[-1]

    def append(self, piece: _Piece, start: int, stop: int) -> None:
        """Add the rows of a piece from ``start`` to ``stop``."""
        self._pieces.append(piece)
        self._offsets.append(start - len(self))
        self._ends.append(len(self) + stop - start)

    def batch(self, rows: NDArray[np.int64]) -> TrainingBatch:
        """Return some rows, given in ascending order, as a batch."""
        bounds = np.searchsorted(rows, self._ends)
        parts = [
            (piece, slice(begin, end), rows[begin:end] + offset)
            for piece, offset, begin, end in zip(self._pieces, self._offsets, bounds[:-1], bounds[1:], strict=True)
            if end > begin
        ]
        lengths = np.concatenate([piece.rows.lengths[chosen] for piece, _, chosen in parts])
        steps = max(1, int(lengths.max()))
        features = {}
        for name, dim in parts[0][0].input_dims.items():
            features[name] = values = np.empty((len(rows), steps, dim), np.float32)
            for piece, where, chosen in parts:
                if name in piece.rows.columns:
                    piece.rows.columns[name].padded(chosen, steps, out=values[where])
                else:
                    values[where] = 0
        available = np.concatenate([piece.rows.available[chosen] for piece, _, chosen in parts])
        target = np.concatenate([piece.target[chosen] for piece, _, chosen in parts])
        tensors: dict[str, Tensor] = {name: torch.from_numpy(values) for name, values in features.items()}
        return TrainingBatch(tensors, torch.from_numpy(lengths), torch.from_numpy(available), torch.from_numpy(target))


class _Reader(NamedTuple):
    """Reads the labelled utterances of shards."""

    corpus: Location
    input_dims: dict[str, int]
    classes: tuple[str, ...]
    task: str
    keep_cached: bool  # leave the files that were read in the page cache

    def read(self, shard: Shard, split: str) -> Iterator[_Piece]:
        """Yield the labelled utterances of a split, some at a time.

        Raises:
            CorpusError: the shard, or an utterance, cannot be read.
        """
        columns = [*self.input_dims, "label", "split"]
        with naming(shard.name):
            for table in read_windows(self.corpus, shard, extra_columns=columns, check=self._check_schema):
                with decoding(shard.name, "not readable"):
                    target = labels_from_table(table, self.classes, self.task).target
                    wanted = _labelled(target, self.task, table.num_rows) & (read_splits(table) == split)
                    if target is None or not wanted.any():
                        continue
                    if not wanted.all():
                        table, target = table.filter(wanted), target[wanted]
                    rows = decode_rows(table, self.input_dims)
                if rows.problems:
                    raise CorpusError(rows.problems[min(rows.problems)])
                yield _Piece(rows, target, self.input_dims)
        if not self.keep_cached:
            drop_from_page_cache(shard)

    def _check_schema(self, schema: pa.Schema) -> None:
        unknown = [name for name in modality_columns(schema) if name not in self.input_dims]
        if unknown:
            raise CorpusError(f"holds modalities {unknown}, wanted some of {list(self.input_dims)}")
        decode_rows(schema.empty_table(), self.input_dims)


class _Content(NamedTuple):
    """What a shard holds, except for its frames."""

    shard: Shard
    rows: int
    classes: tuple[str, ...]
    task: str
    has_labels: bool
    are_names: bool
    labelled: dict[str, int]  # split -> number of labelled utterances
    class_count: NDArray[Any]  # (C,), the labels of the training split
    extraction: dict[str, Any] | None  # as of a Corpus


def _read_content(corpus: Location, shard: Shard) -> _Content:
    """Read splits and labels of a shard."""
    import pyarrow as pa

    def check_schema(schema: pa.Schema) -> None:
        if "split" not in schema.names:
            raise CorpusError("there is no column 'split', which a corpus that is streamed needs")

    with naming(shard.name):
        columns = ("label", "split")
        tables = list(read_windows(corpus, shard, frames=False, extra_columns=columns, check=check_schema))
        with decoding(shard.name, "not readable"):
            table = pa.concat_tables(tables)
            target, classes, task = labels_from_table(table)
            splits, is_labelled = read_splits(table), _labelled(target, task, table.num_rows)
    count = np.zeros(len(classes))
    if target is not None:
        learned = target[is_labelled & (splits == "train")]
        count += np.bincount(learned, minlength=len(classes)) if task == "single" else learned.sum(axis=0)
    labelled = {split: int((is_labelled & (splits == split)).sum()) for split in SPLITS}
    names, extraction = labels_are_names(table.schema), extraction_of(table.schema)
    return _Content(shard, table.num_rows, classes, task, target is not None, names, labelled, count, extraction)


def _labelled(target: NDArray[Any] | None, task: str, rows: int) -> NDArray[np.bool_]:
    """Return (N,) bool: whether an utterance has a label."""
    if target is None:
        return np.zeros(rows, dtype=bool)
    return np.asarray(target != NO_LABEL if task == "single" else ~np.isnan(target).all(axis=1))


def _agree_on_labels(contents: Sequence[_Content]) -> tuple[tuple[str, ...], str]:
    """Return the classes and the task of all shards: without metadata, a shard knows only its own labels.

    Raises:
        CorpusError: if they contradict each other.
        ValueError: if there are no labels.
    """
    with_labels = [content for content in contents if content.has_labels]
    if not with_labels:
        raise ValueError("the corpus has no labels")
    first = with_labels[0]
    for content in with_labels:
        if content.task != first.task:
            raise CorpusError(
                f"the labels are {first.task} in {first.shard.name}, {content.task} in {content.shard.name}"
            )
    longest = max(with_labels, key=lambda content: len(content.classes)).classes
    if all(content.classes == longest[: len(content.classes)] for content in contents):
        return longest, first.task
    if all(content.are_names for content in with_labels):
        return classes_named(name for content in contents for name in content.classes), first.task
    other = next(content for content in contents if content.classes != longest[: len(content.classes)])
    raise CorpusError(f"{other.shard.name} has the classes {other.classes}, but other shards {longest}")
