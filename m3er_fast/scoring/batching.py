"""Batches by frames: utterances of about one length together, so that little of a batch is padding."""

from __future__ import annotations

import numpy as np


def plan_batches(lengths: np.ndarray, batch_frames: int) -> list[np.ndarray]:
    """Divide utterances into batches of about ``batch_frames`` frames, padding included.

    The batch of the shortest comes first. The same lengths give the same batches.

    Args:
        lengths: (N,) frames of each utterance.
        batch_frames: a batch has no more than this, but for its last utterance.

    Returns:
        Indices of utterances, batch by batch, within a batch in ascending order; each occurs once.
    """
    order = np.argsort(lengths, kind="stable")
    padded = np.maximum(lengths[order], 1)
    total = int(padded.sum())
    if not total:
        return []
    evenly = -(-total // -(-total // batch_frames))  # no small batch is left over at the end
    batches, start = [], 0
    while start < len(order):
        # Of the utterances start..i, all padded to the length of i, the frames grow with i.
        size = np.arange(len(order) - start) * padded[start:]
        stop = start + max(1, int(np.searchsorted(size, evenly)))
        batches.append(np.sort(order[start:stop]))
        start = stop
    return batches
