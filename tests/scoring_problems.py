"""Corpora, models and folders that the tests of scoring and fitting share."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from m3er_fast import M3ERFusion
from m3er_fast.corpus.synthetic import make_synthetic
from m3er_fast.scoring.output import OutputFolder
from m3er_fast.scoring.shard import ScoringJob
from m3er_fast.shards.plan import locate, plan_shards

DIMS = {"text": 6, "audio": 5, "face": 4}


def make_corpus(rows, **options):
    """A small synthetic corpus of three modalities and three classes."""
    return make_synthetic(rows, **{"input_dims": DIMS, "num_classes": 3, "steps": 4, "latent_dim": 4, **options})


def fitted_model(corpus, config=None, *, seed=0, classes=None):
    """An untrained model in eval mode, fitted to a corpus."""
    torch.manual_seed(seed)
    model = M3ERFusion(corpus.input_dims, len(corpus.classes), config, classes=classes or corpus.classes).eval()
    return model.fit(corpus.features, lengths=corpus.lengths, available=corpus.available)


def read_scores(folder):
    """All scores of a folder in one table."""
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("*.parquet"))])


def probabilities(table, corpus):
    """(N, C) probabilities in the order of the corpus's classes."""
    return np.stack([table[f"p_{name}"].to_numpy() for name in corpus.classes], axis=1)


def with_column(table, name, column):
    """The table with a column replaced."""
    return table.set_column(table.column_names.index(name), name, column)


def edit_shard(path, edit):
    """Rewrite a Parquet file with an edited table."""
    pq.write_table(edit(pq.read_table(path)), path)


def scoring_job(corpus_dir, out, signature="", **options):
    """The job of scoring a folder into another."""
    plan = plan_shards(corpus_dir)
    return ScoringJob(plan, OutputFolder(locate(out), plan.shards, signature, {}), **options)
