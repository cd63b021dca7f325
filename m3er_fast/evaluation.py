"""Evaluation of a model on a corpus, and the batches of a corpus that training and evaluation share.

Dimension legend: N utterances, M modalities, T time steps, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3er_fast._validation import check_positive_int
from m3er_fast.corpus.base import Corpus
from m3er_fast.corruption import PAPER_CORRUPTION, Corruption, corrupt, named, takes_groups
from m3er_fast.fitted_module import eval_mode
from m3er_fast.fusion import M3ERFusion
from m3er_fast.metrics import ClassificationReport, classification_report
from m3er_fast.standardize import StandardizedBatch


@dataclass(frozen=True)
class Prediction:
    """A model's answers for a corpus."""

    probabilities: NDArray[np.float32]  # (N, C)
    modality_probabilities: NDArray[np.float32]  # (M, N, C)
    effective: NDArray[np.bool_]  # (N, M)
    p_value: NDArray[np.float32]  # (N, M)
    reason: NDArray[np.int64]  # (N, M), why a modality was rejected, an index of ``ModalityCheck.reasons``; 0: not
    abstained: NDArray[np.bool_]  # (N,)
    available: NDArray[np.bool_]  # (N, M), the modalities that had a valid frame and were known from training
    report: ClassificationReport | None
    """None if the corpus has no labels."""
    uncalibrated: NDArray[np.float32] | None = None
    """(N, C) probabilities without the model's temperature; None if it has none."""


class CorpusBatch(NamedTuple):
    """Some utterances of a corpus as tensors, cut to the longest of them."""

    rows: NDArray[np.int64]  # (B,), their positions in the corpus
    features: dict[str, Tensor]  # modality -> (B, T, d_m)
    lengths: Tensor  # (B,)
    available: Tensor  # (B, M) bool


def evaluate(
    model: M3ERFusion, corpus: Corpus, *, batch_size: int = 512, effective: NDArray[np.bool_] | None = None
) -> Prediction:
    """Classify a corpus in eval mode and, if it has labels, score the answers.

    Args:
        model: fitted, if it has a check.
        corpus: its modalities and, if it has labels, its classes must equal the model's, in the same order.
        batch_size: utterances per step.
        effective: (N, M) verdicts that replace the modality check's.

    Raises:
        ValueError: if the corpus is empty or does not fit the model, or ``effective`` has another shape.
        NotFittedError: if the model has a check that is not fitted.
    """
    check_modalities(model, corpus)
    if corpus.target is not None and corpus.classes != model.classes:
        raise ValueError(f"the corpus has the classes {corpus.classes}, but the model {model.classes}")
    if not len(corpus):
        raise ValueError("the corpus is empty: there is nothing to evaluate")
    check_positive_int("batch_size", batch_size)
    if effective is not None and effective.shape != corpus.available.shape:
        raise ValueError(f"effective must have shape {corpus.available.shape}, got {effective.shape}")
    parts: dict[str, list[NDArray[Any]]] = {}
    with eval_mode(model), torch.no_grad():
        for rows, features, lengths, available in corpus_batches(corpus, np.arange(len(corpus)), batch_size):
            verdicts = None if effective is None else torch.from_numpy(effective[rows])
            output = model(features, lengths, available, effective=verdicts)
            answers = {
                "probabilities": output.probabilities,
                "modality_probabilities": model.modality_probabilities(output).transpose(0, 1),
                "effective": output.effective,
                "p_value": output.p_value,
                "reason": output.reason,
                "abstained": output.abstained,
                "available": output.available,
            }
            if model.calibration.is_fitted:
                answers["uncalibrated"] = model.probabilities(output, calibrate=False)
            for name, values in answers.items():
                parts.setdefault(name, []).append(values.cpu().numpy())
    whole = {name: np.concatenate(values) for name, values in parts.items()}
    whole["modality_probabilities"] = whole["modality_probabilities"].swapaxes(0, 1)
    uncalibrated, report = whole.get("uncalibrated"), None
    if corpus.target is not None and labelled(corpus).any():
        known = labelled(corpus)
        report = classification_report(
            whole["probabilities"][known],
            corpus.target[known],
            corpus.classes,
            task=corpus.task,
            uncalibrated=None if uncalibrated is None else uncalibrated[known],
        )
    return Prediction(**whole, report=report)


