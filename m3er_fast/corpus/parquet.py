"""This project's own corpus format: a folder of Parquet files, one row an utterance.

Layout: ``part-00000.parquet`` and so on, with the columns

* ``id``: string;
* one a modality: fixed-size binary, the T·d float32 values of the padded frames, with the field metadata ``features``
  (d), ``frames`` (T) and ``dtype``; plain and uncompressed, because floats do not compress and a plain column is read
  at the speed of memory, in pages of 16 KiB or of one row; null means unavailable;
* ``length``: int32, the number of leading frames that are not padding;
* ``label`` (optional): int32 class index or null, or list<float> of C answers or probabilities;
* ``split`` and ``group`` (optional): string;

and the schema metadata ``m3er_fast.format``, ``m3er_fast.classes`` (JSON) and ``m3er_fast.task``.

Modality columns that others write are read too: ``fixed_size_list``, ``list``, ``list<list>`` and Arrow's
``fixed_shape_tensor`` of float16, float32, float64 or integers.

Dimension legend: N utterances, M modalities, T time steps, d features, C classes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from m3er_fast.corpus.base import NO_LABEL, SPLITS, Corpus, CorpusError, concatenate, naming

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT_VERSION = "1"

_FORMAT, _CLASSES, _TASK = b"m3er_fast.format", b"m3er_fast.classes", b"m3er_fast.task"
_RESERVED = ("id", "length", "label", "split", "group")
_ROW_GROUP_BYTES = 64 * 2**20
# Little enough that a page is still in a core's first cache when, once read, it is verified, and then decoded.
_PAGE_BYTES = 16 * 2**10


class TableFeatures(NamedTuple):
    """What scoring needs of some rows; fields as in `Corpus`."""

    ids: np.ndarray  # (N,) str
    features: dict[str, np.ndarray]  # modality -> (N, T, d) float32
    lengths: np.ndarray  # (N,) int64
    available: np.ndarray  # (N, M) bool


def write_parquet(corpus: Corpus, out_dir: str | Path, *, rows_per_shard: int = 4096) -> list[Path]:
    """Write a corpus as a folder of Parquet files and return their paths.

    The files get their names when all of them are written, so that an interrupted run leaves no corpus behind.

    Args:
        corpus: the utterances.
        out_dir: a folder, created if need be, that holds no corpus yet.
        rows_per_shard: utterances a file.

    Raises:
        CorpusError: ``out_dir`` is a file or holds Parquet files already, or a modality has the name of a column.
        ValueError: ``rows_per_shard`` < 1.
        OSError: the files cannot be written, for example for lack of space.
    """
    _pyarrow_parquet()
    if rows_per_shard < 1:
        raise ValueError(f"rows_per_shard must be at least 1, got {rows_per_shard}")
    for name in corpus.modalities:
        if name in _RESERVED:
            raise CorpusError(f"a modality cannot be called {name!r}, the name of a column")
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
        CorpusError: it is a file or holds a corpus already.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise CorpusError(f"{folder}: is a file, wanted a folder to write to")
    if any(folder.glob("*.parquet")):
        raise CorpusError(f"{folder}: holds a corpus already; write to an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_shard(corpus: Corpus, path: str | Path) -> None:
    """Write one file, in the fast layout and with page checksums.

    Raises:
        OSError: it cannot be written, for example for lack of space.
    """
    table = _to_table(corpus)
    frame_bytes = 4 * corpus.steps
    _pyarrow_parquet().write_table(
        table,
        path,
        row_group_size=max(1, _ROW_GROUP_BYTES // (frame_bytes * sum(corpus.input_dims.values()))),
        data_page_size=_PAGE_BYTES,
        write_batch_size=max(1, _PAGE_BYTES // (frame_bytes * max(corpus.input_dims.values()))),
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
        write_statistics=[name for name in _RESERVED if name in table.column_names and name != "label"],
    )


def shard_paths(path: str | Path) -> list[Path]:
    """Return the Parquet files of a corpus, a folder of them or a single file, sorted by name.

    Raises:
        CorpusError: there is no such file, or no Parquet file in the folder.
    """
    source = Path(path)
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise CorpusError(f"{source}: no such file or folder")
    shards = sorted(source.glob("*.parquet"))
    if not shards:
        raise CorpusError(f"{source}: holds no .parquet file")
    return shards


def read_table(path: str | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one Parquet file; columns that it lacks are left out.

    Raises:
        CorpusError: the file is empty, cut short or not Parquet.
    """
    parquet = _pyarrow_parquet()
    import pyarrow as pa

    file = Path(path)
    if not file.is_file():
        raise CorpusError(f"{file}: no such file")
    try:
        with parquet.ParquetFile(file, page_checksum_verification=True) as opened:
            present = opened.schema_arrow.names
            return opened.read(None if columns is None else [name for name in columns if name in present])
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{file}: not readable as Parquet: {' '.join(str(error).split())}") from error


