"""Extractors for the tests, which can be sent to other processes and need no library."""

import hashlib
import math
import os
import time

import numpy as np

from m3er_fast.recordings.decoding import SAMPLE_RATE, Decoder, read_pictures, read_sound, sound_within
from m3er_fast.recordings.frames import Frames
from m3er_fast.recordings.words import Cue, Transcript, Word


class Loudness:
    """The mean square of each piece of sound.

    Args:
        scale: of the features.
        ends_process: part of the name of a recording that ends the process, as a decoder's fault does.
        wait: seconds for each recording.
    """

    dimension = 1

    def __init__(self, scale=1, ends_process=None, wait=0):
        self.scale, self.ends_process, self.wait = scale, ends_process, wait

    def describe(self):
        return {"features": "loudness", "scale": self.scale}

    def extract(self, recording):
        if self.ends_process is not None and self.ends_process in recording.stem:
            os._exit(11)
        time.sleep(self.wait)
        decoder = Decoder(recording, "audio")
        pieces = [piece for piece in read_sound(decoder) if len(piece.samples)]
        if not pieces:
            return None
        times = np.array([piece.start + len(piece.samples) / SAMPLE_RATE / 2 for piece in pieces])
        values = np.array([[self.scale * np.mean(piece.samples**2)] for piece in pieces], dtype=np.float32)
        return Frames(times, values, {"seconds": decoder.end, "damaged_packets": decoder.damaged})


class QuickSound(Loudness):
    """Stands in for the features of sound, which take seconds to import."""

    def describe(self):
        return {"features": "librosa", "version": "1", "scale": self.scale}


class Times:
    """The time of each picture."""

    dimension = 1

    def describe(self):
        return {"features": "times"}

    def extract(self, recording):
        decoder = Decoder(recording, "video")
        times = np.array([picture.time for picture in read_pictures(decoder, per_second=None, width=64)])
        if not len(times):
            return None
        report = {"seconds": decoder.end, "damaged_packets": decoder.damaged}
        return Frames(times, times[:, None].astype(np.float32), report)


class Letters:
    """A word's length; words of one letter are unknown."""

    dimension = 1

    def describe(self):
        return {"features": "letters"}

    def encode(self, words):
        return np.array([[len(word) if len(word) > 1 else np.nan] for word in words], np.float32).reshape(-1, 1)


class Listener:
    """Hears two words in a recording that is loud, and none in silence."""

    def describe(self):
        return {"words": "loud"}

    def transcribe(self, recording):
        if not sound_within(recording, 0.0, math.inf).any():
            return Transcript(())
        return Transcript((Cue(0.0, 1.0, (Word("hello", 0.0, 0.5), Word("there.", 0.5, 1.0))),))


def contents(folder):
    """The bytes of every file of a run but the summary, which tells times."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if not path.name.startswith("_summary")
    }
