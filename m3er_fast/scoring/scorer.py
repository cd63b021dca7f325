"""The scorer: an Arrow table of utterances in, an Arrow table of scores out. It reads and writes no file.

Scores have one row an utterance, in the order of the input, and the columns

* ``id``: string, as in the input;
* ``prediction``: string, the class with the highest probability (of equal ones the first);
* ``p_<class>``, one a class: float32, its probability. With activation "softmax" they sum to 1, with "sigmoid" each
  answers a question of its own;
* ``effective_<modality>``, one a modality: bool, whether the modality was judged good and used as it came;
* ``p_value_<modality>``, one a modality: float32, the p-value behind this verdict; 0 where the modality is unavailable;
* ``reliability_<modality>``, one a modality: float32, 1 where it is effective, that of its proxy if the settings ask
  for one, else 0;
* ``abstained``: bool, no modality was effective, so that the prediction rests on nothing that can be trusted;
* ``error``: string, null where there is none. It says why a row could not be scored; the others but ``id`` are then
  null, and ``id`` is where it is itself what is wrong;

and the schema metadata ``m3er_fast.signature`` (see :func:`m3er_fast.scoring.model_signature`) and
``m3er_fast.version``.

Dimension legend: N utterances of a table, B of a batch, M modalities, C classes.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn

from m3er_fast.corpus.base import CorpusError
from m3er_fast.corpus.parquet import DecodedRows, FrameColumn, decode_rows, modality_columns
from m3er_fast.fitted_module import eval_mode
from m3er_fast.fusion import M3ERFusion
from m3er_fast.scoring.batching import plan_batches
from m3er_fast.scoring.model import model_signature
from m3er_fast.shards.prefetch import Prefetch
from m3er_fast.shards.reader import WINDOW_BYTES

if TYPE_CHECKING:
    import pyarrow as pa

SIGNATURE_KEY, VERSION_KEY = b"m3er_fast.signature", b"m3er_fast.version"

# On two CPU cores 512 utterances of 20 frames at a time were the fastest of 128 to 2000: 4151 a second, beside 2637 at
# 128 and 3543 at 2000, of 410 features.
_CPU_FRAMES = 10240
_CUDA_FRAMES = 2**20  # the most that are tried
_PROBE_FRAMES = 2**14
# An utterance of more is not scored: it would be a batch of its own, and no utterance takes half an hour of words.
MOST_FRAMES = 2**16


class Scorer:
    """Scores tables with one model, on the device where the model is.

    Rows do not depend on each other; in which batch a row goes through the model changes its probabilities by rounding.
    Batches depend on the lengths in a table and on ``batch_frames`` alone, so the same table gives the same scores.

    Args:
        model: with a fitted check, if it has one. It is not changed; changing it later is an error.
        batch_frames: frames, padding included, that go through the model at a time; "auto" is a number measured to be
            good on the CPU, and on CUDA what half of the free memory holds. Where memory does not suffice after all,
            it is halved, and the batch tried again.
        dtype: "float32", or "bfloat16" for the network on CUDA; the check stays in float32.

    Attributes:
        signature: the model's.
        schema: of every table of scores.
        batch_frames: as resolved, and halved as memory demanded.

    Raises:
        NotFittedError: the model's check is not fitted.
        ValueError: an argument is out of range, the model is on another device than cpu or cuda, or two columns of
            the scores would have one name.
    """

    def __init__(
        self,
        model: M3ERFusion,
        *,
        batch_frames: int | Literal["auto"] = "auto",
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        if batch_frames != "auto" and (
            isinstance(batch_frames, bool) or not isinstance(batch_frames, int) or batch_frames < 1
        ):
            raise ValueError(f"batch_frames must be a positive int or 'auto', got {batch_frames!r}")
        if model.modality_check is not None and not model.modality_check.is_fitted:
            raise NotFittedError("this model's modality check is not fitted: call fit, or train the model")
        self.model = model
        self.device = next(model.parameters()).device
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"scoring runs on cpu and cuda, got a model on {self.device}")
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}")
        if dtype == "bfloat16" and self.device.type == "cpu":
            raise ValueError("dtype 'bfloat16' is for CUDA: CPUs without bfloat16 units are several times slower in it")
        self.signature = model_signature(model)
        self.schema = _schema(model, self.signature)
        self._network_in = torch.bfloat16 if dtype == "bfloat16" else None
        self._stager = _Stager(self.device)
        self.batch_frames = self._probe() if batch_frames == "auto" else batch_frames

    @property
    def window_bytes(self) -> int:
        """Bytes of frames that a table should have, for batches to be of about equal lengths."""
        frame_bytes = 4 * sum(self.model.input_dims.values())
        return max(WINDOW_BYTES, min(2 * self.batch_frames * frame_bytes, 16 * WINDOW_BYTES))

    def check_schema(self, schema: pa.Schema) -> None:
        """Raise what :meth:`score` would raise for a table of these columns, whatever its rows.

        Raises:
            CorpusError: as :meth:`score`.
        """
        self._check_modalities(schema)
        decode_rows(schema.empty_table(), self.model.input_dims)

    def score(self, table: pa.Table, *, is_canceled: Callable[[], bool] = bool) -> pa.Table:
        """Score the utterances of a table in the layout of :mod:`m3er_fast.corpus.parquet`.

        A modality of the model that has no column is unavailable. Labels, splits and groups are not looked at. A row
        that cannot be scored has an ``error``. On the CPU several threads may score tables at a time.

        Args:
            table: some utterances.
            is_canceled: asked before every batch whether the scores are of use no more.

        Raises:
            CancelledError: they are not.
            CorpusError: the table holds a modality that the model does not know, or a column that cannot be read.
        """
        import pyarrow as pa

        self._check_modalities(table.schema)
        try:
            rows = decode_rows(table, self.model.input_dims)
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise CorpusError(f"not readable: {error}") from error
        for row in np.flatnonzero(rows.lengths > MOST_FRAMES):
            rows.problems.setdefault(int(row), f"it has {rows.lengths[row]} frames, more than {MOST_FRAMES}")
        scores = _Scores.empty(table.num_rows, self.model)
        with eval_mode(self.model):
            self._score_rows(rows, scores, is_canceled)
        return self._to_table(table, rows, scores)

    def _check_modalities(self, schema: pa.Schema) -> None:
        names = list(self.model.input_dims)
        unknown = [name for name in modality_columns(schema) if name not in names]
        if unknown:
            raise CorpusError(f"the corpus has modalities {unknown}, unknown to the model, which knows {names}")

    @torch.inference_mode()
    def _score_rows(self, rows: DecodedRows, scores: _Scores, is_canceled: Callable[[], bool]) -> None:
        good = np.ones(len(rows.lengths), dtype=bool)
        good[list(rows.problems)] = False
        wanted = np.flatnonzero(good)
        batches = [wanted[batch] for batch in plan_batches(rows.lengths[wanted], self.batch_frames)]
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
    ) -> Iterator[_Staged]:
        """Bring batches to the device, one that does not fit into memory in halves."""
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
                self._take_less(len(batch) * max(1, int(rows.lengths[batch].max())))
                if len(batch) == 1:
                    rows.problems[int(batch[0])] = _told(error)
                    continue
                middle = len(batch) // 2
                waiting.extendleft([batch[middle:], batch[:middle]])
            else:
                yield staged

    def _score_batch(self, batch: _Staged, problems: dict[int, str], scores: _Scores) -> None:
        """Score a batch, in halves where it does not fit into memory or where a row of it breaks the model."""
        steps = next(iter(batch.features.values())).shape[1]
        if len(batch.rows) * steps <= 2 * self.batch_frames or len(batch.rows) == 1:
            try:
                self._forward(batch, scores)
            except (RuntimeError, MemoryError, ValueError, ArithmeticError) as error:
                if isinstance(error, getattr(torch, "AcceleratorError", ())):  # the device is lost, not a row
                    raise
                if _is_out_of_memory(error):
                    self._take_less(len(batch.rows) * steps)
                if len(batch.rows) == 1:
                    problems[int(batch.rows[0])] = _told(error)
                    return
            else:
                return
        middle = len(batch.rows) // 2
        for half in (slice(0, middle), slice(middle, None)):
            self._score_batch(batch.part(half), problems, scores)

    def _take_less(self, frames: int) -> None:
        """So many frames did not fit into memory."""
        self.batch_frames = max(1, min(self.batch_frames, frames) // 2)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _forward(self, batch: _Staged, scores: _Scores) -> None:
        batch.wait()
        model = self.model if self._network_in is None else _with_network_in(self.model, self._network_in)
        output = model(batch.features, batch.lengths, batch.available)
        found = (
            self.model.probabilities(output),
            output.effective,
            output.p_value,
            output.reliability,
            output.abstained[:, None],
        )
        packed = torch.cat([value.float() for value in found], dim=1).cpu().numpy()  # one copy from the device
        scores.packed[batch.rows] = packed

    def _to_table(self, table: pa.Table, rows: DecodedRows, scores: _Scores) -> pa.Table:
        import pyarrow as pa

        failed = np.zeros(table.num_rows, dtype=bool)
        failed[list(rows.problems)] = True
        mask = failed if rows.problems else None
        classes, modalities = len(self.model.classes), len(self.model.input_dims)
        columns = np.ascontiguousarray(scores.packed.T)
        best = pa.array(columns[:classes].argmax(axis=0).astype(np.int32), mask=mask)
        errors = np.full(table.num_rows, None, dtype=object)
        for row, problem in rows.problems.items():
            errors[row] = " ".join(problem.split())
        arrays = [
            _clean_ids(table, rows.problems),
            pa.array(self.model.classes, pa.string()).take(best),
            *(pa.array(column, mask=mask) for column in columns[:classes]),
            *(pa.array(column != 0, mask=mask) for column in columns[classes : classes + modalities]),
            *(pa.array(column, mask=mask) for column in columns[classes + modalities : -1]),
            pa.array(columns[-1] != 0, mask=mask),
            pa.array(errors, pa.string()) if rows.problems else pa.nulls(table.num_rows, pa.string()),
        ]
        return pa.Table.from_arrays(arrays, schema=self.schema)

    def _probe(self) -> int:
        """Frames of a batch: on CUDA, those that half of the free memory holds, by what a small batch took."""
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
        taken = max(1, torch.cuda.max_memory_allocated(self.device) - before)
        del features
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.device)
        return max(1, min(_CUDA_FRAMES, int(0.5 * free / (taken / _PROBE_FRAMES))))


class _Scores(NamedTuple):
    """What is known of the rows of a table: probabilities, effective, p-values, reliability, abstained side by side."""

    packed: np.ndarray  # (N, C + 3M + 1) float32

    @classmethod
    def empty(cls, rows: int, model: M3ERFusion) -> _Scores:
        return cls(np.zeros((rows, len(model.classes) + 3 * len(model.input_dims) + 1), np.float32))


class _Staged(NamedTuple):
    """A batch on the device, or on its way there."""

    rows: np.ndarray  # (B,) of the table
    features: dict[str, Tensor]  # modality -> (B, T, d)
    lengths: Tensor  # (B,)
    available: Tensor  # (B, M) bool
    copied: Any = None  # torch.cuda.Event

    def part(self, rows: slice) -> _Staged:
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
    """Gathers the rows of a batch and brings them to the device.

    To CUDA through two pinned buffers, taken in turn, on a stream of its own: the next batch is copied while the one
    before is computed. On the CPU a batch is in memory that the next one of the same thread overwrites: new memory
    would be cleared by the system first, page by page.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._slots: list[dict[str, Tensor]] = [{}, {}]
        self._events: list[Any] = [None, None]
        self._turn = 0
        self._own = threading.local()

    def stage(self, rows: DecodedRows, batch: np.ndarray, dims: dict[str, int]) -> _Staged:
        """Bring the rows ``batch`` to the device, padded to the longest of them; a null modality is left out."""
        steps = max(1, int(rows.lengths[batch].max(initial=1)))
        lengths, available = torch.from_numpy(rows.lengths[batch]), torch.from_numpy(rows.available[batch])
        columns = {name: rows.columns[name] for name in dims if name in rows.columns}
        if self._stream is None:
            self._own.slot = slot = getattr(self._own, "slot", {})
            return _Staged(batch, _gather(columns, batch, steps, slot, pinned=False), lengths, available)
        slot, event = self._slots[self._turn], self._events[self._turn]
        if event is not None:
            event.synchronize()  # the buffer is free once its last copy is done
        pinned = _gather(columns, batch, steps, slot, pinned=True)
        pinned_lengths = _buffer(slot, "", len(batch), torch.int64, pinned=True).copy_(lengths)
        with torch.cuda.stream(self._stream):
            features = {name: values.to(self.device, non_blocking=True) for name, values in pinned.items()}
            moved = pinned_lengths.to(self.device, non_blocking=True)
            known = available.to(self.device)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(self._stream)
        self._events[self._turn] = copied
        self._turn = 1 - self._turn
        return _Staged(batch, features, moved, known, copied)


