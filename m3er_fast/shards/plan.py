"""The shards of a corpus on any Arrow filesystem, each with a checksum."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from m3er_fast._validation import check_choice
from m3er_fast.corpus.base import CorpusError
from m3er_fast.corpus.files import is_hidden

SUFFIXES = (".parquet", ".arrow", ".feather")
_SAMPLE_BYTES = 64 * 2**10
_CHUNK_BYTES = 4 * 2**20
_THREADS = 16  # checksums wait for storage, not for a core
_URI_SCHEMES = {"s3": "s3", "gcs": "gs", "abfs": "abfs", "hdfs": "hdfs"}  # by the type_name of a filesystem

Checksum: TypeAlias = Literal["sampled", "full"]
"""The part of a shard that is hashed: its size and first and last 64 KiB, or all of it."""

Source: TypeAlias = str | Path | tuple[Any, str]
"""A local path, a URI such as ``s3://bucket/corpus``, or a pair of a ``pyarrow.fs.FileSystem`` and a path on it."""


class Location(NamedTuple):
    """A path on a filesystem. It can be pickled."""

    filesystem: Any  # pyarrow.fs.FileSystem
    path: str

    @property
    def is_local(self) -> bool:
        """Whether the filesystem is a local one, where files can be synced and mapped."""
        return bool(self.filesystem.type_name == "local")

    def join(self, name: str) -> str:
        """Return the path of a file in this folder."""
        return f"{self.path.rstrip('/')}/{name}"

    def __str__(self) -> str:
        """Return a path, or a URI without the keys and options that it may have had."""
        scheme = _URI_SCHEMES.get(self.filesystem.type_name)
        return f"{scheme}://{self.path}" if scheme else self.path


class Shard(NamedTuple):
    """One file of a corpus."""

    name: str  # of the file in the corpus's folder, such as "part.parquet" or "split=train/part.parquet"
    path: str  # on the corpus's filesystem
    size: int  # bytes
    checksum: str  # BLAKE2, sampled or full; rewriting a Parquet file changes its footer

    @property
    def output_name(self) -> str:
        """Name of the file with its scores: all are in one folder."""
        name = self.name.replace("/", "-")
        return name if name.endswith(".parquet") else f"{name}.parquet"


class QuarantinedShard(NamedTuple):
    """A shard of the corpus that could not be read."""

    shard: str
    reason: str


class Plan(NamedTuple):
    """The shards of a corpus, sorted by name, and its location. It can be pickled."""

    corpus: Location
    shards: tuple[Shard, ...]


def locate(source: Source) -> Location:
    """Return the location of a path, a URI, or a path on a filesystem.

    Raises:
        ImportError: pyarrow is missing.
        ValueError: there is no filesystem for the URI. The part before an ``@``, which may hold keys, is not shown.
    """
    try:
        import pyarrow as pa
        from pyarrow import fs
    except ImportError as error:
        raise ImportError("scoring needs pyarrow: pip install 'm3er-fast[score]'") from error
    if isinstance(source, tuple):
        filesystem, path = source
    elif isinstance(source, str) and "://" in source:
        try:
            filesystem, path = fs.FileSystem.from_uri(source)
        except (pa.ArrowException, OSError) as error:
            keys = source.partition("://")[2].rpartition("@")[0]
            reason = str(error).replace(keys, "...") if keys else str(error)
            raise ValueError(f"no filesystem for this URI: {reason}") from None
    else:
        # Absolute, since Ray workers run in another folder.
        filesystem, path = fs.LocalFileSystem(), str(Path(source).absolute())
    while isinstance(filesystem, fs.SubTreeFileSystem):
        filesystem, path = filesystem.base_fs, filesystem.base_path.rstrip("/") + "/" + path.lstrip("/")
    return Location(filesystem, str(path))


def plan_shards(source: Source, checksum: Checksum = "sampled") -> Plan:
    """List the Parquet and Arrow IPC files of a corpus: a folder of them, or one file.

    Hidden files (`m3er_fast.corpus.files`) are left out. In a folder, those in folders such as ``split=train`` are
    listed too.

    Args:
        source: its location.
        checksum: the part of each shard that is hashed; "full" reads the whole corpus.

    Raises:
        ValueError: ``checksum`` is out of range.
        CorpusError: there is no such file, none in the folder, or two whose scores would have the same name.
    """
    check_choice("checksum", checksum, Checksum)
    corpus = locate(source)
    try:
        files = _list_files(corpus)
    except UnicodeDecodeError as error:
        raise CorpusError(f"{corpus}: holds a file whose name is not UTF-8: {error.object!r}") from error
    with ThreadPoolExecutor(_THREADS) as pool:
        checksums = pool.map(lambda file: checksum_of(corpus.filesystem, file[1].path, file[1].size, checksum), files)
        shards = tuple(
            Shard(name, file.path, file.size, checksum) for (name, file), checksum in zip(files, checksums, strict=True)
        )
    _check_names(shards)
    return Plan(corpus, shards)


def _list_files(corpus: Location) -> list[tuple[str, Any]]:
    """Return the files of a corpus with their names in it, sorted by name."""
    from pyarrow import fs

    found = corpus.filesystem.get_file_info(corpus.path)
    if found.type == fs.FileType.File:
        return [(found.base_name, found)]
    if found.type != fs.FileType.Directory:
        raise CorpusError(f"{corpus}: no such file or folder")
    files = sorted(_files_below(corpus.filesystem, corpus.path, ""), key=lambda entry: entry[0])
    if not files:
        raise CorpusError(f"{corpus}: holds no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file")
    return files


def _files_below(filesystem: Any, path: str, prefix: str) -> Iterator[tuple[str, Any]]:
    from pyarrow import fs

    for info in filesystem.get_file_info(fs.FileSelector(path)):
        name = str(info.base_name)
        if is_hidden(name):
            continue
        if info.type == fs.FileType.File and name.endswith(SUFFIXES):
            yield f"{prefix}{name}", info
        elif info.type == fs.FileType.Directory and "=" in name:
            yield from _files_below(filesystem, info.path, f"{prefix}{name}/")


def _check_names(shards: Iterable[Shard]) -> None:
    seen: dict[str, str] = {}
    for shard in shards:
        if shard.output_name in seen:
            raise CorpusError(f"{seen[shard.output_name]} and {shard.name} would both have scores {shard.output_name}")
        seen[shard.output_name] = shard.name


def checksum_of(filesystem: Any, path: str, size: int, kind: Checksum) -> str:
    """Return the checksum of a file, or what stands in for that of one that cannot be read."""
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    try:
        with filesystem.open_input_file(path) as file:
            if kind == "full":
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
            else:
                digest.update(file.read(_SAMPLE_BYTES))
                if size > _SAMPLE_BYTES:
                    file.seek(max(_SAMPLE_BYTES, size - _SAMPLE_BYTES))
                    digest.update(file.read())
    except OSError as error:  # the shard will be put in quarantine when it is read
        return f"unreadable: {type(error).__name__}"
    return digest.hexdigest()
