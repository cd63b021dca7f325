"""Scoring corpora: plan, read, score, write, with one scorer of Arrow tables and runners that share all of it."""

from m3er_fast.scoring.model import load_model, model_signature
from m3er_fast.scoring.output import OutputMismatchError, QuarantinedShard
from m3er_fast.scoring.run import ScoreProgress, ScoreSummary, iter_scores, score
from m3er_fast.scoring.scorer import Scorer
from m3er_fast.scoring.shard import ShardResult
from m3er_fast.scoring.utterance import UtteranceScores, predict

__all__ = [
    "OutputMismatchError",
    "QuarantinedShard",
    "ScoreProgress",
    "ScoreSummary",
    "Scorer",
    "ShardResult",
    "UtteranceScores",
    "iter_scores",
    "load_model",
    "model_signature",
    "predict",
    "score",
]
