"""The operations of M3ER as functions: arguments are checked here, then a kernel or the reference computes.

Every function takes ``backend`` (or ``engine``): "auto" chooses by the tensors' device and type, and an explicit name
is an order: it works or raises :class:`BackendUnavailableError`, it never falls back to something else. "torch" is the
plain PyTorch of ``reference`` on any device; "triton" the fused kernel, for float16, bfloat16 and float32 on CUDA.
Fused kernels exist for all but the neighbour search: "auto" means the kernel on CUDA, ``cpu``, ``cpu_lstsq`` or
``cpu_scan`` on the CPU, and ``reference`` for whatever is left, such as float64 on CUDA.

Dimension legend: M modalities, B samples, T time steps, C classes, d_m features of modality m, P pairs of modalities,
Q queries, n bank rows, K neighbours, h hidden size, u memory size.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from m3er_fast import autograd, cpu, cpu_lstsq, cpu_scan, neighbors, reference
from m3er_fast.reference import (
    Activation,
    GateDecision,
    GateProjections,
    GateThresholds,
    MemoryScanWeights,
    Reduction,
    Variant,
    upcast,
)
from m3er_fast.scan_weights import tensors_of

__all__ = [
    "BackendUnavailableError",
    "GateDecision",
    "GateProjections",
    "GateThresholds",
    "MemoryScanWeights",
    "class_costs",
    "effective_modalities",
    "fusion_loss",
    "gate_statistics",
    "local_least_squares",
    "memory_scan",
    "nearest_neighbors",
]


class BackendUnavailableError(RuntimeError):
    """An implementation was asked for by name and does not work here."""


def fusion_loss(
    logits: Tensor,
    target: Tensor,
    *,
    variant: Variant = "m3er",
    beta: float = 1.0,
    detach_weight: bool = True,
    activation: Activation = "softmax",
    class_weight: Tensor | None = None,
    modality_weight: Tensor | None = None,
    available: Tensor | None = None,
    margin: float | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    backend: str = "auto",
) -> Tensor:
    r"""Multiplicative fusion loss of several modalities' classifiers.

    With p_m the probability that modality m gives a class y, the class costs

        c(y) = -Σ_m v_m w_m(y) log p_m(y),    γ = β / (M_b - 1),

        w_m = Π_{j≠m} (1 - p_j)^γ   "original"     Liu et al. 2018 (arXiv 1805.11730)
        w_m = p_m^γ                 "m3er"         Mittal et al. 2020 (arXiv 1911.05659), the unbound index read as m
        w_m = Π_{j≠m} p_j^γ         "m3er_cross"   the same formula, its index read as every other modality

    where M_b counts the modalities available to the sample (M_b = 1: w = 1), and the loss is Σ_y t_y c(y) for a label
    or a distribution t. With ``activation="sigmoid"`` the C outputs are yes/no questions, each with the loss
    t·c(yes) + (1 - t)·c(no), where every answer has weights of its own probability. All is computed in log space:
    costs and gradients are finite for every finite logit.

    Args:
        logits: (M, B, C), float16, bfloat16, float32 or float64; half precision is computed in float32.
        target: (B,) integer labels, or (B, C): a floating distribution over classes ("softmax"), or answers in 0..1
            ("sigmoid"; integers may hold ``ignore_index``). A label under "sigmoid" answers yes to its own question
            and no to the others.
        variant: which weight w_m.
        beta: β ≥ 0, how strongly the weights tell modalities apart; 0 makes every weight 1.
        detach_weight: stop gradients at w, as Liu's authors do. Without it -p^γ log p falls as p falls below
            e^(-1/γ), so that a model starting there is trained away from the truth.
        activation: how logits become probabilities: "softmax" over the classes or an elementwise "sigmoid".
        class_weight: (C,) factors of the classes' costs.
        modality_weight: (M,) factors v_m of the modalities' terms.
        available: (B, M) bool, the modalities that take part; None for all. A sample without any has loss 0.
        margin: Liu's boosted training: a sample (or question) has no loss while c(y) + margin < c(y') for all
            y' ≠ y. For a distribution y is its likeliest class.
        ignore_index: integer target without a loss.
        reduction: "none" gives (B,) for "softmax" and (B, C) for "sigmoid"; "sum" adds these; "mean" divides the sum
            as torch's losses do: for labels by the class weights of the labels that count, for distributions by B,
            for questions by the number of questions that count. With nothing to count the mean is 0.
        backend: "auto", "torch" or "triton".

    Returns:
        The loss, in at least float32, differentiable in ``logits``.

    Raises:
        ValueError: naming the argument, what came and what was wanted. Label values are looked at on the CPU only,
            where that needs no synchronisation, or everywhere with ``M3ER_DEBUG=1`` in the environment. Unseen, a
            label out of range makes the kernel's loss NaN.
        BackendUnavailableError: if the backend asked for does not work here.

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0]], [[0.0, 0.0]]])  # two modalities, one sample, two classes
        >>> fusion_loss(logits, torch.tensor([0])).item()  # -p log p of either: 0.111792... + 0.346573...
        0.4583...
    """
    _check_logits(logits)
    modalities, batch, classes = logits.shape
    _check_choice("variant", variant, Variant)
    _check_choice("activation", activation, Activation)
    _check_choice("reduction", reduction, Reduction)
    _check_number("beta", beta)
    if margin is not None:
        _check_number("margin", margin)
    _check_device("the logits", logits, target=target)
    target = _checked_target(target, batch, classes, activation, ignore_index)
    _check_loss_weights(logits, class_weight=class_weight, modality_weight=modality_weight, available=available)
    settings: dict[str, Any] = {
        "variant": variant,
        "beta": beta,
        "detach_weight": detach_weight,
        "class_weight": class_weight,
        "modality_weight": modality_weight,
        "available": available,
        "activation": activation,
        "margin": margin,
        "ignore_index": ignore_index,
        "reduction": reduction,
    }
    beyond = _beyond_fast_paths(logits, target, class_weight, modality_weight)
    plain_labels = margin is None and activation == "softmax" and target.ndim == 1
    if backend == "auto" and _on_cpu(logits) and plain_labels and beyond is None:
        return autograd.fusion_loss(cpu, logits, target, **settings)
    if _uses_triton("fusion_loss", backend, logits, modalities, beyond):
        from m3er_fast.kernels import fusion_loss as kernel

        if torch.compiler.is_compiling():
            return kernel.fusion_loss(logits, target, **settings)
        return autograd.fusion_loss(kernel, logits, target, **settings)
    return reference.fusion_loss(logits, target, **settings)


def class_costs(
    logits: Tensor,
    *,
    variant: Variant = "original",
    beta: float = 1.0,
    modality_weight: Tensor | None = None,
    available: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cost c(y) of every class, whose argmin is the decision rule of Liu et al. 2018 (arXiv 1805.11730).

    Formula and arguments are those of :func:`fusion_loss` with softmax probabilities.

    Returns:
        (B, C) costs, in at least float32.

    Raises:
        ValueError: for bad arguments, and for any variant but "original": in the others a class that every modality
            calls impossible costs 0, less than the true one, so that their argmin decides nothing.
        BackendUnavailableError: if the backend asked for does not work here.
    """
    _check_logits(logits)
    _check_choice("variant", variant, Variant)
    if variant != "original":
        raise ValueError(
            f"variant {variant!r} has no decision rule: an impossible class costs 0 in it; "
            "class_costs is defined for 'original', and predictions come from the fused head's probabilities"
        )
    _check_number("beta", beta)
    _check_loss_weights(logits, class_weight=None, modality_weight=modality_weight, available=available)
    if _uses_triton("class_costs", backend, logits, logits.shape[0], _beyond_fast_paths(logits, modality_weight)):
        from m3er_fast.kernels import fusion_loss as kernel

        return kernel.class_costs(logits, beta=beta, modality_weight=modality_weight, available=available)
    return reference.class_costs(logits, beta=beta, modality_weight=modality_weight, available=available)


