"""Comparison of arms: invariances, hand-made cases, DeLong, and simulated studies of known truth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import ttest_1samp

from medgen.errors import UserError
from medgen.metrics.arm_comparison import compare_arms
from medgen.metrics.classification import CLASSIFICATION_METRICS, ScoredImages
from medgen.metrics.detection import auroc_bootstrap, delong_test

QUICK = {"resamples": 200, "shuffles": 199}


def scored(scores, labels, threshold=None):
    p = expit(np.asarray(scores, dtype=float))
    return ScoredImages.of(np.stack([1 - p, p], axis=1), labels, threshold)


def study(rng, patients=60, images=2, seeds=3, gap=0.0, scatter=0.0, own=0.5):
    """Two arms: (arm -> seed -> scored), patients of the images, labels.

    Images of a patient share a class and much of their score; ``scatter`` is what the seed changes in a network's
    strength, ``own`` what a network makes of a patient.
    """
    codes = np.repeat(np.arange(patients), images)
    labels = (rng.permutation(patients) < 0.3 * patients).astype(int)[codes]
    common = rng.normal(size=patients)[codes] + 0.6 * rng.normal(size=len(codes))
    arms = {}
    for arm, shift in (("real", 0.0), ("other", gap)):
        arms[arm] = {}
        for seed in range(seeds):
            strength = 1.5 + shift + scatter * rng.normal()
            of_patients = own * rng.normal(size=patients)[codes]
            noise = 0.6 * rng.normal(size=len(codes))
            arms[arm][seed] = scored(strength * labels + common + of_patients + noise - 0.75, labels)
    return arms, codes.astype(str), labels


def figure(found, arm, metric):
    return next(one for one in found if (one.arm, one.metric) == (arm, metric))


def test_an_arm_like_the_reference_differs_by_nothing():
    arms, patients, _ = study(np.random.default_rng(0))
    found = compare_arms({"real": arms["real"], "other": arms["real"]}, patients, **QUICK)
    for name in CLASSIFICATION_METRICS:
        same, reference = figure(found, "other", name), figure(found, "real", name)
        assert same.difference == 0, name
        assert (same.p_value, same.p_networks) == (1, 1), name
        # 60 patients of whom 18 are ill: in others the two may differ; of the rest no resample tells anything
        n = {"accuracy": 60, "specificity": 42, "sensitivity": 18, "balanced_accuracy": 18}.get(name)
        far = n and pytest.approx(1 - 0.025 ** (1 / n))
        assert (same.difference_low and -same.difference_low, same.difference_high) == (far, far), name
        assert ("none of whom makes one" if n else "no interval of the difference") in same.note
        assert (same.value, same.low, same.high) == (reference.value, reference.low, reference.high)
        assert reference.p_value is reference.difference is None


def test_exchanging_the_arms_flips_the_sign_and_keeps_the_p_value():
    arms, patients, _ = study(np.random.default_rng(1), gap=0.5)
    forth = compare_arms(arms, patients, **QUICK)
    back = compare_arms({"real": arms["other"], "other": arms["real"]}, patients, **QUICK)
    for name in CLASSIFICATION_METRICS:
        one, two = figure(forth, "other", name), figure(back, "other", name)
        assert one.difference == pytest.approx(-two.difference, abs=1e-12), name
        assert one.p_networks == pytest.approx(two.p_networks, abs=0.02), name
        # up to Student's t, which is not mirrored with the rest
        width = one.difference_high - one.difference_low
        assert one.difference_low == pytest.approx(-two.difference_high, abs=0.25 * width), name


def test_figures_are_means_over_the_seeds_and_differences_of_the_seeds_in_common():
    arms, patients, _ = study(np.random.default_rng(2))
    del arms["other"][1]
    found = figure(compare_arms(arms, patients, **QUICK), "other", "auroc")
    reference = figure(compare_arms(arms, patients, **QUICK), "real", "auroc")
    assert found.seeds == (0, 2)
    assert set(found.by_seed) == {0, 2}
    assert found.value == pytest.approx(np.mean(list(found.by_seed.values())))
    assert found.difference == pytest.approx(np.mean([found.by_seed[s] - reference.by_seed[s] for s in (0, 2)]))
    alone = compare_arms({"real": {0: arms["real"][0]}, "other": {2: arms["other"][2]}}, patients, **QUICK)
    assert figure(alone, "other", "auroc").difference is None


def test_an_order_of_arms_changes_nothing():
    arms, patients, _ = study(np.random.default_rng(3))
    third = {"third": {s: arms["other"][s] for s in (2, 0)}}
    first = compare_arms({**arms, **third}, patients, **QUICK)
    other = compare_arms({**third, **dict(reversed(arms.items()))}, patients, **QUICK)
    assert {(one.arm, one.metric): one for one in first} == {(one.arm, one.metric): one for one in other}


def test_rank_metrics_do_not_depend_on_the_scale_of_an_arm():
    _, patients, labels = study(np.random.default_rng(4))
    rng = np.random.default_rng(5)
    raw = [rng.normal(size=len(labels)) + labels for _ in range(2)]
    plain = compare_arms({"real": {0: scored(raw[0], labels)}, "other": {0: scored(raw[1], labels)}}, patients, **QUICK)
    squashed = scored(0.1 * raw[1] - 2, labels)
    bent = compare_arms({"real": {0: scored(raw[0], labels)}, "other": {0: squashed}}, patients, **QUICK)
    for name in ("auroc", "average_precision"):
        assert figure(plain, "other", name) == figure(bent, "other", name)


def test_one_seed_agrees_with_the_bootstrap_and_with_delong_by_patient():
    arms, patients, labels = study(np.random.default_rng(6), patients=120, seeds=1, gap=0.6)
    found = compare_arms(arms, patients, names=["auroc"], resamples=1000, shuffles=999)
    ranks = {arm: arms[arm][0].ranks[:, 0] for arm in arms}
    one, other = figure(found, "real", "auroc"), figure(found, "other", "auroc")
    expected = auroc_bootstrap(ranks["real"], labels, patients)
    assert (one.value, one.low, one.high) == pytest.approx((expected.value, expected.low, expected.high), abs=0.01)
    test = delong_test(ranks["other"], ranks["real"], labels, patients)
    assert other.difference == pytest.approx(test.difference)
    assert (other.difference_low, other.difference_high) == pytest.approx((test.low, test.high), abs=0.015)
    assert other.p_value == other.p_networks == pytest.approx(test.p_value, abs=0.02)
    assert "one seed" in one.note


def test_images_of_few_patients_tell_less_than_as_many_patients():
    arms, patients, labels = study(np.random.default_rng(7), patients=25, images=12, seeds=1, gap=0.5)
    by_patient = compare_arms(arms, patients, **QUICK)
    by_image = compare_arms(arms, None, **QUICK)
    for name in ("auroc", "accuracy", "brier"):
        wide, narrow = figure(by_patient, "real", name), figure(by_image, "real", name)
        assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low), name
        assert figure(by_patient, "other", name).p_value >= figure(by_image, "other", name).p_value
    assert "rough interval: only 8 patients" in figure(by_patient, "real", "auroc").note
    assert len(labels) == 300


def test_seeds_that_scatter_widen_the_interval_as_students_t_does():
    rng = np.random.default_rng(8)
    labels = np.repeat([0, 1], 1500)
    noise = rng.normal(size=3000)
    # so many patients, and the same noise in all: what is left to scatter is the seeds' strength
    arms = {
        arm: {seed: scored(strength * labels + noise - 0.5, labels) for seed, strength in enumerate(strengths)}
        for arm, strengths in {"real": (1.0, 1.1, 0.9, 1.05), "other": (1.1, 1.25, 1.1, 1.0)}.items()
    }
    found = figure(compare_arms(arms, None, names=["brier"], resamples=1000, shuffles=999), "other", "brier")
    reference = figure(compare_arms(arms, None, names=["brier"], **QUICK), "real", "brier")
    differences = [found.by_seed[s] - reference.by_seed[s] for s in range(4)]
    expected = ttest_1samp(differences, 0)
    interval = expected.confidence_interval(0.95)
    width = interval.high - interval.low
    assert found.difference_high - found.difference_low == pytest.approx(width, rel=0.1)
    assert found.p_value == pytest.approx(expected.pvalue, abs=0.02)
    assert found.p_networks < 0.02


def test_perfect_classifiers_have_intervals_with_a_width():
    labels = np.repeat([0, 1], [40, 30])
    perfect = {seed: scored(8 * labels - 4 + 0.01 * np.arange(70), labels) for seed in range(2)}
    found = compare_arms({"real": perfect, "other": perfect}, None, **QUICK)
    for name, low in {"accuracy": 0.9487, "sensitivity": 0.8843, "specificity": 0.9119}.items():  # 0.025 ** (1 / n)
        one = figure(found, "real", name)
        assert (one.value, one.high) == (1, 1)
        assert one.low == pytest.approx(low, abs=1e-4)
    area = figure(found, "real", "auroc")
    assert 0.8 < area.low < area.value == 1
    assert "Newcombe" in area.note
    precision = figure(found, "real", "average_precision")
    assert (precision.value, precision.low, precision.high) == (1, None, None)
    assert "no interval, as every resample separates the classes" in precision.note
    # of two at the edge the difference reaches as far as either one may be from it
    for name in ("accuracy", "sensitivity", "auroc"):
        one, of_reference = figure(found, "other", name), figure(found, "real", name)
        assert one.p_value == 1
        ends = (one.difference_low, one.difference_high)
        assert ends == pytest.approx((of_reference.low - 1, 1 - of_reference.low)), name
        assert ends[0] < -0.04
    assert figure(found, "other", "average_precision").difference_low is None
    wrong = {seed: scored(4 - 8 * labels + 0.01 * np.arange(70), labels) for seed in range(2)}
    other = figure(compare_arms({"real": perfect, "other": wrong}, None, **QUICK), "other", "accuracy")
    assert (other.difference, other.difference_low) == (-1, -1)
    assert other.difference_high == pytest.approx(1 - 2 * 0.9487, abs=2e-4)


def test_draws_without_a_class_are_left_out_and_counted():
    rng = np.random.default_rng(9)
    labels = np.array([1, 1] + [0] * 28)
    arms = {"real": {0: scored(rng.normal(size=30) + labels, labels)}}
    one = figure(compare_arms(arms, None, **QUICK), "real", "auroc")
    assert "resamples left out that lacked a class" in one.note
    assert 0 <= one.low <= one.value <= one.high <= 1


def test_the_test_keeps_its_level_and_intervals_hold_the_truth_where_seeds_scatter():
    rng = np.random.default_rng(10)
    found = []
    for number in range(150):
        arms, patients, _ = study(rng, patients=50, images=2, scatter=0.3)
        names = ("auroc", "brier")
        found.append(compare_arms(arms, patients, names=names, resamples=200, shuffles=199, seed=number))
    for name in ("auroc", "brier"):
        of_arm = [figure(one, "other", name) for one in found]
        # 150 studies: 5 % and less than 2.5 standard errors more
        assert np.mean([one.p_value <= 0.05 for one in of_arm]) < 0.095, name
        assert np.mean([one.difference_low <= 0 <= one.difference_high for one in of_arm]) > 0.905, name
    # what the seeds do is not in the shuffles alone
    assert np.mean([figure(one, "other", "auroc").p_networks <= 0.05 for one in found]) > 0.15


def test_equal_calibration_errors_to_opposite_sides_are_not_told_for_different_ones():
    rng, found = np.random.default_rng(13), []
    for number in range(100):
        risk = rng.normal(0, 1.5, 240)
        labels = (rng.random(240) < expit(risk)).astype(int)
        noise = 0.3 * rng.normal(size=(2, 240))
        arms = {"real": {0: scored(risk - 0.8 + noise[0], labels)}, "other": {0: scored(risk + 0.8 + noise[1], labels)}}
        names = ("ece", "calibration_in_the_large")
        found.append(compare_arms(arms, None, names=names, resamples=200, shuffles=199, seed=number))
    of_arm = [figure(one, "other", "ece") for one in found]
    # exchanges of the predictions gave 36 %
    assert np.mean([one.p_value <= 0.05 for one in of_arm]) < 0.15
    # as the interval, of which it is made
    agree = [(one.p_value <= 0.05) != (one.difference_low <= 0 <= one.difference_high) for one in of_arm]
    assert np.mean(agree) > 0.9
    assert all(figure(one, "other", "calibration_in_the_large").p_value <= 0.05 for one in found)


def test_a_clear_difference_is_found():
    arms, patients, _ = study(np.random.default_rng(11), patients=150, seeds=4, gap=1.0)
    one = figure(compare_arms(arms, patients), "other", "auroc")
    assert one.p_value < 0.05
    assert one.difference_low > 0


def test_what_makes_no_sense_is_refused_in_one_line():
    arms, patients, labels = study(np.random.default_rng(12), patients=20)
    flipped = replace(arms["other"][0], labels=1 - labels)
    for wrong, of, settings, message in [
        ({}, patients, {}, "an arm without any"),
        ({**arms, "empty": {}}, patients, {}, "an arm without any"),
        ({**arms, "flipped": {0: flipped}}, patients, {}, "the same test images"),
        (arms, ["one"] * len(labels), {}, "at least 2 patients"),
        (arms, patients, {"resamples": 100}, "resamples must be at least 200"),
        (arms, patients, {"level": 95}, "level must lie between 0 and 1"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            compare_arms(wrong, of, **settings)
        assert "\n" not in str(error.value)
