"""The modality check (step 1 of the method): which modalities of a sample can be trusted.

Dimension legend: M modalities, B samples, T time steps, d_m features of modality m, D_m features of its utterance
vector (d_m, or 2·d_m with pooling "mean_std"), P pairs of modalities, k_p components of pair p, n calibration samples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from itertools import compress
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import NotFittedError
from torch import Tensor

from m3er_fast._conformal import (
    CheckSample,
    ConformalStatistic,
    CrossFitting,
    Energy,
    PairCorrelation,
    Tables,
    combine_p_values,
    correlate_swapped,
)
from m3er_fast._settings import takes_settings_of
from m3er_fast.cca import canonical_directions, whiten
from m3er_fast.config import CheckConfig
from m3er_fast.fitted_module import FittedModule
from m3er_fast.functional import unchecked
from m3er_fast.inputs import Features, FeatureSource, check_input_dims, iterate_batches, prepare_batch
from m3er_fast.moments import PairwiseMoments
from m3er_fast.operands import CheckProjections, modality_pairs, upcast
from m3er_fast.standardize import StandardizedBatch, clean_frames

__all__ = ["CheckResult", "CheckSample", "ModalityCheck"]

# The combined check asks the correlation only about modalities of which it recognises at least half when they come from
# another sample. On CMU-MOSI it recognises 13 to 26 %, and rejects 6 to 16 % of the right ones; on the generated corpus
# of moderate correlation it recognises 72 %.
_MIN_POWER = 0.5

_PAIR_MATRICES = ("left", "left_bias", "right", "right_bias")
_MATRICES = ("center", *_PAIR_MATRICES, "whitener")


class CheckResult(NamedTuple):
    """The verdict of the modality check on a batch; every entry is finite."""

    effective: Tensor  # (B, M) bool
    correlation: Tensor  # (B, P) ρ of each pair, 0 where undefined or one of the two is unavailable
    energy: Tensor  # (B, M) mean squared whitened coordinate, 0 where unavailable
    p_value: Tensor  # (B, M) conformal p-value of "this modality is as in training", 0 where unavailable


@takes_settings_of(CheckConfig)
class ModalityCheck(FittedModule):
    """Verdict on each modality of a sample: effective, or noise.

    Two statistics are measured on the utterance vectors f_m, the means over the valid frames (formulas at
    :func:`m3er_fast.functional.check_statistics`): the *correlation* ρ_ij of each pair across its canonical components
    (Mittal et al. 2020, arXiv 1911.05659), and the *energy* of each modality in its own whitened space. The paper does
    not have the energy: ρ does not see scale, and it hardly separates weakly correlated modalities from noise.

    Both become conformal p-values (Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World", 2005) against
    training samples that the projections did not see: the share of calibration samples at least as odd as this one.
    A modality is ineffectual if p < ``alpha``. On clean data exchangeable with the training data, a share of ``alpha``
    of the samples, or less, therefore loses it.

    * correlation: ρ_mj is ranked among the calibration samples' values. The largest rank over the other available
      modalities j counts (rule "all": ineffectual only if it fails against every other), or the smallest ("any").
      Low is odd. Without another modality to compare with there is no evidence, and p = 1.
    * energy: two-sided, because noise raises it, and silence and frozen sensors lower it:
      p = min(1, 2·min(p_high(E/2), p_low(2E))). Recordings differ in level, and a factor of two is not held against a
      modality.
    * combined: p = min(1, p_correlation / 0.9, p_energy / 0.1), a weighted Bonferroni sum. A modality whose p_energy is
      below ``alpha`` is not compared with, so that one bad modality does not discredit the good ones. Where the
      correlation has too little power (``correlation_power_`` below 1/2), p = p_energy.

    Energies outside the range of all calibration samples have p-values below the smallest conformal one, 1/(n+1), in
    proportion to their distance from the range. That orders them, and lets a small calibration set recognise gross
    noise.

    With ``threshold`` τ the paper's form replaces the correlation's p-value: ineffectual if ρ < τ against every other
    modality (or any, by ``rule``); in the combined check the energy is then tested alone at ``alpha``.

    Args:
        input_dims: feature count d_m of each modality, in order; at least two.
        {settings}

    Attributes:
        correlation_power_: (M,) share of calibration samples in which the correlation finds modality m ineffectual, at
            level alpha, when it is swapped for that of the sample half a fold away; empty before ``fit``.
        projections_: the fitted matrices, as ``functional.check_statistics`` takes them.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    def __init__(self, input_dims: Mapping[str, int], *settings: Any, **named_settings: Any) -> None:
        super().__init__()
        self.input_dims = check_input_dims(input_dims)
        modalities = len(self.input_dims)
        if modalities < 2:
            raise ValueError(
                f"input_dims: the check compares modalities, so it needs two or more, got {self.input_dims}"
            )
        self.config = config = CheckConfig(*settings, **named_settings)
        self._pairs = modality_pairs(modalities)
        if isinstance(config.threshold, tuple) and len(config.threshold) != len(self._pairs):
            raise ValueError(f"threshold has {len(config.threshold)} values, wanted one for {len(self._pairs)} pairs")
        self._correlation = PairCorrelation(modalities, config)
        self._statistics: list[ConformalStatistic] = [self._correlation, Energy(modalities, config)]
        asked = [s for s in self._statistics if config.statistic in (s.name, "combined")]
        self._asked = sorted(asked, key=lambda s: s.compares)  # a comparison has to know which modalities to trust
        nothing = torch.zeros(0)
        self.register_learned(
            **{f"center_{m}": nothing for m in range(modalities)},
            **{f"whitener_{m}": nothing for m in range(modalities)},
            **{f"{name}_{p}": nothing for p in range(len(self._pairs)) for name in _PAIR_MATRICES},
        )
        for statistic in self._statistics:
            self.register_learned(**statistic.empty_tables())
        self.register_learned(correlation_power_=nothing)

    @property
    def is_fitted(self) -> bool:
        """Whether ``fit`` was called, or a fitted state loaded."""
        return self.learned("energy_count").numel() > 0

    @property
    def projections_(self) -> CheckProjections:
        """The fitted matrices with every constant folded in; before ``fit`` there is no such attribute."""
        if not self.is_fitted:
            raise AttributeError("projections_ exists once fit has been called")
        modalities, pairs = range(len(self.input_dims)), range(len(self._pairs))
        return CheckProjections(
            **{
                name: [self.learned(f"{name}_{n}") for n in (pairs if name in _PAIR_MATRICES else modalities)]
                for name in _MATRICES
            },
            triangular=True,
        )

    def fit(self, features: FeatureSource, lengths: Any = None, available: Any = None) -> Self:
        """Learn projections and calibration from clean training data.

        The projections are learned from all samples. Calibration is by cross-fitting: the samples are cut into ten
        folds, and each sample (of 4096 seeded ones, if there are more) is scored by projections that did not see its
        fold. Folds consist of whole blocks of neighbours: keep the samples of a recording together.

        A pair that is never together, or a modality that is never there or only in one fold, has no statistics and is
        not judged by them.

        Args:
            features: mapping from modality to (N, T, d_m) or (N, d_m), or a re-iterable of such batches.
            lengths: (N,) valid leading frames.
            available: (N, M) bool.

        Raises:
            ValueError: for bad input, or if there is no sample at all.

        Warns:
            UserWarning: if a modality has so few calibration samples that more than a share alpha of clean ones may
                lose it or, without the energy, that no sample can.
        """
        return self.fit_batches(
            lambda: map(clean_frames, iterate_batches(features, lengths, available, input_dims=self.input_dims))
        )

    def fit_batches(self, batches: Callable[[], Iterable[StandardizedBatch]]) -> Self:
        """:meth:`fit` from standardised batches; ``batches`` is called twice and must give the same ones."""
        total = sum(batch.lengths.shape[0] for batch in batches())
        return self.fit_collected(self.collect(batches(), total=total))

    def collect(self, batches: Iterable[StandardizedBatch], *, total: int, start: int = 0) -> CheckSample:
        """Return what ``fit`` needs from a part of the training data, to be merged with the parts that follow.

        Args:
            batches: standardised samples that follow each other in the training data.
            total: samples in all of the training data; it decides the folds and the choice of calibration samples.
            start: number of the first of these samples in the training data.
        """
        cross_fitting = CrossFitting(total)
        widths = [self._vector_size(dim) for dim in self.input_dims.values()]
        moments: dict[int, PairwiseMoments] = {}
        no_vectors = [torch.zeros(0, width, dtype=torch.float64) for width in widths]
        rows = [[*no_vectors, torch.zeros(0, len(widths), dtype=torch.bool), torch.zeros(0, dtype=torch.int64)]]
        for batch in batches:
            vectors = [vector.double().cpu() for vector in self._pool(batch)]
            available = batch.available.cpu()
            numbers = np.arange(start, start + available.shape[0])
            start += available.shape[0]
            fold = cross_fitting.fold(numbers)
            for f in cross_fitting.folds:
                inside = fold == f
                if inside.any():
                    own = moments.setdefault(f, PairwiseMoments(widths))
                    own.update([vector[inside].numpy() for vector in vectors], available[inside].numpy())
            calibrates = cross_fitting.calibrates(numbers)
            rows.append([column[calibrates] for column in (*vectors, available, fold)])
        *kept, available, fold = (torch.cat(columns) for columns in zip(*rows, strict=True))
        return CheckSample(moments, kept, available, fold)

    def fit_collected(self, part: CheckSample) -> Self:
        """:meth:`fit` from what :meth:`collect` gave for all of the training data, merged in its order.

        Raises:
            ValueError: if there is no sample at all.

        Warns:
            UserWarning: as ``fit`` does.
        """
        if not part.moments:
            raise ValueError("features: no sample to fit the modality check to")
        projections = self._solve(part.total_moments())
        self.register_learned(
            **{f"{name}_{n}": value for name in _MATRICES for n, value in enumerate(getattr(projections, name))}
        )
        self._calibrate(part, projections)
        self._warn_if_few_samples()
        return self

    def check(self, features: Features, lengths: Any = None, available: Any = None) -> CheckResult:
        """Judge a batch of features, in the units that ``fit`` saw.

        Args:
            features: mapping from modality to a (B, T, d_m) or (B, d_m) tensor; missing or None: unavailable.
            lengths: (B,) valid leading frames.
            available: (B, M) bool.

        Raises:
            NotFittedError: before ``fit``.
            ValueError: naming the modality, the shape got and the shape wanted.
        """
        return self.check_batch(clean_frames(prepare_batch(features, lengths, available, input_dims=self.input_dims)))

    def forward(self, features: Features, lengths: Any = None, available: Any = None) -> CheckResult:
        """Return what :meth:`check` returns."""
        return self.check(features, lengths, available)

    def check_batch(self, batch: StandardizedBatch) -> CheckResult:
        """:meth:`check` for a batch that is cleaned already."""
        if not self.is_fitted:
            raise NotFittedError("this ModalityCheck is not fitted: call fit with clean training data first")
        config, available = self.config, batch.available
        vectors = [vector.to(self.learned("center_0").dtype) for vector in self._pool(batch)]
        measured = self._measure(vectors, self.projections_)
        for statistic in self._statistics:
            measured[statistic.name] = measured[statistic.name].where(statistic.is_measured(available), 0.0)
        p_values: list[Tensor] = []
        trusted = available  # the modalities that others are compared with
        for statistic in self._asked:
            used = trusted if statistic.compares else available
            p_values.append(statistic.p_value(measured[statistic.name], used, self._tables(statistic)))
            if config.statistic == "combined" and not statistic.compares:
                trusted = trusted & (p_values[-1] >= config.alpha)
        p_value = self._combine(p_values).clamp(max=1.0)
        p_value = p_value.where(available, 0.0)
        effective = available & (p_value >= config.alpha)
        if config.threshold is not None and config.statistic != "energy":
            tables = self._tables(self._correlation)
            passes = self._correlation.passes_threshold(measured["correlation"], trusted, config.threshold, tables)
            effective = passes & (available if config.statistic == "correlation" else effective)
        return CheckResult(effective=effective, p_value=p_value, **measured)

    def extra_repr(self) -> str:
        """Return the settings, for ``print(module)``."""
        return f"{self.input_dims}, {self.config}, fitted={self.is_fitted}"

    # --- what is measured, in fitting and judging ---

    def _vector_size(self, dim: int) -> int:
        return 2 * dim if self.config.pooling == "mean_std" else dim

    def _pool(self, batch: StandardizedBatch) -> list[Tensor]:
        """M utterance vectors (B, D_m)."""
        vectors = []
        for m, x in enumerate(map(upcast, batch.features)):
            valid = batch.frame_valid[:, :, m, None]
            count = valid.sum(dim=1).clamp(min=1)
            mean = x.where(valid, 0.0).sum(dim=1) / count
            if self.config.pooling == "mean_std":
                spread = (x - mean[:, None]).where(valid, 0.0).square().sum(dim=1) / count
                mean = torch.cat([mean, spread.sqrt()], dim=1)
            vectors.append(mean)
        return vectors

    @staticmethod
    def _measure(vectors: list[Tensor], projections: CheckProjections) -> dict[str, Tensor]:
        """Every statistic of the utterance vectors, by name."""
        correlation, energy = unchecked.check_statistics(vectors, projections)
        return {"correlation": correlation, "energy": energy}

    # --- fitting ---

    def _solve(self, moments: PairwiseMoments) -> CheckProjections:
        config = self.config
        folded: dict[str, list[NDArray[Any]]] = {name: [] for name in _MATRICES}
        for own in moments.own:
            folded["center"].append(own.mean)
            # Energy is a sum of squares, which a rotation leaves as it is: a triangular matrix takes half the work.
            folded["whitener"].append(np.asarray(np.linalg.qr(whiten(own.covariance, config.ridge).T, mode="r")))
        for (i, j), joint in zip(self._pairs, moments.joint, strict=True):
            split = moments.own[i].mean.size
            solution = canonical_directions(
                joint.covariance, split, n_components=config.n_components, ridge=config.ridge
            )
            weights = (
                np.sqrt(solution.correlations) if config.component_weights else np.ones(solution.correlations.size)
            )
            for side, rotations, mean, center in (
                ("left", solution.x_rotations, joint.mean[:split], moments.own[i].mean),
                ("right", solution.y_rotations, joint.mean[split:], moments.own[j].mean),
            ):
                projection = weights[:, None] * rotations.T
                if len(projection):
                    projection = projection - projection.mean(axis=0)  # centring over k makes ρ a cosine
                folded[side].append(projection)
                folded[f"{side}_bias"].append(projection @ (center - mean))
        dtype = self.learned("center_0").dtype
        # Contiguous, as a loaded state is: with another layout a matrix product rounds differently.
        return CheckProjections(
            **{n: [torch.tensor(value, dtype=dtype).contiguous() for value in values] for n, values in folded.items()},
            triangular=True,
        )

    def _calibrate(self, part: CheckSample, projections: CheckProjections) -> None:
        """Learn every statistic's tables, and the correlation's power, from samples scored by the other folds."""
        measured: list[dict[str, Tensor]] = []
        present: list[Tensor] = []
        swapped: list[list[tuple[Tensor, Tensor]]] = []
        for f in CrossFitting.folds:
            inside = part.fold == f
            if not inside.any():
                continue
            unseen = self._solve(part.total_moments(left_out=f))
            vectors = [vector[inside].to(unseen.center[0].dtype) for vector in part.vectors]
            # Where the other folds lack a modality, or hold one sample of it, every energy is 0: nothing is measured.
            measurable = torch.tensor([whitener.shape[0] > 0 for whitener in unseen.whitener])
            present.append(part.available[inside] & measurable)
            measured.append(self._measure(vectors, unseen))
            swapped.append(correlate_swapped(vectors, present[-1], unseen))
        device = self.learned("center_0").device
        available = torch.cat(present).to(device)
        for statistic in self._statistics:
            values = torch.cat([by_name[statistic.name] for by_name in measured]).to(device)
            self.register_learned(**statistic.calibrate(values, available, projections))
        of_modality = [
            (torch.cat(values).to(device), torch.cat(mixed).to(device))
            for values, mixed in (zip(*folds, strict=True) for folds in zip(*swapped, strict=True))
        ]
        power = self._correlation.power(of_modality, self._tables(self._correlation))
        self.register_learned(correlation_power_=power)

    def _warn_if_few_samples(self) -> None:
        config = self.config
        samples = min((count for count in self.learned("energy_count").tolist() if count), default=0)
        # Outside the range of the calibration samples the energy has no smallest p-value; the correlation has 1/(n+1).
        if samples and config.statistic != "correlation":
            few = 2 / (samples + 1) > config.alpha
            consequence = f"up to {2 / (samples + 1):.3f} of clean samples may lose a modality"
        else:
            few = config.threshold is None and 1 / (samples + 1) >= config.alpha
            consequence = "no modality can be judged ineffectual"
        if few:
            warnings.warn(
                f"{samples} calibration samples are too few for alpha={config.alpha}: {consequence}",
                UserWarning,
                stacklevel=5,  # the caller of fit
            )

    # --- judging ---

    def _tables(self, statistic: ConformalStatistic) -> Tables:
        return {name: self.learned(name) for name in statistic.tables}

    def _combine(self, p_values: list[Tensor]) -> Tensor:
        """The p-value that decides, from those of the statistics in the settings."""
        alone = [not statistic.compares for statistic in self._asked]
        if all(alone) or not any(alone):
            return combine_p_values(p_values, self._asked)
        without = combine_p_values(list(compress(p_values, alone)), list(compress(self._asked, alone)))
        if self.config.threshold is not None:
            return without
        has_power = self.learned("correlation_power_") >= _MIN_POWER
        return torch.where(has_power, combine_p_values(p_values, self._asked), without)
