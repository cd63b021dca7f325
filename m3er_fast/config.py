"""Every setting of a model and its training, as frozen, validated dataclasses that round-trip through JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

from m3er_fast.reference import Activation, Variant

Statistic = Literal["correlation", "energy", "combined"]
Rule = Literal["all", "any"]
Pooling = Literal["mean", "mean_std"]
Bank = Literal["neighbours", "basis"]
Engine = Literal["auto", "torch", "faiss", "faiss-ivf", "faiss-hnsw"]
Reliability = Literal["off", "report", "weigh"]


@dataclass(frozen=True)
class CheckConfig:
    """Modality check (step 1); the arguments of :class:`m3er_fast.ModalityCheck`, which documents them."""

    n_components: int = 100
    statistic: Statistic = "combined"
    rule: Rule = "all"
    alpha: float = 0.05
    threshold: float | tuple[float, ...] | None = None
    component_weights: Literal["canonical"] | None = "canonical"
    pooling: Pooling = "mean"
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        _positive_int("n_components", self.n_components)
        _one_of("statistic", self.statistic, Statistic)
        _one_of("rule", self.rule, Rule)
        _one_of("pooling", self.pooling, Pooling)
        _in_range("alpha", self.alpha, 0.0, 1.0, exclusive=True)
        _in_range("ridge", self.ridge, 0.0, math.inf)
        if self.component_weights not in ("canonical", None):
            raise ValueError(f"component_weights must be 'canonical' or None, got {self.component_weights!r}")
        if isinstance(self.threshold, Sequence):
            object.__setattr__(self, "threshold", tuple(self.threshold))
        for value in self.threshold if isinstance(self.threshold, tuple) else [self.threshold]:
            if value is not None:
                _in_range("threshold", value, -1.0, 1.0)


@dataclass(frozen=True)
class ProxyConfig:
    """Proxy feature vectors (step 2); the arguments of :class:`m3er_fast.ProxyGenerator`, which documents them."""

    bank: Bank = "neighbours"
    k: int = 16
    ridge: float = 0.3
    affine: bool = False
    max_bank: int | None = None
    max_basis: int | None = None
    engine: Engine = "auto"
    memory_budget: int = 256 * 2**20
    bank_on_host: bool = False
    reliability: Reliability = "off"
    min_reliability: float | None = None

    def __post_init__(self) -> None:
        _one_of("bank", self.bank, Bank)
        _one_of("reliability", self.reliability, Reliability)
        if self.reliability != "off" and self.bank != "neighbours":
            raise ValueError(f"reliability {self.reliability!r} needs bank 'neighbours', got bank {self.bank!r}")
        if self.min_reliability is not None:
            _in_range("min_reliability", self.min_reliability, 0.0, 1.0)
            if self.reliability == "off":
                raise ValueError("min_reliability needs reliability 'report' or 'weigh', got 'off'")
        _positive_int("memory_budget", self.memory_budget)
        _boolean("bank_on_host", self.bank_on_host)
        _one_of("engine", self.engine, Engine)
        _positive_int("k", self.k)
        _in_range("ridge", self.ridge, 0.0, math.inf)
        _boolean("affine", self.affine)
        for name in ("max_bank", "max_basis"):
            if getattr(self, name) is not None:
                _positive_int(name, getattr(self, name))


@dataclass(frozen=True)
class NetworkConfig:
    """Classification network (step 3); the arguments of :class:`m3er_fast.MemoryFusionNetwork`, documented there."""

    hidden: int = 32
    memory: int = 128
    attention: tuple[int, int, int] = (128, 64, 64)
    fusion: int = 32
    head: int = 64
    dropout: float = 0.0
    feedback: bool = True
    recompute: int | None = None

    def __post_init__(self) -> None:
        for name in ("hidden", "memory", "fusion", "head"):
            _positive_int(name, getattr(self, name))
        if not isinstance(self.attention, Sequence) or len(self.attention) != 3:
            raise ValueError(f"attention must be three layer sizes, got {self.attention!r}")
        object.__setattr__(self, "attention", tuple(self.attention))
        for size in self.attention:
            _positive_int("attention", size)
        if not isinstance(self.dropout, int | float) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout!r}")
        _boolean("feedback", self.feedback)
        if self.recompute is not None:
            _positive_int("recompute", self.recompute)


@dataclass(frozen=True)
class LossConfig:
    """Model loss (step 4): fusion loss of the modality heads + ``head_weight`` · cross entropy of the fused head.

    The other fields are arguments of :func:`m3er_fast.functional.fusion_loss`. ``class_weight`` and
    ``modality_weight`` hold for the fusion loss; the cross entropy takes ``class_weight`` alone.
    """

    variant: Variant = "m3er"
    beta: float = 1.0
    detach_weight: bool = True
    activation: Activation = "softmax"
    class_weight: tuple[float, ...] | None = None
    modality_weight: tuple[float, ...] | None = None
    margin: float | None = None
    head_weight: float = 1.0

    def __post_init__(self) -> None:
        _one_of("variant", self.variant, Variant)
        _one_of("activation", self.activation, Activation)
        _in_range("beta", self.beta, 0.0, math.inf)
        _boolean("detach_weight", self.detach_weight)
        _in_range("head_weight", self.head_weight, 0.0, math.inf)
        if self.margin is not None:
            _in_range("margin", self.margin, 0.0, math.inf)
        for name in ("class_weight", "modality_weight"):
            values = getattr(self, name)
            if values is not None:
                if not isinstance(values, Iterable):
                    raise ValueError(f"{name} must be a sequence of numbers, got {values!r}")
                values = tuple(values)
                for value in values:
                    _in_range(name, value, 0.0, math.inf)
                object.__setattr__(self, name, tuple(float(value) for value in values))


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained.

    Args:
        epochs: the most passes over the training split.
        batch_size: utterances a step.
        learning_rate: of Adam.
        weight_decay: of Adam, decoupled from the gradient.
        patience: epochs without a better validation loss before training stops; None trains all epochs. The weights
            of the best epoch are kept either way.
        balance_classes: weigh classes by n / (C · n_c), C counting those that occur, so that rare ones count as much as
            common ones. A class without training samples gets weight 1.
        gradient_norm: the gradient's norm is clipped to this; None leaves it alone.
        seed: of weights, shuffling and dropout.
    """

    epochs: int = 100
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    patience: int | None = 10
    balance_classes: bool = False
    gradient_norm: float | None = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _positive_int("epochs", self.epochs)
        _positive_int("batch_size", self.batch_size)
        _in_range("learning_rate", self.learning_rate, 0.0, math.inf, exclusive=True)
        _in_range("weight_decay", self.weight_decay, 0.0, math.inf)
        if self.patience is not None:
            _positive_int("patience", self.patience)
        if self.gradient_norm is not None:
            _in_range("gradient_norm", self.gradient_norm, 0.0, math.inf, exclusive=True)
        _boolean("balance_classes", self.balance_classes)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be an int in 0..2**32 - 1, got {self.seed!r}")


