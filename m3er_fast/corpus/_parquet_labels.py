"""The column ``label`` of an Arrow table, as this project, pandas, polars and Hugging Face datasets write it.

Dimension legend: N utterances, C classes.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from m3er_fast.corpus._labels import class_indices, classes_named, label_name
from m3er_fast.corpus._parquet_rows import is_list
from m3er_fast.corpus.base import NO_LABEL, CorpusError

if TYPE_CHECKING:
    import pyarrow as pa

# Without names, a class is a number; a larger one is no class but an id or a score.
_MOST_UNNAMED = 10_000


class Labels(NamedTuple):
    """The labels of a table; see `Corpus`."""

    target: np.ndarray | None
    classes: tuple[str, ...]
    task: str


def read_labels(table: pa.Table, ids: np.ndarray, classes: tuple[str, ...], task: str) -> Labels:
    """Return the labels of a table's rows.

    One label per row is a number of a class, as integer or whole float, or its name, as text in any case
    (`label_name`). Null and NaN are no label, and so is −1 in a ``ClassLabel`` of Hugging Face datasets. C labels per
    row are a list of numbers; a null row, or a row with a null or NaN in it, is no label.

    Args:
        table: rows, with or without the column.
        ids: (N,), for messages.
        classes: class names that the metadata declare, or none.
        task: that the metadata declare, or empty.

    Raises:
        CorpusError: naming the column, and the row, that holds something else.
    """
    import pyarrow as pa

    names, several = _class_label(table.schema)
    classes = classes or names
    if "label" not in table.column_names or pa.types.is_null(table.schema.field("label").type):
        return Labels(None, classes, task or "single")
    column = table["label"]
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if is_list(column.type):
        return _lists(column, ids, classes, task, several)
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int64())
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        target = _numbers(column, ids)
        if names:
            target[target == -1] = NO_LABEL
        count = int(target.max(initial=-1)) + 1
        if not classes and count > _MOST_UNNAMED:
            raise CorpusError(f"column 'label' is {count - 1} for {ids[target.argmax()]!r}, wanted a class 0, 1, ...")
        return Labels(target, classes or tuple(f"class_{c}" for c in range(count)), task or "single")
    if not _is_text(column.type):
        raise CorpusError(f"column 'label' holds {column.type}, wanted an integer, a name or list<float>")
    found = [label_name(value) for value in column.to_pylist()]
    lower = tuple(name.lower() for name in classes)
    for row, name in enumerate(found):
        if classes and name is not None and name not in lower:
            raise CorpusError(f"column 'label' is {name!r} for {ids[row]!r}, wanted one of {', '.join(classes)}")
    classes = classes or classes_named(found)
    return Labels(class_indices(found, lower or classes), classes, task or "single")


def task_of_labels(schema: pa.Schema) -> str | None:
    """Return "single" if a row of the column of labels holds one, "several" if a list, and None without the column."""
    import pyarrow as pa

    if "label" not in schema.names or pa.types.is_null(schema.field("label").type):
        return None
    kind = schema.field("label").type
    return "several" if is_list(kind.value_type if pa.types.is_dictionary(kind) else kind) else "single"


def labels_in_classes(
    table: pa.Table, wanted: tuple[str, ...], task: str, declared: tuple[str, ...], declared_task: str
) -> Labels:
    """Return the labels of a table's rows, which must be of the classes wanted.

    Args:
        table: rows.
        wanted: class names.
        task: if the metadata declare none.
        declared: class names of the metadata, or none.
        declared_task: of the metadata, or empty.

    Raises:
        CorpusError: as :func:`read_labels`, or if the table declares other classes.
    """
    declared = declared or _class_label(table.schema)[0]
    if declared and declared != wanted:
        raise CorpusError(f"column 'label' is of the classes {', '.join(declared)}, wanted {', '.join(wanted)}")
    return read_labels(table, np.arange(table.num_rows), wanted, declared_task or task)


def labels_are_names(schema: pa.Schema) -> bool:
    """Return whether the column of labels holds names, of which a shard may have only some."""
    import pyarrow as pa

    if "label" not in schema.names:
        return False
    kind = schema.field("label").type
    return _is_text(kind.value_type if pa.types.is_dictionary(kind) else kind)


def _numbers(column: Any, ids: np.ndarray) -> np.ndarray:
    """Return the numbers (N,) of classes, −100 where there is none."""
    import pyarrow as pa

    if pa.types.is_integer(column.type):
        return np.array(column.cast(pa.int64()).fill_null(NO_LABEL).to_numpy())
    values = column.cast(pa.float64()).fill_null(np.nan).to_numpy()
    known = ~np.isnan(values)
    wrong = known & ~((values == np.round(values)) & (np.abs(values) < 2**31))
    if wrong.any():
        row = int(wrong.argmax())
        raise CorpusError(f"column 'label' is {values[row]:g} for {ids[row]!r}, wanted a class 0, 1, ...")
    return np.where(known, values, NO_LABEL).astype(np.int64)


def _lists(column: Any, ids: np.ndarray, classes: tuple[str, ...], task: str, several: bool) -> Labels:
    import pyarrow as pa

    leaf = column.type.value_type
    if not (pa.types.is_floating(leaf) or pa.types.is_integer(leaf) or pa.types.is_boolean(leaf)):
        raise CorpusError(f"column 'label' holds {column.type}, wanted an integer, a name or list<float>")
    given = column.to_pylist()
    if several:  # numbers of the classes that are present
        rows = [
            None if row is None else _answers(row, len(classes), name) for row, name in zip(given, ids, strict=True)
        ]
        task = "multi"
    else:
        rows = [None if row is None else np.array(row, np.float32) for row in given]
    width = len(classes) or next((len(row) for row in rows if row is not None), 0)
    target = np.full((len(rows), width), np.nan, np.float32)
    for index, row in enumerate(rows):
        if row is None:
            continue
        if len(row) != width:
            raise CorpusError(f"column 'label' has {len(row)} values for {ids[index]!r}, wanted {width}")
        if not np.isnan(row).any():
            target[index] = row
    known = target[~np.isnan(target).any(axis=1)]
    if len(rows) and not width:
        return Labels(None, (), "single")
    if not task:
        task = "distribution" if np.allclose(known.sum(axis=1), 1, atol=1e-3) else "multi"
    return Labels(target, classes or tuple(f"class_{c}" for c in range(width)), task)


def _answers(present: list[int], classes: int, name: str) -> np.ndarray:
    answers = np.zeros(classes, np.float32)
    for index in present:
        if index is None or not 0 <= index < classes:
            raise CorpusError(f"column 'label' holds {index} for {name!r}, wanted classes 0 to {classes - 1}")
        answers[index] = 1
    return answers


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    types = pa.types
    is_string = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return bool(is_string or types.is_binary(kind) or types.is_large_binary(kind))


def _class_label(schema: pa.Schema) -> tuple[tuple[str, ...], bool]:
    """Return the names of a ``ClassLabel`` of Hugging Face datasets, and whether a row holds a list of them."""
    try:
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        feature = about.get("info", {}).get("features", {}).get("label", {})
        several = feature.get("_type") in ("List", "LargeList", "Sequence")
        feature = feature.get("feature", {}) if several else feature
        if feature.get("_type") == "ClassLabel":
            return tuple(str(name) for name in feature["names"]), several
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorpusError("the metadata 'huggingface' do not describe the features") from error
    return (), False
