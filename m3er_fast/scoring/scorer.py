"""The scorer turns an Arrow table of utterances into an Arrow table of scores. It reads and writes no file.

:mod:`m3er_fast.scoring.columns` lists the columns of scores. Their schema's metadata hold ``m3er_fast.signature`` (see
:func:`m3er_fast.scoring.model_signature`), ``m3er_fast.version`` and ``m3er_fast.columns``.

Dimension legend: N utterances of a table, B utterances of a batch, M modalities, C classes, T time steps, d features.
"""

from __future__ import annotations

import copy
import json
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from m3er_fast._validation import check_choice, check_positive_int, not_fitted
from m3er_fast.check import ModalityCheck
from m3er_fast.corpus.base import CorpusError
from m3er_fast.corpus.extraction import extraction_difference
from m3er_fast.corpus.files import decoding
from m3er_fast.corpus.parquet import (
    DecodedRows,
    FrameColumn,
    decode_rows,
    extraction_of,
    modality_columns,
    string_column,
    with_ids,
)
from m3er_fast.fitted_module import eval_mode
from m3er_fast.fusion import M3ERFusion
from m3er_fast.network import MemoryFusionNetwork, NetworkOutput
from m3er_fast.scoring.batching import plan_batches
from m3er_fast.scoring.columns import CALIBRATION_KEY, ScoreColumns
from m3er_fast.scoring.labels import find_task, label_arrays
from m3er_fast.scoring.model import model_signature
from m3er_fast.shards.prefetch import Prefetch
from m3er_fast.shards.reader import WINDOW_BYTES

if TYPE_CHECKING:
    import pyarrow as pa

SIGNATURE_KEY, VERSION_KEY = b"m3er_fast.signature", b"m3er_fast.version"

Precision: TypeAlias = Literal["float32", "bfloat16"]
"""The dtype that the network computes in."""

# On two CPU cores 512 utterances of 20 frames at a time were the fastest of 128 to 2000: 4151 per second, compared to
# 2637 at 128 and 3543 at 2000, with 410 features.
_CPU_FRAMES = 10240
_MAX_CUDA_FRAMES = 2**20
_PROBE_FRAMES = 2**14
MOST_FRAMES = 2**16
"""Most frames of an utterance that is scored. A longer one would be a batch of its own, and none lasts half an hour."""


