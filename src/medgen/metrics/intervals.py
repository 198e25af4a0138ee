"""Confidence intervals by resampling patients, and what two halves of the real images are apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, norm

from medgen.errors import UserError
from medgen.metrics.frechet import FeatureMoments, _as_table, frechet_distance, small_sample_note
from medgen.metrics.kernel import kernel_distance, kernel_distance_resampled, patient_codes
from medgen.metrics.prdc import PRDC_NAMES, prdc_per_image

__all__ = [
    "Baseline",
    "Estimate",
    "bootstrap_interval",
    "bootstrap_mean",
    "check_level",
    "check_resamples",
    "default_resamples",
    "draw_counts",
    "exact_binomial",
    "matched_distance",
    "patient_codes",
    "prdc_intervals",
    "real_baseline",
    "recentred_interval",
    "with_few_patients",
]

CHEAP_RESAMPLES = 1000  # where a resample costs next to nothing
# features (or images, if fewer) up to which -> resamples of a distance that costs a decomposition each
RESAMPLES_BY_WIDTH = ((512, 200), (1024, 100), (float("inf"), 50))
FEWEST_FOR_PERCENTILES = 200  # below, a 95% interval would hang on the 4 most extreme resamples or fewer
FEW_PATIENTS = 20

Statistic = Callable[..., float]


@dataclass(frozen=True)
class Estimate:
    """A number with its confidence interval.

    Args:
        value: what was measured.
        low: lower end of the interval.
        high: upper end of the interval.
        n_reference: reference images.
        n_samples: images that are judged.
        level: of confidence.
        note: how the interval was made and what limits it, one line.
    """

    value: float
    low: float
    high: float
    n_reference: int
    n_samples: int
    level: float = 0.95
    note: str = ""


@dataclass(frozen=True)
class Baseline:
    """A statistic between random halves of one set of images, or between one half and other images.

    Args:
        mean: over the repeats.
        low: smallest.
        high: largest.
        values: one per repeat.
        halves: images in the two halves of each repeat.
        n_patients: patients (images, where those are not known) that were divided.
    """

    mean: float
    low: float
    high: float
    values: tuple[float, ...]
    halves: tuple[tuple[int, int], ...]
    n_patients: int

    @property
    def n_first(self) -> int:
        """Images in the first half, on average."""
        return round(float(np.mean([first for first, _ in self.halves])))

    @property
    def n_second(self) -> int:
        """Images in the second half, on average."""
        return round(float(np.mean([second for _, second in self.halves])))


def default_resamples(n: int, d: int) -> int:
    """Resamples of the Fréchet distance: 200 up to 512 features, 100 up to 1,024, 50 above.

    A resample costs about d^3 + n d^2 operations, and n^3 where images are fewer than features. Fifty suffice for a
    standard error (Efron and Tibshirani 1993, section 6.4), not for percentiles: see :func:`bootstrap_interval`.

    Args:
        n: images of the larger set.
        d: number of features.
    """
    return next(resamples for width, resamples in RESAMPLES_BY_WIDTH if min(n, d) <= width)


def bootstrap_interval(
    reference: ArrayLike | FeatureMoments,
    samples: ArrayLike,
    statistic: Statistic = frechet_distance,
    *,
    reference_patients: Sequence[str] | None = None,
    sample_patients: Sequence[str] | None = None,
    resamples: int | None = None,
    level: float = 0.95,
    seed: int = 0,
    log: bool = False,
    **options: Any,
) -> Estimate:
    """Confidence interval of a statistic of two sets, by drawing patients of both sets with replacement.

    Images of one patient resemble each other; drawing images would take them for independent and give too narrow an
    interval, so all images of a drawn patient come along.

    Drawing with replacement raises a Fréchet distance. In the resamples' world the truth is the measured value; a
    resample of n images measures it with about the same upward bias b(n) ~ c / n (Chong and Forsyth 2020) by which the
    measured value exceeds *its* truth, so the resamples scatter around the measured value plus b(n), and the plain
    percentile interval may lie wholly above the value it belongs to. The resamples are therefore moved back by their
    mean excess before the percentiles are taken. What remains is the scatter of the measured value over sets of this
    size: the interval is one for the expected distance at this n, not for the distance of infinitely many images, and
    says nothing about the bias itself. :func:`real_baseline` shows that. With n much larger than the number of
    features both agree. With fewer images than features a resample, which holds 63% of the images, has also a lower
    rank than the set, and the interval errs on the wide side.

    It also errs on the wide side for a Fréchet or kernel distance whose truth is near 0: there the distance is no
    longer linear in the sets' moments, and resamples scatter more than the value does. Between two sets of 100 images
    of one Gaussian with 10 features, 120 intervals of 120 covered the expected distance, 0.94 wide on average where
    0.54 would have done (Fréchet), and 0.22 where 0.12 would have (kernel).

    Below 200 resamples the interval is value ± z standard errors instead of percentiles.

    The kernel distance leaves out the pairs of one patient, in the value as in the resamples, which are taken by
    weights (:func:`medgen.metrics.kernel.kernel_distance_resampled`). Any other statistic is resampled by repeating
    rows. That suits smooth functions of the sets; for statistics of nearest neighbours, which would find the copies,
    use :func:`prdc_intervals`.

    Args:
        reference: (N, D) features; for the Fréchet distance also moments, which are then held fixed.
        samples: (M, D) features.
        statistic: (reference, samples, **options) -> number.
        reference_patients: (N,) patient of each image; each image its own by default.
        sample_patients: the same for the samples.
        resamples: how many; by default 1,000 for the kernel distance, else :func:`default_resamples`.
        level: of confidence, between 0 and 1.
        seed: of the draws.
        log: take the natural logarithm of the statistic and of every resample, and the interval on that scale.
        **options: further arguments of the statistic.

    Raises:
        UserError: fewer than two patients in a set that is resampled, or what the statistic refuses.
    """
    check_level(level)
    samples = _as_table(samples)
    fixed = isinstance(reference, FeatureMoments)
    if fixed and statistic is not frechet_distance:
        raise UserError("only the Fréchet distance can be taken from moments; give the features of the reference")
    reference = reference if fixed else _as_table(reference)
    n_reference, n_samples = reference.n if fixed else len(reference), len(samples)
    of_patients = {}
    if statistic is kernel_distance:
        of_patients = {"x_patients": reference_patients, "y_patients": sample_patients}
    value = float(statistic(reference, samples, **of_patients, **options))
    if not np.isfinite(value):
        raise UserError(f"the statistic must be a finite number, got {value}; give more images, or other features")
    if resamples is None:
        larger = max(n_reference, n_samples)
        resamples = CHEAP_RESAMPLES if statistic is kernel_distance else default_resamples(larger, samples.shape[1])
    check_resamples(resamples)
    codes = [
        None if fixed else patient_codes(reference_patients, n_reference),
        patient_codes(sample_patients, n_samples),
    ]
    rng = np.random.default_rng(seed)
    counts = [None if code is None else draw_counts(rng, code, resamples) for code in codes]

    if statistic is kernel_distance:
        values = kernel_distance_resampled(reference, samples, *counts, *codes, **options)
    else:
        values = np.array(
            [
                _resampled(
                    statistic, reference, samples, None if fixed else counts[0][number], counts[1][number], options
                )
                for number in range(resamples)
            ]
        )
    if log:
        with np.errstate(divide="ignore"):
            value, values = float(np.log(value)), np.log(values)
    if np.isfinite(value):
        low, high, note = recentred_interval(value, values, level)
    else:
        low, high, note = value, value, "no interval: the two sets are one"
    if statistic is frechet_distance:
        low = low if log else max(low, 0.0)
        note = "; ".join(filter(None, [note, small_sample_note(min(n_reference, n_samples), samples.shape[1])]))
    patients = min(code.max() + 1 for code in codes if code is not None)
    return Estimate(value, low, high, n_reference, n_samples, level, with_few_patients(note, patients))


def bootstrap_mean(
    values: ArrayLike,
    patients: Sequence[str] | None = None,
    *,
    resamples: int = CHEAP_RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Mean of one value per image, with its interval by drawing patients with replacement.

    Args:
        values: (N,) finite.
        patients: (N,) patient of each image; each image its own by default.
        resamples: how many.
        level: of confidence, between 0 and 1.
        seed: of the draws.

    Returns:
        Estimate with ``n_reference`` and ``n_samples`` both N.

    Raises:
        UserError: fewer than two patients, or values that are not finite.
    """
    check_level(level)
    check_resamples(resamples)
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise UserError(f"values must be one finite number per image, got shape {values.shape}; drop what failed")
    codes = patient_codes(patients, len(values))
    counts = draw_counts(np.random.default_rng(seed), codes, resamples)
    value = float(values.mean())
    low, high, note = recentred_interval(value, counts @ values / counts.sum(axis=1), level)
    return Estimate(value, low, high, len(values), len(values), level, with_few_patients(note, codes.max() + 1))


