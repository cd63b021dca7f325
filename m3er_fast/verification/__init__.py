"""Whether every implementation that works on a machine computes what the reference defines there.

``m3er-fast info --verify`` shows the verdicts. Each operation has a file of small hard inputs; its definition is the
reference, in float64 on the CPU.
"""

from m3er_fast.verification.operation import Operation
from m3er_fast.verification.run import VERIFIED, Mistake, Verdict, backend_names, try_backend, verify

__all__ = ["VERIFIED", "Mistake", "Operation", "Verdict", "backend_names", "try_backend", "verify"]
