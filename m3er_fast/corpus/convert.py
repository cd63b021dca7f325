"""Published feature files: the known formats, and their conversion to this project's corpus format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from m3er_fast.corpus import csd, iemocap_pickle, mfn_h5, mmsa_pickle, mult_pickle, utterance_csv
from m3er_fast.corpus.base import Corpus
from m3er_fast.corpus.parquet import write_parquet
from m3er_fast.corpus.splits import split_by_group


@dataclass(frozen=True)
class Format:
    """A file format: its reader, and a description for the command line. Calling it reads a file or folder."""

    read: Callable[[Path], Corpus]
    about: str

    def __call__(self, source: Path) -> Corpus:
        """Read a file or folder; see the reader."""
        return self.read(source)


FORMATS: dict[str, Format] = {
    "mfn-h5": Format(mfn_h5.read, "folder of MFN's .h5 files"),
    "utterance-csv": Format(utterance_csv.read, "folder of CSV files, a vector per utterance"),
    "csd": Format(csd.read, "folder of .csd files of the CMU Multimodal SDK"),
    "mmsa-pkl": Format(mmsa_pickle.read, "pickle of MMSA"),
    "mult-pkl": Format(mult_pickle.read, "pickle of MulT or MultiBench"),
    "iemocap-pkl": Format(iemocap_pickle.read, "pickle of IEMOCAP's raw features"),
}
"""The formats by name. This is the only list of them: help texts and error messages are made from it."""


def describe_formats() -> str:
    """Return the names and descriptions of all formats, for a help text."""
    return ", ".join(f"{name} ({format.about})" for name, format in FORMATS.items())


def read(source: str | Path, format: str) -> Corpus:
    """Read a file or folder in one of the `FORMATS`.

    Raises:
        ValueError: if the format is unknown.
        CorpusError: if the source cannot be read; see the reader.
        ImportError: if the format needs a package that is not installed.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    return FORMATS[format](Path(source))


def convert(source: str | Path, format: str, out: str | Path, *, resplit: bool = False) -> Corpus:
    """Read ``source``, write it to the folder ``out`` as Parquet, and return it.

    Args:
        source: a file or folder.
        format: a name in `FORMATS`.
        out: a folder that holds no corpus yet.
        resplit: replace the splits of the source, for example because its training split lacks a modality. A source
            without splits is always split. Splits are by group, 7:1:2, with seed 0, so all later runs share them.

    Raises:
        ValueError, CorpusError, ImportError: as `read` and `write_parquet`.
    """
    corpus = read(source, format)
    if corpus.split is None or resplit:
        corpus = split_by_group(corpus)
    write_parquet(corpus, out)
    return corpus
