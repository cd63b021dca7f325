"""The tables of the pages on results, and of README.md, from the JSON files in docs/results.

    python -m benchmarks.report.results

writes them anew. A table stands between two lines of a page, which name it. The same files give the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.quality import check_accuracy, check_quality
from m3er_fast.ablation import FULL, MODIFIED, NEITHER, NO_PROXY, ORACLE, ORIGINAL, AblationResult, AblationRow
from m3er_fast.metrics import mean_std

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PART = re.compile(
    r"(<!-- Written by python -m benchmarks\.report\.results: (.+?), begin -->\n).*?"
    r"(<!-- Written by python -m benchmarks\.report\.results: \2, end -->)",
    re.DOTALL,
)
CORPORA = {"CMU-MOSI": "mosi", "YouTube, split anew": "youtube-resplit", "generated": "generated"}
REAL = ("CMU-MOSI", "YouTube, split anew")
CORRELATION = "M3ER with the correlation check (the paper's)"
STEPS = {
    NEITHER: "M3ER without check and proxies",
    NO_PROXY: "M3ER with the check, without proxies",
    FULL: "M3ER",
    CORRELATION: "M3ER with the paper's check, the correlation",
    ORACLE: "M3ER with the true mask",
}


CHECK_COLUMNS = {"auroc": ".3f", "detected": ".1%", "false_alarms": ".1%"}
FILLED: tuple[tuple[str, str, str | int], ...] = (  # as a table calls it, its group and its label, or place, there
    ("regression, the default", "kind", "regression"),
    ("neighbours", "kind", "neighbours"),
    ("… affine", "kind", "neighbours, affine"),
    ('… `"faiss-ivf"`', "kind", "neighbours, faiss-ivf"),
    ("… a quarter of the bank", "bank", 1),
    ("… a sixteenth of the bank", "bank", 0),
    ("… a sixteenth, by k-means++", "bank by k-means++", 0),
    ("basis", "kind", "basis"),
    ("mean filling (the training mean)", "baselines", "mean filling"),
    ("zero filling (of raw features)", "baselines", "zero filling"),
    ("left unchanged, with the noise", "baselines", "as it came"),
)


def load(name: str) -> Any:
    """Return the content of a JSON file of results."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int | None = None) -> str:
    """Return a Markdown table whose last columns, by default all but the first, are aligned to the right."""
    numbers = len(head) - 1 if numbers is None else numbers
    lines = [head, ["---"] * (len(head) - numbers) + ["---:"] * numbers, *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# --- Ablations: the files of m3er-fast ablate ---


def accuracies(corpus: str, label: str, bad: bool) -> list[float]:
    """Return the accuracy of each seed in one row of an ablation; none if the file lacks the row."""
    found = load(CORPORA[corpus])
    rows = [*found["rows"], *found.get("baselines", [])]
    matching = (row for row in rows if (row["label"], row["ineffectual"]) == (label, bad))
    return [report["accuracy"] for row in matching for report in row["seeds"]]


def share(values: Sequence[float]) -> str:
    """Return mean ± standard deviation of shares; nothing for no value."""
    if not values:
        return ""
    mean, deviation = mean_std(values)
    return f"{mean:.1%}" + ("" if deviation is None else f" ± {deviation:.1%}")


def baseline_labels() -> list[str]:
    """Return the labels of the simpler models, in the order of the files, those of one modality beside each other."""
    found = dict.fromkeys(row["label"] for name in CORPORA.values() for row in load(name).get("baselines", []))
    return sorted(found, key=lambda label: not label.startswith("Logistic regression"))


def accuracy_table(labels: dict[str, str], corpora: Sequence[str], conditions: Sequence[bool]) -> str:
    """Return a table of accuracies: a row per experiment, a column per corpus and condition."""
    cases = [(corpus, bad) for corpus in corpora for bad in conditions]
    head = ["Accuracy", *(f"{corpus}{', bad' if bad else ''}" for corpus, bad in cases)]
    rows = [
        [shown, *(share(accuracies(corpus, label, bad)) for corpus, bad in cases)] for label, shown in labels.items()
    ]
    return table(head, [row for row in rows if any(row[1:])])


def loss_labels() -> dict[str, str]:
    """Return the labels of the modified and the original loss, by what their rows are called today or were called."""
    before = any(accuracies(corpus, ORIGINAL, False) for corpus in CORPORA)  # when the modified loss was the default
    return {"modified": FULL, "original": ORIGINAL} if before else {"modified": MODIFIED, "original": FULL}


def everything(corpora: Sequence[str]) -> str:
    """Return the accuracies of all steps and baselines, clean and with bad modalities."""
    names = {FULL: STEPS[FULL], MODIFIED: MODIFIED, ORIGINAL: "M3ER with the original loss (Liu et al. 2018)"}
    names |= {label: shown for label, shown in STEPS.items() if label != FULL}
    return accuracy_table(names | {label: label for label in baseline_labels()}, corpora, (False, True))


def whole_baselines() -> dict[str, str]:
    """Return the labels of the simpler models of all modalities."""
    return {label: label for label in baseline_labels() if not label.endswith(" alone")}


def real_data() -> str:
    """Return the accuracies on real data that a reader asks for first."""
    names = {FULL: STEPS[FULL], NEITHER: STEPS[NEITHER], ORACLE: STEPS[ORACLE]}
    return accuracy_table(names | whole_baselines(), REAL, (False, True))


def index() -> str:
    """Return the table of README.md."""
    names = {FULL: STEPS[FULL], NEITHER: STEPS[NEITHER]}
    return accuracy_table(names | whole_baselines(), ("CMU-MOSI", "generated"), (False, True))


def difference(corpus: str, one: str, other: str, bad: bool) -> str:
    """Return how much more accurate one row is than another, paired by seed, and whether that exceeds its deviation."""
    pairs = zip(accuracies(corpus, one, bad), accuracies(corpus, other, bad), strict=True)
    differences = [100 * (a - b) for a, b in pairs]
    if not differences:
        return ""
    mean, deviation = mean_std(differences)
    verdict = "within the noise" if abs(mean) <= (deviation or 0.0) else "yes" if mean > 0 else "no"
    return f"{verdict} ({signed(mean)} ± {deviation or 0.0:.1f})"


def signed(value: float) -> str:
    """Return a difference with its sign, a proper minus among them."""
    return f"{value:+.1f}".replace("-0.0", "+0.0").replace("-", "−")


def claims() -> str:
    """Return a row per claim of the paper and a column per corpus."""
    loss = loss_labels()
    compared = {
        "With bad modalities, [the check helps](results_check.md)": (NO_PROXY, NEITHER, True),
        "… and [the proxies help](results_proxies.md) further": (FULL, NO_PROXY, True),
        "… so that both are better than doing nothing": (FULL, NEITHER, True),
        "On clean data, [the modified loss](which_loss.md) is better": (loss["modified"], loss["original"], False),
    }
    rows = [[claim, *(difference(corpus, *what) for corpus in CORPORA)] for claim, what in compared.items()]
    rows.append(["[The correlation alone](results_correlation.md) finds bad modalities: AUROC", *map(areas, CORPORA)])
    rows.append(["[A proxy is near the original](results_proxy_error.md): its error", *map(errors, CORPORA)])
    return table(["Claim", *CORPORA], rows, numbers=0)


def spread(values: Sequence[float], form: str) -> str:
    """Return the smallest and the largest of some values."""
    return f"{min(values):{form}} to {max(values):{form}}" if values else ""


def areas(corpus: str) -> str:
    """Return the AUROCs of the paper's check over the modalities."""
    [check] = [check for check in load(CORPORA[corpus])["checks"] if check["check"] == "correlation"]
    return spread([value for value in check["auroc"].values() if value is not None], ".2f")


def errors(corpus: str) -> str:
    """Return the relative errors of proxies over the modalities."""
    return spread(list(load(CORPORA[corpus])["proxy_errors"].values()), ".0%")


def checks() -> str:
    """Return how well both checks separate the modalities in the ablations."""
    rows = []
    for corpus, name in CORPORA.items():
        for check in load(name)["checks"]:
            for modality in check["auroc"]:
                numbers = ((check[key][modality], form) for key, form in CHECK_COLUMNS.items())
                cells = ["–" if value is None else f"{value:{form}}" for value, form in numbers]
                rows.append([corpus, check["check"], modality, *cells])
    return table(["Corpus", "Check", "Modality", "AUROC", "Detected", "False alarms"], rows, numbers=3)


def proxy_errors() -> str:
    """Return the error of the proxies of each modality in the ablations."""
    third = ("text", "audio", "face or video")
    rows = [
        [corpus, *(f"{error:.1%}" for error in load(name)["proxy_errors"].values())] for corpus, name in CORPORA.items()
    ]
    return table(["Error of proxies", *third], rows)


def ablation(name: str) -> str:
    """Return the tables of one ablation, as m3er-fast ablate writes them; those by class fold."""
    found = load(name)

    def rows(key: str) -> tuple[AblationRow, ...]:
        return tuple(AblationRow(row["ineffectual"], row["label"], reports(row)) for row in found.get(key, []))

    def reports(row: Any) -> Any:
        read = json.loads(json.dumps(row["seeds"]), object_hook=lambda fields: SimpleNamespace(**fields))
        for report in read:
            report.accuracy_name = "accuracy"
        return tuple(read)

    given = [SimpleNamespace(**check) for check in found["checks"]]
    result = AblationResult(
        rows("rows"), given, found["proxy_errors"], found["settings"]["classes"], {}, baselines=rows("baselines")
    )
    overall, by_class, *others = result.to_markdown().split("\n\n")
    folded = f"<details><summary>By class</summary>\n\n{by_class}\n\n</details>"
    return "\n\n".join([overall, folded, *others])


# --- The other measurements ---


def of_check(write: Callable[..., Sequence[str]], key: str, *path: str) -> str:
    """Return a table of benchmarks.quality.check_quality."""
    found = load("check_quality")
    part = found[key]
    for name in path:
        part = part[name]
    more = [list(found["false alarms"][path[0]]["new"]["all"])] if path else []
    arguments = [path[0], part] if write is check_quality.contestants_table else [part]
    return "\n".join(write(*arguments, *more)).strip()


def protocol() -> str:
    """Return how checks find the paper's noise: the combined one, and the two statistics of the check before it."""
    shown = {"new": "combined", "energy": "energy", "correlation": "correlation (the paper's)"}
    found = load("check_quality")["paper's protocol"]
    named = {case: {shown[name]: of for name, of in names.items() if name in shown} for case, names in found.items()}
    return "\n".join(check_quality.protocol_table(named)).strip()


def filling() -> str:
    """Return the error and the gain of ways to fill in a lost modality, from benchmarks.quality.proxy_quality."""
    found = load("proxy_quality")["results"]
    rows = []
    for shown, group, label in FILLED:
        cells = []
        for groups in found.values():
            size = list(groups[group])[label] if isinstance(label, int) else label
            row, mean = groups[group][size], groups["baselines"]["mean filling"]
            gains = [100 * (a - b) for a, b in zip(row["accuracy"], mean["accuracy"], strict=True)]
            gain, deviation = mean_std(gains)
            cells += [f"{mean_std(row['error'])[0]:.1%}", f"{signed(gain)} ± {deviation or 0.0:.1f}"]
        rows.append([shown, *cells])
    head = [name for corpus in found for name in (f"{corpus}: error", "accuracy less mean filling")]
    return table(["", *head], rows)


def unfilled() -> str:
    """Return the accuracies that filling in is compared with."""
    found = load("proxy_quality")["results"]
    rows = [
        [corpus, *(share(groups["baselines"][label]["accuracy"]) for label in ("clean", "mean filling"))]
        for corpus, groups in found.items()
    ]
    return table(["Accuracy", "clean, every modality trusted", "bad, with mean filling"], rows)


def error_by_correlation() -> str:
    """Return the error of proxies over the correlation of the modalities, from benchmarks.quality.proxy_error."""
    found = load("proxy_error")["results"]
    rows = []
    for ridge, relations in found.items():
        for relation, values in relations.items():
            rows.append([ridge, relation, *(f"{100 * sum(of) / len(of):.3g} %" for of in values.values())])
    places = next(iter(next(iter(found.values())).values()))
    return table(["Ridge of neighbours", "Relation", *places], rows, numbers=len(places))


def speakers() -> str:
    """Return the spread of accuracy over the videos of CMU-MOSI, from benchmarks.quality.group_error."""
    rows = []
    for condition, found in load("group_error")["results"].items():
        videos = [video["accuracy"] for video in found["videos"].values()]
        low, high = f"{min(videos):.0%}", f"{max(videos):.0%}"
        rows.append([condition, f"{found['accuracy']:.1%}", low, high, f"{found['p_value']:.2f}"])
    return table(["", "All utterances", "Worst video", "Best video", "Chance of such a spread"], rows)


def accuracy_by_corruption(corpus: str) -> str:
    """Return the table of benchmarks.quality.check_accuracy for one corpus."""
    return check_accuracy.to_markdown({corpus: load("check_accuracy")["results"][corpus]}).strip()


def beside(operation: str, ours: str, contestants: Mapping[str, str], wanted: str) -> str:
    """Return our time and the ratios of others to it, from a run of ``pytest benchmarks`` with two threads."""
    run = json.loads((ROOT / "benchmarks" / "results" / "cpu-2-cores" / "one-call.json").read_text(encoding="utf-8"))
    found = (result["extra_info"] for result in run["benchmarks"])
    rows = [
        [
            row["group"].removeprefix("local least squares, ").removesuffix(", float32"),
            f"{1000 * row['median']:.3g} ms",
            *(f"{row['ratios'][name]:.2f}" for name in contestants),
        ]
        for row in found
        if (row["operation"], row["contestant"]) == (operation, ours) and set(contestants) <= set(row["ratios"])
    ]
    return table([wanted, "ours", *contestants.values()], rows)


SEARCHES = {
    "torch addmm + topk": "product + top-k",
    "scikit-learn brute": "scikit-learn brute",
    "faiss flat (index and search)": "FAISS flat, index and search",
    "faiss flat (search alone)": "FAISS flat, search alone",
}
SOLUTIONS = {
    "eager, affine": "reference",
    "compiled": "reference, compiled",
    "scikit-learn barycenter_weights": "scikit-learn `barycenter_weights`",
}
APPROXIMATE = {"faiss-ivf": '`"faiss-ivf"`', "faiss-hnsw": '`"faiss-hnsw"`'}
DETECTED = ("generated", "CMU-MOSI, test videos", "YouTube")
TABLES: dict[str, Callable[[], str]] = {
    "real data": real_data,
    "index": index,
    "claims": claims,
    **{f"ablation of {name}": lambda name=name: ablation(name) for name in (*CORPORA.values(), "youtube")},
    "check": lambda: accuracy_table({name: STEPS[name] for name in (NEITHER, NO_PROXY, ORACLE)}, [*CORPORA], [True]),
    "proxies": lambda: accuracy_table({name: STEPS[name] for name in (NEITHER, NO_PROXY, FULL)}, [*CORPORA], [True]),
    "correlation": lambda: accuracy_table(
        {name: STEPS[name] for name in (NEITHER, CORRELATION, FULL, ORACLE)}, [*CORPORA], [True]
    ),
    "baselines": lambda: everything([*CORPORA]),
    "checks": checks,
    "proxy errors": proxy_errors,
    "proxy errors by correlation": error_by_correlation,
    "filling": filling,
    "unfilled": unfilled,
    "search": lambda: beside("neighbors", "ours", SEARCHES, "k nearest of n × d"),
    "approximate search": lambda: beside("neighbors", "ours", APPROXIMATE, "k nearest of n × d"),
    "solution": lambda: beside("local_lstsq", "ours, affine", SOLUTIONS, "Weights and proxies"),
    "speakers": speakers,
    **{
        f"accuracy by corruption, {name}": lambda name=name: accuracy_by_corruption(name)
        for name in check_accuracy.CORPORA
    },
    "false alarms": lambda: of_check(check_quality.alarms_table, "false alarms"),
    "protocol": protocol,
    "goals": lambda: of_check(check_quality.goals_table, "goals"),
    **{
        f"detections, {name}": lambda name=name: of_check(check_quality.detections_table, "detections", name)
        for name in DETECTED
    },
    **{
        f"contestants, {name}": lambda name=name: of_check(check_quality.contestants_table, "detections", name)
        for name in DETECTED
    },
}


def with_tables(text: str) -> str:
    """Return a page with all of its tables written anew.

    Raises:
        KeyError: the page names a table that there is not.
    """
    return PART.sub(lambda part: f"{part[1]}\n{TABLES[part[2]]()}\n\n{part[3]}", text)


if __name__ == "__main__":
    for path in PAGES:
        before = path.read_text(encoding="utf-8")
        after = with_tables(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(path.relative_to(ROOT))
