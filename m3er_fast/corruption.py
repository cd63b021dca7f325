"""Seeded corruptions of standardised features, which make a modality ineffectual.

All corruptions share one signature, ``corruption(x, generator=generator, lengths=lengths)``, plus a severity of their
own. They return a new tensor of the same shape, dtype and device and change valid frames only, so they compose. Random
numbers are drawn on the generator's device: a CPU generator gives the same corruption on every device.

Dimension legend: M modalities, B batch, T time steps, d features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from m3er_fast._validation import check_choice, check_number
from m3er_fast.inputs import check_lengths, check_mask

Corruption = Callable[..., Tensor]
"""Takes the samples of one modality: ``corruption(x, generator=generator, lengths=lengths)``."""


def gaussian_noise(x: Tensor, snr: float, generator: torch.Generator, *, lengths: Any = None) -> Tensor:
    """Add white Gaussian noise at a signal-to-noise ratio that holds for each sample.

    Computes ``x + sqrt(P / snr) · N(0, 1)``, where the signal power P of a sample is the mean square of its valid,
    finite entries. For a silent sample (P = 0), P is 1, the variance of a standardised feature: a dead sensor is noisy
    too.

    Args:
        x: (B, T, d) or (B, d) floating tensor. Non-finite entries stay as they are.
        snr: power ratio P_signal / P_noise, not decibels; the paper's 0.01 is −20 dB.
        generator: source of the noise.
        lengths: (B,) valid leading frames; None means all T.

    Raises:
        ValueError: if ``x`` or ``lengths`` has the wrong type or shape, or ``snr`` is not positive and finite.
    """
    check_number("snr", snr, 0, exclusive=True)
    valid = _valid_entries(x, lengths)
    rms = _root_mean_square(x, valid)
    amplitude = torch.where(rms > 0, rms, 1.0) / math.sqrt(snr)
    noise = torch.randn(x.shape, generator=generator, device=generator.device, dtype=torch.float32).to(x)
    return torch.where(valid, x + noise * amplitude.to(x.dtype), x)


def silence(x: Tensor, generator: torch.Generator | None = None, *, lengths: Any = None) -> Tensor:
    """Replace every valid frame by zeros, the training mean: a sensor that carries no information.

    Args:
        x: (B, T, d) or (B, d) floating tensor.
        generator: not used; part of the shared signature.
        lengths: (B,) valid leading frames; None means all T.

    Raises:
        ValueError: if ``x`` or ``lengths`` has the wrong type or shape.
    """
    valid = _valid_entries(x, lengths)
    return x.masked_fill(valid, 0.0)


def freeze(x: Tensor, generator: torch.Generator, *, lengths: Any = None) -> Tensor:
    """Freeze the sequence: each sample repeats one of its valid frames, drawn uniformly.

    A sample with one valid frame is unchanged.

    Args:
        x: (B, T, d) or (B, d) floating tensor.
        generator: source of the choice of frame.
        lengths: (B,) valid leading frames; None means all T.

    Raises:
        ValueError: if ``x`` or ``lengths`` has the wrong type or shape.
    """
    valid = _valid_entries(x, lengths)
    if x.ndim == 2:
        return x.clone()
    length = valid.sum(dim=(1, 2))
    frozen = (_uniform(length.shape, generator, x.device) * length).long()
    frame = x[torch.arange(x.shape[0], device=x.device), frozen]
    return torch.where(valid, frame[:, None, :], x)


def clip(x: Tensor, limit: float, generator: torch.Generator | None = None, *, lengths: Any = None) -> Tensor:
    """Saturate each sample at ± ``limit`` times its own root mean square, as an overdriven sensor does.

    The root mean square is taken over the sample's valid, finite entries; it is the standard deviation about zero, the
    mean of standardised features.

    Args:
        x: (B, T, d) or (B, d) floating tensor. NaN stays NaN, ±inf becomes the limit.
        limit: the level at which the sensor saturates, in root mean squares of the sample; smaller is harsher.
        generator: not used; part of the shared signature.
        lengths: (B,) valid leading frames; None means all T.

    Raises:
        ValueError: if ``x`` or ``lengths`` has the wrong type or shape, or ``limit`` is not positive and finite.
    """
    check_number("limit", limit, 0, exclusive=True)
    valid = _valid_entries(x, lengths)
    bound = (limit * _root_mean_square(x, valid)).to(x.dtype)
    return torch.where(valid, x.clamp(-bound, bound), x)


def drop_frames(x: Tensor, probability: float, generator: torch.Generator, *, lengths: Any = None) -> Tensor:
    """Zero whole frames: each valid frame independently, with the given probability.

    Args:
        x: (B, T, d) or (B, d) floating tensor; a (B, d) utterance is one frame.
        probability: chance that a frame is lost, in [0, 1].
        generator: source of the choice of frames.
        lengths: (B,) valid leading frames; None means all T.

    Raises:
        ValueError: if ``x`` or ``lengths`` has the wrong type or shape, or ``probability`` is outside [0, 1].
    """
    check_number("probability", probability, 0, 1)
    valid = _valid_entries(x, lengths)
    dropped = _uniform(valid.shape, generator, x.device) < probability
    return x.masked_fill(valid & dropped, 0.0)


def mismatch(x: Tensor, generator: torch.Generator, *, lengths: Any = None) -> Tensor:
    """Give every sample the modality of another sample, as when sound and picture do not belong together.

    The donors form one random cycle through the whole batch, so no sample keeps its own modality. A donor that is
    shorter than the receiver repeats, and a donor without frames leaves its receiver silent.

    Args:
        x: (B, T, d) or (B, d) floating tensor.
        generator: source of the cycle.
        lengths: (B,) valid leading frames; None means all T.

    Raises:
        ValueError: if ``x`` or ``lengths`` has the wrong type or shape, or the batch holds a single sample.
    """
    valid = _valid_entries(x, lengths)
    batch = x.shape[0]
    if batch == 1:
        raise ValueError("mismatch needs a batch of 2 samples or more, to exchange the modality, got 1")
    order = torch.randperm(batch, generator=generator, device=generator.device).to(x.device)
    donor = torch.empty_like(order)
    donor[order] = order.roll(1)
    received = x[donor]
    has_frames = valid.flatten(1).any(dim=1)[donor].view(-1, *[1] * (x.ndim - 1))
    if x.ndim == 3:
        length = valid.sum(dim=(1, 2))[donor].clamp(min=1)
        frames = torch.arange(x.shape[1], device=x.device) % length[:, None]
        received = received.gather(1, frames[:, :, None].expand_as(x))
    return torch.where(valid, received.where(has_frames, 0.0), x)


KINDS: dict[str, Corruption] = {
    "gaussian_noise": partial(gaussian_noise, snr=0.01),
    "silence": silence,
    "freeze": freeze,
    "clip": partial(clip, limit=0.25),
    "drop_frames": partial(drop_frames, probability=0.75),
    "mismatch": mismatch,
}
"""The corruptions by name, at the default severity of `corrupt`; ``functools.partial`` gives any other severity."""


def corrupt(
    features: Mapping[str, Tensor],
    seed: int,
    *,
    kind: str | Corruption = "gaussian_noise",
    probability: float = 0.75,
    lengths: Any = None,
    available: Any = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Corrupt some modalities of some samples, but never all modalities of a sample.

    Each sample is chosen independently, with the given probability. Of a chosen sample's A available modalities, k are
    corrupted; k is uniform in 1..A−1, and so is the choice of k modalities. A sample with A < 2 stays clean. The seed
    starts one CPU generator for the whole call: corrupt a data set in one call, because in batches the result differs.
    ``truth`` is drawn first, so it is the same for every ``kind``.

    Args:
        features: mapping from modality name to standardised (B, T, d_m) or (B, d_m) tensors; they are not modified.
        seed: the same seed, features and options give the same result on every device.
        kind: a name in `KINDS`, or a callable ``kind(x, generator=generator, lengths=lengths)`` such as
            ``functools.partial(clip, limit=0.5)``, which receives the samples that have the modality.
        probability: share of samples with at least one corrupted modality, in [0, 1].
        lengths: (B,) valid leading frames; None means all T.
        available: (B, M) bool in the order of ``features``; None means every modality.

    Returns:
        The corrupted features in the same order, and ``truth`` (B, M) bool, True where a modality was corrupted.

    Raises:
        ValueError: naming the argument, its value and what was wanted.

    Example:
        >>> x = {"text": torch.ones(4, 3, 2), "audio": torch.ones(4, 3, 5)}
        >>> corrupted, truth = corrupt(x, seed=0, kind="silence", probability=1.0)
        >>> truth.sum(dim=1).tolist()
        [1, 1, 1, 1]
        >>> bool((corrupted["text"].sum(dim=(1, 2)) == 0).eq(truth[:, 0]).all())
        True
    """
    check_number("probability", probability, 0, 1)
    if isinstance(kind, str):
        check_choice("kind", kind, sorted(KINDS))
        kind = KINDS[kind]
    first = _check_features(features)
    batch, steps = first.shape[0], (first.shape[1] if first.ndim == 3 else 1)
    length = check_lengths(lengths, batch, steps, first.device)
    usable = (length > 0)[:, None].expand(-1, len(features))
    if available is not None:
        usable = usable & check_mask("available", available, (batch, len(features)), first.device)

    generator = torch.Generator().manual_seed(seed)
    truth = _draw_truth(usable, probability, generator)
    corrupted = {name: x.clone() for name, x in features.items()}
    for m, x in enumerate(corrupted.values()):
        rows = usable[:, m]
        hit = truth[rows, m].view(-1, *[1] * (x.ndim - 1))
        x[rows] = torch.where(hit, kind(x[rows], generator=generator, lengths=length[rows]), x[rows])
    return corrupted, truth


