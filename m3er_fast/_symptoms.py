"""The symptoms of a bad modality: what the combined check looks for, and what it calls what it finds.

Each symptom is a number per modality and sample. Some are *surprises*, measured against training, which need no idea of
what may go wrong: the level, and the moments of the frames and of their changes. The others are *detectors*: linear
discriminants between clean training sequences and the same ones with seeded corruptions, which find faint faults of
known kinds. To add a symptom, add its entry to ``SURPRISES`` or ``DETECTORS``.

Dimension legend: M modalities, B samples, T time steps, d features of a modality, S symptoms, n calibration samples, C
corruptions, F = 2d features of a detector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from m3er_fast._conformal import LEVEL_TOLERANCE
from m3er_fast.functional import unchecked
from m3er_fast.operands import SequenceStatistics

NO_REASON = "none"

# In units of the feature's mean square in training: a feature with a smaller variance counts as constant.
_LEAST_VARIANCE = 1e-3
# The same for means over the features, among which a frozen sequence must stand out.
_LEAST_TOTAL = 1e-6
# A sequence with this many pairs of frames has half a say: the moments of fewer frames vary more.
_HALF_SAY_PAIRS = 4
# Detectors read each feature within this many standard deviations, and shrink its covariance by this share of the mean
# variance. Fewer calibration sequences than this teach them nothing.
_DETECTOR_BOUND = 5.0
_DETECTOR_SHRINKAGE = 0.1
_LEAST_SHRINKAGE = 1e-3  # for a modality that does not change, whose features have no variance
_FEWEST_SEQUENCES = 20


class SequenceMoments(NamedTuple):
    """Moments of one modality that give its surprises; each feature in units of its mean square in training."""

    energy: Tensor  # (B,)
    power: Tensor  # (B,) mean square of the frames
    change: Tensor  # (B,)
    log_change: Tensor  # (B,) mean logarithm over the features
    repeated: Tensor  # (B,) share of the pairs of frames


class Surprise(NamedTuple):
    """A symptom that is odd if it leaves the range of training, on both sides or only above."""

    name: str
    measure: Callable[[SequenceMoments], Tensor]  # (B,)
    low: str | None  # the reason reported if it is low; None: other symptoms say why
    high: str | None
    tolerance: float = 0.0  # how far recordings may differ without being odd
    of_sequences: bool = True  # whether it needs pairs of frames
    two_sided: bool = True


class Detector(NamedTuple):
    """A symptom that is learned: clean training sequences against the same ones, corrupted."""

    name: str
    corrupt: Callable[[Tensor, Tensor, Draws], Tensor]  # (frames, valid, draws) -> frames
    reason: str


class Draws(NamedTuple):
    """The standard normal numbers of a corruption, each sample's from a seed of its own."""

    noise: Tensor  # (B, T, d)
    fate: Tensor  # (B, T)
    order: Tensor  # (B, T)


def _log_energy(x: SequenceMoments) -> Tensor:
    return x.energy.log()


def _log_power(x: SequenceMoments) -> Tensor:
    return x.power.add(_LEAST_TOTAL).log()


def _log_change(x: SequenceMoments) -> Tensor:
    return x.change.add(_LEAST_TOTAL).log()


def _log_roughness(x: SequenceMoments) -> Tensor:
    return ((x.change + _LEAST_VARIANCE) / (x.power + _LEAST_VARIANCE)).log()


def _log_evenness(x: SequenceMoments) -> Tensor:
    """How evenly the features change: the geometric mean of their changes over the arithmetic one."""
    return x.log_change - x.change.add(_LEAST_VARIANCE).log()


def _noise(snr: float) -> Callable[[Tensor, Tensor, Draws], Tensor]:
    def corrupt(x: Tensor, valid: Tensor, draws: Draws) -> Tensor:
        entries = valid.sum(dim=1).clamp(min=1) * x.shape[2]
        rms = (x.square().sum(dim=(1, 2)) / entries).sqrt()
        return x + draws.noise * (rms / math.sqrt(snr))[:, None, None] * valid[:, :, None]

    return corrupt