class Scorer:
    """Scores tables with one model, on the device of the model.

    Rows do not depend on each other. The batch in which a row goes through the model changes its probabilities by
    rounding. Batches depend only on ``batch_frames`` and the lengths in a table, so equal tables get equal scores.

    Args:
        model: with a fitted check, if it has one. It is not changed, and must not be changed later.
        batch_frames: frames, padding included, that go through the model at a time. "auto" is a number measured to be
            good on the CPU, and as many as half of the free memory holds on CUDA. Whenever memory does not suffice,
            the number is halved and the batch tried again.
        dtype: "float32", or "bfloat16" for the network on CUDA; the check stays in float32.

    Attributes:
        signature: of the model.
        columns: classes and modalities of the scores.
        schema: of every table of scores without labels.
        batch_frames: as resolved, and halved where memory did not suffice.

    Raises:
        NotFittedError: the model's check is not fitted.
        ValueError: an argument is out of range, the model is on a device other than cpu or cuda, or two columns of
            the scores would have the same name.
    """

    def __init__(
        self, model: M3ERFusion, *, batch_frames: int | Literal["auto"] = "auto", dtype: Precision = "float32"
    ) -> None:
        if batch_frames != "auto":
            check_positive_int("batch_frames", batch_frames, or_else=" or 'auto'")
        if model.modality_check is not None and not model.modality_check.is_fitted:
            raise not_fitted("this model's modality check is not fitted: call fit, or train the model")
        self.model = model
        self.device = next(model.parameters()).device
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"scoring runs on cpu and cuda, got a model on {self.device}")
        check_choice("dtype", dtype, Precision)
        if dtype == "bfloat16" and self.device.type == "cpu":
            raise ValueError("dtype 'bfloat16' is for CUDA: CPUs without bfloat16 units are several times slower in it")
        from m3er_fast import __version__

        self.signature = model_signature(model)
        self.columns = ScoreColumns.of_model(model)
        self._metadata = {
            SIGNATURE_KEY: self.signature,
            VERSION_KEY: __version__,
            CALIBRATION_KEY: json.dumps(
                {
                    "activation": model.config.loss.activation,
                    "temperature": model.calibration.temperature.item(),
                }
            ),
        }
        self.schema = self.schema_with(None)
        self._network_dtype = torch.bfloat16 if dtype == "bfloat16" else None
        self._stager = _Stager(self.device)
        self.batch_frames = self._measure_batch_frames() if batch_frames == "auto" else batch_frames

    @property
    def window_bytes(self) -> int:
        """Bytes of frames that a table should hold, so that it has utterances enough of about equal length."""
        frame_bytes = 4 * sum(self.model.input_dims.values())
        return max(WINDOW_BYTES, min(2 * self.batch_frames * frame_bytes, 16 * WINDOW_BYTES))

    def check_schema(self, schema: pa.Schema) -> None:
        """Raise whatever :meth:`score` would raise for every table of these columns.

        Raises:
            CorpusError: as :meth:`score`.
        """
        self._check_modalities(schema)
        decode_rows(schema.empty_table(), self.model.input_dims)

    def label_task(self, schema: pa.Schema) -> str | None:
        """Return the task that a corpus's labels pose to the model, or None if it has no column of them."""
        return find_task(schema, self.model.config.loss.activation)

    def schema_with(self, label_task: str | None) -> pa.Schema:
        """Return the schema of scores with labels of a task beside them, or with none."""
        return self.columns.schema(self._metadata, label_task)

    def score(
        self, table: pa.Table, *, label_task: str | None = None, is_canceled: Callable[[], bool] = bool
    ) -> pa.Table:
        """Score the utterances of a table in the layout of :mod:`m3er_fast.corpus.parquet`.

        A modality of the model without a column is unavailable. Splits and groups are ignored. A row that
        cannot be scored has an ``error``. On the CPU several threads may score tables at the same time.

        Args:
            table: some utterances.
            label_task: of :meth:`label_task`, to have the labels beside the scores; None leaves them out.
            is_canceled: called before every batch; returns whether the scores are no longer needed.

        Raises:
            CancelledError: they are no longer needed.
            CorpusError: the table holds a modality that the model does not know, or a column that cannot be read.
        """
        self._check_modalities(table.schema)
        table = with_ids(table)
        with decoding("the table", "not readable"):
            rows = decode_rows(table, self.model.input_dims)
        for row in np.flatnonzero(rows.lengths > MOST_FRAMES):
            rows.problems.setdefault(int(row), f"it has {rows.lengths[row]} frames, more than {MOST_FRAMES}")
        scores = _Scores.empty(table.num_rows, self.columns)
        with eval_mode(self.model):
            self._score_rows(rows, scores, is_canceled)
        return self._to_table(table, rows, scores, label_task)

    def _check_modalities(self, schema: pa.Schema) -> None:
        names = list(self.model.input_dims)
        unknown = [name for name in modality_columns(schema) if name not in names]
        if unknown:
            raise CorpusError(f"the corpus has modalities {unknown}, unknown to the model, which knows {names}")
        extraction = extraction_of(schema)
        if extraction is not None and self.model.extraction is not None:
            difference = extraction_difference(self.model.extraction, extraction)
            if difference is not None:
                raise CorpusError(f"its features were made in another way than those of the model: {difference}")

    @torch.inference_mode()
    def _score_rows(self, rows: DecodedRows, scores: _Scores, is_canceled: Callable[[], bool]) -> None:
        is_readable = np.ones(len(rows.lengths), dtype=bool)
        is_readable[list(rows.problems)] = False
        readable = np.flatnonzero(is_readable)
        batches = [readable[batch] for batch in plan_batches(rows.lengths[readable], self.batch_frames)]
        staged = self._stage(rows, batches, is_canceled)
        if self.device.type == "cpu":
            for batch in staged:
                self._score_batch(batch, rows.problems, scores)
            return
        with Prefetch(staged) as ahead:  # copies to the device while it computes
            for batch in ahead:
                self._score_batch(batch, rows.problems, scores)

    def _stage(
        self, rows: DecodedRows, batches: Iterable[np.ndarray], is_canceled: Callable[[], bool]
    ) -> Iterator[_StagedBatch]:
        """Copy batches to the device, in halves where memory does not suffice."""
        waiting = deque(batches)
        while waiting:
            if is_canceled():
                raise CancelledError
            batch = waiting.popleft()
            try:
                staged = self._stager.stage(rows, batch, self.model.input_dims)
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                self._reduce_batch_frames(len(batch) * max(1, int(rows.lengths[batch].max())))
                if len(batch) == 1:
                    rows.problems[int(batch[0])] = _describe(error)
                    continue
                middle = len(batch) // 2
                waiting.extendleft([batch[middle:], batch[:middle]])
            else:
                yield staged

    def _score_batch(self, batch: _StagedBatch, problems: dict[int, str], scores: _Scores) -> None:
        """Score a batch, in halves where memory does not suffice or where one of its rows breaks the model."""
        steps = next(iter(batch.features.values())).shape[1]
        if len(batch.rows) * steps <= 2 * self.batch_frames or len(batch.rows) == 1:
            try:
                self._forward(batch, scores)
            except (RuntimeError, MemoryError, ValueError, ArithmeticError) as error:
                if isinstance(error, getattr(torch, "AcceleratorError", ())):  # the device is lost, not a row
                    raise
                if _is_out_of_memory(error):
                    self._reduce_batch_frames(len(batch.rows) * steps)
                if len(batch.rows) == 1:
                    problems[int(batch.rows[0])] = _describe(error)
                    return
            else:
                return
        middle = len(batch.rows) // 2
        for half in (slice(0, middle), slice(middle, None)):
            self._score_batch(batch.part(half), problems, scores)

    def _reduce_batch_frames(self, failed: int) -> None:
        """Halve the batches after ``failed`` frames did not fit into memory."""
        self.batch_frames = max(1, min(self.batch_frames, failed) // 2)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _forward(self, batch: _StagedBatch, scores: _Scores) -> None:
        batch.wait()
        model = self.model if self._network_dtype is None else _with_network_in(self.model, self._network_dtype)
        output = model(batch.features, batch.lengths, batch.available)
        scores.fill(
            batch.rows,
            probability=self.model.probabilities(output),
            effective=output.effective,
            p_value=output.p_value,
            reason=output.reason,
            abstained=output.abstained[:, None],
        )

    def _to_table(self, table: pa.Table, rows: DecodedRows, scores: _Scores, label_task: str | None) -> pa.Table:
        import pyarrow as pa

        failed = np.zeros(table.num_rows, dtype=bool)
        failed[list(rows.problems)] = True
        mask = failed if rows.problems else None
        best = pa.array(scores.probability.argmax(axis=1).astype(np.int32), mask=mask)
        errors = np.full(table.num_rows, None, dtype=object)
        for row, problem in rows.problems.items():
            errors[row] = " ".join(problem.split())

        def by_name(names: Iterable[str], values: np.ndarray) -> dict[str, pa.Array]:
            columns = np.ascontiguousarray(values.T)
            return {name: pa.array(column, mask=mask) for name, column in zip(names, columns, strict=True)}

        arrays = {
            "id": _clean_ids(table, rows.problems),
            "prediction": pa.array(self.columns.classes, pa.string()).take(best),
            **by_name(map(self.columns.probability, self.columns.classes), scores.probability),
            **by_name(map(self.columns.effective, self.columns.modalities), scores.effective),
            **by_name(map(self.columns.p_value, self.columns.modalities), scores.p_value),
            **self._reasons(scores),
            **by_name(["abstained"], scores.abstained),
            "error": pa.array(errors, pa.string()) if rows.problems else pa.nulls(table.num_rows, pa.string()),
        }
        if label_task is not None:
            arrays |= label_arrays(table, self.columns, label_task, failed)
        schema = self.schema_with(label_task)
        return pa.Table.from_arrays([arrays[name] for name in schema.names], schema=schema)

    def _reasons(self, scores: _Scores) -> dict[str, pa.Array]:
        """Return the columns of reasons, null where there is none, as in rows that were not scored."""
        import pyarrow as pa

        texts = pa.array([None, *ModalityCheck.reasons[1:]], pa.string())
        columns = zip(map(self.columns.reason, self.columns.modalities), scores.reason.T, strict=True)
        return {name: texts.take(pa.array(np.ascontiguousarray(numbers))) for name, numbers in columns}

    def _measure_batch_frames(self) -> int:
        """Return how many frames half of the free memory holds on CUDA, extrapolated from a small batch."""
        if self.device.type != "cuda":
            return _CPU_FRAMES
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        steps = 16
        size = _PROBE_FRAMES // steps
        generator = torch.Generator(self.device).manual_seed(0)
        features = {
            name: torch.randn(size, steps, dim, device=self.device, generator=generator)
            for name, dim in self.model.input_dims.items()
        }
        with eval_mode(self.model), torch.inference_mode():
            self.model(features)
        torch.cuda.synchronize(self.device)
        used = max(1, torch.cuda.max_memory_allocated(self.device) - before)
        del features
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.device)
        return max(1, min(_MAX_CUDA_FRAMES, int(0.5 * free / (used / _PROBE_FRAMES))))


