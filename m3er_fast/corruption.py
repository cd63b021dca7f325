"""Seeded corruptions of standardised features, which make a modality ineffectual.

All corruptions share one signature, ``corruption(x, generator=generator, lengths=lengths)``, plus a severity of their
own. They return a new tensor of the same shape, dtype and device and change valid frames only, so they compose
(`compose`). Random numbers are drawn on the generator's device: a CPU generator gives the same corruption on every
device.

Non-finite entries: noise, gain, offset and clipping leave NaN where it is. Corruptions that move or repeat frames move
their NaN with them, and a frame that is lost becomes zeros.

Every sample is corrupted by itself, whatever the batch, except by `mismatch`, `another_speaker`, `wrong_face` and
`wrong_words`, which take frames from other samples.

Dimension legend: M modalities, B batch, T time steps, d features.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from m3er_fast._validation import check_choice, check_number, check_positive_int
from m3er_fast.inputs import Array, check_lengths, check_mask

Corruption = Callable[..., Tensor]
"""Takes the samples of one modality: ``corruption(x, generator=generator, lengths=lengths)``."""


def gaussian_noise(x: Tensor, snr: float, generator: torch.Generator, *, lengths: Array | None = None) -> Tensor:
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


def coloured_noise(
    x: Tensor, snr: float, exponent: float, generator: torch.Generator, *, lengths: Array | None = None
) -> Tensor:
    """Add Gaussian noise with a power of 1/f^exponent along time, at the signal-to-noise ratio given in each sample.

    Each feature has noise of its own: white noise w, integrated ``exponent / 2`` times, n_t = Σ_k h_k w_(t−k) with
    h_0 = 1 and h_k = h_(k−1) · (k − 1 + exponent/2) / k (Kasdin, Proc. IEEE 83(5), 1995). Its spectrum is
    ``|2 sin πf|^(−exponent)``, f in cycles per frame. The noise is scaled to the ratio in each sample, exactly, where
    `gaussian_noise` holds it on average. A silent sample gets noise relative to a power of 1.

    Args:
        x: (B, T, d) or (B, d) floating tensor; a (B, d) utterance is one frame. Non-finite entries stay as they are.
        snr: power ratio P_signal / P_noise, not decibels.
        exponent: in [0, 2]: 0 is white, 1 pink, as flicker noise, and 2 brown, as a drift (a random walk).
        generator: source of the noise.
        lengths: (B,) valid leading frames; None means all T.

    Raises:
        ValueError: if ``x`` or ``lengths`` has the wrong type or shape, ``snr`` is not positive and finite, or
            ``exponent`` is outside [0, 2].
    """
    check_number("snr", snr, 0, exclusive=True)
    check_number("exponent", exponent, 0, 2)
    valid = _valid_entries(x, lengths)
    shape = x.shape if x.ndim == 3 else (x.shape[0], 1, x.shape[1])
    white = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)
    noise = _integrate(white, exponent / 2).reshape(x.shape).to(x.device)
    rms, noise_rms = _root_mean_square(x, valid), _root_mean_square(noise, valid & x.isfinite())
    amplitude = torch.where(rms > 0, rms, 1.0) / math.sqrt(snr) / torch.where(noise_rms > 0, noise_rms, 1.0)
    return torch.where(valid, x + (noise * amplitude).to(x.dtype), x)


def offset(x: Tensor, size: float, generator: torch.Generator, *, lengths: Array | None = None) -> Tensor:
    """Shift every feature by a constant, as a sensor whose zero is set wrongly does.

    Each feature of each sample moves up or down, drawn at random, by ``size`` in every frame.

    Args:
        x: (B, T, d) or (B, d) floating tensor. Non-finite entries stay as they are.
        size: in standard deviations of the feature in training, which are 1 in standardised features.
        generator: source of the directions.
        lengths: (B,) valid leading frames; None means all T.

    Raises:
        ValueError: if ``x`` or ``lengths`` has the wrong type or shape, or ``size`` is not positive and finite.
    """
    check_number("size", size, 0, exclusive=True)
    valid = _valid_entries(x, lengths)
    up = _uniform((x.shape[0], *[1] * (x.ndim - 2), x.shape[-1]), generator, x.device) < 0.5
    return torch.where(valid, torch.where(up, x + size, x - size), x)


def gain(x: Tensor, factor: float, generator: torch.Generator | None = None, *, lengths: Array | None = None) -> Tensor:
    """Multiply every feature by a factor, as an amplifier that is set wrongly does.

    Args:
        x: (B, T, d) or (B, d) floating tensor. Non-finite entries stay as they are.
        factor: of the amplitude, relative to the training mean; a factor of 2 is four times the power.
        generator: not used; part of the shared signature.
        lengths: (B,) valid leading frames; None means all T.

    Raises:
        ValueError: if ``x`` or ``lengths`` has the wrong type or shape, or ``factor`` is not positive and finite.
    """
    check_number("factor", factor, 0, exclusive=True)
    valid = _valid_entries(x, lengths)
    return torch.where(valid, x * factor, x)


def silence(
    x: Tensor, generator: torch.Generator | None = None, *, fraction: float = 0.0, lengths: Array | None = None
) -> Tensor:
    """Replace the valid frames by zeros, the training mean: a sensor that carries no information.

    Args:
        x: (B, T, d) or (B, d) floating tensor.
        generator: not used; part of the shared signature.
        fraction: the share of each sequence, in [0, 1], after which the sensor falls silent. At least the last frame
            is lost, unless the fraction is 1.
        lengths: (B,) valid leading frames; None means all T.

    Raises:
        ValueError: if ``x`` or ``lengths`` has the wrong type or shape, or ``fraction`` is outside [0, 1].
    """
    valid = _valid_entries(x, lengths)
    return x.masked_fill(_after(valid, fraction), 0.0)


def freeze(x: Tensor, generator: torch.Generator, *, lengths: Array | None = None) -> Tensor:
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


def freeze_from(
    x: Tensor, fraction: float, generator: torch.Generator | None = None, *, lengths: Array | None = None
) -> Tensor:
    """Freeze the sequence from a moment on, as a camera that hangs does: the frame of that moment is held.

    Of L valid frames, frame ⌊fraction · (L − 1)⌋ is repeated to the end. A fraction of 0 holds the first frame. At
    least one frame is repeated, unless there is only one or the fraction is 1.

    Args:
        x: (B, T, d) or (B, d) floating tensor; a (B, d) utterance is one frame, and unchanged.
        fraction: the position of the moment in the sequence, in [0, 1]; smaller is harsher.
        generator: not used; part of the shared signature.
        lengths: (B,) valid leading frames; None means all T.

    Raises:
        ValueError: if ``x`` or ``lengths`` has the wrong type or shape, or ``fraction`` is outside [0, 1].
    """
    check_number("fraction", fraction, 0, 1)
    valid = _valid_entries(x, lengths)
    if x.ndim == 2:
        return x.clone()
    moment = (fraction * (valid.sum(dim=(1, 2)) - 1).clamp(min=0).double()).long()
    time = torch.arange(x.shape[1], device=x.device)
    return torch.where(valid, _take_frames(x, torch.minimum(time, moment[:, None])), x)


def clip(x: Tensor, limit: float, generator: torch.Generator | None = None, *, lengths: Array | None = None) -> Tensor:
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


def drop_frames(x: Tensor, probability: float, generator: torch.Generator, *, lengths: Array | None = None) -> Tensor:
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


def hold_frames(x: Tensor, probability: float, generator: torch.Generator, *, lengths: Array | None = None) -> Tensor:
    """Lose frames and repeat the last good one in their place, as a decoder that conceals lost packets does.

    Each valid frame but the first, which has none before it, is lost independently with the given probability.

    Args:
        x: (B, T, d) or (B, d) floating tensor; a (B, d) utterance is one frame, and unchanged.
        probability: chance that a frame is lost, in [0, 1].
        generator: source of the choice of frames.
        lengths: (B,) valid leading frames; None means all T.

    Raises:
        ValueError: if ``x`` or ``lengths`` has the wrong type or shape, or ``probability`` is outside [0, 1].
    """
    check_number("probability", probability, 0, 1)
    valid = _valid_entries(x, lengths)
    if x.ndim == 2:
        return x.clone()
    lost = _uniform(valid.shape[:2], generator, x.device) < probability
    good = torch.arange(x.shape[1], device=x.device).where(~lost, 0).cummax(dim=1).values
    return torch.where(valid, _take_frames(x, good), x)


def shuffle_frames(
    x: Tensor, probability: float, generator: torch.Generator, *, lengths: Array | None = None
) -> Tensor:
    """Put frames out of order: those chosen, each independently, change places among themselves.

    Args:
        x: (B, T, d) or (B, d) floating tensor; a (B, d) utterance is one frame, and unchanged.
        probability: chance that a valid frame is chosen, in [0, 1].
        generator: source of the choice and the order.
        lengths: (B,) valid leading frames; None means all T.

    Raises:
        ValueError: if ``x`` or ``lengths`` has the wrong type or shape, or ``probability`` is outside [0, 1].
    """
    check_number("probability", probability, 0, 1)
    valid = _valid_entries(x, lengths)
    if x.ndim == 2:
        return x.clone()
    draws = _uniform((2, *valid.shape[:2]), generator, x.device)
    chosen = valid[:, :, 0] & (draws[0] < probability)
    places = (~chosen).int().argsort(dim=1, stable=True)  # those chosen first, in order, then all others
    order = draws[1].masked_fill(~chosen, 2.0).argsort(dim=1, stable=True)
    return _take_frames(x, torch.empty_like(order).scatter_(1, places, order))


def time_shift(x: Tensor, steps: int, generator: torch.Generator, *, lengths: Array | None = None) -> Tensor:
    """Shift each sequence in time against the other modalities, as clocks that disagree do.

    Each sample comes ``steps`` frames late or early, drawn at random. The first or last valid frame is held where the
    shifted sequence has none.

    Args:
        x: (B, T, d) or (B, d) floating tensor; a (B, d) utterance is one frame, and unchanged.
        steps: number of frames.
        generator: source of the directions.
        lengths: (B,) valid leading frames; None means all T.

    Raises:
        ValueError: if ``x`` or ``lengths`` has the wrong type or shape, or ``steps`` is not a positive int.
    """
    check_positive_int("steps", steps)
    valid = _valid_entries(x, lengths)
    if x.ndim == 2:
        return x.clone()
    delay = torch.where(_uniform((x.shape[0], 1), generator, x.device) < 0.5, steps, -steps)
    last = (valid.sum(dim=1) - 1).clamp(min=0)
    time = (torch.arange(x.shape[1], device=x.device) - delay).clamp(min=0)
    return torch.where(valid, _take_frames(x, torch.minimum(time, last)), x)


def drop_words(x: Tensor, probability: float, generator: torch.Generator, *, lengths: Array | None = None) -> Tensor:
    """Zero whole words, as a recogniser that misses them does: each independently, with the given probability.

    A word is a run of equal frames, such as an embedding repeated for as long as the word lasts. Where no frame equals
    the one before, as in features aligned to words, every frame is a word.

    Args:
        x: (B, T, d) or (B, d) floating tensor; a (B, d) utterance is one word.
        probability: chance that a word is lost, in [0, 1].
        generator: source of the choice of words.
        lengths: (B,) valid leading frames; None means all T.

    Raises:
        ValueError: if ``x`` or ``lengths`` has the wrong type or shape, or ``probability`` is outside [0, 1].
    """
    check_number("probability", probability, 0, 1)
    valid = _valid_entries(x, lengths)
    frames = x if x.ndim == 3 else x[:, None]
    lost = _uniform(frames.shape[:2], generator, x.device).gather(1, _word_starts(frames)) < probability
    return x.masked_fill(valid & lost.view(valid.shape), 0.0)


def wrong_words(x: Tensor, probability: float, generator: torch.Generator, *, lengths: Array | None = None) -> Tensor:
    """Replace whole words, as a recogniser that mishears them does: each independently, with the given probability.

    A word is a run of equal frames, as in `drop_words`. All its frames become one frame, drawn uniformly from the
    other valid frames of the batch. If the batch is a single word, it is unchanged.

    Args:
        x: (B, T, d) or (B, d) floating tensor; a (B, d) utterance is one word.
        probability: chance that a word is replaced, in [0, 1].
        generator: source of the choice of words and of their replacements.
        lengths: (B,) valid leading frames; None means all T.

    Raises:
        ValueError: if ``x`` or ``lengths`` has the wrong type or shape, or ``probability`` is outside [0, 1].
    """
    check_number("probability", probability, 0, 1)
    valid = _valid_entries(x, lengths)
    frames = x if x.ndim == 3 else x[:, None]
    mask = valid.view(frames.shape[:2])
    start = _word_starts(frames)
    draws = _uniform((2, *mask.shape), generator, x.device).gather(2, start.expand(2, -1, -1))
    # The valid frames of the batch in one row: a word is a stretch of it, and its replacement comes from the rest.
    row = frames[mask]
    size = torch.zeros_like(start).scatter_add_(1, start, mask.long()).gather(1, start)
    place = (mask.flatten().cumsum(dim=0) - 1).view(mask.shape)
    after = place.gather(1, start) + size
    rest = len(row) - size
    wrong = mask & (draws[0] < probability) & (rest > 0)
    result = frames.clone()
    result[wrong] = row[((after + (draws[1] * rest).long()) % max(len(row), 1))[wrong]]
    return result.view(x.shape)


def mismatch(x: Tensor, generator: torch.Generator, *, fraction: float = 0.0, lengths: Array | None = None) -> Tensor:
    """Give every sample the modality of another sample, as when sound and picture do not belong together.

    The donors form one random cycle through the whole batch, so no sample keeps its own modality. A donor that is
    shorter than the receiver repeats, and a donor without frames leaves its receiver silent.

    Args:
        x: (B, T, d) or (B, d) floating tensor.
        generator: source of the cycle.
        fraction: the share of each sequence, in [0, 1], after which the donor's frames take the place of its own. At
            least the last frame is the donor's, unless the fraction is 1.
        lengths: (B,) valid leading frames; None means all T.

    Raises:
        ValueError: if ``x`` or ``lengths`` has the wrong type or shape, ``fraction`` is outside [0, 1], or the batch
            holds a single sample.
    """
    valid = _valid_entries(x, lengths)
    batch = x.shape[0]
    if batch == 1:
        raise ValueError("mismatch needs a batch of 2 samples or more, to exchange the modality, got 1")
    order = torch.randperm(batch, generator=generator, device=generator.device).to(x.device)
    donor = torch.empty_like(order)
    donor[order] = order.roll(1)
    return _receive(x, donor, valid, fraction)


def another_speaker(
    x: Tensor,
    generator: torch.Generator,
    *,
    fraction: float = 0.0,
    groups: Array | None = None,
    lengths: Array | None = None,
) -> Tensor:
    """Give every sample the modality of a sample of another group, as when a channel carries another speaker.

    The donor is drawn uniformly from all samples of other groups that have frames. A donor that is shorter than the
    receiver repeats. A sample without a possible donor, as in a batch of one, is unchanged.

    Args:
        x: (B, T, d) or (B, d) floating tensor.
        generator: source of the donors.
        fraction: as for `mismatch`.
        groups: (B,) strings or integers, the speaker or recording of each sample; None takes every sample for a group
            of its own.
        lengths: (B,) valid leading frames; None means all T.

    Raises:
        ValueError: if ``x``, ``groups`` or ``lengths`` has the wrong type or shape, or ``fraction`` is outside [0, 1].
    """
    valid = _valid_entries(x, lengths)
    group = torch.arange(x.shape[0]) if groups is None else _group_numbers(groups, x.shape[0])
    return _receive(x, _draw_donors(group, valid, generator, same_group=False), valid, fraction)


def wrong_face(
    x: Tensor,
    generator: torch.Generator,
    *,
    fraction: float = 0.0,
    groups: Array | None = None,
    lengths: Array | None = None,
) -> Tensor:
    """Give every sample the modality of another sample of its group, as when a tracker follows the wrong face.

    The donor is another utterance of the same speaker or recording, so nothing but the moment is wrong. It is drawn
    uniformly from the samples of the group that have frames. A donor that is shorter than the receiver repeats. A
    sample without a possible donor, as in a batch of one, is unchanged.

    Args:
        x: (B, T, d) or (B, d) floating tensor.
        generator: source of the donors.
        fraction: as for `mismatch`.
        groups: (B,) strings or integers, the speaker or recording of each sample; None takes the whole batch for one
            group.
        lengths: (B,) valid leading frames; None means all T.

    Raises:
        ValueError: if ``x``, ``groups`` or ``lengths`` has the wrong type or shape, or ``fraction`` is outside [0, 1].
    """
    valid = _valid_entries(x, lengths)
    group = torch.zeros(x.shape[0], dtype=torch.int64) if groups is None else _group_numbers(groups, x.shape[0])
    return _receive(x, _draw_donors(group, valid, generator, same_group=True), valid, fraction)


class Severities(NamedTuple):
    """One kind of corruption at three severities."""

    mild: Corruption
    medium: Corruption
    severe: Corruption


def _severities(corruption: Corruption, parameter: str, mild: float, medium: float, severe: float) -> Severities:
    """Return a corruption at three values of a parameter."""
    return Severities(*(partial(corruption, **{parameter: value}) for value in (mild, medium, severe)))


_pink_noise = partial(coloured_noise, exponent=1.0)
_brown_noise = partial(coloured_noise, exponent=2.0)

SEVERITIES: dict[str, Severities] = {
    "gaussian_noise": _severities(gaussian_noise, "snr", 10.0, 1.0, 0.01),
    "coloured_noise": _severities(_pink_noise, "snr", 10.0, 1.0, 0.01),
    "brown_noise": _severities(_brown_noise, "snr", 10.0, 1.0, 0.01),
    "offset": _severities(offset, "size", 0.5, 1.0, 3.0),
    "gain": _severities(gain, "factor", 1.5, 2.0, 4.0),
    "clip": _severities(clip, "limit", 1.0, 0.5, 0.25),
    "silence": _severities(silence, "fraction", 0.75, 0.5, 0.0),
    "freeze": Severities(partial(freeze_from, fraction=0.75), partial(freeze_from, fraction=0.5), freeze),
    "drop_frames": _severities(drop_frames, "probability", 0.25, 0.5, 0.75),
    "hold_frames": _severities(hold_frames, "probability", 0.25, 0.5, 0.75),
    "shuffle_frames": _severities(shuffle_frames, "probability", 0.25, 0.5, 1.0),
    "time_shift": _severities(time_shift, "steps", 1, 3, 10),
    "drop_words": _severities(drop_words, "probability", 0.25, 0.5, 0.75),
    "wrong_words": _severities(wrong_words, "probability", 0.25, 0.5, 0.75),
    "mismatch": _severities(mismatch, "fraction", 0.75, 0.5, 0.0),
    "another_speaker": _severities(another_speaker, "fraction", 0.75, 0.5, 0.0),
    "wrong_face": _severities(wrong_face, "fraction", 0.75, 0.5, 0.0),
}
"""Every kind of corruption at three severities, ready to be called. Frozen is from a moment on, or all of it."""

KINDS: dict[str, Corruption] = {
    **{name: severities.severe for name, severities in SEVERITIES.items()},
    "freeze_from": partial(freeze_from, fraction=0.5),
}
"""The corruptions by name, at the default severity of `corrupt`; ``functools.partial`` gives any other severity."""

PAPER_CORRUPTION = "gaussian_noise"
"""The kind that the paper's protocol uses: white noise, at an SNR of 0.01."""


