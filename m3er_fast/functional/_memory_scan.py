"""The memory scan: arguments are checked here, and then scanned.

Dimension legend: M modalities, B samples, T time steps, d_m features of modality m, h hidden size, u memory size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from m3er_fast._validation import check_positive_int
from m3er_fast.functional._dispatch import choose, in_transform
from m3er_fast.operands import MemoryScanWeights, TwoLayers


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
    _check_scan(features, lengths, weights)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
    if recompute is not None:
        check_positive_int("recompute", recompute, or_else=" or None")
    attention, candidate, retain, update = (TwoLayers(*layers) for layers in weights.layers)
    weights = weights._replace(attention=attention, candidate=candidate, retain=retain, update=update)
    return run_memory_scan(features, lengths, weights, dropout=dropout, recompute=recompute, backend=backend)


def run_memory_scan(
    features: Sequence[Tensor],
    lengths: Tensor,
    weights: MemoryScanWeights,
    *,
    dropout: float = 0.0,
    recompute: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """:func:`memory_scan` of checked arguments."""
    tensors = [x for x in (*features, *weights.tensors()) if x is not None]
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)

    def scan(start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        part = features if stop is None else [x[start:stop] for x in features]
        compute = choose("memory_scan", backend, part[0], part, weights, tensors, trains).load()
        result: tuple[Tensor, Tensor] = compute(part, lengths[start:stop], weights, dropout=dropout, trains=trains)
        return result

    if recompute is None or not trains or not len(lengths) or in_transform():
        return scan()
    parts = [
        # Without dropout nothing is drawn, and a CUDA graph can record it.
        checkpoint(scan, start, start + recompute, use_reentrant=False, preserve_rng_state=dropout > 0.0)
        for start in range(0, len(lengths), recompute)
    ]
    return torch.cat([hidden for hidden, _ in parts], 1), torch.cat([memory for _, memory in parts])


def _check_scan(features: Sequence[Tensor], lengths: Tensor, weights: MemoryScanWeights) -> None:
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
