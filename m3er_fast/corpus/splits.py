"""Train, validation and test splits that share no video or speaker."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from m3er_fast.corpus.base import SPLITS, Corpus, CorpusError


def split_by_group(corpus: Corpus, *, fractions: tuple[float, float, float] = (0.7, 0.1, 0.2), seed: int = 0) -> Corpus:
    """Split a corpus into train, valid and test, with no group in two of them.

    Groups are assigned greedily, largest first and groups of equal size in random order. Each goes to the split in
    which it brings row and label counts closest to the fractions. A corpus without groups is split row by row.

    Args:
        corpus: any corpus; existing splits are replaced.
        fractions: share of rows wanted in train, valid and test; non-negative, summing to 1.
        seed: seeds the order of groups of equal size.

    Raises:
        ValueError: if fractions are negative or do not sum to 1, or there are fewer groups than non-empty splits.
    """
    if len(fractions) != len(SPLITS) or not (min(fractions) >= 0 and abs(sum(fractions) - 1) <= 1e-9):
        raise ValueError(f"fractions must be three non-negative numbers that sum to 1, got {fractions}")
    part = _deal_groups(corpus, fractions, seed)
    return dataclasses.replace(corpus, split=np.array(SPLITS, dtype=object)[part])


def ensure_validation(corpus: Corpus, *, fraction: float = 0.125, seed: int = 0) -> Corpus:
    """Return a corpus with a validation split; if it has none, whole groups of train are moved there.

    Args:
        corpus: a corpus with splits.
        fraction: share of the train rows to move; the default leaves 7:1 as in the paper's 7:1:2.
        seed: as in `split_by_group`.

    Raises:
        ValueError: if the corpus has no splits, the fraction is not strictly between 0 and 1, or train has only one
            group.
    """
    if corpus.split is None:
        raise ValueError("the corpus has no splits: make them with split_by_group")
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie strictly between 0 and 1, got {fraction}")
    if (corpus.split == "valid").any():
        return corpus
    train = np.flatnonzero(corpus.split == "train")
    part = _deal_groups(corpus.select(train), (1 - fraction, fraction), seed)
    split = corpus.split.astype(object)
    split[train[part == 1]] = "valid"
    return dataclasses.replace(corpus, split=split)


def _deal_groups(corpus: Corpus, fractions: Sequence[float], seed: int) -> np.ndarray:
    """Return the index (N,) of the part that each row is assigned to."""
    rows = len(corpus)
    if not rows:
        return np.zeros(0, dtype=np.int64)
    names = np.arange(rows) if corpus.group is None else corpus.group.astype(object)
    _, group = np.unique(names, return_inverse=True)
    groups = int(group.max()) + 1
    wanted = np.asarray(fractions, dtype=np.float64)
    if groups < (wanted > 0).sum():
        raise CorpusError(f"cannot make {(wanted > 0).sum()} splits that share no group: there are {groups} groups")
    # (groups, 1 + C): rows and labels of each group, as shares of the whole: every column has the same weight.
    content = np.zeros((groups, 1 + len(corpus.classes)))
    np.add.at(content, group, np.column_stack([np.ones(rows), _label_mass(corpus)]))
    sizes = content[:, 0].copy()
    content /= np.maximum(content.sum(axis=0), 1e-12)
    order = np.random.default_rng(seed).permutation(groups)
    order = order[np.argsort(-sizes[order], kind="stable")]
    filled = np.zeros((len(wanted), content.shape[1]))
    part_of_group = np.zeros(groups, dtype=np.int64)
    for index in order:
        # The change of ‖filled − wanted‖² when the group is added, up to a term that all parts share.
        change = ((filled - wanted[:, None]) * content[index]).sum(axis=1)
        best = int(np.where(wanted > 0, change, np.inf).argmin())
        part_of_group[index] = best
        filled[best] += content[index]
    for empty in np.flatnonzero((wanted > 0) & (np.bincount(part_of_group, minlength=len(wanted)) == 0)):
        donor = np.bincount(part_of_group, minlength=len(wanted)).argmax()
        members = np.flatnonzero(part_of_group == donor)
        part_of_group[members[sizes[members].argmin()]] = empty
    return part_of_group[group]


def _label_mass(corpus: Corpus) -> np.ndarray:
    """Return (N, C): the amount of each class in a row."""
    mass = np.zeros((len(corpus), len(corpus.classes)))
    if corpus.target is None:
        return mass
    labelled = np.flatnonzero(corpus.labelled)
    if corpus.task == "single":
        mass[labelled, corpus.target[labelled]] = 1
    else:
        mass[labelled] = corpus.target[labelled]
    return mass
