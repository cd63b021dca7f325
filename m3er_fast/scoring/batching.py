"""Batches of utterances of about equal length, which need little padding."""

from __future__ import annotations

import numpy as np


def plan_batches(lengths: np.ndarray, batch_frames: int) -> list[np.ndarray]:
    """Divide utterances into batches of about ``batch_frames`` frames, padding included.

    The batch of the shortest comes first. Equal lengths give equal batches.

    Args:
        lengths: (N,) frames of each utterance.
        batch_frames: a batch has no more than this, except for its last utterance.

    Returns:
        Indices of utterances, one array per batch, ascending within a batch; each occurs once.
    """
    order = np.argsort(lengths, kind="stable")
    padded = np.maximum(lengths[order], 1)
    total = int(padded.sum())
    if not total:
        return []
    even_share = -(-total // -(-total // batch_frames))  # so that no small batch is left over at the end
    batches, start = [], 0
    while start < len(order):
        # Frames of the utterances start..i, padded to the length of i, which is the longest.
        size = np.arange(len(order) - start) * padded[start:]
        stop = start + max(1, int(np.searchsorted(size, even_share)))
        batches.append(np.sort(order[start:stop]))
        start = stop
    return batches
