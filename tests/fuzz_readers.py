"""Damage valid files of every format and read them, in a process with limits on memory and time.

``python tests/fuzz_readers.py FORMAT FIRST COUNT`` reads the mutations FIRST to FIRST + COUNT - 1 of small valid files.
A mutation depends on the format and its number only. One line of JSON is printed for each, before it is read and after:
a decoder that crashes takes the process with it, and the last line says where.
"""

import faulthandler
import json
import pickle
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np

MEMORY_BYTES = 3 * 2**30  # address space; the interpreter, NumPy and pyarrow map about 1 GiB
SECONDS = 20  # of one mutation


class TooSlowError(BaseException):
    """A mutation takes too long; no reader may catch this."""


# --- valid files ---


def hdf5(path, arrays, **options):
    import h5py

    with h5py.File(path, "w") as file:
        for name, value in arrays.items():
            file.create_dataset(name, data=value, **options)


def make_csd(folder):
    rng = np.random.default_rng(0)
    axis = np.column_stack([np.arange(6.0), np.arange(6.0) + 1])
    sets = {
        "covarep": ("COVAREP", {"v": rng.standard_normal((6, 3)), "w": rng.standard_normal((6, 3))}),
        "glove": ("glove_vectors", {"v": rng.standard_normal((6, 2)), "w": rng.standard_normal((6, 2))}),
        "words": ("words", {"v": np.array([[b"so"], [b"sp"]] * 3), "w": np.array([[b"good"], [b"day"]] * 3)}),
        "labels": ("All Labels", {"v": rng.standard_normal((6, 7)), "w": rng.standard_normal((6, 7))}),
    }
    for file, (root, entries) in sets.items():
        arrays = {f"{root}/data/{name}/features": value for name, value in entries.items()}
        arrays |= {f"{root}/data/{name}/intervals": axis for name in entries}
        names = json.dumps(["sentiment", "happy", "sad", "anger", "surprise", "disgust", "fear"])
        hdf5(folder / f"{file}.csd", arrays | {f"{root}/metadata/dimension names": [names]})


def make_mfn(folder):
    rng = np.random.default_rng(0)
    for split, options in (("train", {}), ("test", {"compression": "gzip", "chunks": True})):
        for name, width in (("audio_{}", 3), ("video_{}", 2), ("text_{}_emb", 4)):
            value = rng.standard_normal((5, 4, width))
            hdf5(folder / f"{name.format(split)}.h5", {"d1": value}, **options)
        hdf5(folder / f"y_{split}.h5", {"d1": np.linspace(-3, 3, 5)[:, None]})


def make_csv(folder):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name, width in (("audio", 3), ("text", 2)):
            rows = [[*map(repr, map(float, rng.standard_normal(width))), str(row % 2)] for row in range(5)]
            (folder / f"{name}_{split}.csv").write_text("".join(",".join(row) + "\n" for row in rows))
        index = "".join(f'{split}_{row},"a, b",{row % 2}\n' for row in range(5))
        (folder / f"{split}_index.csv").write_text("id,transcript,label\n" + index)


def make_mmsa(folder):
    rng = np.random.default_rng(0)

    def fold(name):
        return {
            "raw_text": np.array(["a b", "c"] * 2, dtype=object),
            "id": [f"{name}$_${row}" for row in range(4)],
            "text": rng.standard_normal((4, 3, 2)).astype(np.float32),
            "text_bert": np.ones((4, 3, 3)),
            "audio": rng.standard_normal((4, 6, 2)),
            "vision": [[[0.5]] * 6] * 4,
            "audio_lengths": [6, 5, 4, 3],
            "annotations": ["Positive", "Negative", "", None],
            "regression_labels": np.array([1.5, -1, 0, np.nan]),
        }

    data = {name: fold(name) for name in ("train", "valid", "test")}
    for protocol in (0, 2, 4):
        (folder / f"{protocol}.pkl").write_bytes(pickle.dumps(data, protocol))


