"""Corpora: readers for the field's feature files, this project's Parquet format, splits and audit."""

from m3er_fast.corpus.audit import AuditReport, ModalityAudit, audit_corpus
from m3er_fast.corpus.base import NO_LABEL, SPLITS, Corpus, CorpusError, concatenate
from m3er_fast.corpus.convert import FORMATS, Format, convert, describe_formats, read
from m3er_fast.corpus.generate import generate_corpus
from m3er_fast.corpus.parquet import (
    TableFeatures,
    features_from_table,
    read_parquet,
    read_table,
    shard_paths,
    write_parquet,
)
from m3er_fast.corpus.splits import ensure_validation, split_by_group

__all__ = [
    "FORMATS",
    "NO_LABEL",
    "SPLITS",
    "AuditReport",
    "Corpus",
    "CorpusError",
    "Format",
    "ModalityAudit",
    "TableFeatures",
    "audit_corpus",
    "concatenate",
    "convert",
    "describe_formats",
    "ensure_validation",
    "features_from_table",
    "generate_corpus",
    "read",
    "read_parquet",
    "read_table",
    "shard_paths",
    "split_by_group",
    "write_parquet",
]
