"""The modality check (step 1 of the method): which modalities of a sample can be trusted.

Dimension legend: M modalities, B samples, T time steps, d_m features of modality m, D_m features of its utterance
vector (d_m, or 2·d_m with pooling "mean_std"), P pairs of modalities, k_p components of pair p, n calibration samples,
S = 2^(M-1) sets of other modalities.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from sklearn.exceptions import NotFittedError
from torch import Tensor

from m3er_fast.cca import canonical_directions, whiten
from m3er_fast.config import CheckConfig, Pooling, Rule, Statistic
from m3er_fast.fitted_module import FittedModule
from m3er_fast.functional import unchecked
from m3er_fast.inputs import Features, FeatureSource, check_input_dims, iterate_batches, prepare_batch
from m3er_fast.moments import Moments
from m3er_fast.operands import CheckProjections, modality_pairs, upcast
from m3er_fast.standardize import StandardizedBatch, clean_frames

# Calibration: each fold is scored by projections learned from the others. Folds are made of whole blocks of
# neighbouring samples, for these often come from one recording: calibrated on recordings that the projections have
# seen, the check would condemn every new one.
_FOLDS = 10
_BLOCKS = 64
# The most samples that are worth keeping: a p-value's own standard error at 0.05 is then below 0.0035.
_MOST_CALIBRATION = 4096

# Recordings differ in level: energy counts as odd only beyond what calibration has seen by this factor, 3 dB. On
# CMU-MOSI's faces a sixth of the published test split lies below the lowest 2.5 % of the training split, but hardly
# any by half.
_LEVEL_TOLERANCE = 2.0
# The combined check's share of alpha that goes to the correlation; the energy's tolerance leaves most of its own idle.
_CORRELATION_SHARE = 0.9
# The combined check asks the correlation only where it recognises at least half of the modalities that come from
# another sample. On CMU-MOSI it recognises 13 to 26 %, and condemns 6 to 16 % of the right ones; on the generated
# corpus of moderate correlation 72 %.
_LEAST_POWER = 0.5


class CheckResult(NamedTuple):
    """What the modality check says of a batch; every entry is finite."""

    effective: Tensor  # (B, M) bool
    correlation: Tensor  # (B, P) ρ of each pair, 0 where undefined or a side is unavailable
    energy: Tensor  # (B, M) mean squared whitened coordinate, 0 where unavailable
    p_value: Tensor  # (B, M) conformal p-value of "this modality is as in training", 0 where unavailable


class ModalityCheck(FittedModule):
    """Judges, per sample, which modalities are effective and which are noise.

    On the utterance vectors f_m (mean over valid frames) two statistics are measured (formulas at
    :func:`m3er_fast.functional.check_statistics`): the *correlation* ρ_ij of each pair across its canonical components
    (Mittal et al. 2020, arXiv 1911.05659), and the *energy* of each modality in its own whitened space, which the
    paper does not have: ρ does not see scale, and weakly correlated modalities it hardly tells from noise.

    Both become conformal p-values (Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World", 2005) against
    training samples that the projections did not see: the share of calibration samples at least as odd as this one.
    A modality is ineffectual if p < ``alpha``, so that on clean data exchangeable with the training data a share of
    ``alpha`` of the samples, or less, loses it.

    * correlation: ρ_mj is ranked among the calibration samples' and the largest rank over the other available
      modalities j counts (rule "all": ineffectual only if it fails against every other), or the smallest ("any").
      Low is odd. Without another modality to compare with there is no evidence, and p = 1.
    * energy: two-sided, for noise raises it, silence and frozen sensors lower it: p = min(1, 2·min(p_high(E/2),
      p_low(2E))). Recordings differ in level, and twice or half the energy E is not held against one.
    * combined: p = min(1, p_correlation / 0.9, p_energy / 0.1), a weighted Bonferroni sum. A modality whose p_energy is
      below ``alpha`` is not compared with, so that one bad modality does not discredit the good ones. Where the
      correlation cannot tell (``correlation_power_`` below 1/2), p = p_energy.

    Energies beyond all of calibration have p-values below the smallest conformal one, 1/(n+1), in proportion to how
    far beyond they are: that orders them, and lets a small calibration set recognise gross noise.

    With ``threshold`` τ the paper's form replaces the correlation's p-value: ineffectual if ρ < τ against every other
    modality (or any, by ``rule``); in the combined check the energy is then tested alone at ``alpha``.

    Args:
        input_dims: feature count d_m of each modality, in order; at least two.
        n_components: ceiling of the canonical components of a pair (the paper's 100).
        statistic: "combined", "energy", or "correlation" (the paper).
        rule: "all" or "any", see above.
        alpha: share of clean samples that may lose a modality.
        threshold: τ, one number or one a pair; None calibrates instead.
        component_weights: "canonical" scales component c of both sides by sqrt(s_c), s the canonical correlations;
            None is the paper.
        pooling: "mean", or "mean_std": mean and standard deviation over the frames side by side.
        ridge: shrinkage of each covariance, in units of its mean variance.

    Attributes:
        correlation_power_: (M,) share of calibration samples in which the correlation finds modality m ineffectual, at
            level alpha, when it is swapped for that of the sample half a fold away; empty before ``fit``.
        projections_: the fitted matrices, as ``functional.check_statistics`` takes them.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    def __init__(
        self,
        input_dims: Mapping[str, int],
        n_components: int = 100,
        statistic: Statistic = "combined",
        rule: Rule = "all",
        alpha: float = 0.05,
        threshold: float | tuple[float, ...] | None = None,
        component_weights: Literal["canonical"] | None = "canonical",
        pooling: Pooling = "mean",
        ridge: float = 1e-3,
    ) -> None:
        super().__init__()
        self.input_dims = check_input_dims(input_dims)
        if len(self.input_dims) < 2:
            raise ValueError(
                f"input_dims: the check compares modalities, so it needs two or more, got {self.input_dims}"
            )
        self.config = CheckConfig(n_components, statistic, rule, alpha, threshold, component_weights, pooling, ridge)
        self._pairs = modality_pairs(len(self.input_dims))
        if isinstance(self.config.threshold, tuple) and len(self.config.threshold) != len(self._pairs):
            raise ValueError(
                f"threshold has {len(self.config.threshold)} values, wanted one for {len(self._pairs)} pairs"
            )
        nothing = torch.zeros(0)
        self.register_learned(
            **{f"center_{m}": nothing for m in range(len(self.input_dims))},
            **{f"whitener_{m}": nothing for m in range(len(self.input_dims))},
            **{f"{side}_{p}": nothing for p in range(len(self._pairs)) for side in _PAIR_BUFFERS},
            pair_scores=nothing,
            pair_count=nothing.long(),
            rank_scores=nothing,
            rank_count=nothing.long(),
            energy_scores=nothing,
            energy_count=nothing.long(),
            correlation_power_=nothing,
        )

    @property
    def is_fitted(self) -> bool:
        """Whether ``fit`` was called, or a fitted state loaded."""
        return self.learned("energy_count").numel() > 0

    @property
    def projections_(self) -> CheckProjections:
        """The fitted matrices with every constant folded in; before ``fit`` there is no such attribute."""
        if not self.is_fitted:
            raise AttributeError("projections_ exists once fit has been called")
        return self._projections()

    def _projections(self) -> CheckProjections:
        modalities, pairs = range(len(self.input_dims)), range(len(self._pairs))
        return CheckProjections(
            center=[self.learned(f"center_{m}") for m in modalities],
            left=[self.learned(f"left_{p}") for p in pairs],
            left_bias=[self.learned(f"left_bias_{p}") for p in pairs],
            right=[self.learned(f"right_{p}") for p in pairs],
            right_bias=[self.learned(f"right_bias_{p}") for p in pairs],
            whitener=[self.learned(f"whitener_{m}") for m in modalities],
            triangular=True,
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Whiteners of an earlier version's state are dense: triangular ones give the same energies."""
        for m in range(len(self.input_dims)):
            whitener = state_dict.get(f"{prefix}whitener_{m}")
            if whitener is not None and whitener.ndim == 2 and bool(whitener.tril(-1).count_nonzero()):
                state_dict[f"{prefix}whitener_{m}"] = torch.linalg.qr(whitener.double(), mode="r").R.to(whitener)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def fit(self, features: FeatureSource, lengths: Any = None, available: Any = None) -> Self:
        """Learn projections and calibration from clean training data.

        The projections are learned from all samples. Calibration is by cross-fitting: the samples are cut into ten
        folds, and each (of 4096 seeded samples in all, if there are more) is scored by projections that did not see
        its fold. Folds consist of whole blocks of neighbours: keep the samples of a recording together.

        A pair that is never together, or a modality that is never there, or only in one fold, has no statistics: it is
        not judged by them.

        Args:
            features: mapping from modality to (N, T, d_m) or (N, d_m), or a re-iterable of such batches.
            lengths: (N,) valid leading frames.
            available: (N, M) bool.

        Raises:
            ValueError: for bad input, or if there is no sample at all.

        Warns:
            UserWarning: if the calibration samples of a modality are so few that more than a share alpha of clean ones
                may lose it, or, with no energy to go by, that none can.
        """
        return self.fit_batches(
            lambda: map(clean_frames, iterate_batches(features, lengths, available, input_dims=self.input_dims))
        )

    def fit_batches(self, batches: Callable[[], Iterable[StandardizedBatch]]) -> Self:
        """:meth:`fit` from standardised batches; ``batches`` is called twice and must give the same ones."""
        total = sum(batch.lengths.shape[0] for batch in batches())
        return self.fit_statistics(self.statistics(batches(), total=total))

    def statistics(self, batches: Iterable[StandardizedBatch], *, total: int, start: int = 0) -> CheckStatistics:
        """What ``fit`` has to know of some of the training samples; that of the others can be merged into it.

        Args:
            batches: standardised samples that follow each other in the training data.
            total: samples of the whole training data: it decides which fold a sample is in, and which are scored.
            start: number of the first of these samples in the training data.
        """
        modalities = len(self.input_dims)
        block_to_fold = np.random.default_rng(0).permutation(_BLOCKS) % _FOLDS
        # `choice` of a few among many takes neither the time nor the memory that a permutation of all would.
        scored = np.arange(total)
        if total > _MOST_CALIBRATION:
            scored = np.sort(np.random.default_rng(0).choice(total, _MOST_CALIBRATION, replace=False))
        widths = [self._vector_size(dim) for dim in self.input_dims.values()]
        nothing = [torch.zeros(0, width, dtype=torch.float64) for width in widths]
        parts = [[*nothing, torch.zeros(0, modalities, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)]]
        folds: dict[int, _PairedMoments] = {}
        for batch in batches:
            vectors = [vector.double().cpu() for vector in self._pool(batch)]
            present = batch.available.cpu()
            number = np.arange(start, start + present.shape[0])
            start += present.shape[0]
            fold_of = torch.from_numpy(block_to_fold[number * _BLOCKS // max(total, 1)])
            for f in range(_FOLDS):
                chosen = fold_of == f
                if not chosen.any():
                    continue
                moments = folds.setdefault(f, _PairedMoments(widths))
                moments.update([vector[chosen] for vector in vectors], present[chosen])
            kept = torch.from_numpy(np.isin(number, scored, assume_unique=True))
            parts.append([column[kept] for column in (*vectors, present, fold_of)])
        *kept_vectors, available, fold = (torch.cat(columns) for columns in zip(*parts, strict=True))
        return CheckStatistics(folds, kept_vectors, available, fold)

    def fit_statistics(self, statistics: CheckStatistics) -> Self:
        """:meth:`fit` from what :meth:`statistics` gave for all of the training data, merged in its order.

        Raises:
            ValueError: if there is no sample at all.

        Warns:
            UserWarning: as ``fit`` does.
        """
        folds, kept, available, fold = statistics
        if not folds:
            raise ValueError("features: no sample to fit the modality check to")
        widths = [self._vector_size(dim) for dim in self.input_dims.values()]
        projections = self._solve(_PairedMoments(widths, (folds[f] for f in sorted(folds))))
        self.register_learned(
            **{f"{name}_{n}": value for name in _MATRICES for n, value in enumerate(getattr(projections, name))}
        )
        judged, swapped = [], []
        for f in range(_FOLDS):
            others = self._solve(_PairedMoments(widths, (folds[g] for g in sorted(folds) if g != f)))
            chosen = fold == f
            vectors = [vector[chosen].to(others.center[0].dtype) for vector in kept]
            # Where the other folds lack a modality, or hold but one sample, every energy is 0: that is no measurement.
            measured = torch.tensor([whitener.shape[0] > 0 for whitener in others.whitener])
            present = available[chosen] & measured
            judged.append((*unchecked.check_statistics(vectors, others), present))
            swapped.append(_swap_each(vectors, present, others))
        device = self.learned("center_0").device
        self._calibrate(*(torch.cat(columns).to(device) for columns in zip(*judged, strict=True)))
        self._measure_power(swapped)
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
        """The same as :meth:`check`."""
        return self.check(features, lengths, available)

    def check_batch(self, batch: StandardizedBatch) -> CheckResult:
        """:meth:`check` on a batch that is cleaned already."""
        self._require_fitted()
        vectors = [vector.to(self.learned("center_0").dtype) for vector in self._pool(batch)]
        available = batch.available
        together = torch.stack([available[:, i] & available[:, j] for i, j in self._pairs], dim=1)
        correlation, energy = unchecked.check_statistics(vectors, self._projections())
        correlation = correlation.where(together, 0.0)
        energy = energy.where(available, 0.0)
        config = self.config
        by_energy = self._energy_p_value(energy)
        trusted = available if config.statistic != "combined" else available & (by_energy >= config.alpha)
        by_correlation = self._correlation_p_value(correlation, trusted)
        if config.statistic == "correlation":
            p_value = by_correlation
        elif config.statistic == "energy" or config.threshold is not None:
            p_value = by_energy
        else:
            both = torch.minimum(by_correlation / _CORRELATION_SHARE, by_energy / (1.0 - _CORRELATION_SHARE))
            telling = self.learned("correlation_power_") >= _LEAST_POWER
            p_value = torch.where(telling, both, by_energy)
        p_value = p_value.clamp(max=1.0)
        p_value = p_value.where(available, 0.0)
        effective = available & (p_value >= config.alpha)
        if config.threshold is not None and config.statistic != "energy":
            passes = self._passes_threshold(correlation, trusted)
            effective = available & passes if config.statistic == "correlation" else effective & passes
        return CheckResult(effective, correlation, energy, p_value)

    # --- fitting ---

    def _solve(self, moments: _PairedMoments) -> CheckProjections:
        config = self.config
        folded: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in _MATRICES}
        for own in moments.own:
            folded["center"].append(own.mean)
            # Energy is a sum of squares, the same after any rotation: a triangular matrix has half the work in it.
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
        # Contiguous, as a loaded state is: another layout makes a matrix product round differently.
        return CheckProjections(
            **{n: [torch.tensor(value, dtype=dtype).contiguous() for value in values] for n, values in folded.items()},
            triangular=True,
        )

    def _calibrate(self, correlation: Tensor, energy: Tensor, available: Tensor) -> None:
        modalities = len(self.input_dims)
        together = torch.stack([available[:, i] & available[:, j] for i, j in self._pairs], dim=1)
        components = torch.tensor([self.learned(f"left_{p}").shape[0] for p in range(len(self._pairs))])
        # A correlation over fewer than two components is never defined: such a pair is no evidence either way.
        together = together & (components > 1).to(together.device)
        scores, count = _sorted_columns(_decisive(correlation), together)
        self.register_learned(pair_scores=scores, pair_count=count)
        # A calibration sample counts in its own rank: against rule "all" the p-value of a new sample is then exactly
        # the one that ranking all n + 1 samples together would give.
        rank = self._ranks(correlation)
        present = self._comparable(available)
        tables, counts = [], []
        for m in range(modalities):
            for others in self._other_sets(m):
                usable = available[:, m] & present[:, m, others].all(dim=1)
                table, number = _sorted_columns(self._reduce(rank[:, m, others])[:, None], usable[:, None])
                tables.append(table[0])
                counts.append(number[0])
        energy_scores, energy_count = _sorted_columns(energy, available)
        self.register_learned(
            rank_scores=torch.stack(tables),
            rank_count=torch.stack(counts),
            energy_scores=energy_scores,
            energy_count=energy_count,
        )
        config = self.config
        samples = min((number for number in energy_count.tolist() if number), default=0)
        # Beyond the calibration samples on either side energy has no smallest p-value; correlation has 1/(n+1).
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

    def _measure_power(self, swapped: list[list[tuple[Tensor, Tensor]]]) -> None:
        """Set ``correlation_power_`` from what :func:`_swap_each` gives for each fold."""
        device = self.learned("center_0").device
        power = []
        for m, folds in enumerate(zip(*swapped, strict=True)):
            correlation, available = (torch.cat(columns).to(device) for columns in zip(*folds, strict=True))
            p_value = self._correlation_p_value(correlation, available)[available[:, m], m]
            power.append((p_value < self.config.alpha).float().mean().nan_to_num(0.0))  # NaN: never available
        self.register_learned(correlation_power_=torch.stack(power))

    # --- judging ---

    def _require_fitted(self) -> None:
        if not self.is_fitted:
            raise NotFittedError("this ModalityCheck is not fitted: call fit with clean training data first")

    def _vector_size(self, dim: int) -> int:
        return 2 * dim if self.config.pooling == "mean_std" else dim

    def _pool(self, batch: StandardizedBatch) -> list[Tensor]:
        """Utterance vectors (B, D_m)."""
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

    def _comparable(self, available: Tensor) -> Tensor:
        """(B, M, M) bool: j is there, and its pair with m was seen in calibration."""
        result = torch.zeros((*available.shape, available.shape[1]), dtype=torch.bool, device=available.device)
        for p, (i, j) in enumerate(self._pairs):
            known = self.learned("pair_count")[p] > 0
            result[:, i, j] = available[:, j] & known
            result[:, j, i] = available[:, i] & known
        return result

    def _ranks(self, correlation: Tensor) -> Tensor:
        """(B, M, M) share of calibration samples whose ρ of that pair is no larger."""
        batch, modalities = correlation.shape[0], len(self.input_dims)
        rank = correlation.new_zeros((batch, modalities, modalities))
        values = _decisive(correlation)
        for p, (i, j) in enumerate(self._pairs):
            below = torch.searchsorted(self.learned("pair_scores")[p], values[:, p].contiguous(), right=True)
            share = below / self.learned("pair_count")[p].clamp(min=1)
            rank[:, i, j] = share
            rank[:, j, i] = share
        return rank

    def _other_sets(self, m: int) -> list[list[int]]:
        """Every set of modalities other than m; set number s holds the c-th of the others if bit c of s is set."""
        others = [j for j in range(len(self.input_dims)) if j != m]
        return [[j for c, j in enumerate(others) if s >> c & 1] for s in range(2 ** len(others))]

    def _reduce(self, rank: Tensor) -> Tensor:
        if not rank.shape[1]:
            return rank.new_ones(rank.shape[0])  # nothing to compare with
        return rank.amax(dim=1) if self.config.rule == "all" else rank.amin(dim=1)

    def _correlation_p_value(self, correlation: Tensor, available: Tensor) -> Tensor:
        """(B, M): share of like calibration samples that correlate no better; 1 without evidence."""
        rank, comparable = self._ranks(correlation), self._comparable(available)
        columns = []
        row = 0
        for m in range(len(self.input_dims)):
            p_value = torch.ones_like(rank[:, m, m])
            others_of_m = [j for j in range(len(self.input_dims)) if j != m]
            for others in self._other_sets(m):
                # Only samples with the same modalities are alike: a maximum over two ranks is no maximum of one.
                alike = torch.stack([comparable[:, m, j] == (j in others) for j in others_of_m]).all(dim=0)
                score = self._reduce(rank[:, m, others])
                below = torch.searchsorted(self.learned("rank_scores")[row], score.contiguous(), right=True)
                p_value = torch.where(alike, (1 + below) / (1 + self.learned("rank_count")[row]), p_value)
                row += 1
            columns.append(p_value)
        return torch.stack(columns, dim=1)

    def _energy_p_value(self, energy: Tensor) -> Tensor:
        """(B, M): twice the share of calibration samples with as much as half the energy, or as little as twice it.

        Beyond the last calibration sample a share goes on falling, from 1/(n+1), with the ratio of the energies.
        """
        columns = []
        for m, value in enumerate(energy.unbind(1)):
            scores, count = self.learned("energy_scores")[m], self.learned("energy_count")[m]
            half, twice = (value / _LEVEL_TOLERANCE).contiguous(), (value * _LEVEL_TOLERANCE).contiguous()
            # Gathered: as a subscript the number would be read by the host, which would wait for the device.
            largest, smallest = scores.gather(0, (count - 1).clamp(min=0).view(1)), scores[0]
            above = count - torch.searchsorted(scores, half, right=False)
            below = torch.searchsorted(scores, twice, right=True)
            high = above + torch.where(half > largest, largest / half, 1.0)
            low = below + torch.where(twice < smallest, twice / smallest, 1.0)
            p_value = (2.0 * torch.minimum(high, low) / (1 + count)).clamp(max=1.0)
            columns.append(p_value.where(count > 0, 1.0))
        return torch.stack(columns, dim=1)

    def _passes_threshold(self, correlation: Tensor, available: Tensor) -> Tensor:
        """(B, M) bool: ρ ≥ τ against some other modality (rule "all") or against each (rule "any")."""
        given = self.config.threshold
        assert given is not None
        values = given if isinstance(given, tuple) else (given,) * len(self._pairs)
        # Filled where they lie: a tensor made of a list would wait for the device, and cannot be part of a CUDA graph.
        threshold = torch.stack([correlation.new_full((), value) for value in values])
        high = _decisive(correlation) >= threshold
        comparable = self._comparable(available)
        passed = torch.zeros_like(comparable)
        for p, (i, j) in enumerate(self._pairs):
            passed[:, i, j] = high[:, p]
            passed[:, j, i] = high[:, p]
        if self.config.rule == "all":
            return (passed & comparable).any(dim=2) | ~comparable.any(dim=2)
        return (passed | ~comparable).all(dim=2)

    def extra_repr(self) -> str:
        """The settings, for ``print(module)``."""
        return f"{self.input_dims}, {self.config}, fitted={self.is_fitted}"


class CheckStatistics(NamedTuple):
    """What a check has to know of its training samples, from :meth:`ModalityCheck.statistics`."""

    folds: dict[int, _PairedMoments]  # fold -> moments of its samples; folds without a sample are left out
    kept: list[Tensor]  # M of (n, D_m) float64: utterance vectors of the samples that will be scored
    available: Tensor  # (n, M) bool
    fold: Tensor  # (n,) int64

    def merge(self, other: CheckStatistics) -> CheckStatistics:
        """Both together; ``other`` is of the samples that follow these, and takes part in the result."""
        folds = dict(self.folds)
        for f, moments in other.folds.items():
            folds[f] = _PairedMoments(moments.widths, (folds[f], moments)) if f in folds else moments
        return CheckStatistics(
            folds,
            [torch.cat(both) for both in zip(self.kept, other.kept, strict=True)],
            torch.cat([self.available, other.available]),
            torch.cat([self.fold, other.fold]),
        )


class _PairedMoments:
    """Moments of each modality alone, and of each pair where both are there."""

    def __init__(self, widths: list[int], parts: Iterable[_PairedMoments] = ()) -> None:
        self.widths = widths
        self.pairs = modality_pairs(len(widths))
        self.own = [Moments(width) for width in widths]
        self.joint = [Moments(widths[i] + widths[j]) for i, j in self.pairs]
        for part in parts:
            for mine, other in zip((*self.own, *self.joint), (*part.own, *part.joint), strict=True):
                mine.merge(other)

    def update(self, vectors: list[Tensor], present: Tensor) -> None:
        for m, own in enumerate(self.own):
            own.update(vectors[m][present[:, m]].numpy())
        for (i, j), joint in zip(self.pairs, self.joint, strict=True):
            both = present[:, i] & present[:, j]
            joint.update(vectors[i][both].numpy(), vectors[j][both].numpy())


_PAIR_BUFFERS = ("left", "left_bias", "right", "right_bias")
_MATRICES = ("center", *_PAIR_BUFFERS, "whitener")


def _swap_each(vectors: list[Tensor], available: Tensor, projections: CheckProjections) -> list[tuple[Tensor, Tensor]]:
    """For each modality, ρ and what is available when it comes from the sample half a fold away.

    That far away is, as a rule, another recording: a fold consists of several blocks.
    """
    half = available.shape[0] // 2
    swapped = []
    for m, vector in enumerate(vectors):
        mixed = [*vectors[:m], vector.roll(half, 0), *vectors[m + 1 :]]
        present = available.clone()
        present[:, m] = available[:, m].roll(half, 0)
        swapped.append((unchecked.check_statistics(mixed, projections)[0], present))
    return swapped


def _decisive(correlation: Tensor) -> Tensor:
    """ρ as decisions read it: undefined, which is exactly 0, is below every real correlation."""
    return correlation.where(correlation != 0, -2.0)


def _sorted_columns(values: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """Each column's used values ascending, as a row padded with inf at its end; and how many they are."""
    return values.where(used, torch.inf).sort(dim=0).values.T.contiguous(), used.sum(dim=0)
