"""The local runner: plan, read, score, write, one shard after the other in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from m3er_fast.corpus.base import CorpusError
from m3er_fast.corpus.parquet import read_table, shard_paths
from m3er_fast.fusion import M3ERFusion
from m3er_fast.scoring.output import OutputFolder, QuarantinedShard
from m3er_fast.scoring.scorer import Scorer


class ScoreProgress(NamedTuple):
    """How far a run is."""

    done: int  # shards, those of an earlier run and those in quarantine among them
    shards: int
    rows: int  # utterances scored so far, by an earlier run too


@dataclass(frozen=True)
class ScoreSummary:
    """What a run left in its folder."""

    rows: int  # utterances with scores, those of an earlier run among them
    shards: int  # files of the corpus
    resumed: int  # of them, those that an earlier run had finished
    quarantined: tuple[QuarantinedShard, ...]
    signature: str  # of the model
    seconds: float


def score(
    corpus: str | Path,
    model: M3ERFusion,
    out: str | Path,
    *,
    resume: bool = False,
    batch_size: int = 512,
    progress: Callable[[ScoreProgress], None] | None = None,
) -> ScoreSummary:
    """Score a Parquet corpus, with or without labels, into a folder of Parquet files, one a shard.

    A shard that cannot be read, or does not fit the model, goes to the quarantine list with the reason, and the others
    are scored. Every shard is held in memory as a whole.

    Args:
        corpus: a folder of Parquet files, or one file.
        model: with a fitted check, if it has one; it works on the device where it is.
        out: the folder to write to; :mod:`m3er_fast.scoring.output` says what it will hold.
        resume: go on with what an interrupted run left in ``out``; an empty or missing folder just starts.
        batch_size: utterances that go through the model at a time.
        progress: called after every shard.

    Raises:
        ValueError: there is no corpus, ``out`` is not empty and ``resume`` is False, the model does not fit any
            shard, or its check is not fitted.
        OutputMismatchError: ``out`` is to be resumed, but was made with another model, corpus or version.
        OSError: ``out`` cannot be written to, for example for lack of space. Finished shards stay.
    """
    start = time.perf_counter()
    shards = shard_paths(corpus)
    scorer = Scorer(model, batch_size=batch_size)
    output = OutputFolder(Path(out), shards, scorer.signature, resume=resume)
    _check_model_fits(shards, scorer)
    output.begin()
    rows = resumed = 0
    for done, shard in enumerate(shards, start=1):
        earlier = output.finished_rows(shard.name)
        if earlier is not None:
            resumed, rows = resumed + 1, rows + earlier
        else:
            rows += _score_shard(shard, scorer, output)
        if progress is not None:
            progress(ScoreProgress(done, len(shards), rows))
    output.finish()
    seconds = time.perf_counter() - start
    return ScoreSummary(rows, len(shards), resumed, tuple(output.quarantined), scorer.signature, seconds)


def load_model(path: str | Path) -> M3ERFusion:
    """Load a model from a local folder: what training wrote, or any ``save_pretrained`` made. In eval mode.

    Raises:
        ValueError: there is no such folder, or it holds no model that can be read. Nothing is looked up elsewhere.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder, wanted one that training or save_pretrained wrote")
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no model: it has no {name}")
    try:
        return M3ERFusion.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a damaged file makes the parsers of JSON and safetensors say
        raise ValueError(f"{folder} holds no model that can be read: {error}") from error


def _check_model_fits(shards: Sequence[Path], scorer: Scorer) -> None:
    """Raise if every shard with a readable schema contradicts the model: then it is the wrong model, not a bad shard.

    Stops at the first shard that fits.
    """
    import pyarrow as pa
    import pyarrow.parquet

    misfit: CorpusError | None = None
    for shard in shards:
        try:
            schema = pyarrow.parquet.read_schema(shard)
        except (pa.ArrowException, OSError, UnicodeDecodeError):  # the run will put it in quarantine
            continue
        try:
            scorer.score(schema.empty_table())
        except CorpusError as error:
            misfit = misfit or CorpusError(f"{shard}: {error}")
        else:
            return
    if misfit is not None:
        raise misfit


def _score_shard(shard: Path, scorer: Scorer, output: OutputFolder) -> int:
    """Write the scores of a shard, or put it in quarantine; returns the rows written."""
    try:
        scores = scorer.score(read_table(shard))
    except (CorpusError, UnicodeDecodeError) as error:  # the latter for the name of a column
        output.quarantine(shard.name, str(error))
        return 0
    output.write(shard.name, scores)
    return int(scores.num_rows)
