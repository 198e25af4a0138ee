"""Arms of a study against its reference: the same test images, each arm trained with several seeds.

N test images of P patients, S seeds, R resamples or shuffles.

Two things scatter in such a study: which patients are tested, and what a training makes of its seed. A figure of an
arm is the mean over its seeds, and what is asked for is this mean over all patients *and* all seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from medgen.errors import UserError
from medgen.metrics.classification import CLASSIFICATION_METRICS, ScoredImages, weighted_metrics
from medgen.metrics.detection import _widen_perfect
from medgen.metrics.intervals import (
    CHEAP_RESAMPLES,
    FEWEST_FOR_PERCENTILES,
    Estimate,
    check_level,
    draw_counts,
    exact_binomial,
    patient_codes,
    with_few_patients,
)

__all__ = ["ArmFigure", "compare_arms"]

SHUFFLES = 2000
# not a sum over the patients: where the arms err to opposite sides an exchange makes both well calibrated, and equal
# errors are told for different ones
UNFIT_TO_EXCHANGE = ("ece",)
OF_DECISIONS = ("accuracy", "balanced_accuracy", "sensitivity", "specificity")
TOLERANCE = 1e-12  # one arrangement summed in two orders must count as equal
BLOCK = 2**18  # numbers held at a time: 2 MB stay in the cache

Values = dict[str, NDArray[np.float64]]  # name of a figure -> its values


@dataclass(frozen=True)
class ArmFigure:
    """A figure of an arm beside the reference's.

    Args:
        arm: name.
        metric: name, of ``CLASSIFICATION_METRICS``.
        value: mean over the seeds.
        low: lower end of its interval; None where there is none, and the note says why.
        high: upper end.
        by_seed: seed -> value.
        difference: mean over the seeds that both arms have of value minus the reference's; None for the reference.
        difference_low: lower end of its interval; None also where the resamples tell nothing of it.
        difference_high: upper end.
        p_value: that an arm as good as the reference differs so much from it, with other patients and other seeds.
        p_networks: the same for these trained networks, whatever others would be: with other patients alone.
        seeds: of the difference.
        note: what limits the figures, one line; may be empty.
    """

    arm: str
    metric: str
    value: float
    low: float | None
    high: float | None
    by_seed: Mapping[int, float]
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    p_value: float | None = None
    p_networks: float | None = None
    seeds: tuple[int, ...] = ()
    note: str = ""


def compare_arms(
    arms: Mapping[str, Mapping[int, ScoredImages]],
    patients: Sequence[str] | None,
    reference: str = "real",
    *,
    names: Sequence[str] = tuple(CLASSIFICATION_METRICS),
    resamples: int = CHEAP_RESAMPLES,
    shuffles: int = SHUFFLES,
    level: float = 0.95,
    seed: int = 0,
) -> list[ArmFigure]:
    """Figures of each arm with intervals, and their differences from the reference with intervals and tests.

    *Patients.* Their part comes from a bootstrap that draws patients, with all their images, together for all arms
    and seeds; resamples without one of the classes are left out. The test's part comes from shuffles in which the two
    arms exchange their predictions of a patient, all seeds and images at once, or do not; for AUROC and average
    precision they exchange ranks within arm and seed (Venkatraman and Begg 1996), since one network's probabilities
    need not mean what another's do. The observed arrangement counts with the shuffles: p is (1 + as extreme) /
    (1 + shuffles), two-sided.

    *What the shuffles test* is that the two arms' predictions of a patient could as well be exchanged, by the
    difference of the figure. Arms of an equal figure need not be exchangeable. For sums over the images (of decisions,
    Brier score, likelihood, calibration in the large) that is no matter: an exchange turns the sign of what a patient
    adds to the difference and changes nothing else, so with enough patients it is a test of equal figures. For ranks it
    is nearly one: p was at most 0.05 in 4 to 6 % of 400 studies of two arms of equal AUROC or average precision, but
    of scores spread otherwise. For the expected calibration error it is none: of an arm that overstates a risk and one
    that understates it as much, each exchange makes two that are better calibrated, and p was at most 0.05 in 36 and
    48 % of 200 studies. Its p-value is therefore that of the resampled differences, moved to a mean of 0, of which its
    interval is made: 6 to 9 % of 400 studies of such arms, the most with 100 images.

    *Seeds.* Drawing 3 seeds with replacement would miss a third of their variance, and all of what Student's t knows
    of so few. Their part is therefore the standard error of the mean over the seeds times a draw of Student's t with
    S - 1 degrees of freedom, added to each resample and each shuffle. The same seed of two arms is a pair (initial
    weights and order are as alike as the arms allow), so a difference has the standard error of the pairs' differences.
    The scatter of the seeds on these patients holds what patients and seeds do together, and the resamples hold it a
    second time: their part is narrowed by it, as estimated from the resamples of the single seeds.

    To ask for more cannot make one surer: where few seeds agree by luck, the interval is no narrower and the p-value no
    smaller than those of the patients alone (``p_networks``).

    In 400 simulated studies of each of eight settings (1 to 5 seeds, 30 to 300 patients, 6 of the figures) with arms
    that do not differ in truth, p was at most 0.05 in 0.3 to 6.5 % of them, and intervals of the difference held 0 in
    92 to 100 %. The shuffles alone reach 37 % where seeds matter: they take the networks for given. With one seed
    there is nothing else, and the note says so; with two Student's t has 1 degree of freedom, and intervals are as wide
    as that is honest. What still is not in it: other validation images, which set the threshold, other training images,
    and another generator.

    Args:
        arms: arm -> seed -> predictions of the N test images, all in the same order.
        patients: (N,) patient of each image; None: each image its own.
        reference: arm that the others are held against; without it there are no differences.
        names: of the figures.
        resamples: of the bootstrap, at least 200.
        shuffles: of the test.
        level: of confidence.
        seed: of all draws.

    Returns:
        A figure per arm and name, by arm; the reference has no difference, nor does an arm that shares no seed with it.

    Raises:
        UserError: no arm, an arm without a seed, images that differ, fewer than two patients, or settings that are
            none.
    """
    check_level(level)
    if resamples < FEWEST_FOR_PERCENTILES or shuffles < 1:
        raise UserError(
            f"resamples must be at least {FEWEST_FOR_PERCENTILES} and shuffles at least 1, got {resamples} and "
            f"{shuffles}; take {CHEAP_RESAMPLES} and {SHUFFLES}"
        )
    labels = _labels_of_all(arms)
    codes = patient_codes(patients, len(labels))
    once = np.ones((len(labels), 1))
    values = {arm: _by_seed([weighted_metrics(s, once, names) for s in arms[arm].values()]) for arm in arms}
    drawn = _resample(arms, codes, names, resamples, seed)
    exchanged = [name for name in names if name not in UNFIT_TO_EXCHANGE]
    swapped = _swap(arms, codes, exchanged, shuffles, reference, seed) if exchanged else {}
    alone = {}
    for arm in arms:
        for name in names:
            of_seeds, metric = values[arm][name][0], CLASSIFICATION_METRICS[name]
            ends = _interval(of_seeds, drawn[arm][name], level, seed, (metric.low, metric.high))
            one = {"value": float(of_seeds.mean()), "low": ends[0], "high": ends[1]}
            alone[arm, name] = one | _at_the_edge(name, one, labels, patients, level)
    found = []
    for arm, scored in arms.items():
        common = [] if arm == reference else [s for s in scored if s in arms.get(reference, {})]
        for name in names:
            one = dict(alone[arm, name])
            notes = [one.pop("note", "")]
            one |= {"by_seed": dict(zip(scored, values[arm][name][0].tolist(), strict=True))}
            if common:
                own, others = ([list(arms[a]).index(s) for s in common] for a in (arm, reference))
                gap = values[arm][name][0][own] - values[reference][name][0][others]
                of_draws = drawn[arm][name][:, own] - drawn[reference][name][:, others]
                reach = CLASSIFICATION_METRICS[name].high - CLASSIFICATION_METRICS[name].low
                low, high = _interval(gap, of_draws, level, seed, (-reach, reach))
                one |= {"difference": float(gap.mean()), "difference_low": low, "difference_high": high}
                pair = (alone[arm, name], alone[reference, name])
                edge = _difference_at_the_edge(name, one, pair, labels, codes, level)
                notes.append(edge.pop("note", ""))
                chance = of_draws - of_draws.mean(axis=0) if name in UNFIT_TO_EXCHANGE else swapped[arm][name]
                one |= {**edge, "seeds": tuple(common), **_p_values(gap, chance, seed)}
            note = _note(notes, drawn[arm][name], labels, codes)
            found.append(ArmFigure(arm=arm, metric=name, **one, note=note))
    return found


def _labels_of_all(arms: Mapping[str, Mapping[int, ScoredImages]]) -> NDArray[np.intp]:
    """(N,) of the test images, which are those of every network."""
    networks = [scored for of_arm in arms.values() for scored in of_arm.values()]
    if not networks or not all(arms.values()):
        raise UserError("a comparison needs predictions of at least one seed of each arm, got an arm without any")
    if any(not np.array_equal(scored.labels, networks[0].labels) for scored in networks):
        raise UserError("all arms must be judged by the same test images, got others; evaluate them on one test split")
    return networks[0].labels


def _blocks(images: int, draws: int) -> Iterator[int]:
    """Numbers of draws to be held at a time."""
    rows = max(1, BLOCK // images)
    for start in range(0, draws, rows):
        yield min(rows, draws - start)


def _by_seed(of_seeds: Sequence[Values]) -> Values:
    """(R, S) by name, from (R,) by name of each seed."""
    return {name: np.stack([one[name] for one in of_seeds], axis=1) for name in of_seeds[0]}


def _resample(
    arms: Mapping[str, Mapping[int, ScoredImages]],
    codes: NDArray[np.intp],
    names: Sequence[str],
    resamples: int,
    seed: int,
) -> dict[str, Values]:
    """arm -> name -> (R, S): by the same draws of patients for all."""
    rng, parts = np.random.default_rng([seed, 0]), {arm: [] for arm in arms}
    for rows in _blocks(len(codes), resamples):
        counts = np.ascontiguousarray(draw_counts(rng, codes, rows).T)
        for arm, scored in arms.items():
            parts[arm].append(_by_seed([weighted_metrics(s, counts, names) for s in scored.values()]))
    return {arm: _stacked(blocks) for arm, blocks in parts.items()}


def _swap(
    arms: Mapping[str, Mapping[int, ScoredImages]],
    codes: NDArray[np.intp],
    names: Sequence[str],
    shuffles: int,
    reference: str,
    seed: int,
) -> dict[str, Values]:
    """arm -> name -> (R, S) differences from the reference after patients' predictions were exchanged at random."""
    others = arms.get(reference, {})
    pairs = {
        arm: [scored[s].joined(others[s]) for s in scored if s in others]
        for arm, scored in arms.items()
        if arm != reference
    }
    pairs = {arm: joined for arm, joined in pairs.items() if joined}
    rng, parts = np.random.default_rng([seed, 1]), {arm: [] for arm in pairs}
    for rows in _blocks(2 * len(codes), shuffles):
        kept = (rng.random((codes.max() + 1, rows)) < 0.5)[codes].astype(np.float64)
        first, second = np.concatenate([kept, 1 - kept]), np.concatenate([1 - kept, kept])
        for arm, joined in pairs.items():
            sides = [_by_seed([weighted_metrics(pair, side, names) for pair in joined]) for side in (first, second)]
            parts[arm].append({name: sides[0][name] - sides[1][name] for name in names})
    return {arm: _stacked(blocks) for arm, blocks in parts.items()}


