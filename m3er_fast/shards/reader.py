"""Reading a shard of any size as a stream of tables of bounded size.

Files are not trusted. The size that a shard claims to unpack to is compared with the size that its rows can have before
anything is decoded, page checksums are verified if there are any, and every fault is a `CorpusError`.
"""

from __future__ import annotations

import itertools
import mmap
import os
import struct
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from m3er_fast.corpus.base import CorpusError, naming
from m3er_fast.corpus.files import decoding, hive_values
from m3er_fast.corpus.parquet import modality_columns, refuse_repeated, with_hive_columns, with_ids
from m3er_fast.shards.parquet_footer import check_footer
from m3er_fast.shards.plan import Location, Shard

if TYPE_CHECKING:
    import pyarrow as pa

WINDOW_BYTES = 64 * 2**20
"""Bytes of frames that are read, batched and scored at a time, unless a device needs larger batches."""

# Wider rows are not utterances: 16 MiB are 10,000 frames of 410 features.
_MOST_ROW_BYTES = 16 * 2**20
_MOST_ID_BYTES = 64 * 2**10
# Floats hardly compress. Zeros and nulls do, so a small shard is read whatever its ratio.
_MOST_EXPANSION = 1000
_SMALL_SHARD = 2**30
# Bytes of a column read at a time: few enough for a core's cache, or enough to be worth a request to a store.
_LOCAL_BUFFER_BYTES, _REMOTE_BUFFER_BYTES = 2**17, 2**22
# A column of at most as many bytes is read as a whole: through a buffer, Arrow allocates the size that a page's header
# claims, up to 2 GiB, before it notices that there are fewer bytes.
_WHOLE_COLUMN_BYTES = 2**24
# Decoded at a time. Arrow returns larger buffers to the system, which clears every page again when they are next
# allocated; this slowed reading by a tenth to a half (docs/scoring_internals.md).
_PIECE_BYTES = 8 * 2**20
_IPC_END_BYTES = 10  # of an Arrow IPC file: the length of the footer before it, and "ARROW1"
ROWS_PER_READ = 2**16
"""Rows of the column of groups that are read at a time."""


def read_windows(
    corpus: Location,
    shard: Shard,
    *,
    window_bytes: int = WINDOW_BYTES,
    verify: bool = True,
    frames: bool = True,
    extra_columns: Sequence[str] = (),
    check: Callable[[pa.Schema], object] = bool,
) -> Iterator[pa.Table]:
    """Yield the columns of a shard that scoring needs, some rows at a time; one empty table if there are no rows.

    Without a column of ids, an id is the shard's name and the number of the row.

    Args:
        corpus: location on the shard's filesystem.
        shard: a Parquet or Arrow IPC file.
        window_bytes: approximate size of the decoded frames in a table.
        verify: compare pages of Parquet with their checksums, if they have any.
        frames: read the columns of the modalities.
        extra_columns: other columns to read if they exist.
        check: called with the schema before anything is decoded; it may raise a CorpusError.

    Raises:
        CorpusError: the shard cannot be read, is damaged, or claims a larger size than its rows can have.
    """
    name, row = shard.name.rpartition("/")[2].rpartition(".")[0], 0
    values = hive_values(shard.name)

    def check_all(schema: pa.Schema) -> None:
        check(with_hive_columns(schema.empty_table(), values).schema)

    with naming(shard.name), decoding(shard.name, "not readable"):
        with corpus.filesystem.open_input_file(shard.path) as file:
            magic = file.read(6)
        if magic == b"ARROW1":
            tables = _read_ipc(corpus, shard, window_bytes, frames, extra_columns, check_all)
        else:
            tables = _read_parquet(corpus, shard, window_bytes, verify, frames, extra_columns, check_all)
        for table in tables:
            table = with_hive_columns(table, {key: value for key, value in values.items() if key in extra_columns})
            yield _with_checked_ids(with_ids(table, row, name))
            row += table.num_rows


