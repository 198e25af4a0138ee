"""Intervals by resampling patients: coverage on Gaussians of known distance; baselines and distances at equal n."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from medgen.errors import UserError
from medgen.metrics.frechet import FeatureMoments, frechet_distance
from medgen.metrics.intervals import (
    bootstrap_interval,
    bootstrap_mean,
    default_resamples,
    exact_binomial,
    matched_distance,
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
    known = {"x_patients": patients, "y_patients": patients} if statistic is kernel_distance else {}
    assert by_image.value == statistic(x, y)
    assert by_patient.value == statistic(x, y, **known)
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
    assert estimate.value == kernel_distance(x, y, degree=2, x_patients=patients) != kernel_distance(x, y, degree=2)
    assert estimate.low < estimate.value < estimate.high
    excess = float(estimate.note.split("excess of ")[1].split(";")[0])
    assert abs(excess) < 0.05 * (estimate.high - estimate.low)


def test_kernel_intervals_cover_zero_where_equal_distributions_have_several_images_a_patient():
    rng = np.random.default_rng(20)
    patients = np.arange(50).repeat(6)
    covered = 0
    for seed in range(25):
        x, y = (0.8 * rng.normal(size=(50, 20)).repeat(6, axis=0) + 0.6 * rng.normal(size=(300, 20)) for _ in range(2))
        estimate = bootstrap_interval(
            x, y, kernel_distance, reference_patients=patients, sample_patients=patients, resamples=200, seed=seed
        )
        covered += estimate.low <= 0 <= estimate.high
    assert covered >= 22


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


def test_prdc_intervals_measure_neighbours_of_other_patients():
    rng = np.random.default_rng(21)
    patients = np.arange(30).repeat(4)
    real, fake = (rng.normal(size=(30, 8)).repeat(4, axis=0) + 0.3 * rng.normal(size=(120, 8)) for _ in range(2))
    known = {"real_patients": patients, "fake_patients": patients}
    values = precision_recall_density_coverage(real, fake, 3, **known)
    estimates = prdc_intervals(real, fake, 3, **known, resamples=50)
    assert {name: estimate.value for name, estimate in estimates.items()} == pytest.approx(values)


def test_a_share_of_nought_or_one_has_the_exact_binomial_interval_of_the_patients():
    rng = np.random.default_rng(22)
    real, fake = rng.normal(size=(60, 3)), rng.normal(size=(40, 3)) + 100
    apart = prdc_intervals(real, fake, 3, fake_patients=np.arange(40) // 2)
    assert (apart["precision"].value, apart["precision"].low) == (0, 0)
    assert apart["precision"].high == pytest.approx(1 - 0.025 ** (1 / 20))  # Clopper and Pearson at no success
    assert "exact binomial interval for 20 patients" in apart["precision"].note
    assert apart["coverage"].high == pytest.approx(1 - 0.025 ** (1 / 60))
    assert "for 60 images" in apart["coverage"].note
    assert (apart["density"].low, apart["density"].high) == (0, 0)
    copies = prdc_intervals(real, real.copy(), 3, real_patients=np.arange(60) // 5, level=0.9)
    assert (copies["recall"].value, copies["recall"].high) == (1, 1)
    assert copies["recall"].low == pytest.approx(0.05 ** (1 / 12))
    assert copies["recall"].note.endswith("a rough interval: only 12 patients")


def test_exact_binomial_ends_are_those_of_the_binomial_tails():
    low, high = exact_binomial(3, 20, 0.95)
    assert binom.sf(2, 20, low) == pytest.approx(0.025, rel=1e-4)
    assert binom.cdf(3, 20, high) == pytest.approx(0.025, rel=1e-4)


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


def of_patients(rng: np.random.Generator, sizes: np.ndarray, d: int = 3) -> tuple[np.ndarray, list[str]]:
    """Features, the first of which is the patient's number, and patients in mixed order."""
    numbers = rng.permutation(np.arange(len(sizes)).repeat(sizes))
    return np.column_stack([numbers, rng.normal(size=(len(numbers), d))]), [f"P{number}" for number in numbers]


