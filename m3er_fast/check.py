"""The modality check (step 1 of the method): which modalities of a sample can be trusted.

Dimension legend: M modalities, B samples, T time steps, d_m features of modality m, D_m features of its utterance
vector (d_m, or 2·d_m with pooling "mean_std"), P pairs of modalities, k_p components of pair p, n calibration samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3er_fast._check_calibration import MATRICES, calibrate, fit_projections
from m3er_fast._combined_score import CombinedScore
from m3er_fast._conformal import ConformalStatistic, Energy, PairCorrelation, PairLikelihood, Tables
from m3er_fast._cross_fitting import CheckSample, CrossFitting
from m3er_fast._settings import takes_settings_of
from m3er_fast._symptoms import (
    BELONGING,
    IGNORABLE,
    REASON_NUMBERS,
    REASONS,
    SequenceSample,
    SymptomModel,
    draw,
    reason_of,
    sample_sequences,
    say_of,
)
from m3er_fast._validation import check_choice, not_fitted
from m3er_fast._warnings import warn_user
from m3er_fast.config import CheckConfig
from m3er_fast.fitted_module import FittedModule, ordinary_tensors
from m3er_fast.functional import unchecked
from m3er_fast.inputs import Array, Features, FeatureSource, check_input_dims, prepare_batch
from m3er_fast.moments import PairwiseMoments
from m3er_fast.operands import CheckProjections, CheckStatistics, SequenceStatistics, modality_pairs
from m3er_fast.standardize import StandardizedBatch, clean_batches, clean_frames

__all__ = ["CheckResult", "CheckSample", "ModalityCheck"]

_PAIR_MATRICES = ("left", "left_bias", "right", "right_bias", "weight", "canonical")


class CheckResult(NamedTuple):
    """The verdict of the modality check on a batch; every entry is finite."""

    effective: Tensor  # (B, M) bool
    correlation: Tensor  # (B, P) ρ of each pair, 0 where undefined or one of the two is unavailable
    energy: Tensor  # (B, M) mean squared whitened coordinate, 0 where unavailable
    p_value: Tensor  # (B, M) conformal p-value of "this modality is as in training", 0 where unavailable
    reason: Tensor  # (B, M) int64, why a modality was rejected, an index of ``ModalityCheck.reasons``; 0 if it was not


@takes_settings_of(CheckConfig)
class ModalityCheck(FittedModule):
    """Verdict on each modality of a sample: effective, or noise.

    A modality is ineffectual if its p-value is below ``alpha``. The p-value is the share of calibration samples, which
    the fitted matrices did not see, that are at least as odd as this one (Vovk, Gammerman and Shafer, "Algorithmic
    Learning in a Random World", 2005). On clean data exchangeable with the training data, a share of ``alpha`` of the
    samples, or less, therefore loses it.

    * combined: the largest surprise of all *symptoms*, calibrated as one number. A surprise measures how far a symptom
      is from its median in training; 1 is the edge of what clean samples show. The symptoms are

      - the *level*, the energy of the utterance vector f_m (the mean over the valid frames) in its own whitened space;
        a factor of two is not held against a recording;
      - the *moments* of the frames and of their changes (:func:`m3er_fast.functional.sequence_statistics`): power,
        change, roughness (change over power), evenness over the features, repeated frames;
      - *detectors*, linear discriminants between clean training sequences and the same ones with seeded noise, lost
        frames, gain and shuffled frames; those that do not find their own corruption in unseen training sequences are
        not used;
      - *belonging*, the log likelihood ratio of "these two belong together" against each other modality
        (:func:`m3er_fast.functional.check_statistics`), ranked as ρ below. A modality that is odd by itself is not
        compared with, so that one bad modality does not discredit the good ones. Where it finds half of the modalities
        that are swapped in training (``correlation_power_``), it has half of what alpha allows.

      Symptoms of sequences have no say with one frame, and less with few. ``reason`` names the largest surprise.
    * correlation (the paper, arXiv 1911.05659): ρ_mj is ranked among the calibration samples' values. The largest rank
      over the other available modalities j counts (rule "all": ineffectual only if it fails against every other), or
      the smallest ("any"). Low is odd. Without another modality to compare with there is no evidence, and p = 1.
    * energy: two-sided, because noise raises it, and silence lowers it: p = min(1, 2·min(p_high(E/2), p_low(2E))).

    Outside the range of all calibration samples p-values go on falling below the smallest conformal one, 1/(n+1), in
    proportion to the distance. That orders them, and lets a small calibration set recognise gross faults.

    With ``threshold`` τ the paper's form replaces the comparison of modalities: ineffectual if ρ < τ against every
    other modality (or any, by ``rule``); in the combined check the other symptoms are then tested at ``alpha``.

    Args:
        input_dims: feature count d_m of each modality, in order; at least two.
        {settings}

    Attributes:
        correlation_power_: (M,) share of calibration samples in which the comparison of modalities alone (likelihood
            ratio, or ρ) recognises modality m, at level alpha, when it is swapped for that of the sample half a fold
            away; empty before ``fit``.
        projections_: the fitted matrices, as ``functional.check_statistics`` takes them.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    reasons: ClassVar[tuple[str, ...]] = REASONS
    """What a modality may be rejected for; ``CheckResult.reason`` holds their numbers."""

    @ordinary_tensors()
    def __init__(self, input_dims: Mapping[str, int], *settings: Any, **named_settings: Any) -> None:
        super().__init__()
        self.input_dims = check_input_dims(input_dims)
        modalities = len(self.input_dims)
        if modalities < 2:
            raise ValueError(
                f"input_dims: the check compares modalities, so it needs two or more, got {self.input_dims}"
            )
        self.config = config = CheckConfig(*settings, **named_settings)
        for name in config.ignore:
            check_choice("ignore", name, IGNORABLE)
        self._pairs = modality_pairs(modalities)
        if isinstance(config.threshold, tuple) and len(config.threshold) != len(self._pairs):
            raise ValueError(f"threshold has {len(config.threshold)} values, wanted one for {len(self._pairs)} pairs")
        self._statistics = (
            PairCorrelation(modalities, config),
            Energy(modalities, config),
            PairLikelihood(modalities, config),
        )
        self._correlation, self._energy, self._likelihood = self._statistics
        nothing = torch.zeros(0)
        self.register_learned(
            **{f"center_{m}": nothing for m in range(modalities)},
            **{f"whitener_{m}": nothing for m in range(modalities)},
            **{f"{name}_{p}": nothing for p in range(len(self._pairs)) for name in _PAIR_MATRICES},
        )
        for statistic in self._statistics:
            self.register_learned(**statistic.empty_tables())
        self.register_learned(**{f"{name}_{m}": nothing for name in SymptomModel._fields for m in range(modalities)})
        self.register_learned(
            **{name: nothing.long() if name.endswith("_count") else nothing for name in CombinedScore.tables}
        )
        self.register_learned(correlation_power_=nothing)
        self._reason_numbers: Tensor
        self.register_buffer("_reason_numbers", torch.tensor(REASON_NUMBERS), persistent=False)

    @property
    def is_fitted(self) -> bool:
        """Whether ``fit`` was called, or a fitted state loaded."""
        return self.learned("center_0").numel() > 0

    @property
    def projections_(self) -> CheckProjections:
        """The fitted matrices with every constant folded in; before ``fit`` there is no such attribute."""
        if not self.is_fitted:
            raise AttributeError("projections_ exists once fit has been called")
        modalities, pairs = range(len(self.input_dims)), range(len(self._pairs))
        return CheckProjections(
            **{
                name: [self.learned(f"{name}_{n}") for n in (pairs if name in _PAIR_MATRICES else modalities)]
                for name in MATRICES
            },
            triangular=True,
        )

    def fit(self, features: FeatureSource, *, lengths: Array | None = None, available: Array | None = None) -> Self:
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
                lose it or, without the energy, that no sample can; and as :meth:`m3er_fast.Standardizer.fit` does.
        """
        batches, watch = clean_batches(self.input_dims, features, lengths, available)
        self.fit_batches(batches)
        watch.warn()
        return self

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
        sequences = [SequenceSample.empty(dim) for dim in self.input_dims.values()]
        no_vectors = [torch.zeros(0, width, dtype=torch.float64) for width in widths]
        rows = [[*no_vectors, torch.zeros(0, len(widths), dtype=torch.bool), torch.zeros(0, dtype=torch.int64)]]
        for batch in batches:
            vectors = [vector.double().cpu() for vector in self._pool(batch)[0]]
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
            if self._uses_symptoms and bool(calibrates.any()):
                found = self._sample_sequences(batch, calibrates, numbers[calibrates.numpy()])
                sequences = [known.merge(new) for known, new in zip(sequences, found, strict=True)]
        *kept, available, fold = (torch.cat(columns) for columns in zip(*rows, strict=True))
        return CheckSample(moments, kept, available, fold, sequences)

    def _sample_sequences(
        self, batch: StandardizedBatch, chosen: Tensor, numbers: NDArray[np.int64]
    ) -> list[SequenceSample]:
        """The sequences of some samples of a batch, with these numbers in the training data."""
        valid = batch.frame_valid.cpu()[chosen]
        frames = [x.cpu()[chosen] for x in batch.features]
        draws = draw(numbers.tolist(), valid.shape[1], [*self.input_dims.values()])
        return [sample_sequences(x, valid[:, :, m], draws[m]) for m, x in enumerate(frames)]

    def fit_collected(self, part: CheckSample) -> Self:
        """:meth:`fit` from what :meth:`collect` gave for all of the training data, merged in its order.

        Raises:
            ValueError: if there is no sample at all.

        Warns:
            UserWarning: as ``fit`` does.
        """
        if not part.moments:
            raise ValueError("features: no sample to fit the modality check to")
        like = self.learned("center_0")
        projections = fit_projections(part.total_moments(), self.config, like.dtype)
        learned = {f"{name}_{n}": value for name in MATRICES for n, value in enumerate(getattr(projections, name))}
        learned |= calibrate(part, projections, self._statistics, self.config)
        self.register_learned(
            **{k: v.to(like.device, like.dtype if v.is_floating_point() else None) for k, v in learned.items()}
        )
        self._warn_if_few_samples()
        return self

    def check(self, features: Features, lengths: Array | None = None, available: Array | None = None) -> CheckResult:
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

    def forward(self, features: Features, lengths: Array | None = None, available: Array | None = None) -> CheckResult:
        """Return what :meth:`check` returns."""
        return self.check(features, lengths, available)

    def check_batch(self, batch: StandardizedBatch) -> CheckResult:
        """:meth:`check` for a batch that is cleaned already."""
        if not self.is_fitted:
            raise not_fitted("this ModalityCheck is not fitted: call fit with clean training data first")
        config, available = self.config, batch.available
        vectors, moments = self._pool(batch)
        statistics = unchecked.check_statistics(vectors, self.projections_)
        together = self._correlation.is_measured(available)
        measured = CheckStatistics(
            statistics.correlation.where(together, 0.0),
            statistics.energy.where(available, 0.0),
            statistics.likelihood.where(together, 0.0),
        )
        if config.statistic == "combined":
            p_value, trusted, reason = self._judge_symptoms(measured, vectors, moments, available)
        elif config.statistic == "energy":
            tables, trusted = self._tables(self._energy), available
            p_value = self._energy.p_value(measured.energy, available, tables)
            is_low = self._energy.is_low(measured.energy, tables)
            reason = torch.where(is_low, REASONS.index("too quiet"), REASONS.index("too loud"))
        else:
            tables, trusted = self._tables(self._correlation), available
            p_value = self._correlation.p_value(measured.correlation, available, tables)
            reason = torch.full_like(available, REASONS.index(BELONGING), dtype=torch.int64)
        p_value = p_value.clamp(max=1.0).where(available, 0.0)
        effective = available & (p_value >= config.alpha)
        if config.threshold is not None and config.statistic != "energy":
            tables = self._tables(self._correlation)
            passes = self._correlation.passes_threshold(measured.correlation, trusted, config.threshold, tables)
            reason = torch.where(passes | ~effective, reason, REASONS.index(BELONGING))
            effective = passes & (available if config.statistic == "correlation" else effective)
        reason = reason.where(available & ~effective, 0)
        return CheckResult(effective, measured.correlation, measured.energy, p_value, reason)

    def _judge_symptoms(
        self, measured: CheckStatistics, vectors: list[Tensor], moments: list[SequenceStatistics], available: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The p-values of the largest surprises, the modalities to compare with, and the reasons for rejections."""
        tables = {name: self.learned(name) for name in CombinedScore.tables}
        symptoms = []
        for m, (vector, found) in enumerate(zip(vectors, moments, strict=True)):
            model = SymptomModel(*(self.learned(f"{name}_{m}") for name in SymptomModel._fields))
            symptoms.append(model.measure(measured.energy[:, m], vector[:, : found.mean.shape[1]], found))
        of_modalities = torch.stack(symptoms, dim=1)
        say = say_of(torch.stack([found.pairs for found in moments], dim=1), self.config.ignore)
        surprises = CombinedScore.surprises(of_modalities, say, tables, tolerant=True)
        own = surprises.abs().amax(dim=2)
        # A modality that is odd by itself is no evidence about the others.
        p_own = CombinedScore.p_value(own, "own", tables)
        trusted = available & (p_own >= self.config.alpha)
        reason = reason_of(surprises, of_modalities, self._reason_numbers)
        if self.config.threshold is not None:
            return p_own, trusted, reason
        p_pairs = self._likelihood.p_value(measured.likelihood, trusted, self._tables(self._likelihood))
        belonging = CombinedScore.of_pairs(p_pairs, self.learned("correlation_power_"), self.config.ignore)
        reason = torch.where(belonging > own, REASONS.index(BELONGING), reason)
        return CombinedScore.p_value(torch.maximum(own, belonging), "combined", tables), trusted, reason

    def extra_repr(self) -> str:
        """Return the settings, for ``print(module)``."""
        return f"{self.input_dims}, {self.config}, fitted={self.is_fitted}"

    # --- what is measured, in fitting and judging ---

    def _vector_size(self, dim: int) -> int:
        return 2 * dim if self.config.pooling == "mean_std" else dim

    @property
    def _uses_symptoms(self) -> bool:
        return self.config.statistic == "combined"

    def _pool(self, batch: StandardizedBatch) -> tuple[list[Tensor], list[SequenceStatistics]]:
        """M utterance vectors (B, D_m), and the moments of the sequences that they come from."""
        vectors, moments = [], []
        dtype = self.learned("center_0").dtype
        for m, x in enumerate(batch.features):
            found = unchecked.sequence_statistics(x, batch.frame_valid[:, :, m])
            found = found._replace(**{n: getattr(found, n).to(dtype) for n in ("mean", "variance", "change")})
            moments.append(found)
            vector = found.mean
            if self.config.pooling == "mean_std":
                vector = torch.cat([vector, found.variance.sqrt()], dim=1)
            vectors.append(vector)
        return vectors, moments

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
            warn_user(f"{samples} calibration samples are too few for alpha={config.alpha}: {consequence}")

    def _tables(self, statistic: ConformalStatistic) -> Tables:
        return {name: self.learned(f"{statistic.prefix}{name}") for name in statistic.tables}