def gate_statistics(
    features: Sequence[Tensor], projections: GateProjections, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The two statistics of the modality check.

    correlation: ρ_ij = Pearson correlation, across the k canonical components, of u = H^i f_i and v = H^j f_j
    (Mittal et al. 2020, arXiv 1911.05659); 0 where it is undefined because u or v does not vary.
    energy: mean squared whitened coordinate of f_m; 1 on average over the data the check was fitted to.

    Args:
        features: M tensors (B, d_m), the utterance vectors.
        projections: ``ModalityCheck.projections_``, with all constants folded in.
        backend: "auto", "torch" or "triton".

    Returns:
        correlation (B, P) with pairs ordered (0, 1), (0, 2), ..., (1, 2), ..., and energy (B, M).

    Raises:
        ValueError: naming the modality whose shape does not fit the projections.
        BackendUnavailableError: if the backend asked for does not work here.
    """
    return _gate("gate_statistics", features, projections, None, None, "all", backend)[1:]


def effective_modalities(
    features: Sequence[Tensor],
    projections: GateProjections,
    thresholds: GateThresholds,
    *,
    available: Tensor | None = None,
    rule: Literal["all", "any"] = "all",
    backend: str = "auto",
) -> GateDecision:
    """Which modalities pass fixed thresholds: the check of Mittal et al. 2020 (arXiv 1911.05659) with an energy gate.

    A modality is trusted if it is available and low_m ≤ energy_m ≤ high_m. It is effective if it is trusted and
    ρ_mj ≥ τ_mj against some other trusted modality j (rule "all": ineffectual only if it fails against all of them),
    or against each (rule "any"); where there is no other to compare with, being trusted is enough. An undefined ρ
    reaches no threshold. ``ModalityCheck`` calibrates instead, and tells p-values.

    Args:
        features: M tensors (B, d_m), the utterance vectors.
        projections: ``ModalityCheck.projections_``.
        thresholds: τ (P,), low (M,) and high (M,), where the features are.
        available: (B, M) bool; None for all.
        rule: "all" or "any".
        backend: "auto", "torch" or "triton".

    Returns:
        The mask (B, M) and the two statistics of :func:`gate_statistics`.

    Raises:
        ValueError: naming the argument, what came and what was wanted.
        BackendUnavailableError: if the backend asked for does not work here.

    Example:
        >>> x, y = torch.randn(99, 4), torch.randn(99, 3)
        >>> check = ModalityCheck({"text": 4, "audio": 3}).fit({"text": x, "audio": y})
        >>> limits = GateThresholds(torch.tensor([0.0]), torch.tensor([0.1, 0.1]), torch.tensor([9.0, 9.0]))
        >>> effective_modalities([x, y], check.projections_, limits).effective.shape
        torch.Size([99, 2])
    """
    modalities = len(projections.center)
    for name, size in (("correlation", len(projections.left)), ("energy_low", modalities), ("energy_high", modalities)):
        value = getattr(thresholds, name)
        _check_vector(f"thresholds.{name}", value, size)
        if value.device.type == "cpu" and bool(value.isnan().any()):
            raise ValueError(f"thresholds.{name} must not be NaN, got {value.tolist()}")
    if rule not in ("all", "any"):
        raise ValueError(f"rule must be 'all' or 'any', got {rule!r}")
    return GateDecision(*_gate("effective_modalities", features, projections, thresholds, available, rule, backend))


def _gate(
    op: str,
    features: Sequence[Tensor],
    projections: GateProjections,
    thresholds: GateThresholds | None,
    available: Tensor | None,
    rule: Literal["all", "any"],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask, correlation and energy; the mask means nothing without thresholds."""
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
    _check_mask(available, first.shape[0], len(features))
    _check_device("the features", first, available=available)
    if thresholds is not None:
        _check_device("the features", first, **{f"thresholds.{name}": x for name, x in thresholds._asdict().items()})
    beyond = _beyond_fast_paths(*features)
    if torch.is_grad_enabled() and any(x.requires_grad for x in features):
        beyond = "it has no gradient: detach the features or use 'torch'"
    elif any(matrix.shape[0] > _MOST_KERNEL_COMPONENTS for matrix in projections.left):
        beyond = f"it takes up to {_MOST_KERNEL_COMPONENTS} components"
    with torch.autocast(first.device.type, enabled=False):  # which would round the projections to 8 bits
        if _uses_triton(op, backend, first, len(features), beyond):
            from m3er_fast.kernels.correlation_gate import correlation_gate

            correlation, energy, effective = correlation_gate(
                features,
                *projections,
                thresholds=None if thresholds is None else torch.cat(thresholds),
                available=available,
                any_rule=rule == "any",
            )
            return effective, correlation, energy
        on_cpu = backend == "auto" and _on_cpu(first) and beyond is None
        implementation = cpu if on_cpu else reference
        correlation, energy = implementation.gate_statistics(features, projections)
        if thresholds is None:
            return correlation.new_empty(0, dtype=torch.bool), correlation, energy
        effective = reference.effective_modalities(correlation, energy, thresholds, available, rule)
        return effective, correlation, energy


def nearest_neighbors(query: Tensor, bank: Tensor, k: int, *, engine: str = "auto") -> tuple[Tensor, Tensor]:
    """The k rows of ``bank`` nearest to each query in the L2 norm.

    Args:
        query: (Q, d). A query that is not finite has no neighbours: distances inf, indices 0..k-1.
        bank: (n, d), n ≥ 1, finite.
        k: how many; more than n gives n.
        engine: "torch" (exact, bounded memory), "faiss" (exact, float32), "faiss-ivf" or "faiss-hnsw" (approximate, on
            an index that this call builds), or "auto", which is "torch" for every size and device. On CUDA tensors
            "faiss" and "faiss-ivf" need a FAISS with GPU support; "faiss-hnsw" computes on the CPU.

    Returns:
        Squared distances (Q, min(k, n)), ascending, in at least float32, and row indices of the same shape, int64.
        "torch" is exact up to the rounding of the distances themselves, on the CPU; on other devices rows whose
        distances agree to float32's precision of ‖q - c‖², c the bank's middle, may stand in for each other. Its
        distances have gradients, of queries and bank; those of FAISS have none.

    Raises:
        ValueError: naming the argument and its shape.
        BackendUnavailableError: if faiss is asked for and does not work here.
    """
    _check_matrix("query", query)
    _check_matrix("bank", bank)
    if query.shape[1] != bank.shape[1]:
        raise ValueError(f"query has {query.shape[1]} features, but bank has {bank.shape[1]}")
    if not bank.shape[0]:
        raise ValueError("bank is empty: wanted at least one row")
    if bank.device.type == "cpu" and not _all_finite(bank):
        raise ValueError("bank must be finite, got NaN or inf in it")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be a positive int, got {k!r}")
    if engine not in neighbors.ENGINES:
        raise ValueError(f"engine must be one of {', '.join(map(repr, neighbors.ENGINES))}, got {engine!r}")
    return neighbor_index(bank, engine).search(query, min(k, bank.shape[0]))


def neighbor_index(
    bank: Tensor, engine: str, *, allowed: Tensor | None = None, memory_budget: int = neighbors.MEMORY_BUDGET
) -> neighbors.NeighborIndex:
    """A bank prepared for many searches, of checked arguments; see :func:`m3er_fast.neighbors.build_index`.

    Raises:
        BackendUnavailableError: if faiss is asked for and does not work here.
    """
    try:
        return neighbors.build_index(bank, engine, allowed=allowed, memory_budget=memory_budget)
    except neighbors.FaissUnavailableError as error:
        raise BackendUnavailableError(f"nearest_neighbors: engine {engine!r} does not work here: {error}") from error


@overload
def local_least_squares(
    query: Tensor,
    bank: Tensor,
    targets: Tensor,
    neighbors: Tensor,
    *,
    ridge: float = ...,
    affine: bool = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def local_least_squares(
    query: Tensor,
    bank: Tensor,
    targets: Sequence[Tensor],
    neighbors: Tensor,
    *,
    ridge: float = ...,
    affine: bool = ...,
    backend: str = ...,
) -> tuple[list[Tensor], Tensor]: ...


def local_least_squares(
    query: Tensor,
    bank: Tensor,
    targets: Tensor | Sequence[Tensor],
    neighbors: Tensor,
    *,
    ridge: float = 1e-3,
    affine: bool = False,
    backend: str = "auto",
) -> tuple[Tensor | list[Tensor], Tensor]:
    """Proxies: each query rebuilt from its neighbours, and the same combination of their partners' rows.

    a = argmin_a ‖f - Σ_r a_r v_r‖² + λ·tr(G)/K·‖a‖², G = (v_r · v_s) over the K neighbours; proxy = Σ_r a_r w_r
    (the relaxed linear map of Mittal et al. 2020, arXiv 1911.05659; ``affine=True`` adds Σ_r a_r = 1, the weights of
    locally linear embedding). Solved in float64, by the kernel in float32.

    Args:
        query: (Q, d), the vectors f. One that is not finite gets coefficients of zero.
        bank: (n, d), the rows v_r.
        targets: (n, e), the rows w_r paired with them; or several such tensors, to which the same coefficients go.
        neighbors: (Q, K) int64 rows of the bank, K ≥ 1, as :func:`nearest_neighbors` gives them.
        ridge: λ ≥ 0. A ridge of 0 gives the minimum of least norm, so that collinear or repeated neighbours are safe.
        affine: whether the coefficients of a query sum to 1.
        backend: "auto", "torch", "triton" or "cupy". The Triton kernel takes up to 64 neighbours and a ridge of at
            least 1e-4; "auto" goes to plain PyTorch for the rest. CuPy, for CUDA tensors, takes any of both.

    Returns:
        proxies (Q, e), a list of them for several targets, and coefficients (Q, K), in at least float32.

    Raises:
        ValueError: naming the argument and its shape.
        BackendUnavailableError: if the backend asked for does not work here.
    """
    several = not isinstance(targets, Tensor)
    paired: list[Tensor] = [targets] if isinstance(targets, Tensor) else list(targets)
    _check_local_least_squares(query, bank, paired, neighbors)
    _check_number("ridge", ridge)
    if backend not in ("auto", "torch", "triton", "cupy"):
        raise ValueError(f"backend must be one of 'auto', 'torch', 'triton', 'cupy', got {backend!r}")
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (query, bank, *paired))
    unsupported = None if differentiable else _beyond_fast_paths(query, bank, *paired)
    beyond = _beyond_local_lstsq(bank, paired, neighbors, ridge, differentiable) or unsupported
    if backend == "cupy" and differentiable:
        raise BackendUnavailableError(
            "local_least_squares: backend 'cupy' has no gradient: detach the tensors or use 'torch'"
        )
    if backend == "cupy":
        proxies, coefficients = _by_cupy(query, bank, paired, neighbors, ridge, affine)
    elif _uses_triton("local_least_squares", backend, query, 1, beyond):
        from m3er_fast.kernels.local_lstsq import local_lstsq

        proxies, coefficients = local_lstsq(query, bank, paired, neighbors, ridge=ridge, affine=affine)
    elif backend == "auto" and not differentiable and unsupported is None and _on_cpu(query):
        proxies, coefficients = cpu_lstsq.local_least_squares(
            query, bank, paired, neighbors, ridge=ridge, affine=affine
        )
    else:
        joined = paired[0] if len(paired) == 1 else torch.cat([upcast(target) for target in paired], dim=1)
        together, coefficients = reference.local_least_squares(
            query, bank, joined, neighbors, ridge=ridge, affine=affine
        )
        proxies = list(torch.split(together, [target.shape[1] for target in paired], dim=1))
    return (proxies if several else proxies[0]), coefficients


def _check_local_least_squares(query: Tensor, bank: Tensor, targets: Sequence[Tensor], neighbors: Tensor) -> None:
    if not targets:
        raise ValueError("targets is empty: wanted a tensor, or one or more of them")
    names = ["targets"] if len(targets) == 1 else [f"targets[{t}]" for t in range(len(targets))]
    for name, value in (("query", query), ("bank", bank), *zip(names, targets, strict=True)):
        _check_matrix(name, value)
    if query.shape[1] != bank.shape[1]:
        raise ValueError(f"query has {query.shape[1]} features, but bank has {bank.shape[1]}")
    for name, target in zip(names, targets, strict=True):
        if target.shape[0] != bank.shape[0]:
            raise ValueError(f"{name} has {target.shape[0]} rows, but bank has {bank.shape[0]}: they must be paired")
    if neighbors.ndim != 2 or neighbors.shape[0] != query.shape[0] or not neighbors.shape[1]:
        raise ValueError(f"neighbors has shape {tuple(neighbors.shape)}, wanted ({query.shape[0]}, K) with K ≥ 1")
    if neighbors.dtype != torch.int64:
        raise ValueError(f"neighbors must be int64, got {neighbors.dtype}")
    if neighbors.numel() and neighbors.device.type == "cpu":
        low, high = map(int, neighbors.aminmax())
        if low < 0 or high >= bank.shape[0]:
            raise ValueError(f"neighbors must lie in 0..{bank.shape[0] - 1}, got values from {low} to {high}")


def _beyond_local_lstsq(
    bank: Tensor, targets: Sequence[Tensor], neighbors: Tensor, ridge: float, differentiable: bool
) -> str | None:
    """Why the Triton kernel cannot solve, or None if nothing speaks against it but where it is to run."""
    if differentiable:
        return "it has no gradient: detach the tensors or use 'torch'"
    if any(x.dtype not in _KERNEL_DTYPES for x in (bank, *targets)):
        return f"it takes banks in float16, bfloat16 and float32, got {[x.dtype for x in (bank, *targets)]}"
    if len({target.dtype for target in targets}) > 1:
        return f"it takes targets of one dtype, got {[target.dtype for target in targets]}"
    if neighbors.shape[1] > _MOST_KERNEL_NEIGHBORS:
        return f"it takes up to {_MOST_KERNEL_NEIGHBORS} neighbours, got {neighbors.shape[1]}"
    if ridge < _SMALLEST_KERNEL_RIDGE:
        return f"in float32 it needs a ridge of at least {_SMALLEST_KERNEL_RIDGE}, got {ridge}"
    return None


def _by_cupy(
    query: Tensor, bank: Tensor, targets: Sequence[Tensor], neighbors: Tensor, ridge: float, affine: bool
) -> tuple[list[Tensor], Tensor]:
    prefix = "local_least_squares: backend 'cupy' does not work here: "
    if importlib.util.find_spec("cupy") is None:
        raise BackendUnavailableError(f"{prefix}cupy is not installed: pip install 'm3er-fast[gpu]'")
    if not query.is_cuda:
        raise BackendUnavailableError(f"{prefix}it computes on CUDA tensors, got one on {query.device}")
    try:
        from m3er_fast.kernels.cupy_lstsq import cupy_lstsq
    except (ImportError, RuntimeError, OSError) as error:
        raise BackendUnavailableError(f"{prefix}cupy is installed but does not load: {error}") from error
    result: tuple[list[Tensor], Tensor] = cupy_lstsq(query, bank, targets, neighbors, ridge=ridge, affine=affine)
    return result


def memory_scan(
    features: Sequence[Tensor],
    lengths: Tensor,
    weights: MemoryScanWeights,
    *,
    dropout: float = 0.0,
    recompute: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The recurrent core: one LSTM a modality, attention over their cells, and a gated memory.

    For t = 1..T, with c the LSTM cells of all modalities side by side:

        z_t = [c_{t-1} ; c_t],  r_t = softmax(W2 relu(W1 z_t)) * z_t
        û_t = tanh(W4 relu(W3 r_t))
        γ1, γ2 = sigmoid(W6 relu(W5 [r_t ; u])), sigmoid(W8 relu(W7 [r_t ; u]))
        u = γ1 * u + γ2 * û_t

    With ``weights.feedback`` the slice of r_{t-1} that belongs to modality m (old and new cell part), through a linear
    map, is added to m's LSTM gates at t; without it this is the memory fusion network of Zadeh et al. 2018
    (arXiv 1802.00927). A sample's states freeze after its last valid step; all states start at zero.

    Args:
        features: M tensors (B, T, d_m).
        lengths: (B,) int64 in 0..T.
        weights: see :class:`MemoryScanWeights`.
        dropout: probability of dropping a unit after each hidden relu, in 0..1 (exclusive); 0 for inference. Under
            one seed the kernel drops other units than the reference, and as many.
        recompute: in training, how many samples' activations are held at a time: so many samples are scanned, then
            the next, and the way back scans them again, one forward pass more for less memory. None holds them all.
            Under one seed other units are dropped than without. Transforms of torch.func hold them all.
        backend: "auto" (on CUDA the kernel, on the CPU ``cpu_scan``, each where it takes the arguments, else "torch"),
            "torch" or "triton". The kernel takes float16, bfloat16 and float32, all sizes but d_m and that of û's
            inner layer multiples of 16, and both γ's inner layers of one size.

    Returns:
        The last hidden states (M, B, h) and the memory (B, u), both zero for a sample without frames. Differentiable
        in features and weights; second derivatives are the reference's. The kernel has none with dropout.

    Raises:
        ValueError: naming the argument and its shape.
        BackendUnavailableError: if the backend asked for does not work here.
    """
    if len(features) != len(weights.input):
        raise ValueError(f"features: got {len(features)} modalities, wanted {len(weights.input)}")
    frames = features[0].shape[:2]
    for m, (x, weight) in enumerate(zip(features, weights.input, strict=True)):
        wanted = (*frames, weight.shape[1])
        if x.ndim != 3 or x.shape != wanted:
            raise ValueError(f"features[{m}] has shape {tuple(x.shape)}, wanted {wanted}")
    if lengths.shape != frames[:1]:
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}, wanted ({frames[0]},)")
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths must be integers, got {lengths.dtype}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
    if recompute is not None and (isinstance(recompute, bool) or not isinstance(recompute, int) or recompute < 1):
        raise ValueError(f"recompute must be None or a positive int, got {recompute!r}")
    tensors = [x for x in (*features, *tensors_of(weights)) if x is not None]
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if recompute is None or not trains or not len(lengths) or _in_transform():
        return _memory_scan(features, lengths, weights, tensors, dropout, backend)

    def scan(start: int) -> tuple[Tensor, Tensor]:
        part = slice(start, start + recompute)
        return _memory_scan([x[part] for x in features], lengths[part], weights, tensors, dropout, backend)

    parts = [
        # Without dropout nothing is drawn, and a CUDA graph can record it.
        checkpoint(scan, start, use_reentrant=False, preserve_rng_state=dropout > 0.0)
        for start in range(0, len(lengths), recompute)
    ]
    return torch.cat([hidden for hidden, _ in parts], 1), torch.cat([memory for _, memory in parts])


def _memory_scan(
    features: Sequence[Tensor],
    lengths: Tensor,
    weights: MemoryScanWeights,
    tensors: Sequence[Tensor],
    dropout: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    # Looking at every tensor takes a tenth of a scan of one step: only where the kernel may run.
    may_run = backend != "auto" or features[0].is_cuda
    beyond = _beyond_memory_scan(features, weights, tensors) if may_run else None
    if _uses_triton("memory_scan", backend, features[0], len(features), beyond):
        from m3er_fast.kernels import memory_scan as kernels

        return kernels.memory_scan(features, lengths, weights, dropout=dropout)
    if backend == "auto" and _on_cpu(features[0]) and not _in_transform() and not _any_tangent(tensors):
        scan = cpu_scan.memory_scan if cpu_scan.takes(features, weights) else cpu_scan.step_by_step
        return scan(features, lengths, weights, dropout=dropout)
    return reference.memory_scan(features, lengths, weights, dropout=dropout)


def _beyond_memory_scan(
    features: Sequence[Tensor], weights: MemoryScanWeights, tensors: Sequence[Tensor]
) -> str | None:
    """Why the Triton kernels cannot scan, or None if nothing speaks against it but where they are to run."""
    if not torch.compiler.is_compiling():
        if _in_transform():
            return "it knows no transforms of torch.func"
        if _any_tangent(tensors):
            return "it has no forward-mode derivative"
    dtypes = {x.dtype for x in tensors}
    if len(dtypes) > 1:
        return f"it takes features and weights of one type, got {', '.join(sorted(map(str, dtypes)))}"
    if weights.retain[0].shape != weights.update[0].shape:
        return f"it takes γ of one size, got {weights.retain[0].shape[0]} and {weights.update[0].shape[0]}"
    sizes = {
        "hidden": weights.recurrent.shape[2],
        "memory": weights.candidate[2].shape[0],
        "attention": weights.attention[0].shape[0],
        "γ": weights.retain[0].shape[0],
    }
    for name, size in sizes.items():
        if size % 16 or not size:
            return f"it takes sizes that are multiples of 16, got {size} for {name}"
    return None


def _all_finite(matrix: Tensor) -> bool:
    """Whether a matrix holds no NaN or inf, in one pass: ``isfinite`` would write a mask as well."""
    low, high = matrix.aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))


# Looked for once: torch.compile does not trace the search.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MOST_KERNEL_NEIGHBORS = 64
# What float32 loses of a Gram matrix of 64 neighbours is some 1e-6 of its trace: a smaller ridge would not stand out.
_SMALLEST_KERNEL_RIDGE = 1e-4
_MOST_KERNEL_MODALITIES = 8
# Two projections wider than this do not fit into the registers of a program.
_MOST_KERNEL_COMPONENTS = 128


def _beyond_fast_paths(tensor: Tensor, *weights: Tensor | None) -> str | None:
    """What is asked of these tensors that only the reference, made of torch's own operations, can do."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in weights):
        return "it has a gradient of the logits only"
    if torch.compiler.is_compiling():
        return None
    if _in_transform():
        return "it knows no transforms of torch.func"
    if _any_tangent([x for x in (tensor, *weights) if x is not None]):
        return "it has no forward-mode derivative"
    return None


def _in_transform() -> bool:
    """Whether this runs inside a transform of torch.func, such as vmap, whose tensors have no memory of their own."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _any_tangent(tensors: Sequence[Tensor]) -> bool:
    """Whether forward-mode derivatives are asked for; outside of ``dual_level`` no tensor need be looked at."""
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)  # type: ignore[no-untyped-call]


def _uses_triton(op: str, backend: str, tensor: Tensor, modalities: int, beyond: str | None) -> bool:
    """Whether the Triton kernel computes; asked for by name, it does or this raises. ``beyond``: why it cannot."""
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend must be one of 'auto', 'torch', 'triton', got {backend!r}")
    if backend == "torch" or (backend == "auto" and not tensor.is_cuda):
        return False
    if beyond is not None:
        reason: str | None = beyond
    elif tensor.dtype not in _KERNEL_DTYPES:
        reason = f"it computes float16, bfloat16 and float32, got {tensor.dtype}"
    elif modalities > _MOST_KERNEL_MODALITIES:
        reason = f"it takes up to {_MOST_KERNEL_MODALITIES} modalities, got {modalities}"
    elif not _HAS_TRITON:
        reason = "triton is not installed: pip install triton (Linux only)"
    else:
        from m3er_fast.kernels import _launch

        reason = _launch.unavailable_reason(tensor)
    if reason is not None and backend == "triton":
        raise BackendUnavailableError(f"{op}: backend 'triton' does not work here: {reason}")
    return reason is None


def _on_cpu(tensor: Tensor) -> bool:
    """Whether the CPU path computes: inside torch.compile the reference does, which the compiler fuses itself."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_logits(logits: Tensor) -> None:
    if logits.ndim != 3 or not logits.shape[0] or not logits.shape[2] or not logits.is_floating_point():
        raise ValueError(
            f"logits must be floating of shape (M, B, C) with M, C ≥ 1, got {logits.dtype} of {tuple(logits.shape)}"
        )


def _checked_target(target: Tensor, batch: int, classes: int, activation: str, ignore_index: int) -> Tensor:
    """``target``, in int64 if it holds integers: small integer types wrap around when compared with ignore_index."""
    by_label = target.ndim == 1
    shape = (batch,) if by_label else (batch, classes)
    if target.shape != shape or target.is_complex():
        raise ValueError(f"target has shape {tuple(target.shape)}, wanted ({batch},) labels or ({batch}, {classes})")
    integral = not target.is_floating_point()
    if by_label and (not integral or target.dtype == torch.bool):
        raise ValueError(f"target of shape ({batch},) must hold integer labels, got {target.dtype}")
    if not by_label and integral and activation == "softmax":
        raise ValueError(f"target of shape ({batch}, {classes}) must be a floating distribution, got {target.dtype}")
    if integral:
        target = target.long()
    if torch.compiler.is_compiling() or _in_transform() or not target.numel():
        return target
    if target.device.type != "cpu" and os.environ.get("M3ER_DEBUG", "0") in ("", "0"):
        return target  # looking would wait for the device
    highest = classes - 1 if by_label else 1
    values = target[target != ignore_index] if integral else target
    if values.numel() and not bool(((values >= 0) & (values <= highest)).all()):
        ignored = f" or {ignore_index}" if integral else ""
        raise ValueError(
            f"target must lie in 0..{highest}{ignored}, got values from {values.min().item()} to {values.max().item()}"
        )
    return target


def _check_loss_weights(
    logits: Tensor, *, class_weight: Tensor | None, modality_weight: Tensor | None, available: Tensor | None
) -> None:
    modalities, batch, classes = logits.shape
    _check_vector("class_weight", class_weight, classes)
    _check_vector("modality_weight", modality_weight, modalities)
    _check_mask(available, batch, modalities)
    others = {"class_weight": class_weight, "modality_weight": modality_weight, "available": available}
    _check_device("the logits", logits, **others)


def _check_device(whose: str, tensor: Tensor, **others: Tensor | None) -> None:
    for name, value in others.items():
        if value is not None and value.device != tensor.device:
            raise ValueError(f"{name} is on {value.device}, wanted {tensor.device}, where {whose} are")


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(choices)))}, got {value!r}")


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < float("inf"):
        raise ValueError(f"{name} must be a finite number ≥ 0, got {value!r}")


def _check_vector(name: str, value: Tensor | None, size: int) -> None:
    if value is not None and value.shape != (size,):
        raise ValueError(f"{name} has shape {tuple(value.shape)}, wanted ({size},)")


def _check_mask(available: Tensor | None, batch: int, modalities: int) -> None:
    if available is not None and (available.shape != (batch, modalities) or available.dtype != torch.bool):
        raise ValueError(
            f"available must be bool of shape ({batch}, {modalities}), "
            f"got {available.dtype} of {tuple(available.shape)}"
        )


def _check_matrix(name: str, value: Tensor) -> None:
    if value.ndim != 2 or not value.shape[1] or not value.is_floating_point():
        raise ValueError(
            f"{name} must be a floating matrix with at least one column, "
            f"got {value.dtype} of shape {tuple(value.shape)}"
        )
