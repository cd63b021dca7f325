"""Decoding of an Arrow table into frames, lengths and availability, with the problems of single rows.

Dimension legend: N utterances, M modalities, T time steps, d features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from m3er_fast.corpus.base import CorpusError, split_name

if TYPE_CHECKING:
    import pyarrow as pa

RESERVED_COLUMNS = ("id", "length", "label", "split", "group")
"""Columns that hold no modality."""


class FrameColumn(NamedTuple):
    """The frames of one modality in N rows, not padded: one long row must not make all rows long."""

    blocks: tuple[np.ndarray, ...]  # (F, d) float32, the frames of successive rows; may be views of Arrow's memory
    first_rows: np.ndarray  # int64, the first row of each block
    frames: np.ndarray  # (N,) int64, number of frames per row
    present: np.ndarray  # (N,) bool, False for null

    @property
    def dim(self) -> int:
        """d, the number of features per frame."""
        return int(self.blocks[0].shape[1])

    def padded(self, rows: np.ndarray, steps: int, out: np.ndarray | None = None) -> np.ndarray:
        """Return the first ``steps`` frames of some rows (R,) as (R, steps, d): zeros in padding and in null rows.

        Args:
            rows: indices of rows, in ascending order.
            steps: length of the time axis.
            out: (R, steps, d) float32 that receives the frames, instead of a new array.
        """
        if out is None:
            out = np.empty((len(rows), steps, self.dim), np.float32)
        ends = [*self.first_rows[1:], len(self.frames)]
        bounds = np.searchsorted(rows, [0, *ends])
        for index, block in enumerate(self.blocks):
            start, stop = self.first_rows[index], ends[index]
            chosen = slice(bounds[index], bounds[index + 1])
            if chosen.stop > chosen.start:
                _pad(block, self.frames[start:stop], rows[chosen] - start, out[chosen])
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
            np.take(block, rows, axis=0, out=out, mode="clip")  # mode "raise" would make NumPy gather twice
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
    """The frames of N rows, and the problems of single rows."""

    columns: dict[str, FrameColumn]  # only modalities that have a column
    lengths: np.ndarray  # (N,) int64; 0 where there is a problem
    available: np.ndarray  # (N, M) bool; False where there is a problem
    problems: dict[int, str]  # row -> message


def decode_rows(table: pa.Table, input_dims: Mapping[str, int] | None = None) -> DecodedRows:
    """Decode frames and lengths of a table's rows. Problems of single rows are reported, not raised.

    Args:
        table: rows in the layout of this module.
        input_dims: as in `read_parquet`.

    Raises:
        CorpusError: naming the column that is missing, or that cannot be read in any row.
    """
    names = list(input_dims) if input_dims is not None else _countable(table) or modality_columns(table.schema)
    refuse_repeated(table.schema, ("id", "length", *names))
    table = with_ids(table)
    ids = _one_chunk(string_column(table, "id"))
    problems: dict[int, str] = _text_problems(ids, "id")
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


def modality_columns(schema: pa.Schema) -> list[str]:
    """Return the names of the columns that hold frames, or could: fixed-size binary, and lists of numbers or nulls.

    Columns of anything else, such as texts or lists of texts, are no modality, unless their metadata say ``features``.
    """
    return [field.name for field in schema if field.name not in RESERVED_COLUMNS and _may_hold_frames(field)]


def _countable(table: pa.Table) -> list[str]:
    """Return the modalities but those that are null in every row and do not say how many features a frame has."""
    import pyarrow as pa

    def says_nothing(name: str) -> bool:
        field = table.schema.field(name)
        is_fixed = pa.types.is_fixed_size_list(field.type) or isinstance(field.type, pa.BaseExtensionType)
        has_count = is_fixed or b"features" in (field.metadata or {})
        return not has_count and table.num_rows > 0 and table[name].null_count == table.num_rows

    return [name for name in modality_columns(table.schema) if not says_nothing(name)]


def _may_hold_frames(field: pa.Field) -> bool:
    import pyarrow as pa

    kind = _storage_type(field.type)
    leaf, depth = kind, 0
    while is_list(leaf):
        leaf, depth = leaf.value_type, depth + 1
    is_declared = b"features" in (field.metadata or {})
    return bool(
        pa.types.is_fixed_size_binary(field.type)
        or (depth > 0 and (is_declared or pa.types.is_null(leaf) or _is_number(leaf)))
    )


def _is_number(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_decimal(kind))


def refuse_repeated(schema: pa.Schema, names: Iterable[str]) -> None:
    """Raise a CorpusError if several columns share one of these names: pyarrow then returns none of them."""
    for name in names:
        if schema.names.count(name) > 1:
            raise CorpusError(f"there are {schema.names.count(name)} columns {name!r}")


def with_hive_columns(table: pa.Table, values: Mapping[str, str | None]) -> pa.Table:
    """Append the columns of the format that the folders of a file give (`hive_values`), and that the table lacks."""
    import pyarrow as pa

    for name, value in values.items():
        if name in RESERVED_COLUMNS and name not in table.column_names:
            number = value is not None and value.isascii() and value.isdigit()
            item = (
                pa.scalar(int(value or 0), pa.int64()) if name == "label" and number else pa.scalar(value, pa.string())
            )
            table = table.append_column(name, pa.repeat(item, table.num_rows))
    return table


def with_ids(table: pa.Table, first_row: int = 0, file: str = "") -> pa.Table:
    """Return a table with ids: without such a column, an id is the number of a row, after the name of its file."""
    import pyarrow as pa

    if "id" in table.column_names:
        return table
    prefix = f"{file}:" if file else ""
    numbers = range(first_row, first_row + table.num_rows)
    return table.append_column("id", pa.array([f"{prefix}{number}" for number in numbers], pa.string()))


def string_column(table: pa.Table, name: str) -> Any:
    """Return a column as Arrow strings: texts of any layout, bytes, integers, nulls, or a dictionary of these.

    The texts are not verified to be UTF-8.
    """
    import pyarrow as pa

    column = table[name]
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return column
    if pa.types.is_string_view(kind) or pa.types.is_large_binary(kind):
        return column.cast(pa.large_string(), safe=False)
    if pa.types.is_binary(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind):
        return column.cast(pa.string(), safe=False)
    if pa.types.is_floating(kind) and column.null_count == len(column):  # of pandas, for no values
        return pa.chunked_array([pa.nulls(len(column), pa.string())])
    raise CorpusError(f"column {name!r} holds {kind}, wanted string")


def read_strings(table: pa.Table, name: str) -> np.ndarray | None:
    """Return a column of strings (N,), or None if there is no such column.

    Raises:
        CorpusError: naming the column and the row that is null or not UTF-8.
    """
    if name not in table.column_names:
        return None
    column = _one_chunk(string_column(table, name))
    problems = _text_problems(column, name)
    if problems:
        raise CorpusError(problems[min(problems)])
    return np.array(column.to_pylist(), dtype=object)


def read_splits(table: pa.Table) -> np.ndarray | None:
    """Return the splits (N,) of a table's rows, in their usual names, or None if there is no such column.

    Raises:
        CorpusError: naming the row that has none, or a value that is not the name of a split.
    """
    given = read_strings(table, "split")
    if given is None:
        return None
    usual = {}
    for name in dict.fromkeys(given.tolist()):
        try:
            usual[name] = split_name(name)
        except CorpusError as error:
            raise CorpusError(f"column 'split': {error}") from error
    return np.array([usual[name] for name in given], dtype=object)


def _text_problems(texts: Any, name: str) -> dict[int, str]:
    """Return a problem for every row of a column of texts that is null or not UTF-8."""
    problems = {}
    if texts.null_count:
        problems = {int(row): f"column {name!r} is null in row {row}" for row in np.flatnonzero(_nulls(texts))}
    try:
        texts.validate(full=True)
    except ValueError:  # pyarrow's ArrowInvalid
        for row in range(len(texts)):
            try:
                texts[row].as_py()
            except UnicodeDecodeError as error:
                problems[row] = f"column {name!r} in row {row} is not UTF-8: {error}"
    return problems


def _name(ids: Any, row: Any) -> str:
    """Return the name of a row for a message."""
    try:
        name = ids[int(row)].as_py()
    except UnicodeDecodeError:
        name = None
    return f"row {row}" if name is None else repr(name)


def _one_chunk(column: Any) -> Any:
    import pyarrow as pa

    column = column.combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # the result of combine_chunks depends on the release
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


def is_list(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _as_lists(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column that holds no value as lists of floats: the type inferred for it says nothing.

    pyarrow makes it nulls or lists of nulls, pandas float64.
    """
    import pyarrow as pa

    leaf, depth = column.type, 0
    while is_list(leaf):
        leaf, depth = leaf.value_type, depth + 1
    if pa.types.is_null(leaf) and depth:
        kind: Any = pa.float32()
        for _ in range(depth):
            kind = pa.list_(kind)
        return column.cast(kind)
    if (pa.types.is_null(leaf) or pa.types.is_floating(leaf)) and not depth and column.null_count == len(column):
        return pa.chunked_array([pa.nulls(len(column), pa.list_(pa.float32()))])
    return column


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
    data = _as_lists(table[name])
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
        if pa.types.is_fixed_size_list(column.type) and not is_list(column.type.value_type):
            fixed = int(column.type.list_size)
    if wanted is not None:
        if counts - {wanted}:
            found = " or ".join(map(str, sorted(counts)))
            raise CorpusError(
                f"column {name!r} has {found} features per frame, but the model (input_dims) takes {wanted}"
            )
        counts = {wanted}
    if not counts:  # flat lists of one width hold one frame each
        counts = {fixed} if fixed is not None else {int(count) for count in np.unique(items[present & (items > 0)])}
        counts = counts if len(counts) == 1 else set()
    if len(counts) != 1 or 0 in counts:
        raise CorpusError(
            f"column {name!r} has no feature count in its metadata, and rows of several widths: input_dims must give it"
            if not counts
            else f"column {name!r} has conflicting feature counts: {sorted(counts)}"
        )
    dim = counts.pop()
    if fixed is not None and fixed % dim:
        raise CorpusError(f"column {name!r} has {fixed} values per row, not a multiple of {dim} features")
    ragged = items % dim != 0
    if ragged.any():
        for row in np.flatnonzero(ragged):
            message = f"has {items[row]} values, not a multiple of {dim} features"
            problems.setdefault(int(row), f"column {name!r}: {_name(ids, row)} {message}")
        blocks, items = [blocks[0][np.repeat(~ragged, items)]], np.where(ragged, 0, items)  # a list is one block
    return FrameColumn(tuple(block.reshape(-1, dim) for block in blocks), first_rows, items // dim, present)


def _binary_blocks(column: pa.ChunkedArray, name: str, dtype: str) -> tuple[int, list[np.ndarray]]:
    """Return the number of values per row and, per chunk, all values as float32; values of null rows are arbitrary."""
    if dtype not in ("float16", "float32", "float64"):
        raise CorpusError(f"column {name!r} holds {dtype!r}, wanted float16, float32 or float64")
    kind = np.dtype(dtype).newbyteorder("<")
    width = column.type.byte_width
    if width % kind.itemsize:
        raise CorpusError(f"column {name!r} has {width} bytes per row, not a multiple of {kind.itemsize} for {dtype}")
    blocks = []
    for chunk in column.chunks:
        values = chunk.buffers()[1]
        if values is None or not width:
            blocks.append(np.zeros(len(chunk) * (width // kind.itemsize), np.float32))
            continue
        raw = np.frombuffer(values, np.uint8)[chunk.offset * width : (chunk.offset + len(chunk)) * width]
        with np.errstate(over="ignore", invalid="ignore"):
            blocks.append(raw.view(kind).astype(np.float32, copy=False))
    return width // kind.itemsize, blocks or [np.zeros(0, np.float32)]


def _list_items(
    column: Any, name: str, wanted: int | None, ids: Any, problems: dict[int, str]
) -> tuple[np.ndarray, np.ndarray, set[int]]:
    """Return the number of values per row (N,), all values as float32, and the widths of inner lists.

    A row whose frames differ in width from those of other rows is a problem, and gets no values.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if not is_list(column.type):
        raise CorpusError(f"column {name!r} holds {column.type}, wanted fixed-size binary or lists of floats")
    items = _list_lengths(column)
    flat = pc.list_flatten(column)
    inner: set[int] = set()
    kept = None
    if is_list(flat.type):
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
    if not _is_number(flat.type):
        raise CorpusError(f"column {name!r} holds {column.type}, wanted lists of floats")
    if pa.types.is_decimal(flat.type):
        flat = flat.cast(pa.float64())
    with np.errstate(over="ignore", invalid="ignore"):
        values = flat.to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    return items, values if kept is None else values[kept], inner


def _list_lengths(column: Any) -> np.ndarray:
    import pyarrow.compute as pc

    return np.asarray(pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False), dtype=np.int64)