def test_statistic_is_given_the_patients_of_the_halves():
    rng = np.random.default_rng(23)
    real, patients = of_patients(rng, rng.integers(1, 6, 20))
    samples, sample_patients = of_patients(rng, rng.integers(1, 6, 40))
    seen = []

    def statistic(a, b, *, x_patients, y_patients, factor):
        seen.append((x_patients, y_patients))
        for images, known in ((a, x_patients), (b, y_patients)):
            assert known is None or [f"P{int(number)}" for number in images[:, 0]] == known
        return factor

    assert real_baseline(real, patients, statistic, 3, by_patient=True, factor=2.0).mean == 2
    assert all(not set(x) & set(y) for x, y in seen)
    both = {"reference_patients": patients, "sample_patients": sample_patients}
    matched_distance(real, samples, statistic, **both, by_patient=True, factor=1)
    assert None not in seen[-1]
    real_baseline(real, None, statistic, 1, by_patient=True, factor=1)
    assert seen[-1] == (None, None)
    matched_distance(real, samples, statistic, reference_patients=patients, repeats=1, by_patient=True, factor=1)
    assert seen[-1][0] is not None
    assert seen[-1][1] is None


def test_kernel_baseline_by_patient_is_about_zero_where_patients_have_several_images():
    rng = np.random.default_rng(24)
    patients = np.arange(60).repeat(6)
    real = 0.8 * rng.normal(size=(60, 20)).repeat(6, axis=0) + 0.6 * rng.normal(size=(360, 20))
    known, unknown = (real_baseline(real, patients, kernel_distance, by_patient=by) for by in (True, False))
    assert known.low < 0 < known.high
    assert unknown.low > 0


def test_matched_distance_takes_the_baselines_first_halves_and_whole_patients_of_the_samples():
    rng = np.random.default_rng(25)
    real, patients = of_patients(rng, rng.integers(1, 7, 50))
    samples, sample_patients = of_patients(rng, rng.integers(1, 7, 90))
    firsts, drawn = [], []

    def of_baseline(a, b):
        firsts.append(a)
        return 0.0

    def of_samples(a, b):
        drawn.append((a, b))
        return 0.0

    baseline = real_baseline(real, patients, of_baseline, repeats=6, seed=4)
    matched = matched_distance(
        real,
        samples,
        of_samples,
        reference_patients=patients,
        sample_patients=sample_patients,
        repeats=6,
        seed=4,
    )
    assert all(np.array_equal(first, a) for first, (a, _) in zip(firsts, drawn, strict=True))
    for (_, n_real), (_, n_drawn), (_, b) in zip(baseline.halves, matched.halves, drawn, strict=True):
        assert abs(n_real - n_drawn) <= 3
        whole = samples[np.isin(samples[:, 0], b[:, 0])]
        assert np.array_equal(whole, b)
        assert n_drawn == len(b)
    assert len({tuple(b[:, 0]) for _, b in drawn}) == 6
    assert matched.n_patients == 50


def test_matched_distance_draws_images_without_replacement_and_all_where_they_are_few():
    rng = np.random.default_rng(26)
    real, samples = rng.normal(size=(81, 2)), rng.normal(size=(100, 2))
    sizes = []

    def statistic(a, b):
        sizes.append(len(np.unique(b, axis=0)))
        return float(len(b))

    baseline = real_baseline(real, statistic=statistic, repeats=4)
    sizes.clear()
    assert matched_distance(real, samples, statistic, repeats=4).halves == baseline.halves
    assert sizes == [second for _, second in baseline.halves]
    few = matched_distance(real, samples[:15], statistic, repeats=4)
    assert few.values == (15.0,) * 4
    assert few.n_second == 15
    assert matched_distance(real, samples, repeats=3, seed=7) == matched_distance(real, samples, repeats=3, seed=7)


def test_matched_distance_of_equal_distributions_is_the_baseline():
    rng = np.random.default_rng(27)
    ratios = []
    for seed in range(20):
        real, samples = rng.normal(size=(200, 30)), rng.normal(size=(200, 30))
        ratios.append(matched_distance(real, samples, seed=seed).mean / real_baseline(real, seed=seed).mean)
    assert np.mean(ratios) == pytest.approx(1, abs=3 * np.std(ratios) / 20**0.5)
    assert np.mean(ratios) == pytest.approx(1, abs=0.03)


def test_matched_distance_shows_a_shift_that_the_value_at_full_n_hides_below_the_baseline():
    above, hidden = 0, 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        real, samples = rng.normal(size=(200, 100)), rng.normal(size=(200, 100)) + 0.3
        baseline = real_baseline(real, seed=seed, repeats=3)
        above += matched_distance(real, samples, seed=seed, repeats=3).mean > baseline.mean
        hidden += frechet_distance(real, samples) < baseline.mean
    assert above >= 19
    assert hidden == 20


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
    with pytest.raises(UserError, match="at least 2 patients"):
        matched_distance(x, y, sample_patients=["A"] * 10)
    with pytest.raises(UserError, match="repeats must be at least 1, got 0"):
        matched_distance(x, y, repeats=0)
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
