"""Decoding: times by timestamps, damage counted and passed over, and memory that does not grow."""

import contextlib

import numpy as np
import pytest

av = pytest.importorskip("av")

from recording_files import RATE, grey, tone, write_recording  # noqa: E402

from m3er_fast.corpus.base import CorpusError  # noqa: E402
from m3er_fast.recordings.decoding import Decoder, probe, read_pictures, read_sound  # noqa: E402

ODD_TIMES = [0, 0.04, 0.08, 0.5, 0.52, 1.7, 3.0]


def pictures(path, per_second=None, width=640):
    decoder = Decoder(path, "video")
    return list(read_pictures(decoder, per_second=per_second, width=width)), decoder


def sound(path):
    decoder = Decoder(path, "audio")
    return list(read_sound(decoder)), decoder


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_pictures_of_a_variable_rate_have_the_times_they_show(tmp_path, suffix):
    path = write_recording(tmp_path / f"a{suffix}", times=ODD_TIMES)
    found, decoder = pictures(path)
    np.testing.assert_allclose([picture.time for picture in found], ODD_TIMES, atol=1e-3)
    shown = [picture.pixels.mean() / 10 for picture in found]
    np.testing.assert_allclose(shown, ODD_TIMES, atol=0.2)
    assert decoder.damaged == 0


@pytest.mark.parametrize(("suffix", "tolerance"), [(".wav", 1e-4), (".mov", 1e-4), (".mkv", 1e-4), (".mp4", None)])
def test_sound_is_what_was_recorded(tmp_path, suffix, tolerance):
    wanted = tone(2.0)
    found, decoder = sound(write_recording(tmp_path / f"a{suffix}", sound=wanted))
    assert [piece.continues for piece in found] == [False] + [True] * (len(found) - 1)
    assert found[0].start == pytest.approx(0, abs=0.01)
    assert decoder.end == pytest.approx(2, abs=0.1)
    samples = np.concatenate([piece.samples for piece in found])
    if tolerance is not None:  # AAC is lossy
        np.testing.assert_allclose(samples, wanted, atol=tolerance)


def test_sound_of_another_rate_and_of_two_channels_is_brought_to_one_of_ours(tmp_path):
    path = write_recording(tmp_path / "a.wav", sound=tone(1.0, rate=44_100), rate=44_100)
    found, _ = sound(path)
    samples = np.concatenate([piece.samples for piece in found])
    assert abs(len(samples) - RATE) < 50
    np.testing.assert_allclose(samples[100:-100], tone(1.0)[100 : len(samples) - 100], atol=0.02)


def test_sound_that_begins_late_has_its_own_times(tmp_path):
    path = write_recording(tmp_path / "a.mkv", sound=tone(1.0), times=[0, 0.04], sound_start=1.5)
    found, decoder = sound(path)
    assert found[0].start == pytest.approx(1.5, abs=1e-3)
    assert decoder.end == pytest.approx(2.5, abs=1e-3)


def test_a_gap_in_the_sound_stays_a_gap(tmp_path):
    whole = write_recording(tmp_path / "whole.mkv", sound=tone(3.0))
    path = tmp_path / "gap.mkv"
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(source.streams.audio[0]):
            if packet.pts is not None and not 1.0 <= packet.pts * packet.time_base < 2.0:
                packet.stream = stream
                target.mux(packet)
    found, _ = sound(path)
    starts = [piece.start for piece in found if not piece.continues]
    np.testing.assert_allclose(starts, [0, 2], atol=0.1)
    ends = np.array([piece.start + len(piece.samples) / RATE for piece in found])
    assert ends[ends < 2].max() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("rate", "per_second", "wanted"), [(25, 10, 20), (25, 25, 50), (30, 30, 60), (30, 7, 14), (25, None, 50)]
)
def test_pictures_per_second_are_limited(tmp_path, rate, per_second, wanted):
    path = write_recording(tmp_path / "a.mp4", times=np.arange(2 * rate) / rate)
    assert len(pictures(path, per_second)[0]) == wanted


def test_pictures_are_made_smaller_and_never_larger(tmp_path):
    path = write_recording(tmp_path / "a.mp4", times=[0.0], picture=lambda time: grey(time, (320, 180)))
    assert pictures(path, width=160)[0][0].pixels.shape == (90, 160, 3)
    assert pictures(path, width=640)[0][0].pixels.shape == (180, 320, 3)