@dataclass(frozen=True)
class M3ERConfig:
    """All settings of an :class:`m3er_fast.M3ERFusion` model and its training.

    Args:
        check: the modality check, or None: every modality that is there counts as effective, and the model works
            without being fitted.
        proxy: the proxy generator, or None: ineffectual modalities are replaced by their training mean.
        network: sizes of the network.
        loss: the model's loss.
        training: how ``m3er_fast.training`` trains it.
        check_in_training: run the check and the proxies in train mode too.
    """

    check: CheckConfig | None = field(default_factory=CheckConfig)
    proxy: ProxyConfig | None = field(default_factory=ProxyConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    check_in_training: bool = False

    def __post_init__(self) -> None:
        for name, kind in _PARTS.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL_PARTS:
                continue
            if not isinstance(value, kind):
                raise ValueError(f"{name} must be a {kind.__name__}, got {value!r}")
        _boolean("check_in_training", self.check_in_training)

    @classmethod
    def paper(cls) -> M3ERConfig:
        """Every value the slides on Mittal et al. 2020 give; what they leave open keeps its default.

        CCA with 100 components, unweighted, as the only statistic of the check; the proxy from a basis of the training
        data; LSTMs of 32, a memory of 128, a fusion of 32, a head of 64, feedback to the LSTMs; a yes/no question per
        class under the modified loss; Adam with rate 0.01, batches of 256, 500 epochs without stopping early.
        """
        return cls(
            check=CheckConfig(n_components=100, statistic="correlation", component_weights=None),
            proxy=ProxyConfig(bank="basis"),
            network=NetworkConfig(hidden=32, memory=128, fusion=32, head=64, feedback=True),
            loss=LossConfig(variant="m3er", activation="sigmoid"),
            training=TrainingConfig(
                epochs=500, batch_size=256, learning_rate=0.01, patience=None, gradient_norm=None, balance_classes=False
            ),
        )

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed; see :func:`dataclasses.replace`."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`; missing fields get their defaults.

        Raises:
            ValueError: for an unknown field or a bad value, named.
        """
        known = _known_fields(cls, values)
        for name, kind in _PARTS.items():
            part = known.get(name)
            if isinstance(part, Mapping):
                known[name] = kind(**_known_fields(kind, part))
        return cls(**known)


_PARTS: dict[str, type] = {
    "check": CheckConfig,
    "proxy": ProxyConfig,
    "network": NetworkConfig,
    "loss": LossConfig,
    "training": TrainingConfig,
}
_OPTIONAL_PARTS = ("check", "proxy")


def _known_fields(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(kind)]
    for name in values:
        if name not in names:
            raise ValueError(f"{kind.__name__} has no field {name!r}; it has {', '.join(names)}")
    return dict(values)


def _one_of(name: str, value: Any, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(choices)))}, got {value!r}")


def _boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def _positive_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")


def _in_range(name: str, value: Any, low: float, high: float, *, exclusive: bool = False) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not low <= value <= high or (exclusive and value in (low, high)):
        brackets = f"({low}, {high})" if exclusive else f"[{low}, {high}]"
        raise ValueError(f"{name} must be a finite number in {brackets}, got {value!r}")