def prdc_intervals(
    real: ArrayLike,
    fake: ArrayLike,
    nearest_k: int = 5,
    *,
    real_patients: Sequence[str] | None = None,
    fake_patients: Sequence[str] | None = None,
    resamples: int = CHEAP_RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Precision, recall, density and coverage with intervals over the images that are scored.

    The balls around the other set's images stay as they are (:func:`medgen.metrics.prdc.prdc_per_image` says why), so
    the intervals leave out how much the balls themselves depend on the images at hand. They reach to the k-th nearest
    image of other patients.

    Resamples of a share of 0 or 1 are all equal. Its interval is one-sided then: from the share to the end of the exact
    binomial interval (Clopper and Pearson 1934) for as many trials as there are patients, or images where they are not
    known.

    Args:
        real: (N, D) features.
        fake: (M, D) features.
        nearest_k: neighbours that set the radius of a ball.
        real_patients: (N,) patient of each real image; each image its own by default.
        fake_patients: the same for the fakes.
        resamples: how many.
        level: of confidence, between 0 and 1.
        seed: of the draws.

    Raises:
        UserError: fewer than two patients, or what :func:`medgen.metrics.prdc.prdc_per_image` refuses.
    """
    scores = prdc_per_image(real, fake, nearest_k, real_patients=real_patients, fake_patients=fake_patients)
    patients = {"precision": fake_patients, "recall": real_patients, "density": fake_patients}
    patients["coverage"] = real_patients
    n_real, n_fake = len(scores["recall"]), len(scores["precision"])
    estimates = {}
    for name in PRDC_NAMES:
        found = bootstrap_mean(scores[name], patients[name], resamples=resamples, level=level, seed=seed)
        # moving the resamples back may have moved an end over the edge of what a share can be
        most = np.inf if name == "density" else 1.0
        low, high = (min(max(end, 0.0), most) for end in (found.low, found.high))
        note = found.note
        if name != "density" and found.value in (0.0, 1.0):
            n = int(patient_codes(patients[name], len(scores[name])).max()) + 1
            low, high = exact_binomial(n if found.value else 0, n, level)
            unit = "images" if patients[name] is None else "patients"
            note = with_few_patients(f"exact binomial interval for {n} {unit}, as all their images agree", n)
        estimates[name] = replace(found, low=low, high=high, n_reference=n_real, n_samples=n_fake, note=note)
    return estimates


def real_baseline(
    features: ArrayLike,
    patients: Sequence[str] | None = None,
    statistic: Statistic = frechet_distance,
    repeats: int = 10,
    seed: int = 0,
    *,
    by_patient: bool = False,
    **options: Any,
) -> Baseline:
    """A statistic between random halves of the real images: what a perfect generator could reach at this n.

    The halves share no patient. They hold half of the images: a statistic with a bias that falls with n, like the
    Fréchet distance, comes out larger than between sets of full size. What may be compared with it is therefore not
    the distance of all samples but :func:`matched_distance`, taken at the same n.

    Args:
        features: (N, D) features of real images.
        patients: (N,) patient of each image; each image its own by default.
        statistic: (first half, second half, **options) -> number.
        repeats: random divisions.
        seed: of the divisions.
        by_patient: give the statistic the patients of both halves as ``x_patients`` and ``y_patients``, None where they
            are not known; :func:`medgen.metrics.kernel.kernel_distance` takes them.
        **options: further arguments of the statistic.

    Raises:
        UserError: fewer than two patients, or halves that the statistic refuses.
    """
    features = _as_table(features)
    codes = patient_codes(patients, len(features))
    values, halves = [], []
    for first in _first_halves(codes, repeats, seed):
        second = ~first
        known = _patients_of(patients, first, patients, second) if by_patient else {}
        values.append(float(statistic(features[first], features[second], **known, **options)))
        halves.append((int(first.sum()), int(second.sum())))
    return _baseline(values, halves, codes)


def matched_distance(
    reference: ArrayLike,
    samples: ArrayLike,
    statistic: Statistic = frechet_distance,
    *,
    reference_patients: Sequence[str] | None = None,
    sample_patients: Sequence[str] | None = None,
    repeats: int = 10,
    seed: int = 0,
    by_patient: bool = False,
    **options: Any,
) -> Baseline:
    """A statistic between halves of the real images and as many samples: the one to hold against the baseline.

    In each repeat the reference is divided as :func:`real_baseline` divides it at the same seed, and samples take the
    place of the second half: as many, drawn at random without replacement (whole patients where they are known, the
    number as near as these allow; all samples where there are fewer). Both figures then have equal n, hence equal bias,
    and may be compared: a perfect generator gives equal ones on average. The distance of all samples may not: at its
    larger n it has less bias, and may lie below the baseline of images that are plainly different.

    The repeats share images, so ``low`` and ``high`` tell the scatter over the divisions and are no confidence
    interval.

    Args:
        reference: (N, D) features of real images.
        samples: (M, D) features of the images that are judged.
        statistic: (half of the reference, samples, **options) -> number.
        reference_patients: (N,) patient of each image; each image its own by default.
        sample_patients: (M,), the same for the samples.
        repeats: random divisions.
        seed: of the divisions and the draws.
        by_patient: give the statistic the patients of both sets, as for :func:`real_baseline`.
        **options: further arguments of the statistic.

    Returns:
        Baseline, whose ``halves`` hold the images of the reference and the samples of each repeat, and ``n_patients``
        the patients of the reference.

    Raises:
        UserError: fewer than two patients in a set, or sets that the statistic refuses.
    """
    reference, samples = _as_table(reference), _as_table(samples)
    codes = patient_codes(reference_patients, len(reference))
    sample_codes = patient_codes(sample_patients, len(samples))
    rng = np.random.default_rng([seed, 1])  # apart from the divisions, which must be those of the baseline
    values, halves = [], []
    for first in _first_halves(codes, repeats, seed):
        drawn = _draw_patients(rng, sample_codes, len(reference) - int(first.sum()), int(sample_codes.max()) + 1)
        known = _patients_of(reference_patients, first, sample_patients, drawn) if by_patient else {}
        values.append(float(statistic(reference[first], samples[drawn], **known, **options)))
        halves.append((int(first.sum()), int(drawn.sum())))
    return _baseline(values, halves, codes)


def _first_halves(codes: NDArray[np.intp], repeats: int, seed: int) -> Iterator[NDArray[np.bool_]]:
    """(N,) masks of about half of the images, whole patients; at least one patient stays out."""
    if repeats < 1:
        raise UserError(f"repeats must be at least 1, got {repeats}; take 10")
    rng = np.random.default_rng(seed)
    for _ in range(repeats):
        yield _draw_patients(rng, codes, len(codes) / 2, int(codes.max()))


def _draw_patients(rng: np.random.Generator, codes: NDArray[np.intp], target: float, most: int) -> NDArray[np.bool_]:
    """(N,) mask of the images of 1 to ``most`` patients, taken in random order up to about ``target`` images."""
    sizes = np.bincount(codes)
    order = rng.permutation(len(sizes))
    images = np.cumsum(sizes[order])[:most]
    return np.isin(codes, order[: int(np.argmin(np.abs(images - target))) + 1])


def _patients_of(
    x_patients: Sequence[str] | None,
    x_mask: NDArray[np.bool_],
    y_patients: Sequence[str] | None,
    y_mask: NDArray[np.bool_],
) -> dict[str, list[str] | None]:
    """Arguments of a statistic that takes patients."""
    both = (("x_patients", x_patients, x_mask), ("y_patients", y_patients, y_mask))
    return {
        name: None if patients is None else [patients[i] for i in np.flatnonzero(mask)] for name, patients, mask in both
    }


def _baseline(values: list[float], halves: list[tuple[int, int]], codes: NDArray[np.intp]) -> Baseline:
    patients = int(codes.max()) + 1
    return Baseline(float(np.mean(values)), min(values), max(values), tuple(values), tuple(halves), patients)


def _resampled(
    statistic: Statistic,
    reference: NDArray | FeatureMoments,
    samples: NDArray,
    reference_counts: NDArray[np.float64] | None,
    sample_counts: NDArray[np.float64],
    options: dict[str, Any],
) -> float:
    if statistic is frechet_distance:  # weights: a row drawn three times is multiplied once
        return frechet_distance(reference, samples, a_counts=reference_counts, b_counts=sample_counts)
    return float(statistic(_repeat(reference, reference_counts), _repeat(samples, sample_counts), **options))


def _repeat(rows: NDArray, counts: NDArray[np.float64]) -> NDArray:
    return rows[np.repeat(np.arange(len(rows)), counts.astype(np.intp))]


def recentred_interval(value: float, values: NDArray[np.float64], level: float) -> tuple[float, float, str]:
    """Recentred percentiles (or a normal interval, for few resamples) and how they came about."""
    values = values[np.isfinite(values)]
    if not len(values):
        raise UserError("no resample gave a number; give images of more patients")
    excess = float(values.mean() - value)
    if len(values) >= FEWEST_FOR_PERCENTILES:
        tail = (1 - level) / 2
        low, high = (float(np.quantile(values, q)) - excess for q in (tail, 1 - tail))
        kind = "percentiles"
    else:
        half = float(norm.ppf((1 + level) / 2) * values.std(ddof=1)) if len(values) > 1 else float("inf")
        low, high, kind = value - half, value + half, "standard error"
    return low, high, f"{kind} of {len(values)} resamples, moved back by their mean excess of {excess:.3g}"


def draw_counts(rng: np.random.Generator, codes: NDArray[np.intp], resamples: int) -> NDArray[np.float64]:
    """(R, N): how often each image counts when patients are drawn with replacement."""
    patients = int(codes.max()) + 1
    return rng.multinomial(patients, np.full(patients, 1 / patients), size=resamples).astype(np.float64)[:, codes]


def exact_binomial(successes: int, trials: int, level: float) -> tuple[float, float]:
    """Ends of Clopper and Pearson's interval (1934) of a share: successes of trials, at a level of confidence."""
    found = binomtest(successes, trials).proportion_ci(level, "exact")
    return float(found.low), float(found.high)


def with_few_patients(note: str, patients: int) -> str:
    """The note, with a warning where fewer than 20 patients were resampled."""
    return note if patients >= FEW_PATIENTS else f"{note}; a rough interval: only {patients} patients"


def check_level(level: float) -> None:
    """Refuse a level of confidence that is none."""
    if not 0 < level < 1:
        raise UserError(f"level must lie between 0 and 1, got {level}; take 0.95")


def check_resamples(resamples: int) -> None:
    """Refuse fewer than two resamples."""
    if resamples < 2:
        raise UserError(f"resamples must be at least 2, got {resamples}; take 200 or more")