def _stacked(blocks: Sequence[Values]) -> Values:
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def _interval(
    values: NDArray[np.float64], draws: NDArray[np.float64], level: float, seed: int, ends: tuple[float, float]
) -> tuple[float, float]:
    """Recentred percentiles of (R, S) resamples around the mean of (S,) values, with the seeds' scatter added."""
    draws = draws[np.isfinite(draws).all(axis=1)]
    if len(draws) < 2:
        raise UserError("no resample had images of each class; give test images of more patients of the rare class")
    means = draws.mean(axis=1)
    means -= means.mean()
    tail = (1 - level) / 2
    # of the patients alone, and of the seeds too: a small scatter of three seeds by luck makes nothing surer
    quantiles = np.quantile([means, _with_seeds(means, values, draws, seed)], (tail, 1 - tail), axis=1)
    low, high = values.mean() + quantiles[0].min(), values.mean() + quantiles[1].max()
    return max(float(low), ends[0]), min(float(high), ends[1])


def _p_values(values: NDArray[np.float64], chance: NDArray[np.float64], seed: int) -> dict[str, float]:
    """Of (S,) differences, against (R, S) that chance makes where there is none: after exchanges, or recentred."""
    observed, means = abs(values.mean()), chance.mean(axis=1)

    def p(around: NDArray[np.float64]) -> float:
        return float((1 + (np.abs(around) >= observed - TOLERANCE).sum()) / (1 + len(around)))

    networks = p(means)
    return {"p_value": max(networks, p(_with_seeds(means, values, chance, seed))), "p_networks": networks}