def _read_parquet(
    corpus: Location,
    shard: Shard,
    window_bytes: int,
    verify: bool,
    frames: bool,
    extra_columns: Sequence[str],
    check: Callable[[pa.Schema], object],
) -> Iterator[pa.Table]:
    import pyarrow as pa
    from pyarrow import parquet

    with (
        # Not mapped: a damaged disk, or a file truncated while it is read, would cause SIGBUS instead of an error.
        corpus.filesystem.open_input_file(shard.path) as source,
        parquet.ParquetFile(
            source,
            metadata=(metadata := _read_metadata(source)),
            buffer_size=_buffer_bytes(corpus, metadata, shard.size),
            pre_buffer=False,
            page_checksum_verification=verify,
            # So that one huge id or label, repeated, is noticed before it is unpacked.
            read_dictionary=[name for name in ("id", "label") if _is_text_column(metadata, name)] or None,
        ) as file,
    ):
        schema = file.schema_arrow
        check(schema)
        columns = _columns_to_read(schema, frames, extra_columns)
        row_bytes = _check_claims(file.metadata, schema, columns, shard.size)
        rows = max(1, window_bytes // row_bytes)
        pieces = max(1, window_bytes // max(_PIECE_BYTES, row_bytes))
        batches = file.iter_batches(-(-rows // pieces), columns=columns, use_threads=False)
        yielded = False
        while window := list(itertools.islice(batches, pieces)):
            yielded = True
            yield pa.Table.from_batches(window)
        if not yielded:
            yield schema.empty_table().select(columns)


def _read_metadata(source: Any) -> Any:
    from pyarrow import parquet

    metadata = parquet.read_metadata(source)
    check_footer(source, metadata)
    source.seek(0)
    return metadata


def _buffer_bytes(corpus: Location, metadata: Any, size: int) -> int:
    """Return the bytes of a column that are read at a time, or 0 to read the column of a row group as a whole."""
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    columns = (group.column(index) for group in groups for index in range(group.num_columns))
    if size <= _WHOLE_COLUMN_BYTES or all(c.total_compressed_size <= _WHOLE_COLUMN_BYTES for c in columns):
        return 0
    return _LOCAL_BUFFER_BYTES if corpus.is_local else _REMOTE_BUFFER_BYTES


def _is_text_column(metadata: Any, name: str) -> bool:
    """Return whether there is a column of this name whose values are bytes: only these are read as a dictionary."""
    columns = map(metadata.schema.column, range(len(metadata.schema)))
    return any(column.path == name and column.physical_type == "BYTE_ARRAY" for column in columns)


def _columns_to_read(schema: pa.Schema, frames: bool, extra_columns: Sequence[str]) -> list[str]:
    wanted = ("id", "length", *extra_columns, *(modality_columns(schema) if frames else ()))
    refuse_repeated(schema, wanted)
    return [name for name in schema.names if name in wanted]


def _check_claims(metadata: Any, schema: pa.Schema, columns: Sequence[str], size: int) -> int:
    """Check the sizes in a footer, and return the bytes per row, averaged over the row group with the widest rows.

    A column chunk holds its values, each once in a page or once in a dictionary and by its number in a page, the
    levels that say where lists begin and what is null, and headers.
    """
    import pyarrow as pa

    total, row_bytes = 0, 1
    widths = {
        field.name: field.type.byte_width
        for field in schema
        if pa.types.is_fixed_size_binary(field.type) and field.name in columns
    }
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        rows, before = row_group.num_rows, total
        for index in range(row_group.num_columns):
            chunk, column = row_group.column(index), metadata.schema.column(index)
            name = chunk.path_in_schema.split(".", 1)[0]
            if name not in columns:
                continue
            if name == "id":
                most = rows * 1024 + _MOST_ID_BYTES
            else:
                most = rows * widths[name] if name in widths else chunk.num_values * 8
                total += most
            wide = chunk.num_values * max(0, _value_bytes(column) - 8) if name not in widths else 0
            number = 4 if any("DICTIONARY" in encoding for encoding in chunk.encodings) else 0
            levels = column.max_definition_level.bit_length() + column.max_repetition_level.bit_length()
            # A page that unpacks to more is a bomb. A header may hold the least and the largest value of a page, 4 KiB
            # at most, and a page may hold a single row.
            overhead = 64 + 2 * min(widths.get(name, 8), 2**12)
            allowed = 1.1 * (most + wide + chunk.num_values * (number + levels / 8)) + overhead * rows + 2**16
            if chunk.total_uncompressed_size > allowed:
                raise CorpusError(
                    f"column {name!r} would unpack to {chunk.total_uncompressed_size} bytes, "
                    f"but its {rows} rows hold at most {most}"
                )
        row_bytes = max(row_bytes, (total - before) // max(1, rows))
    if row_bytes > _MOST_ROW_BYTES:
        raise CorpusError(f"a row takes {row_bytes} bytes, more than the {_MOST_ROW_BYTES} that are read")
    if total > max(_SMALL_SHARD, _MOST_EXPANSION * size):
        raise CorpusError(f"its {metadata.num_rows} rows would unpack from {size} to {total} bytes")
    return row_bytes


def _value_bytes(column: Any) -> int:
    """Return the bytes of a value in a page, by its physical type; 64 for the texts of splits, groups and the like."""
    kinds = {"INT96": 12, "BYTE_ARRAY": 64, "FIXED_LEN_BYTE_ARRAY": column.length}
    return int(kinds.get(column.physical_type, 8))


def _with_checked_ids(table: pa.Table) -> pa.Table:
    import pyarrow as pa
    import pyarrow.compute as pc

    if "id" not in table.column_names or not pa.types.is_dictionary(table.schema.field("id").type):
        return table
    if not _is_text(table.schema.field("id").type.value_type):
        return table
    index = table.column_names.index("id")
    for chunk in table["id"].chunks:
        longest = pc.max(pc.binary_length(chunk.dictionary)).as_py() or 0
        if longest > _MOST_ID_BYTES:
            raise CorpusError(f"column 'id' holds a string of {longest} bytes, more than the {_MOST_ID_BYTES} allowed")
        unpacked = pc.sum(pc.binary_length(chunk.dictionary).take(chunk.indices)).as_py() or 0
        if unpacked > 1024 * len(chunk) + _MOST_ID_BYTES:
            raise CorpusError(f"column 'id' would unpack to {unpacked} bytes for {len(chunk)} rows")
    return table.set_column(index, "id", table["id"].cast(table.schema.field("id").type.value_type))


def _read_ipc(
    corpus: Location,
    shard: Shard,
    window_bytes: int,
    frames: bool,
    extra_columns: Sequence[str],
    check: Callable[[pa.Schema], object],
) -> Iterator[pa.Table]:
    import pyarrow as pa
    from pyarrow import ipc

    with _mapped(corpus, shard) as (source, release):
        _refuse_compressed(source)
        with ipc.open_file(source) as reader:
            check(reader.schema)
            columns = _columns_to_read(reader.schema, frames, extra_columns)
            yielded = False
            for index in range(reader.num_record_batches):
                batch = reader.get_batch(index).select(columns)
                batch.validate(full=True)  # offsets may point anywhere
                rows = max(1, window_bytes // max(1, batch.nbytes // max(1, batch.num_rows)))
                for start in range(0, batch.num_rows, rows):
                    yielded = True
                    yield pa.Table.from_batches([batch.slice(start, rows)])
                    release()
            if not yielded:
                yield reader.schema.empty_table().select(columns)


@contextmanager
def _mapped(corpus: Location, shard: Shard) -> Iterator[tuple[Any, Any]]:
    """Open a file, mapped to memory if it is local, together with a function that releases the pages that were read."""
    import pyarrow as pa

    if not corpus.is_local or not shard.size:
        with corpus.filesystem.open_input_file(shard.path) as file:
            yield file, lambda: None
        return
    descriptor = os.open(shard.path, os.O_RDONLY)
    try:
        mapping = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)

    def release() -> None:
        if hasattr(mmap, "MADV_DONTNEED"):  # they stay in the page cache, but no longer count as this process's memory
            mapping.madvise(mmap.MADV_DONTNEED)

    yield pa.BufferReader(pa.py_buffer(mapping)), release  # unmapped with the last table that refers to it


def _refuse_compressed(source: Any) -> None:
    """Refuse compressed batches: only their own data say what they unpack to.

    The batches are those that the footer lists, which are the ones that are read.
    """
    from pyarrow import ipc

    size = source.size()
    source.seek(max(0, size - _IPC_END_BYTES))
    end = source.read(_IPC_END_BYTES)
    length = struct.unpack("<i", end[:4])[0] if len(end) == _IPC_END_BYTES else -1
    if not 0 < length <= size - _IPC_END_BYTES:
        raise CorpusError("not readable: it is cut short, or its footer is damaged")
    source.seek(size - _IPC_END_BYTES - length)
    footer = _FlatBuffer(source.read(length))
    for number in (2, 3):  # dictionaries and record batches, in Arrow's File.fbs
        for place in footer.structs(number, 24):
            source.seek(struct.unpack_from("<q", footer.content, place)[0])
            message = ipc.read_message(source)
            # The header of a message, and the data of a dictionary in it; the compression of a batch is field 3.
            path = (2, 1, 3) if message.type == "dictionary" else (2, 3)
            if message.type in ("record batch", "dictionary") and _FlatBuffer(bytes(message.metadata)).has(path):
                raise CorpusError("it is compressed Arrow IPC: write it uncompressed, to be mapped, or as Parquet")
    source.seek(0)


class _FlatBuffer(NamedTuple):
    """The root table of a flatbuffer, read without Arrow; offsets out of range raise struct.error."""

    content: bytes

    def has(self, path: Sequence[int]) -> bool:
        """Return whether the last of these fields exists; each is one of the table that the one before it holds."""
        table = self._target(0)
        for number in path[:-1]:
            place = self._field(table, number)
            if not place:
                return False
            table = self._target(place)
        return bool(self._field(table, path[-1]))

    def structs(self, number: int, size: int) -> range:
        """Return the places of the structs in a vector, a field of the root table; none without the field."""
        place = self._field(self._target(0), number)
        if not place:
            return range(0)
        start = self._target(place)
        count = struct.unpack_from("<I", self.content, start)[0]
        if start + 4 + count * size > len(self.content):
            raise CorpusError("not readable: its footer is damaged")
        return range(start + 4, start + 4 + count * size, size)

    def _field(self, table: int, number: int) -> int:
        """Return the place of a field of a table, or 0."""
        vtable = table - struct.unpack_from("<i", self.content, table)[0]
        if vtable < 0 or 4 + 2 * number >= struct.unpack_from("<H", self.content, vtable)[0]:
            return 0
        offset = struct.unpack_from("<H", self.content, vtable + 4 + 2 * number)[0]
        return table + offset if offset else 0

    def _target(self, place: int) -> int:
        return int(place + struct.unpack_from("<I", self.content, place)[0])


def read_schema(corpus: Location, shard: Shard) -> pa.Schema | None:
    """Return the schema of a shard, with the columns that its folders give, or None if it cannot be read."""
    from pyarrow import ipc, parquet

    try:
        with decoding(shard.name, "not readable"), corpus.filesystem.open_input_file(shard.path) as file:
            schema = ipc.open_file(file).schema if file.read(6) == b"ARROW1" else parquet.read_schema(file)
            return with_hive_columns(schema.empty_table(), hive_values(shard.name)).schema
    except CorpusError:
        return None


def read_groups(
    corpus: Location, shard: Shard, *, verify: bool = True
) -> Generator[tuple[list[str | None], np.ndarray], None, None]:
    """Yield the column ``group`` of a shard, some rows at a time; nothing if there is no such column.

    Each item holds names, and for each row the index of its name, or -1 for null.

    Args:
        corpus: location on the shard's filesystem.
        shard: a Parquet or Arrow IPC file.
        verify: as for :func:`read_windows`.

    Raises:
        CorpusError: the column cannot be read, holds no strings, or claims a larger size than its rows can have.
    """
    import pyarrow as pa

    with (
        naming(shard.name),
        decoding(shard.name, "column 'group' is not readable"),
        corpus.filesystem.open_input_file(shard.path) as file,
    ):
        is_ipc = file.read(6) == b"ARROW1"
        columns = _ipc_groups(corpus, shard) if is_ipc else _parquet_groups(corpus, shard, file, verify)
        for column in columns:
            coded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
            names = [None if name is None else str(name) for name in coded.dictionary.to_pylist()]
            yield names, coded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)


def _parquet_groups(corpus: Location, shard: Shard, source: Any, verify: bool) -> Iterator[Any]:
    from pyarrow import parquet

    metadata = _read_metadata(source)
    if not _has_groups(metadata.schema.to_arrow_schema()):
        yield from _hive_groups(shard, metadata.num_rows)
        return
    for index in range(metadata.num_row_groups):
        row_group = metadata.row_group(index)
        chunks = (row_group.column(number) for number in range(row_group.num_columns))
        size = next(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == "group")
        if size > 1024 * row_group.num_rows + _MOST_ID_BYTES:
            raise CorpusError(f"column 'group' would unpack to {size} bytes for {row_group.num_rows} rows")
    with parquet.ParquetFile(
        source,
        metadata=metadata,
        # So that one huge name, repeated, is not unpacked.
        read_dictionary=["group"] if _is_text_column(metadata, "group") else None,
        buffer_size=_buffer_bytes(corpus, metadata, shard.size),
        pre_buffer=False,
        page_checksum_verification=verify,
    ) as file:
        for batch in file.iter_batches(ROWS_PER_READ, columns=["group"], use_threads=False):
            yield batch.column(0)


def _ipc_groups(corpus: Location, shard: Shard) -> Iterator[Any]:
    from pyarrow import ipc

    with _mapped(corpus, shard) as (source, release):
        _refuse_compressed(source)
        with ipc.open_file(source) as reader:
            if not _has_groups(reader.schema):
                batches = map(reader.get_batch, range(reader.num_record_batches))
                yield from _hive_groups(shard, sum(batch.num_rows for batch in batches))
                return
            for index in range(reader.num_record_batches):
                column = reader.get_batch(index).column("group")
                column.validate(full=True)
                for start in range(0, len(column), ROWS_PER_READ):
                    yield column.slice(start, ROWS_PER_READ)
                    release()


def _hive_groups(shard: Shard, rows: int) -> Iterator[Any]:
    """Yield the group that the folders of a shard give, for each of its rows; nothing if they give none."""
    import pyarrow as pa

    values = hive_values(shard.name)
    if "group" in values:
        for start in range(0, rows, ROWS_PER_READ):
            yield pa.repeat(pa.scalar(values["group"], pa.string()), min(ROWS_PER_READ, rows - start))


def _has_groups(schema: pa.Schema) -> bool:
    import pyarrow as pa

    if "group" not in schema.names:
        return False
    refuse_repeated(schema, ("group",))
    kind = schema.field("group").type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (_is_text(value) or pa.types.is_integer(value)):
        raise CorpusError(f"column 'group' holds {kind}, wanted string")
    return True


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    types = pa.types
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))
