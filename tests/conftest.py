"""Shared fixtures: the real data, where it is there."""

import os
from pathlib import Path

import pytest
import torch

# The tests' tensors are tiny: on a busy machine a second thread mostly spins, and the suite takes ten times as long.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the real corpora: $M3ER_DATA, or shared/data beside the checkout."""
    path = Path(os.environ.get("M3ER_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real data: neither $M3ER_DATA nor shared/data ({path}) is there")
    return path
