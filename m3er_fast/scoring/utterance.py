"""The scores of one utterance, from arrays in memory, without files or Arrow.

Dimension legend: T frames, d features of a modality.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3er_fast.check import ModalityCheck
from m3er_fast.fitted_module import eval_mode
from m3er_fast.fusion import M3ERFusion
from m3er_fast.inputs import refuse_sparse
from m3er_fast.scoring.scorer import MOST_FRAMES


@dataclass(frozen=True)
class UtteranceScores:
    """The scores of one utterance: a row of :mod:`m3er_fast.scoring.columns`."""

    prediction: str  # the class with the highest probability (the first of equal ones)
    probabilities: dict[str, float]  # by class, in the model's order
    effective: dict[str, bool]  # by modality: whether it was judged good and used unchanged
    p_value: dict[str, float]  # by modality: the p-value behind this verdict; 0 where it is unavailable
    reason: dict[str, str | None]  # by modality: why it was rejected, such as "frozen"; None if not, or unavailable
    abstained: bool  # whether no modality was effective, so that nothing here can be trusted


def predict(model: M3ERFusion, features: Mapping[str, Any]) -> UtteranceScores:
    """Score one utterance, as :func:`score` scores a row of a corpus.

    The model is put in eval mode for the duration of the call.

    Args:
        model: with a fitted check, if it has one.
        features: modality -> (1, T, d) tensor, array or nested list of real numbers, as the model reads a batch of one
            utterance, with the same T for all; (1, d) or (d,) is a single frame. A modality that is missing or None is
            unavailable. NaN and ±inf are allowed. (T, d) is refused: to the model that is T utterances.

    Raises:
        NotFittedError: the model's check is not fitted.
        ValueError: ``features`` hold something else.

    Example:
        >>> scores = predict(model, {"text": torch.randn(1, 12, 300), "audio": torch.randn(1, 12, 74)})
        >>> scores.prediction, scores.probabilities[scores.prediction]
    """
    given = _frames(model.input_dims, features)
    length = next(iter(given.values())).shape[0]
    device = next(model.parameters()).device
    # An utterance without frames gets one frame of padding, as in a corpus.
    batch = {name: (x if length else x.new_zeros(1, x.shape[1]))[None].to(device) for name, x in given.items()}
    with eval_mode(model), torch.inference_mode():
        output = model(batch, torch.tensor([length], device=device))
        probabilities = model.probabilities(output)[0].float()
    best = int(probabilities.cpu().numpy().argmax())  # NumPy returns the first of equal ones

    def by_modality(values: Tensor) -> dict[str, Any]:
        return dict(zip(model.input_dims, values[0].tolist(), strict=True))

    return UtteranceScores(
        prediction=model.classes[best],
        probabilities=dict(zip(model.classes, probabilities.tolist(), strict=True)),
        effective=by_modality(output.effective),
        p_value=by_modality(output.p_value.float()),
        reason={name: ModalityCheck.reasons[n] if n else None for name, n in by_modality(output.reason).items()},
        abstained=bool(output.abstained[0]),
    )


def _frames(input_dims: Mapping[str, int], features: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the available modalities, each as (T, d) float32, in the order of the model."""
    if not isinstance(features, Mapping):
        raise ValueError(f"features must map modality names to arrays, got {type(features).__name__}")
    for name in features:
        if name not in input_dims:
            raise ValueError(f"features: unknown modality {name!r}; this model knows {list(input_dims)}")
    given = {
        name: _as_frames(name, features[name], dim)
        for name, dim in input_dims.items()
        if features.get(name) is not None
    }
    if not given:
        raise ValueError(f"features: none of the modalities {list(input_dims)} was given")
    first, steps = next((name, x.shape[0]) for name, x in given.items())
    for name, x in given.items():
        if x.shape[0] != steps:
            raise ValueError(
                f"features[{name!r}] has {x.shape[0]} frames, but features[{first!r}] has {steps}: wanted equally many"
            )
    if steps > MOST_FRAMES:
        raise ValueError(f"features[{first!r}] has {steps} frames, wanted at most {MOST_FRAMES}")
    return given


def _as_frames(name: str, value: Any, dim: int) -> Tensor:
    refuse_sparse(f"features[{name!r}]", value)
    if isinstance(value, Tensor):
        if value.is_complex() or value.dtype == torch.bool:
            raise ValueError(f"features[{name!r}] must hold real numbers, got {value.dtype}")
        frames = value.detach().float()
    else:
        try:
            array = np.array(value)  # a copy, since torch needs writable memory
        except (TypeError, ValueError) as error:  # such as lists of unequal lengths
            raise ValueError(f"features[{name!r}] is not an array of numbers: {error}") from error
        if array.dtype.kind not in "fiu":
            raise ValueError(f"features[{name!r}] must hold real numbers, got {array.dtype}")
        with np.errstate(over="ignore"):  # overflow becomes infinite, which the model accepts
            frames = torch.from_numpy(array.astype(np.float32))
    shape = tuple(frames.shape)
    if frames.ndim == 2 and shape[0] != 1 and shape[1] == dim:
        raise ValueError(
            f"features[{name!r}] has shape {shape}, which the model reads as {shape[0]} utterances of one frame; "
            f"wanted (1, T, {dim}), one utterance of T frames"
        )
    if frames.ndim in (1, 2):
        frames = frames.reshape(1, 1, -1)
    if frames.ndim != 3 or frames.shape[0] != 1 or frames.shape[2] != dim:
        raise ValueError(f"features[{name!r}] has shape {shape}, wanted (1, T, {dim}), or ({dim},) for a single frame")
    return frames[0]
