"""Every setting of a model and its training, as frozen, validated dataclasses that round-trip through JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Self, TypeAlias

from m3er_fast._settings import check_settings, document_settings, setting
from m3er_fast._validation import check_boolean, check_choice, check_number, check_positive_int, near_names
from m3er_fast.neighbors import NeighborEngine
from m3er_fast.operands import Activation, Variant

_Check: TypeAlias = Callable[[str, Any], object]

Statistic = Literal["correlation", "energy", "combined"]
Rule = Literal["all", "any"]
Pooling = Literal["mean", "mean_std"]
Bank = Literal["regression", "neighbours", "basis"]
Schedule = Literal["constant", "cosine"]
Precision = Literal["float32", "bfloat16"]


# --- Checks of a field, by name and value ---


def _one_of(choices: Any) -> _Check:
    return partial(check_choice, choices=choices)


def _between(low: float, high: float) -> _Check:
    return partial(check_number, low=low, high=high, exclusive=True)


def _at_least(low: float) -> _Check:
    return partial(check_number, low=low)


def _above(low: float) -> _Check:
    return partial(check_number, low=low, exclusive=True)


def _optional(check: _Check) -> _Check:
    def check_unless_none(name: str, value: Any) -> None:
        if value is not None:
            check(name, value)

    return check_unless_none


def _each(check: _Check) -> _Check:
    """The check of every number of a sequence."""

    def check_each(name: str, values: Any) -> None:
        if not isinstance(values, Iterable) or isinstance(values, str):
            raise ValueError(f"{name} must be a sequence of numbers, got {values!r}")
        for value in values:
            check(name, value)

    return check_each


def _threshold(name: str, value: Any) -> None:
    for one in value if isinstance(value, tuple) else [value]:
        check_number(name, one, -1.0, 1.0)


def _names(name: str, value: Any) -> None:
    if not isinstance(value, tuple) or not all(isinstance(one, str) for one in value):
        raise ValueError(f"{name} must be a sequence of names, got {value!r}")


def _three_sizes(name: str, value: Any) -> None:
    if not isinstance(value, Sequence) or len(value) != 3:
        raise ValueError(f"{name} must be three layer sizes, got {value!r}")
    for size in value:
        check_positive_int(name, size)


def _dropout(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {value!r}")


def _seed(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**32:
        raise ValueError(f"{name} must be an int in 0..2**32 - 1, got {value!r}")


# --- The settings of each step ---


@dataclass(frozen=True)
class CheckConfig:
    """Modality check (step 1): the settings of :class:`m3er_fast.ModalityCheck`.

    Args:
        {settings}
    """

    n_components: int = setting(
        100, check_positive_int, "ceiling of the canonical components of a pair (the paper's 100)."
    )
    statistic: Statistic = setting(
        "combined", _one_of(Statistic), '"combined", "energy", or "correlation" (the paper).'
    )
    rule: Rule = setting("all", _one_of(Rule), '"all" or "any", see :class:`m3er_fast.ModalityCheck`.')
    alpha: float = setting(0.05, _between(0.0, 1.0), "share of clean samples that may lose a modality.")
    threshold: float | tuple[float, ...] | None = setting(
        None, _optional(_threshold), "τ, one number or one per pair; None calibrates instead."
    )
    component_weights: Literal["canonical"] | None = setting(
        "canonical",
        _one_of(("canonical", None)),
        '"canonical" scales component c of both sides by sqrt(s_c), s the canonical correlations; None is the paper.',
    )
    pooling: Pooling = setting(
        "mean", _one_of(Pooling), '"mean", or "mean_std": mean and standard deviation over the frames side by side.'
    )
    ridge: float = setting(1e-3, _at_least(0.0), "shrinkage of each covariance, in units of its mean variance.")
    ignore: tuple[str, ...] = setting(
        (), _names, 'symptoms of the combined check that shall not count, such as ``("gain",)``.'
    )

    def __post_init__(self) -> None:
        for name in ("ignore", "threshold"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        check_settings(self)


@dataclass(frozen=True)
class ProxyConfig:
    """Proxy feature vectors (step 2): the settings of :class:`m3er_fast.ProxyGenerator`.

    Args:
        {settings}
    """

    bank: Bank = setting(
        "regression",
        _one_of(Bank),
        '"regression", "neighbours" or "basis". A regression has ``ridge`` only; ``k``, ``max_bank``, ``engine`` and\n'
        "``bank_on_host`` are settings of neighbours, ``max_basis`` of a basis, ``affine`` of both.",
    )
    k: int = setting(16, check_positive_int, "neighbours per frame; more than the bank has means all.")
    ridge: float | None = setting(
        None,
        _optional(_at_least(0.0)),
        "λ ≥ 0; 0 takes the solution of least norm. None is 0.3 for neighbours and basis, which served weakly related\n"
        "modalities best (docs/proxies.md; where modalities are linear maps of each other, take 1e-6 or less). For a\n"
        "regression, None chooses λ for each pair of modalities by generalised cross-validation.",
    )
    affine: bool = setting(
        False, check_boolean, "constrain the coefficients to sum to 1; a regression is affine always."
    )
    max_bank: int | None = setting(
        None,
        _optional(check_positive_int),
        "the most training frames to keep, a seeded uniform choice; None keeps all.",
    )
    max_basis: int | None = setting(
        None, _optional(check_positive_int), "the most basis rows; None takes the numerical rank."
    )
    engine: NeighborEngine = setting(
        "auto",
        _one_of(NeighborEngine),
        "how :func:`m3er_fast.functional.nearest_neighbors` searches. ``fit`` measures what an approximate engine\n"
        "finds.",
    )
    memory_budget: int = setting(
        256 * 2**20, check_positive_int, "bytes to take at a time beside bank, features and results."
    )
    bank_on_host: bool = setting(
        False,
        check_boolean,
        "keep the bank in host memory wherever the module goes, for banks larger than the device's memory. Tiles of\n"
        "it are copied to the device for the search, and the neighbours' rows for the solution.",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.bank != "regression" and self.ridge is None:
            object.__setattr__(self, "ridge", 0.3)
        if self.bank == "regression":
            for one in dataclasses.fields(self):
                value = getattr(self, one.name)
                if one.name not in ("bank", "ridge", "memory_budget") and value != one.default:
                    raise ValueError(
                        f"{one.name} must be left at {one.default!r} with bank='regression', got {value!r}: it is a "
                        "setting of other banks"
                    )


@dataclass(frozen=True)
class NetworkConfig:
    """Classification network (step 3): the settings of :class:`m3er_fast.MemoryFusionNetwork`.

    Args:
        {settings}
    """

    hidden: int = setting(32, check_positive_int, "size of every LSTM.")
    memory: int = setting(128, check_positive_int, "size of u.")
    attention: tuple[int, int, int] = setting(
        (128, 64, 64),
        _three_sizes,
        "sizes of the inner layers of the attention, of the candidate û, and of the two gates.",
    )
    fusion: int = setting(32, check_positive_int, "size of e.")
    head: int = setting(64, check_positive_int, "size of the inner layer of the fused head.")
    dropout: float = setting(0.0, _dropout, "share of units dropped after each inner relu in training.")
    feedback: bool = setting(True, check_boolean, "whether the attended cells reach the LSTMs.")
    recompute: int | None = setting(
        None,
        _optional(check_positive_int),
        "how many samples' activations training holds at a time (:func:`m3er_fast.functional.memory_scan`);\n"
        "None for all.",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        object.__setattr__(self, "attention", tuple(self.attention))


@dataclass(frozen=True)
class LossConfig:
    """Model loss (step 4): fusion loss of the modality heads + ``head_weight`` · cross entropy of the fused head.

    The cross entropy takes ``class_weight`` alone of the other settings, which are those of
    :func:`m3er_fast.functional.fusion_loss`.

    Args:
        {settings}
    """

    variant: Variant = setting("original", _one_of(Variant), "which weight w_m.")
    beta: float = setting(1.0, _at_least(0.0), "β ≥ 0, how strongly the weights tell modalities apart.")
    detach_weight: bool = setting(True, check_boolean, "stop gradients at w.")
    activation: Activation = setting("softmax", _one_of(Activation), '"softmax" over the classes, or "sigmoid".')
    class_weight: tuple[float, ...] | None = setting(
        None, _optional(_each(_at_least(0.0))), "C factors of the classes' costs; None for ones."
    )
    modality_weight: tuple[float, ...] | None = setting(
        None, _optional(_each(_at_least(0.0))), "M factors of the modalities' terms; None for ones."
    )
    margin: float | None = setting(None, _optional(_at_least(0.0)), "margin of Liu's boosted training; None for none.")
    head_weight: float = setting(1.0, _at_least(0.0), "factor of the fused head's cross entropy.")

    def __post_init__(self) -> None:
        for name in ("class_weight", "modality_weight"):
            values = getattr(self, name)
            if isinstance(values, Iterable) and not isinstance(values, str):
                object.__setattr__(self, name, tuple(values))
        check_settings(self)
        for name in ("class_weight", "modality_weight"):
            values = getattr(self, name)
            if values is not None:
                object.__setattr__(self, name, tuple(map(float, values)))


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained.

    Args:
        {settings}
    """

    epochs: int = setting(100, check_positive_int, "the most passes over the training split.")
    batch_size: int = setting(64, check_positive_int, "utterances per step.")
    learning_rate: float = setting(1e-3, _above(0.0), "Adam's learning rate.")
    schedule: Schedule = setting(
        "constant",
        _one_of(Schedule),
        '"constant", or "cosine": the learning rate falls as half a cosine from the end of the warm-up to 0 at the\n'
        "last of ``epochs``.",
    )
    warmup_epochs: float = setting(
        0.0, _at_least(0.0), "epochs over which the learning rate rises from 0, fewer than ``epochs``; 0 for none."
    )
    weight_decay: float = setting(0.0, _at_least(0.0), "Adam's weight decay, decoupled from the gradient.")
    patience: int | None = setting(
        10,
        _optional(check_positive_int),
        "epochs without a better validation loss before training stops; None trains all epochs. The weights of the\n"
        "best epoch are kept either way.",
    )
    balance_classes: bool = setting(
        False,
        check_boolean,
        "weigh classes by n / (C · n_c), C counting those that occur, so that rare classes count as much as common\n"
        "ones. A class without training samples gets weight 1.",
    )
    gradient_norm: float | None = setting(
        1.0, _optional(_above(0.0)), "the gradient's norm is clipped to this; None does not clip."
    )
    calibrate: bool = setting(
        True,
        check_boolean,
        "fit a temperature to the validation split after training, so that the probabilities are as sure as they are\n"
        "right; predictions stay the same.",
    )
    seed: int = setting(0, _seed, "seed of weights, shuffling and dropout.")
    precision: Precision = setting(
        "float32",
        _one_of(Precision),
        '"float32", or "bfloat16": the heads compute in bfloat16 under autocast. The memory scan, losses, weights and\n'
        "everything that is fitted stay float32.",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.warmup_epochs and self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs must be less than epochs = {self.epochs}, got {self.warmup_epochs!r}")


for _kind in (CheckConfig, ProxyConfig, NetworkConfig, LossConfig, TrainingConfig):
    document_settings(_kind, _kind)


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
        check_boolean("check_in_training", self.check_in_training)

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

    def with_settings(self, changes: Mapping[str, Any]) -> Self:
        """A copy with some settings changed, by dotted names such as ``"loss.beta"``.

        A setting of a part that is None gives the part its defaults first.

        Raises:
            ValueError: for an unknown name, with those it may stand for, or a bad value.
        """
        values = self.to_dict()
        for name, value in changes.items():
            if name not in _SETTINGS:
                endings = [one for one in _SETTINGS if one.endswith(f".{name}")]
                alike = [one for one in _SETTINGS if ("." in one) == ("." in name)]
                hint = f", did you mean {' or '.join(endings)}?" if endings else near_names(name, alike)
                raise ValueError(f"there is no setting {name!r}{hint}")
            part, _, field_name = name.rpartition(".")
            if part and values[part] is None:
                values[part] = {}
            (values[part] if part else values)[field_name] = value
        return type(self).from_dict(values)

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
_SETTINGS = [
    *(f"{name}.{one.name}" for name, kind in _PARTS.items() for one in dataclasses.fields(kind)),
    *(one.name for one in dataclasses.fields(M3ERConfig)),
]


def _known_fields(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(kind)]
    for name in values:
        if name not in names:
            raise ValueError(f"{kind.__name__} has no field {name!r}; it has {', '.join(names)}")
    return dict(values)
