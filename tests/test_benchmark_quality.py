"""How the scripts of quality corrupt data, judge goals and record what they measured."""

import json
import re

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from benchmarks.quality import check_accuracy, check_quality, common
from m3er_fast import M3ERFusion
from m3er_fast.corpus.synthetic import make_synthetic
from m3er_fast.corruption import corrupt, mismatch, silence
from m3er_fast.standardize import StandardizedBatch

DIMS = (3, 2)


@pytest.fixture
def batch():
    """Utterances whose second modality lacks frames, some within the utterance; the last one lacks it altogether."""
    generator = torch.Generator().manual_seed(0)
    frame_valid = torch.ones(5, 6, 2, dtype=torch.bool)
    frame_valid[1, 4:, 1] = frame_valid[2, 1:3, 1] = frame_valid[4, :, 1] = False
    features = [torch.randn(5, 6, d, generator=generator) * frame_valid[:, :, m, None] for m, d in enumerate(DIMS)]
    return StandardizedBatch(features, torch.full((5,), 6), frame_valid.any(dim=1), frame_valid)


@pytest.mark.parametrize(("kind", "severity"), list(common.corruptions()))
def test_a_corruption_changes_the_valid_frames_of_one_modality(batch, kind, severity):
    spoilt, changed = check_quality.corrupted(batch, 1, common.corruptions()[kind, severity])
    assert torch.equal(spoilt.features[0], batch.features[0])
    assert torch.equal(spoilt.frame_valid, batch.frame_valid)
    there = batch.frame_valid[:, :, 1, None].expand_as(spoilt.features[1])
    assert torch.equal(spoilt.features[1][~there], batch.features[1][~there])
    assert changed.tolist() == (spoilt.features[1] != batch.features[1]).any(dim=2).any(dim=1).tolist()
    assert not changed[4]


def test_a_swapped_modality_is_made_of_valid_frames_only(batch):
    spoilt, _ = check_quality.corrupted(batch, 1, mismatch)
    given = {tuple(row) for row in batch.features[1][batch.frame_valid[:, :, 1]].tolist()}
    assert {tuple(row) for row in spoilt.features[1][batch.frame_valid[:, :, 1]].tolist()} <= given


def test_area_is_the_chance_that_a_corrupted_utterance_has_the_smaller_p_value():
    clean, spoilt = torch.tensor([0.5, 0.9, 0.2]), torch.tensor([0.2, 0.1, 0.5])
    wanted = np.mean([(s < c) + 0.5 * (s == c) for c in clean for s in spoilt])
    assert check_quality.area(clean, spoilt) == pytest.approx(wanted)


def test_the_interval_of_an_auroc_holds_99_percent_of_chance():
    rng = np.random.default_rng(0)
    areas = [check_quality.area(*torch.from_numpy(rng.random((2, 40)))) for _ in range(2000)]
    outside = np.mean(np.abs(np.array(areas) - 0.5) > check_quality.half_width(40))
    assert outside == pytest.approx(0.01, abs=0.006)


def test_the_true_mask_has_only_modalities_that_were_changed():
    corpus = make_synthetic(30, steps=4, seed=0)
    model = M3ERFusion(corpus.input_dims, len(corpus.classes), classes=corpus.classes)
    model.standardizer.fit(corpus.features, lengths=corpus.lengths, available=corpus.available)
    spoilt, truth = check_accuracy.corrupt_corpus(model, corpus, silence, seed=0)
    for m, (name, values) in enumerate(corpus.features.items()):
        changed = np.abs(spoilt.features[name] - values).max(axis=(1, 2)) > 1e-4
        assert changed.tolist() == truth[:, m].tolist()
    batch = model.standardize(corpus.features, corpus.lengths, corpus.available)
    features = dict(zip(corpus.features, batch.features, strict=True))
    _, wanted = corrupt(features, 0, kind=silence, lengths=batch.lengths, available=batch.available)
    assert truth.tolist() == wanted.tolist()
    unchanged, nothing = check_accuracy.corrupt_corpus(model, corpus, lambda x, generator, lengths: x.clone(), seed=0)
    assert not nothing.any()
    assert all(np.array_equal(unchanged.features[name], values) for name, values in corpus.features.items())


def test_results_record_their_commit(tmp_path):
    common.write_results(tmp_path / "run" / "result.json", {"seeds": 1}, results=[1])
    content = json.loads((tmp_path / "run" / "result.json").read_text())
    assert content["results"] == [1]
    assert re.fullmatch(r"[0-9a-f]{40}\+?|unknown", content["settings"]["commit"])
