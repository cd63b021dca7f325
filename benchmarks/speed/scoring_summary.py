"""Rate of the summary of a run, computed from score files.

    python -m benchmarks.speed.scoring_summary --out results.json

generates scores of six classes and three modalities, and a corpus that has only groups, in a temporary folder, for
shards of several sizes. For each size it reports utterances and shards per second in this process, which counts in four
threads.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.speed import harness
from m3er_fast import M3ERConfig, M3ERFusion
from m3er_fast.scoring import Scorer
from m3er_fast.scoring.output import OutputFolder
from m3er_fast.scoring.shard import ScoringJob
from m3er_fast.scoring.summary import RunRecord, write_summary
from m3er_fast.shards.plan import locate, plan_shards

KINDS = {"1 per shard": (2000, 1), "8192 per shard": (60, 8192), "131072 per shard": (4, 131072)}
PER_GROUP = 50


def make_scores(root, shards, rows):
    """Return a job whose shards are all scored."""
    scorer = Scorer(M3ERFusion({"text": 3, "audio": 3, "face": 2}, 6, M3ERConfig(check=None)), batch_frames=64)
    (root / "corpus").mkdir(parents=True)
    for shard in range(shards):
        group = pa.array((np.arange(rows) + shard * rows) // PER_GROUP).cast(pa.string())
        pq.write_table(pa.table({"group": group}), root / "corpus" / f"part-{shard:05d}.parquet")
    plan = plan_shards(root / "corpus")
    job = ScoringJob(plan, OutputFolder(locate(root / "scores"), plan.shards, scorer.signature, {}))
    job.output.begin(resume=False)
    rng = np.random.default_rng(0)
    for shard in plan.shards:
        columns = []
        for field in scorer.schema:
            if field.name == "error":
                columns.append(pa.nulls(rows, field.type))
            elif pa.types.is_boolean(field.type):
                columns.append(pa.array(rng.random(rows) < 0.1))
            elif pa.types.is_string(field.type):
                columns.append(pa.array(rng.integers(6, size=rows)).cast(pa.string()))
            else:
                columns.append(pa.array(rng.random(rows, np.float32)))
        with job.output.writer(shard, scorer.schema) as writer:
            writer.write(pa.Table.from_arrays(columns, schema=scorer.schema))
    return job


def measure(job, rows):
    """Return the seconds of one summary."""
    start = time.perf_counter()
    write_summary(job, {shard.name: rows for shard in job.plan.shards}, (), RunRecord("local", 0, 0.0, 0, ""))
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="of all sizes in turn; medians are reported")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        jobs = {kind: make_scores(Path(scratch) / kind, *size) for kind, size in KINDS.items()}
        found = {kind: [] for kind in KINDS}
        for _ in range(options.rounds):
            for kind, job in jobs.items():
                found[kind].append(measure(job, KINDS[kind][1]))
    results = {}
    for kind, (shards, rows) in KINDS.items():
        seconds = statistics.median(found[kind])
        results[kind] = {
            "shards": shards,
            "seconds": seconds,
            "shards_per_second": shards / seconds,
            "utterances_per_second": shards * rows / seconds,
        }
    report = {
        **harness.circumstances(),
        "pyarrow": pa.__version__,
        "medians": results,
        "seconds": found,
    }
    harness.write_json(report, options.out)


if __name__ == "__main__":
    main()
