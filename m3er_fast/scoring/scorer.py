"""The scorer: an Arrow table of utterances in, an Arrow table of scores out. It reads and writes no file.

Scores have one row an utterance, in the order of the input, and the columns

* ``id``: string, as in the input;
* ``prediction``: string, the class with the highest probability (of equal ones the first);
* ``p_<class>``, one a class: float32, its probability. With activation "softmax" they sum to 1, with "sigmoid" each
  answers a question of its own;
* ``effective_<modality>``, one a modality: bool, whether the modality was judged good and used as it came;
* ``p_value_<modality>``, one a modality: float32, the p-value behind this verdict; 0 where the modality is unavailable;
* ``abstained``: bool, no modality was effective, so that the prediction rests on nothing that can be trusted;

no nulls, and the schema metadata ``m3er_fast.signature`` (see :func:`m3er_fast.scoring.model_signature`) and
``m3er_fast.version``.

Dimension legend: B utterances of a batch, M modalities, C classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from sklearn.exceptions import NotFittedError

from m3er_fast.corpus.base import CorpusError
from m3er_fast.corpus.parquet import TableFeatures, features_from_table, modality_columns
from m3er_fast.fusion import M3ERFusion, M3EROutput
from m3er_fast.scoring.signature import model_signature

if TYPE_CHECKING:
    import pyarrow as pa

SIGNATURE_KEY, VERSION_KEY = b"m3er_fast.signature", b"m3er_fast.version"


class Scorer:
    """Scores tables with one model, on the device where the model is.

    Args:
        model: with a fitted check, if it has one. It is not changed; changing it later is an error.
        batch_size: utterances that go through the model at a time.

    Attributes:
        signature: the model's.
        schema: of every table of scores.

    Raises:
        NotFittedError: the model's check is not fitted.
        ValueError: ``batch_size`` < 1, or two columns of the scores would have one name.
    """

    def __init__(self, model: M3ERFusion, *, batch_size: int = 512) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a positive int, got {batch_size!r}")
        if model.modality_check is not None and not model.modality_check.is_fitted:
            raise NotFittedError("this model's modality check is not fitted: call fit, or train the model")
        self.model = model
        self.batch_size = batch_size
        self.signature = model_signature(model)
        self.schema = _schema(model, self.signature)

    def score(self, table: pa.Table) -> pa.Table:
        """Score the utterances of a table in the layout of :mod:`m3er_fast.corpus.parquet`.

        A modality of the model that has no column is unavailable. Labels, splits and groups are not looked at.

        Raises:
            CorpusError: the table holds a modality that the model does not know, or a column that cannot be read.
        """
        import pyarrow as pa

        names = list(self.model.input_dims)
        unknown = [name for name in modality_columns(table) if name not in names]
        if unknown:
            raise CorpusError(f"the corpus has modalities {unknown}, unknown to the model, which knows {names}")
        # An empty table goes through as one empty batch: its columns are checked all the same.
        starts = range(0, max(table.num_rows, 1), self.batch_size)
        return pa.concat_tables([self._score_batch(table.slice(start, self.batch_size)) for start in starts])

    def _score_batch(self, table: pa.Table) -> pa.Table:
        import pyarrow as pa

        try:
            batch = features_from_table(table, self.model.input_dims)
        except (pa.ArrowException, UnicodeDecodeError) as error:  # such as an id that is not UTF-8
            raise CorpusError(f"not readable: {error}") from error
        output, probabilities = self._classify(batch)
        columns = [
            pa.array(batch.ids.tolist(), pa.string()),
            pa.array([self.model.classes[c] for c in probabilities.argmax(axis=1)], pa.string()),
            *(pa.array(column) for column in probabilities.T),
            *(pa.array(column) for column in output.effective.cpu().numpy().T),
            *(pa.array(column) for column in output.p_value.float().cpu().numpy().T),
            pa.array(output.abstained.cpu().numpy()),
        ]
        return pa.Table.from_arrays(columns, schema=self.schema)

    @torch.inference_mode()
    def _classify(self, batch: TableFeatures) -> tuple[M3EROutput, np.ndarray]:
        """What the model says in eval mode, and the probabilities (B, C)."""
        device = next(self.model.parameters()).device
        features = {name: torch.from_numpy(values).to(device) for name, values in batch.features.items()}
        lengths, available = torch.from_numpy(batch.lengths), torch.from_numpy(batch.available)
        was_training = self.model.training
        self.model.eval()
        try:
            output = self.model(features, lengths, available)
        finally:
            self.model.train(was_training)
        return output, self.model.probabilities(output).cpu().numpy()


def _schema(model: M3ERFusion, signature: str) -> pa.Schema:
    import pyarrow as pa

    from m3er_fast import __version__

    types = {
        "id": pa.string(),
        "prediction": pa.string(),
        **{f"p_{name}": pa.float32() for name in model.classes},
        **{f"effective_{name}": pa.bool_() for name in model.input_dims},
        **{f"p_value_{name}": pa.float32() for name in model.input_dims},
        "abstained": pa.bool_(),
    }
    if len(types) != 3 + len(model.classes) + 2 * len(model.input_dims):
        clash = [name for name in model.classes if name.removeprefix("value_") in model.input_dims]
        raise ValueError(f"classes {clash} would share a column of the scores with a modality's p-value: rename them")
    fields = [pa.field(name, kind, nullable=False) for name, kind in types.items()]
    return pa.schema(fields, metadata={SIGNATURE_KEY: signature, VERSION_KEY: __version__})
