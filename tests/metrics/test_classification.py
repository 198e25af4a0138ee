"""Figures of a classifier against scikit-learn, hand-made cases and probabilities of known calibration."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit, logit, softmax
from sklearn import metrics as sklearn_metrics

from medgen.errors import UserError
from medgen.metrics.classification import (
    CLASSIFICATION_METRICS,
    ScoredImages,
    calibration_slope,
    classification_metrics,
    pick_threshold,
    weighted_metrics,
)


def drawn(rng, n=300, classes=2, decimals=8):
    """Probabilities, with ties where there are few decimals, and labels that they tell something of."""
    labels = rng.integers(0, classes, n)
    scores = (rng.normal(size=(n, classes)) + 1.5 * np.eye(classes)[labels]).round(decimals)
    return softmax(scores, axis=1), labels


def binary(scores):
    return np.stack([1 - np.asarray(scores, dtype=float), scores], axis=1)


@pytest.mark.parametrize("decimals", [8, 0])
@pytest.mark.parametrize("classes", [2, 4])
def test_figures_are_those_of_scikit_learn_with_and_without_ties(classes, decimals):
    p, labels = drawn(np.random.default_rng(classes), classes=classes, decimals=decimals)

    found = classification_metrics(p, labels)

    of_one = p[:, 1] if classes == 2 else p
    # at a tie of two classes 0.5 is class 1 here
    decided = (p[:, 1] >= 0.5).astype(int) if classes == 2 else p.argmax(axis=1)
    confusion = sklearn_metrics.multilabel_confusion_matrix(labels, decided, labels=range(classes))
    specific = confusion[:, 0, 0] / confusion[:, 0].sum(axis=1)
    recall = sklearn_metrics.recall_score(labels, decided, average=None)
    expected = {
        "accuracy": sklearn_metrics.accuracy_score(labels, decided),
        "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(labels, decided),
        "auroc": sklearn_metrics.roc_auc_score(labels, of_one, multi_class="ovr"),
        "average_precision": sklearn_metrics.average_precision_score(
            labels if classes == 2 else np.eye(classes)[labels], of_one
        ),
        "sensitivity": recall[1] if classes == 2 else recall.mean(),
        "specificity": specific[1] if classes == 2 else specific.mean(),
        "brier": sklearn_metrics.brier_score_loss(labels, of_one),
        "nll": sklearn_metrics.log_loss(labels, p),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)


def test_calibration_error_by_hand():
    # 40 images, 4 bins of 10: p1 of 0.1, 0.3, 0.6 and 0.9, with 2, 3, 4 and 10 positives
    p = np.repeat([0.1, 0.3, 0.6, 0.9], 10)
    labels = np.concatenate([np.arange(10) < count for count in (2, 3, 4, 10)]).astype(int)

    found = classification_metrics(binary(p), labels)

    assert found["ece"] == pytest.approx((0.1 + 0 + 0.2 + 0.1) / 4)
    assert found["calibration_in_the_large"] == pytest.approx((-1 + 0 + 2 - 1) / 40)


def test_calibration_of_several_classes_is_that_of_the_likeliest():
    p = np.tile([0.7, 0.2, 0.1], (30, 1))
    labels = np.repeat([0, 1, 2], [12, 10, 8])

    found = classification_metrics(p, labels)

    assert found["ece"] == pytest.approx(0.7 - 12 / 30)
    assert found["calibration_in_the_large"] == pytest.approx(0.7 - 12 / 30)


def test_equal_probabilities_share_a_bin_in_any_order():
    rng = np.random.default_rng(0)
    p, labels = rng.choice([0.2, 0.5, 0.7], 300), rng.integers(0, 2, 300)
    order = rng.permutation(300)

    first, other = (classification_metrics(binary(p[o]), labels[o]) for o in (np.arange(300), order))

    assert first == pytest.approx(other)


@pytest.mark.parametrize(("slope", "intercept"), [(1.0, 0.0), (0.5, -1.0)])
def test_calibration_slope_finds_how_probabilities_were_distorted(slope, intercept):
    rng = np.random.default_rng(1)
    shown = rng.normal(size=20_000) * 1.5
    labels = rng.random(20_000) < expit(slope * shown + intercept)

    assert calibration_slope(expit(shown), labels.astype(int)) == pytest.approx((slope, intercept), abs=0.06)


def test_calibration_slope_is_left_out_where_there_is_none():
    separated = classification_metrics(binary([0.1, 0.2, 0.3, 0.4]), [0, 0, 1, 1])
    assert "calibration_slope" not in separated
    assert calibration_slope(np.full(4, 0.3), np.array([0, 1, 0, 1])) is None


def test_a_probability_of_zero_has_a_finite_likelihood():
    found = classification_metrics(binary([0.0, 1.0, 0.0, 1.0]), [0, 1, 1, 1])
    assert found["nll"] == pytest.approx(-np.log(np.finfo(np.float32).eps) / 4)


@pytest.mark.parametrize("classes", [2, 3])
def test_weights_count_like_repeated_images(classes):
    rng = np.random.default_rng(2)
    p, labels = drawn(rng, 60, classes, decimals=1)
    weights = rng.integers(0, 4, (60, 5)).astype(float)

    found = weighted_metrics(ScoredImages.of(p, labels), weights)

    for draw in range(5):
        rows = np.repeat(np.arange(60), weights[:, draw].astype(int))
        expected = classification_metrics(p[rows], labels[rows])
        for name in set(CLASSIFICATION_METRICS) - {"ece"}:  # its bins are those of the images as they are
            assert found[name][draw] == pytest.approx(expected[name], abs=1e-12), name


def test_a_draw_without_a_class_has_no_figures_that_need_it():
    p, labels = binary([0.1, 0.6, 0.8]), np.array([0, 0, 1])
    found = weighted_metrics(ScoredImages.of(p, labels), np.array([[1.0], [1.0], [0.0]]))
    lost = {name for name, values in found.items() if np.isnan(values[0])}
    assert lost == {"balanced_accuracy", "auroc", "average_precision", "sensitivity"}


def test_a_class_against_the_rest_is_a_problem_of_two_classes():
    p, labels = drawn(np.random.default_rng(3), classes=3)
    one = ScoredImages.of(p, labels).one_against_rest(2)
    found = weighted_metrics(one, np.ones((300, 1)), ("auroc", "average_precision", "sensitivity", "specificity"))
    decided = p.argmax(axis=1) == 2
    assert {name: values[0] for name, values in found.items()} == pytest.approx(
        {
            "auroc": sklearn_metrics.roc_auc_score(labels == 2, p[:, 2]),
            "average_precision": sklearn_metrics.average_precision_score(labels == 2, p[:, 2]),
            "sensitivity": decided[labels == 2].mean(),
            "specificity": (~decided[labels != 2]).mean(),
        }
    )


def test_threshold_maximises_youdens_j_of_scikit_learns_curve():
    rng = np.random.default_rng(4)
    labels = np.repeat([0, 1], [90, 15])
    scores = expit(rng.normal(size=105) + 1.5 * labels - 3)

    threshold = pick_threshold(binary(scores), labels)

    false, true, _ = sklearn_metrics.roc_curve(labels, scores)
    found = classification_metrics(binary(scores), labels, threshold)
    assert found["sensitivity"] + found["specificity"] - 1 == pytest.approx((true - false).max())
    assert threshold not in scores


def test_threshold_lies_midway_in_the_gap_nearest_to_a_half():
    # the classes are separated between 0.2 and 0.6
    scores = np.concatenate([np.linspace(0.1, 0.2, 12), np.linspace(0.6, 0.9, 12)])
    assert pick_threshold(binary(scores), np.repeat([0, 1], 12)) == pytest.approx(0.4)


def test_threshold_is_a_half_where_little_is_known_and_none_for_several_classes():
    scores = np.linspace(0.01, 0.2, 40)
    labels = (np.arange(40) >= 31).astype(int)  # 9 positives
    assert pick_threshold(binary(scores), labels) == 0.5
    assert pick_threshold(binary(1 - scores), (np.arange(40) >= 20).astype(int)) == 0.5  # nothing beats chance
    assert pick_threshold(*drawn(np.random.default_rng(5), classes=3)) is None


def test_a_threshold_is_a_decision_for_the_positive_class_at_the_same_probability():
    found = classification_metrics(binary([0.2, 0.3, 0.3, 0.6]), [0, 0, 1, 1], threshold=0.3)
    assert (found["sensitivity"], found["specificity"], found["accuracy"]) == (1.0, 0.5, 0.75)


@pytest.mark.parametrize(
    ("probabilities", "labels", "threshold", "message"),
    [
        (np.zeros((0, 2)), [], None, "at least one image and two classes"),
        (np.full(4, 0.5), [0, 1, 0, 1], None, "two classes, got shape"),
        (binary([0.2, np.nan]), [0, 1], None, "between 0 and 1, got nan"),
        (binary([0.2, 1.2]), [0, 1], None, "between 0 and 1, got"),
        (np.array([[0.5, 0.5], [0.2, 0.2]]), [0, 1], None, "sum 1, got 0.4 in row 1"),
        (binary([0.2, 0.3]), [0, 2], None, "class index from 0 to 1 for each of the 2 images"),
        (binary([0.2, 0.3]), [0], None, "class index"),
        (binary([0.2, 0.3]), [0, 0], None, "none of class 1"),
        (binary([0.2, 0.3]), [0, 1], 1.5, "threshold must lie between 0 and 1"),
        (softmax(np.eye(3), axis=1), [0, 1, 2], 0.5, "a threshold takes two classes, got 3"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(probabilities, labels, threshold, message):
    with pytest.raises(UserError, match=message) as error:
        classification_metrics(probabilities, labels, threshold)
    assert "\n" not in str(error.value)


def test_probabilities_of_the_true_model_are_calibrated():
    rng = np.random.default_rng(6)
    p = expit(rng.normal(size=50_000))
    found = classification_metrics(binary(p), (rng.random(50_000) < p).astype(int))
    assert found["ece"] < 0.012
    assert abs(found["calibration_in_the_large"]) < 0.006
    assert found["calibration_slope"] == pytest.approx(1, abs=0.05)
    shifted = classification_metrics(binary(expit(logit(p) + 1)), (rng.random(50_000) < p).astype(int))
    assert shifted["ece"] > 0.15
    assert shifted["calibration_in_the_large"] == pytest.approx(shifted["ece"], abs=0.005)
