"""Recordings for the tests, made by PyAV: what a frame shows or a moment sounds like says when it was."""

from fractions import Fraction

import numpy as np

RATE = 16_000
CLOCK = Fraction(1, 1000)


def tone(seconds, hertz=200.0, level=0.3, rate=RATE):
    """A sine with some overtones, as a voice has."""
    time = np.arange(round(seconds * rate)) / rate
    return (level * sum(np.sin(2 * np.pi * hertz * k * time) / k for k in (1, 2, 3, 4)) / 2).astype(np.float32)


def grey(time, size=(64, 48)):
    """A picture whose brightness is 10 per second."""
    return np.full((size[1], size[0], 3), round(10 * time) % 256, dtype=np.uint8)


def write_recording(path, *, sound=None, times=None, picture=grey, sound_start=0.0, rate=RATE, codec="mpeg4"):
    """Write a recording with sound, or pictures at any times, or both.

    Args:
        path: its ending chooses the container.
        sound: samples of one channel, or None.
        times: seconds of each picture, or None.
        picture: function of a time.
        sound_start: seconds before the sound begins.
        rate: samples per second.
        codec: of the pictures.
    """
    import av

    with av.open(str(path), "w") as container:
        video = audio = None
        if times is not None:
            first = picture(times[0])
            video = container.add_stream(codec, rate=25)
            video.width, video.height = first.shape[1], first.shape[0]
            video.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            video.codec_context.time_base = CLOCK
            video.time_base = CLOCK
            video.bit_rate = 2_000_000
        if sound is not None:
            names = {
                ".wav": "pcm_s16le",
                ".avi": "pcm_s16le",
                ".mp4": "aac",
                ".mov": "pcm_s16le",
                ".mkv": "pcm_s16le",
                ".mp3": "mp3",
            }
            audio = container.add_stream(names[path.suffix], rate=rate)
            audio.layout = "mono"
        if video is not None:
            for time in times:
                frame = av.VideoFrame.from_ndarray(picture(time), format="rgb24")
                frame.pts, frame.time_base = round(time / CLOCK), CLOCK
                container.mux(video.encode(frame))
            container.mux(video.encode(None))
        if audio is not None:
            size = 1024
            for start in range(0, len(sound), size):
                block = (sound[start : start + size] * 32767).astype(np.int16)[None]
                frame = av.AudioFrame.from_ndarray(block, format="s16", layout="mono")
                frame.sample_rate = rate
                frame.pts, frame.time_base = start + round(sound_start * rate), Fraction(1, rate)
                container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return path
