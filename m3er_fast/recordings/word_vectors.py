"""Vectors of words, from files that people have.

Dimension legend: n words, d features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from m3er_fast.corpus.base import CorpusError, naming
from m3er_fast.corpus.files import decoding


class WordEncoder(Protocol):
    """What turns words into features: an encoder of your own needs two methods.

    Attributes:
        dimension: d.
    """

    dimension: int

    def describe(self) -> dict[str, Any]:
        """Return everything that the features depend on, as JSON."""

    def encode(self, words: Sequence[str]) -> NDArray[np.float32]:
        """Return (n, d) features of n consecutive words; the row of an unknown word is NaN."""


def word_vectors(path: str | Path) -> WordEncoder:
    """Return the encoder for a file of vectors: a text file of GloVe's form, or a folder with a static table.

    Raises:
        CorpusError: if it is neither.
        ImportError: if a library for it is missing.
    """
    path = Path(path)
    if path.is_dir():
        return StaticTable(path)
    if path.is_file():
        return TextVectors(path)
    raise CorpusError(f"{path} does not exist: wanted a text file of word vectors, or a folder with tokenizer.json")


class TextVectors:
    """Vectors in a text file with one word per line, as GloVe, fastText and word2vec write it.

    The file is read once, for the places of its words; a vector is read when its word first occurs. 2 million words
    take 32 MB.

    A word is looked for as it is, in lower case, and both without the punctuation around it.

    Args:
        path: of the file. A first line of two numbers, as word2vec writes it, is passed over.

    Raises:
        CorpusError: if the file holds no vectors.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with naming(path), decoding(path, "not a text file of word vectors"):
            self.dimension, self._hashes, self._places = self._index()
        self._known: dict[str, NDArray[np.float32] | None] = {}

    def describe(self) -> dict[str, Any]:
        """Return everything that the features depend on, as JSON."""
        return {
            "features": "word vectors",
            "file": self._path.name,
            "bytes": self._path.stat().st_size,
            "sha256": sha256(self._path),
            "dimension": self.dimension,
        }

    def encode(self, words: Sequence[str]) -> NDArray[np.float32]:
        """Return (n, d) vectors; the row of an unknown word is NaN.

        Raises:
            CorpusError: if the line of a word has another number of values than the first line of the file.
        """
        vectors = np.full((len(words), self.dimension), np.nan, dtype=np.float32)
        for row, word in enumerate(words):
            if word not in self._known:
                self._known[word] = self._look_up(word)
            vector = self._known[word]
            if vector is not None:
                vectors[row] = vector
        return vectors

    def _index(self) -> tuple[int, NDArray[np.uint64], NDArray[np.int64]]:
        """Return d, and the sorted hashes of the words with the places of their lines."""
        hashes, places, place, features = [], [], 0, 0
        with self._path.open("rb") as file:
            for line in file:
                start, place = place, place + len(line)
                word, _, values = line.partition(b" ")
                if not features:
                    count = len(values.split())
                    if count <= 1:  # the number of words and d, or nothing
                        continue
                    features = count
                hashes.append(_hash(word))
                places.append(start)
        if not features:
            raise CorpusError("it has no line with a word and its values")
        numbers = np.array(hashes, dtype=np.uint64)
        order = np.argsort(numbers, kind="stable")
        return features, numbers[order], np.array(places, dtype=np.int64)[order]

    def _look_up(self, word: str) -> NDArray[np.float32] | None:
        for spelling in spellings(word):
            wanted = spelling.encode()
            number = _hash(wanted)
            row = int(np.searchsorted(self._hashes, number))
            while row < len(self._hashes) and self._hashes[row] == number:
                vector = self._read(int(self._places[row]), wanted)
                if vector is not None:
                    return vector
                row += 1
        return None

    def _read(self, place: int, word: bytes) -> NDArray[np.float32] | None:
        """Return the vector of a line, or None if it is another word's."""
        with self._path.open("rb") as file:
            file.seek(place)
            line = file.readline()
        if not line.startswith(word + b" "):
            return None
        values = line[len(word) :].split()
        if len(values) > self.dimension:  # a word with spaces in it, of which this is the first part
            return None
        line_of = f"the line of {word.decode(errors='replace')!r}"
        with decoding(self._path, line_of):
            if len(values) < self.dimension:
                raise ValueError(f"it must have {self.dimension} values as the first line has, got {len(values)}")
            return np.array([float(value) for value in values], dtype=np.float32)


class StaticTable:
    """A static table of token vectors: the mean of a word's tokens.

    Args:
        folder: with ``tokenizer.json`` and ``model.safetensors``, as model2vec and sentence-transformers write them.

    Raises:
        CorpusError: if it has neither, or no table with a row per token.
        ImportError: if tokenizers is missing.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ImportError("static tables need tokenizers: pip install 'm3er-fast[extract]'") from error
        self._folder = folder
        for name in ("tokenizer.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise CorpusError(f"{folder} has no {name}: wanted a folder that holds a static table of vectors")
        with naming(folder), decoding(folder, "not a static table of vectors"):
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
            tokens = self._tokenizer.get_vocab_size()
            with safe_open(folder / "model.safetensors", "np") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
                tables = [name for name, shape in shapes.items() if len(shape) == 2 and shape[0] == tokens]
                if len(tables) != 1:
                    raise CorpusError(f"wanted one table with a row per token ({tokens}), found {len(tables)}")
                self._table = file.get_tensor(tables[0]).astype(np.float32)
        self.dimension = int(self._table.shape[1])

    def describe(self) -> dict[str, Any]:
        """Return everything that the features depend on, as JSON."""
        return {
            "features": "static table",
            "folder": self._folder.name,
            "sha256": sha256(self._folder / "model.safetensors"),
            "tokenizer_sha256": sha256(self._folder / "tokenizer.json"),
            "dimension": self.dimension,
        }

    def encode(self, words: Sequence[str]) -> NDArray[np.float32]:
        """Return (n, d) vectors; the row of a word without tokens is NaN."""
        vectors = np.full((len(words), self.dimension), np.nan, dtype=np.float32)
        if words:
            tokens = self._tokenizer.encode(list(words), is_pretokenized=True, add_special_tokens=False)
            of_word = np.array([-1 if word is None else word for word in tokens.word_ids])
            ids = np.array(tokens.ids, dtype=np.int64)
            for row in np.unique(of_word[of_word >= 0]):
                vectors[row] = self._table[ids[of_word == row]].mean(axis=0)
        return vectors


def spellings(word: str) -> Iterator[str]:
    """Yield what a word is looked for as: itself, in lower case, and both without the punctuation around it."""
    seen: set[str] = set()
    first, last = 0, len(word)
    while first < last and not word[first].isalnum():
        first += 1
    while last > first and not word[last - 1].isalnum():
        last -= 1
    for spelling in (word, word.lower(), word[first:last], word[first:last].lower()):
        if spelling and spelling not in seen:
            seen.add(spelling)
            yield spelling


def _hash(word: bytes) -> np.uint64:
    """Return a number for a word that is the same in every process, as Python's own hash is not."""
    return np.uint64(int.from_bytes(hashlib.blake2b(word, digest_size=8).digest()))


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
