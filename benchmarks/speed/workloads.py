"""The sizes of every benchmark by name, on a CPU and on a GPU.

Sizes that people use come first: batches of 1 to 512, 2 to 8 classes, 1 to 50 steps. Then there are sizes so large that
no cache holds them. The numbers of features are those of the M3ER paper (text 300, audio 74, face 36), of CMU-MOSEI
(300, 74, 35), of CMU-MOSI in MFN's files (300, 5, 20), of IEMOCAP in DialogueRNN's (100, 100, 512, one vector per
utterance), and of embedding models (768, 1024, 512).

Dimension legend: M modalities, B samples, T steps, C classes, d features of a modality, n rows of a bank, Q queries,
K neighbours of a query, k components.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

Device = Literal["cpu", "cuda"]

PAPER_DIMS = {"text": 300, "audio": 74, "face": 36}
MOSEI_DIMS = {"text": 300, "audio": 74, "face": 35}
MOSI_DIMS = {"text": 300, "audio": 5, "face": 20}
IEMOCAP_DIMS = {"text": 100, "audio": 100, "face": 512}
EMBEDDING_DIMS = {"text": 768, "audio": 1024, "face": 512}

BATCHES = (1, 8, 32, 64, 128, 256, 512)


class Views(NamedTuple):
    """A batch of feature sequences, for the whole model, its scan and the moments that its check judges by."""

    dims: dict[str, int]
    batch: int
    steps: int
    feedback: bool = True  # whether the attended cells enter the LSTMs' next step

    @property
    def features(self) -> str:
        """The numbers of features, such as "300/74/36"."""
        return "/".join(map(str, self.dims.values()))

    @property
    def frames(self) -> int:
        """B · T."""
        return self.batch * self.steps

    @property
    def bytes(self) -> int:
        """Bytes of all features in float32."""
        return 4 * self.frames * sum(self.dims.values())


class Logits(NamedTuple):
    """Logits (M, B, C), for the fusion loss."""

    modalities: int
    batch: int
    classes: int
    dtype: torch.dtype


class Vectors(NamedTuple):
    """Utterance vectors (B, d) of each modality, for the check."""

    dims: dict[str, int]
    batch: int
    components: int  # at most; a pair has no more than its smaller modality has features
    dtype: torch.dtype


class Bank(NamedTuple):
    """A bank of n rows and Q queries, for the search."""

    rows: int
    features: int
    queries: int
    k: int


class Neighbors(NamedTuple):
    """Q queries of d features, K neighbours each, e features of their partners, for local least squares."""

    queries: int
    k: int
    features: int
    partner_features: int
    dtype: torch.dtype


class Pair(NamedTuple):
    """n rows of two views, for a CCA."""

    rows: int
    x_features: int
    y_features: int
    components: int
    dtype: torch.dtype = torch.float32


# Whole models. A batch of "huge" has 1.3 GB, and a training step takes several times as much.
MODELS: dict[Device, dict[str, Views]] = {
    "cpu": {
        **{f"CMU-MOSEI, B={batch}": Views(MOSEI_DIMS, batch, 20) for batch in BATCHES},
        "CMU-MOSI, B=32": Views(MOSI_DIMS, 32, 50),
        "IEMOCAP, B=32": Views(IEMOCAP_DIMS, 32, 1),
    }
}
MODELS["cuda"] = {
    "CMU-MOSEI, B=64": Views(MOSEI_DIMS, 64, 20),
    "paper, B=256": Views(PAPER_DIMS, 256, 20),
    "huge, B=8192": Views(PAPER_DIMS, 8192, 100),
}


def _logits(*sizes: tuple[int, int]) -> dict[str, Logits]:
    """Return logits of three modalities for some B and C."""
    return {
        f"{batch} sample{'s' * (batch > 1)}, {classes} classes": Logits(3, batch, classes, torch.float32)
        for batch, classes in sizes
    }


LOSS: dict[Device, dict[str, Logits]] = {
    "cpu": _logits(
        *((batch, 6) for batch in BATCHES),
        *((16, 4), (64, 2), (64, 4), (64, 8)),
        *((1024, 6), (8192, 4), (8192, 6), (65536, 6), (4096, 1000)),
    )
}
# On a GPU the sizes with a goal come first, so that only others are missing if time runs out.
LOSS["cuda"] = {
    "1M samples, 6 classes": Logits(3, 2**20, 6, torch.float32),
    "1M samples, 6 classes, bf16": Logits(3, 2**20, 6, torch.bfloat16),
    "65536 samples, 1024 classes, bf16": Logits(3, 65536, 1024, torch.bfloat16),
    "2048 samples, 32768 classes, bf16": Logits(3, 2048, 32768, torch.bfloat16),
    "512 samples, 131072 classes, bf16": Logits(3, 512, 131072, torch.bfloat16),
    **_logits((256, 6), (8192, 6), (65536, 6), (4096, 1000)),
}

CHECK: dict[Device, dict[str, Vectors]] = {
    "cpu": {
        **{f"CMU-MOSEI, B={batch}": Vectors(MOSEI_DIMS, batch, 30, torch.float32) for batch in BATCHES},
        "8192 samples": Vectors(MOSEI_DIMS, 8192, 30, torch.float32),
        "CMU-MOSI, B=32": Vectors(MOSI_DIMS, 32, 30, torch.float32),
        "IEMOCAP, B=32": Vectors(IEMOCAP_DIMS, 32, 30, torch.float32),
        "2048 samples of embeddings": Vectors(EMBEDDING_DIMS, 2048, 30, torch.float32),
    }
}
CHECK["cuda"] = {
    "65536 samples": Vectors(MOSEI_DIMS, 65536, 30, torch.float32),
    "65536 samples, bf16": Vectors(MOSEI_DIMS, 65536, 30, torch.bfloat16),
    "8192 samples, bf16": Vectors(MOSEI_DIMS, 8192, 30, torch.bfloat16),
    "8192 samples": Vectors(MOSEI_DIMS, 8192, 30, torch.float32),
    "32 samples": Vectors(MOSEI_DIMS, 32, 30, torch.float32),
}

SEQUENCES: dict[Device, dict[str, Views]] = {
    "cpu": {
        f"B={batch}, T={steps}": Views(PAPER_DIMS, batch, steps)
        for batch, steps in (*((batch, 20) for batch in BATCHES), (32, 1), (32, 5), (32, 50), (512, 1), (64, 500))
    }
}
SEQUENCES["cuda"] = {
    f"B={batch}, T={steps}": Views(PAPER_DIMS, batch, steps) for batch, steps in ((8192, 100), (512, 20), (32, 20))
}

NEIGHBORS: dict[Device, dict[str, Bank]] = {
    "cpu": {
        "100,000 x 300": Bank(100_000, 300, 1000, 16),
        "1000 x 300": Bank(1000, 300, 1000, 16),
        "10,000 x 300": Bank(10_000, 300, 1000, 16),
        "100,000 x 74": Bank(100_000, 74, 1000, 16),
        "100,000 x 300, few queries": Bank(100_000, 300, 32, 16),
        "100,000 x 300, many neighbours": Bank(100_000, 300, 1000, 64),
        "embeddings": Bank(512, 1024, 256, 16),
    },
    "cuda": {
        "1M x 768": Bank(1_000_000, 768, 16384, 16),
        "100,000 x 300": Bank(100_000, 300, 16384, 16),
    },
}

LOCAL_LSTSQ: dict[Device, dict[str, Neighbors]] = {
    "cpu": {
        "text to audio": Neighbors(1000, 16, 300, 74, torch.float32),
        "audio to text": Neighbors(1000, 16, 74, 300, torch.float32),
        "text to audio, K=64": Neighbors(1000, 64, 300, 74, torch.float32),
        "embeddings": Neighbors(1000, 16, 768, 1024, torch.float32),
    },
    "cuda": {
        "65536 queries, K=32, bf16": Neighbors(65536, 32, 300, 300, torch.bfloat16),
        "65536 queries, K=16": Neighbors(65536, 16, 300, 300, torch.float32),
        "16384 queries, K=64, bf16": Neighbors(16384, 64, 300, 300, torch.bfloat16),
    },
}


def _scans(*sizes: tuple[int, int], feedback: bool = True) -> dict[str, Views]:
    """Return scans of the paper's features for some B and T."""
    return {
        f"B={batch}, T={steps}{'' if feedback else ', no feedback'}": Views(PAPER_DIMS, batch, steps, feedback)
        for batch, steps in sizes
    }


