"""A folder that a run writes to file by file, from which a killed run can be resumed and a finished one recognised.

* ``_manifest.json``: the *fingerprint* of the run, everything that the files in it depend on. It is written first;
* files that get their names when they are complete and on the disk, so a file with its name is finished;
* ``_quarantine.json``, unless it would be empty: the inputs that could not be read, each with the reason;
* ``_summary.json`` and ``_summary.html``;
* ``_SUCCESS``, empty, written last: every input is either finished or in quarantine.

The names of files that hold no data begin with ``_``: pandas, pyarrow and Hugging Face datasets then read the folder as
one data set.

The folder may be on any Arrow filesystem. On a local filesystem, files are synced before they get their names. On an
object store the name is given by a copy, which appears as a whole.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, ClassVar

from m3er_fast.atomic_files import sync
from m3er_fast.shards.plan import Location, QuarantinedShard

MANIFEST, QUARANTINE, SUCCESS = "_manifest.json", "_quarantine.json", "_SUCCESS"
SUMMARY, SUMMARY_PAGE = "_summary.json", "_summary.html"
_PARTIAL = ".partial"


class OutputMismatchError(RuntimeError):
    """A folder was made with other inputs or settings than those that it is to be resumed with."""


@dataclass(frozen=True)
class RunFolder:
    """A folder that a run writes to; a subclass says what it holds and what that depends on. It can be pickled.

    Args:
        location: path of the folder, which need not exist.
    """

    location: Location

    contents: ClassVar[str]
    """What the folder holds, such as "scores", for messages."""
    kinds: ClassVar[Mapping[str, str]]
    """What each key of the fingerprint says about them, in the order in which differences are reported."""
    shown: ClassVar[tuple[str, ...]] = ()
    """The keys whose values a message shows."""
    earlier_names: ClassVar[tuple[str, ...]] = ()
    """Names that earlier versions gave to the files above; the first is that of the manifest."""

    def fingerprint(self) -> dict[str, Any]:
        """Return everything that the files depend on, as JSON."""
        raise NotImplementedError

    def comparable(self, fingerprint: dict[str, Any]) -> dict[str, Any]:
        """Return what of a fingerprint must be equal for a run to be resumed."""
        return fingerprint

    def begin(self, *, resume: bool) -> None:
        """Prepare the folder for writing. Inputs that an earlier run put in quarantine will be tried again.

        Raises:
            ValueError: the folder is a file, or it is not empty and ``resume`` is False.
            OutputMismatchError: what the folder holds was made with something else.
            OSError: the folder cannot be written to.
        """
        existing = self.check(resume=resume)
        if existing:
            self._check_fingerprint()
        self.location.filesystem.create_dir(self.location.path, recursive=True)
        for name in existing:
            if name in (SUCCESS, QUARANTINE, SUMMARY, SUMMARY_PAGE) or name.endswith(_PARTIAL):
                self._delete(name)
        self.write_json(MANIFEST, self.fingerprint())
        for name in self.earlier_names:  # only now: an interrupted start leaves a manifest under one of its names
            if name in existing:
                self._delete(name)

    def check(self, *, resume: bool) -> list[str]:
        """Return the names in the folder, if it may be written to.

        Raises:
            ValueError: it is a file, or it is not empty and ``resume`` is False.
        """
        from pyarrow import fs

        found = self.location.filesystem.get_file_info(self.location.path)
        if found.type == fs.FileType.File:
            raise ValueError(f"{self.location} is a file, wanted a folder to write {self.contents} to")
        if found.type != fs.FileType.Directory:
            return []
        names = self._names()
        if names and not resume:
            raise ValueError(f"{self.location} is not empty: resume the run (--resume), or name another folder")
        return names

    def manifest(self) -> dict[str, Any] | None:
        """Return the fingerprint that the folder was begun with, or None if it has none.

        Raises:
            OutputMismatchError: its manifest is not one.
        """
        for name in (MANIFEST, *self.earlier_names[:1]):
            path = self.location.join(name)
            try:
                with self.location.filesystem.open_input_file(path) as file:
                    found = json.loads(file.read())
            except (FileNotFoundError, NotADirectoryError):
                continue
            except ValueError as error:
                raise OutputMismatchError(f"{path} is not a manifest: {error}") from error
            if not isinstance(found, dict):
                raise OutputMismatchError(f"{path} is not a manifest")
            return found
        return None

    def quarantine(self, entries: Iterable[QuarantinedShard]) -> None:
        """Replace the quarantine list."""
        self.write_json(QUARANTINE, [entry._asdict() for entry in entries])

    def write_summary(self, summary: Mapping[str, Any], page: str) -> None:
        """Write the summary, as JSON and as a page.

        Raises:
            OSError: it cannot be written.
        """
        self.write_json(SUMMARY, summary)
        with self.atomic_file(SUMMARY_PAGE) as file:
            file.write(page.encode())

    def finish(self) -> None:
        """Remove files that lost workers left incomplete, and mark the folder as finished."""
        for name in self._names():
            if name.endswith(_PARTIAL):
                self._delete(name)
        with self.atomic_file(SUCCESS):
            pass

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as JSON.

        Raises:
            OSError: it cannot be written.
        """
        with self.atomic_file(name) as file:
            file.write((json.dumps(value, indent=2) + "\n").encode())

    @contextmanager
    def atomic_file(self, name: str) -> Iterator[Any]:
        """Open a file under a temporary name, and give it its name once it has reached the disk.

        Raises:
            OSError: it cannot be written.
        """
        filesystem, path = self.location.filesystem, self.location.join(name)
        # Unique: if a worker was considered lost too early, two workers may write the same file.
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

    def _check_fingerprint(self) -> None:
        found = self.manifest()
        if found is None:
            raise OutputMismatchError(f"{self.location} holds no {self.contents} to resume: it has no {MANIFEST}")
        found, wanted = self.comparable(found), self.comparable(self.fingerprint())
        for key, kind in self.kinds.items():
            if found.get(key) != wanted[key]:
                detail = f": {found.get(key)}, now {wanted[key]}" if key in self.shown else ""
                raise OutputMismatchError(
                    f"{self.location} holds {self.contents} made with another {kind}{detail}; name another folder"
                )

    def _names(self) -> list[str]:
        from pyarrow import fs

        found = self.location.filesystem.get_file_info(fs.FileSelector(self.location.path))
        return [str(file.base_name) for file in found]

    def _sync(self, path: str) -> None:
        if self.location.is_local:
            sync(path)

    def _delete(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self.location.filesystem.delete_file(self.location.join(name))
