"""The folder that scores are written to.

It is a :class:`~m3er_fast.execution.run_folder.RunFolder`, with one Parquet file per shard of the corpus, of the same
name (columns: :mod:`m3er_fast.scoring.columns`). The manifest holds the version, the signature of the model, the
settings that scores depend on, and the shards of the corpus with sizes and checksums.

Everything but the summary's times depends only on the model and the corpus: a run that was interrupted and resumed
leaves the same bytes as one that was not. Folders of earlier versions, whose manifest has no ``_``, are resumed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from m3er_fast.execution.run_folder import OutputMismatchError, RunFolder
from m3er_fast.scoring.columns import ScoreColumns
from m3er_fast.scoring.scorer import SIGNATURE_KEY
from m3er_fast.shards.plan import Shard

if TYPE_CHECKING:
    import pyarrow as pa

INPUT_KEY = b"m3er_fast.input"
_ROW_GROUP_ROWS = 2**16  # so many that a row group outweighs its metadata


class FinishedShard(NamedTuple):
    """Counts of a shard that has been scored already."""

    rows: int
    errors: int


@dataclass(frozen=True)
class OutputFolder(RunFolder):
    """A folder of scores. It can be pickled.

    Args:
        location: path of the folder, which need not exist.
        shards: the files of the corpus.
        signature: of the model.
        settings: other things that scores depend on.
    """

    shards: tuple[Shard, ...]
    signature: str
    settings: dict[str, Any]

    contents: ClassVar[str] = "scores"
    kinds: ClassVar[dict[str, str]] = {
        "signature": "model",
        "shards": "corpus",
        "version": "version of m3er-fast",
        "settings": "setting",
    }
    shown: ClassVar[tuple[str, ...]] = ("settings", "version")
    earlier_names: ClassVar[tuple[str, ...]] = ("manifest.json", "quarantine.json", "summary.json", "summary.html")

    def fingerprint(self) -> dict[str, Any]:
        """Return everything that the scores depend on, as JSON."""
        from m3er_fast import __version__

        return {
            "version": __version__,
            "signature": self.signature,
            "settings": self.settings,
            "shards": [{"name": s.name, "bytes": s.size, "checksum": s.checksum} for s in self.shards],
        }

    def comparable(self, fingerprint: dict[str, Any]) -> dict[str, Any]:
        """Compare shards by name: a changed one is refused when it has scores, but may repair one in quarantine."""
        return {**fingerprint, "shards": _names(fingerprint.get("shards"))}

    def finished(self, shard: Shard) -> FinishedShard | None:
        """Return the counts of a shard that has been scored already, or None.

        Raises:
            OutputMismatchError: the scores are those of another file of this name, or lack a column.
            CorpusError: the scores do not say which columns they have.
        """
        import pyarrow as pa
        import pyarrow.parquet

        try:
            with self.location.filesystem.open_input_file(self.location.join(shard.output_name)) as file:
                metadata = pyarrow.parquet.read_metadata(file)
        except (OSError, pa.ArrowException):  # missing, or incomplete although it has its name
            return None
        keys = metadata.metadata or {}
        if keys.get(SIGNATURE_KEY, b"").decode() != self.signature:
            return None
        if keys.get(INPUT_KEY, b"").decode() != _input_of(shard):
            raise OutputMismatchError(
                f"{self.location} holds scores made with another corpus: {shard.name} has changed since"
            )
        missing = ScoreColumns.of_metadata(keys).missing_from(metadata.schema.names)
        if missing:
            raise OutputMismatchError(
                f"{self.location} holds scores made with another version of m3er-fast: those of {shard.name} have no "
                f"column {missing[0]!r}; name another folder"
            )
        return FinishedShard(int(metadata.num_rows), _count_errors(metadata))

    @contextmanager
    def writer(self, shard: Shard, schema: pa.Schema) -> Iterator[ScoreWriter]:
        """Open a writer for the scores of a shard; the file gets its name if the block ends without an exception.

        Raises:
            OSError: they cannot be written.
        """
        schema = schema.with_metadata({**(schema.metadata or {}), INPUT_KEY: _input_of(shard)})
        with self.atomic_file(shard.output_name) as file, _parquet_writer(file, schema) as parquet:
            writer = ScoreWriter(parquet, schema)
            yield writer
            writer.flush(last=True)


def _parquet_writer(file: Any, schema: pa.Schema) -> Any:
    """Return a Parquet writer that nothing closes but its own ``with`` block.

    An interrupt may strike while the block closes it. By then its file is closed and deleted, and a finalizer that
    closed the writer again would print an error that nobody can catch.
    """
    import pyarrow.parquet

    class WriterWithoutFinalizer(pyarrow.parquet.ParquetWriter):  # type: ignore[misc]
        def __del__(self) -> None:
            pass

    return WriterWithoutFinalizer(file, schema, write_page_checksum=True)


class ScoreWriter:
    """Writes tables of scores in row groups of equal size.

    Attributes:
        rows: rows added so far.
        errors: rows among them that could not be scored.
    """

    def __init__(self, parquet: Any, schema: pa.Schema) -> None:
        self._parquet, self._schema = parquet, schema
        self._waiting: list[pa.Table] = []
        self.rows = self.errors = 0

    def write(self, scores: pa.Table) -> None:
        """Add rows."""
        self.rows += scores.num_rows
        self.errors += scores.num_rows - scores["error"].null_count
        self._waiting.append(scores.replace_schema_metadata(self._schema.metadata))
        self.flush()

    def flush(self, *, last: bool = False) -> None:
        """Write the row groups that are full, and the remaining rows if they are the last."""
        import pyarrow as pa

        rows = sum(table.num_rows for table in self._waiting)
        if rows < _ROW_GROUP_ROWS and not (last and rows):
            return
        table = pa.concat_tables(self._waiting)
        complete = rows if last else rows - rows % _ROW_GROUP_ROWS
        self._parquet.write_table(table.slice(0, complete), row_group_size=_ROW_GROUP_ROWS)
        self._waiting = [table.slice(complete)] if complete < rows else []


def _names(shards: Any) -> Sequence[Any] | None:
    if not isinstance(shards, list) or not all(isinstance(shard, dict) for shard in shards):
        return None
    return [shard.get("name") for shard in shards]


def _input_of(shard: Shard) -> str:
    return f"{shard.size} {shard.checksum}"


def _count_errors(metadata: Any) -> int:
    """Return the number of rows with an error, from the statistics in a footer."""
    errors = 0
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        column = next(
            chunk
            for chunk in (row_group.column(index) for index in range(row_group.num_columns))
            if chunk.path_in_schema == "error"
        )
        errors += row_group.num_rows - column.statistics.null_count
    return errors