def make_mult(folder):
    rng = np.random.default_rng(0)
    pairs = np.eye(2)[rng.integers(0, 2, (4, 4))]
    data = {
        name: {
            "text": rng.standard_normal((4, 3, 2)),
            "audio": rng.standard_normal((4, 6, 1)),
            "vision": rng.standard_normal((4, 3, 1)),
            "labels": pairs,
            "id": np.array([[f"{name}_{row}", "0.5", "1.5"] for row in range(4)], dtype=object),
        }
        for name in ("train", "valid", "test")
    }
    for protocol in (0, 2, 4):
        (folder / f"{protocol}.pkl").write_bytes(pickle.dumps(data, protocol))


def make_iemocap(folder):
    rng = np.random.default_rng(0)
    turns = {"Ses01F_a": 2, "Ses02M_b": 1, "Ses05F_c": 3}

    def each(value):
        return {name: [value(name, turn) for turn in range(count)] for name, count in turns.items()}

    def vectors(width):
        return each(lambda *_: rng.standard_normal(width).astype(np.float32))

    ids, labels = each(lambda name, turn: f"{name}_{turn}"), each(lambda _, turn: turn)
    data = (ids, each(lambda *_: "M"), labels, vectors(3), vectors(2), vectors(2), each(lambda *_: "hello"))
    data += ({"Ses01F_a", "Ses02M_b"}, {"Ses05F_c"})
    for protocol in (2, 4):
        (folder / f"{protocol}.pkl").write_bytes(pickle.dumps(data, protocol))


