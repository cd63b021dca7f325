"""Settings of every test run."""

import torch

# The tests' tensors are tiny: on a busy machine a second thread mostly spins, and the suite takes ten times as long.
torch.set_num_threads(1)
