"""The columns of scores: their names, types and order, declared once.

Scores have one row per utterance, in the order of the input, and the columns

* ``id``: string, as in the input;
* ``prediction``: string, the class with the highest probability (the first of equal ones);
* ``p_<class>``, one per class: float32, its probability. With activation "softmax" they sum to 1, with "sigmoid" each
  class has a probability of its own;
* ``effective_<modality>``, one per modality: bool, whether the modality was judged good and used unchanged;
* ``p_value_<modality>``, one per modality: float32, the p-value behind this verdict; 0 where the modality is
  unavailable;
* ``reason_<modality>``, one per modality: string, why the modality check rejected it, a text of
  ``ModalityCheck.reasons`` such as "frozen"; null where it was not rejected or is unavailable;
* ``abstained``: bool, whether no modality was effective, so that the prediction rests on nothing that can be trusted;
* ``label``: string, the class of the corpus's own label, or ``label_<class>``, one per class: float32, its answers or
  probabilities. Only of a corpus with a column ``label``; null where there is no label that the model's classes allow;
* ``error``: string, null where there is none. It says why a row could not be scored. All other columns but ``id`` are
  then null, and so is ``id`` if it is itself at fault.

The schema's metadata name the classes and modalities in order: a class named ``value_text`` and the p-value of ``text``
cannot be distinguished by the names of columns.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from m3er_fast.corpus.base import CorpusError
from m3er_fast.fusion import M3ERFusion

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS_KEY = b"m3er_fast.columns"
TASK_KEY = b"m3er_fast.task"
"""The task of the labels beside the scores."""
CALIBRATION_KEY = b"m3er_fast.calibration"
"""How logits became probabilities: JSON of the ``activation`` and the ``temperature``."""


class ScoreColumns(NamedTuple):
    """The classes and modalities that a table of scores has columns for."""

    classes: tuple[str, ...]
    modalities: tuple[str, ...]

    @classmethod
    def of_model(cls, model: M3ERFusion) -> ScoreColumns:
        """Return the columns of a model's scores.

        Raises:
            ValueError: two columns would have the same name.
        """
        columns = cls(tuple(model.classes), tuple(model.input_dims))
        counts = Counter(name for name, _ in columns._fields_of_schema())
        clashing = [name for name in columns.classes if counts[columns.probability(name)] > 1]
        if clashing:
            raise ValueError(
                f"classes {clashing} would share a column of the scores with a modality's p-value: rename them"
            )
        return columns

    @classmethod
    def of_metadata(cls, metadata: Mapping[bytes, bytes] | None) -> ScoreColumns:
        """Return the columns of scores that were read, from the metadata of their schema or file.

        Raises:
            CorpusError: the metadata do not name them.
        """
        try:
            names = json.loads((metadata or {})[COLUMNS_KEY])
            return cls(tuple(names["classes"]), tuple(names["modalities"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CorpusError(f"the metadata {COLUMNS_KEY.decode()!r} do not name classes and modalities") from error

    def missing_from(self, names: Iterable[str]) -> list[str]:
        """Return the names of columns that are not among these, as in scores of an earlier version."""
        found = set(names)
        return [name for name, _ in self._fields_of_schema() if name not in found]

    def schema(self, metadata: Mapping[bytes, str], task: str | None = None) -> pa.Schema:
        """Return the schema of scores, with these metadata and the names of classes and modalities.

        Args:
            metadata: further ones.
            task: of the labels beside the scores, or None if there are none.
        """
        import pyarrow as pa

        *scores, error = self._fields_of_schema()
        about = {**metadata, COLUMNS_KEY: json.dumps(self._asdict()), **({TASK_KEY: task} if task else {})}
        return pa.schema([*scores, *self._label_fields(task), error], metadata=about)

    @property
    def label(self) -> str:
        """The name of the column with the class of a label."""
        return "label"

    def label_of(self, name: str) -> str:
        """Return the name of the column with a class's answer or probability in a label."""
        return f"label_{name}"

    def probability(self, name: str) -> str:
        """Return the name of the column with a class's probability."""
        return f"p_{name}"

    def effective(self, name: str) -> str:
        """Return the name of the column that says whether a modality was effective."""
        return f"effective_{name}"

    def p_value(self, name: str) -> str:
        """Return the name of the column with a modality's p-value."""
        return f"p_value_{name}"

    def reason(self, name: str) -> str:
        """Return the name of the column that says why a modality was rejected."""
        return f"reason_{name}"

    def _label_fields(self, task: str | None) -> list[tuple[str, Any]]:
        import pyarrow as pa

        if task is None:
            return []
        if task == "single":
            return [(self.label, pa.string())]
        return [(self.label_of(name), pa.float32()) for name in self.classes]

    def _fields_of_schema(self) -> list[tuple[str, Any]]:
        import pyarrow as pa

        return [
            ("id", pa.string()),
            ("prediction", pa.string()),
            *((self.probability(name), pa.float32()) for name in self.classes),
            *((self.effective(name), pa.bool_()) for name in self.modalities),
            *((self.p_value(name), pa.float32()) for name in self.modalities),
            *((self.reason(name), pa.string()) for name in self.modalities),
            ("abstained", pa.bool_()),
            ("error", pa.string()),
        ]