def _with_seeds(
    around: NDArray[np.float64], values: NDArray[np.float64], draws: NDArray[np.float64], seed: int
) -> NDArray[np.float64]:
    """(R,) draws of the error of a mean over seeds, from (R,) draws of its part that is due to the patients.

    The variance of the mean of S seeds on P patients is p/P + s/S + i/(PS) for patients, seeds and both together. The
    draws have the first and the third, the variance of the values over the seeds divided by S has the second and the
    third. The third is taken from the draws, not from the seeds: what is subtracted from a variance of few values makes
    a t-test reject too often.

    Args:
        around: (R,) means of the draws over the seeds, around 0.
        values: (S,) observed.
        draws: (R, S) draws of these.
        seed: of Student's t.
    """
    n = len(values)
    if n == 1:
        return around
    together = (draws - draws.mean(axis=1, keepdims=True)).var(axis=0).sum() / (n - 1) / n
    total = around.var()
    narrowed = np.sqrt(max(0.0, 1 - together / total)) if total > 0 else 0.0
    error = values.std(ddof=1) / np.sqrt(n)
    # its quantiles in random order: a sample of them has the right ends even where R is small and t has 1 degree
    quantiles = student.ppf((np.arange(len(around)) + 0.5) / len(around), n - 1)
    return narrowed * around + error * np.random.default_rng([seed, 2]).permutation(quantiles)


