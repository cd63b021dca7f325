"""Simpler models, fitted and trained as M3ER is: what a corpus gives without the method.

Logistic regression looks at the mean frame of each modality. Late fusion has an LSTM and a head for each modality, and
averages their probabilities. Early concatenation has one LSTM over all features side by side.

Dimension legend: N utterances, M modalities, T time steps, d_m features of modality m, C classes, G groups of
modalities.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from m3er_fast import functional
from m3er_fast.atomic_files import replacing
from m3er_fast.config import M3ERConfig
from m3er_fast.corpus.base import Corpus
from m3er_fast.evaluation import labelled, labels_of, standardize_corpus
from m3er_fast.fusion import M3ERFusion
from m3er_fast.training.schedule import set_learning_rate

LOGISTIC = "Logistic regression"
LATE = "Late fusion: an LSTM per modality"
EARLY = "Early concatenation: one LSTM"

_REGULARISATION = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # scikit-learn's C


class Utterances(NamedTuple):
    """Utterances in standardised features, and their labels."""

    features: list[Tensor]  # M of (N, T, d_m), zeros where nothing is valid
    lengths: Tensor  # (N,)
    available: Tensor  # (N, M) bool
    frames: Tensor  # (N, M), number of valid frames
    target: Tensor  # (N,) or (N, C)

    def select(self, rows: Tensor) -> Utterances:
        """Return some utterances, cut to the longest of them."""
        steps = max(int(self.lengths[rows].max()), 1)
        features = [values[rows, :steps] for values in self.features]
        return Utterances(features, self.lengths[rows], self.available[rows], self.frames[rows], self.target[rows])

    def batches(self, size: int = 512, order: Tensor | None = None) -> Iterator[Utterances]:
        """Yield the utterances ``size`` at a time, in an order of their numbers or as they come."""
        order = torch.arange(len(self.lengths)) if order is None else order
        for start in range(0, len(order), size):
            yield self.select(order[start : start + size])


class Baseline(NamedTuple):
    """A fitted baseline."""

    label: str
    fuses: bool
    """Whether it looks at every modality, so that it has answers to ineffectual ones."""
    probabilities: Callable[[Utterances], NDArray[Any]]
    """The (N, C) probabilities of its answers."""


def fit_baselines(model: M3ERFusion, corpus: Corpus, *, folder: Path | None = None) -> list[Baseline]:
    """Fit logistic regression on all modalities and on each of them, late fusion, and early concatenation.

    All choices are made on the validation split by the loss, as M3ER's are: the regularisation of logistic regression,
    and the epoch of the networks. The networks have the layer sizes, dropout, optimiser, epochs, patience, seed and
    class weights of the model's settings.

    Args:
        model: trained on this corpus; its standardiser and settings are used.
        corpus: with labels and the splits train and valid.
        folder: keeps the trained networks, which a later call takes from there; None keeps nothing.
    """
    training, validation = (utterances_of(model, labelled_part(corpus, split)) for split in ("train", "valid"))
    everything = range(len(corpus.modalities))
    regressions = [(LOGISTIC, everything)]
    regressions += [(f"{LOGISTIC}, {name} alone", range(m, m + 1)) for m, name in enumerate(corpus.modalities)]
    baselines = [
        Baseline(label, columns == everything, fit_logistic(model.config, corpus, columns, training, validation))
        for label, columns in regressions
    ]
    for label, groups in ((LATE, [[m] for m in everything]), (EARLY, [list(everything)])):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(model.config.training.seed)
            network = Branches(model.input_dims.values(), groups, len(corpus.classes), model.config)
            path = None if folder is None else folder / f"{len(groups)}-branches.pt"
            if path is not None and path.exists():
                network.load_state_dict(torch.load(path, weights_only=True))
            else:
                train_branches(network, training, validation)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as unfinished:
                    torch.save(network.state_dict(), unfinished)
        baselines.append(Baseline(label, True, network.probabilities))
    return baselines


def labelled_part(corpus: Corpus, split: str) -> Corpus:
    """Return the labelled utterances of a split."""
    part = corpus.subset(split)
    return part.select(labelled(part))


def utterances_of(model: M3ERFusion, corpus: Corpus) -> Utterances:
    """Return a corpus, all of whose utterances are labelled, in the model's standardised features, on the CPU."""
    batch = standardize_corpus(model, corpus)
    features = [values.to("cpu", torch.float32) for values in batch.features]
    frames = batch.frame_valid.sum(dim=1)
    target = torch.from_numpy(labels_of(corpus))
    return Utterances(features, batch.lengths.cpu(), batch.available.cpu(), frames.cpu(), target)


