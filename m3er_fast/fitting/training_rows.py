"""Reading the training utterances of a corpus, shard by shard.

Dimension legend: B utterances of a batch, M modalities, T time steps, d features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from m3er_fast.corpus.base import CorpusError, naming, order_modalities
from m3er_fast.corpus.files import decoding
from m3er_fast.corpus.parquet import DecodedRows, decode_rows, modality_columns, read_splits
from m3er_fast.inputs import check_input_dims
from m3er_fast.shards.page_cache import drop_from_page_cache, outgrows_page_cache
from m3er_fast.shards.plan import Location, Plan, Shard
from m3er_fast.shards.prefetch import Prefetch
from m3er_fast.shards.reader import read_schema, read_windows

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_FRAMES = 2**13
"""Frames of a batch, padding included: 13 MB with 410 features. Twice as many took longer, half as many as long."""

_FIRST_BYTES = 2**20  # read of a shard whose schema does not say how many features a frame has
_THREADS = 16  # reading schemas waits for storage, not for a core


class RowBatch(NamedTuple):
    """Consecutive utterances in the form that a model accepts."""

    features: dict[str, np.ndarray]  # modality -> (B, T, d) float32
    lengths: np.ndarray  # (B,) int64
    available: np.ndarray  # (B, M) bool


class TrainingReader(NamedTuple):
    """Reads the training utterances of shards. It can be pickled."""

    corpus: Location
    input_dims: dict[str, int]
    has_splits: bool
    keep_cached: bool = True  # leave the files that were read in the page cache

    def read(self, shard: Shard) -> Iterator[DecodedRows]:
        """Yield the training utterances of a shard, some rows at a time.

        Raises:
            CorpusError: the shard cannot be read.
        """
        extra = [*self.input_dims, *(["split"] if self.has_splits else [])]
        windows = read_windows(self.corpus, shard, extra_columns=extra, check=self._check_schema)
        with naming(shard.name), Prefetch(windows) as tables:
            for table in tables:
                with decoding(shard.name, "not readable"):
                    if self.has_splits:
                        table = table.filter(read_splits(table) == "train")
                    rows = decode_rows(table, self.input_dims)
                yield rows
        if not self.keep_cached:
            drop_from_page_cache(shard)

    def _check_schema(self, schema: pa.Schema) -> None:
        unknown = [name for name in modality_columns(schema) if name not in self.input_dims]
        if unknown:
            raise CorpusError(f"holds modalities {unknown}, wanted some of {list(self.input_dims)}")
        if self.has_splits and "split" not in schema.names:
            raise CorpusError("there is no column 'split', which other shards have")
        decode_rows(schema.empty_table(), self.input_dims)


def cut_batches(rows: DecodedRows) -> Iterator[RowBatch]:
    """Yield the readable rows in batches of consecutive rows, each padded to its longest row."""
    readable = np.setdiff1d(np.arange(len(rows.lengths)), list(rows.problems))
    start, longest = 0, 1
    for stop, length in enumerate((*rows.lengths[readable].tolist(), None)):
        if length is None or max(longest, length) * (stop + 1 - start) > BATCH_FRAMES:
            if stop > start:
                chosen = readable[start:stop]
                features = {name: column.padded(chosen, longest) for name, column in rows.columns.items()}
                yield RowBatch(features, rows.lengths[chosen], rows.available[chosen])
            start, longest = stop, 1
        longest = max(longest, length or 1)


def make_reader(plan: Plan, input_dims: Mapping[str, int] | None) -> TrainingReader:
    """Return a reader for a corpus, after determining its modalities and whether it has splits.

    Raises:
        CorpusError: no shard can be read, only some shards have splits, or there is only one modality.
        ValueError: ``input_dims`` are out of range.
    """
    input_dims = None if input_dims is None else check_input_dims(input_dims)
    with ThreadPoolExecutor(_THREADS) as pool:
        schemas = list(pool.map(partial(_read_shard_schema, plan.corpus, known=input_dims), plan.shards))
    readable = [schema for schema in schemas if isinstance(schema, _ShardSchema)]
    if not readable:
        raise CorpusError(f"{plan.corpus}: none of its {len(plan.shards)} shards can be read; {schemas[0]}")
    if len({schema.has_splits for schema in readable}) > 1:
        raise CorpusError(f"{plan.corpus}: only some of the shards have splits")
    dims = input_dims or _agree_on_dims([schema.input_dims for schema in readable])
    if len(dims) < 2:
        raise CorpusError(f"{plan.corpus}: fusion needs two modalities or more, got {dims}")
    return TrainingReader(plan.corpus, dims, readable[0].has_splits, keep_cached=not outgrows_page_cache(plan))


def _agree_on_dims(shards: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Return all modalities, each with the feature count of most shards; shards with another one cannot be read."""
    votes: dict[str, Counter[int]] = {}
    for dims in shards:
        for name, dim in dims.items():
            votes.setdefault(name, Counter())[dim] += 1
    names = list(shards[0])
    if any(list(dims) != names for dims in shards):
        names = order_modalities(votes)
    return {name: votes[name].most_common(1)[0][0] for name in names}


class _ShardSchema(NamedTuple):
    """The modalities of a shard, and whether it has splits."""

    input_dims: dict[str, int]
    has_splits: bool


def _read_shard_schema(corpus: Location, shard: Shard, known: Mapping[str, int] | None) -> _ShardSchema | CorpusError:
    schema = read_schema(corpus, shard)
    if schema is None:
        return CorpusError(f"{shard.name}: not readable")
    try:
        with naming(shard.name), decoding(shard.name, "not readable"):
            try:
                rows = decode_rows(schema.empty_table(), known)
            except CorpusError:  # the width of lists of lists is known from their rows only
                rows = decode_rows(next(read_windows(corpus, shard, window_bytes=_FIRST_BYTES)), known)
    except CorpusError as error:
        return error
    return _ShardSchema({name: column.dim for name, column in rows.columns.items()}, "split" in schema.names)
