"""From a published feature file to this project's corpus format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from m3er_fast.corpus import csd, iemocap_pickle, mfn_h5, mmsa_pickle, mult_pickle, utterance_csv
from m3er_fast.corpus.base import Corpus
from m3er_fast.corpus.parquet import write_parquet
from m3er_fast.corpus.splits import split_by_group

FORMATS: dict[str, Callable[[Path], Corpus]] = {
    "mfn-h5": mfn_h5.read,
    "utterance-csv": utterance_csv.read,
    "csd": csd.read,
    "mmsa-pkl": mmsa_pickle.read,
    "mult-pkl": mult_pickle.read,
    "iemocap-pkl": iemocap_pickle.read,
}
"""Reader of each format, by its name on the command line."""


def read(source: str | Path, format: str) -> Corpus:
    """Read ``source``, a file or folder in one of `FORMATS`.

    Raises:
        ValueError: an unknown format.
        CorpusError: the source cannot be read; see the reader.
        ImportError: the format needs a package that is not installed.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    return FORMATS[format](Path(source))


def convert(source: str | Path, format: str, out: str | Path, *, resplit: bool = False) -> Corpus:
    """Read ``source``, write it to the folder ``out`` as Parquet and return it.

    A source without splits is split by group, 7:1:2, with seed 0, so that all later runs share one split. With
    ``resplit`` so is one that has splits, such as one whose training split lacks a modality.

    Raises:
        ValueError, CorpusError, ImportError: as `read` and `write_parquet`.
    """
    corpus = read(source, format)
    if corpus.split is None or resplit:
        corpus = split_by_group(corpus)
    write_parquet(corpus, out)
    return corpus
