"""Intervals by resampling patients: coverage on Gaussians of known distance; the real-against-real baseline."""

from __future__ import annotations

import numpy as np
import pytest

from medgen.errors import UserError
from medgen.metrics.frechet import FeatureMoments, frechet_distance
from medgen.metrics.intervals import (
    bootstrap_interval,
    bootstrap_mean,
    default_resamples,
    prdc_intervals,
    real_baseline,
)
from medgen.metrics.kernel import kernel_distance
from medgen.metrics.prdc import precision_recall_density_coverage


def gaussians(rng: np.random.Generator, n: int, d: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Two sets and the distance of the Gaussians they are drawn from."""
    first, second = np.linspace(1, 2, d), 1.2 * np.linspace(1, 2, d)
    distance = d * 0.5**2 + ((first - second) ** 2).sum()
    return rng.normal(size=(n, d)) * first, rng.normal(size=(n, d)) * second + 0.5, distance


def test_interval_covers_the_known_distance_where_images_are_many():
    rng, repeats = np.random.default_rng(0), 60
    covered = 0
    for seed in range(repeats):
        x, y, distance = gaussians(rng, 400, 4)
        estimate = bootstrap_interval(x, y, resamples=200, seed=seed)
        covered += estimate.low <= distance <= estimate.high
    assert 0.85 < covered / repeats <= 1


def test_interval_covers_the_expected_distance_at_this_n_where_plain_percentiles_miss_the_value():
    rng, repeats = np.random.default_rng(1), 60
    estimates = [bootstrap_interval(*gaussians(rng, 200, 20)[:2], resamples=200, seed=s) for s in range(repeats)]
    values = np.array([estimate.value for estimate in estimates])
    covered = sum(estimate.low <= values.mean() <= estimate.high for estimate in estimates)
    assert 0.85 < covered / repeats <= 1
    excess = np.array([float(estimate.note.split("excess of ")[1].split(";")[0]) for estimate in estimates])
    plain_low = np.array([estimate.low for estimate in estimates]) + excess
    assert (plain_low > values).mean() > 0.9  # why the interval is moved back
    widths = np.array([estimate.high - estimate.low for estimate in estimates])
    assert widths.mean() == pytest.approx(2 * 1.96 * values.std(), rel=0.3)


def test_interval_errs_on_the_wide_side_where_images_are_fewer_than_features():
    rng = np.random.default_rng(14)
    estimates = [bootstrap_interval(*gaussians(rng, 40, 60)[:2], resamples=60, seed=s) for s in range(30)]
    values = np.array([estimate.value for estimate in estimates])
    covered = sum(estimate.low <= values.mean() <= estimate.high for estimate in estimates)
    assert covered >= 28
    assert "40 images are too few for 60 features" in estimates[0].note


def test_interval_of_few_resamples_is_as_wide_and_says_so():
    x, y, _ = gaussians(np.random.default_rng(2), 300, 5)
    many, few = (bootstrap_interval(x, y, resamples=resamples) for resamples in (400, 60))
    assert few.high - few.low == pytest.approx(many.high - many.low, rel=0.35)
    assert few.note.startswith("standard error of 60 resamples")
    assert many.note.startswith("percentiles of 400 resamples")
    assert few.low < few.value < few.high


def test_the_same_seed_gives_the_same_interval():
    x, y, _ = gaussians(np.random.default_rng(3), 50, 3)
    assert bootstrap_interval(x, y, seed=5) == bootstrap_interval(x, y, seed=5)
    assert bootstrap_interval(x, y, seed=5) != bootstrap_interval(x, y, seed=6)


@pytest.mark.parametrize("statistic", [frechet_distance, kernel_distance, lambda a, b: abs(a.mean() - b.mean())])
def test_images_of_one_patient_do_not_count_as_independent(statistic):
    rng = np.random.default_rng(4)
    patients = [f"P{number}" for number in np.repeat(np.arange(60), 10)]
    x, y = (rng.normal(size=(60, 3)).repeat(10, axis=0) + rng.normal(size=(600, 3)) * 0.1 for _ in range(2))
    y += 1
    by_patient = bootstrap_interval(x, y, statistic, reference_patients=patients, sample_patients=patients)
    by_image = bootstrap_interval(x, y, statistic)
    assert by_patient.value == by_image.value == statistic(x, y)
    assert by_patient.high - by_patient.low > 2 * (by_image.high - by_image.low)


def test_weights_and_repeated_rows_give_the_same_frechet_interval():
    for n, d in ((40, 5), (15, 30)):
        x, y, _ = gaussians(np.random.default_rng(5), n, d)
        weighted = bootstrap_interval(x, y, resamples=30)
        repeated = bootstrap_interval(x, y, lambda a, b: frechet_distance(a, b), resamples=30)
        assert weighted.high == pytest.approx(repeated.high, rel=1e-9)


def test_kernel_intervals_surround_the_value_without_having_been_moved():
    x, y, _ = gaussians(np.random.default_rng(6), 80, 4)
    patients = [str(number // 2) for number in range(80)]
    estimate = bootstrap_interval(x, y, kernel_distance, reference_patients=patients, degree=2)
    assert estimate.value == kernel_distance(x, y, degree=2)
    assert estimate.low < estimate.value < estimate.high
    excess = float(estimate.note.split("excess of ")[1].split(";")[0])
    assert abs(excess) < 0.05 * (estimate.high - estimate.low)


def test_moments_of_the_reference_are_held_fixed():
    x, y, _ = gaussians(np.random.default_rng(7), 200, 4)
    moments = FeatureMoments.from_features(x)
    fixed, both = bootstrap_interval(moments, y), bootstrap_interval(x, y)
    assert fixed.value == pytest.approx(both.value)
    assert (fixed.n_reference, fixed.n_samples) == (200, 200)
    assert fixed.high - fixed.low < both.high - both.low
    with pytest.raises(UserError, match="only the Fréchet distance can be taken from moments"):
        bootstrap_interval(moments, y, kernel_distance)


def test_distance_intervals_never_reach_below_zero_and_small_sets_are_noted():
    rng = np.random.default_rng(8)
    x = rng.normal(size=(15, 2))
    estimate = bootstrap_interval(x, x + 0.01)
    assert estimate.low == 0 < estimate.high
    assert "15 images are few for 2 features" in estimate.note
    assert "only 15 patients" in estimate.note


def test_resamples_fall_with_the_width():
    assert [default_resamples(10_000, d) for d in (400, 512, 1024, 2048)] == [200, 200, 100, 50]
    assert default_resamples(300, 2048) == 200  # fewer images than features: their number counts


def test_interval_of_a_mean_equals_the_classical_one():
    values = np.random.default_rng(9).normal(3, 2, size=500)
    estimate = bootstrap_mean(values, resamples=4000)
    half = 1.96 * values.std(ddof=1) / np.sqrt(500)
    assert (estimate.value, estimate.n_reference, estimate.n_samples) == (values.mean(), 500, 500)
    assert (estimate.low, estimate.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    wider = bootstrap_mean(values.repeat(4), np.arange(500).repeat(4), resamples=4000)
    assert (wider.low, wider.high) == pytest.approx((estimate.low, estimate.high), abs=0.02)
    narrow = bootstrap_mean(values, level=0.5, resamples=4000)
    assert narrow.high - narrow.low < 0.5 * (estimate.high - estimate.low)


def test_prdc_intervals_surround_the_values():
    rng = np.random.default_rng(10)
    real, fake = rng.normal(size=(150, 3)), rng.normal(size=(100, 3)) * 0.7 + 0.3
    estimates = prdc_intervals(real, fake, nearest_k=3, fake_patients=[str(n // 2) for n in range(100)])
    values = precision_recall_density_coverage(real, fake, nearest_k=3)
    for name, estimate in estimates.items():
        assert estimate.value == pytest.approx(values[name])
        assert estimate.low < estimate.value < estimate.high
        assert (estimate.n_reference, estimate.n_samples) == (150, 100)


def test_baseline_divides_by_patient_and_states_the_halves():
    rng = np.random.default_rng(11)
    sizes = rng.integers(1, 9, 40)
    patients = np.arange(40).repeat(sizes)
    features = np.column_stack([patients, rng.normal(size=len(patients))])
    shared = []

    def statistic(first, second):
        shared.append(set(first[:, 0]) & set(second[:, 0]))
        return frechet_distance(first, second)

    baseline = real_baseline(features, [f"P{number}" for number in patients], statistic, repeats=7, seed=3)
    assert shared == [set()] * 7
    assert all(abs(first - second) <= 8 and first + second == len(features) for first, second in baseline.halves)
    assert baseline.low <= baseline.mean <= baseline.high
    assert len(set(baseline.values)) == 7
    assert baseline.n_first + baseline.n_second == pytest.approx(len(features), abs=1)
    assert baseline.n_patients == 40


def test_baseline_of_the_kernel_distance_is_about_zero_and_below_that_of_another_set():
    rng = np.random.default_rng(12)
    real, other = rng.normal(size=(200, 4)), rng.normal(size=(200, 4)) + 1
    baseline = real_baseline(real, statistic=kernel_distance)
    assert baseline.low < 0 < baseline.high < 0.2 * kernel_distance(real, other)
    assert (baseline.n_first, baseline.n_second) == (100, 100)


def test_bad_input_is_refused():
    x, y, _ = gaussians(np.random.default_rng(13), 10, 3)
    with pytest.raises(UserError, match="at least 2 patients"):
        bootstrap_interval(x, y, reference_patients=["A"] * 10)
    with pytest.raises(UserError, match="for each of the 10 images, got 3"):
        bootstrap_interval(x, y, sample_patients=["A", "B", "C"])
    with pytest.raises(UserError, match="level must lie between 0 and 1, got 95"):
        bootstrap_interval(x, y, level=95)
    with pytest.raises(UserError, match="resamples must be at least 2, got 1"):
        bootstrap_interval(x, y, resamples=1)
    with pytest.raises(UserError, match="one finite number per image"):
        bootstrap_mean([1.0, np.nan])
    with pytest.raises(UserError, match="at least 2 patients"):
        real_baseline(x, ["A"] * 10)
    with pytest.raises(UserError, match="at least 2 images in each, got 1"):
        real_baseline(x[:2])
    with pytest.raises(UserError, match="must be a finite number, got nan"):
        bootstrap_interval(x, y, lambda a, b: float("nan"))
    x[3, 0] = np.nan
    with pytest.raises(UserError, match="NaN or infinity in row 3"):
        bootstrap_interval(x, y)


def test_shares_stay_within_nought_and_one():
    """One of 40 fakes lies within the real images' manifold: recentred percentiles alone would end below nought."""
    rng = np.random.default_rng(0)
    real, fake = rng.standard_normal((40, 2)), rng.standard_normal((40, 2)) + 20
    fake[:1] = 0.0

    found = prdc_intervals(real, fake, 5)

    assert found["precision"].value == 1 / 40
    for name, estimate in found.items():
        assert 0 <= estimate.low <= estimate.value <= estimate.high, name
        assert name == "density" or estimate.high <= 1


def test_the_interval_of_a_logarithm_is_taken_on_its_scale():
    """Moved back, a resample may end below nought, which has no logarithm; the logarithms have an interval."""
    rng = np.random.default_rng(0)
    real, fake = rng.standard_normal((30, 3)), rng.standard_normal((30, 3)) * 1.1

    plain, log = (bootstrap_interval(real, fake, resamples=200, log=log) for log in (False, True))

    assert plain.low == 0.0
    assert log.value == pytest.approx(np.log(plain.value))
    assert -np.inf < log.low < log.value < log.high < np.inf
    assert "one" in bootstrap_interval(real, fake, lambda a, b: 0.0, resamples=200, log=True).note
