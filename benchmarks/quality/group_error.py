"""Errors per speaker on CMU-MOSI, each of whose videos has one speaker.

    python -m benchmarks.quality.group_error OUT

trains the default network (10 epochs) with five seeds on CMU-MOSI, found in $M3ER_DATA or shared/data, and counts the
errors in every test video, clean and corrupted by the paper's protocol. It writes OUT/group_error.json and .png.

The p-value tests the spread between videos, measured as the mean squared distance of their accuracies from the overall
one, weighted by size. It is the share of 10,000 random assignments of utterances to videos of the same sizes whose
spread is at least as large.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import binom

from benchmarks.quality import common
from m3er_fast import M3ERConfig
from m3er_fast.ablation import corrupt_corpus
from m3er_fast.corpus.convert import read
from m3er_fast.training import evaluate, train

SHUFFLES = 10_000


def measure(corpus, seeds):
    """Return the share of seeds that classify each test utterance correctly, (N,), by condition."""
    test, right = corpus.subset("test"), {"clean": [], "corrupted": []}
    for seed in range(seeds):
        config = M3ERConfig()
        config = config.replace(training=replace(config.training, epochs=10, seed=seed))
        model = train(corpus, config).model
        for condition, given in (("clean", test), ("corrupted", corrupt_corpus(model, test, seed)[0])):
            right[condition].append(evaluate(model, given).probabilities.argmax(axis=1) == test.target)
    return {condition: np.mean(rows, axis=0) for condition, rows in right.items()}


def spread(right, video):
    """Return the mean squared distance of the videos' accuracies from the overall one, weighted by size."""
    sizes = np.bincount(video)
    return float((sizes * (np.bincount(video, right) / sizes - right.mean()) ** 2).sum() / len(right))


def chance_of_spread(right, video):
    shuffled = np.random.default_rng(0)
    observed = spread(right, video)
    return float(np.mean([spread(shuffled.permutation(right), video) >= observed for _ in range(SHUFFLES)]))


def draw(result, path):
    figure = Figure(figsize=(9.5, 3.6), dpi=130, layout="constrained")
    for axes, (condition, row) in zip(figure.subplots(1, 2, sharey=True), result.items(), strict=True):
        videos = sorted(row["videos"].values(), key=lambda video: video["accuracy"])
        places = np.arange(len(videos))
        sizes = np.array([video["utterances"] for video in videos])
        low, high = (binom.ppf(q, sizes, row["accuracy"]) / sizes for q in (0.025, 0.975))
        axes.vlines(places, low, high, color="0.85", linewidth=5, label="95 % by chance, if all videos were alike")
        axes.plot(places, [video["accuracy"] for video in videos], "o", color="#0072B2", ms=4, label="one video")
        axes.axhline(row["accuracy"], color="0.4", linestyle="--", linewidth=1, label="all utterances")
        axes.set_title(f"{condition}: spread by chance p = {row['p_value']:.4f}", fontsize=9, loc="left")
        axes.set_xlabel("test videos, by accuracy")
        axes.set_xticks([])
        axes.grid(axis="y", color="0.92")
    figure.axes[0].set_ylabel("accuracy, mean of the seeds")
    figure.axes[0].legend(fontsize=8, loc="lower right")
    figure.savefig(path, metadata={"Software": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    common.add_data_argument(parser)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    corpus = read(options.data / "mosi_utterance", "utterance-csv")
    names, video = np.unique(corpus.subset("test").group, return_inverse=True)
    result = {
        condition: {
            "accuracy": float(right.mean()),
            "p_value": chance_of_spread(right, video),
            "videos": {
                str(name): {"utterances": int((video == v).sum()), "accuracy": float(right[video == v].mean())}
                for v, name in enumerate(names)
            },
        }
        for condition, right in measure(corpus, options.seeds).items()
    }
    common.write_results(options.out / "group_error.json", {"seeds": options.seeds}, results=result)
    draw(result, options.out / "group_error.png")


if __name__ == "__main__":
    main()
