"""Every operation of M3ER in plain PyTorch: the definition, the CPU path, and the yardstick of every faster path.

The functions assume checked arguments (``functional`` checks them) and take any floating dtype; half precision is
computed in float32. Gradients are autograd's.

Dimension legend: M modalities, B samples, T time steps, C classes, d_m features of modality m, P pairs of modalities,
k canonical components, Q queries, n bank rows, K neighbours, h hidden size, u memory size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import combinations
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Variant = Literal["original", "m3er", "m3er_cross"]
Activation = Literal["softmax", "sigmoid"]
Reduction = Literal["none", "mean", "sum"]

# Below this ridge the normal equations lose the small singular values, even in float64; the SVD keeps them.
SMALLEST_CHOLESKY_RIDGE = 1e-8


def upcast(x: Tensor) -> Tensor:
    """``x`` in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def modality_pairs(modalities: int) -> list[tuple[int, int]]:
    """The unordered pairs in the order of every (B, P) result: (0, 1), (0, 2), ..., (1, 2), ..."""
    return list(combinations(range(modalities), 2))


# --- Multiplicative fusion loss (method step 4) ---


def log_probabilities(
    logits: Tensor, available: Tensor | None = None, activation: Activation = "softmax"
) -> tuple[Tensor, Tensor]:
    """Log p and log(1 - p) of every class, each to full relative precision as p tends to 0 or to 1.

    log(1 - exp(log p)) would lose its digits there. With s = Σ_{j≠top} exp(x_j - x_top), the likeliest class has
    log p = -log(1 + s) and 1 - p = s / (1 + s), whose logarithm is log s - log(1 + s) where p > 1/2; everywhere else
    p ≤ 1/2, and log1p(-p) is exact enough.

    Args:
        logits: (M, B, C).
        available: (B, M) bool or None; an unavailable modality is treated as logits of zero, whatever it holds.
        activation: "softmax" over the classes or an elementwise "sigmoid".

    Returns:
        Two (M, B, C) tensors, finite for finite logits.
    """
    if available is not None:
        logits = torch.where(available.T[:, :, None], logits, 0.0)
    # Costs of up to eight modalities, of differences of up to twice this, must still add up to a finite number.
    bound = torch.finfo(logits.dtype).max / 32
    logits = logits.clamp(-bound, bound)
    if activation == "sigmoid":
        return F.logsigmoid(logits), F.logsigmoid(-logits)
    if logits.shape[-1] == 1:  # the only class is certain: no cost, no gradient
        return logits * 0.0, logits * 0.0 - bound
    top_value, top = logits.max(dim=-1, keepdim=True)
    is_top = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, top, True)
    shifted = logits - top_value
    exponentials = shifted.exp()
    rest = exponentials.masked_fill(is_top, 0.0).sum(dim=-1, keepdim=True)
    log_total = rest.log1p()
    log_rest = shifted.masked_fill(is_top, -torch.inf).logsumexp(dim=-1, keepdim=True)
    likely = is_top & (rest < 1.0)  # p > 1/2
    p = exponentials.masked_fill(likely, 0.0) / (1.0 + rest)
    log_not_p = torch.where(likely, log_rest - log_total, torch.log1p(-p))
    return shifted - log_total, log_not_p


def fusion_costs(
    log_p: Tensor,
    log_not_p: Tensor,
    *,
    variant: Variant,
    beta: float,
    detach_weight: bool,
    modality_weight: Tensor | None,
    available: Tensor | None,
) -> Tensor:
    """Cost of every class: c(y) = -Σ_m v_m w_m(y) log p_m(y).

    The weight w_m is Π_{j≠m} (1 - p_j)^γ for "original" (Liu et al. 2018), p_m^γ for "m3er" and Π_{j≠m} p_j^γ for
    "m3er_cross"; γ = β / (M_b - 1), where M_b counts the modalities available to the sample, and w = 1 if M_b = 1.

    Args:
        log_p: (M, B, C), log p.
        log_not_p: (M, B, C), log(1 - p).
        variant: which weight.
        beta: β ≥ 0.
        detach_weight: whether gradients stop at w.
        modality_weight: (M,) factors v_m, or None for ones.
        available: (B, M) bool, or None for all available.

    Returns:
        (B, C) costs; 0 for a sample without modalities.
    """
    weight = fusion_weights(log_p, log_not_p, variant=variant, beta=beta, available=available)
    if detach_weight:
        weight = weight.detach()
    terms = weight * log_p if available is None else torch.where(available.T[:, :, None], weight * log_p, 0.0)
    return -(terms if modality_weight is None else modality_weight[:, None, None] * terms).sum(dim=0)


