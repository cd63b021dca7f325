"""Conformal calibration of the modality check: statistics become p-values against calibration samples.

A statistic of pairs or of single modalities is one class here, derived from :class:`ConformalStatistic`.

Dimension legend: M modalities, P pairs of modalities, B samples, n calibration samples, V values of a statistic per
sample (P or M); a modality has 2^(M-1) sets of others.

Source: Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World", 2005.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from m3er_fast.config import CheckConfig
from m3er_fast.operands import CheckProjections, modality_pairs

# Recordings differ in level: energy counts as odd only if it leaves the range of the calibration samples by this
# factor, 3 dB. On CMU-MOSI's faces a sixth of the published test split lies below the lowest 2.5 % of the training
# split, but hardly any sample lies below half of that.
LEVEL_TOLERANCE = 2.0
# Below every real correlation.
_UNDEFINED = -2.0

Tables = Mapping[str, Tensor]
"""Learned tables of a statistic by the names of their buffers."""


class ConformalStatistic(ABC):
    """A statistic of the check, and how its values become p-values.

    Args:
        modalities: M.
        config: the settings of the check.

    Attributes:
        name: the value of ``CheckConfig.statistic`` and the field of ``CheckResult`` that stand for the statistic.
        prefix: of the names of its buffers.
        compares: whether a modality is compared with the others, and not judged by itself.
        tables: names of its learned buffers, in the order of ``state_dict``; "_count" at the end means integers.
    """

    name: ClassVar[str]
    prefix: ClassVar[str] = ""
    compares: ClassVar[bool] = False
    tables: ClassVar[tuple[str, ...]]

    def __init__(self, modalities: int, config: CheckConfig) -> None:
        self.modalities = modalities
        self.pairs = modality_pairs(modalities)
        self.config = config

    def empty_tables(self) -> dict[str, Tensor]:
        """Return the tables before calibration."""
        return {
            f"{self.prefix}{name}": torch.zeros(0, dtype=torch.int64 if name.endswith("_count") else None)
            for name in self.tables
        }

    @abstractmethod
    def is_measured(self, available: Tensor) -> Tensor:
        """Return (B, V) bool, which values exist for samples whose ``available`` (B, M) modalities are given."""

    @abstractmethod
    def calibrate(self, values: Tensor, available: Tensor, projections: CheckProjections) -> dict[str, Tensor]:
        """Return the tables learned from calibration samples.

        Args:
            values: (n, V), measured by projections that did not see the sample.
            available: (n, M) bool.
            projections: learned from all training samples, to measure new ones.
        """

    @abstractmethod
    def p_value(self, values: Tensor, available: Tensor, tables: Tables) -> Tensor:
        """Return the (B, M) p-values of new samples from their (B, V) values; 1 where there is no evidence."""

    def power(self, swapped: Iterable[tuple[Tensor, Tensor]], tables: Tables) -> Tensor:
        """Return (M,), the share of samples in which modality m is recognised, at level alpha, when it is swapped.

        Args:
            swapped: for each modality, the values (n, V) and the availability (n, M) of calibration samples in which
                it comes from another sample.
            tables: learned from the calibration samples as they are.
        """
        power = []
        for m, (values, available) in enumerate(swapped):
            p_value = self.p_value(values, available, tables)[available[:, m], m]
            power.append((p_value < self.config.alpha).float().mean().nan_to_num(0.0))  # NaN: never available
        return torch.stack(power)


class PairCorrelation(ConformalStatistic):
    """The correlation ρ of each pair of modalities; low is odd.

    The p-value of modality m is a rank of a rank. ρ_mj is first ranked among the calibration samples, for each other
    modality j. The largest of these ranks (rule "all"; the smallest with "any") is then ranked among the same quantity
    of the calibration samples that have the same modalities: a maximum over two ranks is distributed otherwise than one
    rank. Hence a table for each modality and set of other modalities.

    Its tables are ``pair_scores`` (P, n), ρ of each pair ascending; ``rank_scores`` (M·S, n), the largest ranks
    ascending; and ``pair_count`` (P,) and ``rank_count`` (M·S,), the entries of each row that are in use.
    """

    name = "correlation"
    fewest_components = 2
    compares = True
    tables = ("pair_scores", "pair_count", "rank_scores", "rank_count")

    def is_measured(self, available: Tensor) -> Tensor:
        """Return (B, P) bool, whether both modalities of the pair are available."""
        return torch.stack([available[:, i] & available[:, j] for i, j in self.pairs], dim=1)

    def calibrate(self, values: Tensor, available: Tensor, projections: CheckProjections) -> dict[str, Tensor]:
        """Return the sorted correlations of each pair, and the sorted ranks of each set of modalities."""
        # A correlation over fewer than two components is never defined: such a pair is no evidence either way.
        fewest = self.fewest_components
        defined = torch.tensor([left.shape[0] >= fewest for left in projections.left]).to(available.device)
        pair_scores, pair_count = sort_columns(self._for_decision(values), self.is_measured(available) & defined)
        tables = {"pair_scores": pair_scores, "pair_count": pair_count}
        # A calibration sample counts in its own rank: with rule "all" the p-value of a new sample is then exactly the
        # one that ranking all n + 1 samples together would give.
        rank, comparable = self._ranks(values, tables), self._comparable(available, tables)
        sets = []
        for m in range(self.modalities):
            for others in self._sets_of_others(m):
                used = torch.zeros_like(comparable)
                used[:, m, others] = True
                together = available[:, m] & comparable[:, m, others].all(dim=1)
                sets.append(sort_columns(self._reduce(rank, used)[:, m, None], together[:, None]))
        tables["rank_scores"] = torch.cat([scores for scores, _ in sets])
        tables["rank_count"] = torch.cat([count for _, count in sets])
        return tables

    def p_value(self, values: Tensor, available: Tensor, tables: Tables) -> Tensor:
        """Return (B, M), the share of comparable calibration samples that correlate no better."""
        rank, comparable = self._ranks(values, tables), self._comparable(available, tables)
        score = self._reduce(rank, comparable).T
        # Every score is ranked in the table of every set, for all modalities in one call; its own set's rank counts.
        shape = (self.modalities, 2 ** (self.modalities - 1))
        known = tables["rank_scores"].view(*shape, tables["rank_scores"].shape[1])
        below = count_below(known, score[:, None].expand(*shape, -1), inclusive=True)
        number = self._number_of_set(comparable).T
        below = below.gather(1, number[:, None])[:, 0]
        count = tables["rank_count"].view(shape).gather(1, number)
        return ((1 + below).to(values.dtype) / (1 + count)).T

    def passes_threshold(
        self, values: Tensor, available: Tensor, threshold: float | tuple[float, ...], tables: Tables
    ) -> Tensor:
        """Return (B, M) bool, whether ρ ≥ τ against some other modality (rule "all") or every one (rule "any")."""
        limits = threshold if isinstance(threshold, tuple) else (threshold,) * len(self.pairs)
        # Filled on the device: a tensor made of a list would wait for it, and cannot be part of a CUDA graph.
        limit = torch.stack([values.new_full((), value) for value in limits])
        passed = self._by_modality(self._for_decision(values) >= limit)
        comparable = self._comparable(available, tables)
        if self.config.rule == "all":
            return (passed & comparable).any(dim=2) | ~comparable.any(dim=2)
        return (passed | ~comparable).all(dim=2)

    def _comparable(self, available: Tensor, tables: Tables) -> Tensor:
        """(B, M, M) bool: j is available, and its pair with m was seen in calibration."""
        return self._by_modality((tables["pair_count"] > 0)[None]) & available[:, None, :]

    def _ranks(self, values: Tensor, tables: Tables) -> Tensor:
        """(B, M, M) share of calibration samples whose ρ of the pair is no larger."""
        values = self._for_decision(values)
        below = count_below(tables["pair_scores"], values.T, inclusive=True)
        return self._by_modality((below.to(values.dtype) / tables["pair_count"].clamp(min=1)[:, None]).T)

    def _by_modality(self, of_pairs: Tensor) -> Tensor:
        """(B, M, M) of (B, P): the value of the pair (i, j) at [i, j] and [j, i], zeros on the diagonal."""
        columns = dict(zip(self.pairs, of_pairs.unbind(1), strict=True))
        none = torch.zeros_like(of_pairs[:, 0])
        modalities = range(self.modalities)
        cells = [columns.get((min(i, j), max(i, j)), none) for i in modalities for j in modalities]
        return torch.stack(cells, dim=1).view(-1, self.modalities, self.modalities)

    def _sets_of_others(self, m: int) -> list[list[int]]:
        """Every set of modalities other than m; set number s holds the c-th of the others if bit c of s is set."""
        others = self._others(m)
        return [[j for c, j in enumerate(others) if s >> c & 1] for s in range(2 ** len(others))]

    @staticmethod
    def _for_decision(values: Tensor) -> Tensor:
        """ρ with its undefined values, which are exactly 0, below every real correlation."""
        return values.where(values != 0, _UNDEFINED)

    def _number_of_set(self, comparable: Tensor) -> Tensor:
        """(B, M) the number of the set of comparable others."""
        number = torch.zeros_like(comparable[:, 0], dtype=torch.int64)
        for m in range(self.modalities):
            for c, j in enumerate(self._others(m)):
                number[:, m].add_(comparable[:, m, j], alpha=1 << c)
        return number

    def _others(self, m: int) -> list[int]:
        return [j for j in range(self.modalities) if j != m]

    def _reduce(self, rank: Tensor, used: Tensor) -> Tensor:
        """(B, M), the largest (or smallest) of the ranks used (B, M, M) of each modality; 1 where none is."""
        if self.config.rule == "all":
            return rank.where(used, -1.0).amax(dim=2).where(used.any(dim=2), 1.0)
        return rank.where(used, 1.0).amin(dim=2)


class PairLikelihood(PairCorrelation):
    """The log likelihood ratio of "these two belong together" of each pair; low is odd, and ranked as ρ is."""

    name = "likelihood"
    prefix = "likelihood_"
    fewest_components = 1

    @staticmethod
    def _for_decision(values: Tensor) -> Tensor:
        return values


class Energy(ConformalStatistic):
    """The energy of each modality; high and low are odd.

    Its tables are ``energy_scores`` (M, n), ascending, and ``energy_count`` (M,), the entries of each row in use.
    """

    name = "energy"
    tables = ("energy_scores", "energy_count")

    def is_measured(self, available: Tensor) -> Tensor:
        """Return ``available``: each modality has its own energy."""
        return available

    def calibrate(self, values: Tensor, available: Tensor, projections: CheckProjections) -> dict[str, Tensor]:
        """Return the sorted energies of each modality."""
        scores, count = sort_columns(values, available)
        return {"energy_scores": scores, "energy_count": count}

    def is_low(self, values: Tensor, tables: Tables) -> Tensor:
        """Return (B, M) bool, whether an energy is below the median of the calibration samples."""
        middle = tables["energy_count"].sub(1).clamp(min=0).div(2, rounding_mode="floor")
        return values < tables["energy_scores"].gather(1, middle[:, None])[:, 0]

    def p_value(self, values: Tensor, available: Tensor, tables: Tables) -> Tensor:
        """Return (B, M), twice the share of calibration samples with at least half, or at most twice, the energy.

        The smaller of the two shares counts. Beyond the last calibration sample a share goes on falling, from 1/(n+1),
        with the ratio of the energies.
        """
        columns = []
        for value, scores, count in zip(values.unbind(1), tables["energy_scores"], tables["energy_count"], strict=True):
            half, twice = value / LEVEL_TOLERANCE, value * LEVEL_TOLERANCE
            # Gathered: as a subscript the number would be read by the host, which would wait for the device.
            largest, smallest = scores.gather(0, (count - 1).clamp(min=0).view(1)), scores[0]
            above = count - count_below(scores, half)
            below = count_below(scores, twice, inclusive=True)
            high = above + torch.where(half > largest, largest / half, 1.0)
            low = below + torch.where(twice < smallest, twice / smallest, 1.0)
            p_value = (2.0 * torch.minimum(high, low) / (1 + count)).clamp(max=1.0)
            columns.append(p_value.where(count > 0, 1.0))
        return torch.stack(columns, dim=1)


def sort_columns(values: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """Return each column's used values ascending, as a row padded with inf at its end; and their number."""
    return values.where(used, torch.inf).sort(dim=0).values.T.contiguous(), used.sum(dim=0)


def count_below(known: Tensor, values: Tensor, *, inclusive: bool = False) -> Tensor:
    """Return for each of ``values`` (..., Q) how many entries of ``known`` (..., n), ascending, are below it.

    With ``inclusive``, entries equal to the value count too.
    """
    if not torch.compiler.is_compiling():
        return torch.searchsorted(known, values.contiguous(), right=inclusive)
    # Bisection by torch's own operations, which a compiler fuses, and which ONNX has.
    size = known.shape[-1]
    count = torch.zeros_like(values, dtype=torch.int64)
    for bit in reversed(range(size.bit_length())):
        more = count + (1 << bit)
        last = known.gather(-1, (more - 1).clamp(max=size - 1))
        are_below = last <= values if inclusive else last < values
        count = torch.where(are_below & (more <= size), more, count)
    return count
