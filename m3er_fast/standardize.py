"""Step 0: standardise every feature, and keep values that are not finite out of all arithmetic.

Dimension legend: M modalities, B batch, T time steps, d_m features of modality m, D = Σ d_m.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from m3er_fast._validation import can_look_at
from m3er_fast._warnings import warn_user
from m3er_fast.fitted_module import PreciseModule, ordinary_tensors
from m3er_fast.inputs import (
    Array,
    FeatureBatch,
    Features,
    FeatureSource,
    check_input_dims,
    iterate_batches,
    prepare_batch,
)

# Standardised values are clamped to ±1e4: a finite but absurd input (3e38) then stays finite when later steps square
# and sum it. No training value comes near the bound: |z| ≤ sqrt(n - 1) for every value of a sample of n (Samuelson's
# inequality), so reaching it takes 10^8 frames.
_BOUND = 1e4

_FLOAT32 = torch.finfo(torch.float32)

# Entries per sum of squares. Standardised ones add up to about their number, which must stay below the square of the
# bound.
_PART = 2**24

# Samples converted to float64 at a time when fitting: 128 samples of 50 frames and 300 features are 15 MB.
_FIT_SAMPLES = 128


class StandardizedBatch(NamedTuple):
    """A batch after step 0: every number in it is finite."""

    features: list[Tensor]  # M of (B, T, d_m), zeros where frame_valid is False
    lengths: Tensor  # (B,) int64, leading frames of each sample, valid or not
    available: Tensor  # (B, M) bool, True where the modality has a valid frame in the sample
    frame_valid: Tensor  # (B, T, M) bool, False in padding, invalid frames and unavailable modalities
    is_complete: bool = False  # known without a look at masks: ``available`` and ``frame_valid`` are True throughout


class Standardizer(PreciseModule):
    """Standardisation of features by their mean and standard deviation over the valid frames of the training data.

        z = clamp((x - mean) / scale, ±1e4)

    with the population standard deviation (over n, not n - 1) as scale. Each feature has its own n: the number of its
    finite entries in valid frames. The rules for input that is not clean:

    * An entry counts as finite if its magnitude is within float32's range. Any other entry is replaced by the training
      mean, which gives z = 0, and never enters the statistics.
    * A frame of a modality with more than half of its entries not finite is invalid: all zeros, as padding is.
    * A modality without any valid frame in a sample is unavailable for that sample.
    * A feature that is constant in training, to float32's resolution of its mean, gets scale 1. A feature that was
      never seen gets mean 0 and scale 1. Before any fit this holds for every feature, and only the rules above apply.

    Statistics accumulate in float64 with the merging formula of Chan, Golub and LeVeque (1983): data may come at once,
    in batches, or from several workers in any order.

    Args:
        input_dims: feature count d_m of each modality, in the order of all results.

    Attributes:
        mean_0, mean_1, …: (d_m,) buffer, the mean of modality m.
        scale_0, scale_1, …: (d_m,) buffer, the scale of modality m, positive.
        count: (M,) int64 buffer, the valid frames seen in fitting.

    The buffers are float32 (float64 after ``.double()``) and stay so under ``.half()`` and ``.bfloat16()``, which would
    round a mean of 1000 by more than a spread of 1. The float64 sums are part of ``state_dict``: a loaded module can go
    on with ``partial_fit`` and ``merge``.

    Example:
        >>> import torch
        >>> from m3er_fast.standardize import Standardizer
        >>> standardizer = Standardizer({"text": 2}).fit({"text": torch.tensor([[1.0, 5.0], [3.0, 5.0]])})
        >>> standardizer({"text": torch.tensor([[4.0, float("nan")]])}).features[0]
        tensor([[[2., 0.]]])
    """

    count: Tensor

    @ordinary_tensors()
    def __init__(self, input_dims: Mapping[str, int]) -> None:
        super().__init__()
        self.input_dims = check_input_dims(input_dims)
        for index, dim in enumerate(self.input_dims.values()):
            self.register_buffer(f"mean_{index}", torch.zeros(dim))
            self.register_buffer(f"scale_{index}", torch.ones(dim))
        self.register_buffer("count", torch.zeros(len(self.input_dims), dtype=torch.int64))
        self._sums = self._empty_sums()

    def extra_repr(self) -> str:
        """Return the feature counts, for ``print(module)``."""
        return repr(self.input_dims)

    def fit(self, features: FeatureSource, *, lengths: Array | None = None, available: Array | None = None) -> Self:
        """Learn the statistics, forgetting earlier ones.

        Args:
            features: mapping from modality name to (N, T, d_m) or (N, d_m), or a re-iterable source of batches:
                mappings or (mapping, lengths, available) tuples.
            lengths: (N,) valid leading frames of each sample; None means all T. Only beside a mapping.
            available: (N, M) bool, the modalities each sample has; None means every one given. Only beside a mapping.

        Raises:
            ValueError: if the features do not fit ``input_dims``. The earlier statistics are then unchanged.

        Warns:
            UserWarning: if no utterance has all frames of the time axis, if some end in frames of zeros that count as
                valid, or if a modality has no valid frame at all.
        """
        watch = TrainingWatch(list(self.input_dims))
        self._accumulate(self._empty_sums(), torch.zeros_like(self.count), features, lengths, available, watch)
        watch.warn()
        return self

    def partial_fit(
        self, features: FeatureSource, *, lengths: Array | None = None, available: Array | None = None
    ) -> Self:
        """Learn from further data; any split of the data gives the result of ``fit`` for all of it.

        Arguments and errors are those of :meth:`fit`.
        """
        return self._accumulate(self._sums, self.count, features, lengths, available)

    def merge(self, other: Standardizer) -> Self:
        """Add the frames that ``other`` was fitted to; ``other`` stays unchanged.

        Raises:
            ValueError: if ``other`` is not a Standardizer, or has other modalities or feature counts.
        """
        if not isinstance(other, Standardizer):
            raise ValueError(f"other must be a Standardizer, got {type(other).__name__}")
        if list(other.input_dims.items()) != list(self.input_dims.items()):
            raise ValueError(f"cannot merge a Standardizer of {other.input_dims} into one of {self.input_dims}")
        return self._set(_merge_sums(self._sums, other._sums), self.count + other.count.to(self.count.device))

    def forward(
        self, features: Features, lengths: Array | None = None, available: Array | None = None
    ) -> StandardizedBatch:
        """Check and standardise one batch.

        Args:
            features: mapping from modality name to a (B, T, d_m) or (B, d_m) tensor or array. A modality that is
                missing or None is unavailable for the whole batch.
            lengths: (B,) valid leading frames of each sample; None means all T.
            available: (B, M) bool; None means every modality given.

        Returns:
            The standardised batch, on the device of the features. float64 features stay float64; others get the
            buffers' dtype, float32 or wider.

        Raises:
            ValueError: naming the modality or argument, the shape got and the shape wanted.
        """
        return self.standardize(prepare_batch(features, lengths, available, input_dims=self.input_dims))

    def standardize(self, batch: FeatureBatch) -> StandardizedBatch:
        """Standardise a checked batch, as :meth:`forward` does."""
        features = [
            (x - self.learned(f"mean_{m}")).div_(self.learned(f"scale_{m}")) for m, x in enumerate(batch.features)
        ]
        is_wide = batch.features[0].dtype == torch.float64  # and may hold entries beyond float32's range
        if _are_within(features, _BOUND) and (not is_wide or _are_within(batch.features, _FLOAT32.max)):
            # The usual case: every entry is finite, and none is clamped.
            frame_valid = batch.available.unsqueeze(1).expand(-1, features[0].shape[1], -1)
            if batch.is_complete:
                return StandardizedBatch(features, batch.lengths, batch.available, frame_valid, is_complete=True)
            if batch.lengths.min().item() < features[0].shape[1]:
                frame_valid = batch.frame_mask[:, :, None] & frame_valid
            if not frame_valid.all():
                features = [z.where(frame_valid[:, :, m, None], 0.0) for m, z in enumerate(features)]
        else:
            finite, frame_valid = _find_valid(batch)
            features = [
                z.clamp(-_BOUND, _BOUND).where(finite[m] & frame_valid[:, :, m, None], 0.0)
                for m, z in enumerate(features)
            ]
        return StandardizedBatch(features, batch.lengths, frame_valid.any(dim=1), frame_valid)

    def unstandardize(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return z · scale + mean for M standardised (B, T, d_m) tensors."""
        return [z * getattr(self, f"scale_{m}") + getattr(self, f"mean_{m}") for m, z in enumerate(features)]

    def get_extra_state(self) -> Tensor:
        """Return (3, D) float64 on the CPU: entries seen, mean and sum of squared deviations of each feature."""
        return self._sums

    @ordinary_tensors()
    def set_extra_state(self, state: Tensor) -> None:
        """Restore the result of ``get_extra_state``.

        Raises:
            ValueError: if it is from a Standardizer with another total number of features.
        """
        if state.shape != self._sums.shape:
            raise ValueError(
                f"the state has shape {tuple(state.shape)}, wanted {tuple(self._sums.shape)} "
                f"for the features {self.input_dims}"
            )
        self._sums = state.to("cpu", torch.float64, copy=True)

    @torch.no_grad()
    def _accumulate(
        self,
        sums: Tensor,
        count: Tensor,
        features: FeatureSource,
        lengths: Array | None,
        available: Array | None,
        watch: TrainingWatch | None = None,
    ) -> Self:
        for batch in iterate_batches(features, lengths, available, input_dims=self.input_dims, batch_size=_FIT_SAMPLES):
            finite, frame_valid = _find_valid(batch)
            if watch is not None:
                watch.see(batch.features, batch.lengths, frame_valid)
            parts = [
                _sums_of(x, finite[index] & frame_valid[:, :, index, None]) for index, x in enumerate(batch.features)
            ]
            sums = _merge_sums(sums, torch.cat(parts, dim=1).cpu())
            count = count + frame_valid.sum(dim=(0, 1)).to(count.device)
        return self._set(sums, count)

    @torch.no_grad()
    def _set(self, sums: Tensor, count: Tensor) -> Self:
        """Set the sums, and the buffers that follow from them."""
        entries, mean, squares = sums
        deviation = (squares / entries.clamp(min=1)).sqrt()
        # A deviation below float32's resolution at the mean is rounding, not signal. A GPU may flush a scale below
        # `tiny` to 0.
        constant = deviation <= (mean.abs() * _FLOAT32.eps).clamp(min=_FLOAT32.tiny)
        scale = deviation.where(~constant, 1.0)
        dims = list(self.input_dims.values())
        for index, (m, s) in enumerate(zip(mean.split(dims), scale.split(dims), strict=True)):
            getattr(self, f"mean_{index}").copy_(m)
            getattr(self, f"scale_{index}").copy_(s)
        self.count.copy_(count)
        with ordinary_tensors():
            self._sums = sums.clone()
        return self

    def _empty_sums(self) -> Tensor:
        return torch.zeros(3, sum(self.input_dims.values()), dtype=torch.float64, device="cpu")


