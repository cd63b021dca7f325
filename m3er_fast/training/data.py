"""Where training's batches come from.

Dimension legend: N utterances, B utterances of a batch, M modalities, T time steps, d_m features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3er_fast.corpus.base import Corpus
from m3er_fast.corpus.splits import ensure_validation
from m3er_fast.evaluation import corpus_batches, corrupt_corpus, evaluate, labelled, labels_of
from m3er_fast.fusion import M3ERFusion
from m3er_fast.metrics import ClassificationReport
from m3er_fast.training.fingerprint import array_digest, text_digest


class TrainingBatch(NamedTuple):
    """Some labelled utterances as tensors, cut to the longest of them."""

    features: dict[str, Tensor]  # modality -> (B, T, d_m)
    lengths: Tensor  # (B,)
    available: Tensor  # (B, M) bool
    target: Tensor  # (B,) or (B, C)
    share: float = 1.0  # of the batch's mean loss, that of these utterances counts
    elsewhere: int = 0  # utterances of the batch that other processes hold

    @property
    def rows(self) -> int:
        """Number of utterances of the whole batch."""
        return len(self.lengths) + self.elsewhere

    def map(self, change: Callable[[Tensor], Tensor]) -> TrainingBatch:
        """Return the batch with every tensor changed."""
        features = {name: change(x) for name, x in self.features.items()}
        return self._replace(
            features=features,
            lengths=change(self.lengths),
            available=change(self.available),
            target=change(self.target),
        )


class Split(Protocol):
    """The labelled utterances of a split, batch by batch. Every one is in exactly one batch of a pass."""

    @property
    def rows(self) -> int:
        """Number of labelled utterances."""

    def in_order(self, size: int) -> Iterator[TrainingBatch]:
        """Yield all batches of ``size`` utterances in the order of the corpus; the last one may be smaller."""

    def shuffled(self, size: int, order: torch.Generator, start: int = 0) -> Iterator[TrainingBatch]:
        """Yield all batches from number ``start`` on, in a random order.

        Everything that decides the order is drawn from ``order`` before this returns, and does not depend on ``start``.
        """


class TrainingData(Protocol):
    """A corpus as training needs it, wherever it is kept."""

    task: str  # as of a Corpus
    classes: tuple[str, ...]
    extraction: dict[str, Any] | None

    @property
    def input_dims(self) -> dict[str, int]:
        """Feature count of each modality."""

    @property
    def training(self) -> Split:
        """The utterances to learn from."""

    @property
    def validation(self) -> Split:
        """The utterances that choose the epoch."""

    def class_weights(self) -> tuple[float, ...]:
        """Return the weights that make the classes of the training split count alike; see :func:`class_weights`."""

    def fit(self, model: M3ERFusion) -> None:
        """Learn standardiser, check and proxies of a model from the training split."""

    def fingerprint(self) -> dict[str, Any]:
        """Return everything of the corpus that decides the result of a training, by name."""

    def report(self, model: M3ERFusion, *, corruption: str | None = None) -> ClassificationReport | None:
        """Return a model's scores on the validation split, as it is or with a corruption of that name."""

    def describe(self) -> str:
        """Return the sizes of both splits in words, for the model card."""


class MemoryData:
    """A corpus in memory.

    Args:
        corpus: with labels and splits; without a validation split, one is taken from train, by group.
        seed: chooses that validation split.

    Raises:
        ValueError: if the corpus has no labels, no splits, or a split without a labelled utterance.
    """

    def __init__(self, corpus: Corpus, seed: int) -> None:
        labels_of(corpus)
        self.task, self.classes, self.input_dims = corpus.task, corpus.classes, corpus.input_dims
        self.extraction = corpus.extraction
        self._corpus = corpus = ensure_validation(corpus, seed=seed)
        self.training, self.validation = MemorySplit(corpus.subset("train")), MemorySplit(corpus.subset("valid"))
        for name, split in (("train", self.training), ("valid", self.validation)):
            if not split.rows:
                raise ValueError(f"the {name} split has no labelled utterance")

    def class_weights(self) -> tuple[float, ...]:
        """Return the weights that make the classes of the training split count alike."""
        return class_weights(self.training.corpus)

    def fit(self, model: M3ERFusion) -> None:
        """Learn standardiser, check and proxies of a model from the training split."""
        training = self.training.corpus
        longest = max(1, int(training.lengths.max()))
        features = {name: values[:, :longest] for name, values in training.features.items()}
        model.fit(features, lengths=training.lengths, available=training.available)

    def fingerprint(self) -> dict[str, Any]:
        """Return everything of the corpus that decides the result of a training, by name."""
        corpus = self._corpus
        return {
            "reading": "in memory",
            "modalities": [f"{name} ({dim})" for name, dim in self.input_dims.items()],
            "classes": list(self.classes),
            "task": self.task,
            "utterances": text_digest(corpus.ids),
            "splits": text_digest([] if corpus.split is None else corpus.split),
            **{f"features of {name}": array_digest(values) for name, values in corpus.features.items()},
            "lengths": array_digest(corpus.lengths),
            "availability": array_digest(corpus.available),
            "labels": array_digest(labels_of(corpus)),
        }

    def report(self, model: M3ERFusion, *, corruption: str | None = None) -> ClassificationReport | None:
        """Return a model's scores on the validation split, as it is or with a corruption of that name."""
        corpus = self.validation.corpus
        if corruption is not None:
            corpus, _ = corrupt_corpus(model, corpus, seed=0, corruption=corruption)
        return evaluate(model, corpus).report

    def describe(self) -> str:
        """Return the sizes of both splits in words, for the model card."""
        training, validation = self.training.corpus, self.validation.corpus
        return f"{len(training)} utterances of at most {training.steps} frames; {len(validation)} others"


class MemorySplit:
    """The labelled utterances of a corpus in memory.

    Args:
        corpus: one split.
    """

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self._labelled = np.flatnonzero(labelled(corpus))

    @property
    def rows(self) -> int:
        """Number of labelled utterances."""
        return len(self._labelled)

    def in_order(self, size: int) -> Iterator[TrainingBatch]:
        """Yield all batches in the order of the corpus."""
        return self._batches(self._labelled, size)

    def shuffled(self, size: int, order: torch.Generator, start: int = 0) -> Iterator[TrainingBatch]:
        """Yield all batches from number ``start`` on, in a random order."""
        return self._batches(self._labelled[torch.randperm(self.rows, generator=order).numpy()][start * size :], size)

    def _batches(self, order: NDArray[np.int64], size: int) -> Iterator[TrainingBatch]:
        target = labels_of(self.corpus)
        for rows, features, lengths, available in corpus_batches(self.corpus, order, size):
            yield TrainingBatch(features, lengths, available, torch.from_numpy(target[rows]))


def class_weights(corpus: Corpus) -> tuple[float, ...]:
    """Return N / (C · n_c) for each of the C classes that have n_c > 0 labels, and 1 for the others.

    For yes/no answers and for distributions, n_c is the sum of the target's column.
    """
    target = labels_of(corpus)[labelled(corpus)]
    classes = len(corpus.classes)
    return balancing_weights(np.bincount(target, minlength=classes) if target.ndim == 1 else target.sum(axis=0))


def balancing_weights(count: NDArray[Any]) -> tuple[float, ...]:
    """Return the class weights for the numbers of labels n_c; see :func:`class_weights`."""
    present = count > 0
    weight = np.ones(len(count))
    weight[present] = count.sum() / (present.sum() * count[present])
    return tuple(weight.tolist())
