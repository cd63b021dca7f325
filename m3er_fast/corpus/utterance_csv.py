"""Utterance vectors in CSV: a headerless file per modality and split, features first and the label last.

Layout: ``<modality>_<split>.csv`` with rows aligned across modalities, and optionally ``<split>_index.csv`` with a
header and the columns id, transcript, label.
"""

from __future__ import annotations

import csv
import re
import warnings
from pathlib import Path

import numpy as np

from m3er_fast.corpus._labels import row_ids, video_of
from m3er_fast.corpus._sequences import as_float32
from m3er_fast.corpus.base import (
    SPLIT_NAMES,
    SPLITS,
    Corpus,
    CorpusError,
    concatenate,
    naming,
    order_modalities,
    split_name,
)
from m3er_fast.corpus.files import decoding, foreign_content, visible_files

_SPELLINGS = "|".join(name for names in SPLIT_NAMES.values() for name in names)


def read(path: Path) -> Corpus:
    """Read a folder of utterance CSV files.

    Every utterance has one vector per modality, so T = 1 and every length is 1. A split may lack the file of a
    modality, which is then unavailable there. The group is the video: the part of the id before its last number. Labels
    0 and 1 are negative and positive; more than two classes are named ``class_0`` and so on.

    Raises:
        CorpusError: naming the file that is empty, ragged or not numeric, or differs from another in rows or labels.
    """
    if not path.is_dir():
        raise CorpusError(f"{path}: not a folder of CSV files")
    files: dict[str, dict[str, Path]] = {split: {} for split in SPLITS}
    for file in visible_files(path, "*.csv"):
        match = re.fullmatch(rf"(.+)_({_SPELLINGS})\.csv", file.name)
        if match:
            named = files[split_name(match[2])]
            if match[1] in named:
                raise CorpusError(f"{file}: is {match[1]} of {split_name(match[2])}, as is {named[match[1]].name}")
            named[match[1]] = file
    tables = {
        split: {name: _table(given[name]) for name in order_modalities(given)}
        for split, given in files.items()
        if given
    }
    if not tables:
        raise CorpusError(f"{path}: holds no <modality>_<split>.csv with a split among {', '.join(SPLITS)}")
    labels = {split: _labels(tables[split], files[split]) for split in tables}
    count = max(2, 1 + int(max(value.max() for value in labels.values())))
    classes = ("negative", "positive") if count == 2 else tuple(f"class_{index}" for index in range(count))
    with naming(path):
        return concatenate([_part(path, split, tables[split], labels[split], classes) for split in tables])


def _table(file: Path) -> np.ndarray:
    """Return a headerless CSV as float64 (N, d + 1)."""
    with decoding(file, "not readable as CSV"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the error below names an empty file
        try:
            table = np.loadtxt(file, delimiter=",", quotechar='"', ndmin=2, encoding="utf-8-sig", comments=None)
        except UnicodeDecodeError:
            raise
        except ValueError as error:
            reason = foreign_content(file) or str(error).splitlines()[0].split(";")[0]
            raise CorpusError(f"{file}: {reason}") from error
    if not len(table):
        raise CorpusError(f"{file}: is empty")
    if table.shape[1] < 2:
        raise CorpusError(f"{file}: has one column, wanted features and a label")
    return table


def _labels(tables: dict[str, np.ndarray], files: dict[str, Path]) -> np.ndarray:
    """Return the class indices (N,) that the files of a split agree on."""
    first = next(iter(tables))
    for name, table in tables.items():
        if len(table) != len(tables[first]):
            raise CorpusError(f"{files[name]}: has {len(table)} rows, but {files[first].name} has {len(tables[first])}")
        labels = table[:, -1]
        wrong = ~(np.isfinite(labels) & (labels >= 0) & (labels == np.round(labels)) & (labels < 1000))
        if wrong.any():
            row = int(wrong.argmax())
            raise CorpusError(f"{files[name]}: the label in row {row + 1} is {labels[row]:g}, wanted a class 0, 1, ...")
        differs = labels != tables[first][:, -1]
        if differs.any():
            raise CorpusError(
                f"{files[name]}: the label in row {int(differs.argmax()) + 1} differs from {files[first].name}: "
                f"the rows are not aligned"
            )
    return tables[first][:, -1].astype(np.int64)


def _part(
    folder: Path, split: str, tables: dict[str, np.ndarray], labels: np.ndarray, classes: tuple[str, ...]
) -> Corpus:
    rows = len(labels)
    index = next((file for name in SPLIT_NAMES[split] if (file := folder / f"{name}_index.csv").exists()), None)
    ids = row_ids(split, rows) if index is None else _index(index, labels)
    return Corpus(
        ids=ids,
        features={name: as_float32(table[:, None, :-1], folder.name) for name, table in tables.items()},
        lengths=np.ones(rows, dtype=np.int64),
        available=np.ones((rows, len(tables)), dtype=bool),
        target=labels,
        classes=classes,
        split=np.full(rows, split, dtype=object),
        group=np.array([video_of(name) for name in ids], dtype=object) if index is not None else None,
    )


def _index(file: Path, labels: np.ndarray) -> np.ndarray:
    """Return the ids (N,) of an index file, whose rows and labels must agree with the feature files."""
    with decoding(file, "not readable as CSV"), file.open(newline="", encoding="utf-8-sig") as stream:
        rows = list(csv.DictReader(stream))
    if len(rows) != len(labels):
        raise CorpusError(f"{file}: has {len(rows)} rows below its header, but the features have {len(labels)}")
    for number, (row, label) in enumerate(zip(rows, labels, strict=True), start=1):
        if not row.get("id"):
            raise CorpusError(f"{file}: row {number} has no id")
        if row.get("label") and row["label"] != str(label):
            raise CorpusError(
                f"{file}: the label in row {number} is {row['label']}, but {label} in the feature files: "
                f"the rows are not aligned"
            )
    return np.array([row["id"] for row in rows], dtype=object)