class _Scores(NamedTuple):
    """Scores of the rows of a table; 0 where a row has not been scored."""

    probability: np.ndarray  # (N, C) float32
    effective: np.ndarray  # (N, M) bool
    p_value: np.ndarray  # (N, M) float32
    reason: np.ndarray  # (N, M) int8, an index of ModalityCheck.reasons
    abstained: np.ndarray  # (N, 1) bool

    @classmethod
    def empty(cls, rows: int, columns: ScoreColumns) -> _Scores:
        classes, modalities = len(columns.classes), len(columns.modalities)
        return cls(
            probability=np.zeros((rows, classes), np.float32),
            effective=np.zeros((rows, modalities), bool),
            p_value=np.zeros((rows, modalities), np.float32),
            reason=np.zeros((rows, modalities), np.int8),
            abstained=np.zeros((rows, 1), bool),
        )

    def fill(self, rows: np.ndarray, **values: Tensor) -> None:
        """Set the scores of some rows, with one copy from the device."""
        packed = torch.cat([value.float() for value in values.values()], dim=1).cpu().numpy()
        ends = np.cumsum([value.shape[1] for value in values.values()])
        for name, part in zip(values, np.split(packed, ends[:-1], axis=1), strict=True):
            getattr(self, name)[rows] = part


class _StagedBatch(NamedTuple):
    """A batch on the device, or being copied there."""

    rows: np.ndarray  # (B,) rows of the table
    features: dict[str, Tensor]  # modality -> (B, T, d)
    lengths: Tensor  # (B,)
    available: Tensor  # (B, M) bool
    copied: Any = None  # torch.cuda.Event at the end of the copy

    def part(self, rows: slice) -> _StagedBatch:
        features = {name: values[rows] for name, values in self.features.items()}
        return self._replace(
            rows=self.rows[rows], features=features, lengths=self.lengths[rows], available=self.available[rows]
        )

    def wait(self) -> None:
        """Order the current stream after the copy."""
        if self.copied is not None:
            stream = torch.cuda.current_stream(self.lengths.device)
            stream.wait_event(self.copied)
            for value in (*self.features.values(), self.lengths, self.available):
                value.record_stream(stream)