class TrainingWatch:
    """What training data lack, found while they are read, and said in one warning each.

    Args:
        names: the modalities, in order.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._begin()

    def _begin(self) -> None:
        self._steps = 0
        self._samples = 0
        self._longest: Tensor | int = 0
        self._reached: Tensor | bool = False
        self._ending_in_zeros: Tensor | int = 0
        self._frames: Tensor | int = 0

    def see(self, features: Sequence[Tensor], lengths: Tensor, frame_valid: Tensor) -> None:
        """Look at a batch: features (B, T, d_m), lengths (B,) and valid frames (B, T, M)."""
        samples, steps, _ = frame_valid.shape
        if not samples:
            return
        self._samples += samples
        self._steps = max(self._steps, steps)
        self._longest = lengths.max().clamp(min=self._longest)
        self._reached = (lengths == steps).any() | self._reached
        self._frames = frame_valid.sum(dim=(0, 1)) + self._frames
        if steps > 1:
            last = frame_valid[:, -1]
            zero = torch.stack([(x[:, -1] == 0).all(dim=-1) for x in features], dim=1)
            self._ending_in_zeros = (last.any(dim=1) & (zero | ~last).all(dim=1)).sum() + self._ending_in_zeros

    def seen(self, batches: Iterable[StandardizedBatch]) -> Iterator[StandardizedBatch]:
        """Look at batches as they are read; each reading replaces the last."""
        self._begin()
        for batch in batches:
            self.see(batch.features, batch.lengths, batch.frame_valid)
            yield batch

    def warn(self) -> None:
        """Warn of what was found."""
        if not self._samples:
            return
        messages = []
        if not self._reached:
            messages.append(
                f"lengths: the longest utterance has {int(self._longest)} of {self._steps} frames; lengths are numbers "
                "of frames, not labels, of which fitting takes none"
            )
        if int(self._ending_in_zeros):
            messages.append(
                f"features: {int(self._ending_in_zeros)} of {self._samples} utterances end in a frame of zeros that "
                "counts as valid; if it is padding, give lengths"
            )
        for name, frames in zip(self._names, torch.as_tensor(self._frames).tolist(), strict=True):
            if not frames:
                messages.append(f"features[{name!r}]: not one valid frame, so nothing is learned of this modality")
        for message in messages:
            warn_user(message)


def clean_frames(batch: FeatureBatch) -> StandardizedBatch:
    """Apply the rules for input that is not clean to a checked batch, without standardising it."""
    finite, frame_valid = _find_valid(batch)
    features = [x.where(finite[m] & frame_valid[:, :, m, None], 0.0) for m, x in enumerate(batch.features)]
    return StandardizedBatch(features, batch.lengths, frame_valid.any(dim=1), frame_valid)


def clean_batches(
    input_dims: Mapping[str, int], features: FeatureSource, lengths: Array | None, available: Any
) -> tuple[Callable[[], Iterator[StandardizedBatch]], TrainingWatch]:
    """Return a function that reads a source of training data, not standardised, and the watch over what it reads."""
    watch = TrainingWatch(list(input_dims))

    def batches() -> Iterator[StandardizedBatch]:
        return watch.seen(map(clean_frames, iterate_batches(features, lengths, available, input_dims=input_dims)))

    return batches, watch


def _are_within(tensors: Sequence[Tensor], bound: float) -> bool:
    """Whether every entry is known to lie in ±``bound``; where looking costs time, nothing is known."""
    if not can_look_at(tensors[0]) or not tensors[0].shape[0]:
        return False
    for x in tensors:
        flat = (x.detach() if x.requires_grad else x).flatten()
        for part in (flat,) if x.numel() <= _PART else torch.split(flat, _PART):
            if not _is_within(part, bound):
                return False
    return True


def _is_within(x: Tensor, bound: float) -> bool:
    """Whether every entry of a vector lies in ±``bound``."""
    # The sum of squares takes one product, and less time than either extreme. NaN is not below anything.
    if torch.dot(x, x).item() < 0.99 * bound**2:
        return True
    return x.amin().item() >= -bound and x.amax().item() <= bound


def _find_valid(batch: FeatureBatch) -> tuple[list[Tensor], Tensor]:
    """Return (B, T, d_m) masks of finite entries, one per modality, and the (B, T, M) mask of valid frames."""
    # One comparison that NaN, ±inf and values beyond float32 fail; float16 would round float32's maximum up to inf.
    finite = [x.abs() <= min(torch.finfo(x.dtype).max, _FLOAT32.max) for x in batch.features]
    mostly = torch.stack([2 * entries.sum(dim=-1) >= entries.shape[-1] for entries in finite], dim=-1)
    return finite, mostly & batch.frame_mask[:, :, None] & batch.available[:, None, :]


def _sums_of(x: Tensor, valid: Tensor) -> Tensor:
    """Return the (3, d) float64 sums of the valid entries of x (B, T, d)."""
    entries = valid.sum(dim=(0, 1)).double()
    values = x.double().where(valid, 0.0)
    mean = values.sum(dim=(0, 1)) / entries.clamp(min=1)
    squares = (values - mean).where(valid, 0.0).square().sum(dim=(0, 1))
    return torch.stack([entries, mean, squares])


def _merge_sums(first: Tensor, second: Tensor) -> Tensor:
    """Return the (3, D) sums of two disjoint sets of entries together."""
    entries = first[0] + second[0]
    share = second[0] / entries.clamp(min=1)
    difference = second[1] - first[1]
    mean = first[1] + difference * share
    squares = first[2] + second[2] + difference.square() * (first[0] * share)
    return torch.stack([entries, mean, squares])
