"""The folder that scores are written to, from which a killed run can be resumed and a finished one recognised.

* ``_manifest.json``: version, signature of the model, settings that scores depend on, and the shards of the corpus with
  sizes and checksums: the *fingerprint* of the run. It is written first;
* one Parquet file per shard of the corpus, of the same name (columns: :mod:`m3er_fast.scoring.columns`). It gets its
  name when it is complete and on the disk, so a file with that name is finished;
* ``_quarantine.json``, unless it would be empty: the shards that could not be read, each with the reason;
* ``_summary.json`` and ``_summary.html``: the counts of the scores (:mod:`m3er_fast.scoring.summary`);
* ``_SUCCESS``, empty, written last: every shard is either scored or in quarantine.

The names of files that hold no scores begin with ``_``: pandas, pyarrow and Hugging Face datasets then read the folder
as one data set. Folders of earlier versions, without the ``_``, are resumed.

Everything but the summary's times depends only on the model and the corpus: a run that was interrupted and resumed
leaves the same bytes as one that was not.

The folder may be on any Arrow filesystem. On a local filesystem, files are synced before they get their names. On an
object store the name is given by a copy, which appears as a whole.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from m3er_fast.atomic_files import sync
from m3er_fast.scoring.columns import ScoreColumns
from m3er_fast.scoring.scorer import SIGNATURE_KEY
from m3er_fast.shards.plan import Location, QuarantinedShard, Shard

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST, QUARANTINE, SUCCESS = "_manifest.json", "_quarantine.json", "_SUCCESS"
SUMMARY, SUMMARY_PAGE = "_summary.json", "_summary.html"
_EARLIER_MANIFEST = "manifest.json"
_EARLIER_NAMES = (_EARLIER_MANIFEST, "quarantine.json", "summary.json", "summary.html")
INPUT_KEY = b"m3er_fast.input"
_PARTIAL = ".partial"
_ROW_GROUP_ROWS = 2**16  # so many that a row group outweighs its metadata


class OutputMismatchError(RuntimeError):
    """A folder of scores was made with another model or corpus than the one it is to be resumed with."""


class FinishedShard(NamedTuple):
    """Counts of a shard that has been scored already."""

    rows: int
    errors: int


@dataclass(frozen=True)
class OutputFolder:
    """A folder of scores, with the files that the module lists. It can be pickled.

    Args:
        location: path of the folder, which need not exist.
        shards: the files of the corpus.
        signature: of the model.
        settings: other things that scores depend on.
    """

    location: Location
    shards: tuple[Shard, ...]
    signature: str
    settings: dict[str, Any]

    def begin(self, *, resume: bool) -> None:
        """Prepare the folder for writing. Shards that an earlier run put in quarantine will be tried again.

        Raises:
            ValueError: the folder is a file, or it is not empty and ``resume`` is False.
            OutputMismatchError: the folder holds scores of another model, corpus, setting or version.
            OSError: the folder cannot be written to.
        """
        existing = check_folder(self.location, resume=resume)
        if existing:
            self._check_fingerprint()
        self.location.filesystem.create_dir(self.location.path, recursive=True)
        for name in existing:
            if name in (SUCCESS, QUARANTINE, SUMMARY, SUMMARY_PAGE) or name.endswith(_PARTIAL):
                self._delete(name)
        self._write_json(MANIFEST, self._fingerprint())
        for name in _EARLIER_NAMES:  # only now: an interrupted start leaves a manifest under one of its names
            if name in existing:
                self._delete(name)

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
        with self._atomic_file(shard.output_name) as file, _parquet_writer(file, schema) as parquet:
            writer = ScoreWriter(parquet, schema)
            yield writer
            writer.flush(last=True)

    def quarantine(self, entries: Iterable[QuarantinedShard]) -> None:
        """Replace the quarantine list."""
        self._write_json(QUARANTINE, [entry._asdict() for entry in entries])

    def write_summary(self, summary: Mapping[str, Any], page: str) -> None:
        """Write the summary, as JSON and as a page.

        Raises:
            OSError: it cannot be written.
        """
        self._write_json(SUMMARY, summary)
        with self._atomic_file(SUMMARY_PAGE) as file:
            file.write(page.encode())

    def finish(self) -> None:
        """Remove files that lost workers left incomplete, and mark the folder as finished."""
        for name in _list_folder(self.location):
            if name.endswith(_PARTIAL):
                self._delete(name)
        with self._atomic_file(SUCCESS):
            pass

    def _fingerprint(self) -> dict[str, Any]:
        from m3er_fast import __version__

        return {
            "version": __version__,
            "signature": self.signature,
            "settings": self.settings,
            "shards": [{"name": s.name, "bytes": s.size, "checksum": s.checksum} for s in self.shards],
        }

    def _check_fingerprint(self) -> None:
        found, wanted = read_manifest(self.location), self._fingerprint()
        if found is None:
            raise OutputMismatchError(f"{self.location} holds no scores to resume: it has no {MANIFEST}")
        # Compared by name: a changed shard is refused when it has scores already, but may repair one in quarantine.
        found["shards"], wanted["shards"] = _names(found.get("shards")), _names(wanted["shards"])
        kinds = {"signature": "model", "shards": "corpus", "version": "version of m3er-fast", "settings": "setting"}
        for key, kind in kinds.items():
            if found.get(key) != wanted[key]:
                detail = f": {found.get(key)}, now {wanted[key]}" if key in ("settings", "version") else ""
                raise OutputMismatchError(
                    f"{self.location} holds scores made with another {kind}{detail}; name another folder"
                )

    def _write_json(self, name: str, value: Any) -> None:
        with self._atomic_file(name) as file:
            file.write((json.dumps(value, indent=2) + "\n").encode())

    @contextmanager
    def _atomic_file(self, name: str) -> Iterator[Any]:
        """Open a file under a temporary name, and give it its name once it has reached the disk."""
        filesystem, path = self.location.filesystem, self.location.join(name)
        # Unique: if a worker was considered lost too early, two workers may write the same shard.
        partial = self.location.join(f".{name}.{uuid.uuid4().hex}{_PARTIAL}")
        try:
            with filesystem.open_output_stream(partial) as file:
                yield file
            self._sync(partial)
            filesystem.move(partial, path)
        except BaseException:
            with suppress(OSError):
                filesystem.delete_file(partial)
            raise
        self._sync(self.location.path)

    def _sync(self, path: str) -> None:
        if self.location.is_local:
            sync(path)

    def _delete(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self.location.filesystem.delete_file(self.location.join(name))


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


def check_folder(location: Location, *, resume: bool) -> list[str]:
    """Return the names in a folder of scores, if it may be written to.

    Raises:
        ValueError: the folder is a file, or it is not empty and ``resume`` is False.
    """
    from pyarrow import fs

    found = location.filesystem.get_file_info(location.path)
    if found.type == fs.FileType.File:
        raise ValueError(f"{location} is a file, wanted a folder to write scores to")
    if found.type != fs.FileType.Directory:
        return []
    names = _list_folder(location)
    if names and not resume:
        raise ValueError(f"{location} is not empty: resume the run (--resume), or name another folder")
    return names


def _list_folder(location: Location) -> list[str]:
    from pyarrow import fs

    return [str(file.base_name) for file in location.filesystem.get_file_info(fs.FileSelector(location.path))]


def read_manifest(location: Location) -> dict[str, Any] | None:
    """Return the manifest of a folder, or None if there is none.

    Raises:
        OutputMismatchError: it is not a manifest.
    """
    for name in (MANIFEST, _EARLIER_MANIFEST):
        try:
            with location.filesystem.open_input_file(location.join(name)) as file:
                found = json.loads(file.read())
        except (FileNotFoundError, NotADirectoryError):
            continue
        except ValueError as error:
            raise OutputMismatchError(f"{location.join(name)} is not a manifest: {error}") from error
        if not isinstance(found, dict):
            raise OutputMismatchError(f"{location.join(name)} is not a manifest")
        return found
    return None


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
