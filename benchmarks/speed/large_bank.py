"""Fit a bank of a million paired frames, regenerate 10⁴ of them, and report time and memory.

    python -m benchmarks.speed.large_bank

prints one line of JSON. The training data is generated batch by batch, as a loader would read it. The peak is that of
the whole process, with Python, torch and the queries.
"""

import argparse
import json
import resource
import time

import torch

from m3er_fast import ProxyGenerator


class Frames:
    """Batches of two views of a common latent vector, the same in every pass."""

    def __init__(self, rows, features, batch=20_000):
        self.rows, self.features, self.batch = rows, features, batch
        self.maps = [torch.randn(32, features, generator=torch.Generator().manual_seed(m)) for m in (1, 2)]

    def draw(self, rows, seed):
        generator = torch.Generator().manual_seed(seed)
        latent = torch.randn(rows, 32, generator=generator)
        return {
            name: latent @ matrix + 3.0 * torch.randn(rows, self.features, generator=generator)
            for name, matrix in zip(("a", "b"), self.maps, strict=True)
        }

    def __iter__(self):
        for begin in range(0, self.rows, self.batch):
            yield self.draw(min(self.batch, self.rows - begin), begin)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10**6)
    parser.add_argument("--features", type=int, default=300)
    parser.add_argument("--queries", type=int, default=10**4)
    options = parser.parse_args()
    frames = Frames(options.rows, options.features)
    generator = ProxyGenerator({"a": options.features, "b": options.features}, bank="neighbours")
    start = time.perf_counter()
    generator.fit(frames)
    fitted = time.perf_counter()
    peak_of_fit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    queries = frames.draw(options.queries, seed=10**9)
    ready = time.perf_counter()
    result = generator.proxy(queries, torch.tensor([[True, False]]).expand(options.queries, -1))
    done = time.perf_counter()
    error = (result.features["b"][:, 0] - queries["b"]).norm() / queries["b"].norm()
    print(
        json.dumps(
            vars(options)
            | {
                "bank_gib": 2 * options.rows * options.features * 4 / 2**30,
                "fit_seconds": round(fitted - start, 1),
                "answer_seconds": round(done - ready, 1),
                "fit_peak_gib": round(peak_of_fit, 2),
                "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
                "relative_error": round(float(error), 3),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
