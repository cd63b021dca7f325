"""How fast features are extracted from recordings: their seconds over the CPU's seconds, per modality.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.extraction --speech SPEECH --face CLIP --face-model FILE \\
        --words VECTORS --out results.json

takes a folder of sound files, each with its transcript beside it (``.txt``), and a video of a face. The video is
measured at its own size and in frames of 640 × 360 and 1280 × 720, repeated until it takes 20 s: one recording each, as
the face's model is loaded per recording. What an extra brings is left out if the extra is not installed.

Time is that of the CPU, all threads of this process together, so that other work on the machine counts little; medians.
Imports and the first call are not timed. For each it reports

* ``seconds``: of recordings;
* ``times_real_time``: these by the CPU's seconds;
* ``frames``, ``features`` and ``missing``: the shape, and the share of frames without a value. Frames of the text are
  its words; a word is missing if it is unknown, and for the alignment, if its time is not found.
"""

import argparse
import importlib.metadata
import statistics
import tempfile
import time
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks.speed import harness
from m3er_fast.recordings import (
    EgemapsFeatures,
    FaceFeatures,
    ForcedAlignment,
    SoundFeatures,
    read_transcript,
    word_vectors,
)
from m3er_fast.recordings.decoding import Decoder, probe, read_pictures
from m3er_fast.recordings.run import MEDIA_SUFFIXES

SIZES = {"640 × 360": (640, 360), "1280 × 720": (1280, 720)}
VIDEO_SECONDS = 20
PACKAGES = ("av", "librosa", "mediapipe", "opensmile", "pocketsphinx")


def enlarge(clip, path, size):
    """Write the pictures of a clip in the middle of larger ones, as often as fit into VIDEO_SECONDS."""
    pictures = list(read_pictures(Decoder(clip, "video"), per_second=None, width=10_000))
    length = pictures[-1].time + pictures[1].time
    height, width, _ = pictures[0].pixels.shape
    scale = min(size[0] / width, size[1] / height)
    inner = round(width * scale), round(height * scale)
    left, top = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    clock = Fraction(1, 1000)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height = size
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        stream.codec_context.time_base = stream.time_base = clock
        for turn in range(max(1, round(VIDEO_SECONDS / length))):
            for picture in pictures:
                small = av.VideoFrame.from_ndarray(picture.pixels, format="rgb24")
                pixels = np.zeros((size[1], size[0], 3), np.uint8)
                large = small.reformat(width=inner[0], height=inner[1], interpolation="BICUBIC").to_ndarray()
                pixels[top : top + inner[1], left : left + inner[0]] = large
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = round((turn * length + picture.time) / clock), clock
                container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def table(result):
    """Return the table of docs/recordings_features.md."""
    rows = ["| | Recordings | Frames × features | Missing | Times real time |", "|---|---:|---:|---:|---:|"]
    for name, found in result["medians"].items():
        shape = f"{found['frames']:,} × {found['features']}"
        speed = found["times_real_time"]
        shown = f"{speed:.1f}" if speed < 20 else f"{speed:.0f}" if speed < 1000 else f"{round(speed, -3):,.0f}"
        rows.append(f"| {name} | {found['seconds']:.1f} s | {shape} | {100 * found['missing']:.0f} % | {shown} |")
    return "\n".join(rows)


def measured(step, files, rounds):
    """Return what is reported of a step, which takes one file and returns values with a row per frame."""
    step(files[0])
    times = []
    for _ in range(rounds):
        start = time.process_time()
        found = [step(file) for file in files]
        times.append(time.process_time() - start)
    seconds = sum(probe(file).seconds for file in files)
    values = np.concatenate(found)
    return {
        "seconds": round(seconds, 2),
        "times_real_time": seconds / statistics.median(times),
        "frames": len(values),
        "features": values.shape[1],
        "missing": float(np.isnan(values).any(axis=1).mean()),
        "cpu_seconds": times,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--speech", type=Path, required=True, help="folder of sound files with .txt beside them")
    parser.add_argument("--face", type=Path, required=True, help="video of a face")
    parser.add_argument("--face-model", type=Path, required=True, help="face_landmarker.task")
    parser.add_argument("--words", type=Path, required=True, help="file of word vectors, or folder of a static table")
    parser.add_argument("--face-fps", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=5, help="medians are reported")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    speech = sorted(path for path in options.speech.iterdir() if path.suffix in MEDIA_SUFFIXES)
    transcripts = {path: read_transcript(path.with_suffix(".txt")) for path in speech}
    sound, face = SoundFeatures(), FaceFeatures(options.face_fps, options.face_model)
    encoder = word_vectors(options.words)
    found = {}
    with threadpool_limits(1), tempfile.TemporaryDirectory() as scratch:

        def measure(name, step, files):
            found[name] = measured(step, files, options.rounds)

        measure("audio", lambda path: sound.extract(path).values, speech)
        if find_spec("opensmile"):
            egemaps = EgemapsFeatures()
            measure("audio, eGeMAPS", lambda path: egemaps.extract(path).values, speech)
        own = next(read_pictures(Decoder(options.face, "video"), per_second=None, width=10_000)).pixels.shape
        videos = {f"{own[1]} × {own[0]}": options.face} | {
            name: enlarge(options.face, Path(scratch) / f"{size[0]}.mp4", size) for name, size in SIZES.items()
        }
        for name, path in videos.items():
            measure(f"face, {name}", lambda path: face.extract(path).values, [path])
        measure("text", lambda path: encoder.encode([w.text for w in transcripts[path].words]), speech)
        if find_spec("pocketsphinx"):
            timer = ForcedAlignment()
            measure(
                "alignment",
                lambda path: np.array([w[1:] for w in timer.time(path, transcripts[path]).words]),
                speech,
            )
    result = {
        **harness.circumstances(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES if find_spec(name)},
        "face_fps": options.face_fps,
        "words": encoder.describe()["features"],
        "medians": found,
    }
    harness.write_json(result, options.out)


if __name__ == "__main__":
    main()