MEMORY_SCAN: dict[Device, dict[str, Views]] = {
    "cpu": {
        **_scans(*((batch, 20) for batch in BATCHES)),
        **_scans((1, 1), (1, 5), (1, 50), (32, 1), (32, 5), (32, 50), (256, 1), (256, 5), (4096, 20), (4096, 100)),
        **_scans((1, 20), (32, 20), (256, 20), (2048, 20), feedback=False),
    },
    "cuda": _scans((32, 20), (8192, 100), (1, 20), (256, 20), (4096, 20), (32, 1), (32, 100)),
}

CCA_FITS: dict[Device, dict[str, Pair]] = {
    "cpu": {
        "20,000 rows of 300 and 74": Pair(20_000, 300, 74, 30),
        "20,000 rows of 300 and 74, float64": Pair(20_000, 300, 74, 30, torch.float64),
        "20,000 rows of embeddings": Pair(20_000, 768, 512, 30),
    },
    # The rows lie in the GPU's memory.
    "cuda": {"1M rows of 300 and 74": Pair(1_000_000, 300, 74, 30)},
}

# Utterances of the generated corpora that are read and scored; each has up to 20 frames, 33 KB.
READ = 8192
SCORED: dict[Device, int] = {"cpu": 2048, "cuda": 32768}
