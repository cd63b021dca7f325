"""What a hyperparameter search tries: the values of each setting, and settings drawn from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from m3er_fast._validation import check_boolean, check_number
from m3er_fast.config import M3ERConfig

Settings: TypeAlias = dict[str, Any]
"""Values of settings by their dotted names."""

DEFAULT_SPACE: Mapping[str, Any] = {
    "training.learning_rate": {"from": 3e-4, "to": 1e-2, "log": True},
    "training.batch_size": [16, 32, 64, 128],
    "training.weight_decay": {"from": 1e-6, "to": 1e-1, "log": True},
    "network.hidden": [16, 32, 64],
    "network.dropout": {"from": 0.0, "to": 0.7},
    "loss.variant": ["m3er", "original"],
    "loss.beta": [0.0, 0.5, 1.0, 2.0],
    "loss.head_weight": {"from": 0.3, "to": 3.0, "log": True},
}
"""The settings that are searched unless others are given."""


@dataclass(frozen=True)
class _Choice:
    """Some values, each as likely as the others."""

    values: tuple[Any, ...]

    def draw(self, random: np.random.Generator) -> Any:
        return self.values[int(random.integers(len(self.values)))]


@dataclass(frozen=True)
class _Range:
    """All numbers from ``low`` to ``high``; integers if both are, and the logarithm uniform if ``log``."""

    low: float
    high: float
    log: bool

    def draw(self, random: np.random.Generator) -> float:
        if self.log:
            value = math.exp(random.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = random.uniform(self.low, self.high)
        value = min(max(value, self.low), self.high)
        return round(value) if isinstance(self.low, int) and isinstance(self.high, int) else float(f"{value:.4g}")


class SearchSpace:
    """The values that a search tries for each setting.

    Args:
        values: dotted name of a setting -> a list of values, or ``{"from": low, "to": high}``, with ``"log": True`` for
            a logarithm that is uniform. Two ints draw ints. None is :data:`DEFAULT_SPACE`.
        config: all other settings.

    Raises:
        ValueError: naming a setting that does not exist, a value that it cannot have, or an entry of another form.
    """

    def __init__(self, values: Mapping[str, Any] | None, config: M3ERConfig) -> None:
        values = DEFAULT_SPACE if values is None else values
        if not isinstance(values, Mapping) or not values:
            raise ValueError(f"the search space must map names of settings to values, got {values!r}")
        self._config = config
        self._entries = {name: self._read(name, entry) for name, entry in values.items()}

    @property
    def names(self) -> list[str]:
        """The searched settings."""
        return list(self._entries)

    def draw(self, number: int, seed: int) -> Settings:
        """Return the settings of trial ``number``. Trial 0 changes none: it is what all others are compared with."""
        if number == 0:
            return {}
        random = np.random.default_rng((seed, number))
        return {name: entry.draw(random) for name, entry in self._entries.items()}

    def _read(self, name: str, entry: Any) -> _Choice | _Range:
        if isinstance(entry, Sequence) and not isinstance(entry, str) and entry:
            tried = list(entry)
            read: _Choice | _Range = _Choice(tuple(tried))
        elif isinstance(entry, Mapping) and {"from", "to"} <= set(entry) <= {"from", "to", "log"}:
            low, high, log = entry["from"], entry["to"], entry.get("log", False)
            check_number(f"{name}: from", low, -math.inf)
            check_number(f"{name}: to", high, low)
            check_boolean(f"{name}: log", log)
            if log and low <= 0:
                raise ValueError(f"{name}: from must be above 0 where log is true, got {low}")
            tried = [low, high]
            read = _Range(low, high, log)
        else:
            raise ValueError(f"{name} must be a list of values, or have from, to and perhaps log, got {entry!r}")
        for value in tried:
            self._config.with_settings({name: value})
        return read