def make_table(rows=12):
    import pyarrow as pa

    rng = np.random.default_rng(0)
    frames = rng.standard_normal((rows, 3, 2))
    audio = pa.array([None if row == 3 else frames[row].tolist() for row in range(rows)])
    text = pa.field("text", pa.binary(24), metadata={"features": "2", "frames": "3", "dtype": "float32"})
    columns = [
        pa.array([f"utterance-{row}" for row in range(rows)]),
        pa.array([frames[row].astype("<f4").tobytes() for row in range(rows)], pa.binary(24)),
        audio,
        pa.array([1, 2, 3] * (rows // 3), pa.int32()),
        pa.array(["sad", "happy", None] * (rows // 3)),
        pa.array(["train", "dev", "test"] * (rows // 3)),
        pa.array([f"group-{row // 4}" for row in range(rows)]),
    ]
    fields = [pa.field("id", pa.string()), text]
    fields += [
        pa.field(name, column.type)
        for name, column in zip(("audio", "length", "label", "split", "group"), columns[2:], strict=True)
    ]
    return pa.Table.from_arrays(columns, schema=pa.schema(fields))


def make_parquet(folder):
    from pyarrow import parquet

    table = make_table()
    parquet.write_table(table, folder / "plain.parquet", compression="none", use_dictionary=False, row_group_size=5)
    parquet.write_table(table, folder / "default.parquet")
    parquet.write_table(
        table,
        folder / "pages.parquet",
        compression="zstd",
        write_page_checksum=False,
        data_page_version="2.0",
        data_page_size=64,
    )


def make_arrow(folder):
    from pyarrow import ipc

    table = make_table()
    table = table.set_column(4, "label", table["label"].dictionary_encode())
    with ipc.new_file(folder / "a.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=5)


# --- readers ---


def read_files(name):
    def read(folder, damaged):
        from m3er_fast.corpus.convert import FORMATS

        FORMATS[name](damaged if name.endswith("pkl") else folder)

    return read


def read_corpus(_, damaged):
    from m3er_fast.corpus import read_parquet

    read_parquet(damaged)


def read_shard(_, damaged):
    """Read a file as scoring and fitting do."""
    from m3er_fast.corpus.files import decoding
    from m3er_fast.corpus.parquet import decode_rows, read_splits
    from m3er_fast.shards.plan import plan_shards
    from m3er_fast.shards.reader import read_groups, read_schema, read_windows

    plan = plan_shards(damaged)
    dims = {"text": 2, "audio": 2}
    schema = read_schema(plan.corpus, plan.shards[0])
    for table in read_windows(plan.corpus, plan.shards[0], extra_columns=["split", *dims], window_bytes=200):
        with decoding(damaged, "not readable"):
            read_splits(table)
            rows = decode_rows(table, dims)
            for column in rows.columns.values():
                column.padded(np.arange(len(rows.lengths)), 3)
    for _ in read_groups(plan.corpus, plan.shards[0]):
        pass
    assert schema is not None


FORMATS = {
    "csd": (make_csd, read_files("csd")),
    "mfn-h5": (make_mfn, read_files("mfn-h5")),
    "utterance-csv": (make_csv, read_files("utterance-csv")),
    "mmsa-pkl": (make_mmsa, read_files("mmsa-pkl")),
    "mult-pkl": (make_mult, read_files("mult-pkl")),
    "iemocap-pkl": (make_iemocap, read_files("iemocap-pkl")),
    "parquet": (make_parquet, read_corpus),
    "parquet-shard": (make_parquet, read_shard),
    "arrow-shard": (make_arrow, read_shard),
}


# --- mutations ---


def flip(content, rng):
    for place in rng.integers(0, len(content), rng.integers(1, 9)):
        content[place] ^= int(rng.integers(1, 256))
    return content


def cut(content, rng):
    return content[: rng.integers(0, len(content))]


def swap(content, rng):
    size = int(rng.integers(1, max(2, min(64, len(content) // 2))))
    one, other = (int(place) for place in rng.integers(0, len(content) - size, 2))
    content[one : one + size], content[other : other + size] = content[other : other + size], content[one : one + size]
    return content


def repeat(content, rng):
    size = int(rng.integers(1, max(2, min(256, len(content)))))
    start, place = (int(place) for place in rng.integers(0, len(content), 2))
    return content[:place] + content[start : start + size] + content[place:]


def remove(content, rng):
    size = int(rng.integers(1, max(2, min(64, len(content)))))
    place = int(rng.integers(0, len(content)))
    return content[:place] + content[place + size :]


NUMBERS = (0, 1, 2**7 - 1, 2**8 - 1, 2**15, 2**16 - 1, 2**28, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)


def set_number(content, rng):
    """Write a number that a length could be, such as 2³² − 1, over some bytes."""
    width = int(rng.choice((1, 2, 4, 8)))
    place = int(rng.integers(0, len(content)))
    number = int(NUMBERS[rng.integers(len(NUMBERS))]) % 256**width
    content[place : place + width] = number.to_bytes(width, "little")
    return content


MUTATIONS = (flip, flip, set_number, set_number, cut, swap, repeat, remove)


def mutate(files, number, name):
    """Damage one of the files, and return it."""
    rng = np.random.default_rng([number, *name.encode()])
    file = files[rng.integers(len(files))]
    content = bytearray(file.read_bytes())
    for _ in range(rng.integers(1, 4)):
        if content:
            content = MUTATIONS[rng.integers(len(MUTATIONS))](content, rng)
    file.write_bytes(content)
    return file


def run(name, first, count):
    from m3er_fast.corpus import CorpusError

    def stop(*_):
        raise TooSlowError

    signal.signal(signal.SIGALRM, stop)
    make, read = FORMATS[name]
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        files = sorted(Path(folder).iterdir())
        valid = {file: file.read_bytes() for file in files}
        read(Path(folder), files[-1])  # valid, so that the limits leave room for all that is loaded
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        start_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(first, first + count):
            for file, content in valid.items():
                file.write_bytes(content)
            damaged = mutate(files, number, name)
            print(json.dumps({"number": number}), flush=True)
            outcome, start = "read", time.perf_counter()
            signal.alarm(SECONDS)
            try:
                read(Path(folder), damaged)
            except CorpusError as error:
                outcome = "refused"
                if not str(error).strip() or "\n" in str(error):
                    outcome = f"not one line: {error!r}"
            except BaseException as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                text = " ".join(str(error).split())[:200]
                outcome = f"{type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"
            finally:
                signal.alarm(0)
            seconds = round(time.perf_counter() - start, 4)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start_bytes
            print(json.dumps({"number": number, "outcome": outcome, "seconds": seconds, "kib": grown}), flush=True)


if __name__ == "__main__":
    faulthandler.enable()
    run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
