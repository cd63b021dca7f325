"""Scoring corpora of any size: plan, read, score, write.

:func:`fit_statistics` fits a model's standardiser, check and proxies to a corpus of that size.
"""

from m3er_fast.execution.run_folder import OutputMismatchError
from m3er_fast.fitting.fit import FitProgress, fit_statistics
from m3er_fast.fitting.statistics import ModelStatistics
from m3er_fast.scoring.model import load_model, model_signature
from m3er_fast.scoring.run import ScoreProgress, ScoreSummary, iter_scores, score
from m3er_fast.scoring.scorer import Scorer
from m3er_fast.scoring.shard import ShardResult
from m3er_fast.scoring.utterance import UtteranceScores, predict
from m3er_fast.shards.plan import QuarantinedShard

__all__ = [
    "FitProgress",
    "ModelStatistics",
    "OutputMismatchError",
    "QuarantinedShard",
    "ScoreProgress",
    "ScoreSummary",
    "Scorer",
    "ShardResult",
    "UtteranceScores",
    "fit_statistics",
    "iter_scores",
    "load_model",
    "model_signature",
    "predict",
    "score",
]
