"""Every command of docs/reproduce.md runs, on small files built to the structure in which the corpora are published."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from corpus_fixtures import iemocap_members, mmsa_fold, mult_fold, save_csd, write_pickle

from m3er_fast.cli import main
from m3er_fast.corpus import read_parquet

pytest.importorskip("h5py")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "reproduce.md"
QUICK = {"ablate": ["--epochs", "1", "--seeds", "1", "--no-baselines"], "extract": ["--face", "none"]}
NAMES = ["sentiment", "happy", "sad", "anger", "surprise", "disgust", "fear"]
SECTIONS = ("CMU-MOSEI", "Sentiment", "IEMOCAP", "Six emotions", "From the videos")


def blocks(language, heading=None):
    """Return the blocks of a language, of the page or of one section."""
    text = PAGE.read_text(encoding="utf-8")
    if heading is not None:
        text = text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run(heading):
    """Run the commands of a section; trainings are short, and no picture is searched for a face."""
    for line in "".join(blocks("console", heading)).splitlines():
        words = shlex.split(line)
        assert words[0] == "m3er-fast"
        assert main([*words[1:], *QUICK.get(words[1], [])]) == 0, line


def table_of(name):
    return (Path("runs") / name / "table.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_mosei(folder, videos=20):
    """Write the SDK's four files: words, sound at another rate, one face per second, and seven columns of labels."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = [f"video{number:02d}" for number in range(videos)]
    halves = [[i / 2, (i + 1) / 2] for i in range(12)]
    whole = [[i, i + 1] for i in range(6)]
    labels = rng.integers(0, 2, (videos, 2, 7)).astype(float)

    def entries(width, intervals):
        return {name: (rng.standard_normal((len(intervals), width)), intervals) for name in names}

    save_csd(folder, "CMU_MOSEI_TimestampedWordVectors", "glove_vectors", entries(5, halves))
    save_csd(folder, "CMU_MOSEI_COVAREP", "COVAREP", entries(4, halves))
    save_csd(folder, "CMU_MOSEI_VisualFacet42", "FACET 4.2", entries(3, whole))
    rows = {name: (row, [[0, 3], [3, 6]]) for name, row in zip(names, labels, strict=True)}
    save_csd(folder, "CMU_MOSEI_Labels", "All Labels", rows, {"dimension names": NAMES})


def test_cmu_mosei_from_the_files_of_the_sdk():
    make_mosei(Path("mosei"))
    run("CMU-MOSEI")
    assert all(name in table_of("mosei-table") for name in NAMES[1:])


def test_sentiment_from_pickles():
    size = 12
    folds = {
        name: mmsa_fold(
            rows=size,
            seed=seed,
            annotations=["Positive", "Negative", "Neutral"] * 4,
            classification_labels=np.array([2.0, 0.0, 1.0] * 4),
            regression_labels=np.array([1.5, -0.5, 0.0] * 4),
        )
        for seed, name in enumerate(("train", "valid", "test"))
    }
    write_pickle(Path("mosei_unaligned.pkl"), folds)
    scores = np.array([1.5, -0.5, 0.0] * 4)[:, None, None]
    mult = {name: mult_fold(scores, rows=size, seed=seed) for seed, name in enumerate(("train", "valid", "test"))}
    write_pickle(Path("mosei_senti_data.pkl"), mult)
    run("Sentiment")
    for name in ("mosei-sentiment-table", "mosei-mult-table"):
        assert "neutral F1" in table_of(name)


def test_iemocap_from_the_pickle_of_mult():
    answers = np.random.default_rng(0).integers(0, 2, (16, 4))
    answers[:2] = [[0] * 4, [1] * 4]  # every answer occurs
    folds = {
        name: mult_fold(np.eye(2)[answers], rows=16, seed=seed) for seed, name in enumerate(("train", "valid", "test"))
    }
    write_pickle(Path("iemocap_data.pkl"), folds)
    run("IEMOCAP")
    assert all(f"{name} F1" in table_of("iemocap-table") for name in ("neutral", "happy", "sad", "angry"))


def test_iemocap_from_the_pickle_of_conversations():
    write_pickle(Path("iemocap_features.pkl"), iemocap_members(), protocol=2)
    run("Six emotions")
    assert "frustrated F1" in table_of("iemocap-six-table")


CODES = ("ang", "hap", "neu", "sad", "exc", "xxx")


def make_release(release):
    """Write IEMOCAP's folders: a dialogue of two turns per emotion and session, one of them without agreement."""
    from recording_files import tone, write_recording

    for session in range(1, 6):
        name = f"Ses0{session}F_impro01"
        dialog = release / f"Session{session}" / "dialog"
        for folder in ("avi/DivX", "EmoEvaluation", "transcriptions"):
            (dialog / folder).mkdir(parents=True)
        turns = [f"{name}_{speaker}{number:03d}" for number in range(len(CODES)) for speaker in "FM"]
        times = [(0.3 * i, 0.3 * i + 0.3) for i in range(len(turns))]
        write_recording(dialog / "avi" / "DivX" / f"{name}.avi", sound=tone(4.0), times=np.arange(0, 4, 0.2))
        spoken = [f"{t} [{a:08.4f}-{b:08.4f}]: Excuse me.\n" for t, (a, b) in zip(turns, times, strict=True)]
        (dialog / "transcriptions" / f"{name}.txt").write_text("".join(spoken))
        judged = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"]
        for number, (turn, (start, end)) in enumerate(zip(turns, times, strict=True)):
            judged.append(f"[{start:.4f} - {end:.4f}]\t{turn}\t{CODES[number // 2]}\t[2.5000, 2.5000, 2.5000]\n")
            judged.append("C-E2:\tNeutral;\t()\n")
        (dialog / "EmoEvaluation" / f"{name}.txt").write_text("".join(judged))


def test_iemocap_from_its_videos():
    pytest.importorskip("av")
    pytest.importorskip("librosa")
    make_release(Path("IEMOCAP_full_release"))
    Path("glove.6B.300d.txt").write_text("excuse 1 2 3\nme 4 5 6\n")
    namespace = {}
    [code] = blocks("python")
    exec(compile(code, str(PAGE), "exec"), namespace)
    namespace["lay_out"](Path("IEMOCAP_full_release"), Path("recordings"), "labels.csv")
    run("From the videos")
    corpus = read_parquet("corpora/iemocap-videos")
    assert sorted(corpus.classes) == ["angry", "happy", "neutral", "sad"]
    assert len(corpus) == 5 * 2 * (len(CODES) - 1)
    assert {group: set(corpus.split[corpus.group == group]) for group in set(corpus.group)} == {
        "session 1": {"train"},
        "session 2": {"train"},
        "session 3": {"train"},
        "session 4": {"valid"},
        "session 5": {"test"},
    }
    assert corpus.features["text"][0, :2].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_every_section_with_commands_has_a_test():
    assert sorted("".join(blocks("console")).splitlines()) == sorted(
        line for heading in SECTIONS for line in "".join(blocks("console", heading)).splitlines()
    )
