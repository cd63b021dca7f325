"""The run summary counts what the scores say, in bounded memory; its page is self-contained and trusts no file."""

import dataclasses
import functools
import html.parser
import json
import operator
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import ipc
from score_folder import contents, counted
from scoring_problems import DIMS, edit_shard, fitted_model, make_corpus, read_scores, with_column

from m3er_fast import M3ERConfig, M3ERFusion
from m3er_fast.cli import main
from m3er_fast.corpus import CorpusError, write_parquet
from m3er_fast.scoring import Scorer, counts, score
from m3er_fast.scoring.summary_page import render
from m3er_fast.shards import reader

ROWS, SHARD_ROWS = 700, 300
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp; \u202e\x00 {0} %s"


@pytest.fixture(scope="module")
def both():
    return make_corpus(200 + ROWS, missing=0.1)


@pytest.fixture(scope="module")
def corpus(both):
    """Groups of 1 to 30 utterances that are not always together; some utterances have no modality."""
    part = both.select(slice(200, 200 + ROWS))
    rng = np.random.default_rng(0)
    group = np.array([f"speaker {number}" for number in rng.permutation(np.arange(ROWS) % 90 // 2)], dtype=object)
    available = part.available.copy()
    available[rng.permutation(ROWS)[:20]] = False
    available[400:450, 1] = False
    return dataclasses.replace(part, group=group, available=available)


def trained_model(corpus, classes=None):
    part = corpus.select(slice(0, 200))
    model = fitted_model(part, classes=classes).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(20):  # an untrained model predicts the same class for all
        optimizer.zero_grad()
        output = model(part.features, part.lengths, part.available)
        model.loss(output, torch.from_numpy(part.target)).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def model(both):
    return trained_model(both)


@pytest.fixture
def corpus_dir(corpus, tmp_path):
    """A corpus that a test may damage."""
    write_parquet(corpus, tmp_path / "corpus", rows_per_shard=SHARD_ROWS)
    return tmp_path / "corpus"


@pytest.fixture(scope="module")
def scored(corpus, model, tmp_path_factory):
    """A folder of scores with three bad rows, and their rows in order."""
    folder = tmp_path_factory.mktemp("scored")
    write_parquet(corpus, folder / "corpus", rows_per_shard=SHARD_ROWS)
    path = folder / "corpus" / "part-00001.parquet"
    table = pq.read_table(path)
    lengths = table["length"].to_pylist()
    lengths[3] = lengths[60] = lengths[299] = -1
    replace_column(path, "length", pa.array(lengths, pa.int32()))
    score(folder / "corpus", model, folder / "out")
    return folder / "out", rows_of(folder / "out")


def rows_of(folder):
    return read_scores(folder).to_pylist()


def replace_column(path, name, column):
    edit_shard(path, lambda table: with_column(table, name, column))


def summary_of(folder):
    return json.loads((folder / "_summary.json").read_text())


def counts_of(rows):
    """Return the counts of rows, computed row by row."""
    good = [row for row in rows if row["error"] is None]
    return {
        "rows": len(rows),
        "scored": len(good),
        "abstained": sum(row["abstained"] for row in good),
        "ineffectual": {name: sum(not row[f"effective_{name}"] for row in good) for name in DIMS},
        "labelled": sum(row["label"] is not None for row in good),
        "right": sum(row["label"] == row["prediction"] for row in good),
    }


# --- what is counted ---


def test_every_count_is_that_of_the_rows(scored, corpus):
    found, rows = summary_of(scored[0]), scored[1]
    good = [row for row in rows if row["error"] is None]
    decided = [row for row in good if not row["abstained"]]
    best = [max(row[f"p_{name}"] for name in corpus.classes) for row in decided]
    assert found["utterances"] == {
        "rows": ROWS,
        "scored": ROWS - 3,
        "errors": 3,
        "abstained": sum(row["abstained"] for row in good),
    }
    assert found["utterances"]["abstained"] >= 20
    assert found["shards"] == {"corpus": 3, "scored": 3, "quarantined": 0}
    predictions = Counter(row["prediction"] for row in decided)
    assert len(predictions) == 3
    assert {entry["name"]: entry["predictions"] for entry in found["classes"]} == predictions
    for entry in found["classes"]:
        assert entry["share"] == predictions[entry["name"]] / len(decided)
        assert entry["mean_probability"] == pytest.approx(np.mean([row[f"p_{entry['name']}"] for row in decided]))
    assert found["confidence"]["mean"] == pytest.approx(np.mean(best))
    edges = [*(edge / 10 for edge in range(10)), 1.1]  # 1 belongs to the last
    counted_by_hand = [sum(low <= p < high for p in best) for low, high in pairwise(edges)]
    assert found["confidence"]["histogram"] == counted_by_hand
    for entry in found["modalities"]:
        assert entry["ineffectual"] == sum(not row[f"effective_{entry['name']}"] for row in good)
        assert entry["share"] == entry["ineffectual"] / len(good)
        assert entry["p_value_0"] == sum(row[f"p_value_{entry['name']}"] == 0 for row in good)
        assert 0 < entry["p_value_0"] < entry["ineffectual"]
        reasons = Counter(row[f"reason_{entry['name']}"] for row in good if row[f"reason_{entry['name']}"])
        assert len(reasons) > 0
        assert {found["reason"]: found["rows"] for found in entry["reasons"]} == reasons
        assert [found["rows"] for found in entry["reasons"]] == sorted(reasons.values(), reverse=True)
    assert [entry["name"] for entry in found["modalities"]] == list(DIMS)
    assert found["quarantine"] == []


def test_parts_follow_the_order_of_the_corpus_and_say_where_they_begin(scored):
    parts, rows = summary_of(scored[0])["order"], scored[1]
    assert len(parts) == ROWS // 50
    start = 0
    for part in parts:
        assert part["shard"] == f"part-{start // SHARD_ROWS:05d}.parquet"
        assert part["row"] == start % SHARD_ROWS
        own = rows[start : start + part["rows"]]
        assert {name: part[name] for name in part if name not in ("shard", "row")} == counts_of(own)
        start += part["rows"]
    assert start == ROWS
    assert parts[8]["ineffectual"]["audio"] == 50  # rows 400 to 449


def assert_groups(folder, group):
    """Assert that a summary counts the rows by these groups, some of which may be None."""
    found, rows = summary_of(folder)["groups"], rows_of(folder)
    expected = {}
    for name, row in zip(group, rows, strict=True):
        expected.setdefault(name, []).append(row)
    without = expected.pop(None, [])
    assert found["named"] == [{"name": name, **counts_of(own)} for name, own in expected.items()]
    assert (found["others"], found["rows_without"], found["unreadable"]) == (None, len(without), [])


def test_groups_are_those_of_the_corpus(scored, corpus):
    assert_groups(scored[0], corpus.group)


def plain(strings):
    return pa.array(strings, pa.string())


@pytest.mark.parametrize(
    "make", [plain, lambda s: pa.array(s, pa.large_string()), lambda s: plain(s).dictionary_encode()]
)
@pytest.mark.parametrize("row_group", [37, SHARD_ROWS])
def test_groups_may_be_null_or_dictionaries_in_row_groups_of_any_size(
    make, row_group, corpus, model, corpus_dir, tmp_path
):
    group = [None if row % 7 == 0 else name for row, name in enumerate(corpus.group)]
    for number, path in enumerate(sorted(corpus_dir.iterdir())):
        own = group[number * SHARD_ROWS : (number + 1) * SHARD_ROWS]
        replace_column(path, "group", make(own))
        pq.write_table(pq.read_table(path), path, row_group_size=row_group)
    score(corpus_dir, model, tmp_path / "out")
    assert_groups(tmp_path / "out", group)


def test_groups_of_mapped_files_are_counted(corpus, model, corpus_dir, tmp_path):
    (tmp_path / "ipc").mkdir()
    for path in corpus_dir.iterdir():
        table = pq.read_table(path)
        with ipc.new_file(tmp_path / "ipc" / f"{path.stem}.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
    score(tmp_path / "ipc", model, tmp_path / "out")
    assert_groups(tmp_path / "out", corpus.group)


def test_without_groups_there_are_none(model, corpus_dir, tmp_path):
    for path in corpus_dir.iterdir():
        pq.write_table(pq.read_table(path).drop_columns(["group"]), path)
    score(corpus_dir, model, tmp_path / "out")
    assert summary_of(tmp_path / "out")["groups"] is None
    assert "<h2>Groups" not in (tmp_path / "out" / "_summary.html").read_text()


def test_what_is_counted_does_not_depend_on_how_much_is_read_at_a_time(scored, corpus, model, tmp_path, monkeypatch):
    expected = summary_of(scored[0])
    monkeypatch.setattr(counts, "ROWS_PER_READ", 17)
    monkeypatch.setattr(reader, "ROWS_PER_READ", 23)
    score(scored[0].parent / "corpus", model, tmp_path)
    found = summary_of(tmp_path)
    for name in ("utterances", "shards", "modalities", "order", "groups", "errors"):
        assert found[name] == expected[name]
    assert found["confidence"]["histogram"] == expected["confidence"]["histogram"]
    assert found["confidence"]["mean"] == pytest.approx(expected["confidence"]["mean"])


@pytest.mark.parametrize("rows_per_shard", [ROWS, 40])
def test_groups_beyond_the_most_are_counted_together(rows_per_shard, corpus, model, tmp_path, monkeypatch):
    monkeypatch.setattr(counts, "MOST_GROUPS", 10)
    write_parquet(corpus, tmp_path / "corpus", rows_per_shard=rows_per_shard)
    score(tmp_path / "corpus", model, tmp_path / "out")
    found = summary_of(tmp_path / "out")["groups"]
    first = list(dict.fromkeys(corpus.group))[:10]
    assert [group["name"] for group in found["named"]] == first
    assert found["others"]["rows"] + sum(group["rows"] for group in found["named"]) == ROWS
    if rows_per_shard == ROWS:
        rows = rows_of(tmp_path / "out")
        others = [row for name, row in zip(corpus.group, rows, strict=True) if name not in first]
        assert found["others"] == counts_of(others)


def flip_a_bit_of_groups(path):
    table = pq.read_table(path)
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    metadata = pq.read_metadata(path).row_group(0)
    chunk = next(
        metadata.column(c) for c in range(metadata.num_columns) if metadata.column(c).path_in_schema == "group"
    )
    raw = bytearray(path.read_bytes())
    raw[chunk.data_page_offset + chunk.total_compressed_size - 3] ^= 1
    path.write_bytes(raw)


def groups_that_are_no_text(path):
    raw = pa.array([b"\xff\xfe"] * SHARD_ROWS, pa.binary())
    replace_column(path, "group", pa.Array.from_buffers(pa.string(), len(raw), raw.buffers()))


def groups_of_fractions(path):
    replace_column(path, "group", pa.array([0.5] * SHARD_ROWS))


def groups_that_are_huge(path):
    table = pq.read_table(path)
    names = pa.array(["a" * 2**14 + str(row) for row in range(SHARD_ROWS)])
    table = table.set_column(table.column_names.index("group"), "group", names)
    pq.write_table(table, path, compression="zstd", use_dictionary=False)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip_a_bit_of_groups, "CRC"),
        (groups_that_are_no_text, "codec can't decode"),
        (groups_of_fractions, "holds double, wanted string"),
        (groups_that_are_huge, "would unpack to"),
    ],
)
def test_groups_that_cannot_be_read_cost_no_score_and_are_told(damage, reason, corpus, model, corpus_dir, tmp_path):
    damage(corpus_dir / "part-00001.parquet")
    result = score(corpus_dir, model, tmp_path / "out")
    assert (result.rows, result.errors, result.quarantined) == (ROWS, 0, ())
    found = summary_of(tmp_path / "out")["groups"]
    assert [entry["shard"] for entry in found["unreadable"]] == ["part-00001.parquet"]
    assert reason in found["unreadable"][0]["reason"]
    assert found["rows_without"] == SHARD_ROWS
    assert sum(group["rows"] for group in found["named"]) == ROWS - SHARD_ROWS
    assert reason.replace("'", "&#x27;") in (tmp_path / "out" / "_summary.html").read_text()


# --- errors and quarantine ---


def test_bad_rows_and_shards_are_listed_with_their_reasons(scored, corpus_dir, model, tmp_path):
    errors = summary_of(scored[0])["errors"]
    assert [(entry["shard"], entry["row"]) for entry in errors] == [("part-00001.parquet", row) for row in (3, 60, 299)]
    assert [entry["error"] for entry in errors] == [row["error"] for row in scored[1] if row["error"]]
    (corpus_dir / "part-00000.parquet").write_bytes(b"PAR1")
    result = score(corpus_dir, model, tmp_path / "out")
    found = summary_of(tmp_path / "out")
    assert found["quarantine"] == json.loads((tmp_path / "out" / "_quarantine.json").read_text())
    assert found["quarantine"] == [entry._asdict() for entry in result.quarantined]
    assert found["shards"] == {"corpus": 3, "scored": 2, "quarantined": 1}
    assert found["order"][0]["shard"] == "part-00001.parquet"
    assert "1 of 3 shards could not be read" in (tmp_path / "out" / "_summary.html").read_text()


def test_of_many_errors_the_first_are_listed(corpus_dir, model, tmp_path):
    for path in corpus_dir.iterdir():
        replace_column(path, "length", pa.array([-1] * pq.read_metadata(path).num_rows, pa.int32()))
    score(corpus_dir, model, tmp_path / "out")
    found = summary_of(tmp_path / "out")
    assert [(entry["shard"], entry["row"]) for entry in found["errors"]] == [
        ("part-00000.parquet", n) for n in range(20)
    ]
    assert found["utterances"] == {"rows": ROWS, "scored": 0, "errors": ROWS, "abstained": 0}
    assert found["confidence"]["mean"] is None
    page = (tmp_path / "out" / "_summary.html").read_text()
    assert "700 of 700 utterances could not be scored" in page
    assert "The first 20; 680 more" in page


@pytest.mark.parametrize("kind", ["empty", "quarantined"])
def test_a_corpus_of_nothing_has_a_summary(kind, corpus, model, tmp_path):
    write_parquet(corpus.select(slice(0, 0)), tmp_path / "corpus")
    if kind == "quarantined":
        (tmp_path / "corpus" / "part-00000.parquet").write_bytes(b"")
    score(tmp_path / "corpus", model, tmp_path / "out")
    found = summary_of(tmp_path / "out")
    assert found["utterances"] == {"rows": 0, "scored": 0, "errors": 0, "abstained": 0}
    assert found["order"] == []
    page = assert_harmless((tmp_path / "out" / "_summary.html").read_text())
    assert ("1 of 1 shard could not be read" if kind == "quarantined" else "The corpus has no utterances.") in page.text


@pytest.mark.parametrize("page", ["dictionary", "data"])
def test_scores_that_cannot_be_read_back_are_one_error_that_names_them(page, corpus_dir, model, tmp_path):
    score(corpus_dir, model, tmp_path / "out")
    path = tmp_path / "out" / "part-00001.parquet"
    raw = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(0).column(2)
    # Inside a page: some bits of the header before it, such as those of its statistics, change nothing that is read.
    first, last = column.dictionary_page_offset, column.dictionary_page_offset + column.total_compressed_size - 1
    raw[last if page == "data" else (first + column.data_page_offset) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(
        CorpusError, match=r"part-00001.parquet: scores cannot be read back: .*delete the file and resume"
    ):
        score(corpus_dir, model, tmp_path / "out", resume=True)
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    path.unlink()
    assert score(corpus_dir, model, tmp_path / "out", resume=True).resumed == 2


# --- runs ---


class Killed(BaseException):
    pass


def test_a_resumed_run_counts_what_an_uninterrupted_one_does_and_tells_its_own_time(corpus_dir, model, tmp_path):
    def kill(step):
        if step.done == 2:
            raise Killed

    whole = score(corpus_dir, model, tmp_path / "whole")
    with pytest.raises(Killed):
        score(corpus_dir, model, tmp_path / "out", progress=kill)
    assert "_summary.json" not in {path.name for path in (tmp_path / "out").iterdir()}
    resumed = score(corpus_dir, model, tmp_path / "out", resume=True)
    assert counted(tmp_path / "out") == counted(tmp_path / "whole")
    assert "Every utterance was scored (700)." in (tmp_path / "out" / "_summary.html").read_text()
    runs = [summary_of(tmp_path / name)["run"] for name in ("whole", "out")]
    assert [(run["engine"], run["rows"], run["resumed"]) for run in runs] == [("local", 700, 0), ("local", 100, 2)]
    for run, result in zip(runs, (whole, resumed), strict=True):
        assert 0 < run["seconds"] < result.seconds
        assert run["rows_per_second"] == run["rows"] / run["seconds"]


def test_a_summary_of_an_earlier_run_does_not_outlive_the_next_one(corpus_dir, model, tmp_path):
    def kill(_):
        raise Killed

    score(corpus_dir, model, tmp_path / "out")
    (tmp_path / "out" / "part-00001.parquet").unlink()
    with pytest.raises(Killed):
        score(corpus_dir, model, tmp_path / "out", resume=True, progress=kill)
    assert not {"_summary.json", "_summary.html", "_SUCCESS"} & {path.name for path in (tmp_path / "out").iterdir()}
    assert set(contents(tmp_path / "out")) == {"_manifest.json", "part-00000.parquet", "part-00002.parquet"}


def test_the_command_says_where_the_page_is(corpus_dir, model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    assert main(["score", str(corpus_dir), "--model", str(tmp_path / "model"), "--out", f"{out}/"]) == 0
    assert f"{out}/_summary.html" in capsys.readouterr().out


# --- the page ---

TAGS = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "strong", "code", "dl", "dt", "dd"),
    *("div", "span", "bdi", "table", "thead", "tbody", "tr", "th", "td", "details", "summary"),
}
SVG = {"svg", "rect", "path"}
ATTRIBUTES = {
    *("lang", "charset", "name", "content", "http-equiv", "class", "dir", "viewbox", "preserveaspectratio", "role"),
    *("aria-label", "aria-hidden", "x", "y", "width", "height", "d", "style", "scope"),
}


class Page(html.parser.HTMLParser):
    """The tags, attributes and text of a page, as a browser would find them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        self.text += "".join(f" {value} " for _, value in attributes)

    def handle_data(self, data):
        self.text += data


def assert_harmless(text):
    page = Page(text)
    assert page.tags <= TAGS | SVG
    assert page.attributes <= ATTRIBUTES
    assert "default-src 'none'" in text
    assert not re.search(r"url\(|@import|https?:|//", text.split("</style>")[0])
    assert "\u202e" not in text
    assert "\x00" not in text
    return page


def test_a_page_needs_nothing_beside_it_and_shows_every_number_as_text(scored):
    page = assert_harmless((scored[0] / "_summary.html").read_text())
    assert page.tags >= SVG
    found = summary_of(scored[0])
    for entry in found["classes"]:
        assert entry["name"] in page.text
        assert f"{100 * entry['share']:.1f}\u202f%" in page.text
    for entry in found["modalities"]:
        assert f"{entry['name']} ineffectual" in page.text
        assert f"{100 * entry['share']:.1f}\u202f%" in page.text
        reasons = {found["reason"]: found["rows"] for found in entry["reasons"]}
        reasons["missing"] = entry["ineffectual"] - sum(reasons.values())
        for reason, rows in reasons.items():
            assert f"{reason}: {100 * rows / (ROWS - 3):.1f}\u202f%" in page.text
    for entry in found["errors"]:
        assert entry["error"] in page.text
    assert "3 of 700 utterances could not be scored" in page.text
    assert found["signature"][:12] in page.text
    worst = max(found["groups"]["named"], key=lambda group: sum(group["ineffectual"].values()) / group["rows"])
    assert worst["name"] in page.text


def altered(folder, **changes):
    """Return the page's text for a summary of which some fields are others, given by their paths, as ``a__b``."""
    summary = summary_of(folder)
    for path, value in changes.items():
        *parents, last = path.split("__")
        functools.reduce(operator.getitem, parents, summary)[last] = value
    return assert_harmless(render(summary)).text


def test_the_banner_tells_of_many_abstentions_and_of_a_single_class(scored):
    page = altered(scored[0])
    assert "abstained from" not in page.split("Utterances scored")[0]
    assert "Every prediction" not in page
    page = altered(scored[0], utterances__abstained=330)
    assert "The model abstained from 47.3\u202f% of them" in page
    summary = summary_of(scored[0])
    decided = summary["utterances"]["scored"] - summary["utterances"]["abstained"]
    classes = [{**entry, "predictions": decided * (entry["name"] == "happy")} for entry in summary["classes"]]
    assert "Every prediction is" in altered(scored[0], classes=classes)


def test_a_corpus_that_is_abstained_from_as_a_whole_has_a_page(corpus, model, tmp_path):
    nothing = dataclasses.replace(corpus, available=np.zeros_like(corpus.available)).select(slice(0, 40))
    write_parquet(nothing, tmp_path / "corpus")
    score(tmp_path / "corpus", model, tmp_path / "out")
    found = summary_of(tmp_path / "out")
    assert found["utterances"] == {"rows": 40, "scored": 40, "errors": 0, "abstained": 40}
    assert {entry["share"] for entry in found["classes"]} == {None}
    assert found["confidence"] == {"mean": None, "histogram": [0] * 10}
    page = assert_harmless((tmp_path / "out" / "_summary.html").read_text())
    assert "abstained from 100\u202f% of them" in page.text


def test_groups_without_ineffectual_modalities_are_not_listed(scored):
    groups = summary_of(scored[0])["groups"]
    fine = {"rows": 50, "scored": 50, "abstained": 0, "ineffectual": dict.fromkeys(DIMS, 0), "labelled": 0, "right": 0}
    page = altered(
        scored[0], report=None, groups={**groups, "named": [{"name": "quiet one", **fine}, *groups["named"]]}
    )
    assert "quiet one" not in page
    page = altered(scored[0], report=None, groups={**groups, "named": [{"name": "quiet one", **fine}]})
    assert "quiet one" not in page
    assert "No group has ineffectual modalities" in page


def test_names_and_reasons_from_hostile_files_are_shown_as_text(both, corpus, tmp_path):
    model = trained_model(both, classes=(f"a{EVIL}", f"b{EVIL}", "c"))
    hostile = dataclasses.replace(corpus, group=np.array([EVIL] * ROWS, dtype=object))
    write_parquet(hostile, tmp_path / "corpus", rows_per_shard=SHARD_ROWS)
    for number, name in enumerate(("<b onclick=x>'\".parquet", "<svg onload=y>.parquet")):
        (tmp_path / "corpus" / f"part-0000{number}.parquet").rename(tmp_path / "corpus" / name)
    (tmp_path / "corpus" / "<svg onload=y>.parquet").write_bytes(b"")
    bad = tmp_path / "corpus" / "<b onclick=x>'\".parquet"
    replace_column(bad, "id", pa.array([EVIL] * SHARD_ROWS))
    replace_column(bad, "length", pa.array([-1, *[4] * (SHARD_ROWS - 1)], pa.int32()))
    score(tmp_path / "corpus", model, tmp_path / "out")
    found = summary_of(tmp_path / "out")
    assert EVIL in found["errors"][0]["error"].encode().decode("unicode-escape")
    assert [group["name"] for group in found["groups"]["named"]] == [EVIL]
    page = assert_harmless((tmp_path / "out" / "_summary.html").read_text())
    assert "<svg onload=y>.parquet" in page.text
    assert page.text.count("<script>alert(1)</script>") >= 4  # two classes, the group, the error


def test_long_lists_and_names_are_cut_on_the_page_and_whole_in_the_json(scored):
    long = summary_of(scored[0])
    long["quarantine"] = [{"shard": f"{'s' * 500}{number}", "reason": "r" * 5000} for number in range(1000)]
    long["shards"]["quarantined"] = 1000
    long["groups"]["named"] = [{**group, "name": "g" * 500} for group in long["groups"]["named"]]
    text = render(long)
    assert_harmless(text)
    assert "The first 200; 800 more are in" in text
    assert not re.search(r"s{61}|r{301}|g{61}", text)
    assert len(text) < 300_000


def test_every_field_of_the_json_is_listed_in_the_docs(scored):
    def keys(value):
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from [key, *keys(inner)]
        elif isinstance(value, list):
            for inner in value:
                yield from keys(inner)

    text = (Path(__file__).parents[1] / "docs" / "scoring_summary.md").read_text(encoding="utf-8")
    section = text.split("\n## Fields\n", 1)[1].split("\n## ", 1)[0]
    names = set(keys(summary_of(scored[0]))) - set(DIMS)
    assert len(names) > 20
    assert {name for name in names if f"`{name}`" not in section} == set()


# --- memory ---

_PEAK = """
import resource, sys
from m3er_fast import M3ERConfig, M3ERFusion
from m3er_fast.scoring import Scorer, summary
from scoring_problems import scoring_job
job = scoring_job(sys.argv[1], sys.argv[2])
few, many = ({job.plan.shards[index].name: rows} for index, rows in ((0, 1000), (1, int(sys.argv[3]))))
summary.summarize(job, few, ())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(summary.summarize(job, many, ())["utterances"]["scored"])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB there")
def test_a_summary_takes_no_more_memory_the_larger_a_shard_is(tmp_path):
    model = M3ERFusion(DIMS, 3, M3ERConfig(check=None))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "out").mkdir()
    rows = 3_000_000
    for number, size in enumerate((1000, rows)):
        group = pa.array(np.arange(size) // 1000).cast(pa.string())
        pq.write_table(pa.table({"group": group}), tmp_path / "corpus" / f"part-{number}.parquet")
        columns = []
        for field in Scorer(model).schema:
            if field.name == "error":
                columns.append(pa.nulls(size, field.type))
            elif pa.types.is_boolean(field.type):
                columns.append(pa.array(np.arange(size) % 3 == 0))
            elif pa.types.is_string(field.type):
                columns.append(pa.repeat("1", size))
            else:
                columns.append(pa.array(np.linspace(0, 1, size, dtype=np.float32)))
        table = pa.Table.from_arrays(columns, schema=Scorer(model).schema)
        pq.write_table(table, tmp_path / "out" / f"part-{number}.parquet", row_group_size=2**16, compression="none")
    whole = sum(column.nbytes for column in table.columns)
    arguments = [sys.executable, "-c", _PEAK, tmp_path / "corpus", tmp_path / "out", str(rows)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    found = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment)
    scored_rows, growth_kib = map(int, found.stdout.split())
    assert scored_rows == rows
    assert whole > 100 * 2**20
    assert 1024 * growth_kib < whole / 2