def named(name: str, *, argument: str = "kind") -> Corruption:
    """Return a corruption by its name in `KINDS`, or by its name and severity in `SEVERITIES`.

    Args:
        name: such as ``"gain"`` or ``"gain:mild"``.
        argument: what an error calls the name.

    Raises:
        ValueError: if there is no such name or severity.

    Example:
        >>> named("gain:mild")(torch.ones(1, 2)).tolist()
        [[1.5, 1.5]]
    """
    kind, colon, severity = name.partition(":") if isinstance(name, str) else (name, "", "")
    check_choice(argument, kind, sorted(SEVERITIES if colon else KINDS))
    if not colon:
        return KINDS[kind]
    check_choice(f"the severity of {argument}", severity, Severities._fields)
    chosen: Corruption = SEVERITIES[kind][Severities._fields.index(severity)]
    return chosen


def compose(*corruptions: str | Corruption) -> Corruption:
    """Return the corruption that applies the given ones in turn, drawing from one generator.

    Args:
        corruptions: callables, or names as for :func:`named`.

    Example:
        >>> overdriven = compose(partial(gain, factor=4.0), partial(clip, limit=0.5))
        >>> overdriven(torch.tensor([[3.0, -1.0]]), generator=torch.Generator()).shape
        torch.Size([1, 2])
    """
    return _Composition(tuple(named(one) if isinstance(one, str) else one for one in corruptions))


