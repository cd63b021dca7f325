"""Seeded corruptions of standardised features: how a modality becomes ineffectual.

Every corruption is called alike, ``corruption(x, generator=generator, lengths=lengths)`` and its own severity, returns
a new tensor of the same shape, dtype and device, and changes valid frames only; so corruptions compose. Random numbers
are drawn on the generator's device: a CPU generator gives the same corruption on every device.

Dimension legend: M modalities, B batch, T time steps, d features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from m3er_fast.inputs import check_lengths, check_mask

Corruption = Callable[..., Tensor]
"""Called as ``corruption(x, generator=generator, lengths=lengths)`` with the samples of one modality."""


def gaussian_noise(x: Tensor, snr: float, generator: torch.Generator, *, lengths: Any = None) -> Tensor:
    """Add white Gaussian noise at a signal-to-noise ratio that holds for each sample.

    ``x + sqrt(P / snr) · N(0, 1)``, where the signal power P of a sample is the mean square of its valid, finite
    entries. A silent sample (P = 0) is given P = 1, the variance of a standardised feature: a dead sensor is noisy too.

    Args:
        x: (B, T, d) or (B, d) floating tensor. Non-finite entries stay as they are.
        snr: power ratio P_signal / P_noise, not decibels; the paper's 0.01 is −20 dB.
        generator: source of the noise.
        lengths: (B,) valid leading frames; None means all T.

    Raises:
        ValueError: if ``x`` or ``lengths`` has the wrong type or shape, or ``snr`` is not positive and finite.
    """
    _check_positive("snr", snr)
    valid = _valid_entries(x, lengths)
    rms = _root_mean_square(x, valid)
    amplitude = torch.where(rms > 0, rms, 1.0) / math.sqrt(snr)
    noise = torch.randn(x.shape, generator=generator, device=generator.device, dtype=torch.float32).to(x)
    return torch.where(valid, x + noise * amplitude.to(x.dtype), x)


def silence(x: Tensor, generator: torch.Generator | None = None, *, lengths: Any = None) -> Tensor:
    """Replace every valid frame by zeros: the training mean, hence a sensor that says nothing.

    Args:
        x: (B, T, d) or (B, d) floating tensor.
        generator: not used; accepted because every corruption is called alike.
        lengths: (B,) valid leading frames; None means all T.

    Raises:
        ValueError: if ``x`` or ``lengths`` has the wrong type or shape.
    """
    valid = _valid_entries(x, lengths)
    return x.masked_fill(valid, 0.0)


def freeze(x: Tensor, generator: torch.Generator, *, lengths: Any = None) -> Tensor:
    """Hold one frame for the whole sequence: each sample repeats a valid frame drawn uniformly.

    With one valid frame there is nothing to hold but that frame: the sample is unchanged.

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
    held = (_uniform(length.shape, generator, x.device) * length).long()
    frame = x[torch.arange(x.shape[0], device=x.device), held]
    return torch.where(valid, frame[:, None, :], x)


def clip(x: Tensor, limit: float, generator: torch.Generator | None = None, *, lengths: Any = None) -> Tensor:
    """Saturate each sample at ± ``limit`` times its own root mean square, as an overdriven sensor does.

    The root mean square is taken over the sample's valid, finite entries; it is the standard deviation about zero, the
    mean of standardised features.

    Args:
        x: (B, T, d) or (B, d) floating tensor. NaN stays NaN, ±inf becomes the limit.
        limit: where the sensor saturates, in root mean squares of the sample; smaller is harsher.
        generator: not used; accepted because every corruption is called alike.
        lengths: (B,) valid leading frames; None means all T.

    Raises:
        ValueError: if ``x`` or ``lengths`` has the wrong type or shape, or ``limit`` is not positive and finite.
    """
    _check_positive("limit", limit)
    valid = _valid_entries(x, lengths)
    bound = (limit * _root_mean_square(x, valid)).to(x.dtype)
    return torch.where(valid, x.clamp(-bound, bound), x)


def drop_frames(x: Tensor, probability: float, generator: torch.Generator, *, lengths: Any = None) -> Tensor:
    """Zero whole frames, each valid one independently with the given probability.

    Args:
        x: (B, T, d) or (B, d) floating tensor; a (B, d) utterance is one frame.
        probability: chance that a frame is lost, in [0, 1].
        generator: source of the choice of frames.
        lengths: (B,) valid leading frames; None means all T.

    Raises:
        ValueError: if ``x`` or ``lengths`` has the wrong type or shape, or ``probability`` is outside [0, 1].
    """
    _check_probability(probability)
    valid = _valid_entries(x, lengths)
    dropped = _uniform(valid.shape, generator, x.device) < probability
    return x.masked_fill(valid & dropped, 0.0)


