"""The combined score of the modality check: one number for all symptoms and for not belonging.

Dimension legend: M modalities, B samples, n calibration samples, S symptoms.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection

import torch
from torch import Tensor

from m3er_fast._conformal import Tables, sort_columns
from m3er_fast._symptoms import DETECTORS, LOW_REASON, SURPRISES

# The edges of a symptom, beyond which a surprise is above 1, leave this share of the calibration samples outside, all
# symptoms taken together; each has two tails, and so has not belonging.
_EDGE_SHARE = 0.05
_TAILS = 2 * len(SURPRISES) + len(DETECTORS) + 1
# Edges are at least this far from the median: where all of training is alike, a hair's breadth is no surprise.
_LEAST_EDGE = 0.05


class CombinedScore:
    """The largest surprise of all symptoms, and of not belonging, calibrated as one number.

    Each symptom is measured from its median in training, in units of how far clean samples go: a surprise of 1 is the
    edge of what they show. The largest surprise then has a p-value of its own, so that no share of alpha is wasted on
    symptoms that are idle.

    Its tables are ``symptom_center``, ``symptom_above`` and ``symptom_below`` (M, S); ``own_scores`` and
    ``combined_scores`` (M, n), the largest surprises ascending, without and with that of not belonging; and
    ``own_count`` and ``combined_count`` (M,), the entries of each row in use.
    """

    tables = (
        *("symptom_center", "symptom_above", "symptom_below"),
        *("own_scores", "own_count", "combined_scores", "combined_count"),
    )

    @staticmethod
    def scale(symptoms: Tensor, say: Tensor, available: Tensor) -> dict[str, Tensor]:
        """Return the tables that :meth:`surprises` needs.

        Args:
            symptoms: (n, M, S) of calibration samples.
            say: (n, M, S), how much each counts.
            available: (n, M) bool.
        """
        quantile = 1.0 - _EDGE_SHARE / _TAILS
        center = torch.zeros(symptoms.shape[1:])
        above, below = torch.full_like(center, torch.inf), torch.full_like(center, torch.inf)
        for m, k in itertools.product(*map(range, center.shape)):
            rows = available[:, m] & (say[:, m, k] > 0)
            if not bool(rows.any()):
                continue  # never measured in training: no value is a surprise
            values = symptoms[rows, m, k]
            center[m, k] = values.median()
            excess = (values - center[m, k]) * say[rows, m, k]
            least = _LEAST_EDGE if k < len(SURPRISES) else torch.finfo(torch.float32).tiny
            above[m, k] = excess.quantile(quantile, interpolation="higher").clamp(min=least)
            if LOW_REASON[k]:
                below[m, k] = -excess.quantile(1.0 - quantile, interpolation="lower").clamp(max=-least)
        return {"symptom_center": center, "symptom_above": above, "symptom_below": below}

    @staticmethod
    def surprises(symptoms: Tensor, say: Tensor, tables: Tables, *, tolerant: bool) -> Tensor:
        """Return (B, M, S) surprises, negative where the symptom is low.

        New samples are judged tolerantly: a new microphone is no fault. Calibration samples are not, for a tolerance
        that both have is calibrated away.
        """
        excess = (symptoms - tables["symptom_center"]) * say
        if tolerant:
            excess = excess.sign() * (excess.abs() - _tolerance(symptoms)).clamp(min=0.0)
        return torch.where(excess > 0, excess / tables["symptom_above"], excess / tables["symptom_below"])

    @staticmethod
    def of_pairs(p_value: Tensor, ignored: Collection[str]) -> Tensor:
        """Return the surprise of not belonging: 1 at the p-value that each symptom gives to its edge."""
        return torch.zeros_like(p_value) if "belonging" in ignored else p_value.log() / math.log(_EDGE_SHARE / _TAILS)

    @staticmethod
    def sort(scores: Tensor, available: Tensor, name: str) -> dict[str, Tensor]:
        """Return the tables of scores (n, M) by which :meth:`p_value` ranks others."""
        values, count = sort_columns(scores, available)
        return {f"{name}_scores": values, f"{name}_count": count}

    @staticmethod
    def p_value(scores: Tensor, name: str, tables: Tables) -> Tensor:
        """Return (B, M), the share of calibration samples with at least this score.

        Beyond the largest of them the share goes on falling, from 1/(n+1), with the ratio of the scores.
        """
        columns = []
        for score, known, count in zip(
            scores.unbind(1), tables[f"{name}_scores"], tables[f"{name}_count"], strict=True
        ):
            # Gathered: as a subscript the number would be read by the host, which would wait for the device.
            largest = known.gather(0, (count - 1).clamp(min=0).view(1))
            above = count - torch.searchsorted(known, score.contiguous(), right=False)
            p_value = (above + torch.where(score > largest, largest / score, 1.0)) / (1 + count)
            columns.append(p_value.where(count > 0, 1.0))
        return torch.stack(columns, dim=1)


def _tolerance(symptoms: Tensor) -> Tensor:
    """(S,) distances that are not held against a new recording, filled on the device."""
    zones = [*(surprise.tolerance for surprise in SURPRISES), *[0.0] * len(DETECTORS)]
    return torch.stack([symptoms.new_full((), zone) for zone in zones])
