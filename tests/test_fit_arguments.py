"""What every ``fit`` takes, and what it says of data that teach nothing."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from m3er_fast import M3ERConfig, M3ERFusion, ModalityCheck, ProxyGenerator, Standardizer
from m3er_fast.config import TrainingConfig
from m3er_fast.corpus.synthetic import make_synthetic
from m3er_fast.training import train

DIMS = {"text": 5, "audio": 3}
N, T = 100, 6
KINDS = {
    "model": lambda: M3ERFusion(DIMS, 3),
    "standardizer": lambda: Standardizer(DIMS),
    "check": lambda: ModalityCheck(DIMS),
    "proxies": lambda: ProxyGenerator(DIMS),
}


@pytest.fixture(params=KINDS)
def step(request):
    return KINDS[request.param]()


def features():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(N, T, dim, generator=generator) for name, dim in DIMS.items()}


def labels():
    return torch.randint(0, 3, (N,), generator=torch.Generator().manual_seed(1))


def warnings_of(function):
    """The warnings of a call, and that each points at the line of this file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    assert {Path(warning.filename).name for warning in caught} <= {Path(__file__).name}
    return [str(warning.message) for warning in caught]


def test_labels_are_no_second_argument(step):
    with pytest.raises(TypeError, match="takes 2 positional arguments but 3 were given"):
        step.fit(features(), labels())
    if hasattr(step, "partial_fit"):
        with pytest.raises(TypeError, match="takes 2 positional arguments but 3 were given"):
            step.partial_fit(features(), labels())


def test_labels_in_the_batches_of_a_loader_are_refused(step):
    class Labelled(TensorDataset):
        def __getitem__(self, index):
            text, audio, label = super().__getitem__(index)
            return {"text": text, "audio": audio}, label

    loader = DataLoader(Labelled(*features().values(), labels()), batch_size=10)
    with pytest.raises(ValueError, match=re.escape("a batch of two may be (features, labels)")):
        step.fit(loader)


def test_clean_data_are_learned_without_a_word(step):
    lengths = torch.randint(0, T + 1, (N,), generator=torch.Generator().manual_seed(2))
    assert warnings_of(lambda: step.fit(features())) == []
    assert warnings_of(lambda: step.fit(features(), lengths=lengths)) == []
    assert warnings_of(lambda: step.fit({name: x[:, 0] for name, x in features().items()})) == []


def test_labels_as_lengths_reach_no_end_of_the_time_axis(step):
    wanted = (
        f"lengths: the longest utterance has 2 of {T} frames; lengths are numbers of frames, not labels, of which "
        "fitting takes none"
    )
    assert warnings_of(lambda: step.fit(features(), lengths=labels())) == [wanted]
    halves = [
        ({name: x[rows] for name, x in features().items()}, labels()[rows], None) for rows in (slice(50), slice(50, N))
    ]
    assert warnings_of(lambda: step.fit(halves)) == [wanted]


def test_padding_of_zeros_without_lengths_is_said(step):
    padded = features()
    for x in padded.values():
        x[:37, 4:] = 0
    assert warnings_of(lambda: step.fit(padded)) == [
        f"features: 37 of {N} utterances end in a frame of zeros that counts as valid; if it is padding, give lengths"
    ]
    lengths = torch.full((N,), T)
    lengths[:37] = 4
    assert warnings_of(lambda: step.fit(padded, lengths=lengths)) == []
    padded["text"][:37] = features()["text"][:37]  # silence in one modality is no padding
    assert warnings_of(lambda: step.fit(padded)) == []


@pytest.mark.parametrize("lost", [None, float("nan")])
def test_a_modality_without_a_valid_frame_is_said(step, lost):
    given = features()
    given["audio"] = None if lost is None else given["audio"] * lost
    assert warnings_of(lambda: step.fit(given)) == [
        "features['audio']: not one valid frame, so nothing is learned of this modality"
    ]


def test_a_train_split_shorter_than_its_corpus_is_no_reason_to_warn():
    corpus = make_synthetic(120, input_dims={"text": 4, "audio": 3}, num_classes=2, steps=4, latent_dim=3)
    corpus.lengths[corpus.split == "train"] = corpus.lengths[corpus.split == "train"].clip(max=3)
    config = M3ERConfig(training=TrainingConfig(epochs=1))
    assert warnings_of(lambda: train(corpus, config)) == []
