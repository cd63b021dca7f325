"""The statistics of the modality check: arguments are checked here, and then computed.

Dimension legend: M modalities, B samples, d_m features of modality m, P pairs of modalities, k canonical components.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from m3er_fast.functional._autograd import without_autocast
from m3er_fast.functional._dispatch import choose
from m3er_fast.operands import CheckProjections, CheckStatistics


def check_statistics(
    features: Sequence[Tensor], projections: CheckProjections, *, backend: str = "auto"
) -> CheckStatistics:
    """Compute the statistics of utterance vectors that the modality check judges by.

    With the canonical coordinates u = H^i f_i and v = H^j f_j of a pair, and its canonical correlations s:

    correlation: ρ_ij = Pearson correlation of u and v, weighted, across the k components (Mittal et al. 2020, arXiv
    1911.05659); 0 where it is undefined because u or v does not vary.
    energy: mean squared whitened coordinate of f_m; 1 on average over the data that the check was fitted to.
    likelihood: log p(u, v) - log p(u) - log p(v) under the fitted Gaussian, the most powerful test of "these two belong
    together" for Gaussian data (Neyman and Pearson 1933), of coordinates that are scaled to a mean square of 1 over the
    components, because recordings differ in level:

        Σ_c -½ log(1 - s_c²) - (s_c² u_c² - 2 s_c u_c v_c + s_c² v_c²) / (2 (1 - s_c²))

    Args:
        features: M tensors (B, d_m), the utterance vectors.
        projections: ``ModalityCheck.projections_``.
        backend: "auto", "torch" or "triton".

    Returns:
        correlation (B, P) with pairs ordered (0, 1), (0, 2), ..., (1, 2), ..., energy (B, M) and likelihood (B, P).

    Raises:
        ValueError: naming the modality whose shape does not fit the projections.
        BackendUnavailableError: if the backend asked for does not work here.

    Example:
        >>> x, y = torch.randn(99, 4), torch.randn(99, 3)
        >>> check = ModalityCheck({"text": 4, "audio": 3}).fit({"text": x, "audio": y})
        >>> statistics = check_statistics([x, y], check.projections_)
        >>> statistics.correlation.shape, statistics.energy.shape
        (torch.Size([99, 1]), torch.Size([99, 2]))
    """
    _check_features(features, projections)
    return compute_check_statistics(features, projections, backend=backend)


def gate_statistics(
    features: Sequence[Tensor], projections: CheckProjections, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Compute the correlation and the energy alone: the first form of :func:`check_statistics`, for its callers."""
    statistics = check_statistics(features, projections, backend=backend)
    return statistics.correlation, statistics.energy


def compute_check_statistics(
    features: Sequence[Tensor], projections: CheckProjections, *, backend: str = "auto"
) -> CheckStatistics:
    """:func:`check_statistics` of checked arguments."""
    first = features[0]
    compute = choose("check_statistics", backend, first, features, projections).load()
    with without_autocast(first.device):  # which would round the projections to 8 bits
        statistics: CheckStatistics = compute(features, projections)
    return statistics


def _check_features(features: Sequence[Tensor], projections: CheckProjections) -> None:
    if len(features) != len(projections.center):
        raise ValueError(f"features: got {len(features)} modalities, wanted {len(projections.center)}")
    if not features:
        raise ValueError("features is empty: wanted at least one modality")
    first = features[0]
    for m, (x, center) in enumerate(zip(features, projections.center, strict=True)):
        if x.ndim != 2 or x.shape[1] != center.shape[0] or x.shape[0] != first.shape[0]:
            raise ValueError(f"features[{m}] has shape {tuple(x.shape)}, wanted ({first.shape[0]}, {center.shape[0]})")
        if not x.is_floating_point() or x.dtype != first.dtype:
            raise ValueError(f"features[{m}] is {x.dtype}, wanted floating, and the same for every modality")
        if x.device != center.device or x.device != first.device:
            raise ValueError(f"features[{m}] is on {x.device}, wanted {center.device}, where the projections are")
