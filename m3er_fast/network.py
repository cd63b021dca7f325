"""The classification network (step 3 of the method): LSTMs, attention over their cells, a gated memory, fusion."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from m3er_fast._layer_weights import plain_tensors
from m3er_fast._settings import takes_settings_of
from m3er_fast._validation import check_positive_int
from m3er_fast.config import NetworkConfig
from m3er_fast.fitted_module import LastingModule, ordinary_tensors
from m3er_fast.functional import unchecked
from m3er_fast.inputs import Array, Features, check_input_dims, prepare_batch
from m3er_fast.operands import MemoryScanWeights, TwoLayers


class NetworkOutput(NamedTuple):
    """The network's output for a batch."""

    logits: Tensor  # (B, C), from the fused head
    modality_logits: Tensor  # (M, B, C), from each modality's own head
    fused: Tensor  # (B, fusion + memory): multiplicatively fused features beside the memory


@takes_settings_of(NetworkConfig)
class MemoryFusionNetwork(LastingModule):
    """LSTM and memory classification network of M3ER.

    Each modality has one LSTM. An attention module reads the cells of all LSTMs at every step; the attended cells
    update a gated memory u and, with ``feedback``, the LSTMs' inputs at the next step
    (formulas: :func:`m3er_fast.functional.memory_scan`). The last hidden states h_m are fused by multiplication,

        e = ⊙_m (A_m h_m + b_m),

    and [e ; u] → Linear ``head`` → relu → Linear C gives the logits. Each modality also has its own head,
    Linear C of h_m; the multiplicative fusion loss weighs their probabilities.
    Sources: Mittal et al. 2020 (arXiv 1911.05659); Zadeh et al. 2018 (arXiv 1802.00927), whose network is
    ``feedback=False``.

    Args:
        input_dims: feature count d_m of each modality, in order.
        num_classes: number C of classes.
        {settings}

    Raises:
        ValueError: naming the argument that is out of range.
    """

    @ordinary_tensors()
    def __init__(self, input_dims: Mapping[str, int], num_classes: int, *settings: Any, **named_settings: Any) -> None:
        super().__init__()
        self.input_dims = check_input_dims(input_dims)
        check_positive_int("num_classes", num_classes)
        config = NetworkConfig(*settings, **named_settings)
        hidden, memory = config.hidden, config.memory
        self.num_classes = num_classes
        self.dropout, self.recompute = config.dropout, config.recompute
        modalities = len(self.input_dims)
        cells = 2 * hidden * modalities  # old and new cells of all modalities side by side
        attention_inner, candidate_inner, gate_inner = config.attention
        self.lstms = nn.ModuleList(nn.LSTMCell(dim, hidden) for dim in self.input_dims.values())
        self.attention = _two_layers(cells, attention_inner, cells)
        self.candidate = _two_layers(cells, candidate_inner, memory)
        self.retain = _two_layers(cells + memory, gate_inner, memory)
        self.update = _two_layers(cells + memory, gate_inner, memory)
        self.feedback = (
            nn.ModuleList(nn.Linear(2 * hidden, 4 * hidden, bias=False) for _ in range(modalities))
            if config.feedback
            else None
        )
        self.fusion = nn.ModuleList(nn.Linear(hidden, config.fusion) for _ in range(modalities))
        self.head = _two_layers(config.fusion + memory, config.head, num_classes)
        self.modality_heads = nn.ModuleList(nn.Linear(hidden, num_classes) for _ in range(modalities))

    def forward(
        self, features: Features, lengths: Array | None = None, available: Array | None = None
    ) -> NetworkOutput:
        """Classify a batch.

        Args:
            features: mapping from modality to a (B, T, d_m) or (B, d_m) tensor; a missing one counts as zeros.
            lengths: (B,) valid leading frames, or None for all.
            available: (B, M) bool; excluded modalities count as zeros.

        Raises:
            ValueError: naming the modality, the shape got and the shape wanted.
        """
        batch = prepare_batch(features, lengths, available, input_dims=self.input_dims)
        return self.classify(batch.features, batch.lengths)

    def classify(self, features: Sequence[Tensor], lengths: Tensor) -> NetworkOutput:
        """Classify M checked tensors (B, T, d_m) with zeros in padding."""
        weights = self.scan_weights()
        features = [x.to(weights.bias.dtype) for x in features]
        dropout = self.dropout if self.training else 0.0
        hidden, memory = unchecked.memory_scan(features, lengths, weights, dropout=dropout, recompute=self.recompute)
        states = hidden.unbind(0)
        product = functools.reduce(torch.mul, [layer(h) for layer, h in zip(self.fusion, states, strict=True)])
        fused = torch.cat([product, memory], dim=1)
        inner = self.head[0](fused).relu()
        if dropout:
            inner = nn.functional.dropout(inner, dropout)
        modality_logits = torch.stack([layer(h) for layer, h in zip(self.modality_heads, states, strict=True)])
        return NetworkOutput(self.head[1](inner), modality_logits, fused)

    def scan_weights(self) -> MemoryScanWeights:
        """Return the recurrent core's weights in the layout of :func:`m3er_fast.functional.memory_scan`.

        They are read by name: parametrisations, pruning and weight norm act, and train what they should.

        Raises:
            ValueError: naming a layer that was replaced, as by quantisation or LoRA.

        Warns:
            UserWarning: naming a layer with other hooks, which are not called.
        """
        parts: Any = self._modules  # without torch's search for attributes
        lstms = plain_tensors("lstms", parts["lstms"], nn.LSTMCell, ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        inputs, recurrent, bias = [], [], []
        for input_weight, recurrent_weight, input_bias, recurrent_bias in lstms:
            inputs.append(input_weight)
            recurrent.append(recurrent_weight)
            bias.append(input_bias + recurrent_bias)
        feedback = None
        if self.feedback is not None:
            found = plain_tensors("feedback", self.feedback, nn.Linear, ("weight", "bias"))
            feedback = torch.stack([weight for weight, _ in found])
        return MemoryScanWeights(
            inputs,
            torch.stack(recurrent),
            torch.stack(bias),
            feedback,
            _layer_weights("attention", parts),
            _layer_weights("candidate", parts),
            _layer_weights("retain", parts),
            _layer_weights("update", parts),
        )


def _two_layers(size: int, inner: int, out: int) -> nn.ModuleList:
    return nn.ModuleList([nn.Linear(size, inner), nn.Linear(inner, out)])


def _layer_weights(name: str, parts: Any) -> TwoLayers:
    first, second = plain_tensors(name, parts[name], nn.Linear, ("weight", "bias"))
    return TwoLayers(*first, *second)
