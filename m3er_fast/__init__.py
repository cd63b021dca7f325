"""M3ER: multimodal emotion recognition with a modality check, proxy features and multiplicative fusion.

The public names load when they are first used: importing the package alone, as the command line does to say its
version, loads neither torch nor anything else.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sklearn.exceptions import NotFittedError

    from m3er_fast import corruption, functional, metrics, reference
    from m3er_fast.cca import CCA
    from m3er_fast.check import CheckResult, ModalityCheck
    from m3er_fast.config import (
        CheckConfig,
        LossConfig,
        M3ERConfig,
        NetworkConfig,
        ProxyConfig,
        TrainingConfig,
    )
    from m3er_fast.fusion import M3ERFusion, M3EROutput
    from m3er_fast.loss import MultiplicativeFusionLoss
    from m3er_fast.network import MemoryFusionNetwork
    from m3er_fast.proxy import ProxyGenerator
    from m3er_fast.standardize import Standardizer

__version__ = "0.1.0"

__all__ = [
    "CCA",
    "CheckConfig",
    "CheckResult",
    "LossConfig",
    "M3ERConfig",
    "M3ERFusion",
    "M3EROutput",
    "MemoryFusionNetwork",
    "ModalityCheck",
    "MultiplicativeFusionLoss",
    "NetworkConfig",
    "NotFittedError",
    "ProxyConfig",
    "ProxyGenerator",
    "Standardizer",
    "TrainingConfig",
    "corruption",
    "functional",
    "metrics",
    "reference",
]

_MODULE_OF = {
    "CCA": "cca",
    "CheckResult": "check",
    **dict.fromkeys(
        ("CheckConfig", "LossConfig", "M3ERConfig", "NetworkConfig", "ProxyConfig", "TrainingConfig"), "config"
    ),
    "M3ERFusion": "fusion",
    "M3EROutput": "fusion",
    "MemoryFusionNetwork": "network",
    "ModalityCheck": "check",
    "MultiplicativeFusionLoss": "loss",
    "ProxyGenerator": "proxy",
    "Standardizer": "standardize",
}


if not TYPE_CHECKING:  # a type checker would take any name for one that exists

    def __getattr__(name: str) -> Any:
        """Load a public name, or any module of the package, when it is first asked for."""
        if name == "NotFittedError":  # scikit-learn's own
            return import_module("sklearn.exceptions").NotFittedError
        if name in _MODULE_OF:
            value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
            globals()[name] = value
            return value
        if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