def _gather(
    columns: dict[str, FrameColumn], batch: np.ndarray, steps: int, slot: dict[str, Tensor], *, pinned: bool
) -> dict[str, Tensor]:
    """Bring rows together, padded, in the buffers of a slot."""
    features = {}
    for name, column in columns.items():
        shape = (len(batch), steps, column.dim)
        features[name] = _buffer(slot, name, int(np.prod(shape)), torch.float32, pinned=pinned).view(shape)
        column.padded(batch, steps, out=features[name].numpy())
    return features


def _buffer(slot: dict[str, Tensor], name: str, size: int, dtype: torch.dtype, *, pinned: bool) -> Tensor:
    if name not in slot or slot[name].numel() < size:
        slot[name] = torch.empty(size, dtype=dtype, pin_memory=pinned)
    return slot[name][:size]


class _AutocastNetwork(nn.Module):
    """The network of a model, computing in a lower precision."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network
        self.dtype = dtype

    def classify(self, features: Sequence[Tensor], lengths: Tensor) -> Any:
        with torch.autocast(lengths.device.type, self.dtype):
            answer = self.network.classify(features, lengths)  # type: ignore[operator]
        return tuple(value.float() for value in answer)


def _with_network_in(model: M3ERFusion, dtype: torch.dtype) -> M3ERFusion:
    """The model, sharing all weights, with its network in another precision."""
    clone = copy.copy(model)
    clone._modules = dict(model._modules)
    clone._modules["network"] = _AutocastNetwork(model.network, dtype)
    return clone


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _clean_ids(table: pa.Table, problems: dict[int, str]) -> Any:
    """The ids as strings, null where they are not text."""
    import pyarrow as pa

    ids = table["id"]
    if pa.types.is_dictionary(ids.type):
        ids = ids.cast(ids.type.value_type)
    if not any(problem.startswith("column 'id'") for problem in problems.values()):
        return ids.cast(pa.string())
    clean: list[str | None] = []
    for row in range(len(ids)):
        try:
            clean.append(ids[row].as_py())
        except UnicodeDecodeError:
            clean.append(None)
    return pa.array(clean, pa.string())


def _schema(model: M3ERFusion, signature: str) -> pa.Schema:
    import pyarrow as pa

    from m3er_fast import __version__

    types = {
        "id": pa.string(),
        "prediction": pa.string(),
        **{f"p_{name}": pa.float32() for name in model.classes},
        **{f"effective_{name}": pa.bool_() for name in model.input_dims},
        **{f"p_value_{name}": pa.float32() for name in model.input_dims},
        **{f"reliability_{name}": pa.float32() for name in model.input_dims},
        "abstained": pa.bool_(),
        "error": pa.string(),
    }
    if len(types) != 4 + len(model.classes) + 3 * len(model.input_dims):
        clash = [name for name in model.classes if name.removeprefix("value_") in model.input_dims]
        raise ValueError(f"classes {clash} would share a column of the scores with a modality's p-value: rename them")
    return pa.schema(list(types.items()), metadata={SIGNATURE_KEY: signature, VERSION_KEY: __version__})
