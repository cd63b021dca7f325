"""The combined score of the modality check: one number for all symptoms and for not belonging.

Dimension legend: M modalities, B samples, n calibration samples, S symptoms.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn.functional import softshrink

from m3er_fast._conformal import Tables, count_below, sort_columns
from m3er_fast._symptoms import DETECTORS, SURPRISES, TWO_SIDED

# The tails of a symptom start at its near edges, and end at its far ones: the shares of the calibration samples beyond
# them. All far ones together leave out the last share: each symptom has two tails or one, and not belonging has one.
_NEAR_SHARE = 0.05
_ALL_SHARE = 0.05
_FAR_SHARE = _ALL_SHARE / (2 * len(SURPRISES) + len(DETECTORS) + 1)
# A comparison of modalities that finds this share of swapped ones has half of all shares.
_ENOUGH_POWER = 0.5
# Edges are at least this far from the median: where all of training is alike, a hair's breadth is no surprise.
_LEAST_EDGE = 0.05


class CombinedScore:
    """The largest surprise of all symptoms, and of not belonging, calibrated as one number.

    The surprise of a p-value is log p, in units of the far edge's. Each symptom is measured from its median in
    training; its surprise is that of p = 0.05 at the near edge of its tail and 1 at the far one, linear between, and
    beyond in proportion to the distance. Heavy and light tails thus count alike, and gross faults more than all clean
    samples. The largest surprise then has a p-value of its own, so that no share of alpha is wasted on symptoms that
    are idle.

    Its tables are ``symptom_center`` (M, S); ``symptom_above`` and ``symptom_below`` (M, S, 2), the distances of the
    near and far edges; ``own_scores`` and ``combined_scores`` (M, n), the largest surprises ascending, without and with
    that of not belonging; and ``own_count`` and ``combined_count`` (M,), the entries of each row in use.
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
        center = symptoms.new_zeros(symptoms.shape[1:])
        above, below = (symptoms.new_full((*center.shape, 2), torch.inf) for _ in range(2))
        tails = symptoms.new_tensor([_NEAR_SHARE, _FAR_SHARE])
        for m, k in itertools.product(*map(range, center.shape)):
            rows = available[:, m] & (say[:, m, k] > 0)
            if not bool(rows.any()):
                continue  # never measured in training: no value is a surprise
            values = symptoms[rows, m, k]
            center[m, k] = values.median()
            excess = (values - center[m, k]) * say[rows, m, k]
            above[m, k] = excess.quantile(1.0 - tails, interpolation="higher").clamp(min=_LEAST_EDGE)
            if TWO_SIDED[k]:
                below[m, k] = -excess.quantile(tails, interpolation="lower").clamp(max=-_LEAST_EDGE)
        return {"symptom_center": center, "symptom_above": above, "symptom_below": below}

    @staticmethod
    def surprises(symptoms: Tensor, say: Tensor, tables: Tables, *, tolerant: bool) -> Tensor:
        """Return (B, M, S) surprises, negative where the symptom is low.

        New samples are judged tolerantly: a new microphone is no fault. Calibration samples are not, for a tolerance
        that both have is calibrated away.
        """
        excess = (symptoms - tables["symptom_center"]) * say
        if tolerant:
            columns = list(excess.unbind(dim=-1))
            for k, surprise in enumerate(SURPRISES):
                if surprise.tolerance:
                    columns[k] = softshrink(columns[k], surprise.tolerance)
            excess = torch.stack(columns, dim=-1)
        edges = torch.where((excess > 0)[..., None], tables["symptom_above"], tables["symptom_below"])
        (near, far), distance = edges.unbind(dim=-1), excess.abs()
        at_near = math.log(_NEAR_SHARE) / math.log(_FAR_SHARE)
        in_tail = at_near + (1.0 - at_near) * (distance - near) / (far - near)
        inside = torch.where(distance < near, at_near * distance / near, in_tail)
        return torch.where(distance < far, inside, distance / far) * excess.sign()

    @staticmethod
    def of_pairs(p_value: Tensor, power: Tensor, ignored: Collection[str]) -> Tensor:
        """Return the (B, M) surprise of not belonging from its p-value.

        A comparison that finds half of the swapped modalities in training, ``power`` (M,), has as large a share of
        alpha as all other symptoms together; a weaker one that of a single tail.
        """
        if "belonging" in ignored:
            return torch.zeros_like(p_value)
        share = torch.where(power >= _ENOUGH_POWER, _ALL_SHARE / 2, _FAR_SHARE)
        return p_value.log() / share.log().to(p_value.dtype)

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
        known, count, score = tables[f"{name}_scores"], tables[f"{name}_count"][:, None], scores.T
        # Gathered: as a subscript the number would be read by the host, which would wait for the device.
        largest = known.gather(1, (count - 1).clamp(min=0))
        above = count - count_below(known, score)
        p_value = (above + torch.where(score > largest, largest / score, 1.0)) / (1 + count)
        return p_value.where(count > 0, 1.0).T
