"""A look at the footer of a Parquet file before pyarrow's metadata are asked about its columns.

pyarrow 26 lets the exceptions of these calls pass through code that cannot: the process is aborted. The footer is
Thrift's compact protocol; this module reads only as much of it as the check needs.
"""

from __future__ import annotations

from typing import Any

from m3er_fast.corpus.base import CorpusError

_END_BYTES = 8  # the length of the footer, and "PAR1"
_MOST_DEPTH = 32
_VARINT_BYTES = 10
# Numbers of fields in Parquet's parquet.thrift.
_ROW_GROUPS, _COLUMNS, _COLUMN_METADATA, _CRYPTO, _SIZE_STATISTICS = 4, 1, 3, 8, 16
_BYTES_OF_TEXTS, _REPETITION_HISTOGRAM, _DEFINITION_HISTOGRAM = 1, 2, 3


def check_footer(source: Any, metadata: Any) -> None:
    """Raise a CorpusError if asking ``metadata`` about a column would abort the process.

    Args:
        source: the file; its position is moved.
        metadata: pyarrow's, of the same file.
    """
    size = source.size()
    source.seek(size - _END_BYTES)
    length = int.from_bytes(source.read(4), "little")
    source.seek(max(0, size - _END_BYTES - length))
    footer = _Compact(source.read(length)).struct()
    schema = [metadata.schema.column(index) for index in range(len(metadata.schema))]
    for group in footer.get(_ROW_GROUPS, []):
        columns = group.get(_COLUMNS, [])
        if len(columns) != len(schema):
            raise CorpusError(f"its footer has {len(columns)} columns in a row group, but {len(schema)} in the schema")
        for wanted, column in zip(schema, columns, strict=True):
            about = column.get(_COLUMN_METADATA)
            if about is None or _CRYPTO in column:
                raise CorpusError("its footer lacks the metadata of a column, or encrypts them")
            sizes = about.get(_SIZE_STATISTICS, {})
            if _BYTES_OF_TEXTS in sizes and wanted.physical_type != "BYTE_ARRAY":
                raise CorpusError(f"its footer has sizes of texts in a column of {wanted.physical_type}")
            for field, most in (
                (_REPETITION_HISTOGRAM, wanted.max_repetition_level),
                (_DEFINITION_HISTOGRAM, wanted.max_definition_level),
            ):
                if len(sizes.get(field, ())) not in (0, most + 1):
                    raise CorpusError("its footer has a histogram of levels that does not fit the schema")


class _Compact:
    """A reader of Thrift's compact protocol: structs become dicts by the number of the field, lists become lists."""

    def __init__(self, content: bytes) -> None:
        self._content, self._place = content, 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Read the fields of a struct."""
        fields: dict[int, Any] = {}
        number = 0
        while header := self._byte():
            number = number + (header >> 4) if header >> 4 else self._zigzag()
            kind = header & 15
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind, depth + 1)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if depth > _MOST_DEPTH:
            raise CorpusError("its footer is damaged: it is nested too deep")
        if kind in (1, 2, 3):
            return self._byte()
        if kind in (4, 5, 6):
            return self._zigzag()
        if kind == 7:
            return self._bytes(8)
        if kind == 8:
            return self._bytes(self._varint())
        if kind in (9, 10):
            header = self._byte()
            count = self._varint() if header >> 4 == 15 else header >> 4
            if count > len(self._content):
                raise CorpusError(f"its footer is damaged: it claims a list of {count}")
            return [self._value(header & 15, depth + 1) for _ in range(count)]
        if kind == 12:
            return self.struct(depth)
        raise CorpusError(f"its footer is damaged: it has a value of type {kind}")

    def _byte(self) -> int:
        return self._bytes(1)[0]

    def _bytes(self, count: int) -> bytes:
        found = self._content[self._place : self._place + count]
        if len(found) < count:
            raise CorpusError("its footer is damaged: it ends too early")
        self._place += count
        return found

    def _varint(self) -> int:
        number = 0
        for index in range(_VARINT_BYTES):
            byte = self._byte()
            number |= (byte & 127) << 7 * index
            if byte < 128:
                return number
        raise CorpusError("its footer is damaged: a number does not end")

    def _zigzag(self) -> int:
        number = self._varint()
        return (number >> 1) ^ -(number & 1)
