"""From Parquet in the page cache to tensors, in this project's layout, beside pyarrow's reading of lists.

Both read one row group of 64 MiB at a time and drop it when the next one is there, as the scorer does. Ours are the few
tensors of successive rows from which the scorer gathers its batches.
"""

import functools
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.speed import harness
from benchmarks.speed.work import Work
from benchmarks.speed.workloads import PAPER_DIMS, READ
from m3er_fast.corpus import generate_corpus, read_parquet
from m3er_fast.corpus.parquet import decode_rows
from m3er_fast.shards.plan import plan_shards
from m3er_fast.shards.reader import read_windows

CONTESTANTS = ("ours", "ours, checksums ignored", "pyarrow, fixed_size_list", "pyarrow, list")
ROW_GROUP = 2048  # utterances, 64 MiB as in this project's files
COMPARED = 64  # utterances that are compared with the written ones


@functools.cache
def files():
    """Write the same frames as this project does and as lists of floats, in a folder that the process removes."""
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
        table = pa.table(columns)
        pq.write_table(
            table, root / f"{kind}.parquet", compression="none", use_dictionary=False, row_group_size=ROW_GROUP
        )
    compared = {name: x[:COMPARED].copy() for name, x in features.items()}
    return folder, compared, sum(x.nbytes for x in features.values())


def by_ours(plan, verify):
    for shard in plan.shards:
        for table in read_windows(plan.corpus, shard, verify=verify):
            columns = decode_rows(table).columns
            yield {name: [torch.from_numpy(block) for block in column.blocks] for name, column in columns.items()}


def by_pyarrow(path):
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            yield {
                name: [torch.from_numpy(table[name].combine_chunks().flatten().to_numpy())]
                for name in table.column_names
            }


def first_of_all(windows):
    """Read to the end; return the first utterances of the first window for comparison."""
    first = None
    for tensors in windows:
        if first is None:
            first = [tensors[name][0].reshape(-1)[: COMPARED * 20 * d].clone() for name, d in PAPER_DIMS.items()]
    return first


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
        windows = functools.partial(by_ours, plan, verify=contestant == "ours")
    else:
        windows = functools.partial(by_pyarrow, root / f"{contestant.removeprefix('pyarrow, ')}.parquet")
    wanted = [torch.from_numpy(written[name].reshape(-1)) for name in PAPER_DIMS]
    contest(
        contestant,
        lambda: first_of_all(windows()),
        [Work(size, 0)],
        error=lambda found: harness.relative_error(found, wanted),
        allowed=0.0,
        samples=READ,
    )