def read_parquet(
    path: str | Path,
    *,
    input_dims: Mapping[str, int] | None = None,
    splits: Sequence[str] | None = None,
) -> Corpus:
    """Read a corpus from a folder of Parquet files or from one file.

    Args:
        path: the folder or file.
        input_dims: modalities to read and their feature counts, which columns without a count need; a modality without
            a column is unavailable. None: every column that holds frames, with a count of its own.
        splits: only rows of these splits; None: all rows.

    Raises:
        CorpusError: naming the file, and the column or row, that cannot be read or contradicts the others.
        ValueError: ``splits`` names something else than a split.
    """
    for name in splits or ():
        if name not in SPLITS:
            raise ValueError(f"splits must be among {', '.join(SPLITS)}, got {name!r}")
    parts = []
    for file in shard_paths(path):
        with naming(file):
            part = _to_corpus(read_table(file), input_dims)
            if splits is not None:
                if part.split is None:
                    raise CorpusError(f"there is no column 'split' to take {', '.join(splits)} from")
                part = part.select(np.isin(part.split.astype(str), list(splits)))
            parts.append(part)
    with naming(path):
        return concatenate(_with_equal_classes(parts))


def features_from_table(table: pa.Table, input_dims: Mapping[str, int] | None = None) -> TableFeatures:
    """Return ids, features, lengths and availability of a table's rows; labels are not looked at.

    Args:
        table: rows in the layout of this module.
        input_dims: as in `read_parquet`.

    Raises:
        CorpusError: naming the column or row that cannot be read.
    """
    decoded = decode_rows(table, input_dims)
    if decoded.problems:
        raise CorpusError(decoded.problems[min(decoded.problems)])
    ids = _strings(table, "id")
    if ids is None:  # decode_rows looked for it
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


class FrameColumn(NamedTuple):
    """The frames of one modality, of N rows; not padded, so that one long row does not make all of them long."""

    blocks: tuple[np.ndarray, ...]  # (F, d) float32, the frames of successive rows; maybe views of Arrow's memory
    first_rows: np.ndarray  # int64, the first row of each block
    frames: np.ndarray  # (N,) int64, how many of them each row has
    present: np.ndarray  # (N,) bool, False for null

    @property
    def dim(self) -> int:
        """d, the features of a frame."""
        return int(self.blocks[0].shape[1])

    def padded(self, rows: np.ndarray, steps: int, out: np.ndarray | None = None) -> np.ndarray:
        """Return the first ``steps`` frames of some rows (R,) as (R, steps, d), padded with zeros and zero where null.

        Args:
            rows: indices of rows, in ascending order.
            steps: length of the time axis.
            out: (R, steps, d) float32 to write them to, instead of to a new array.
        """
        if out is None:
            out = np.empty((len(rows), steps, self.dim), np.float32)
        ends = [*self.first_rows[1:], len(self.frames)]
        bounds = np.searchsorted(rows, [0, *ends])
        for index, block in enumerate(self.blocks):
            start, stop = self.first_rows[index], ends[index]
            of_block = slice(bounds[index], bounds[index + 1])
            if of_block.stop > of_block.start:
                _pad(block, self.frames[start:stop], rows[of_block] - start, out[of_block])
        absent = ~self.present[rows]
        if absent.any():
            out[absent] = 0
        return out