def _lose_frames(x: Tensor, valid: Tensor, draws: Draws) -> Tensor:
    return x * (draws.fate >= 0)[:, :, None]


def _double(x: Tensor, valid: Tensor, draws: Draws) -> Tensor:
    return 2.0 * x


def _reorder(x: Tensor, valid: Tensor, draws: Draws) -> Tensor:
    """Permute the valid frames among themselves."""
    places = (~valid).int().argsort(dim=1, stable=True)  # valid ones first, in order
    shuffled = draws.order.masked_fill(~valid, torch.inf).argsort(dim=1)
    index = places[:, :, None].expand_as(x)
    return x.scatter(1, index, x.gather(1, shuffled[:, :, None].expand_as(x)))


SURPRISES = (
    Surprise(
        "level",
        lambda x: x.energy.log(),
        "too quiet",
        "too loud",
        tolerance=math.log(LEVEL_TOLERANCE),
        of_sequences=False,
    ),
    Surprise("power", _log_power, "too quiet", "too loud"),
    Surprise("change", _log_change, None, None),  # power times roughness: one of these is the reason
    Surprise("roughness", _log_roughness, "frozen", "noisy"),
    Surprise("evenness", _log_evenness, "frames lost", "noisy"),
    Surprise("repeated frames", lambda x: x.repeated, None, "frames lost", two_sided=False),
)
DETECTORS = (
    Detector("noise", _noise(1.0), "noisy"),
    Detector("faint noise", _noise(10.0), "noisy"),
    Detector("lost frames", _lose_frames, "frames lost"),
    Detector("gain", _double, "too loud"),
    Detector("order", _reorder, "out of order"),
)
SYMPTOMS = (*(surprise.name for surprise in SURPRISES), *(detector.name for detector in DETECTORS))
BELONGING = "does not belong"

TWO_SIDED = (*(surprise.two_sided for surprise in SURPRISES), *(False for _ in DETECTORS))

_LOW = (*(surprise.low for surprise in SURPRISES), *(None for _ in DETECTORS))
_HIGH = (*(surprise.high for surprise in SURPRISES), *(detector.reason for detector in DETECTORS))
REASONS = (NO_REASON, *dict.fromkeys(reason for reason in (*_LOW, *_HIGH, BELONGING) if reason is not None))
"""What a modality may be rejected for, by number; 0 is no reason."""

REASON_NUMBERS = [[REASONS.index(reason or NO_REASON) for reason in side] for side in (_LOW, _HIGH)]
"""Of each symptom if it is low, and if it is high."""

_POWER, _CHANGE, _ROUGHNESS, _REPEATED = map(SYMPTOMS.index, ("power", "change", "roughness", "repeated frames"))


def reason_of(surprises: Tensor, symptoms: Tensor, numbers: Tensor) -> Tensor:
    """Return (B, M) int64, the one of ``numbers`` (2, S) that belongs to the largest of (B, M, S) surprises.

    Among the detectors the likeliest fault is the reason. Repeated frames mean that frames were lost; but if frames
    change less than in training, the sequence is quiet, or frozen for a while.
    """
    low, high = numbers
    is_named = torch.where(surprises < 0, low, high) != 0
    which = surprises.abs().where(is_named, -1.0).argmax(dim=2)
    detected = symptoms.where(surprises > 0, -torch.inf)[:, :, len(SURPRISES) :]
    likeliest = len(SURPRISES) + detected.argmax(dim=2)
    which = torch.where(which < len(SURPRISES), which, likeliest)
    is_still = (which == _REPEATED) & (surprises[:, :, _CHANGE] < 0)
    which = torch.where(
        is_still, torch.where(surprises[:, :, _POWER] < surprises[:, :, _ROUGHNESS], _POWER, _ROUGHNESS), which
    )
    is_low = is_still | (surprises.gather(2, which[:, :, None])[:, :, 0] < 0)
    return torch.where(is_low, low[which], high[which])


IGNORABLE = (*SYMPTOMS, "belonging")
"""What ``CheckConfig.ignore`` may name."""


