"""What the modality check learns: projections from moments, and tables from calibration samples.

Dimension legend: M modalities, P pairs of modalities, n calibration samples, D_m features of an utterance vector.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3er_fast._canonical import canonical_directions, whiten
from m3er_fast._combined_score import CombinedScore
from m3er_fast._conformal import ConformalStatistic, PairCorrelation, PairLikelihood
from m3er_fast._cross_fitting import CheckSample, CrossFitting
from m3er_fast._symptoms import SURPRISES, fit_symptoms, say_of
from m3er_fast.config import CheckConfig
from m3er_fast.functional import unchecked
from m3er_fast.moments import PairwiseMoments
from m3er_fast.operands import CheckProjections, CheckStatistics, SequenceStatistics, modality_pairs

MATRICES = ("center", "left", "left_bias", "right", "right_bias", "whitener", "weight", "canonical")
# Detectors that find a smaller share of their own corruptions than this, in sequences that they have not seen, are not
# used: each of them raises the largest surprise of clean samples.
_LEAST_POWER = 0.2
# A canonical correlation of 1 would make every other pair of coordinates impossible.
_LARGEST_CANONICAL = 0.999


def fit_projections(moments: PairwiseMoments, config: CheckConfig, dtype: torch.dtype) -> CheckProjections:
    """Return the whitening of each modality and the canonical directions of each pair, every constant folded in."""
    folded: dict[str, list[NDArray[Any]]] = {name: [] for name in MATRICES}
    for own in moments.own:
        folded["center"].append(own.mean)
        # Energy is a sum of squares, which a rotation leaves as it is: a triangular matrix takes half the work.
        folded["whitener"].append(np.asarray(np.linalg.qr(whiten(own.covariance, config.ridge).T, mode="r")))
    for (i, j), joint in zip(modality_pairs(len(moments.own)), moments.joint, strict=True):
        split = moments.own[i].mean.size
        solution = canonical_directions(joint.covariance, split, n_components=config.n_components, ridge=config.ridge)
        weights = np.sqrt(solution.correlations) if config.component_weights else np.ones(solution.correlations.size)
        for side, rotations, mean, center in (
            ("left", solution.x_rotations, joint.mean[:split], moments.own[i].mean),
            ("right", solution.y_rotations, joint.mean[split:], moments.own[j].mean),
        ):
            folded[side].append(rotations.T)
            folded[f"{side}_bias"].append(rotations.T @ (center - mean))
        folded["weight"].append(weights)
        folded["canonical"].append(solution.correlations.clip(0.0, _LARGEST_CANONICAL))
    # Contiguous, as a loaded state is: with another layout a matrix product rounds differently.
    return CheckProjections(
        **{n: [torch.tensor(value, dtype=dtype).contiguous() for value in values] for n, values in folded.items()},
        triangular=True,
    )


class _Measured(NamedTuple):
    """Calibration samples, each measured by projections that did not see its fold."""

    statistics: CheckStatistics
    available: Tensor  # (n, M) bool
    swapped: list[tuple[Tensor, Tensor]]  # M of (values, available), see _measure_swapped


def calibrate(
    part: CheckSample, projections: CheckProjections, statistics: Iterable[ConformalStatistic], config: CheckConfig
) -> dict[str, Tensor]:
    """Return every learned table by the name of its buffer, on the CPU.

    Args:
        part: all of the training data.
        projections: learned from it.
        statistics: those of the check.
        config: its settings.
    """
    by_name = {statistic.name: statistic for statistic in statistics}
    uses_symptoms = config.statistic == "combined"
    of_pairs = by_name[PairLikelihood.name if uses_symptoms else PairCorrelation.name]
    measured = _measure(part, config, projections.center[0].dtype, swapped=of_pairs.name)
    learned: dict[str, Tensor] = {}
    of_statistic: dict[str, dict[str, Tensor]] = {}
    for name, statistic in by_name.items():
        values = getattr(measured.statistics, name)
        of_statistic[name] = statistic.calibrate(values, measured.available, projections)
        learned |= {f"{statistic.prefix}{table}": value for table, value in of_statistic[name].items()}
    learned["correlation_power_"] = of_pairs.power(measured.swapped, of_statistic[of_pairs.name])
    if uses_symptoms:
        p_pairs = of_pairs.p_value(measured.statistics.likelihood, measured.available, of_statistic[of_pairs.name])
        learned |= _calibrate_symptoms(part, measured, p_pairs, learned["correlation_power_"], config)
    return learned


def _measure(part: CheckSample, config: CheckConfig, dtype: torch.dtype, *, swapped: str) -> _Measured:
    count, modalities = part.available.shape
    pairs = len(modality_pairs(modalities))
    measured = CheckStatistics(*(torch.zeros(count, n, dtype=dtype) for n in (pairs, modalities, pairs)))
    available = part.available.clone()
    of_folds = []
    for f in CrossFitting.folds:
        inside = part.fold == f
        if not inside.any():
            continue
        unseen = fit_projections(part.total_moments(left_out=f), config, dtype)
        vectors = [vector[inside].to(dtype) for vector in part.vectors]
        # Where the other folds lack a modality, or hold one sample of it, every energy is 0: nothing is measured.
        available[inside] &= torch.tensor([whitener.shape[0] > 0 for whitener in unseen.whitener])
        for whole, values in zip(measured, unchecked.check_statistics(vectors, unseen), strict=True):
            whole[inside] = values
        of_folds.append(_measure_swapped(swapped, vectors, available[inside], unseen))
    of_modality = [tuple(map(torch.cat, zip(*folds, strict=True))) for folds in zip(*of_folds, strict=True)]
    return _Measured(measured, available, [(values, present) for values, present in of_modality])


def _measure_swapped(
    name: str, vectors: list[Tensor], available: Tensor, projections: CheckProjections
) -> list[tuple[Tensor, Tensor]]:
    """The named statistic and the availability, for each modality, when it comes from the sample half a fold away.

    That sample is usually from another recording, because a fold consists of several blocks.
    """
    half = available.shape[0] // 2
    swapped = []
    for m, vector in enumerate(vectors):
        mixed = [*vectors[:m], vector.roll(half, 0), *vectors[m + 1 :]]
        present = available.clone()
        present[:, m] = available[:, m].roll(half, 0)
        swapped.append((getattr(unchecked.check_statistics(mixed, projections), name), present))
    return swapped


def _calibrate_symptoms(
    part: CheckSample, measured: _Measured, p_pairs: Tensor, power_of_pairs: Tensor, config: CheckConfig
) -> dict[str, Tensor]:
    """Learn the symptoms of each modality, and rank their largest surprises."""
    learned: dict[str, Tensor] = {}
    energy, available = measured.statistics.energy, measured.available
    symptoms = []
    for m, (sample, vector) in enumerate(zip(part.sequences, part.vectors, strict=True)):
        dtype, dim = energy.dtype, sample.variance.shape[1]
        mean, variance, change = vector[:, :dim].to(dtype), sample.variance.to(dtype), sample.change.to(dtype)
        model, detected = fit_symptoms(sample, mean, available[:, m], part.fold)
        learned |= {f"{name}_{m}": value for name, value in model._asdict().items()}
        found = SequenceStatistics(mean, variance, change, sample.repeated, sample.pairs)
        seen = model.measure(energy[:, m], mean, found)
        surprises = seen[:, : len(SURPRISES)]
        symptoms.append(torch.stack([torch.cat([surprises, values], dim=1) for values in detected]))
    values, corrupted = torch.stack(symptoms, dim=2)
    say = say_of(torch.stack([sample.pairs for sample in part.sequences], dim=1), config.ignore)
    caught = CombinedScore.surprises(corrupted, say, CombinedScore.scale(values, say, available), tolerant=False) >= 1.0
    measured_in = available[:, :, None] & (say > 0)
    power = (caught & measured_in).sum(dim=0) / measured_in.sum(dim=0).clamp(min=1)
    say[:, :, len(SURPRISES) :] *= power[:, len(SURPRISES) :] >= _LEAST_POWER
    own = torch.zeros_like(available, dtype=values.dtype)
    for f in CrossFitting.folds:  # scaled by the other folds: by its own edges no sample would be outside
        inside = part.fold == f
        unseen = CombinedScore.scale(values[~inside], say[~inside], available[~inside])
        surprises = CombinedScore.surprises(values[inside], say[inside], unseen, tolerant=False)
        own[inside] = surprises.abs().amax(dim=2)
    combined = torch.maximum(own, CombinedScore.of_pairs(p_pairs.to(own.dtype), power_of_pairs, config.ignore))
    learned |= CombinedScore.scale(values, say, available)
    return learned | CombinedScore.sort(own, available, "own") | CombinedScore.sort(combined, available, "combined")
