"""AUROC, intervals and tests against scipy, scikit-learn, hand formulas and simulations of known truth."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from medgen.errors import UserError
from medgen.metrics.detection import (
    auroc,
    auroc_bootstrap,
    auroc_delong,
    auroc_source_subsampling,
    average_precision,
    average_precision_bootstrap,
    delong_test,
    permutation_power,
    permutation_test,
    permutation_tests,
    sensitivity_at_specificity,
)


def two_classes(rng: np.random.Generator, n: int, m: int, shift: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels, shuffled; n ordinary images and m anomalies of normal scores."""
    order = rng.permutation(n + m)
    scores = np.concatenate([rng.normal(size=n), rng.normal(size=m) + shift])
    return scores[order], np.repeat([0, 1], [n, m])[order]


def true_auroc(shift: float) -> float:
    return float(stats.norm.cdf(shift / np.sqrt(2)))


def pairs_won(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(anomalies, ordinary images) 1 where the anomaly scores higher, 0.5 for ties: DeLong's psi, written out."""
    x, y = scores[labels == 1][:, None], scores[labels == 0][None]
    return (x > y) + 0.5 * (x == y)


def direct_covariance(first: np.ndarray, second: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """DeLong's 2 x 2 covariance of two AUROCs from all pairs."""
    won = [pairs_won(scores, labels) for scores in (first, second)]
    by_anomaly = np.cov([w.mean(axis=1) for w in won])
    by_ordinary = np.cov([w.mean(axis=0) for w in won])
    return by_anomaly / won[0].shape[0] + by_ordinary / won[0].shape[1]


@pytest.mark.parametrize("decimals", [8, 1, 0])
def test_auroc_is_the_mann_whitney_statistic_with_and_without_ties(decimals):
    for seed in range(20):
        scores, labels = two_classes(np.random.default_rng(seed), 30, 17)
        scores = scores.round(decimals)
        u = stats.mannwhitneyu(scores[labels == 1], scores[labels == 0]).statistic
        assert auroc(scores, labels) == pytest.approx(u / (30 * 17), abs=1e-14)


def test_auroc_by_hand():
    assert auroc([1, 2, 3, 4], [0, 1, 0, 1]) == 0.75
    assert auroc([5, 5, 5], [True, False, False]) == 0.5
    assert auroc([1e-300, 2e-300], [0, 1]) == 1.0


def test_auroc_turns_over_with_the_scores_and_ignores_a_monotone_change():
    scores, labels = two_classes(np.random.default_rng(0), 40, 60)
    value = auroc(scores, labels)
    assert auroc(-scores, labels) == pytest.approx(1 - value, abs=1e-14)
    assert auroc(np.exp(3 * scores), labels) == value


def test_average_precision_by_hand():
    # thresholds 0.9: 1 of 1, recall 1/2; 0.4: the second anomaly comes with two others that tie, 2 of 5
    assert average_precision([0.9, 0.5, 0.4, 0.4, 0.4], [1, 0, 1, 0, 0]) == pytest.approx(0.5 * 1 + 0.5 * 2 / 5)
    assert average_precision([0, 0, 0, 0], [1, 0, 0, 0]) == 0.25


@pytest.mark.parametrize("decimals", [8, 0])
def test_scikit_learn_agrees(decimals):
    metrics = pytest.importorskip("sklearn.metrics")
    for seed in range(10):
        scores, labels = two_classes(np.random.default_rng(seed), 35, 21)
        scores = scores.round(decimals)
        assert auroc(scores, labels) == pytest.approx(metrics.roc_auc_score(labels, scores), abs=1e-12)
        expected = metrics.average_precision_score(labels, scores)
        assert average_precision(scores, labels) == pytest.approx(expected, abs=1e-12)
        false, true, _ = metrics.roc_curve(labels, scores, drop_intermediate=False)
        for specificity in (0.5, 0.8, 0.95, 1.0):
            point = sensitivity_at_specificity(scores, labels, specificity=specificity, resamples=2)
            assert point.sensitivity.value == pytest.approx(true[false <= 1 - specificity + 1e-9].max(), abs=1e-12)


@pytest.mark.parametrize("decimals", [8, 0])
def test_delong_variance_is_that_of_all_pairs(decimals):
    for seed in range(10):
        rng = np.random.default_rng(seed)
        first, labels = two_classes(rng, 25, 40)
        second = (first + rng.normal(size=65)).round(decimals)
        first = first.round(decimals)
        covariance = direct_covariance(first, second, labels)
        estimate = auroc_delong(first, labels)
        value = estimate.value
        logit = stats.norm.ppf(0.975) * np.sqrt(covariance[0, 0]) / (value * (1 - value))
        ends = stats.logistic.cdf(stats.logistic.ppf(value) + np.array([-logit, logit]))
        assert (estimate.low, estimate.high) == pytest.approx(tuple(ends), abs=1e-12)
        compared = delong_test(first, second, labels)
        variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
        assert compared.z == pytest.approx((auroc(first, labels) - auroc(second, labels)) / np.sqrt(variance), rel=1e-9)
        assert compared.p_value == pytest.approx(2 * stats.norm.sf(abs(compared.z)))
        assert compared.high - compared.low == pytest.approx(2 * stats.norm.ppf(0.975) * np.sqrt(variance))


def test_delong_test_alternatives_and_exchange():
    rng = np.random.default_rng(1)
    first, labels = two_classes(rng, 50, 50, 1.5)
    second = first + 2 * rng.normal(size=100)
    greater = delong_test(first, second, labels, alternative="greater").p_value
    assert greater < 0.01
    assert delong_test(second, first, labels, alternative="less").p_value == pytest.approx(greater)
    assert delong_test(first, second, labels, alternative="less").p_value == pytest.approx(1 - greater)
    assert delong_test(first, second, labels).p_value == pytest.approx(2 * greater)


def test_one_ranking_against_itself_differs_by_nothing():
    scores, labels = two_classes(np.random.default_rng(2), 20, 20)
    same = delong_test(scores, 2 * scores + 1, labels)
    assert (same.difference, same.z, same.p_value, same.low, same.high) == (0, 0, 1, 0, 0)


def test_delong_intervals_cover_the_true_auroc_also_where_it_is_high():
    for shift, n in ((0.5, 40), (2.4, 20)):
        rng, covered = np.random.default_rng(3), 0
        for _ in range(400):
            estimate = auroc_delong(*two_classes(rng, n, n, shift))
            covered += estimate.low <= true_auroc(shift) <= estimate.high
        assert 0.92 <= covered / 400 <= 0.985, shift


def test_bootstrap_intervals_cover_the_true_auroc():
    rng, covered = np.random.default_rng(4), 0
    for seed in range(300):
        estimate = auroc_bootstrap(*two_classes(rng, 40, 40), resamples=200, seed=seed)
        covered += estimate.low <= true_auroc(1.0) <= estimate.high
    assert 0.91 <= covered / 300 <= 0.98


def test_intervals_by_patient_cover_where_images_counted_as_independent_do_not():
    truth = stats.norm.cdf(1.5 / np.sqrt(2 * 1.09))
    covered = np.zeros(3)
    patients = np.repeat(np.arange(40), 8)
    labels = patients % 2
    for seed in range(150):
        rng = np.random.default_rng(seed)
        scores = 1.5 * labels + rng.normal(size=40)[patients] + 0.3 * rng.normal(size=320)
        for number, estimate in enumerate(
            [
                auroc_delong(scores, labels, patients),
                auroc_bootstrap(scores, labels, patients, resamples=200, seed=seed),
                auroc_delong(scores, labels),
            ]
        ):
            covered[number] += estimate.low <= truth <= estimate.high
    covered /= 150
    assert covered[0] > 0.88
    assert covered[1] > 0.88
    assert covered[2] < 0.7


def test_delong_by_patient_agrees_with_the_bootstrap_where_patients_have_images_of_both_classes():
    rng = np.random.default_rng(5)
    patients = np.repeat(np.arange(100), 6)
    labels = np.tile([0, 1], 300)
    scores = labels + rng.normal(size=100)[patients] + 0.5 * rng.normal(size=600)
    delong = auroc_delong(scores, labels, patients)
    bootstrap = auroc_bootstrap(scores, labels, patients, resamples=2000)
    naive = auroc_delong(scores, labels)
    assert delong.high - delong.low == pytest.approx(bootstrap.high - bootstrap.low, rel=0.06)
    # the patients' own level cancels within a patient: here independence would be too pessimistic
    assert naive.high - naive.low > 1.15 * (delong.high - delong.low)


def test_a_copy_of_every_image_adds_nothing_by_patient():
    scores, labels = two_classes(np.random.default_rng(6), 30, 30)
    once, patients = auroc_delong(scores, labels), np.arange(60)
    twice = auroc_delong(np.tile(scores, 2), np.tile(labels, 2), np.tile(patients, 2))
    assert (twice.low, twice.high) == pytest.approx((once.low, once.high), abs=1e-12)
    first = auroc_bootstrap(scores, labels, patients, resamples=300)
    second = auroc_bootstrap(np.tile(scores, 2), np.tile(labels, 2), np.tile(patients, 2), resamples=300)
    assert (second.low, second.high) == pytest.approx((first.low, first.high), abs=1e-12)


def test_separated_classes_have_an_interval_with_a_width():
    scores, labels = np.arange(20.0), np.repeat([0, 1], 10)
    for estimate in (auroc_delong(scores, labels), auroc_bootstrap(scores, labels)):
        assert estimate.value == estimate.high == 1
        # (1 - θ)² n m = z² θ (1 - θ) [1 + (N - 1)((1 - θ) / (2 - θ) + θ / (1 + θ))] at the lower end
        theta = estimate.low
        spread = 1 + 9 * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        assert (1 - theta) ** 2 * 100 == pytest.approx(1.959963985**2 * theta * (1 - theta) * spread)
        assert "separated" in estimate.note
    turned = auroc_delong(-scores, labels)
    assert (turned.low, turned.high) == pytest.approx((0, 1 - auroc_delong(scores, labels).low))
    few = auroc_delong(scores, labels, patients=np.arange(20) // 5)
    assert few.low < auroc_delong(scores, labels).low


def test_resamples_without_a_class_are_left_out_and_counted():
    estimate = auroc_bootstrap([1, 2, 3, 4, 5, 2.5, 3.5], [0, 0, 0, 0, 0, 1, 1], resamples=500)
    assert 0 <= estimate.low < estimate.value < estimate.high <= 1
    assert int(estimate.note.split("; ")[1].split()[0]) == pytest.approx(500 * (5 / 7) ** 7, abs=35)
    assert "rough interval: only 2 patients" in estimate.note


def test_the_same_seed_gives_the_same_result():
    scores, labels = two_classes(np.random.default_rng(7), 30, 30)
    assert auroc_bootstrap(scores, labels, seed=1) == auroc_bootstrap(scores, labels, seed=1)
    assert auroc_bootstrap(scores, labels, seed=1) != auroc_bootstrap(scores, labels, seed=2)
    groups = scores[:30], scores[30:]
    assert permutation_test(*groups, shuffles=999, seed=1) == permutation_test(*groups, shuffles=999, seed=1)
    assert auroc_source_subsampling(scores, labels) == auroc_source_subsampling(scores, labels)


def test_blocks_change_nothing(monkeypatch):
    scores, labels = two_classes(np.random.default_rng(8), 30, 30)
    whole = (
        auroc_bootstrap(scores, labels, resamples=100),
        permutation_test(scores[:20], scores[20:], shuffles=500),
    )
    monkeypatch.setattr("medgen.metrics.detection.BLOCK", 100)
    assert auroc_bootstrap(scores, labels, resamples=100) == whole[0]
    assert permutation_test(scores[:20], scores[20:], shuffles=500) == whole[1]


def test_sensitivity_at_specificity_by_hand():
    scores = np.concatenate([np.arange(20), [3, 18, 18.5, 19, 25]])
    labels = np.repeat([0, 1], [20, 5])
    point = sensitivity_at_specificity(scores, labels, specificity=0.95)
    # 19 of 20 ordinary images lie at or below 18; the anomaly at 18 ties and is missed
    assert (point.threshold, point.specificity) == (18, 0.95)
    assert point.sensitivity.value == pytest.approx(3 / 5)
    assert sensitivity_at_specificity(scores, labels, specificity=1.0).sensitivity.value == pytest.approx(1 / 5)


def test_ties_among_ordinary_images_give_more_specificity_than_asked_for():
    point = sensitivity_at_specificity([0, 1, 1, 1, 1, 2], [0, 0, 0, 0, 1, 1], specificity=0.5)
    assert (point.threshold, point.specificity, point.sensitivity.value) == (1, 1.0, 0.5)


def test_sensitivity_interval_covers_although_the_threshold_is_estimated():
    truth, rng, covered = stats.norm.sf(stats.norm.ppf(0.9) - 1.5), np.random.default_rng(9), 0
    for seed in range(200):
        scores, labels = two_classes(rng, 60, 60, 1.5)
        estimate = sensitivity_at_specificity(scores, labels, specificity=0.9, resamples=200, seed=seed).sensitivity
        covered += estimate.low <= truth <= estimate.high
    assert 0.89 <= covered / 200 <= 0.99


def test_sensitivity_of_one_has_the_exact_binomial_interval():
    point = sensitivity_at_specificity(np.arange(30.0), np.repeat([0, 1], [10, 20]), specificity=0.9)
    assert point.sensitivity.value == point.sensitivity.high == 1
    assert point.sensitivity.low == pytest.approx(0.025 ** (1 / 20))


def test_average_precision_interval_states_the_share_of_anomalies():
    scores, labels = two_classes(np.random.default_rng(10), 90, 30)
    estimate = average_precision_bootstrap(scores, labels)
    assert 0 < estimate.low < estimate.value == average_precision(scores, labels) < estimate.high < 1
    assert "25.0% of the images are anomalies" in estimate.note


def test_source_subsampling_keeps_the_smaller_class_whole():
    scores, labels = two_classes(np.random.default_rng(11), 300, 25)
    scores -= scores.min() - 1
    result = auroc_source_subsampling(scores, labels)
    assert len(result.values) == 50
    assert result.n_drawn == 25
    assert result.mean == pytest.approx(auroc(scores, labels), abs=3 * result.sd)
    assert result.sd == pytest.approx(np.std(result.values, ddof=0))
    # only the ordinary images vary from draw to draw
    by_ordinary = pairs_won(scores, labels).mean(axis=0).std(ddof=1) / np.sqrt(25) * np.sqrt(1 - 25 / 300)
    assert result.sd == pytest.approx(by_ordinary, rel=0.25)


def test_source_subsampling_of_equal_classes_has_no_spread_at_all():
    scores, labels = two_classes(np.random.default_rng(12), 30, 30)
    result = auroc_source_subsampling(scores - scores.min(), labels)
    assert result.sd == pytest.approx(0, abs=1e-15)
    assert result.mean == pytest.approx(auroc(scores, labels))


def test_permutation_p_value_is_that_of_all_groupings():
    rng = np.random.default_rng(13)
    for n, m in ((5, 6), (7, 4)):
        first, second = rng.normal(size=n).round(1) + 0.7, rng.normal(size=m).round(1)
        for alternative in ("two-sided", "greater", "less"):
            exact = stats.permutation_test(
                (first, second),
                # scipy doubles the smaller tail where two-sided; ours takes the absolute difference
                (lambda x, y, axis: np.abs(x.mean(axis) - y.mean(axis)))
                if alternative == "two-sided"
                else (lambda x, y, axis: x.mean(axis) - y.mean(axis)),
                alternative="greater" if alternative == "two-sided" else alternative,
                vectorized=True,
                n_resamples=np.inf,
            ).pvalue
            ours = permutation_test(first, second, alternative=alternative, shuffles=40_000)
            assert ours.p_value == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 40_000) + 1e-4)
            assert ours.difference == pytest.approx(first.mean() - second.mean())


def test_scores_that_are_shuffled_together_have_the_p_values_that_each_has_alone():
    rng = np.random.default_rng(16)
    first, second = rng.normal([[0], [0.3], [0.6]], size=(3, 30)), rng.normal(size=(3, 45))
    settings = {"alternative": "greater", "shuffles": 500, "seed": 4}
    patients = {
        "first_patients": [f"a{n // 2}" for n in range(30)],
        "second_patients": [f"b{n // 3}" for n in range(45)],
    }
    together = permutation_tests(first, second, **settings, **patients)
    assert together == tuple(permutation_test(f, s, **settings, **patients) for f, s in zip(first, second, strict=True))
    with pytest.raises(UserError, match=r"must be of the same images, got groups of \(29, 45\) and of \(30, 45\)"):
        permutation_tests([first[0], first[1][:-1]], second[:2])


def test_permutation_p_value_is_never_zero_and_one_for_constant_values():
    assert permutation_test(np.zeros(20), np.ones(20), shuffles=999).p_value == 1 / 1000
    assert permutation_test(np.full(9, 0.1), np.full(7, 0.1), shuffles=999).p_value == 1


def test_equal_groupings_count_although_their_sums_are_rounded_differently():
    # 3 against 3 of these values: the observed grouping and its mirror are the most extreme of 20
    first, second = np.array([0.1, 0.2, 0.3]), np.array([0.7, 1.1, 1.3])
    for scale in (1.0, 1e-9, 1e9):
        p = permutation_test(first * scale, second * scale, shuffles=20_000).p_value
        assert p == pytest.approx(2 / 20, abs=0.01)


@pytest.mark.parametrize("alternative", ["two-sided", "greater"])
def test_permutation_p_value_is_uniform_under_the_null(alternative):
    rng = np.random.default_rng(14)
    values = [
        permutation_test(
            rng.exponential(size=12), rng.exponential(size=18), alternative=alternative, shuffles=199, seed=seed
        ).p_value
        for seed in range(1000)
    ]
    # on the grid of 1/200 the p-value is uniform when moved into its cell
    assert stats.kstest(np.array(values) - rng.random(1000) / 200, "uniform").pvalue > 0.01
    for alpha in (0.01, 0.05, 0.1):
        assert np.mean(np.array(values) <= alpha) == pytest.approx(alpha, abs=3.5 * np.sqrt(alpha / 1000))


def test_delong_p_value_is_uniform_under_the_null():
    rng = np.random.default_rng(15)
    values = []
    for _ in range(1000):
        shared, labels = two_classes(rng, 60, 60, 1.0)
        first, second = shared + rng.normal(size=120), shared + rng.normal(size=120)
        values.append(delong_test(first, second, labels).p_value)
    assert stats.kstest(values, "uniform").pvalue > 0.01


def test_permutation_by_patient_keeps_its_level_where_images_alone_do_not():
    rng = np.random.default_rng(16)
    patients = [f"P{number}" for number in np.repeat(np.arange(10), 10)]
    others = [f"Q{number}" for number in np.repeat(np.arange(10), 10)]
    rejected = np.zeros(2)
    for seed in range(200):
        groups = [rng.normal(size=10).repeat(10) + 0.1 * rng.normal(size=100) for _ in range(2)]
        by_image = permutation_test(*groups, shuffles=99, seed=seed)
        by_patient = permutation_test(*groups, shuffles=99, seed=seed, first_patients=patients, second_patients=others)
        rejected += by_image.p_value <= 0.05, by_patient.p_value <= 0.05
    assert rejected[0] > 80
    assert rejected[1] <= 20
    assert by_patient.n_first == by_patient.n_second == 10


def test_power_is_that_of_the_t_test_for_normal_groups():
    grid = stats.norm.ppf((np.arange(2000) + 0.5) / 2000)
    power = permutation_power(grid + 0.8, grid, n_first=25, n_second=25, simulations=600, shuffles=199)
    freedom, shift = 48, 0.8 / np.sqrt(2 / 25)
    critical = stats.t.ppf(0.975, freedom)
    expected = stats.nct.sf(critical, freedom, shift) + stats.nct.cdf(-critical, freedom, shift)
    assert power.value == pytest.approx(expected, abs=0.05)
    assert power.low < power.value < power.high
    assert power.high - power.low == pytest.approx(4 * np.sqrt(expected * (1 - expected) / 600), rel=0.1)


def test_power_without_a_difference_is_alpha_and_grows_with_the_study():
    values = np.random.default_rng(17).normal(size=200)
    null = permutation_power(values, values, n_first=20, n_second=20, simulations=500, shuffles=99)
    assert null.low <= 0.05 <= null.high
    options = {"simulations": 150, "shuffles": 99, "alternative": "greater"}
    small, large = (permutation_power(values + 0.5, values, n_first=n, n_second=n, **options) for n in (10, 60))
    assert small.high < large.low
    assert (large.n_samples, large.n_reference) == (60, 60)


MEASURES = [
    auroc,
    auroc_bootstrap,
    auroc_delong,
    auroc_source_subsampling,
    average_precision,
    average_precision_bootstrap,
    sensitivity_at_specificity,
    lambda scores, labels: delong_test(scores, np.arange(len(scores)), labels),
    lambda scores, labels: delong_test(np.arange(len(labels)), scores, labels),
]


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1, 2, 3], [0, 0, 0], "both classes are needed, got 0 anomalies"),
        ([1, 2, 3], [1, 1, 1], "and 0 ordinary images"),
        ([], [], "both classes are needed"),
        ([1, np.nan, 3, np.inf], [0, 1, 0, 1], "must be finite, got 2 NaN or infinite of 4"),
        ([1, 2, 3], [0, 1], "must be as many"),
        ([1, 2, 3], [0, 1, 2], r"labels must be 1 \(anomalous\) or 0, got 2"),
        ([[1, 2]], [0, 1], r"got shape \(1, 2\)"),
        (["a", "b"], [0, 1], "must be numbers"),
    ],
)
def test_scores_and_labels_that_cannot_be_judged_are_refused(measure, scores, labels, message):
    with pytest.raises(UserError, match=message) as error:
        measure(scores, labels)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, y: auroc_delong([1, 2, 3], [0, 0, 1]), "anomalies of at least 2 patients, got 1"),
        (lambda s, y: auroc_delong(s, y, level=1), "level must lie between"),
        (lambda s, y: auroc_bootstrap(s, y, resamples=1), "resamples must be at least 2"),
        (lambda s, y: auroc_bootstrap(s, y, ["a"] * 3), "patients must be given for each of the 20"),
        (lambda s, y: auroc_bootstrap(s, y, ["a"] * 20), "at least 2 patients"),
        (lambda s, y: auroc_source_subsampling(s, y, resamples=0), "resamples must be at least 1"),
        (lambda s, y: auroc_source_subsampling(-np.abs(s), y), "must be positive"),
        (lambda s, y: sensitivity_at_specificity(s, y, specificity=0), "specificity must lie above 0"),
        (lambda s, y: delong_test(y, 1 - y, y), "needs AUROCs that vary, got 1 and 0"),
        (lambda s, y: delong_test(s, s[:9], y), "must be as many"),
        (lambda s, y: delong_test(s, s, y, alternative="larger"), "alternative must be one of"),
        (lambda s, y: permutation_test(s, []), "both groups need values, got 20 and 0"),
        (lambda s, y: permutation_test(s, [np.nan]), "the second group must be finite"),
        (lambda s, y: permutation_test(s, s, shuffles=0), "shuffles must be at least 1"),
        (lambda s, y: permutation_test(s, s, alternative="both"), "alternative must be one of"),
        (lambda s, y: permutation_test(s, s, first_patients=range(20)), "for both groups or for neither"),
        (
            lambda s, y: permutation_test(s, s, first_patients=range(20), second_patients=range(19, 39)),
            "got 1 such patients",
        ),
        (
            lambda s, y: permutation_test(s, s, first_patients=range(9), second_patients=range(20, 40)),
            "for each of the 20 values, got 9",
        ),
        (lambda s, y: permutation_power(s, s, shuffles=10), "alpha must lie between"),
        (lambda s, y: permutation_power(s, s, simulations=0), "simulations must be at least 1"),
        (lambda s, y: permutation_power(s, s, n_first=0), "n_first must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused_in_one_line(call, message):
    scores, labels = two_classes(np.random.default_rng(18), 10, 10)
    with pytest.raises(UserError, match=message) as error:
        call(scores, labels)
    assert "\n" not in str(error.value)


def test_detection_needs_no_torch():
    code = "import sys, medgen.metrics.detection; sys.exit('torch' in sys.modules or 'monai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
