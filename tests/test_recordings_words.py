"""Transcripts as other tools write them, and the times of words that have none."""

import json
import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from m3er_fast.corpus.base import CorpusError
from m3er_fast.recordings.words import Cue, Transcript, Word, read_transcript, split_words, with_times

NAN = math.nan


def read(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return read_transcript(path)


def said(transcript):
    return [(word.text, round(word.start, 3), round(word.end, 3)) for word in transcript.words]


def texts(transcript):
    return [word.text for word in transcript.words]


def test_csv_with_times_in_any_order(tmp_path):
    found = read(tmp_path, "a.csv", "start,end,Word\n1.5,2,world\n0.25,1,Hello\n")
    assert said(found) == [("Hello", 0.25, 1.0), ("world", 1.5, 2.0)]
    assert found.cues[0][:2] == (0.25, 2.0)


def test_csv_without_times_or_with_some(tmp_path):
    assert said(read(tmp_path, "a.csv", "word\nhello\n\nworld\n"))[0][0] == "hello"
    found = with_times(read(tmp_path, "b.csv", "word,start,end\na,,\nb,1,2\nc,,\n"), 4.0)
    assert said(found) == [("a", 0, 1), ("b", 1, 2), ("c", 2, 4)]


def test_csv_by_excel_has_a_mark_and_quotes(tmp_path):
    assert texts(read(tmp_path, "a.csv", '\ufeffword,start,end\n"it""s",0,1\n')) == ['it"s']


VTT = """WEBVTT

00:00:01.000 --> 00:00:02.500
<v Anna>Hello <i>there</i>

00:00:03.000 --> 00:00:04.000
[music] (laughs)

00:01:00.000 --> 00:01:01.000
- Bye.
"""


def test_vtt(tmp_path):
    found = read(tmp_path, "a.vtt", VTT)
    assert [cue[:2] for cue in found.cues] == [(1.0, 2.5), (60.0, 61.0)]
    assert said(with_times(found, 100.0)) == [("Hello", 1.0, 1.75), ("there", 1.75, 2.5), ("Bye.", 60.0, 61.0)]


def test_captions_that_roll_say_each_word_once(tmp_path):
    found = read(
        tmp_path,
        "a.vtt",
        "WEBVTT\n\n00:00:00.000 --> 00:00:02.000\n \nso<00:00:00.500><c> we</c><00:00:01.250><c> begin</c>\n\n"
        "00:00:02.000 --> 00:00:02.010\nso we begin\n \n\n"
        "00:00:02.010 --> 00:00:04.000\nso we begin\nhere<00:00:03.000><c> now</c>\n",
    )
    assert said(found) == [
        ("so", 0, 0.5),
        ("we", 0.5, 1.25),
        ("begin", 1.25, 2),
        ("here", 2.01, 3),
        ("now", 3, 4),
    ]


SRT = """1
00:00:01,000 --> 00:00:02,000
Hello
world

2
00:00:03,000 --> 00:00:05,500
Bye
"""


def test_srt(tmp_path):
    found = read(tmp_path, "a.srt", SRT)
    assert [(cue.start, cue.end, len(cue.words)) for cue in found.cues] == [(1, 2, 2), (3, 5.5, 1)]


TEXTGRID = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 2
tiers? <exists>
size = 2
item []:
    item [1]:
        class = "IntervalTier"
        name = "phones"
        xmin = 0
        xmax = 2
        intervals: size = 1
        intervals [1]:
            xmin = 0
            xmax = 2
            text = "AH"
    item [2]:
        class = "IntervalTier"
        name = "Words"
        xmin = 0
        xmax = 2
        intervals: size = 3
        intervals [1]:
            xmin = 0
            xmax = 0.5
            text = ""
        intervals [2]:
            xmin = 0.5
            xmax = 1
            text = "hello"
        intervals [3]:
            xmin = 1
            xmax = 2
            text = "world"
"""


def test_textgrid(tmp_path):
    pytest.importorskip("praatio")
    assert said(read(tmp_path, "a.TextGrid", TEXTGRID)) == [("hello", 0.5, 1.0), ("world", 1.0, 2.0)]


def test_ctm(tmp_path):
    found = read(tmp_path, "a.ctm", ";; comment\nfile 1 0.5 0.25 hello 0.9\nfile 1 1.0 0.5 world\n")
    assert said(found) == [("hello", 0.5, 0.75), ("world", 1.0, 1.5)]


def test_whisper(tmp_path):
    words = [{"word": " Hello", "start": 0.1, "end": 0.5}, {"word": " there"}]
    segments = [
        {"start": 0, "end": 2, "text": " Hello there", "words": words},
        {"start": 3, "end": 4, "text": " Bye [music]"},
    ]
    found = with_times(read(tmp_path, "a.json", json.dumps({"segments": segments})), 9.0)
    assert said(found) == [("Hello", 0.1, 0.5), ("there", 0.5, 2.0), ("Bye", 3.0, 4.0)]
    assert [cue[:2] for cue in found.cues] == [(0, 2), (3, 4)]


def test_plain_words_share_the_recording_by_their_letters(tmp_path):
    found = with_times(read(tmp_path, "a.txt", "a bbb\n"), 8.0)
    assert said(found) == [("a", 0, 2), ("bbb", 2, 8)]


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.vtt", "a.srt", "a.ctm", "a.json"])
def test_empty_transcripts_have_no_words(tmp_path, name):
    content = {"a.csv": "word\n", "a.vtt": "WEBVTT\n", "a.json": '{"segments": []}'}.get(name, "")
    found = read(tmp_path, name, content)
    assert found.words == ()
    assert with_times(found, 3.0).words == ()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.doc", "x", r"a\.doc is no transcript: the name must end with \.textgrid, \.ctm"),
        ("a.csv", "token\nx\n", "columns must be word, start and end, got token"),
        ("a.csv", "word,start,end\nx,soon,2\n", r"a\.csv: line 2: a time must be a number of seconds, got 'soon'"),
        ("a.ctm", "file 1 0.5 hello\n", "line 1: wanted file, channel, start, duration and word"),
        ("a.json", "{}", "a list 'segments'"),
        ("a.json", "{", "a.json"),
        ("a.vtt", "not captions", "a.vtt"),
        ("a.txt", None, "a.txt"),
    ],
)
def test_bad_transcripts_are_refused_by_name(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(b"\xff\xfe\xfd" if content is None else content.encode())
    with pytest.raises(CorpusError, match=message):
        read_transcript(path)


def test_words_that_end_before_they_start_have_no_time():
    transcript = Transcript((Cue(0, 4, (Word("a", 0, 1), Word("b", 3, 2), Word("c", 3, 4))),))
    assert said(with_times(transcript, 4.0)) == [("a", 0, 1), ("b", 1, 3), ("c", 3, 4)]


def test_markup_and_noises_are_no_words():
    line = "<i>Well</i>, {\\an8}it's [MUSIC] (laughs) -- fine - ♪ 3 o'clock"
    assert split_words(line) == ["Well", "it's", "fine", "3", "o'clock"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.text("abc", min_size=1, max_size=4), st.none() | st.floats(0, 8)), max_size=8))
def test_every_word_gets_a_time_within_its_cue_and_keeps_its_own(words):
    given_words = tuple(
        Word(text, NAN if start is None else start, NAN if start is None else start + 1) for text, start in words
    )
    found = with_times(Transcript((Cue(0.0, 9.0, given_words),)), 100.0).words
    assert [word.text for word in found] == [word.text for word in given_words]
    for got, want in zip(found, given_words, strict=True):
        assert 0 <= got.start <= got.end <= 9
        if want.timed:
            assert got == want
    assert not np.isnan([word[1:] for word in found]).any()