def mismatch(x: Tensor, generator: torch.Generator, *, lengths: Any = None) -> Tensor:
    """Give every sample the modality of another one, so that what it hears is not what it sees.

    The donors form one random cycle through the whole batch, so no sample keeps its own modality. A donor shorter than
    the receiver starts over when it ends, and a donor without frames leaves its receiver silent.

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
        raise ValueError("mismatch needs another sample to take the modality from, got a batch of 1")
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
"""The corruptions by name, at the severity that `corrupt` gives them; ``functools.partial`` makes any other."""


def corrupt(
    features: Mapping[str, Tensor],
    seed: int,
    *,
    kind: str | Corruption = "gaussian_noise",
    probability: float = 0.75,
    lengths: Any = None,
    available: Any = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Corrupt some modalities of some samples, never all that a sample has.

    Each sample is hit independently with the given probability. A hit sample with A available modalities has a number
    of them corrupted that is uniform in 1..A−1, and which ones is uniform too; with A < 2 it is left clean. The seed
    starts one CPU generator for the whole call, so corrupt a data set in one call: cut into batches, it is corrupted
    differently. ``truth`` is drawn first: it is the same for every ``kind``.

    Args:
        features: mapping from modality name to standardised (B, T, d_m) or (B, d_m) tensors, which are
            never modified.
        seed: the same seed, features and options give the same result on every device.
        kind: a name in `KINDS`, or a callable ``kind(x, generator=generator, lengths=lengths)`` that is given the
            samples having the modality, such as ``functools.partial(clip, limit=0.5)``.
        probability: share of samples with at least one corrupted modality, in [0, 1].
        lengths: (B,) valid leading frames; None means all T.
        available: (B, M) bool in the order of ``features``; None means every modality.

    Returns:
        The corrupted features in the same order, and ``truth`` (B, M) bool, True where a modality was corrupted.

    Raises:
        ValueError: naming the argument, what came and what was wanted.

    Example:
        >>> x = {"text": torch.ones(4, 3, 2), "audio": torch.ones(4, 3, 5)}
        >>> corrupted, truth = corrupt(x, seed=0, kind="silence", probability=1.0)
        >>> truth.sum(dim=1).tolist()
        [1, 1, 1, 1]
        >>> bool((corrupted["text"].sum(dim=(1, 2)) == 0).eq(truth[:, 0]).all())
        True
    """
    _check_probability(probability)
    if isinstance(kind, str):
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {sorted(KINDS)} or a callable, got {kind!r}")
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
    """The paper's ineffectual modalities: white Gaussian noise on some, never all, modalities of about 75% of samples.

    Mittal et al., AAAI 2020 (arXiv 1911.05659). This is `corrupt` with `gaussian_noise`; see there for how samples and
    modalities are drawn, and for the arguments, results and errors not listed here.

    Args:
        features: mapping from modality name to standardised (B, T, d_m) or (B, d_m) tensors.
        seed: of the one generator that the whole call draws from.
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
    """Which modalities of which samples to corrupt, (B, M) bool, drawn among the usable ones."""
    choices = usable.sum(dim=1) - 1
    draws = _uniform((usable.shape[0], 2 + usable.shape[1]), generator, usable.device)
    hit = (draws[:, 0] < probability) & (choices > 0)
    count = 1 + (draws[:, 1] * choices).long()
    order = draws[:, 2:].masked_fill(~usable, 2.0).argsort(dim=1)
    rank = order.argsort(dim=1)
    return hit[:, None] & (rank < count[:, None])


def _uniform(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """Numbers in [0, 1) drawn where the generator lives; float64, so that a product with a count n stays below n."""
    return torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64).to(device)


def _valid_entries(x: Tensor, lengths: Any) -> Tensor:
    """True on valid frames, (B, T, 1) or (B, 1) as ``x`` is."""
    _check_tensor("x", x)
    steps = x.shape[1] if x.ndim == 3 else 1
    length = check_lengths(lengths, x.shape[0], steps, x.device)
    mask = torch.arange(steps, device=x.device) < length[:, None]
    return mask[:, :, None] if x.ndim == 3 else mask


def _root_mean_square(x: Tensor, valid: Tensor) -> Tensor:
    """Per sample over its valid, finite entries; float64 (its square of 1e38 is finite), 0 where there are none."""
    counted = valid & x.isfinite()
    dims = tuple(range(1, x.ndim))
    total = x.double().square().where(counted, 0.0).sum(dim=dims, keepdim=True)
    return (total / counted.sum(dim=dims, keepdim=True).clamp(min=1)).sqrt()


def _check_features(features: Mapping[str, Tensor]) -> Tensor:
    """The first of at least one floating tensor that agree in batch and time."""
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


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value!r}")


def _check_probability(value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"probability must lie in [0, 1], got {value!r}")