def check_modalities(model: M3ERFusion, corpus: Corpus) -> None:
    """Raise a ValueError unless the corpus has the model's modalities, in the order of its (N, M) results."""
    if list(corpus.input_dims.items()) != list(model.input_dims.items()):
        raise ValueError(
            f"the corpus has the modalities {corpus.input_dims}, but the model {model.input_dims}: "
            "wanted the same, in the same order"
        )


def standardize_corpus(model: M3ERFusion, corpus: Corpus) -> StandardizedBatch:
    """Return a whole corpus in standardised features, on the model's device.

    Raises:
        ValueError: if the corpus does not have the model's modalities, in the same order.
    """
    check_modalities(model, corpus)
    return model.standardize(corpus.features, corpus.lengths, corpus.available)


def corrupt_corpus(
    model: M3ERFusion, corpus: Corpus, seed: int, *, corruption: str | Corruption = PAPER_CORRUPTION
) -> tuple[Corpus, NDArray[np.bool_]]:
    """Corrupt a corpus by the paper's protocol, applied to standardised features, with any kind of corruption.

    Scores on corrupted utterances are two lines::

        corrupted, truth = corrupt_corpus(model, corpus.subset("test"), seed=0, corruption="freeze")
        report = evaluate(model, corrupted).report

    Args:
        model: fitted; its standardiser gives the features that are corrupted.
        corpus: utterances with the model's modalities.
        seed: decides which modalities of which utterances are corrupted, and how.
        corruption: the kind of corruption, as for :func:`m3er_fast.corruption.corrupt`.

    Returns:
        The corrupted corpus and the (N, M) mask of corrupted modalities.

    Raises:
        ValueError: if the corpus does not have the model's modalities or lacks the groups that the corruption needs,
            or if there is no such corruption.
    """
    kind = find_corruption(corpus, corruption)
    batch = standardize_corpus(model, corpus)
    features = dict(zip(corpus.features, batch.features, strict=True))
    noisy, truth = corrupt(
        features, seed, kind=kind, lengths=batch.lengths, available=batch.available, groups=corpus.group
    )
    raw = model.standardizer.unstandardize([noisy[name] for name in corpus.features])
    mask = batch.frame_valid
    changed = {}
    for m, (name, values) in enumerate(corpus.features.items()):
        hit = (mask[:, :, m] & truth[:, m, None])[:, :, None].numpy()
        changed[name] = np.where(hit, raw[m].to(torch.float32).numpy(), values)
    return replace(corpus, features=changed), truth.numpy()


def find_corruption(corpus: Corpus, corruption: str | Corruption) -> Corruption:
    """Return a corruption by name; refuse one that needs groups if the corpus has none."""
    kind = named(corruption, argument="corruption") if isinstance(corruption, str) else corruption
    if corpus.group is None and takes_groups(kind):
        raise ValueError(f"corruption {corruption!r} needs a corpus with groups, but this one has none")
    return kind


def corpus_batches(corpus: Corpus, order: NDArray[np.int64], size: int) -> Iterator[CorpusBatch]:
    """Yield the rows of a corpus in the given order, ``size`` at a time."""
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        lengths = corpus.lengths[rows]
        steps = max(int(lengths.max()), 1)
        features = {name: torch.from_numpy(values[rows, :steps]) for name, values in corpus.features.items()}
        yield CorpusBatch(rows, features, torch.from_numpy(lengths), torch.from_numpy(corpus.available[rows]))


def labels_of(corpus: Corpus) -> NDArray[Any]:
    """Return the target of a corpus, which must have one."""
    if corpus.target is None:
        raise ValueError("the corpus has no labels")
    return corpus.target


def labelled(corpus: Corpus) -> NDArray[np.bool_]:
    """Return (N,) bool: whether an utterance has a label."""
    labels_of(corpus)
    return corpus.labelled