def _at_the_edge(
    name: str, one: Mapping[str, Any], labels: NDArray[np.intp], patients: Sequence[str] | None, level: float
) -> dict[str, Any]:
    """Another interval, and the note that says which, where all resamples give the same and theirs has no width.

    At 0 or 1, Clopper and Pearson's for as many trials as there are patients (of the class concerned, or of the rarest
    one), and Newcombe's of 2006 for an AUROC; the other figures have none.
    """
    value = one["value"]
    if one["high"] - one["low"] > TOLERANCE:
        return {}
    if value in (0.0, 1.0) and name == "auroc" and labels.max() == 1:
        bare = Estimate(value, value, value, int((labels == 0).sum()), int(labels.sum()), level)
        wide = _widen_perfect(bare, labels == 1, patients)
        return {"low": wide.low, "high": wide.high, "note": wide.note.replace("anomalous", "positive")}
    if value in (0.0, 1.0) and name in OF_DECISIONS:
        n = _patients_concerned(name, labels, patient_codes(patients, len(labels)))
        low, high = exact_binomial(n if value else 0, n, level)
        return {"low": low, "high": high, "note": f"exact binomial interval for {n} patients"}
    every = "separates the classes" if value == 1 and name in ("auroc", "average_precision") else "gives the same"
    return {"low": None, "high": None, "note": f"no interval, as every resample {every}"}


def _difference_at_the_edge(
    name: str,
    one: Mapping[str, Any],
    pair: tuple[Mapping[str, Any], Mapping[str, Any]],
    labels: NDArray[np.intp],
    codes: NDArray[np.intp],
    level: float,
) -> dict[str, Any]:
    """The same for a difference from the reference.

    Of n patients in none of whom two arms differ: in others they may as often as Clopper and Pearson's upper end for 0
    of n says, to either side. Where both figures have an interval of :func:`_at_the_edge`: from end to opposite end,
    as each is passed with half of the error that the level allows. Otherwise none.

    Args:
        name: of the figure.
        one: the arm's figure with its difference.
        pair: the arm's figure and the reference's, by themselves.
        labels: (N,).
        codes: (N,) of the patients.
        level: of confidence.
    """
    if one["difference_high"] - one["difference_low"] > TOLERANCE:
        return {}
    if name in OF_DECISIONS and abs(one["difference"]) <= TOLERANCE:
        n = _patients_concerned(name, labels, codes)
        far = exact_binomial(0, n, level)[1]
        note = f"difference: exact binomial limits for {n} patients, none of whom makes one"
        return {"difference_low": -far, "difference_high": far, "note": note}
    arm, reference = pair
    if all("note" in figure and figure["low"] is not None for figure in pair):
        ends = {"difference_low": arm["low"] - reference["high"], "difference_high": arm["high"] - reference["low"]}
        return ends | {"note": "difference: from end to opposite end of the two intervals"}
    note = "no interval of the difference, as every resample gives the same"
    return {"difference_low": None, "difference_high": None, "note": note}


def _patients_concerned(name: str, labels: NDArray[np.intp], codes: NDArray[np.intp]) -> int:
    """Patients whom a figure of decisions is about: of the class concerned, or of the rarest one."""
    of_class = [len(np.unique(codes[labels == k])) for k in range(labels.max() + 1)]
    concerned = {"accuracy": int(codes.max()) + 1}
    if len(of_class) == 2:
        concerned |= {"specificity": of_class[0], "sensitivity": of_class[1]}
    return concerned.get(name, min(of_class))


def _note(notes: Sequence[str], draws: NDArray[np.float64], labels: NDArray[np.intp], codes: NDArray[np.intp]) -> str:
    notes = [note for note in notes if note]
    if draws.shape[1] == 1:
        notes.append("one seed: how far trainings scatter is not in it")
    lost = int((~np.isfinite(draws).all(axis=1)).sum())
    if lost:
        notes.append(f"{lost} resamples left out that lacked a class")
    fewest = min(len(np.unique(codes[labels == k])) for k in np.unique(labels))
    return with_few_patients("; ".join(notes), fewest).removeprefix("; ")
