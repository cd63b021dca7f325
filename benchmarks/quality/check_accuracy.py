"""What the modality check does to accuracy, by corruption.

    python -m benchmarks.quality.check_accuracy OUT

trains the default network with three seeds on the generated corpus and, if $M3ER_DATA or shared/data has it, on
CMU-MOSI, with the settings of docs/results_ablation.md. It corrupts the test split by the protocol of
:func:`m3er_fast.corruption.corrupt`: some modalities, but never all, of about 75 % of the utterances. Each corruption
has its medium severity; the paper's noise and silent, frozen and swapped modalities are there too. The utterances are
then classified with proxies for the modalities that are judged ineffectual

* by no check,
* by the paper's check, the correlation,
* by the combined check, the default,
* by the true mask, which is the result that a perfect check would give.

It writes OUT/check_accuracy.json and its table, OUT/check_accuracy.md.
"""

import argparse
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.quality import common
from benchmarks.quality.proxy_quality import corpora
from m3er_fast import ModalityCheck
from m3er_fast.corruption import corrupt
from m3er_fast.evaluation import standardize_corpus
from m3er_fast.metrics import mean_std
from m3er_fast.training import evaluate, train

CORPORA = ("generated", "CMU-MOSI")
CHECKS = ("no check", "correlation (the paper's)", "combined", "true mask")
CLEAN = "clean"


def corrupt_corpus(model, corpus, kind, seed):
    """Return the corpus, corrupted in standardised features, and the (N, M) mask of the corrupted modalities.

    The mask has only modalities that the corruption changes: a sequence of one frame cannot freeze.
    """
    batch = standardize_corpus(model, corpus)
    features = dict(zip(corpus.features, batch.features, strict=True))
    spoilt, truth = corrupt(
        features, seed, kind=kind, lengths=batch.lengths, available=batch.available, groups=corpus.group
    )
    valid = batch.frame_valid
    changed = [
        ((spoilt[name] != x).any(dim=2) & valid[:, :, m] & truth[:, m, None]).any(dim=1)
        for m, (name, x) in enumerate(features.items())
    ]
    truth = torch.stack(changed, dim=1)
    raw = model.standardizer.unstandardize([spoilt[name] for name in corpus.features])
    values = {}
    for m, (name, clean) in enumerate(corpus.features.items()):
        hit = (valid[:, :, m] & truth[:, m, None])[:, :, None].numpy()
        values[name] = np.where(hit, raw[m].to(torch.float32).numpy(), clean)
    return replace(corpus, features=values), truth.numpy()


def papers_check(model, training):
    """Return the paper's check, fitted to the training split in the model's units."""
    batch = standardize_corpus(model, training)
    check = ModalityCheck(model.input_dims, statistic="correlation", component_weights=None)
    with warnings.catch_warnings():  # few calibration samples: their effect is measured here
        warnings.simplefilter("ignore", UserWarning)
        return check.fit_batches(lambda: [batch])


def measure(corpus, config, seeds):
    """Return {"accuracy", "f1", "judged"} with an entry per seed, by corruption and check.

    "judged" is the share of the available modalities that the check judges as the true mask does.
    """
    test, results = corpus.subset("test"), {}
    for seed in range(seeds):
        settings = config.replace(training=replace(config.training, seed=seed))
        model = train(corpus, settings).model
        unchecked = model.ablated(check=False)
        with_correlation = model.ablated(check=papers_check(model, corpus.subset("train")))
        for kind, severity, corruption in ((CLEAN, "", None), *common.corruptions_of_accuracy()):
            given, truth = test, np.zeros(test.available.shape, dtype=bool)
            if corruption is not None:
                given, truth = corrupt_corpus(model, test, corruption, seed)
                if not truth.any():
                    continue
            predictions = (
                evaluate(unchecked, given),
                evaluate(with_correlation, given),
                evaluate(model, given),
                evaluate(model, given, effective=~truth),
            )
            rows = results.setdefault(common.described(kind, severity) if severity else kind, {})
            for check, prediction in zip(CHECKS, predictions, strict=True):
                there = prediction.available
                row = rows.setdefault(check, {"accuracy": [], "f1": [], "judged": []})
                row["accuracy"].append(prediction.report.accuracy)
                row["f1"].append(prediction.report.overall.f1)
                row["judged"].append(float((prediction.effective == ~truth)[there].mean()))
    return results


def to_markdown(results):
    lines = []
    for corpus, kinds in results.items():
        lines += [f"| {corpus}: accuracy, F1 | {' | '.join(CHECKS)} |", "|---|" + "---:|" * len(CHECKS)]
        written = set()
        for kind, rows in kinds.items():
            cells = []
            for row in rows.values():
                (accuracy, deviation), (f1, _) = mean_std(row["accuracy"]), mean_std(row["f1"])
                cells.append(f"{100 * accuracy:.1f} % ± {100 * (deviation or 0.0):.1f}, {f1:.3f}")
            if tuple(cells) not in written:  # one frame has no fraction, and where no frame is repeated all are words
                lines.append(f"| {kind} | {' | '.join(cells)} |")
            written.add(tuple(cells))
        lines.append("")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    common.add_data_argument(parser)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    results = {}
    for name, (corpus, config) in corpora(options.data).items():
        if name in CORPORA:
            print(name, flush=True)
            results[name] = measure(corpus, config, options.seeds)
    settings = {"seeds": options.seeds, "checks": CHECKS}
    common.write_results(options.out / "check_accuracy.json", settings, results=results)
    (options.out / "check_accuracy.md").write_text(to_markdown(results), encoding="utf-8")


if __name__ == "__main__":
    main()
