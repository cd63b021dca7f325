"""Tables of labels: which part of which recording is which utterance."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from m3er_fast.corpus._labels import classes_named, label_name
from m3er_fast.corpus.base import CorpusError, naming, split_name
from m3er_fast.corpus.files import decoding
from m3er_fast.recordings.utterances import Utterance


@dataclass(frozen=True)
class Labels:
    """The utterances that a table names."""

    utterances: Mapping[str, tuple[Utterance, ...]]
    """Recording, by its name without the ending -> its utterances."""
    classes: tuple[str, ...]
    """Empty where no row has a label."""


def read_labels_table(path: str | Path) -> Labels:
    """Read a CSV file with one row per utterance.

    Columns, in any order; only ``id`` is needed:

    * ``id``: of the utterance, unique;
    * ``recording``: its file, with or without the ending; without this column, ``group``, or else ``id``;
    * ``start``, ``end``: seconds; blank is the start or the end of the recording;
    * ``label``: name of a class; blank is no label;
    * ``split``: such as train, valid or test; all rows have one, or none;
    * ``group``: what splits must not share, such as the speaker; without this column, the recording.

    Raises:
        CorpusError: if the file cannot be read, naming the line.
    """
    with naming(path), decoding(path, "not readable as a table of labels"):
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            columns = [name.strip().lower() for name in rows.fieldnames or ()]
            rows.fieldnames = columns
            if "id" not in columns:
                raise CorpusError(f"there must be a column 'id', got {', '.join(columns) or 'none'}")
            source = next(name for name in ("recording", "group", "id") if name in columns)
            found: dict[str, list[Utterance]] = {}
            seen: set[str] = set()
            for row in rows:
                with naming(f"line {rows.line_num}"):
                    recording = Path(_text(row, source, needed=True) or "").with_suffix("").as_posix()
                    utterance = _utterance(row, recording)
                    if utterance.id in seen:
                        raise CorpusError(f"id {utterance.id!r} occurs twice")
                    seen.add(utterance.id)
                    found.setdefault(recording, []).append(utterance)
        utterances = [utterance for parts in found.values() for utterance in parts]
        splits = {utterance.split is None for utterance in utterances}
        if len(splits) > 1:
            raise CorpusError("column 'split': some rows have a split and some have none")
    names = [utterance.label for utterance in utterances]
    classes = classes_named(names) if any(names) else ()
    return Labels({name: tuple(parts) for name, parts in found.items()}, classes)


def _utterance(row: Mapping[str, str | None], recording: str) -> Utterance:
    start, end = _time(row, "start", 0.0), _time(row, "end", math.inf)
    if not start < end:
        raise CorpusError(f"the start must be before the end, got {start} and {end}")
    split = _text(row, "split")
    return Utterance(
        id=_text(row, "id", needed=True) or "",
        start=start,
        end=end,
        label=label_name(row.get("label")),
        split=None if split is None else split_name(split),
        group=_text(row, "group") or recording,
    )


def _text(row: Mapping[str, str | None], column: str, *, needed: bool = False) -> str | None:
    value = row.get(column)
    if value is not None and value.strip():
        return value.strip()
    if needed:
        raise CorpusError(f"column {column!r} is blank")
    return None


def _time(row: Mapping[str, str | None], column: str, default: float) -> float:
    text = _text(row, column)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise CorpusError(f"column {column!r} must be a number of seconds, got {text!r}")
    return value
