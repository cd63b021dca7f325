"""What the GPU kernels cost, counted without a GPU by the emulator of the tests (`tests/ptx`)."""

import sys
from pathlib import Path

# The emulator belongs to the tests, a folder of modules and no package.
sys.path.append(str(Path(__file__).parents[2] / "tests"))
