"""M3ER: multimodal emotion recognition with a modality check, proxy features and multiplicative fusion."""

from m3er_fast import corruption, functional, metrics, reference
from m3er_fast.cca import CCA
from m3er_fast.check import CheckResult, ModalityCheck
from m3er_fast.config import M3ERConfig
from m3er_fast.fusion import M3ERFusion, M3EROutput
from m3er_fast.loss import MultiplicativeFusionLoss
from m3er_fast.network import MemoryFusionNetwork
from m3er_fast.proxy import ProxyGenerator
from m3er_fast.standardize import Standardizer

__version__ = "0.1.0"

__all__ = [
    "CCA",
    "CheckResult",
    "M3ERConfig",
    "M3ERFusion",
    "M3EROutput",
    "MemoryFusionNetwork",
    "ModalityCheck",
    "MultiplicativeFusionLoss",
    "ProxyGenerator",
    "Standardizer",
    "corruption",
    "functional",
    "metrics",
    "reference",
]