def _pad(values: np.ndarray, frames: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
    """Write the first frames of some rows of a block to (R, steps, d), and zeros behind them."""
    steps, stored = out.shape[1], int(frames[0])
    if (frames == stored).all():
        kept = min(stored, steps)
        block = values.reshape(len(frames), stored, values.shape[1])
        if kept == stored == steps:
            np.take(block, rows, axis=0, out=out, mode="clip")  # with "raise" NumPy would gather twice
        else:
            out[:, :kept] = block[rows, :kept]
            out[:, kept:] = 0
    else:
        starts = np.cumsum(frames) - frames
        step = np.arange(steps)
        inside = step < frames[rows, None]
        out[:] = 0
        out[inside] = values[(starts[rows, None] + step)[inside]]


class DecodedRows(NamedTuple):
    """What scoring needs of N rows, with what is wrong in some of them."""

    columns: dict[str, FrameColumn]  # of the modalities that have a column
    lengths: np.ndarray  # (N,) int64; 0 where there is a problem
    available: np.ndarray  # (N, M) bool; False where there is a problem
    problems: dict[int, str]  # row -> what is wrong with it


def decode_rows(table: pa.Table, input_dims: Mapping[str, int] | None = None) -> DecodedRows:
    """Decode frames and lengths of a table's rows. What is wrong with a single row is reported, not raised.

    Args:
        table: rows in the layout of this module.
        input_dims: as in `read_parquet`.

    Raises:
        CorpusError: naming the column that is missing or cannot be read in any row.
    """
    names = list(input_dims) if input_dims is not None else modality_columns(table.schema)
    refuse_repeated(table.schema, ("id", "length", *names))
    ids = _id_column(table)
    problems: dict[int, str] = _id_problems(ids)
    columns = {
        name: _frames(table, name, None if input_dims is None else input_dims[name], ids, problems)
        for name in names
        if name in table.column_names
    }
    if not columns:
        raise CorpusError(
            f"no column holds frames of {'any modality' if input_dims is None else ' or '.join(names)}; "
            f"the columns are {', '.join(table.column_names)}"
        )
    frames = np.max([column.frames for column in columns.values()], axis=0)
    lengths = frames if "length" not in table.column_names else _lengths(table, ids, problems)
    for name, column in columns.items():
        for row in np.flatnonzero(column.present & (column.frames < lengths)):
            message = f"has {column.frames[row]} frames, but its length is {lengths[row]}"
            problems.setdefault(int(row), f"column {name!r}: {_name(ids, row)} {message}")
    for row in np.flatnonzero(lengths > frames.max(initial=1)):
        message = f"is {lengths[row]} for {_name(ids, row)}, but no row has more than {frames.max(initial=1)} frames"
        problems.setdefault(int(row), f"column 'length' {message}")
    available = np.zeros((len(ids), len(names)), dtype=bool)
    for index, name in enumerate(names):
        if name in columns:
            available[:, index] = columns[name].present
    if problems:
        bad = list(problems)
        lengths = lengths.copy()
        lengths[bad] = 0
        available[bad] = False
    return DecodedRows(columns, lengths, available, problems)


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
            columns.append(pa.array(list(corpus.target), pa.list_(pa.float32())))
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
    return pa.Table.from_arrays(columns, schema=pa.schema(fields, metadata=about))


def _to_corpus(table: pa.Table, input_dims: Mapping[str, int] | None) -> Corpus:
    ids, features, lengths, available = features_from_table(table, input_dims)
    target, classes, task = _labels(table, ids)
    return Corpus(
        ids=ids,
        features=features,
        lengths=lengths,
        available=available,
        target=target,
        classes=classes,
        task=task,
        split=_strings(table, "split"),
        group=_strings(table, "group"),
    )


def _with_equal_classes(parts: Sequence[Corpus]) -> list[Corpus]:
    """Give every part the longest list of classes: without metadata, a shard knows only the labels it holds."""
    longest = max((part.classes for part in parts), key=len)
    return [
        dataclasses.replace(part, classes=longest)
        if part.task == "single" and part.classes == longest[: len(part.classes)]
        else part
        for part in parts
    ]


def _strings(table: pa.Table, name: str) -> np.ndarray | None:
    """Return a column of strings (N,), or None if there is no such column."""
    if name not in table.column_names:
        return None
    column = _string_column(table, name)
    if column.null_count:
        raise CorpusError(f"column {name!r} is null in row {column.is_null().to_pylist().index(True)}")
    return np.array(column.to_pylist(), dtype=object)


def _id_column(table: pa.Table) -> Any:
    """Return the ids as one Arrow array of strings, nulls and bytes that are not UTF-8 included."""
    if "id" not in table.column_names:
        raise CorpusError(f"there is no column 'id'; the columns are {', '.join(table.column_names) or 'none'}")
    return _one_chunk(_string_column(table, "id"))


def _string_column(table: pa.Table, name: str) -> Any:
    """Return a column as Arrow strings, whether they are stored in a dictionary or not."""
    import pyarrow as pa

    column = table[name]
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise CorpusError(f"column {name!r} holds {column.type}, wanted string")
    return column


def _id_problems(ids: Any) -> dict[int, str]:
    """Say of every row whose id is null, or no text, that it is."""
    problems = {}
    if ids.null_count:
        problems = {int(row): f"column 'id' is null in row {row}" for row in np.flatnonzero(_nulls(ids))}
    try:
        ids.validate(full=True)
    except ValueError:  # pyarrow's ArrowInvalid
        for row in range(len(ids)):
            try:
                ids[row].as_py()
            except UnicodeDecodeError as error:
                problems[row] = f"column 'id' in row {row} is not UTF-8: {error}"
    return problems


def _name(ids: Any, row: Any) -> str:
    """Return how to call a row in a message."""
    try:
        name = ids[int(row)].as_py()
    except UnicodeDecodeError:
        name = None
    return f"row {row}" if name is None else repr(name)


def _one_chunk(column: Any) -> Any:
    import pyarrow as pa

    column = column.combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # what combine_chunks gives depends on the release
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    return column


def _nulls(column: Any) -> np.ndarray:
    return np.asarray(column.is_null().to_numpy(zero_copy_only=False))


def _lengths(table: pa.Table, ids: Any, problems: dict[int, str]) -> np.ndarray:
    import pyarrow as pa

    column = _one_chunk(table["length"])
    if not pa.types.is_integer(column.type):
        raise CorpusError(f"column 'length' holds {column.type}, wanted int32")
    for row in np.flatnonzero(_nulls(column)) if column.null_count else ():
        problems.setdefault(int(row), f"column 'length' is null for {_name(ids, row)}")
    values = np.asarray(column.fill_null(0).to_numpy(zero_copy_only=False))
    if values.dtype == np.uint64:
        values = np.minimum(values, np.iinfo(np.int64).max)
    lengths = values.astype(np.int64)
    for row in np.flatnonzero(lengths < 0):
        problems.setdefault(int(row), f"column 'length' is {lengths[row]} for {_name(ids, row)}")
    return lengths


def _labels(table: pa.Table, ids: np.ndarray) -> tuple[np.ndarray | None, tuple[str, ...], str]:
    """Return target, class names and task."""
    import pyarrow as pa

    metadata = table.schema.metadata or {}
    try:
        classes = tuple(str(name) for name in json.loads(metadata.get(_CLASSES, b"[]")))
        task = metadata.get(_TASK, b"").decode()
    except (ValueError, TypeError) as error:
        raise CorpusError(f"the metadata {_CLASSES.decode()!r} is not a JSON list of names") from error
    if "label" not in table.column_names:
        return None, classes, task or "single"
    column = table["label"]
    if pa.types.is_integer(column.type):
        target = np.asarray(column.cast(pa.int64()).fill_null(NO_LABEL).to_numpy())
        return target, classes or tuple(f"class_{c}" for c in range(int(target.max(initial=-1)) + 1)), task or "single"
    if not _is_list(column.type) or not pa.types.is_floating(column.type.value_type):
        raise CorpusError(f"column 'label' holds {column.type}, wanted an integer or list<float>")
    rows = [np.asarray([] if row is None else row, dtype=np.float32) for row in column.to_pylist()]
    width = len(classes) or (len(rows[0]) if rows else 0)
    for name, row in zip(ids, rows, strict=True):
        if len(row) != width:
            raise CorpusError(f"column 'label' has {len(row)} values for {name!r}, wanted {width}")
    target = np.stack(rows) if rows else np.zeros((0, width), np.float32)
    if not task:
        task = "distribution" if np.allclose(target.sum(axis=1), 1, atol=1e-3) else "multi"
    return target, classes or tuple(f"class_{c}" for c in range(width)), task


def modality_columns(schema: pa.Schema) -> list[str]:
    """Return the names of the columns that can hold frames."""
    import pyarrow as pa

    return [
        field.name
        for field in schema
        if field.name not in _RESERVED
        and (pa.types.is_fixed_size_binary(field.type) or _is_list(_storage_type(field.type)))
    ]


def refuse_repeated(schema: pa.Schema, names: Iterable[str]) -> None:
    """Raise a CorpusError if several columns have one of these names: pyarrow gives none of them then."""
    for name in names:
        if schema.names.count(name) > 1:
            raise CorpusError(f"there are {schema.names.count(name)} columns {name!r}")


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _with_floats(kind: Any) -> Any:
    """The type with floats for nulls: what is inferred for a column of nothing else holds no numbers."""
    import pyarrow as pa

    inner, depth = kind, 0
    while _is_list(inner):
        inner, depth = inner.value_type, depth + 1
    if not pa.types.is_null(inner):
        return kind
    floats: Any = pa.float32()
    for _ in range(max(depth, 1)):
        floats = pa.list_(floats)
    return floats


def _storage_type(kind: Any) -> Any:
    return getattr(kind, "storage_type", kind)


def _frames(table: pa.Table, name: str, wanted: int | None, ids: Any, problems: dict[int, str]) -> FrameColumn:
    """Decode the column of one modality."""
    import pyarrow as pa

    field = table.schema.field(name)
    metadata = field.metadata or {}
    features = metadata.get(b"features", b"")
    counts = {int(features)} if features.isdigit() and len(features) < 10 else set()
    if isinstance(field.type, pa.FixedShapeTensorType):
        counts.add(field.type.shape[-1])
    data = table[name]
    if (kind := _with_floats(data.type)) != data.type:
        data = data.cast(kind)
    present = ~_nulls(data)
    first_rows, fixed = np.zeros(1, np.int64), None
    if pa.types.is_fixed_size_binary(field.type):
        dtype = metadata.get(b"dtype", b"float32").decode(errors="replace")
        fixed, blocks = _binary_blocks(data, name, dtype)
        items = np.full(len(present), fixed)
        first_rows = np.cumsum([0, *(len(chunk) for chunk in data.chunks[:-1])])
    else:
        column = _one_chunk(data)
        if isinstance(column, pa.ExtensionArray):
            column = column.storage
        items, flat, inner = _list_items(column, name, wanted, ids, problems)
        blocks = [flat]
        counts |= inner
        if pa.types.is_fixed_size_list(column.type) and not _is_list(column.type.value_type):
            fixed = int(column.type.list_size)
    if wanted is not None:
        counts.add(wanted)
    if len(counts) != 1 or 0 in counts:
        raise CorpusError(
            f"column {name!r} has no feature count in its metadata: input_dims must give it"
            if not counts
            else f"column {name!r} has conflicting feature counts: {sorted(counts)}"
        )
    dim = counts.pop()
    if fixed is not None and fixed % dim:
        raise CorpusError(f"column {name!r} has {fixed} values a row, not a multiple of {dim} features")
    ragged = items % dim != 0
    if ragged.any():
        for row in np.flatnonzero(ragged):
            message = f"has {items[row]} values, not a multiple of {dim} features"
            problems.setdefault(int(row), f"column {name!r}: {_name(ids, row)} {message}")
        blocks, items = [blocks[0][np.repeat(~ragged, items)]], np.where(ragged, 0, items)  # a list is one block
    return FrameColumn(tuple(block.reshape(-1, dim) for block in blocks), first_rows, items // dim, present)


def _binary_blocks(column: pa.ChunkedArray, name: str, dtype: str) -> tuple[int, list[np.ndarray]]:
    """Return the number of values in a row and, by chunk, all values as float32, whatever they are where null."""
    if dtype not in ("float16", "float32", "float64"):
        raise CorpusError(f"column {name!r} holds {dtype!r}, wanted float16, float32 or float64")
    kind = np.dtype(dtype).newbyteorder("<")
    width = column.type.byte_width
    if width % kind.itemsize:
        raise CorpusError(f"column {name!r} has {width} bytes a row, not a multiple of {kind.itemsize} for {dtype}")
    blocks = []
    for chunk in column.chunks:
        values = chunk.buffers()[1]
        if values is None or not width:
            blocks.append(np.zeros(len(chunk) * (width // kind.itemsize), np.float32))
            continue
        raw = np.frombuffer(values, np.uint8)[chunk.offset * width : (chunk.offset + len(chunk)) * width]
        with np.errstate(over="ignore"):
            blocks.append(raw.view(kind).astype(np.float32, copy=False))
    return width // kind.itemsize, blocks or [np.zeros(0, np.float32)]


def _list_items(
    column: Any, name: str, wanted: int | None, ids: Any, problems: dict[int, str]
) -> tuple[np.ndarray, np.ndarray, set[int]]:
    """Return the number of values in each row (N,), all values as float32, and the widths of inner lists.

    A row whose frames differ in width from the others has a problem, and no values.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if not _is_list(column.type):
        raise CorpusError(f"column {name!r} holds {column.type}, wanted fixed-size binary or lists of floats")
    items = _list_lengths(column)
    flat = pc.list_flatten(column)
    inner: set[int] = set()
    kept = None
    if _is_list(flat.type):
        widths = _list_lengths(flat)
        inner = {int(width) for width in np.unique(widths)}
        width = wanted if wanted in inner else next((int(width) for width in widths[:1]), 0)
        if len(inner) > 1:
            other = np.zeros(len(items), dtype=bool)
            other[np.repeat(np.arange(len(items)), items)[widths != width]] = True
            for row in np.flatnonzero(other):
                message = f"has frames of {sorted(inner)} features, wanted one count"
                problems.setdefault(int(row), f"column {name!r}: {_name(ids, row)} {message}")
            kept = np.repeat(np.repeat(~other, items), widths)
            items, inner = np.where(other, 0, items), {width}
        items = items * width
        flat = pc.list_flatten(flat)
    if not (pa.types.is_floating(flat.type) or pa.types.is_integer(flat.type)):
        raise CorpusError(f"column {name!r} holds {column.type}, wanted lists of floats")
    with np.errstate(over="ignore"):
        values = flat.to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    return items, values if kept is None else values[kept], inner


def _list_lengths(column: Any) -> np.ndarray:
    import pyarrow.compute as pc

    return np.asarray(pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False), dtype=np.int64)
