"""How well a score tells anomalies from ordinary images: AUROC and its intervals, tests, operating points, power.

Everywhere a high score means anomalous, and labels are 1 for an anomaly, 0 for an image like the training data.
An :class:`~medgen.metrics.intervals.Estimate` of this module holds the ordinary images as ``n_reference`` and the
anomalies as ``n_samples``.

Images of one patient resemble each other. Every interval and test therefore takes ``patients``; without them each
image counts as independent, and slices of one CT would make an interval far too narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.stats import norm, rankdata

from medgen.errors import UserError
from medgen.metrics.intervals import (
    CHEAP_RESAMPLES,
    Estimate,
    check_level,
    check_resamples,
    draw_counts,
    exact_binomial,
    patient_codes,
    recentred_interval,
    with_few_patients,
)

__all__ = [
    "AUROCComparison",
    "OperatingPoint",
    "PermutationTest",
    "SubsampledAUROC",
    "auroc",
    "auroc_bootstrap",
    "auroc_delong",
    "auroc_source_subsampling",
    "average_precision",
    "average_precision_bootstrap",
    "delong_test",
    "permutation_power",
    "permutation_test",
    "permutation_tests",
    "sensitivity_at_specificity",
]

ALTERNATIVES = ("two-sided", "greater", "less")
SOURCE_RESAMPLES = 50  # gan_anom_detect
SHUFFLES = 100_000  # the same
BLOCK = 2**20  # numbers held at a time: 8 MB stay in the cache

# (R, K) weights of anomalies and of ordinary images at each of K ascending scores -> (R,) values; NaN without a class
Statistic = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True)
class OperatingPoint:
    """Sensitivity where the specificity is fixed.

    Args:
        sensitivity: share of anomalies above the threshold, with its interval.
        specificity: share of ordinary images at or below the threshold; at least what was asked for.
        threshold: an image is called anomalous when its score is greater.
    """

    sensitivity: Estimate
    specificity: float
    threshold: float


@dataclass(frozen=True)
class AUROCComparison:
    """DeLong's test of two scores of the same images.

    Args:
        first: AUROC of the first score.
        second: AUROC of the second.
        difference: first minus second.
        low: lower end of the interval of the difference.
        high: upper end.
        z: difference over its standard error; 0 where both scores rank every pair alike.
        p_value: that AUROCs which do not differ in truth lie so far apart.
        alternative: ``two-sided``, ``greater`` (the first is larger) or ``less``.
        n_reference: ordinary images.
        n_samples: anomalies.
        level: of the interval.
    """

    first: float
    second: float
    difference: float
    low: float
    high: float
    z: float
    p_value: float
    alternative: str
    n_reference: int
    n_samples: int
    level: float = 0.95


@dataclass(frozen=True)
class PermutationTest:
    """Result of :func:`permutation_test`.

    Args:
        difference: mean of the first group minus mean of the second.
        p_value: (1 + shuffles at least as extreme) / (1 + shuffles); never 0.
        alternative: ``two-sided``, ``greater`` or ``less``.
        shuffles: how many.
        n_first: values, or patients, of the first group.
        n_second: of the second.
    """

    difference: float
    p_value: float
    alternative: str
    shuffles: int
    n_first: int
    n_second: int


@dataclass(frozen=True)
class SubsampledAUROC:
    """Result of :func:`auroc_source_subsampling`.

    Args:
        mean: of the values.
        sd: their population standard deviation; no standard error of the AUROC.
        values: one per resample.
        n_drawn: images drawn of each class.
    """

    mean: float
    sd: float
    values: tuple[float, ...]
    n_drawn: int


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve: the chance that an anomaly scores higher than an ordinary image, ties counting half.

    It is the Mann-Whitney U of the anomalies over the number of pairs (Hanley and McNeil 1982).

    Args:
        scores: (N,) finite; high means anomalous.
        labels: (N,) 1 for an anomaly, 0 for an ordinary image.

    Returns:
        In [0, 1]; 0.5 is chance.

    Raises:
        UserError: a class without images, scores that are not finite, lengths that differ.
    """
    scores, labels = _check(scores, labels)
    return _once(_auroc_by_score, scores, labels)