def fusion_weights(
    log_p: Tensor, log_not_p: Tensor, *, variant: Variant, beta: float, available: Tensor | None
) -> Tensor:
    """(M, B, C) weights w_m(y) of :func:`fusion_costs`, how far modality m is relied on for class y.

    A modality that is not available takes no part in the others' weights.
    """
    modalities, batch = log_p.shape[:2]
    if available is None:
        present = torch.ones((modalities, batch, 1), dtype=torch.bool, device=log_p.device)
    else:
        present = available.T[:, :, None]
    count = present.sum(dim=0, dtype=log_p.dtype)
    gamma = torch.where(count > 1, beta / (count - 1).clamp(min=1), 0.0)
    evidence = torch.where(present, log_not_p if variant == "original" else log_p, 0.0)
    if variant == "m3er":
        return (gamma * evidence).exp()
    # Summed anew for each modality: total minus own would cancel where one of them dominates.
    others = [sum((evidence[j] for j in range(modalities) if j != m), gamma * 0.0) for m in range(modalities)]
    return torch.stack([(gamma * log_weight).exp().expand(log_p.shape[1:]) for log_weight in others])


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
) -> Tensor:
    """Multiplicative fusion loss; :func:`m3er_fast.functional.fusion_loss` documents it."""
    log_p, log_not_p = log_probabilities(upcast(logits), available, activation)
    costs = partial(
        fusion_costs,
        variant=variant,
        beta=beta,
        detach_weight=detach_weight,
        modality_weight=None if modality_weight is None else modality_weight.to(log_p),
        available=available,
    )
    if class_weight is not None:
        class_weight = class_weight.to(log_p)
    if activation == "sigmoid":
        yes, no = costs(log_p, log_not_p), costs(log_not_p, log_p)
        loss, weight = _question_losses(yes, no, target, class_weight, margin, ignore_index)
    else:
        loss, weight = _label_losses(costs(log_p, log_not_p), target, class_weight, margin, ignore_index)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    # An empty or wholly ignored batch has the mean 0, not 0/0: one such batch must not poison a training run.
    total = weight.sum()
    # Divided before the sum, which would overflow where the mean does not.
    return (loss / torch.where(total > 0, total, 1.0)).sum()


def class_costs(
    logits: Tensor,
    *,
    beta: float = 1.0,
    modality_weight: Tensor | None = None,
    available: Tensor | None = None,
) -> Tensor:
    """Liu's cost of every class; :func:`m3er_fast.functional.class_costs` documents it."""
    log_p, log_not_p = log_probabilities(upcast(logits), available)
    return fusion_costs(
        log_p,
        log_not_p,
        variant="original",
        beta=beta,
        detach_weight=False,
        modality_weight=None if modality_weight is None else modality_weight.to(log_p),
        available=available,
    )


