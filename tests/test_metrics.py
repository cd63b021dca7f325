"""The scores against hand-counted tables and scikit-learn, and the refusal of invalid input."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from sklearn import metrics as sklearn_metrics

from m3er_fast.metrics import ClassificationReport, auroc, classification_report, count_answers, mean_std

EMOTIONS = ("angry", "happy", "neutral", "sad")
# Ten samples. True: 4 angry, 3 happy, 3 neutral, no sad; predicted: 4 angry, 3 happy, 2 neutral, 1 sad.
TARGET = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
PREDICTED = [0, 0, 0, 1, 1, 1, 0, 2, 2, 3]


def one_hot(labels, num_classes=4):
    return np.eye(num_classes)[labels]


def random_case(seed=0, samples=500, num_classes=4):
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(num_classes), samples), rng.integers(0, num_classes, samples)


# --- single label -----------------------------------------------------------------------------------------------------


def test_hand_counted_table():
    report = classification_report(one_hot(PREDICTED), TARGET, EMOTIONS)
    rows = [(row.name, row.support, row.f1, row.mean_accuracy) for row in report.per_class]
    assert rows == [
        ("angry", 4, 6 / 8, 8 / 10),
        ("happy", 3, 4 / 6, 8 / 10),
        ("neutral", 3, 4 / 5, 9 / 10),
        ("sad", 0, 0.0, 9 / 10),
    ]
    # The class that does not occur is in no mean.
    assert report.overall.support == 10
    assert report.overall.f1 == pytest.approx((6 / 8 + 4 / 6 + 4 / 5) / 3, abs=1e-15)
    assert report.overall.mean_accuracy == pytest.approx(25 / 30, abs=1e-15)
    assert report.accuracy == 7 / 10
    assert report.balanced_accuracy == pytest.approx((3 / 4 + 2 / 3 + 2 / 3) / 3, abs=1e-15)
    assert report.confusion == ((3, 1, 0, 0), (1, 2, 0, 0), (0, 0, 2, 1), (0, 0, 0, 0))
    assert report.cross_entropy is None
    assert report.jensen_shannon is None


def test_single_label_scores_equal_scikit_learn_and_the_confusion_a_count_of_pairs():
    probabilities, target = random_case()
    predicted = probabilities.argmax(axis=1)
    report = classification_report(probabilities, target, EMOTIONS)
    f1 = sklearn_metrics.f1_score(target, predicted, average=None)
    np.testing.assert_allclose([row.f1 for row in report.per_class], f1, rtol=1e-14)
    np.testing.assert_allclose(report.overall.f1, f1.mean(), rtol=1e-14)
    for c, row in enumerate(report.per_class):
        expected = sklearn_metrics.accuracy_score(target == c, predicted == c)
        assert row.mean_accuracy == pytest.approx(expected, abs=1e-15)
    assert report.accuracy == pytest.approx(sklearn_metrics.accuracy_score(target, predicted), abs=1e-15)
    expected = sklearn_metrics.balanced_accuracy_score(target, predicted)
    assert report.balanced_accuracy == pytest.approx(expected, abs=1e-15)
    counted = [[((target == true) & (predicted == said)).sum() for said in range(4)] for true in range(4)]
    np.testing.assert_array_equal(report.confusion, counted)


def test_overall_ma_follows_from_accuracy_when_every_class_is_present():
    report = classification_report(*random_case(), EMOTIONS)
    assert report.overall.mean_accuracy == pytest.approx(1 - 2 * (1 - report.accuracy) / 4, abs=1e-14)


def test_ignored_samples_leave_no_trace():
    probabilities, target = random_case()
    ignored = np.arange(500) % 3 == 0
    report = classification_report(probabilities, np.where(ignored, -100, target), EMOTIONS)
    assert report == classification_report(probabilities[~ignored], target[~ignored], EMOTIONS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_of_every_float_dtype_and_with_a_gradient_are_accepted(dtype):
    probabilities = torch.tensor(one_hot(PREDICTED), dtype=dtype, requires_grad=True)
    report = classification_report(probabilities, torch.tensor(TARGET), EMOTIONS)
    assert report == classification_report(one_hot(PREDICTED), TARGET, EMOTIONS)


def test_a_single_class_is_scored_without_a_warning(recwarn):
    report = classification_report([[1.0], [0.5]], [0, 0], ["only"])
    assert (report.accuracy, report.overall.f1, report.confusion) == (1.0, 1.0, ((2,),))
    assert not recwarn


def test_a_tie_goes_to_the_first_class():
    assert classification_report([[0.5, 0.5]], [0], ["no", "yes"]).accuracy == 1.0
    assert classification_report([[0.5, 0.5]], [1], ["no", "yes"]).accuracy == 0.0


# --- multi-label ------------------------------------------------------------------------------------------------------


def test_hand_counted_multi_label_table():
    probabilities = [[0.5, 0.4], [0.9, 0.1], [0.2, 0.3], [0.7, 0.2]]
    target = [[1, 0], [1, 0], [1, 0], [0, 0]]
    report = classification_report(probabilities, target, ["happy", "sad"])
    happy, sad = report.per_class
    assert report.task == "multi"
    assert (happy.support, happy.f1, happy.mean_accuracy) == (3, 4 / 6, 2 / 4)
    assert (sad.support, sad.f1, sad.mean_accuracy) == (0, 0.0, 1.0)
    assert (report.overall.f1, report.overall.mean_accuracy) == (4 / 6, 2 / 4)
    assert report.accuracy == 2 / 4
    assert report.balanced_accuracy == pytest.approx((2 / 3 + 0) / 2, abs=1e-15)
    assert report.confusion is None


@pytest.mark.parametrize("dtype", [bool, np.int64, np.float32])
@pytest.mark.parametrize("num_classes", [1, 4])
def test_multi_label_scores_equal_scikit_learn(num_classes, dtype):
    rng = np.random.default_rng(1)
    probabilities = rng.random((400, num_classes))
    target = rng.random((400, num_classes)) < 0.3
    report = classification_report(probabilities, target.astype(dtype), EMOTIONS[:num_classes])
    answer = probabilities >= 0.5
    for c, row in enumerate(report.per_class):
        assert row.f1 == pytest.approx(sklearn_metrics.f1_score(target[:, c], answer[:, c]), rel=1e-14)
        expected = sklearn_metrics.accuracy_score(target[:, c], answer[:, c])
        assert row.mean_accuracy == pytest.approx(expected, abs=1e-15)
    balanced = [sklearn_metrics.balanced_accuracy_score(target[:, c], answer[:, c]) for c in range(num_classes)]
    assert report.balanced_accuracy == pytest.approx(np.mean(balanced), rel=1e-14)
    assert report.accuracy == pytest.approx((target == answer).all(axis=1).mean(), abs=1e-15)


def test_a_question_always_answered_yes_counts_by_its_recall():
    report = classification_report([[0.9], [0.2]], [[1], [1]], ["happy"])
    assert report.balanced_accuracy == 0.5


# --- distributions ----------------------------------------------------------------------------------------------------


def test_distributions_are_scored_by_their_largest_entry_and_their_divergence():
    probabilities, _ = random_case(0)
    target, _ = random_case(1)
    report = classification_report(probabilities, target, EMOTIONS)
    hard = classification_report(probabilities, target.argmax(axis=1), EMOTIONS)
    assert report.task == "distribution"
    assert (report.per_class, report.overall, report.confusion) == (hard.per_class, hard.overall, hard.confusion)
    expected = -np.mean([math.fsum(t * math.log(p) for t, p in zip(*rows, strict=True)) for rows in
                         zip(target, probabilities, strict=True)])  # fmt: skip
    assert report.cross_entropy == pytest.approx(expected, rel=1e-13)
    expected = np.mean(jensenshannon(probabilities, target, axis=1) ** 2)
    assert report.jensen_shannon == pytest.approx(expected, rel=1e-12)


def test_a_probability_of_zero_gives_finite_divergences():
    report = classification_report([[1.0, 0.0]], [[0.0, 1.0]], ["no", "yes"], task="distribution")
    assert report.cross_entropy == pytest.approx(-math.log(np.finfo(np.float32).tiny), rel=1e-14)
    assert report.jensen_shannon == pytest.approx(math.log(2), rel=1e-14)
    perfect = classification_report([[1.0, 0.0]], [[1.0, 0.0]], ["no", "yes"], task="distribution")
    assert perfect.cross_entropy == 0.0
    assert perfect.jensen_shannon == 0.0


# --- output -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "task"), [(TARGET, "single"), (one_hot(TARGET), "multi"), (one_hot(TARGET), "distribution")]
)
def test_to_dict_survives_json_unchanged(target, task):
    report = classification_report(one_hot(PREDICTED), target, EMOTIONS, task=task).to_dict()
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["per_class"][0]["name"] == "angry"


def test_to_markdown_prints_table_2_formats():
    report = classification_report(one_hot(PREDICTED), TARGET, ["angry|mad", *EMOTIONS[1:]])
    assert report.to_markdown().splitlines() == [
        "| Class | Support | F1 | MA |",
        "|---|---:|---:|---:|",
        r"| angry\|mad | 4 | 0.750 | 80.0% |",
        "| happy | 3 | 0.667 | 80.0% |",
        "| neutral | 3 | 0.800 | 90.0% |",
        "| sad | 0 | 0.000 | 90.0% |",
        "| Overall | 10 | 0.739 | 83.3% |",
        "",
        "Accuracy 70.0%, balanced accuracy 69.4%, ECE 0.300.",
    ]


def test_to_markdown_adds_the_divergences_of_distributions():
    report = classification_report([[0.5, 0.5]], [[0.25, 0.75]], ["no", "yes"])
    assert report.to_markdown().endswith("cross entropy 0.693 nats, Jensen-Shannon divergence 0.034 nats.")


# --- refusals ---------------------------------------------------------------------------------------------------------

TWO = ["no", "yes"]
NOT_A_NUMBER = float("nan")


@pytest.mark.parametrize(
    ("probabilities", "target", "classes", "task", "message"),
    [
        (np.zeros((0, 2)), np.zeros(0, dtype=int), TWO, None, "at least one sample to score, got none"),
        ([[0.5, 0.5]], [-100], TWO, None, "every label is -100"),
        ([[0.5, 0.5]], [[0, 0]], TWO, None, "no class occurs"),
        ([[0.5, NOT_A_NUMBER]], [0], TWO, None, "probabilities must be finite"),
        ([[1.5, 0.5]], [0], TWO, None, "logits need a softmax"),
        ([[-0.5, 0.5]], [0], TWO, None, "logits need a softmax"),
        ([[0.5, 0.5]], [0], ["a", "b", "c"], None, r"shape \(N, 3\), got float64 of shape \(1, 2\)"),
        ([0.5], [0], ["a"], None, r"shape \(N, 1\)"),
        ([[1, 0]], [0], TWO, None, "probabilities must be floats"),
        ([[0.5, 0.5]], [2], TWO, None, r"target must lie in 0\.\.1 or be -100, got 2"),
        ([[0.5, 0.5]], [-1], TWO, None, "got -1"),
        ([[0.5, 0.5]], [0.0], TWO, None, "target must be integers"),
        ([[0.5, 0.5]], [0, 1], TWO, None, r"integers of shape \(1,\)"),
        ([[0.5, 0.5]], [[0, 1, 0]], TWO, None, r"numbers of shape \(1, 2\)"),
        ([[0.5, 0.5]], [[0.2, 0.2]], TWO, None, "sum to one"),
        ([[0.5, 0.5]], [[-0.5, 1.5]], TWO, None, "not negative"),
        ([[0.5, 0.5]], [[NOT_A_NUMBER, 1.0]], TWO, None, "must be finite"),
        ([[0.5, 0.5]], [[0.2, 0.8]], TWO, "multi", "0 and 1 only"),
        ([[0.5, 0.5]], [[0, 1]], TWO, "ranking", "task must be one of"),
        ([[0.5, 0.5]], [0], ["yes", "yes"], None, "distinct names"),
        ([[0.5, 0.5]], [0], "no", None, "distinct names"),
    ],
)
def test_invalid_input_is_one_clear_error(probabilities, target, classes, task, message):
    with pytest.raises(ValueError, match=message):
        classification_report(probabilities, target, classes, task=task)


# --- helpers ----------------------------------------------------------------------------------------------------------


def test_auroc_is_the_chance_that_a_positive_scores_higher():
    # Pairs won: 0.9 beats both, 0.4 beats 0.1 and ties 0.4.
    assert auroc([0.9, 0.4, 0.4, 0.1], [True, True, False, False]) == pytest.approx(3.5 / 4, abs=1e-15)
    assert auroc(torch.tensor([0.1, 0.2]), torch.tensor([False, True])) == 1.0


def test_auroc_ranks_infinite_scores():
    assert auroc([np.inf, 1e300, 0.0, -np.inf], [True, False, True, False]) == pytest.approx(3 / 4, abs=1e-15)


@pytest.mark.parametrize(
    ("scores", "positives", "message"),
    [
        ([1.0, NOT_A_NUMBER], [True, False], "must not be NaN"),
        ([1.0, 2.0], [True, True], "both True and False, got 2 True of 2"),
        ([], np.zeros(0, dtype=bool), "both True and False"),
        ([1.0, 2.0], [1, 0], "boolean positives"),
        ([1.0], [True, False], "must agree"),
    ],
)
def test_auroc_refuses_input_without_an_area(scores, positives, message):
    with pytest.raises(ValueError, match=message):
        auroc(scores, positives)


def test_mean_std_is_the_sample_deviation():
    mean, std = mean_std([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3, rel=1e-15)
    assert std == pytest.approx(math.sqrt(7 / 3), rel=1e-15)


def test_the_deviation_of_one_value_is_none():
    assert mean_std([0.5]) == (0.5, None)


@pytest.mark.parametrize("values", [[], [1.0, NOT_A_NUMBER]])
def test_mean_std_refuses_nothing_and_not_a_number(values):
    with pytest.raises(ValueError, match="one or more finite numbers"):
        mean_std(values)


# --- calibration ------------------------------------------------------------------------------------------------------


def expected_calibration_error(confidence, is_right, bins=15):
    """Counted answer by answer, with exact edges: an answer belongs to the first bin whose upper edge it reaches."""
    sums = [[0, 0.0, 0] for _ in range(bins)]
    for c, right in zip(confidence, is_right, strict=True):
        number = next(i for i in range(bins) if c * bins <= i + 1)
        for place, value in enumerate((1, c, int(right))):
            sums[number][place] += value
    error = sum(abs(right - c) for _, c, right in sums) / len(confidence)
    return error, [n for n, _, _ in sums]


@pytest.mark.parametrize("samples", [1, 7, 500])
def test_calibration_error_equals_a_count_answer_by_answer(samples):
    probabilities, target = random_case(samples=samples)
    found = classification_report(probabilities, target, EMOTIONS).calibration
    confidence = probabilities.max(axis=1)
    is_right = probabilities.argmax(axis=1) == target
    error, answers = expected_calibration_error(confidence, is_right)
    assert found.ece == pytest.approx(error, abs=1e-14)
    assert list(found.answers) == answers
    assert found.mean_confidence == pytest.approx(confidence.mean(), abs=1e-14)
    assert [value is None for value in found.accuracy] == [n == 0 for n in answers]


def test_a_question_counts_with_the_probability_of_the_answer_given():
    found = classification_report([[0.9, 0.2], [0.4, 0.5]], [[1, 1], [0, 1]], ["a", "b"]).calibration
    # Yes at 0.9 (right), no at 0.8 (wrong), no at 0.6 (right), yes at 0.5 (right), each in a bin of its own.
    assert found.ece == pytest.approx((0.1 + 0.8 + 0.4 + 0.5) / 4, abs=1e-14)
    assert sum(found.answers) == 4


def test_ignored_labels_do_not_count_as_answers():
    found = classification_report([[0.9, 0.1], [0.6, 0.4]], [0, -100], ["a", "b"], task="single")
    assert found.calibration.answers == (*[0] * 13, 1, 0)
    assert found.calibration.ece == pytest.approx(0.1, abs=1e-14)


def test_answers_whose_confidence_is_right_have_the_error_expected_by_chance():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 2000)
    probabilities = np.stack([confidence, 1 - confidence], axis=1)
    errors, chance = [], []
    for _ in range(50):
        target = (rng.random(2000) > confidence).astype(int)
        found = classification_report(probabilities, target, ["a", "b"]).calibration
        errors.append(found.ece)
        chance.append(found.ece_by_chance)
    assert np.mean(errors) == pytest.approx(np.mean(chance), rel=0.1)


def test_probabilities_before_calibration_are_reported_beside_the_others():
    probabilities, target = random_case()
    sharper = probabilities**3 / (probabilities**3).sum(axis=1, keepdims=True)
    both = classification_report(probabilities, target, EMOTIONS, uncalibrated=sharper)
    assert both.before_calibration == classification_report(sharper, target, EMOTIONS).calibration
    error = both.calibration.ece, both.before_calibration.ece
    assert both.to_markdown().endswith(f"ECE {error[0]:.3f} ({error[1]:.3f} before calibration).")
    with pytest.raises(ValueError, match="uncalibrated must have the shape of probabilities"):
        classification_report(probabilities, target, EMOTIONS, uncalibrated=sharper[:3])
    with pytest.raises(ValueError, match="uncalibrated must be finite"):
        classification_report(probabilities, target, EMOTIONS, uncalibrated=-sharper)


@pytest.mark.parametrize("task", ["single", "multi", "distribution"])
def test_counts_of_parts_add_up_to_those_of_the_whole(task):
    probabilities, target = random_case()
    if task != "single":
        target = np.eye(4)[target] if task == "multi" else np.random.default_rng(1).dirichlet(np.ones(4), 500)
    whole = classification_report(probabilities, target, EMOTIONS, task=task, uncalibrated=probabilities)
    parts = [slice(0, 120), slice(120, 121), slice(121, 500)]
    first, *rest = (
        count_answers(probabilities[part], target[part], EMOTIONS, task=task, uncalibrated=probabilities[part])
        for part in parts
    )
    for part in rest:
        first.merge(part)
    found = ClassificationReport.of_counts(first).to_dict()
    wanted = whole.to_dict()
    for name in ("accuracy", "exact_match", "balanced_accuracy", "confusion", "per_class", "overall"):
        assert found.get(name) == wanted.get(name), name
    for name in ("cross_entropy", "jensen_shannon"):
        assert found[name] == pytest.approx(wanted[name], abs=1e-12)
    for name in ("calibration", "before_calibration"):
        assert found[name]["ece"] == pytest.approx(wanted[name]["ece"], abs=1e-12)


def test_several_questions_answered_correctly_at_once_are_an_exact_match():
    report = classification_report(one_hot([0, 1]), one_hot([0, 2]), EMOTIONS)
    assert report.to_dict()["exact_match"] == 0.5
    assert "accuracy" not in report.to_dict()
    assert "\nExact match 50.0%, balanced accuracy" in report.to_markdown()
