"""Training with early stopping, which resumes after an interruption with the same result."""

from m3er_fast.evaluation import Prediction, check_modalities, evaluate
from m3er_fast.training.data import class_weights
from m3er_fast.training.fingerprint import ResumeMismatchError
from m3er_fast.training.logs import CsvLog, TensorBoardLog
from m3er_fast.training.loop import EpochRecord, TrainingError
from m3er_fast.training.output import HISTORY_FILE, HISTORY_PLOT
from m3er_fast.training.run import TrainingResult, default_config, train
from m3er_fast.training.search_space import SearchSpace
from m3er_fast.training.state import CHECKPOINT_FILE
from m3er_fast.training.stream import StreamedCorpus, fits_into_memory
from m3er_fast.training.tuning import Trial, TuningResult, tune

__all__ = [
    "CHECKPOINT_FILE",
    "HISTORY_FILE",
    "HISTORY_PLOT",
    "CsvLog",
    "EpochRecord",
    "Prediction",
    "ResumeMismatchError",
    "SearchSpace",
    "StreamedCorpus",
    "TensorBoardLog",
    "TrainingError",
    "TrainingResult",
    "Trial",
    "TuningResult",
    "check_modalities",
    "class_weights",
    "default_config",
    "evaluate",
    "fits_into_memory",
    "train",
    "tune",
]
