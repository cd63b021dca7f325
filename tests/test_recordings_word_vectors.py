"""Vectors of words from files as GloVe, word2vec and model2vec write them."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from m3er_fast.corpus.base import CorpusError
from m3er_fast.recordings.word_vectors import spellings, word_vectors


def text_file(tmp_path, text):
    path = tmp_path / "vectors.txt"
    path.write_text(text, encoding="utf-8")
    return word_vectors(path)


LINES = "the 1 2 3\nÉtat 4 5 6\n. . . 7 8 9\nmr. 1e-1 -2 .5\n"


def test_text_vectors(tmp_path):
    encoder = text_file(tmp_path, LINES)
    found = encoder.encode(["the", "unheard", "The", '"the,"', "État", "Mr.", "the"])
    np.testing.assert_allclose(found[[0, 2, 3, 6]], [[1, 2, 3]] * 4)
    np.testing.assert_allclose(found[4], [4, 5, 6])
    np.testing.assert_allclose(found[5], [0.1, -2, 0.5])
    assert np.isnan(found[1]).all()
    assert found.dtype == np.float32
    assert encoder.encode([]).shape == (0, 3)
    assert encoder.describe()["dimension"] == encoder.dimension == 3


def test_a_word_with_spaces_does_not_stand_for_its_first_part(tmp_path):
    assert np.isnan(text_file(tmp_path, LINES).encode(["."])).all()


def test_the_first_line_of_word2vec_is_no_word(tmp_path):
    encoder = text_file(tmp_path, "4 3\n" + LINES)
    assert encoder.dimension == 3
    assert np.isnan(encoder.encode(["4"])).all()


def test_many_words_are_found_in_a_large_file(tmp_path):
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((5000, 4)).astype(np.float32)
    lines = [f"w{row} " + " ".join(map(repr, map(float, vector))) for row, vector in enumerate(vectors)]
    encoder = text_file(tmp_path, "\n".join(lines))
    rows = generator.integers(0, 5000, 300)
    np.testing.assert_allclose(encoder.encode([f"w{row}" for row in rows]), vectors[rows], rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no line with a word and its values"),
        ("word\n", "no line with a word and its values"),
        ("the 1 2 3\na 1 2\n", "the line of 'a': it must have 3 values as the first line has, got 2"),
        ("the 1 2 3\na 1 2 x\n", "the line of 'a'.*could not convert"),
    ],
)
def test_bad_text_vectors_are_refused_by_name(tmp_path, text, message):
    with pytest.raises(CorpusError, match=rf"vectors\.txt.*{message}"):
        text_file(tmp_path, text).encode(["a"])


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(CorpusError, match="does not exist: wanted a text file of word vectors, or a folder"):
        word_vectors(tmp_path / "none")


@pytest.fixture
def table(tmp_path):
    """A folder with a tokenizer of five words, one of which has two tokens, and their vectors."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"[UNK]": 0, "well": 1, "un": 2, "##do": 3, "[CLS]": 4}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vectors = np.arange(10, dtype=np.float32).reshape(5, 2)
    save_file({"embeddings": vectors, "weights": np.ones(5, np.float32)}, tmp_path / "model.safetensors")
    return tmp_path, vectors


def test_static_tables(table):
    folder, vectors = table
    encoder = word_vectors(folder)
    found = encoder.encode(["well", "undo", "", "well"])
    np.testing.assert_allclose(found[[0, 3]], vectors[[1, 1]])
    np.testing.assert_allclose(found[1], vectors[[2, 3]].mean(axis=0))
    assert np.isnan(found[2]).all()
    assert encoder.encode([]).shape == (0, 2)
    assert encoder.describe()["dimension"] == 2


def test_bad_static_tables_are_refused_by_name(table):
    folder, vectors = table
    save_file({"a": vectors, "b": vectors}, folder / "model.safetensors")
    with pytest.raises(CorpusError, match=r"wanted one table with a row per token \(5\), found 2"):
        word_vectors(folder)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CorpusError, match="not a static table of vectors"):
        word_vectors(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CorpusError, match=r"has no tokenizer\.json"):
        word_vectors(folder)


def test_spellings():
    assert list(spellings('"Hello,"')) == ['"Hello,"', '"hello,"', "Hello", "hello"]
    assert list(spellings("a")) == ["a"]
    assert list(spellings("--")) == ["--"]