def paper_protocol(
    features: Mapping[str, Tensor],
    seed: int,
    *,
    snr: float = 0.01,
    probability: float = 0.75,
    lengths: Any = None,
    available: Any = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Make modalities ineffectual as the paper does: noise on some, never all, modalities of about 75% of the samples.

    Mittal et al., AAAI 2020 (arXiv 1911.05659). The noise is white and Gaussian. This is `corrupt` with
    `gaussian_noise`; see `corrupt` for the choice of samples and modalities, and for the errors.

    Args:
        features: mapping from modality name to standardised (B, T, d_m) or (B, d_m) tensors.
        seed: seeds the one generator of the whole call.
        snr: power ratio of signal to noise in every corrupted modality of every sample.
        probability: share of samples with at least one corrupted modality.
        lengths: (B,) valid leading frames; None means all T.
        available: (B, M) bool in the order of ``features``.

    Returns:
        The corrupted features, and ``truth`` (B, M) bool, True where a modality was corrupted.
    """
    return corrupt(
        features,
        seed,
        kind=partial(gaussian_noise, snr=snr),
        probability=probability,
        lengths=lengths,
        available=available,
    )


def _draw_truth(usable: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Draw the modalities to corrupt, (B, M) bool, among the usable ones."""
    choices = usable.sum(dim=1) - 1
    draws = _uniform((usable.shape[0], 2 + usable.shape[1]), generator, usable.device)
    hit = (draws[:, 0] < probability) & (choices > 0)
    count = 1 + (draws[:, 1] * choices).long()
    order = draws[:, 2:].masked_fill(~usable, 2.0).argsort(dim=1)
    rank = order.argsort(dim=1)
    return hit[:, None] & (rank < count[:, None])


def _uniform(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """Draw float64 numbers in [0, 1) on the generator's device; in float32 the product with a count n could be n."""
    return torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64).to(device)


def _valid_entries(x: Tensor, lengths: Any) -> Tensor:
    """Return a mask of the valid frames: (B, T, 1), or (B, 1) for a matrix ``x``."""
    _check_tensor("x", x)
    steps = x.shape[1] if x.ndim == 3 else 1
    length = check_lengths(lengths, x.shape[0], steps, x.device)
    mask = torch.arange(steps, device=x.device) < length[:, None]
    return mask[:, :, None] if x.ndim == 3 else mask


def _root_mean_square(x: Tensor, valid: Tensor) -> Tensor:
    """Return each sample's root mean square over its valid, finite entries, 0 if there are none.

    Computed in float64, in which the square of 1e38 is finite.
    """
    counted = valid & x.isfinite()
    dims = tuple(range(1, x.ndim))
    total = x.double().square().where(counted, 0.0).sum(dim=dims, keepdim=True)
    return (total / counted.sum(dim=dims, keepdim=True).clamp(min=1)).sqrt()


def _check_features(features: Mapping[str, Tensor]) -> Tensor:
    """Check that at least one tensor is given and that all agree in batch and time; return the first."""
    if not isinstance(features, Mapping) or not features:
        raise ValueError(f"features must map at least one modality name to a tensor, got {features!r}")
    first_name, first = next(iter(features.items()))
    for name, x in features.items():
        _check_tensor(f"features[{name!r}]", x)
        if x.shape[:-1] != first.shape[:-1]:
            raise ValueError(
                f"features[{name!r}] has shape {tuple(x.shape)}, but features[{first_name!r}] has "
                f"{tuple(first.shape)}: all dimensions but the last must agree"
            )
    return first


def _check_tensor(name: str, x: Any) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim not in (2, 3) or 0 in x.shape[1:]:
        got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a floating tensor of shape (B, T, d) or (B, d), T and d ≥ 1, got {got}")
