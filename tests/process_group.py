"""Real processes that meet in a file and talk by gloo; none of them outlives its test."""

import datetime
import os
import time

import torch
from torch import distributed

PATIENCE = 120  # seconds; a dead rank must not keep the others waiting


def run_ranks(function, ranks, folder):
    """Call ``function(rank, folder)`` in processes of one group, and return what each of them has returned."""
    spawned = torch.multiprocessing.spawn(_member, args=(function, ranks, folder), nprocs=ranks, join=False)
    deadline = time.monotonic() + 2 * PATIENCE
    try:
        while not spawned.join(timeout=1.0):
            assert time.monotonic() < deadline, f"{ranks} processes did not finish"
    finally:
        for process in spawned.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _member(rank, function, ranks, folder):
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=PATIENCE)
    store = distributed.FileStore(str(folder / "meeting"), ranks)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timeout)
    torch.save(function(rank, folder), folder / f"{rank}.pt")
    store.set(f"done {rank}", "")
    store.wait([f"done {other}" for other in range(ranks)], timeout)  # others may still need this one's messages
    os._exit(0)  # gloo's destructor may wait forever for its own threads
