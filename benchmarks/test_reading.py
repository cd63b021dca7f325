"""From Parquet in the page cache to tensors, in this project's layout, beside pyarrow's reading of lists."""

import functools
import tempfile
from pathlib import Path

import harness
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from workloads import READ

from m3er_fast.corpus import generate_corpus, read_parquet
from m3er_fast.corpus.parquet import decode_rows
from m3er_fast.kernels._launch import Work
from m3er_fast.scoring.plan import plan_shards
from m3er_fast.scoring.reader import read_windows

CONTESTANTS = ("ours", "ours, checksums ignored", "pyarrow, fixed_size_list", "pyarrow, list")
COMPARED = 64  # utterances that are compared with what was written


@functools.cache
def files():
    """The same frames as this project writes them and as lists of floats, and the folder that goes with the process."""
    folder = tempfile.TemporaryDirectory()
    root = Path(folder.name)
    generate_corpus(root / "ours", utterances=READ)
    features = read_parquet(root / "ours").features
    for kind in ("fixed_size_list", "list"):
        columns = {}
        for name, x in features.items():
            width = x.shape[1] * x.shape[2]
            flat = pa.array(x.reshape(-1))
            columns[name] = (
                pa.FixedSizeListArray.from_arrays(flat, width)
                if kind == "fixed_size_list"
                else pa.ListArray.from_arrays(np.arange(len(x) + 1, dtype=np.int32) * width, flat)
            )
        pq.write_table(pa.table(columns), root / f"{kind}.parquet", compression="none", use_dictionary=False)
    compared = {name: x[:COMPARED].copy() for name, x in features.items()}
    return folder, compared, sum(x.nbytes for x in features.values())


def by_ours(plan, verify):
    tensors = []
    for shard in plan.shards:
        for table in read_windows(plan.corpus, shard, verify=verify):
            columns = decode_rows(table).columns
            tensors.append({name: torch.from_numpy(column.values) for name, column in columns.items()})
    return tensors


def by_pyarrow(path):
    table = pq.read_table(path)
    return [{name: torch.from_numpy(table[name].combine_chunks().flatten().to_numpy()) for name in table.column_names}]


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
@pytest.mark.benchmark(timer=harness.now)
@pytest.mark.parametrize("contestant", CONTESTANTS)
def test_reading(benchmark, contest, device, contestant):
    if device.type != "cpu":
        pytest.skip("reading is measured on the CPU")
    folder, written, size = files()
    benchmark.group = f"Parquet to tensors, {READ} utterances of 20 frames, {size / 1e6:.0f} MB"
    root = Path(folder.name)
    if contestant.startswith("ours"):
        plan = plan_shards(root / "ours")
        step = functools.partial(by_ours, plan, verify=contestant == "ours")
    else:
        step = functools.partial(by_pyarrow, root / f"{contestant.removeprefix('pyarrow, ')}.parquet")

    def error(tensors):
        found = [tensors[0][name].reshape(-1)[: x.size] for name, x in written.items()]
        return harness.relative_error(found, [torch.from_numpy(x.reshape(-1)) for x in written.values()])

    contest(contestant, step, [Work(size, 0)], error=error, allowed=0.0)
