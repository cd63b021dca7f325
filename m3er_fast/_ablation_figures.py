"""The content of the ablation's figures: regenerated frames (Figure 7) and classified examples (Figures 3 and 4).

Dimension legend: N utterances, M modalities, T time steps, d_m features of modality m, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from m3er_fast._ablation_table import AblationResult
from m3er_fast.corpus.base import Corpus
from m3er_fast.evaluation import Prediction, standardize_corpus
from m3er_fast.fusion import M3ERFusion
from m3er_fast.reference import fusion_weights


@dataclass(frozen=True)
class Regenerated:
    """One frame of a modality as Figure 7 draws it, in standardised features."""

    original: NDArray[np.float32]  # (d_m,)
    corrupted: NDArray[np.float32]
    proxy: NDArray[np.float32]


def regenerate(model: M3ERFusion, corpus: Corpus, *, seed: int = 0) -> tuple[dict[str, float], dict[str, Regenerated]]:
    """Regenerate each modality from all others, as if it alone were lost.

    Args:
        model: fitted, with proxies.
        corpus: utterances with the model's modalities.
        seed: seeds the noise of the corrupted frames.

    Returns:
        For each modality that can be regenerated: the relative L2 error, mean ‖proxy − original‖ / mean ‖original‖
        over all valid frames of utterances with another modality; and a frame of median error beside its noisy version.

    Raises:
        ValueError: if the model has no proxies, or the corpus does not have its modalities.
    """
    if model.proxy_generator is None:
        raise ValueError("the model has no proxies to look at")
    batch = standardize_corpus(model, corpus)
    noise = torch.Generator().manual_seed(seed)
    errors: dict[str, float] = {}
    frames: dict[str, Regenerated] = {}
    for m, name in enumerate(corpus.features):
        all_but_one = batch.available.clone()
        all_but_one[:, m] = False
        replaced = model.proxy_generator.proxy_batch(batch, all_but_one)
        wanted = batch.frame_valid[:, :, m] & ~replaced.abstained[:, None]
        original, proxy = batch.features[m][wanted], replaced.features[m][wanted]
        if not len(original):
            continue
        distance = (proxy - original).norm(dim=1)
        errors[name] = float(distance.mean() / original.norm(dim=1).mean().clamp(min=1e-30))
        middle = int(distance.argsort()[len(distance) // 2])
        frame = original[middle]
        noisy = frame + 10.0 * frame.square().mean().sqrt() * torch.randn(frame.shape, generator=noise)
        frames[name] = Regenerated(frame.numpy(), noisy.numpy(), proxy[middle].numpy())
    return errors, frames


def examples(
    model: M3ERFusion, corpus: Corpus, truth: NDArray[np.bool_], prediction: Prediction
) -> list[dict[str, Any]]:
    """Choose the examples of Figures 3 and 4: for each class the correct answer of median confidence.

    The most confident answers would all have probabilities and weights of 1. Answers for utterances with a corrupted
    modality that was judged ineffectual are preferred.

    Args:
        model: the model that predicted.
        corpus: the utterances, corrupted.
        truth: (N, M) bool, the corrupted modalities.
        prediction: the model's answers for ``corpus``.

    Returns:
        The fields of ``plots.Example`` for each class with a correct answer.
    """
    if corpus.target is None:
        return []
    if corpus.task == "multi":
        is_true = corpus.target == 1
    else:
        labels = corpus.target if corpus.task == "single" else corpus.target.argmax(axis=1)
        is_true = labels[:, None] == np.arange(len(corpus.classes))
    answer = prediction.probabilities.argmax(axis=1)
    loss = model.config.loss
    chosen = []
    for c, label in enumerate(corpus.classes):
        correct = np.flatnonzero((answer == c) & is_true[:, c])
        if not len(correct):
            continue
        detected = correct[(truth & ~prediction.effective)[correct].any(axis=1)]
        preferred = detected if len(detected) else correct
        order = prediction.probabilities[preferred, c].argsort(kind="stable")
        row = int(preferred[order[len(order) // 2]])
        # Rounded to 0 or 1, a probability would have an infinite logarithm.
        own = torch.from_numpy(prediction.modality_probabilities[:, row : row + 1]).double().clamp(1e-300, 1 - 1e-16)
        available = torch.from_numpy(prediction.available[row : row + 1])
        weights = fusion_weights(
            own.log(), torch.log1p(-own), variant=loss.variant, beta=loss.beta, available=available
        )
        chosen.append(
            {
                "id": str(corpus.ids[row]),
                "label": label,
                "classes": corpus.classes,
                "modalities": corpus.modalities,
                "probabilities": prediction.modality_probabilities[:, row],
                "fused": prediction.probabilities[row],
                "effective": prediction.effective[row],
                "weights": (weights[:, 0, c] * available[0]).numpy(),
            }
        )
    return chosen


def draw_proxies(errors: dict[str, float], frames: dict[str, Regenerated], path: Path) -> None:
    """Draw Figure 7 from the result of :func:`regenerate`, if matplotlib is installed and there is any frame."""
    try:
        from m3er_fast.plots import plot_proxies
    except ImportError:  # the pictures need an extra; the tables hold the numbers
        return
    if frames:
        original, corrupted, proxy = (
            {name: getattr(frame, field) for name, frame in frames.items()}
            for field in ("original", "corrupted", "proxy")
        )
        plot_proxies(original, corrupted, proxy, errors, path)


def draw_ablation(
    result: AblationResult, frames: dict[str, Regenerated], chosen: list[dict[str, Any]], out: Path
) -> None:
    """Draw the bars of Table 2, Figure 7 and Figure 3 into ``out``, if matplotlib is installed.

    Args:
        result: the table.
        frames: the frames from :func:`regenerate`.
        chosen: the result of :func:`examples`.
        out: the folder.
    """
    try:
        from m3er_fast import plots
    except ImportError:  # the pictures need an extra; the tables hold the numbers
        return
    corruption = "" if result.other_corruption is None else f": {result.other_corruption}"
    titles = {False: "Clean", True: f"With ineffectual modalities{corruption}"}
    groups = {
        title: [(row.label, *row.overall("f1")) for row in result.all_rows if row.ineffectual == ineffectual]
        for ineffectual, title in titles.items()
    }
    groups = {title: rows for title, rows in groups.items() if rows}
    plots.plot_ablation(groups, out / "ablation.png", metric="Overall F1")
    draw_proxies(result.proxy_errors, frames, out / "figure7.png")
    if chosen:
        plots.plot_examples([plots.Example(**fields) for fields in chosen], out / "figure3.png")
