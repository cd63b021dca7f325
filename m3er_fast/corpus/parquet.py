"""This project's own corpus format: a folder of Parquet files, one row per utterance.

Layout: ``part-00000.parquet`` and so on, with the columns

* ``id``: string;
* one per modality: fixed-size binary, the T·d float32 values of the padded frames, with the field metadata
  ``features`` (d), ``frames`` (T) and ``dtype``. The column is plain and uncompressed, because floats do not compress
  and a plain column is read at the speed of memory. A page holds 16 KiB or one row. Null means unavailable;
* ``length``: int32, the number of leading frames that are not padding;
* ``label`` (optional): int32 class index or null, or list<float> of C answers or probabilities;
* ``split`` and ``group`` (optional): string;

and the schema metadata ``m3er_fast.format``, ``m3er_fast.classes`` (JSON), ``m3er_fast.task`` and, for features made
from recordings, ``m3er_fast.extraction`` (JSON): how they were made.

Other layouts of a modality are read too: ``fixed_size_list``, ``list``, ``list<list>`` and Arrow's
``fixed_shape_tensor``, holding float16, float32, float64 or integers; and so are the tables that pandas, polars and
Hugging Face datasets write (docs/tables.md): labels that are names or floats, ids that are numbers or missing, folders
of the form ``split=train``.

Dimension legend: N utterances, M modalities, T time steps, d features, C classes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from m3er_fast._validation import check_positive_int
from m3er_fast.corpus._labels import class_indices, classes_named
from m3er_fast.corpus._parquet_labels import Labels, labels_are_names, labels_in_classes, read_labels
from m3er_fast.corpus._parquet_rows import (
    RESERVED_COLUMNS,
    DecodedRows,
    FrameColumn,
    decode_rows,
    modality_columns,
    read_splits,
    read_strings,
    refuse_repeated,
    string_column,
    with_hive_columns,
    with_ids,
)
from m3er_fast.corpus.base import NO_LABEL, Corpus, CorpusError, concatenate, naming, split_name
from m3er_fast.corpus.files import corpus_files, decoding, hive_values, visible_files

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "FORMAT_VERSION",
    "DecodedRows",
    "FrameColumn",
    "Labels",
    "TableFeatures",
    "classes_named",
    "decode_rows",
    "extraction_of",
    "features_from_table",
    "labels_are_names",
    "labels_from_table",
    "modality_columns",
    "new_folder",
    "read_parquet",
    "read_splits",
    "read_table",
    "refuse_repeated",
    "shard_paths",
    "string_column",
    "with_hive_columns",
    "with_ids",
    "write_parquet",
    "write_shard",
]

FORMAT_VERSION = "1"

_FORMAT, _CLASSES, _TASK = b"m3er_fast.format", b"m3er_fast.classes", b"m3er_fast.task"
_EXTRACTION = b"m3er_fast.extraction"
_ROW_GROUP_BYTES = 64 * 2**20
# A page must stay in a core's first-level cache while it is read, verified and decoded.
_PAGE_BYTES = 16 * 2**10


class TableFeatures(NamedTuple):
    """The fields of `Corpus` that scoring needs."""

    ids: np.ndarray  # (N,) str
    features: dict[str, np.ndarray]  # modality -> (N, T, d) float32
    lengths: np.ndarray  # (N,) int64
    available: np.ndarray  # (N, M) bool


def write_parquet(corpus: Corpus, out_dir: str | Path, *, rows_per_shard: int = 4096) -> list[Path]:
    """Write a corpus as a folder of Parquet files and return their paths.

    The files get their names once all are written, so an interrupted run leaves no corpus behind.

    Args:
        corpus: the utterances.
        out_dir: a folder, created if need be, that holds no corpus yet.
        rows_per_shard: utterances per file.

    Raises:
        CorpusError: if ``out_dir`` is a file or holds Parquet files already, or a modality has the name of a column.
        ValueError: if ``rows_per_shard`` is not a positive int.
        OSError: if the files cannot be written, for example for lack of space.
    """
    _pyarrow_parquet()
    check_positive_int("rows_per_shard", rows_per_shard)
    for name in corpus.modalities:
        if name in RESERVED_COLUMNS:
            raise CorpusError(f"a modality cannot be called {name!r}: a column of the format has that name")
    folder = new_folder(out_dir)
    partial: list[Path] = []
    try:
        for shard, start in enumerate(range(0, max(len(corpus), 1), rows_per_shard)):
            partial.append(folder / f"part-{shard:05d}.parquet.partial")
            write_shard(corpus.select(slice(start, start + rows_per_shard)), partial[-1])
    except BaseException:
        for file in partial:
            file.unlink(missing_ok=True)
        raise
    return [file.rename(file.with_suffix("")) for file in partial]


def new_folder(path: str | Path) -> Path:
    """Return a folder to write a corpus to, created if need be.

    Raises:
        CorpusError: if it is a file or holds a corpus already.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise CorpusError(f"{folder}: is a file, wanted a folder to write to")
    if visible_files(folder, "*.parquet"):
        raise CorpusError(f"{folder}: holds a corpus already; write to an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_shard(corpus: Corpus, file: str | Path | Any, about: Mapping[bytes, bytes] | None = None) -> None:
    """Write one file, in the fast layout and with page checksums.

    Args:
        corpus: the utterances.
        file: a path, or a file that is open for writing.
        about: further metadata of the file.

    Raises:
        OSError: if it cannot be written, for example for lack of space.
    """
    table = _to_table(corpus)
    table = table.replace_schema_metadata({**table.schema.metadata, **(about or {})})
    frame_bytes = 4 * corpus.steps
    _pyarrow_parquet().write_table(
        table,
        file,
        row_group_size=max(1, _ROW_GROUP_BYTES // (frame_bytes * sum(corpus.input_dims.values()))),
        data_page_size=_PAGE_BYTES,
        write_batch_size=max(1, _PAGE_BYTES // (frame_bytes * max(corpus.input_dims.values()))),
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
        write_statistics=[name for name in RESERVED_COLUMNS if name in table.column_names and name != "label"],
    )


def shard_paths(path: str | Path) -> list[Path]:
    """Return the Parquet files of a corpus, a folder of them or a single file, sorted by name.

    Files of folders such as ``split=train`` follow those of the folder itself.

    Raises:
        CorpusError: if there is no such file, or no Parquet file in the folder.
    """
    source = Path(path)
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise CorpusError(f"{source}: no such file or folder")
    shards = corpus_files(source, "*.parquet")
    if not shards:
        raise CorpusError(f"{source}: holds no .parquet file")
    return shards


def read_table(path: str | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one Parquet file; columns that it lacks are left out.

    Raises:
        CorpusError: if the file is empty, truncated or not Parquet.
    """
    parquet = _pyarrow_parquet()
    file = Path(path)
    if not file.is_file():
        raise CorpusError(f"{file}: no such file")
    with (
        decoding(file, "not readable as Parquet"),
        parquet.ParquetFile(file, page_checksum_verification=True) as opened,
    ):
        present = opened.schema_arrow.names
        return opened.read(None if columns is None else [name for name in columns if name in present])


def read_parquet(
    path: str | Path,
    *,
    input_dims: Mapping[str, int] | None = None,
    splits: Sequence[str] | None = None,
) -> Corpus:
    """Read a corpus from a folder of Parquet files or from one file.

    Args:
        path: the folder or file.
        input_dims: modalities to read and their feature counts, required for columns that do not state a count. A
            modality without a column is unavailable. None reads every column that holds frames; each must state one.
        splits: read only the rows of these splits; None reads all rows.

    Raises:
        CorpusError: naming the file, and the column or row, that cannot be read or contradicts the rest.
        ValueError: if ``splits`` holds a name that is no split.
    """
    wanted = None if splits is None else _wanted_splits(splits)
    parts: list[Corpus] = []
    named: list[bool] = []
    source, unread = Path(path), None
    for file in shard_paths(source):
        table = read_table(file)
        name = file.name if source.is_file() else file.relative_to(source).as_posix()
        with naming(file), decoding(file, "not readable as Parquet"):
            table = with_hive_columns(with_ids(table, file=Path(name).stem), hive_values(name))
            try:
                part = _to_corpus(table, input_dims)
            except CorpusError as error:
                if table.num_rows:
                    raise
                unread = unread or error  # a table without rows may have columns of any type
                continue
            if wanted is not None:
                if part.split is None:
                    raise CorpusError(f"there is no column 'split' to take {', '.join(wanted)} from")
                part = part.select(np.isin(part.split.astype(str), wanted))
            parts.append(part)
            named.append(labels_are_names(table.schema))
    with naming(path):
        if unread is not None and not parts:
            raise unread
        return concatenate(_with_equal_classes(parts, named))


def _wanted_splits(splits: Sequence[str]) -> list[str]:
    try:
        return [split_name(name) for name in splits]
    except CorpusError as error:
        raise ValueError(f"splits: {error}") from error


def features_from_table(table: pa.Table, input_dims: Mapping[str, int] | None = None) -> TableFeatures:
    """Return ids, features, lengths and availability of a table's rows; labels are ignored.

    Args:
        table: rows in the layout of this module.
        input_dims: as in `read_parquet`.

    Raises:
        CorpusError: naming the column or row that cannot be read.
    """
    table = with_ids(table)
    decoded = decode_rows(table, input_dims)
    if decoded.problems:
        raise CorpusError(decoded.problems[min(decoded.problems)])
    ids = read_strings(table, "id")
    if ids is None:  # with_ids has added the column
        raise AssertionError("unreachable")
    rows = np.arange(len(ids))
    steps = max(1, int(max(column.frames.max(initial=1) for column in decoded.columns.values())))
    dims = {name: column.dim for name, column in decoded.columns.items()} | dict(input_dims or {})
    features = {
        name: decoded.columns[name].padded(rows, steps)
        if name in decoded.columns
        else np.zeros((len(rows), steps, dims[name]), np.float32)
        for name in (input_dims or decoded.columns)
    }
    return TableFeatures(ids, features, decoded.lengths, decoded.available)


def labels_from_table(table: pa.Table, classes: tuple[str, ...] = (), task: str = "") -> Labels:
    """Return the labels of a table's rows, with class names and task.

    Args:
        table: rows in the layout of this module.
        classes: class names of the corpus; without them, those that the table declares or holds.
        task: of the corpus; without it, that which the table declares or its labels suggest.

    Raises:
        CorpusError: naming the row that cannot be read.
    """
    declared, declared_task = _declared(table)
    ids = read_strings(with_ids(table), "id")
    if ids is None:  # with_ids has added the column
        raise AssertionError("unreachable")
    return read_labels(table, ids, classes or declared, task or declared_task)


def _pyarrow_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("reading and writing Parquet needs pyarrow: pip install 'm3er-fast[score]'") from error
    return pyarrow.parquet


def _to_table(corpus: Corpus) -> pa.Table:
    import pyarrow as pa

    fields, columns = [pa.field("id", pa.string(), nullable=False)], [pa.array(corpus.ids.tolist(), pa.string())]
    for column, (name, value) in enumerate(corpus.features.items()):
        rows, steps, dim = value.shape
        width = 4 * steps * dim
        validity = pa.array(corpus.available[:, column], pa.bool_()).buffers()[1]
        frames = pa.py_buffer(np.ascontiguousarray(value, "<f4"))
        columns.append(pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), rows, [validity, frames]))
        metadata = {"features": str(dim), "frames": str(steps), "dtype": "float32"}
        fields.append(pa.field(name, pa.binary(width), metadata=metadata))
    fields.append(pa.field("length", pa.int32(), nullable=False))
    columns.append(pa.array(corpus.lengths, pa.int32()))
    if corpus.target is not None:
        if corpus.task == "single":
            columns.append(pa.array(corpus.target, pa.int32(), mask=corpus.target == NO_LABEL))
        else:
            rows = [row if known else None for row, known in zip(corpus.target, corpus.labelled, strict=True)]
            columns.append(pa.array(rows, pa.list_(pa.float32())))
        fields.append(pa.field("label", columns[-1].type))
    for name, strings in (("split", corpus.split), ("group", corpus.group)):
        if strings is not None:
            fields.append(pa.field(name, pa.string()))
            columns.append(pa.array(strings.tolist(), pa.string()))
    about: dict[bytes | str, bytes | str] = {
        _FORMAT: FORMAT_VERSION,
        _CLASSES: json.dumps(corpus.classes),
        _TASK: corpus.task,
    }
    if corpus.extraction is not None:
        about[_EXTRACTION] = json.dumps(corpus.extraction)
    return pa.Table.from_arrays(columns, schema=pa.schema(fields, metadata=about))


def extraction_of(schema: pa.Schema) -> dict[str, Any] | None:
    """Return how the features of a table were made from recordings; None where it does not say.

    Raises:
        CorpusError: if what it says is no JSON object.
    """
    text = (schema.metadata or {}).get(_EXTRACTION)
    if text is None:
        return None
    with decoding("the schema", f"its metadata {_EXTRACTION.decode()!r} are no JSON object"):
        return dict(json.loads(text))


def read_labels_of(table: pa.Table, classes: tuple[str, ...], task: str) -> Labels:
    """Return the labels of a table's rows, which must be of these classes.

    Args:
        table: rows, with the column.
        classes: class names.
        task: if the metadata declare none.

    Raises:
        CorpusError: the labels cannot be read, or are of other classes.
    """
    return labels_in_classes(table, classes, task, *_declared(table))


def _to_corpus(table: pa.Table, input_dims: Mapping[str, int] | None) -> Corpus:
    ids, features, lengths, available = features_from_table(table, input_dims)
    target, classes, task = read_labels(table, ids, *_declared(table))
    return Corpus(
        ids=ids,
        features=features,
        lengths=lengths,
        available=available,
        target=target,
        classes=classes,
        task=task,
        split=read_splits(table),
        group=read_strings(table, "group"),
        extraction=extraction_of(table.schema),
    )


def _with_equal_classes(parts: Sequence[Corpus], named: Sequence[bool]) -> list[Corpus]:
    """Give every part the classes of all: without metadata, a shard knows only its own labels.

    Args:
        parts: of a corpus.
        named: whether the labels of a part are names, which are numbered anew if the parts differ.
    """
    longest = max(parts, key=lambda part: len(part.classes))
    parts = [
        part if part.target is not None or part.classes else dataclasses.replace(part, task=longest.task)
        for part in parts
    ]
    if all(part.classes == longest.classes[: len(part.classes)] for part in parts):
        classes = longest.classes
    elif all(is_named or part.target is None for part, is_named in zip(parts, named, strict=True)):
        classes = classes_named(name for part in parts for name in part.classes)
        parts = [dataclasses.replace(part, target=_renumbered(part, classes), classes=classes) for part in parts]
    else:
        return list(parts)
    return [
        dataclasses.replace(part, classes=classes) if part.task == "single" or part.target is None else part
        for part in parts
    ]


def _renumbered(part: Corpus, classes: tuple[str, ...]) -> np.ndarray | None:
    if part.target is None:
        return None
    names = [None if label == NO_LABEL else part.classes[label] for label in part.target]
    return class_indices(names, classes)


def _declared(table: pa.Table) -> tuple[tuple[str, ...], str]:
    """Return the class names and the task in the metadata of a table; both may be empty."""
    metadata = table.schema.metadata or {}
    try:
        classes = tuple(str(name) for name in json.loads(metadata.get(_CLASSES, b"[]")))
        return classes, metadata.get(_TASK, b"").decode()
    except (ValueError, TypeError) as error:
        raise CorpusError(f"the metadata {_CLASSES.decode()!r} is not a JSON list of names") from error
