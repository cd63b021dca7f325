"""From recordings to a corpus: sound, face and words of videos, as features of utterances.

The extractors of this package need ``pip install 'm3er-fast[extract]'``; one of your own needs two methods
(:class:`FrameExtractor`, :class:`WordEncoder`). Predicting a recording is in :mod:`m3er_fast.recordings.prediction`,
which imports torch: the processes that extract need no torch.
"""

from m3er_fast.recordings.egemaps import EgemapsFeatures
from m3er_fast.recordings.face import FaceFeatures
from m3er_fast.recordings.face_files import FaceFiles
from m3er_fast.recordings.frames import FrameExtractor, Frames, ReadsFiles, means_within
from m3er_fast.recordings.recognition import SpeechRecogniser, WhisperRecogniser
from m3er_fast.recordings.run import ExtractProgress, ExtractSummary, extract
from m3er_fast.recordings.sound import SoundFeatures
from m3er_fast.recordings.speech import ForcedAlignment, WordTimer
from m3er_fast.recordings.utterances import Extracted, Steps, Utterance, extract_recording
from m3er_fast.recordings.word_vectors import StaticTable, TextVectors, WordEncoder, word_vectors
from m3er_fast.recordings.words import Cue, Transcript, Word, read_transcript, with_times

__all__ = [
    "Cue",
    "EgemapsFeatures",
    "ExtractProgress",
    "ExtractSummary",
    "Extracted",
    "FaceFeatures",
    "FaceFiles",
    "ForcedAlignment",
    "FrameExtractor",
    "Frames",
    "ReadsFiles",
    "SoundFeatures",
    "SpeechRecogniser",
    "StaticTable",
    "Steps",
    "TextVectors",
    "Transcript",
    "Utterance",
    "WhisperRecogniser",
    "Word",
    "WordEncoder",
    "WordTimer",
    "extract",
    "extract_recording",
    "means_within",
    "read_transcript",
    "with_times",
    "word_vectors",
]