class _Stager:
    """Gathers the rows of a batch and copies them to the device.

    Copies to CUDA go through two pinned buffers in turn, on a stream of their own: a batch is copied while the one
    before is computed. On the CPU a batch lies in memory that the same thread's next batch overwrites: the system would
    clear new memory first, page by page.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pinned_buffers: list[dict[str, Tensor]] = [{}, {}]
        self._copied: list[Any] = [None, None]
        self._turn = 0
        self._local = threading.local()

    def stage(self, rows: DecodedRows, batch: np.ndarray, dims: dict[str, int]) -> _StagedBatch:
        """Copy the rows ``batch`` to the device, padded to the longest. A modality without a column is left out."""
        steps = max(1, int(rows.lengths[batch].max(initial=1)))
        lengths, available = torch.from_numpy(rows.lengths[batch]), torch.from_numpy(rows.available[batch])
        columns = {name: rows.columns[name] for name in dims if name in rows.columns}
        if self._stream is None:
            self._local.buffers = buffers = getattr(self._local, "buffers", {})
            return _StagedBatch(batch, _gather(columns, batch, steps, buffers, pinned=False), lengths, available)
        buffers, copied = self._pinned_buffers[self._turn], self._copied[self._turn]
        if copied is not None:
            copied.synchronize()  # a buffer is free once its last copy is done
        pinned = _gather(columns, batch, steps, buffers, pinned=True)
        pinned_lengths = _buffer(buffers, "", len(batch), torch.int64, pinned=True).copy_(lengths)
        with torch.cuda.stream(self._stream):
            features = {name: values.to(self.device, non_blocking=True) for name, values in pinned.items()}
            lengths = pinned_lengths.to(self.device, non_blocking=True)
            available = available.to(self.device)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(self._stream)
        self._copied[self._turn] = copied
        self._turn = 1 - self._turn
        return _StagedBatch(batch, features, lengths, available, copied)


def _gather(
    columns: dict[str, FrameColumn], batch: np.ndarray, steps: int, buffers: dict[str, Tensor], *, pinned: bool
) -> dict[str, Tensor]:
    """Write rows, padded, into the buffers."""
    features = {}
    for name, column in columns.items():
        shape = (len(batch), steps, column.dim)
        features[name] = _buffer(buffers, name, int(np.prod(shape)), torch.float32, pinned=pinned).view(shape)
        column.padded(batch, steps, out=features[name].numpy())
    return features


def _buffer(buffers: dict[str, Tensor], name: str, size: int, dtype: torch.dtype, *, pinned: bool) -> Tensor:
    if name not in buffers or buffers[name].numel() < size:
        buffers[name] = torch.empty(size, dtype=dtype, pin_memory=pinned)
    return buffers[name][:size]


class _AutocastNetwork(nn.Module):
    """A model's network, computing in a lower precision."""

    def __init__(self, network: MemoryFusionNetwork, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network
        self.dtype = dtype

    def classify(self, features: Sequence[Tensor], lengths: Tensor) -> NetworkOutput:
        with torch.autocast(lengths.device.type, self.dtype):
            output = self.network.classify(features, lengths)
        return NetworkOutput._make(value.float() for value in output)


def _with_network_in(model: M3ERFusion, dtype: torch.dtype) -> M3ERFusion:
    """Return the model with its network in another precision; all weights are shared."""
    clone = copy.copy(model)
    clone._modules = dict(model._modules)
    clone._modules["network"] = _AutocastNetwork(model.network, dtype)
    return clone


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _clean_ids(table: pa.Table, problems: dict[int, str]) -> Any:
    """Return the ids as strings, null where they are not text."""
    import pyarrow as pa

    ids = string_column(table, "id")
    if not any(problem.startswith("column 'id'") for problem in problems.values()):
        return ids.cast(pa.string())
    clean: list[str | None] = []
    for row in range(len(ids)):
        try:
            clean.append(ids[row].as_py())
        except UnicodeDecodeError:
            clean.append(None)
    return pa.array(clean, pa.string())
