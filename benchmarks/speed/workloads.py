"""The sizes of every benchmark by name, on a CPU and on a GPU.

The numbers of features are those of the M3ER paper (text 300, audio 74, face 36), of CMU-MOSEI (300, 74, 35) and of
embedding models (768, 1024, 512). There are also sizes so small that only overhead counts, and so large that no cache
holds them.

Dimension legend: M modalities, B samples, T steps, C classes, d features of a modality, n rows of a bank, Q queries,
K neighbours of a query, k components.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

Device = Literal["cpu", "cuda"]

PAPER_DIMS = {"text": 300, "audio": 74, "face": 36}
MOSEI_DIMS = {"text": 300, "audio": 74, "face": 35}
EMBEDDING_DIMS = {"text": 768, "audio": 1024, "face": 512}
TINY_DIMS = {"text": 32, "audio": 16, "face": 8}


class Views(NamedTuple):
    """A batch of feature sequences, for the whole model, its scan and the moments that its check judges by."""

    dims: dict[str, int]
    batch: int
    steps: int

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
    components: int
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


# Whole models. A batch of "huge" has 1.3 GB, and a training step takes several times as much.
MODELS: dict[Device, dict[str, Views]] = {
    "cpu": {
        "tiny": Views(TINY_DIMS, 8, 4),
        "CMU-MOSEI": Views(MOSEI_DIMS, 64, 20),
        "paper": Views(PAPER_DIMS, 256, 20),
        "embeddings": Views(EMBEDDING_DIMS, 256, 1),
    }
}
MODELS["cuda"] = MODELS["cpu"] | {"huge": Views(PAPER_DIMS, 8192, 100)}

LOSS: dict[Device, dict[str, Logits]] = {
    "cpu": {
        "batch of 256, 6 classes": Logits(3, 256, 6, torch.float32),
        "8192 samples, 6 classes": Logits(3, 8192, 6, torch.float32),
        "65536 samples, 6 classes": Logits(3, 65536, 6, torch.float32),
        "4096 samples, 1000 classes": Logits(3, 4096, 1000, torch.float32),
    }
}
# On a GPU the sizes with a goal come first, so that only others are missing if time runs out.
LOSS["cuda"] = {
    "1M samples, 6 classes": Logits(3, 2**20, 6, torch.float32),
    "1M samples, 6 classes, bf16": Logits(3, 2**20, 6, torch.bfloat16),
    "65536 samples, 1024 classes, bf16": Logits(3, 65536, 1024, torch.bfloat16),
    "2048 samples, 32768 classes, bf16": Logits(3, 2048, 32768, torch.bfloat16),
    "512 samples, 131072 classes, bf16": Logits(3, 512, 131072, torch.bfloat16),
    **LOSS["cpu"],
}

CHECK: dict[Device, dict[str, Vectors]] = {
    "cpu": {
        "32 samples": Vectors(MOSEI_DIMS, 32, 30, torch.float32),
        "8192 samples": Vectors(MOSEI_DIMS, 8192, 30, torch.float32),
        "2048 samples of embeddings": Vectors(EMBEDDING_DIMS, 2048, 30, torch.float32),
    }
}
CHECK["cuda"] = {
    "65536 samples": Vectors(MOSEI_DIMS, 65536, 30, torch.float32),
    "65536 samples, bf16": Vectors(MOSEI_DIMS, 65536, 30, torch.bfloat16),
    "8192 samples, bf16": Vectors(MOSEI_DIMS, 8192, 30, torch.bfloat16),
    **CHECK["cpu"],
}

SEQUENCES: dict[Device, dict[str, Views]] = {
    "cpu": {
        "B=1, T=20": Views(PAPER_DIMS, 1, 20),
        "B=32, T=20": Views(PAPER_DIMS, 32, 20),
        "B=512, T=20": Views(PAPER_DIMS, 512, 20),
        "B=512, T=1": Views(PAPER_DIMS, 512, 1),
        "B=64, T=500": Views(PAPER_DIMS, 64, 500),
    }
}
SEQUENCES["cuda"] = {"B=8192, T=100": Views(PAPER_DIMS, 8192, 100), **SEQUENCES["cpu"]}

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

_SCANS = {
    f"B={batch}, T={steps}": Views(PAPER_DIMS, batch, steps) for batch in (1, 32, 256, 4096) for steps in (1, 20, 100)
}
MEMORY_SCAN: dict[Device, dict[str, Views]] = {
    "cpu": _SCANS,
    "cuda": {"B=32, T=20": Views(PAPER_DIMS, 32, 20), "B=8192, T=100": Views(PAPER_DIMS, 8192, 100), **_SCANS},
}

CCA_FITS: dict[Device, dict[str, Pair]] = {
    "cpu": {
        "20,000 rows of 300 and 74": Pair(20_000, 300, 74, 30),
        "20,000 rows of embeddings": Pair(20_000, 768, 512, 30),
    },
    # The rows lie in the GPU's memory.
    "cuda": {"1M rows of 300 and 74": Pair(1_000_000, 300, 74, 30)},
}

# Utterances of the generated corpora that are read and scored; each has up to 20 frames, 33 KB.
READ = 8192
SCORED: dict[Device, int] = {"cpu": 2048, "cuda": 32768}