@dataclass(frozen=True)
class _Composition:
    """Corruptions in turn."""

    parts: tuple[Corruption, ...]

    def __call__(
        self,
        x: Tensor,
        generator: torch.Generator | None = None,
        *,
        groups: Array | None = None,
        lengths: Array | None = None,
    ) -> Tensor:
        for part in self.parts:
            known = {"groups": groups} if takes_groups(part) else {}
            x = part(x, generator=generator, lengths=lengths, **known)
        return x


def takes_groups(corruption: Corruption) -> bool:
    """Return whether a corruption, or a part of a composed one, uses the groups of the samples."""
    if isinstance(corruption, _Composition):
        return any(takes_groups(part) for part in corruption.parts)
    return "groups" in inspect.signature(corruption).parameters


def corrupt(
    features: Mapping[str, Tensor],
    seed: int,
    *,
    kind: str | Corruption = "gaussian_noise",
    probability: float = 0.75,
    lengths: Array | None = None,
    available: Array | None = None,
    groups: Array | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Corrupt some modalities of some samples, but never all modalities of a sample.

    Each sample is chosen independently, with the given probability. Of a chosen sample's A available modalities, k are
    corrupted; k is uniform in 1..A−1, and so is the choice of k modalities. A sample with A < 2 stays clean. The seed
    starts one CPU generator for the whole call: corrupt a data set in one call, because in batches the result differs.
    ``truth`` is drawn first, so it is the same for every ``kind``; a kind that finds nothing to change, as a freeze of
    a single frame, leaves a sample as it is though ``truth`` marks it.

    Args:
        features: mapping from modality name to standardised (B, T, d_m) or (B, d_m) tensors; they are not modified.
        seed: the same seed, features and options give the same result on every device.
        kind: a name in `KINDS`, a name and severity such as ``"clip:mild"``, or a callable ``kind(x,
            generator=generator, lengths=lengths)`` such as ``functools.partial(clip, limit=0.5)``, which receives the
            samples that have the modality.
        probability: share of samples with at least one corrupted modality, in [0, 1].
        lengths: (B,) valid leading frames; None means all T.
        available: (B, M) bool in the order of ``features``; None means every modality.
        groups: (B,) strings or integers, the speaker or recording of each sample, for kinds that use it
            (`another_speaker`, `wrong_face`).

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
        kind = named(kind)
    first = _check_features(features)
    batch, steps = first.shape[0], (first.shape[1] if first.ndim == 3 else 1)
    length = check_lengths(lengths, batch, steps, first.device)
    usable = (length > 0)[:, None].expand(-1, len(features))
    if available is not None:
        usable = usable & check_mask("available", available, (batch, len(features)), first.device)
    group = None if groups is None else _group_numbers(groups, batch)
    if group is not None and not takes_groups(kind):
        group = None

    generator = torch.Generator().manual_seed(seed)
    truth = _draw_truth(usable, probability, generator)
    corrupted = {name: x.clone() for name, x in features.items()}
    for m, x in enumerate(corrupted.values()):
        rows = usable[:, m]
        hit = truth[rows, m].view(-1, *[1] * (x.ndim - 1))
        known = {} if group is None else {"groups": group[rows.cpu()]}
        x[rows] = torch.where(hit, kind(x[rows], generator=generator, lengths=length[rows], **known), x[rows])
    return corrupted, truth


def paper_protocol(
    features: Mapping[str, Tensor],
    seed: int,
    *,
    snr: float = 0.01,
    probability: float = 0.75,
    lengths: Array | None = None,
    available: Array | None = None,
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


def _valid_entries(x: Tensor, lengths: Array | None) -> Tensor:
    """Return a mask of the valid frames: (B, T, 1), or (B, 1) for a matrix ``x``."""
    _check_tensor("x", x)
    steps = x.shape[1] if x.ndim == 3 else 1
    length = check_lengths(lengths, x.shape[0], steps, x.device)
    mask = torch.arange(steps, device=x.device) < length[:, None]
    return mask[:, :, None] if x.ndim == 3 else mask


def _after(valid: Tensor, fraction: float) -> Tensor:
    """Return a mask of the valid frames after a share of each sequence, shaped as ``valid``."""
    check_number("fraction", fraction, 0, 1)
    length = valid.flatten(1).sum(dim=1)
    time = torch.arange(valid.shape[1], device=valid.device)  # of a matrix, one step: its masks are (B, 1)
    after = time >= (fraction * length.double()).long()[:, None]
    return valid & after.view(valid.shape)


def _take_frames(x: Tensor, time: Tensor) -> Tensor:
    """Return (B, T, d): frame ``time`` (B, T) of each sample."""
    return x.gather(1, time[:, :, None].expand_as(x))


def _word_starts(x: Tensor) -> Tensor:
    """Return (B, T): the step at which the run of equal frames begins that each frame belongs to."""
    time = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    starts = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    starts[:, 1:] = (x[:, 1:] != x[:, :-1]).any(dim=2)
    return time.where(starts, 0).cummax(dim=1).values


def _integrate(white: Tensor, order: float) -> Tensor:
    """Integrate (B, T, d) along time a fractional number of times: order 0 returns it as it is, 1 the running sum."""
    steps = white.shape[1]
    if not white.numel():
        return white
    k = torch.arange(1, steps, device=white.device, dtype=torch.float64)
    kernel = torch.cat([k.new_ones(1), ((k - 1 + order) / k).cumprod(dim=0)])
    spectrum = torch.fft.rfft(white, n=2 * steps, dim=1) * torch.fft.rfft(kernel, n=2 * steps)[:, None]
    noise: Tensor = torch.fft.irfft(spectrum, n=2 * steps, dim=1)[:, :steps]
    return noise


def _group_numbers(groups: Any, batch: int) -> Tensor:
    """Return (B,) int64 on the CPU, the same number for the same group."""
    names = groups.cpu().numpy() if isinstance(groups, Tensor) else np.asarray(groups)
    if names.shape != (batch,) or names.dtype.kind not in "iuUO":
        raise ValueError(
            f"groups must be strings or integers of shape ({batch},), got {names.dtype} of shape {names.shape}"
        )
    return torch.from_numpy(np.unique(names, return_inverse=True)[1])


def _draw_donors(group: Tensor, valid: Tensor, generator: torch.Generator, *, same_group: bool) -> Tensor:
    """Draw another sample with frames for every sample, (B,), of the same group or of another one; itself if none."""
    draws = _uniform(group.shape, generator, group.device)
    rows = valid.flatten(1).any(dim=1).cpu().nonzero()[:, 0]
    rows = rows[group[rows].argsort(stable=True)]
    # Sorted by group, a sample's group is a stretch; donors are the rest of the stretch, or of the row around it.
    sizes = group[rows].bincount()
    size, start = sizes[group[rows]], (sizes.cumsum(dim=0) - sizes)[group[rows]]
    place = torch.arange(len(rows))
    choices = size - 1 if same_group else len(rows) - size
    drawn = (draws[rows] * choices).long()
    own, rest = start + (place - start + 1 + drawn) % size, (start + size + drawn) % max(len(rows), 1)
    donor = torch.arange(len(group))
    donor[rows] = rows[torch.where(choices > 0, own if same_group else rest, place)]
    return donor.to(valid.device)


def _receive(x: Tensor, donor: Tensor, valid: Tensor, fraction: float) -> Tensor:
    """Return x with each sample's frames after the share replaced by its donor's; ``donor`` (B,) holds rows."""
    received = x[donor]
    has_frames = valid.flatten(1).any(dim=1)[donor].view(-1, *[1] * (x.ndim - 1))
    if x.ndim == 3:
        length = valid.sum(dim=(1, 2))[donor].clamp(min=1)
        received = _take_frames(received, torch.arange(x.shape[1], device=x.device) % length[:, None])
    return torch.where(_after(valid, fraction), received.where(has_frames, 0.0), x)


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