def say_of(pairs: Tensor, ignored: Collection[str] = ()) -> Tensor:
    """Return (B, M, S), how much each symptom counts: those of sequences less with few ``pairs`` (B, M) of frames."""
    share = pairs / (pairs + _HALF_SAY_PAIRS)
    none, whole = torch.zeros_like(share), torch.ones_like(share)
    needs_pairs = (*(surprise.of_sequences for surprise in SURPRISES), *(True for _ in DETECTORS))
    says = [
        none if name in ignored else share if needed else whole
        for name, needed in zip(SYMPTOMS, needs_pairs, strict=True)
    ]
    return torch.stack(says, dim=2)


# --- Sequences of training ---


class SequenceSample(NamedTuple):
    """The moments of one modality's calibration sequences, as they are and corrupted."""

    variance: Tensor  # (n, d) float32
    change: Tensor  # (n, d) float32
    repeated: Tensor  # (n,) int64
    pairs: Tensor  # (n,) int64
    corrupted: Tensor  # (n, C, F) float32, variances and changes under each corruption

    def merge(self, other: SequenceSample) -> SequenceSample:
        """Return both as one; the sequences of ``other`` follow these."""
        return SequenceSample(*(torch.cat(both) for both in zip(self, other, strict=True)))

    @classmethod
    def empty(cls, features: int) -> SequenceSample:
        """Return a sample without sequences."""
        none, count = torch.zeros(0, features), torch.zeros(0, dtype=torch.int64)
        return cls(none, none, count, count, torch.zeros(0, len(DETECTORS), 2 * features))


def draw(seeds: Iterable[int], steps: int, features: Sequence[int]) -> list[Draws]:
    """Return each modality's random numbers. A sample's depend on its seed alone, and not on the padding."""
    # NumPy draws one number after the other: the first of many are the first of few. PyTorch's last 16 are not.
    width = sum(features) + 2
    numbers = [np.random.default_rng(seed).standard_normal((steps, width), np.float32) for seed in seeds]
    *noise, fate, order = torch.split(torch.from_numpy(np.stack(numbers)), [*features, 1, 1], dim=2)
    return [Draws(one, fate[:, :, 0], order[:, :, 0]) for one in noise]


def sample_sequences(x: Tensor, valid: Tensor, draws: Draws) -> SequenceSample:
    """Return the moments of frames (n, T, d), clean and under the corruption of every detector."""
    x = x.to("cpu", torch.float32)
    clean = unchecked.sequence_statistics(x, valid)
    corrupted = [unchecked.sequence_statistics(detector.corrupt(x, valid, draws), valid) for detector in DETECTORS]
    moments = torch.stack([torch.cat([found.variance, found.change], dim=1) for found in corrupted], dim=1)
    return SequenceSample(clean.variance, clean.change, clean.repeated, clean.pairs, moments)


# --- Symptoms of a modality ---


class SymptomModel(NamedTuple):
    """What is learned of one modality's symptoms; buffers of the check."""

    square: Tensor  # (d,) mean square of each feature in training, 1 where it is 0
    detector_center: Tensor  # (F,)
    detector_scale: Tensor  # (F,)
    detector_weight: Tensor  # (C, F)

    def measure(self, energy: Tensor, vector: Tensor, found: SequenceStatistics) -> Tensor:
        """Return the (B, S) symptoms of utterance vectors (B, d) and of the moments of their sequences."""
        dim = self.square.shape[0]
        per_feature = self.square.mul(dim).reciprocal()
        features = detector_features(found.variance, found.change, self.square)
        moments = SequenceMoments(
            energy=energy,
            power=found.variance.addcmul(vector, vector) @ per_feature,
            change=found.change @ per_feature,
            log_change=features[:, dim:].mean(dim=1),
            repeated=found.repeated.to(energy.dtype) / found.pairs.clamp(min=1),
        )
        surprises = torch.stack([surprise.measure(moments) for surprise in SURPRISES], dim=1)
        features.sub_(self.detector_center).div_(self.detector_scale).clamp_(-_DETECTOR_BOUND, _DETECTOR_BOUND)
        symptoms = torch.cat([surprises, features @ self.detector_weight.mT], dim=1)
        largest = torch.finfo(symptoms.dtype).max
        return symptoms.nan_to_num(largest, largest, -largest)