# --- Logistic regression ---


def fit_logistic(
    config: M3ERConfig, corpus: Corpus, columns: Sequence[int], training: Utterances, validation: Utterances
) -> Callable[[Utterances], NDArray[Any]]:
    """Fit a logistic regression on the mean frames of some modalities, zeros for one that is missing.

    A corpus of yes/no questions gets a regression for each of them. A distribution over classes is a sample of each
    class, weighted by its share.

    Args:
        config: has the class weights.
        corpus: has the task and the classes.
        columns: numbers of the modalities.
        training: to fit to.
        validation: chooses the regularisation, by the loss.

    Returns:
        The probabilities of utterances.
    """
    x, target = mean_frames(training, columns), _rows(training.target, len(corpus.classes))
    weight = np.ones(target.shape[1]) if config.loss.class_weight is None else np.array(config.loss.class_weight)
    candidates = []
    for c in _REGULARISATION:
        if corpus.task == "multi":
            questions = [_regression(x, column, np.ones(len(x)), c) for column in target.T.astype(int)]
            answer = partial(_answers, questions)
        else:
            row, label = np.nonzero(target * weight)
            answer = partial(_class_shares, _regression(x[row], label, (target * weight)[row, label], c), len(weight))
        p = answer(mean_frames(validation, columns)).clip(1e-12, 1 - 1e-12)
        truth = _rows(validation.target, len(weight))
        loss = -(truth * np.log(p)).sum() - (corpus.task == "multi") * ((1 - truth) * np.log(1 - p)).sum()
        candidates.append((loss, c, answer))
    best = min(candidates, key=lambda candidate: candidate[:2])[2]
    return lambda utterances: best(mean_frames(utterances, columns))


def mean_frames(utterances: Utterances, columns: Sequence[int]) -> NDArray[Any]:
    """Return the mean valid frames of some modalities side by side, (N, sum of d_m) in float64."""
    means = [utterances.features[m].double().sum(dim=1) / utterances.frames[:, m : m + 1].clamp(min=1) for m in columns]
    return torch.cat(means, dim=1).numpy()


def _regression(x: NDArray[Any], label: NDArray[Any], weight: NDArray[Any], c: float) -> Any:
    """Fit scikit-learn's regression to standardised features, or a constant where there is one label only."""
    from sklearn.dummy import DummyClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(label)) == 1:
        return DummyClassifier().fit(x, label)
    regression = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000))
    return regression.fit(x, label, logisticregression__sample_weight=weight)


def _class_shares(regression: Any, classes: int, x: NDArray[Any]) -> NDArray[Any]:
    """Return the (N, C) probabilities of a regression over classes; 0 for one that training does not have."""
    p = np.zeros((len(x), classes))
    p[:, regression.classes_] = regression.predict_proba(x)
    return p


def _answers(questions: Sequence[Any], x: NDArray[Any]) -> NDArray[Any]:
    """Return the (N, C) probabilities of "yes" of a regression per question."""
    return np.stack([_class_shares(question, 2, x)[:, 1] for question in questions], axis=1)


def _rows(target: Tensor, classes: int) -> NDArray[Any]:
    """Return a target as (N, C) shares or answers."""
    return (nn.functional.one_hot(target, classes) if target.ndim == 1 else target).double().numpy()


# --- LSTMs ---