def average_precision(scores: ArrayLike, labels: ArrayLike) -> float:
    """Sum over descending thresholds of (gain in recall) x precision, images of equal score taken together.

    Unlike the AUROC it depends on the share of anomalies, which is also what a score without any information reaches:
    compare only sets of the same share.

    Args:
        scores: (N,) finite; high means anomalous.
        labels: (N,) 1 for an anomaly, 0 for an ordinary image.

    Returns:
        In (0, 1].

    Raises:
        UserError: as for :func:`auroc`.
    """
    scores, labels = _check(scores, labels)
    return _once(_average_precision_by_score, scores, labels)


def auroc_bootstrap(
    scores: ArrayLike,
    labels: ArrayLike,
    patients: Sequence[str] | None = None,
    *,
    resamples: int = CHEAP_RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """AUROC with its interval by drawing patients, of both classes together, with replacement.

    All images of a drawn patient come along; resamples without one of the classes are left out and counted in the
    note. Where every resample gives the same 0 or 1 their percentiles say nothing, and the interval is that of
    Newcombe 2006 ("Confidence intervals for an effect size measure based on the Mann-Whitney statistic, part 2",
    method 5) for as many images as there are patients.

    Args:
        scores: (N,) finite; high means anomalous.
        labels: (N,) 1 for an anomaly, 0 for an ordinary image.
        patients: (N,) patient of each image; each image its own by default.
        resamples: how many.
        level: of confidence, between 0 and 1.
        seed: of the draws.

    Returns:
        Estimate within [0, 1].

    Raises:
        UserError: as for :func:`auroc`, or fewer than two patients.
    """
    scores, labels = _check(scores, labels)
    found = _bootstrap(_auroc_by_score, scores, labels, patients, resamples, level, seed)
    return _widen_perfect(found, labels, patients)


def average_precision_bootstrap(
    scores: ArrayLike,
    labels: ArrayLike,
    patients: Sequence[str] | None = None,
    *,
    resamples: int = CHEAP_RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Average precision with its interval by drawing patients with replacement.

    The note states the share of anomalies, without which the figure means nothing.

    Args:
        scores: (N,) finite; high means anomalous.
        labels: (N,) 1 for an anomaly, 0 for an ordinary image.
        patients: (N,) patient of each image; each image its own by default.
        resamples: how many.
        level: of confidence, between 0 and 1.
        seed: of the draws.

    Returns:
        Estimate within [0, 1]. At a value of 1 it has no width, and the note says so.

    Raises:
        UserError: as for :func:`auroc`, or fewer than two patients.
    """
    scores, labels = _check(scores, labels)
    found = _bootstrap(_average_precision_by_score, scores, labels, patients, resamples, level, seed)
    note = f"{found.note}; {labels.mean():.1%} of the images are anomalies"
    if found.low == found.high:
        note += "; no width, as every resample separates the classes"
    return replace(found, note=note)


def sensitivity_at_specificity(
    scores: ArrayLike,
    labels: ArrayLike,
    patients: Sequence[str] | None = None,
    *,
    specificity: float = 0.95,
    resamples: int = CHEAP_RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> OperatingPoint:
    """Share of anomalies found at the lowest threshold that leaves so many ordinary images alone.

    The threshold is estimated from the ordinary images, so each resample finds its own: a binomial interval at the
    threshold found would be too narrow. Nothing is interpolated between scores, and an anomaly that ties with the
    threshold is missed. Where every resample finds none or all, the interval is the exact binomial one for as many
    anomalies as there are patients with one.

    Args:
        scores: (N,) finite; high means anomalous.
        labels: (N,) 1 for an anomaly, 0 for an ordinary image.
        patients: (N,) patient of each image; each image its own by default.
        specificity: share of ordinary images to be left alone, in (0, 1].
        resamples: how many.
        level: of confidence, between 0 and 1.
        seed: of the draws.

    Returns:
        Sensitivity with its interval, the specificity reached and the threshold.

    Raises:
        UserError: as for :func:`auroc`, a specificity out of range, or fewer than two patients.
    """
    if not 0 < specificity <= 1:
        raise UserError(f"specificity must lie above 0 and be at most 1, got {specificity}; take 0.95")
    scores, labels = _check(scores, labels)
    ordinary = np.sort(scores[~labels])
    # 0.95 * 20 is a little more than 19 in binary
    threshold = float(ordinary[max(ceil(specificity * len(ordinary) - 1e-9), 1) - 1])

    def statistic(anomalies: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
        below = np.cumsum(others, axis=1)
        at = np.argmax(below >= specificity * below[:, -1:] - 1e-9, axis=1)
        found = np.cumsum(anomalies, axis=1)
        missed = np.take_along_axis(found, at[:, None], axis=1)[:, 0]
        valid = (found[:, -1] > 0) & (below[:, -1] > 0)
        return np.where(valid, 1 - missed / np.maximum(found[:, -1], 1), np.nan)

    found = _bootstrap(statistic, scores, labels, patients, resamples, level, seed)
    if found.low == found.high:
        n = _patients_by_class(labels, patients)[1]
        low, high = exact_binomial(round(found.value * n), n, level)
        found = replace(found, low=low, high=high, note=f"exact binomial interval for {n} anomalous patients")
    return OperatingPoint(found, float((ordinary <= threshold).mean()), threshold)


def auroc_delong(
    scores: ArrayLike, labels: ArrayLike, patients: Sequence[str] | None = None, *, level: float = 0.95
) -> Estimate:
    """AUROC with the interval of DeLong, DeLong and Clarke-Pearson 1988, on the scale of the logit.

    The variance is theirs, by ranks (Sun and Xu 2014); with ``patients`` it is Obuchowski's of 1997 ("Nonparametric
    analysis of clustered ROC curve data"), which is the same when each image is its own patient. The logit keeps the
    interval inside [0, 1] and nearer to its level where the AUROC is high (Pepe 2003). Where the classes
    are separated, the variance is 0 and the interval that of Newcombe 2006, as in :func:`auroc_bootstrap`.

    Args:
        scores: (N,) finite; high means anomalous.
        labels: (N,) 1 for an anomaly, 0 for an ordinary image.
        patients: (N,) patient of each image; each image its own by default.
        level: of confidence, between 0 and 1.

    Returns:
        Estimate within [0, 1]; its note holds the standard error.

    Raises:
        UserError: as for :func:`auroc`, or fewer than two patients of a class.
    """
    check_level(level)
    scores, labels = _check(scores, labels)
    value = auroc(scores, labels)
    error = _standard_error(_placements(scores, labels), labels, patients)
    low = high = value
    if 0 < value < 1:
        half = norm.ppf((1 + level) / 2) * error / (value * (1 - value))
        odds = np.log(value / (1 - value))
        low, high = (float(1 / (1 + np.exp(-end))) for end in (odds - half, odds + half))
    note = f"DeLong, standard error {error:.3g}, logit scale"
    note = with_few_patients(note, min(_patients_by_class(labels, patients)))
    return _widen_perfect(
        Estimate(value, low, high, int((~labels).sum()), int(labels.sum()), level, note), labels, patients
    )


def delong_test(
    first: ArrayLike,
    second: ArrayLike,
    labels: ArrayLike,
    patients: Sequence[str] | None = None,
    *,
    alternative: str = "two-sided",
    level: float = 0.95,
) -> AUROCComparison:
    """Whether two scores of the same images have different AUROCs (DeLong, DeLong and Clarke-Pearson 1988).

    Their variances and covariance are those of the difference of the placement values, computed as in
    :func:`auroc_delong`, by patient where patients are given.

    Args:
        first: (N,) one score of each image, finite; high means anomalous.
        second: (N,) the other score of the same images.
        labels: (N,) 1 for an anomaly, 0 for an ordinary image.
        patients: (N,) patient of each image; each image its own by default.
        alternative: ``two-sided``, ``greater`` (the first AUROC is larger) or ``less``.
        level: of the interval of the difference.

    Returns:
        Both AUROCs, their difference with its interval, and the p-value.

    Raises:
        UserError: as for :func:`auroc`, fewer than two patients of a class, or AUROCs that differ without variance.
    """
    check_level(level)
    _check_alternative(alternative)
    first, labels = _check(first, labels)
    second, _ = _check(second, labels)
    values = auroc(first, labels), auroc(second, labels)
    difference = values[0] - values[1]
    error = _standard_error(_placements(first, labels) - _placements(second, labels), labels, patients)
    if error > 0:
        z = difference / error
    elif abs(difference) < 1e-12:  # the same ranking twice
        z = 0.0
    else:
        raise UserError(
            f"DeLong's test needs AUROCs that vary, got {values[0]:g} and {values[1]:g}, each without any variance; "
            "give more images, or report the two as they are"
        )
    half = norm.ppf((1 + level) / 2) * error
    tails = {"two-sided": 2 * norm.sf(abs(z)), "greater": norm.sf(z), "less": norm.cdf(z)}
    return AUROCComparison(
        *values,
        difference,
        float(max(difference - half, -1)),
        float(min(difference + half, 1)),
        float(z),
        float(tails[alternative]),
        alternative,
        int((~labels).sum()),
        int(labels.sum()),
        level,
    )


def auroc_source_subsampling(
    scores: ArrayLike, labels: ArrayLike, *, resamples: int = SOURCE_RESAMPLES, seed: int = 0
) -> SubsampledAUROC:
    """The protocol of gan_anom_detect, to compare with its published figures, not to judge by.

    Each resample draws as many images as the smaller class has, of both classes, without replacement, and divides the
    scores by their maximum, which changes no rank. The smaller class is thus complete each time, and two classes of
    the same size give the same AUROC every time: the standard deviation is that of leaving out images of the larger
    class, and no measure of how well the AUROC is known. Take :func:`auroc_bootstrap` or :func:`auroc_delong` for that.

    Args:
        scores: (N,) finite; high means anomalous; the largest of each draw must be positive.
        labels: (N,) 1 for an anomaly, 0 for an ordinary image.
        resamples: how many; 50 in the source.
        seed: of the draws; the source had none.

    Returns:
        Mean, population standard deviation, and the values.

    Raises:
        UserError: as for :func:`auroc`, or scores of which none is positive.
    """
    scores, labels = _check(scores, labels)
    if resamples < 1:
        raise UserError(f"resamples must be at least 1, got {resamples}; take {SOURCE_RESAMPLES}")
    rng = np.random.default_rng(seed)
    groups = np.flatnonzero(~labels), np.flatnonzero(labels)
    n = min(len(group) for group in groups)
    values = []
    for _ in range(resamples):
        drawn = np.concatenate([rng.choice(group, n, replace=False) for group in groups])
        top = scores[drawn].max()
        if top <= 0:
            raise UserError(f"the source divides scores by their maximum, which must be positive, got {top:g}")
        values.append(auroc(scores[drawn] / top, labels[drawn]))
    return SubsampledAUROC(float(np.mean(values)), float(np.std(values)), tuple(values), n)


def permutation_test(
    first: ArrayLike,
    second: ArrayLike,
    *,
    alternative: str = "two-sided",
    shuffles: int = SHUFFLES,
    seed: int = 0,
    first_patients: Sequence[str] | None = None,
    second_patients: Sequence[str] | None = None,
) -> PermutationTest:
    """Whether the means of two groups differ, by shuffling who belongs to which.

    Two-sided, ``|difference| >= |observed|`` counts as extreme; ``greater`` counts ``difference >= observed``. The
    observed grouping is one of the possible ones and is counted with the shuffles, without which the p-value could be
    0 and the test would reject too often (Phipson and Smyth 2010). Only the smaller group is drawn each time. Shuffles
    go by in blocks: memory does not grow with their number, time is that of shuffles x values.

    The values must be exchangeable: with patients given, each patient's mean stands for his images. For two scores
    of the *same* images use :func:`delong_test`.

    Args:
        first: (N,) finite.
        second: (M,) finite.
        alternative: ``two-sided``, ``greater`` (the first mean is larger) or ``less``.
        shuffles: how many.
        seed: of the shuffles.
        first_patients: (N,) patient of each value; each value its own by default.
        second_patients: (M,) the same for the second group; no patient may be in both.

    Returns:
        Difference of the means and p-value, which is at least 1 / (shuffles + 1).

    Raises:
        UserError: an empty group, values that are not finite, patients that do not match, a setting out of range.
    """
    settings = {"alternative": alternative, "shuffles": shuffles, "seed": seed}
    patients = {"first_patients": first_patients, "second_patients": second_patients}
    return permutation_tests([first], [second], **settings, **patients)[0]


def permutation_tests(
    firsts: Sequence[ArrayLike],
    seconds: Sequence[ArrayLike],
    *,
    alternative: str = "two-sided",
    shuffles: int = SHUFFLES,
    seed: int = 0,
    first_patients: Sequence[str] | None = None,
    second_patients: Sequence[str] | None = None,
) -> tuple[PermutationTest, ...]:
    """:func:`permutation_test` of several scores of the same images, by the same shuffles.

    Each test is what :func:`permutation_test` gives for its score; drawing, most of the work, is done once for all.

    Args:
        firsts: per score (N,), finite.
        seconds: per score (M,), finite.
        alternative: see :func:`permutation_test`.
        shuffles: the same.
        seed: the same.
        first_patients: (N,), the same.
        second_patients: (M,), the same.

    Returns:
        A test per score.

    Raises:
        UserError: as for :func:`permutation_test`, or scores of different numbers of images.
    """
    _check_alternative(alternative)
    _check_count(shuffles, "shuffles", SHUFFLES)
    pairs = [_check_groups(*pair, first_patients, second_patients) for pair in zip(firsts, seconds, strict=True)]
    sizes = sorted({(len(first), len(second)) for first, second in pairs})
    if len(sizes) > 1:
        raise UserError(f"the scores must be of the same images, got groups of {sizes[0]} and of {sizes[1]} values")
    columns = [np.stack(group, axis=1) for group in zip(*pairs, strict=True)]
    p_values = _permutation_p(*columns, alternative, shuffles, np.random.default_rng(seed))
    return tuple(
        PermutationTest(float(first.mean() - second.mean()), float(p), alternative, shuffles, len(first), len(second))
        for (first, second), p in zip(pairs, p_values, strict=True)
    )


def permutation_power(
    first: ArrayLike,
    second: ArrayLike,
    *,
    n_first: int | None = None,
    n_second: int | None = None,
    alternative: str = "two-sided",
    alpha: float = 0.05,
    simulations: int = 1000,
    shuffles: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    first_patients: Sequence[str] | None = None,
    second_patients: Sequence[str] | None = None,
) -> Estimate:
    """Power of :func:`permutation_test`: how often it rejects in studies drawn from the two groups with replacement.

    The groups at hand stand for their populations, so the power is that of finding the difference as it was measured,
    which a pilot study may have overrated. With ``n_first`` and ``n_second`` it tells how large a study must be.

    Args:
        first: (N,) finite.
        second: (M,) finite.
        n_first: values per simulated first group; as many as given by default.
        n_second: the same for the second.
        alternative: ``two-sided``, ``greater`` (the first mean is larger) or ``less``.
        alpha: the test rejects at p-values up to here.
        simulations: simulated studies.
        shuffles: of each study's test.
        level: of the interval, which is that of the share of simulations (exact binomial).
        seed: of the draws and shuffles.
        first_patients: (N,) patient of each value; each patient's mean is then what is drawn.
        second_patients: (M,) the same for the second group.

    Returns:
        Share of simulated studies that reject; ``n_reference`` and ``n_samples`` are the sizes of the simulated second
        and first group.

    Raises:
        UserError: as for :func:`permutation_test`, or too few shuffles to reach alpha.
    """
    check_level(level)
    _check_alternative(alternative)
    _check_count(simulations, "simulations", 1000)
    _check_count(shuffles, "shuffles", 1000)
    if not 1 / (shuffles + 1) <= alpha < 1:
        raise UserError(
            f"alpha must lie between 1 / (shuffles + 1) = {1 / (shuffles + 1):.3g} and 1, got {alpha}; take 0.05, "
            "or more shuffles"
        )
    first, second = _check_groups(first, second, first_patients, second_patients)
    n_first = len(first) if n_first is None else _check_count(n_first, "n_first", len(first))
    n_second = len(second) if n_second is None else _check_count(n_second, "n_second", len(second))
    rng = np.random.default_rng(seed)
    rejected = 0
    for _ in range(simulations):
        groups = rng.choice(first, n_first), rng.choice(second, n_second)
        rejected += int(_permutation_p(*(g[:, None] for g in groups), alternative, shuffles, rng)[0] <= alpha)
    low, high = exact_binomial(rejected, simulations, level)
    note = f"{simulations} simulated studies of {shuffles} shuffles, {alternative}, alpha {alpha:g}"
    return Estimate(rejected / simulations, low, high, n_second, n_first, level, note)


def _permutation_p(
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    alternative: str,
    shuffles: int,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """(K,) p-values of (N, K) against (M, K), all by the same shuffles."""
    pooled = np.concatenate([first, second])
    pooled = pooled - pooled.mean(axis=0)
    n, m = len(first), len(second)
    # the sum of all values is 0 now, so that of one group tells the difference of the means: the smaller group's is
    # the cheaper one
    few = min(n, m)
    sign = 1.0 if n <= m else -1.0
    observed = sign * (pooled[:n] if n <= m else pooled[n:]).sum(axis=0)
    # the same grouping summed in another order must count as equal
    slack = 1e-12 * np.abs(pooled).sum(axis=0)
    extreme = np.zeros(pooled.shape[1], dtype=int)
    rows = max(1, BLOCK // (n + m))
    for start in range(0, shuffles, rows):
        members = np.zeros((min(rows, shuffles - start), n + m))
        for group in members:
            # in no particular order: three times as fast as shuffling all
            group[rng.choice(n + m, few, replace=False, shuffle=False)] = 1
        sums = sign * (members @ pooled)
        if alternative == "two-sided":
            hits = np.abs(sums) >= np.abs(observed) - slack
        elif alternative == "greater":
            hits = sums >= observed - slack
        else:
            hits = sums <= observed + slack
        extreme += hits.sum(axis=0)
    return (1 + extreme) / (1 + shuffles)


def _auroc_by_score(anomalies: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    pairs = anomalies.sum(axis=1) * others.sum(axis=1)
    won = (anomalies * (np.cumsum(others, axis=1) - others / 2)).sum(axis=1)
    return np.where(pairs > 0, won / np.maximum(pairs, 1), np.nan)


def _average_precision_by_score(anomalies: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    true, false = (np.cumsum(counts[:, ::-1], axis=1) for counts in (anomalies, others))
    precision = true / np.maximum(true + false, 1)  # counts are whole: below 1 means none, and no gain in recall
    total = true[:, -1]
    gained = (anomalies[:, ::-1] * precision).sum(axis=1)
    return np.where((total > 0) & (false[:, -1] > 0), gained / np.maximum(total, 1), np.nan)


def _once(statistic: Statistic, scores: NDArray[np.float64], labels: NDArray[np.bool_]) -> float:
    return float(statistic(*_by_score(scores, labels)(np.ones((1, len(scores)))))[0])


def _by_score(
    scores: NDArray[np.float64], labels: NDArray[np.bool_]
) -> Callable[[NDArray[np.float64]], tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """From (R, N) weights of the images to their sums at each different score, ascending, by class."""
    order = np.argsort(scores, kind="stable")
    ascending = scores[order]
    starts = np.flatnonzero(np.append(True, ascending[1:] != ascending[:-1]))
    sorted_labels = labels[order]

    def gather(counts: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        counts = counts[:, order]
        anomalies = np.add.reduceat(counts * sorted_labels, starts, axis=1)
        return anomalies, np.add.reduceat(counts, starts, axis=1) - anomalies

    return gather


def _bootstrap(
    statistic: Statistic,
    scores: NDArray[np.float64],
    labels: NDArray[np.bool_],
    patients: Sequence[str] | None,
    resamples: int,
    level: float,
    seed: int,
) -> Estimate:
    check_level(level)
    check_resamples(resamples)
    codes = patient_codes(patients, len(scores))
    gather = _by_score(scores, labels)
    rng = np.random.default_rng(seed)
    rows = max(1, BLOCK // len(scores))
    values = np.concatenate(
        [
            statistic(*gather(draw_counts(rng, codes, min(rows, resamples - start))))
            for start in range(0, resamples, rows)
        ]
    )
    value = _once(statistic, scores, labels)
    low, high, note = recentred_interval(value, values, level)
    lost = int(np.isnan(values).sum())
    if lost:
        note += f"; {lost} resamples left out that lacked a class"
    note = with_few_patients(note, min(_patients_by_class(labels, patients)))
    # moving the resamples back may have moved an end over the edge
    low, high = max(low, 0.0), min(high, 1.0)
    return Estimate(value, low, high, int((~labels).sum()), int(labels.sum()), level, note)


def _placements(scores: NDArray[np.float64], labels: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(N,) of an anomaly the share of ordinary images below it, of an ordinary image that of anomalies above it.

    V10 and V01 of DeLong et al. 1988.
    """
    ranks = rankdata(scores)
    own = np.empty_like(ranks)
    own[labels], own[~labels] = rankdata(scores[labels]), rankdata(scores[~labels])
    beaten = ranks - own  # images of the other class below, ties half
    n = labels.sum()
    return np.where(labels, beaten / (len(labels) - n), 1 - beaten / n)


def _standard_error(
    placements: NDArray[np.float64], labels: NDArray[np.bool_], patients: Sequence[str] | None
) -> float:
    """Of the mean placement (or of a difference of two), images of a patient moving together.

    Obuchowski 1997; with one image a patient it is DeLong's variance.
    """
    codes = patient_codes(patients, len(labels))
    sums, clusters = [], []
    for kind, name in ((labels, "anomalies"), (~labels, "ordinary images")):
        present = np.unique(codes[kind])
        if len(present) < 2:
            raise UserError(
                f"DeLong's variance takes {name} of at least 2 patients, got {len(present)}; "
                "give more, or take the bootstrap"
            )
        centred = np.where(kind, placements - placements[kind].mean(), 0.0) / kind.sum()
        sums.append(np.bincount(codes, centred, minlength=codes.max() + 1))
        clusters.append(len(present))
    variance = sum((s**2).sum() * count / (count - 1) for s, count in zip(sums, clusters, strict=True))
    total = len(sums[0])
    covariance = (sums[0] * sums[1]).sum() * total / (total - 1)
    # rounding leaves a trace where every placement is the same
    spread = max(float(variance + 2 * covariance), 0.0) ** 0.5
    return spread if spread > 1e-12 else 0.0


def _widen_perfect(found: Estimate, labels: NDArray[np.bool_], patients: Sequence[str] | None) -> Estimate:
    """Newcombe's interval instead of one without width at an AUROC of 0 or 1."""
    if found.low != found.high or found.value not in (0.0, 1.0):
        return found
    n, m = _patients_by_class(labels, patients)
    squared, half = norm.ppf((1 + found.level) / 2) ** 2, (n + m) / 2 - 1

    def excess(theta: float) -> float:
        spread = 1 + half * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return (1 - theta) * n * m - squared * theta * spread

    end = float(brentq(excess, 0.0, 1.0))
    low, high = (end, 1.0) if found.value == 1 else (0.0, 1 - end)
    note = f"the classes are separated: Newcombe's interval for {n} ordinary and {m} anomalous patients"
    return replace(found, low=low, high=high, note=note)


def _patients_by_class(labels: NDArray[np.bool_], patients: Sequence[str] | None) -> tuple[int, int]:
    """Patients with an ordinary image, patients with an anomaly."""
    codes = patient_codes(patients, len(labels))
    return len(np.unique(codes[~labels])), len(np.unique(codes[labels]))


def _check(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    scores, labels = _numbers(scores, "scores"), _numbers(labels, "labels")
    if len(scores) != len(labels):
        raise UserError(f"scores and labels must be as many, got {len(scores)} and {len(labels)}; give one per image")
    if not np.isin(labels, (0, 1)).all():
        wrong = labels[~np.isin(labels, (0, 1))][0]
        raise UserError(f"labels must be 1 (anomalous) or 0, got {wrong:g}; turn the classes into 0 and 1")
    anomalies = int(labels.sum())
    if not 0 < anomalies < len(labels):
        raise UserError(
            f"both classes are needed, got {anomalies} anomalies and {len(labels) - anomalies} ordinary images; "
            "add images of the class that is missing"
        )
    return scores, labels.astype(bool)


def _check_groups(
    first: ArrayLike,
    second: ArrayLike,
    first_patients: Sequence[str] | None,
    second_patients: Sequence[str] | None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = _numbers(first, "the first group"), _numbers(second, "the second group")
    if not len(first) or not len(second):
        raise UserError(f"both groups need values, got {len(first)} and {len(second)}; add to the empty one")
    if (first_patients is None) != (second_patients is None):
        raise UserError("patients must be given for both groups or for neither; add the others")
    if first_patients is None:
        return first, second
    shared = {str(patient) for patient in first_patients} & {str(patient) for patient in second_patients}
    if shared:
        raise UserError(
            f"no patient may be in both groups, got {len(shared)} such patients ({min(shared)!r} is one); "
            "compare scores of the same images by delong_test"
        )
    return _patient_means(first, first_patients), _patient_means(second, second_patients)


def _patient_means(values: NDArray[np.float64], patients: Sequence[str]) -> NDArray[np.float64]:
    if len(patients) != len(values):
        raise UserError(f"patients must be given for each of the {len(values)} values, got {len(patients)}")
    codes = np.unique(np.asarray(patients, dtype=str), return_inverse=True)[1]
    return np.bincount(codes, values) / np.bincount(codes)


def _numbers(values: ArrayLike, name: str) -> NDArray[np.float64]:
    try:
        values = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError(f"{name} must be numbers, got something else; give one number per image") from None
    if values.ndim != 1:
        raise UserError(f"{name} must be one number per image, got shape {values.shape}; flatten it")
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise UserError(f"{name} must be finite, got {bad} NaN or infinite of {len(values)}; leave those images out")
    return values


def _check_alternative(alternative: str) -> None:
    if alternative not in ALTERNATIVES:
        raise UserError(f"alternative must be one of {', '.join(ALTERNATIVES)}, got {alternative!r}; take two-sided")


def _check_count(count: int, name: str, take: int) -> int:
    if count < 1:
        raise UserError(f"{name} must be at least 1, got {count}; take {take}")
    return count