def detector_features(variance: Tensor, change: Tensor, square: Tensor) -> Tensor:
    """Return (..., F): logarithms of each feature's variance over time and of its change, both over ``square`` (d,)."""
    features = torch.cat([variance, change], dim=-1)
    return features.div_(torch.cat([square, square])).add_(_LEAST_VARIANCE).log_()


class DetectorSums(NamedTuple):
    """Sums over sequences from which detectors are solved; those of disjoint sequences add up."""

    sequences: int
    total: Tensor  # (1 + C, F), of clean sequences and of each corruption
    product: Tensor  # (F, F), of clean sequences

    @classmethod
    def of(cls, features: Tensor) -> DetectorSums:
        """Return the sums of scaled features (n, 1 + C, F), clean ones first."""
        clean = features[:, 0]
        return cls(len(clean), features.sum(dim=0), clean.mT @ clean)

    def minus(self, other: DetectorSums) -> DetectorSums:
        """Return the sums without those of some of the sequences."""
        return DetectorSums(self.sequences - other.sequences, self.total - other.total, self.product - other.product)

    def solve(self) -> Tensor:
        """Return the (C, F) weights of the linear discriminants, zeros if there are too few sequences.

        Their values have a variance of about 1 in training. The likeliest corruption is then the one with the largest,
        however strong it is.
        """
        weight = torch.zeros_like(self.total[1:])
        if self.sequences < _FEWEST_SEQUENCES:
            return weight
        mean = self.total / self.sequences
        covariance = self.product / self.sequences - torch.outer(mean[0], mean[0])
        shrinkage = (_DETECTOR_SHRINKAGE * covariance.diagonal().mean()).clamp(min=_LEAST_SHRINKAGE)
        covariance.diagonal().add_(shrinkage)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if bool(failed):
            return weight
        difference = mean[1:] - mean[0]
        weight = torch.cholesky_solve(difference.mT, factor).mT
        distance = (weight * difference).sum(dim=1, keepdim=True).sqrt()
        return weight / distance.where(distance > 0, 1.0)


def fit_symptoms(
    sample: SequenceSample, vectors: Tensor, available: Tensor, fold: Tensor
) -> tuple[SymptomModel, Tensor]:
    """Learn one modality's symptoms; beside them what each detector says of samples that it did not see (2, n, C).

    The first of the two are of the samples as they are, the second of each detector's own corruption.

    Args:
        sample: n calibration sequences.
        vectors: (n, d) utterance vectors.
        available: (n,) bool.
        fold: (n,) the fold of each sample; detectors of a fold are learned from the others.
    """
    square = (sample.variance + vectors.square())[available].mean(dim=0)
    square = torch.where(square > 0, square, 1.0)  # not seen (NaN), or always 0
    moments = torch.cat([torch.cat([sample.variance, sample.change], dim=1)[:, None], sample.corrupted], dim=1)
    variance, change = moments.chunk(2, dim=2)
    features = detector_features(variance, change, square).double()
    used = available & (sample.pairs > 0)
    clean = features[used, 0]
    center = clean.mean(dim=0) if len(clean) else features.new_zeros(features.shape[2])
    scale = (clean - center).square().mean(dim=0).sqrt() + 1e-2 if len(clean) else torch.ones_like(center)
    features = ((features - center) / scale).clamp_(-_DETECTOR_BOUND, _DETECTOR_BOUND)
    whole = DetectorSums.of(features[used])
    detected = torch.zeros(2, len(fold), len(DETECTORS), dtype=torch.float64)
    for f in set(fold.tolist()):
        inside = fold == f
        weight = whole.minus(DetectorSums.of(features[used & inside])).solve()
        detected[0, inside] = features[inside, 0] @ weight.mT
        detected[1, inside] = (features[inside, 1:] * weight).sum(dim=2)
    dtype = vectors.dtype
    model = SymptomModel(square, center.to(dtype), scale.to(dtype), whole.solve().to(dtype))
    return model, detected.to(dtype)