def _label_losses(
    cost: Tensor, target: Tensor, class_weight: Tensor | None, margin: float | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Loss and weight (B,) of a label or a distribution over classes: Σ_y t_y c(y)."""
    if target.is_floating_point():
        share = target.to(cost)
        active = _margin_active(cost, share.argmax(dim=1), margin)
        weighted = share if class_weight is None else share * class_weight
        return (weighted * cost).sum(dim=1) * active, torch.ones_like(active)
    kept = target != ignore_index
    label = torch.where(kept, target, 0)
    weight = kept.to(cost) if class_weight is None else kept * class_weight[label]
    own = torch.where(kept, cost.gather(1, label[:, None])[:, 0], 0.0)
    return own * weight * _margin_active(cost, label, margin), weight


def _question_losses(
    yes: Tensor, no: Tensor, target: Tensor, class_weight: Tensor | None, margin: float | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Loss and weight (B, C) of C yes/no questions: t·c(yes) + (1 - t)·c(no)."""
    if target.is_floating_point():
        kept, answer = torch.ones_like(yes, dtype=torch.bool), target
    else:
        kept = target != ignore_index
        answer = torch.where(kept, target, 0)
        if target.ndim == 1:  # the label answers yes to its own question and no to the others
            kept, answer = kept[:, None].expand(yes.shape), F.one_hot(answer, yes.shape[1])
    answer = answer.to(yes)
    loss = answer * yes + (1.0 - answer) * no
    if margin is not None:
        says_yes = answer >= 0.5
        right, wrong = torch.where(says_yes, yes, no), torch.where(says_yes, no, yes)
        loss = loss * ~(right.detach() + margin < wrong.detach())
    if class_weight is not None:
        loss = loss * class_weight
    # As in torch's binary cross entropy the mean divides by the number of questions, not by their class weights.
    return torch.where(kept, loss, 0.0), kept.to(yes)


def _margin_active(cost: Tensor, label: Tensor, margin: float | None) -> Tensor:
    """(B,) 1 where the sample still has something to learn, 0 where c(y) + margin < c(y') for all other y'."""
    if margin is None:
        return cost.new_ones(cost.shape[0])
    cost = cost.detach()
    own = cost.gather(1, label[:, None])
    best_other = cost.scatter(1, label[:, None], torch.inf).amin(dim=1, keepdim=True)
    return (~(own + margin < best_other))[:, 0].to(cost)


# --- Modality check (method step 1) ---


class GateProjections(NamedTuple):
    """The fitted matrices of a modality check, every constant folded in.

    A pair's projection holds H, the standardisation of its view, the component weights and the centring over the k
    components, so that Pearson's ρ over the components is the cosine of the two projected vectors.
    """

    center: list[Tensor]  # M of (d_m,), subtracted first: a large common offset would otherwise cancel late
    left: list[Tensor]  # P of (k_p, d_i)
    left_bias: list[Tensor]  # P of (k_p,)
    right: list[Tensor]  # P of (k_p, d_j)
    right_bias: list[Tensor]  # P of (k_p,)
    whitener: list[Tensor]  # M of (r_m, d_m)
    triangular: bool = False  # whether every whitener is upper triangular, as a check fits it: half the work


class GateThresholds(NamedTuple):
    """What a modality must reach to be effective."""

    correlation: Tensor  # (P,) least ρ of a pair
    energy_low: Tensor  # (M,) least energy
    energy_high: Tensor  # (M,) greatest energy


class GateDecision(NamedTuple):
    """Which modalities are effective, and the statistics that say so."""

    effective: Tensor  # (B, M) bool
    correlation: Tensor  # (B, P)
    energy: Tensor  # (B, M)


def gate_statistics(features: Sequence[Tensor], projections: GateProjections) -> tuple[Tensor, Tensor]:
    """Correlation per pair and energy per modality; :func:`m3er_fast.functional.gate_statistics` documents it."""
    centered = [upcast(x) - c.to(upcast(x)) for x, c in zip(features, projections.center, strict=True)]
    correlation = []
    for p, (i, j) in enumerate(modality_pairs(len(features))):
        x, y = centered[i], centered[j]
        u = F.linear(x, projections.left[p].to(x), projections.left_bias[p].to(x))
        v = F.linear(y, projections.right[p].to(y), projections.right_bias[p].to(y))
        u_norm, v_norm = u.norm(dim=1), v.norm(dim=1)
        cosine = (u / u_norm[:, None] * (v / v_norm[:, None])).sum(dim=1).clamp(-1.0, 1.0)
        defined = (u_norm > 0) & (v_norm > 0) & torch.isfinite(cosine)
        correlation.append(torch.where(defined, cosine, 0.0))
    energy = []
    for x, whitener in zip(centered, projections.whitener, strict=True):
        whitened = F.linear(x, whitener.to(x))
        largest = torch.finfo(x.dtype).max
        energy.append((whitened.square().sum(dim=1) / max(whitener.shape[0], 1)).nan_to_num(largest, largest))
    batch = centered[0].shape[0]
    stacked = torch.stack(correlation, dim=1) if correlation else centered[0].new_zeros((batch, 0))
    return stacked, torch.stack(energy, dim=1)


def effective_modalities(
    correlation: Tensor,
    energy: Tensor,
    thresholds: GateThresholds,
    available: Tensor | None,
    rule: Literal["all", "any"],
) -> Tensor:
    """(B, M) bool; :func:`m3er_fast.functional.effective_modalities` documents it."""
    trusted = (energy >= thresholds.energy_low) & (energy <= thresholds.energy_high)
    if available is not None:
        trusted = trusted & available
    # Exactly 0 means undefined, which passes no threshold.
    passes = (correlation >= thresholds.correlation) & (correlation != 0)
    compared = torch.zeros_like(energy, dtype=torch.int64)
    passed = torch.zeros_like(compared)
    for p, (i, j) in enumerate(modality_pairs(energy.shape[1])):
        both = trusted[:, i] & trusted[:, j]
        for m in (i, j):
            compared[:, m] += both
            passed[:, m] += both & passes[:, p]
    return trusted & (((passed > 0) | (compared == 0)) if rule == "all" else passed == compared)


# --- Proxy feature vectors (method step 2) ---


def nearest_neighbors(query: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Squared L2 distances (Q, k) ascending and indices (Q, k) of the k bank rows nearest to each query."""
    query, bank = upcast(query), upcast(bank)
    if not query.shape[0]:
        return query.new_zeros((0, k)), torch.zeros((0, k), dtype=torch.int64, device=query.device)
    # One query at a time, by differences: slow, but exact where ‖q‖² - 2qb + ‖b‖² has cancelled to noise.
    distances = torch.stack([(bank - row).square().sum(dim=1) for row in query])
    nearest = distances.topk(k, dim=1, largest=False, sorted=True)
    return nearest.values, nearest.indices


def local_least_squares(
    query: Tensor,
    bank: Tensor,
    targets: Tensor,
    neighbors: Tensor,
    *,
    ridge: float = 1e-3,
    affine: bool = False,
) -> tuple[Tensor, Tensor]:
    """Proxies and coefficients; :func:`m3er_fast.functional.local_least_squares` documents it."""
    rows = upcast(bank)[neighbors]  # (Q, K, d)
    wanted = upcast(query)
    # The coefficients do not change with a common scale of both sides, so that squares need never overflow.
    tiny = torch.finfo(rows.dtype).tiny
    scale = rows.abs().amax(dim=(1, 2)).maximum(wanted.abs().amax(dim=1)).clamp(min=tiny)
    usable = torch.isfinite(scale)
    scale = torch.where(usable, scale, 1.0)
    # Float64 inside: Gram matrices square the condition number, and neighbours are nearly collinear by nature.
    rows64 = torch.where(usable[:, None, None], rows, 0.0).double() / scale[:, None, None]
    wanted64 = torch.where(usable[:, None], wanted, 0.0).double() / scale[:, None]
    size = rows64.square().sum(dim=(1, 2))  # tr(G)
    penalty = ridge * size / rows.shape[1]
    if affine:
        # With a = 1/K + b and Σ b = 0 the rows' mean drops out: b solves the same problem about that mean, and Σ b = 0
        # holds by itself, since a centred Gram matrix sends (1, ..., 1) to zero.
        center = rows64.mean(dim=1)
        rows64, wanted64 = rows64 - center[:, None, :], wanted64 - center
    if ridge < SMALLEST_CHOLESKY_RIDGE:
        coefficients = _svd_solution(rows64, wanted64, penalty, torch.finfo(rows.dtype).eps, size.sqrt())
    else:
        coefficients = _cholesky_solution(rows64, wanted64, penalty)
    if affine:
        coefficients = coefficients + 1.0 / rows.shape[1]
    coefficients = torch.where(usable[:, None], coefficients, 0.0).to(rows.dtype)
    proxies = (coefficients[:, None, :] @ upcast(targets)[neighbors].to(rows.dtype))[:, 0]
    return proxies, coefficients


def _cholesky_solution(rows: Tensor, wanted: Tensor, penalty: Tensor) -> Tensor:
    """argmin_a ‖f - Σ a_r v_r‖² + μ‖a‖² by the normal equations."""
    gram = rows @ rows.mT
    # A Gram matrix of zeros gets a positive ridge, which leaves its zero solution as it is.
    penalty = penalty.clamp(min=torch.finfo(gram.dtype).tiny)
    gram = gram + penalty[:, None, None] * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    right = rows @ wanted[:, :, None]
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram))[:, :, 0]


def _svd_solution(rows: Tensor, wanted: Tensor, penalty: Tensor, precision: float, size: Tensor) -> Tensor:
    """The same minimum, and the one of least norm where μ = 0, without the directions that rounding made.

    Those are the singular values below the precision of the data beside the largest, or below the precision of this
    computation beside ``size``, the norm of the rows before any centring.
    """
    left, singular, right = torch.linalg.svd(rows, full_matrices=False)
    smallest = torch.maximum(precision * singular.amax(dim=1), torch.finfo(rows.dtype).eps * size)
    kept = singular > max(rows.shape[1:]) * smallest[:, None]
    filtered = torch.where(kept, singular / torch.where(kept, singular.square() + penalty[:, None], 1.0), 0.0)
    solution: Tensor = left @ (filtered[:, :, None] * (right @ wanted[:, :, None]))
    return solution[:, :, 0]


# --- Classification network (method step 3) ---


class MemoryScanWeights(NamedTuple):
    """Weights of the recurrent core; LSTM gates in torch's order (input, forget, cell, output).

    A two-layer part is (first weight, first bias, second weight, second bias), with a relu and dropout between.
    """

    input: list[Tensor]  # M of (4h, d_m)
    recurrent: Tensor  # (M, 4h, h)
    bias: Tensor  # (M, 4h)
    feedback: Tensor | None  # (M, 4h, 2h) or None: the plain memory fusion network
    attention: tuple[Tensor, Tensor, Tensor, Tensor]  # 2hM -> a -> 2hM
    candidate: tuple[Tensor, Tensor, Tensor, Tensor]  # 2hM -> b -> u
    retain: tuple[Tensor, Tensor, Tensor, Tensor]  # 2hM + u -> g -> u
    update: tuple[Tensor, Tensor, Tensor, Tensor]  # 2hM + u -> g -> u


def memory_scan(
    features: Sequence[Tensor], lengths: Tensor, weights: MemoryScanWeights, *, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Last hidden states (M, B, h) and memory (B, u); :func:`m3er_fast.functional.memory_scan` documents it."""
    batch, steps = features[0].shape[:2]
    modalities, _, size = weights.recurrent.shape
    # The input's share of the gates does not depend on the state: one large product over all steps.
    from_input = torch.stack(
        [F.linear(x, w, b) for x, w, b in zip(features, weights.input, weights.bias, strict=True)]
    )  # (M, B, T, 4h)
    hidden = from_input.new_zeros((modalities, batch, size))
    cell = torch.zeros_like(hidden)
    memory = from_input.new_zeros((batch, weights.candidate[2].shape[0]))
    attended = from_input.new_zeros((batch, 2 * modalities * size))
    for t in range(steps):
        gates = from_input[:, :, t] + hidden @ weights.recurrent.mT
        if weights.feedback is not None:
            # (B, old|new, M, h) -> (M, B, old|new of the modality)
            own = attended.view(batch, 2, modalities, size).permute(2, 0, 1, 3).reshape(modalities, batch, 2 * size)
            gates = gates + own @ weights.feedback.mT
        enter, keep, value, show = gates.chunk(4, dim=2)
        new_cell = keep.sigmoid() * cell + enter.sigmoid() * value.tanh()
        new_hidden = show.sigmoid() * new_cell.tanh()
        both = torch.cat([side_by_side(cell), side_by_side(new_cell)], dim=1)  # z_t, (B, 2Mh)
        attended = two_layers(both, weights.attention, dropout).softmax(dim=1) * both
        candidate = two_layers(attended, weights.candidate, dropout).tanh()
        context = torch.cat([attended, memory], dim=1)
        retain = two_layers(context, weights.retain, dropout).sigmoid()
        update = two_layers(context, weights.update, dropout).sigmoid()
        alive = (t < lengths)[:, None]
        hidden = torch.where(alive, new_hidden, hidden)
        cell = torch.where(alive, new_cell, cell)
        memory = torch.where(alive, retain * memory + update * candidate, memory)
    return hidden, memory


def side_by_side(state: Tensor) -> Tensor:
    """(M, B, h) as (B, M·h)."""
    return state.transpose(0, 1).flatten(1)


def two_layers(x: Tensor, layers: tuple[Tensor, Tensor, Tensor, Tensor], dropout: float) -> Tensor:
    """The second layer of the first one's relu, some units of which are dropped."""
    first, first_bias, second, second_bias = layers
    inner = F.dropout(F.relu(F.linear(x, first, first_bias)), dropout, training=dropout > 0)
    return F.linear(inner, second, second_bias)
