"""The folder that scores are written to: what makes a killed run resumable and a finished one recognisable.

* ``manifest.json``: version, signature of the model and the shards of the corpus with their sizes, the *fingerprint*
  of the run; written first;
* one Parquet file a shard of the corpus, of the same name (columns: :mod:`m3er_fast.scoring.scorer`). It gets its name
  when it is whole and on the disk, so a file that is there is finished;
* ``quarantine.json``, only if there is something in it: the shards that could not be read, each with the reason;
* ``_SUCCESS``, empty, written last: every shard is either scored or in quarantine.

All of it depends on the model and the corpus alone: an interrupted and resumed run leaves the same bytes as another.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from m3er_fast.scoring.scorer import SIGNATURE_KEY

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST, QUARANTINE, SUCCESS = "manifest.json", "quarantine.json", "_SUCCESS"
_PARTIAL = ".partial"


class OutputMismatchError(RuntimeError):
    """A folder of scores was made from another model or corpus than the one that it should be resumed with."""


class QuarantinedShard(NamedTuple):
    """A shard of the corpus that could not be scored."""

    shard: str
    reason: str


class OutputFolder:
    """A folder of scores; see the module for what it holds.

    Args:
        path: the folder; it need not exist.
        shards: the files of the corpus.
        signature: of the model.
        resume: whether to go on with what the folder holds; otherwise it must be empty.

    Raises:
        ValueError: the folder is a file, or it is not empty and ``resume`` is False.
        OutputMismatchError: what the folder holds was made from something else.
    """

    def __init__(self, path: Path, shards: Sequence[Path], signature: str, *, resume: bool) -> None:
        from m3er_fast import __version__

        self.path = path
        self.quarantined: list[QuarantinedShard] = []
        self._fingerprint = {
            "version": __version__,
            "signature": signature,
            "shards": [{"name": shard.name, "bytes": shard.stat().st_size} for shard in shards],
        }
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file, wanted a folder to write scores to")
        if path.is_dir() and any(path.iterdir()):
            if not resume:
                raise ValueError(f"{path} is not empty: resume what it holds (--resume), or name another folder")
            self._check_fingerprint()

    def _check_fingerprint(self) -> None:
        try:
            found = json.loads((self.path / MANIFEST).read_bytes())
        except FileNotFoundError as error:
            raise OutputMismatchError(f"{self.path} holds no scores to resume: it has no {MANIFEST}") from error
        except ValueError as error:
            raise OutputMismatchError(f"{self.path / MANIFEST} is not a manifest: {error}") from error
        for key, kind in (("signature", "model"), ("shards", "corpus"), ("version", "version of m3er-fast")):
            if not isinstance(found, dict) or found.get(key) != self._fingerprint[key]:
                raise OutputMismatchError(f"{self.path} holds scores made with another {kind}: name another folder")

    def begin(self) -> None:
        """Make the folder ready for writing. What an earlier run had in quarantine will be tried again."""
        self.path.mkdir(parents=True, exist_ok=True)
        for stale in (self.path / SUCCESS, self.path / QUARANTINE, *self.path.glob(f"*{_PARTIAL}")):
            stale.unlink(missing_ok=True)
        self._write_json(MANIFEST, self._fingerprint)

    def finished_rows(self, shard: str) -> int | None:
        """Rows of a shard whose scores are there already, or None."""
        import pyarrow as pa
        import pyarrow.parquet

        try:
            metadata = pyarrow.parquet.read_metadata(self.path / shard)
        except (OSError, pa.ArrowException):  # not there, or not whole although it has its name
            return None
        signature = (metadata.metadata or {}).get(SIGNATURE_KEY, b"").decode()
        return int(metadata.num_rows) if signature == self._fingerprint["signature"] else None

    def write(self, shard: str, scores: pa.Table) -> None:
        """Write the scores of a shard."""
        import pyarrow.parquet

        def write_table(file: IO[bytes]) -> None:
            pyarrow.parquet.write_table(scores, file, write_page_checksum=True)

        self._write(shard, write_table)

    def quarantine(self, shard: str, reason: str) -> None:
        """Put a shard on the quarantine list; the reason becomes one line."""
        self.quarantined.append(QuarantinedShard(shard, " ".join(reason.split())))
        self._write_json(QUARANTINE, [entry._asdict() for entry in self.quarantined])

    def finish(self) -> None:
        """Say that everything is done."""
        self._write(SUCCESS, lambda file: None)

    def _write_json(self, name: str, value: Any) -> None:
        content = (json.dumps(value, indent=2) + "\n").encode()
        self._write(name, lambda file: file.write(content))

    def _write(self, name: str, write_content: Callable[[IO[bytes]], Any]) -> None:
        """Write a file under a temporary name, and give it its name once it has reached the disk."""
        partial = self.path / f"{name}{_PARTIAL}"
        try:
            with partial.open("wb") as file:
                write_content(file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.path / name)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        self._sync_folder()

    def _sync_folder(self) -> None:
        """A new name is safe once its folder is on the disk too."""
        if os.name == "nt":  # where folders cannot be opened
            return
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