class Branches(nn.Module):
    """An LSTM and a head for each group of modalities; the answer is the mean of the heads' probabilities.

    A group sees the features of its modalities side by side. Its LSTM has as many units as M3ER has for them, and its
    head has the layers of M3ER's fused head.

    Args:
        dims: d_m of every modality.
        groups: numbers of the modalities of each group: one each for late fusion, all in one for early concatenation.
        classes: C.
        config: settings of the layers, the loss and the training.
    """

    def __init__(self, dims: Any, groups: Sequence[Sequence[int]], classes: int, config: M3ERConfig) -> None:
        super().__init__()
        dims = list(dims)
        sizes = config.network
        self.groups = groups
        self.config = config
        self.lstms = nn.ModuleList(
            nn.LSTM(sum(dims[m] for m in group), sizes.hidden * len(group), batch_first=True) for group in groups
        )
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Linear(sizes.hidden * len(group), sizes.head),
                nn.ReLU(),
                nn.Dropout(sizes.dropout),
                nn.Linear(sizes.head, classes),
            )
            for group in groups
        )

    def forward(self, utterances: Utterances) -> Tensor:
        """Return the (G, N, C) logits of every head, from the state after the last frame of an utterance."""
        last = (utterances.lengths - 1).clamp(min=0)
        logits = []
        for group, lstm, head in zip(self.groups, self.lstms, self.heads, strict=True):
            states = lstm(torch.cat([utterances.features[m] for m in group], dim=2))[0]
            logits.append(head(states[torch.arange(len(last)), last]))
        return torch.stack(logits)

    def present(self, utterances: Utterances) -> Tensor:
        """Return (N, G) bool: which groups have a modality; all of them where there is none."""
        found = torch.stack([utterances.available[:, group].any(dim=1) for group in self.groups], dim=1)
        return found | ~found.any(dim=1, keepdim=True)

    def loss(self, utterances: Utterances) -> Tensor:
        """Return the sum of the cross entropies of the heads, a mean over utterances: each learns on its own."""
        weight, activation = self.config.loss.class_weight, self.config.loss.activation
        loss: Tensor = functional.fusion_loss(
            self(utterances),
            utterances.target,
            beta=0.0,  # every weight is 1
            activation=activation,
            class_weight=None if weight is None else torch.tensor(weight),
            available=self.present(utterances),
        )
        return loss

    @torch.no_grad()
    def probabilities(self, utterances: Utterances) -> NDArray[Any]:
        """Return the (N, C) mean of the probabilities of the heads whose modalities are there."""
        self.eval()
        parts = []
        for part in utterances.batches():
            logits = self(part).double()
            p = logits.sigmoid() if self.config.loss.activation == "sigmoid" else logits.softmax(dim=2)
            share = self.present(part).double()
            parts.append(torch.einsum("gnc,ng->nc", p, share / share.sum(dim=1, keepdim=True)))
        return torch.cat(parts).numpy()


def train_branches(network: Branches, training: Utterances, validation: Utterances) -> None:
    """Train as M3ER is trained, and leave the network with the weights of the epoch of the least validation loss."""
    settings = network.config.training
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    best, best_epoch, least = copy.deepcopy(network.state_dict()), 0, float("inf")
    for epoch in range(settings.epochs):
        network.train()
        steps = math.ceil(len(training.lengths) / settings.batch_size)
        order = torch.randperm(len(training.lengths))
        for step, batch in enumerate(training.batches(settings.batch_size, order)):
            set_learning_rate(optimizer, settings, epoch + (step + 0.5) / steps)
            optimizer.zero_grad(set_to_none=True)
            network.loss(batch).backward()  # type: ignore[no-untyped-call]
            if settings.gradient_norm is not None:
                torch.nn.utils.clip_grad_norm_(network.parameters(), settings.gradient_norm)
            optimizer.step()
        loss = mean_loss(network, validation)
        if loss < least:
            best, best_epoch, least = copy.deepcopy(network.state_dict()), epoch, loss
        if settings.patience is not None and epoch - best_epoch >= settings.patience:
            break
    network.load_state_dict(best)


@torch.no_grad()
def mean_loss(network: Branches, utterances: Utterances) -> float:
    """Return the mean loss of utterances, in eval mode."""
    network.eval()
    total = 0.0
    for part in utterances.batches():
        total += network.loss(part).item() * len(part.lengths)
    return total / len(utterances.lengths)
