"""The labels of a corpus beside its scores.

Labels help to judge scores and are never needed: where they cannot be read, or are of other classes than the model's,
an utterance counts as one without a label.

Dimension legend: N utterances, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from m3er_fast.corpus._parquet_labels import task_of_labels
from m3er_fast.corpus.base import NO_LABEL, CorpusError
from m3er_fast.corpus.files import decoding
from m3er_fast.corpus.parquet import read_labels_of
from m3er_fast.operands import Activation
from m3er_fast.scoring.columns import ScoreColumns

if TYPE_CHECKING:
    import pyarrow as pa

_MOST_NAME_BYTES = 1024  # of a class; a longer one, repeated, may not fit into memory
_ROUNDING = 1e-3  # how far a distribution may sum away from one


def find_task(schema: pa.Schema, activation: Activation) -> str | None:
    """Return the task that a column of labels poses to a model, or None if there is no such column.

    Lists are answers to questions for a model with "sigmoid", and distributions for one with "softmax".
    """
    kind = task_of_labels(schema)
    if kind == "several":
        return "multi" if activation == "sigmoid" else "distribution"
    return kind


def label_arrays(
    table: pa.Table, columns: ScoreColumns, task: str, failed: np.ndarray
) -> dict[str, pa.Array | pa.ChunkedArray]:
    """Return the columns of labels of a table's scores, by name.

    Args:
        table: some utterances; without a column of labels, all are null.
        columns: of the scores.
        task: of :func:`find_task`.
        failed: (N,) bool, the utterances that could not be scored; their labels are null.
    """
    import pyarrow as pa

    target = _read(table, columns.classes, task)
    if task == "single":
        unknown = failed | (target == NO_LABEL)
        indices = pa.array(np.where(unknown, 0, target).astype(np.int32), mask=unknown)
        return {columns.label: pa.array(columns.classes, pa.string()).take(indices)}
    unknown = failed | np.isnan(target).any(axis=1)
    values = np.ascontiguousarray(target.T.astype(np.float32))
    return {columns.label_of(name): pa.array(v, mask=unknown) for name, v in zip(columns.classes, values, strict=True)}


def targets(batch: pa.RecordBatch, columns: ScoreColumns, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels in scores that were read back, and (N,) bool: which rows have one."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if task == "single":
        known = batch[columns.label].is_valid().to_numpy(zero_copy_only=False)
        indices = pc.index_in(batch[columns.label], pa.array(columns.classes, pa.string()))
        return indices.fill_null(NO_LABEL).to_numpy(zero_copy_only=False), known
    values = [batch[columns.label_of(name)].to_numpy(zero_copy_only=False) for name in columns.classes]
    target = np.stack(values, axis=1)
    return target, ~np.isnan(target).any(axis=1)


def before_calibration(p: np.ndarray, calibration: Mapping[str, Any]) -> np.ndarray | None:
    """Return what probabilities (N, C) were before calibration, or None if they were not calibrated.

    Their logarithms, or those of their odds, are the calibrated logits, up to a constant that changes nothing.
    """
    from scipy.special import expit, logit, softmax

    temperature = calibration.get("temperature", 1.0)
    if temperature == 1.0:
        return None
    p = p.astype(np.float64).clip(0, 1)
    with np.errstate(divide="ignore"):
        before: np.ndarray = (
            expit(logit(p) * temperature)
            if calibration.get("activation") == "sigmoid"
            else softmax(np.log(p) * temperature, axis=1)
        )
    return before


def _read(table: pa.Table, classes: tuple[str, ...], task: str) -> np.ndarray:
    """Return (N,) numbers of classes or (N, C) answers; −100 and NaN where there is no label that can be used."""
    shape: Any = table.num_rows if task == "single" else (table.num_rows, len(classes))
    nothing = np.full(shape, NO_LABEL if task == "single" else np.nan)
    if "label" not in table.column_names or _longest_name(table["label"]) > _MOST_NAME_BYTES:
        return nothing
    try:
        with decoding("the labels", "not readable"):
            labels = read_labels_of(table, classes, task)
    except CorpusError:
        return nothing
    target = labels.target
    if target is None or labels.task != task or labels.classes != classes or target.shape != nothing.shape:
        return nothing
    if task == "single":
        fits = (target == NO_LABEL) | ((target >= 0) & (target < len(classes)))
    else:
        known = target[~np.isnan(target).any(axis=1)]
        sums = known.sum(axis=1, keepdims=True)
        fits = np.isin(known, (0, 1)) if task == "multi" else (known >= 0) & (abs(sums - 1) < _ROUNDING)
    return target if fits.all() else nothing


def _longest_name(column: pa.ChunkedArray) -> int:
    """Return the bytes of the longest text in a column that is read as a dictionary; 0 if it is not."""
    import pyarrow as pa
    import pyarrow.compute as pc

    types = pa.types
    texts = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    if not types.is_dictionary(column.type) or not any(is_text(column.type.value_type) for is_text in texts):
        return 0
    return max((pc.max(pc.binary_length(chunk.dictionary)).as_py() or 0 for chunk in column.chunks), default=0)
