"""Scoring corpora: a scorer of Arrow tables, and the local runner that reads, scores and writes shard by shard."""

from m3er_fast.scoring.local import ScoreProgress, ScoreSummary, load_model, score
from m3er_fast.scoring.output import OutputMismatchError, QuarantinedShard
from m3er_fast.scoring.scorer import Scorer
from m3er_fast.scoring.signature import model_signature

__all__ = [
    "OutputMismatchError",
    "QuarantinedShard",
    "ScoreProgress",
    "ScoreSummary",
    "Scorer",
    "load_model",
    "model_signature",
    "score",
]