def test_a_turned_telephone_gives_upright_pictures(tmp_path):
    def half(time):
        picture = grey(time, (64, 48))
        picture[:, :32] = 250  # the left half is bright
        return picture

    path = write_recording(tmp_path / "a.mp4", times=[0.0], picture=half)
    assert _turned(path, tmp_path / "b.mp4", 90).shape == (64, 48, 3)
    upright = _turned(path, tmp_path / "c.mp4", 0)
    for degrees in (90, 180, 270):
        turned = _turned(path, tmp_path / f"d{degrees}.mp4", degrees)
        np.testing.assert_allclose(turned, np.rot90(upright, degrees // 90), atol=8)


def _turned(path, copy, degrees):
    """Return the first picture of a copy whose header says that it is to be turned anticlockwise."""
    matrices = {0: (1, 0, 0, 1), 90: (0, -1, 1, 0), 180: (-1, 0, 0, -1), 270: (0, 1, -1, 0)}
    content = bytearray(path.read_bytes())
    place = content.rindex(b"tkhd") + 4 + 40  # version 0: the matrix follows 40 bytes of other fields
    a, b, c, d = matrices[degrees]
    fields = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    content[place : place + 36] = b"".join(field.to_bytes(4, "big", signed=True) for field in fields)
    copy.write_bytes(content)
    return pictures(copy)[0][0].pixels


def test_damaged_packets_are_counted_and_what_follows_is_decoded(tmp_path):
    path = write_recording(tmp_path / "a.mkv", sound=tone(4.0), times=np.arange(100) / 25, codec="mjpeg")
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][40]
        place, size = packet.pos, packet.size
    content = bytearray(path.read_bytes())
    content[place + 40 : place + size - 8] = bytes(size - 48)
    path.write_bytes(content)
    found, decoder = pictures(path)
    assert len(found) == 99
    assert decoder.damaged == 1
    assert found[-1].time == pytest.approx(3.96, abs=1e-3)


def test_a_file_that_ends_early_is_read_to_its_end(tmp_path):
    path = write_recording(tmp_path / "a.mkv", sound=tone(4.0), times=np.arange(100) / 25)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    claimed = probe(path).seconds
    found, decoder = pictures(path)
    assert claimed is None or claimed > decoder.end
    assert 10 < len(found) < 90


def test_every_cut_and_every_kind_of_noise_ends(tmp_path):
    """A damaged file is read in part, or refused by name: nothing else, and never without an end."""
    source = write_recording(tmp_path / "a.mp4", sound=tone(0.5), times=np.arange(12) / 25).read_bytes()
    generator = np.random.default_rng(0)
    path = tmp_path / "b.mp4"
    for trial in range(60):
        content = bytearray(source)
        if trial % 2:
            del content[generator.integers(len(content)) :]
        for place in generator.integers(0, max(1, len(content)), 30 if len(content) else 0):
            content[place] = generator.integers(256)
        path.write_bytes(content)
        for read in (pictures, sound):
            with contextlib.suppress(CorpusError):
                read(path)


@pytest.mark.parametrize("content", [b"", b"not a recording", bytes(5000)])
def test_what_is_no_recording_is_refused_by_name(tmp_path, content):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=r"a\.mp4 is no recording that FFmpeg reads"):
        probe(path)


def test_a_missing_index_is_refused_by_name(tmp_path):
    path = write_recording(tmp_path / "a.mp4", times=np.arange(12) / 25)
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b"moov") - 4])
    with pytest.raises(CorpusError, match=r"a\.mp4 is no recording that FFmpeg reads, or it is cut off"):
        probe(path)


def test_files_that_are_not_there_are_errors_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        probe(tmp_path / "none.mp4")


def test_headers(tmp_path):
    both = probe(write_recording(tmp_path / "a.mp4", sound=tone(1.0), times=np.arange(50) / 25))
    assert both[1:] == (True, True)
    assert both.seconds == pytest.approx(2, abs=0.1)
    assert probe(write_recording(tmp_path / "b.wav", sound=tone(1.0)))[1:] == (True, False)
    assert probe(write_recording(tmp_path / "c.mp4", times=[0, 0.04]))[1:] == (False, True)


def test_a_stream_that_is_missing_yields_nothing(tmp_path):
    assert sound(write_recording(tmp_path / "a.mp4", times=[0, 0.04]))[0] == []
    assert pictures(write_recording(tmp_path / "b.wav", sound=tone(0.1)))[0] == []


def test_the_cover_of_an_album_is_no_video(tmp_path):
    path = tmp_path / "a.mp3"
    with av.open(str(path), "w") as container:
        audio = container.add_stream("mp3", rate=RATE)
        audio.layout = "mono"
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(grey(3), format="rgb24")))
        container.mux(cover.encode(None))
        frame = av.AudioFrame.from_ndarray((tone(1.0)[None] * 32767).astype(np.int16), format="s16", layout="mono")
        frame.sample_rate = RATE
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    assert probe(path)[1:] == (True, False)
    assert pictures(path)[0] == []
