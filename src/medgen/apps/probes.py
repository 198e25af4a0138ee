"""What is known of patients, read off the latents by linear probes, with cross-validation by patient."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from medgen.errors import UserError
from medgen.metrics.detection import auroc, auroc_bootstrap, average_precision_bootstrap
from medgen.metrics.intervals import (
    CHEAP_RESAMPLES,
    Estimate,
    bootstrap_mean,
    check_level,
    draw_counts,
    patient_codes,
    recentred_interval,
    with_few_patients,
)

__all__ = [
    "Factor",
    "Probe",
    "find_factors",
    "fit_probe",
    "fits_of_probe",
    "holm",
    "patient_folds",
    "patients_of",
    "shuffle_patients",
]

STRENGTHS = tuple(10.0**power for power in range(-5, 1))  # C of the logistic regression, 1/alpha of the ridge
INNER_FOLDS = 3
COMPONENTS = 512  # that a longer latent, as in W+, is projected to
SEXES = ("F", "M")  # the second is the probe's positive class
SEX_WORDS = {"F": 0.0, "FEMALE": 0.0, "WOMAN": 0.0, "M": 1.0, "MALE": 1.0, "MAN": 1.0}
LABEL, SEX, AGE = "label", "sex", "age"

Item = Mapping[str, Any]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Factor:
    """Something known of the images.

    Args:
        name: of the label, or "sex" or "age".
        kind: "label", "sex" (1 for M, 0 for F) or "age" (in years).
        values: (N,), NaN where it is not known.
        classes: what the values 0 and 1 are called.
    """

    name: str
    kind: str
    values: Array
    classes: tuple[str, str] = ("without", "with")

    @property
    def is_binary(self) -> bool:
        """Whether its values are 0 and 1."""
        return self.kind != AGE


@dataclass(frozen=True)
class Probe:
    """Result of :func:`fit_probe`.

    Args:
        factor: what is read off.
        weight: (D,) of the probe that was fitted on all images: ``score = latent · weight + bias``, log-odds of a
            label (as if both classes were equally frequent), years of age.
        bias: of the same.
        scores: (N,) of the folds' probes, each for the patients that it has not seen; NaN where the factor is not
            known.
        folds: (N,) fold in which an image was left out, -1 where the factor is not known.
        figures: ``auroc`` and ``average_precision``, or ``r2`` and ``mae``, with intervals by drawing patients.
        chance: what each figure is without information: 0.5 and the share of positives, or 0 and the mean absolute
            deviation from the folds' means.
        null: mean, lower and upper end of the interval of AUROC or R2 of shuffled values; None for no shuffles.
        p_value: (1 + shuffles that reach the figure) / (1 + shuffles); None for no shuffles.
        positives: images with the label; 0 for age.
        patients: whose images were used.
        strength: of the regularisation of the probe that was fitted on all images, one of :data:`STRENGTHS`.
    """

    factor: Factor
    weight: Array
    bias: float
    scores: Array
    folds: NDArray[np.intp]
    figures: dict[str, Estimate]
    chance: dict[str, float]
    null: tuple[float, float, float] | None
    p_value: float | None
    positives: int
    patients: int
    strength: float

    @property
    def name(self) -> str:
        """Of its factor."""
        return self.factor.name

    @property
    def n(self) -> int:
        """Images."""
        return int(np.isfinite(self.factor.values).sum())

    @property
    def headline(self) -> str:
        """The figure that the shuffles are held against."""
        return "auroc" if self.factor.is_binary else "r2"


def patients_of(items: Sequence[Item]) -> list[str]:
    """The patient of each image; an image without one is a patient of its own."""
    return [str(item.get("patient") or item["image"]) for item in items]


def find_factors(
    items: Sequence[Item], labels: Sequence[str] | None = None, min_patients: int = 10
) -> tuple[list[Factor], dict[str, str]]:
    """What can be probed: labels, age and sex.

    An item without ``label`` and ``labels`` has unknown labels; one with ``labels: []`` has none of them. Of two
    classes in ``label`` the second is the factor, since the first is its opposite.

    Args:
        items: N, with ``label`` (a class) or ``labels`` (a list), ``age``, ``sex``, ``patient`` where known.
        labels: those wanted; None for all that occur. Age and sex are always tried.
        min_patients: fewest patients with a label, and without it.

    Returns:
        The factors, labels by name, then age and sex; and why others were left out.

    Raises:
        UserError: nothing to probe, or a label that was asked for occurs nowhere, everywhere, or too seldom.
    """
    of_items = [_labels(item) for item in items]
    found = sorted({name for names in of_items if names for name in names})
    if labels is None:
        classes = sorted({str(item["label"]) for item in items if item.get("label") is not None})
        wanted = [name for name in found if not (len(classes) == 2 and name == classes[0])]
    else:
        wanted = list(dict.fromkeys(str(name) for name in labels))
    patients = np.asarray(patients_of(items))
    factors, left_out = [], {}
    for name in wanted:
        if name not in found:
            raise UserError(_unknown_label(name, found, len(items)))
        values = np.array([np.nan if names is None else float(name in names) for names in of_items])
        reason = _unfit(values, patients, min_patients)
        if name in (AGE, SEX):
            reason = f"{name} is what the probe of the {name} is called; rename the label"
        if reason and labels is not None:
            raise UserError(f"label {name} cannot be probed: {reason}; leave it out of --labels")
        if reason:
            left_out[name] = reason
        else:
            factors.append(Factor(name, LABEL, values))
    ages = np.array([_age(item) for item in items])
    known = np.isfinite(ages)
    if len(np.unique(patients[known])) < min_patients or np.ptp(ages[known]) == 0:
        left_out[AGE] = f"known of {len(np.unique(patients[known]))} patients, {min_patients} of two ages are needed"
    else:
        factors.append(Factor(AGE, AGE, ages))
    sexes, classes, reason = _sexes(items)
    reason = reason or _unfit(sexes, patients, min_patients)
    if reason:
        left_out[SEX] = reason.replace("without it", f"of sex {classes[0]}").replace("with it", f"of sex {classes[1]}")
    else:
        factors.append(Factor(SEX, SEX, sexes, classes))
    if not factors:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise UserError(f"nothing of the {len(items)} images can be probed ({reasons}); take a datalist with labels")
    return factors, left_out


def _labels(item: Item) -> set[str] | None:
    """Names, or None where they are not known."""
    several, single = item.get("labels"), item.get("label")
    if several is None and single is None:
        return None
    return {str(name) for name in several or ()} | ({str(single)} if single is not None else set())


def _age(item: Item) -> float:
    try:
        return np.nan if item.get("age") is None else float(item["age"])
    except (TypeError, ValueError):
        raise UserError(
            f"age must be a number of years, got {item['age']!r:.40} for {item['image']}; mend the datalist"
        ) from None


def _sexes(items: Sequence[Item]) -> tuple[Array, tuple[str, str], str]:
    """(N,) 0 and 1, what they are called, and why they cannot be told: female and male, or else any two words."""
    words = ["" if item.get("sex") is None else str(item["sex"]).strip().upper() for item in items]
    found, codes, classes, reason = sorted(set(words) - {""}), SEX_WORDS, SEXES, ""
    if found and not set(found) & set(SEX_WORDS):
        if len(found) == 2:
            classes = found[0], found[1]
            codes = {classes[0]: 0.0, classes[1]: 1.0}
        else:
            reason = f"sex must be F or M, or one of two values, got {', '.join(found[:5])}"
    return np.array([codes.get(word, np.nan) for word in words]), classes, reason


def _unfit(values: Array, patients: NDArray[np.str_], min_patients: int) -> str:
    """Why a binary factor cannot be probed; "" if it can."""
    having, lacking = (len(np.unique(patients[values == value])) for value in (1, 0))
    if having and lacking and min(having, lacking) >= min_patients:
        return ""
    if not having and not lacking:
        return "it is known of no image"
    if not having or not lacking:
        return f"one class only, {having} patients with it and {lacking} without it"
    return f"{having} patients with it and {lacking} without it, {min_patients} of each are needed"


def _unknown_label(name: str, found: list[str], n: int) -> str:
    if not found:
        return f"label {name} occurs nowhere: none of the {n} images has a label; take a datalist with labels"
    close = difflib.get_close_matches(name, found, n=3, cutoff=0.4) or found
    return f"label {name} occurs in none of the {n} images; did you mean {', '.join(close)}? Set --labels"


def patient_folds(
    values: Array, codes: NDArray[np.intp], folds: int, seed: int
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """(training, test) images of each fold; no patient is in both, and a label is as frequent in each as can be.

    Args:
        values: (N,); 0 and 1 alone make it a label.
        codes: (N,) number of each image's patient.
        folds: how many.
        seed: of the order of the patients.

    Raises:
        UserError: fewer patients than folds.
    """
    patients = len(np.unique(codes))
    if patients < folds:
        raise UserError(
            f"folds must be at most the number of patients, {patients}, got {folds}; set --folds {patients}"
        )
    kind = StratifiedGroupKFold if set(np.unique(values)) <= {0.0, 1.0} else GroupKFold
    # what it warns of is a class of fewer images than folds, which the inner folds of a rare label may have
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield from kind(folds, shuffle=True, random_state=seed).split(values, values, codes)


def shuffle_patients(codes: NDArray[np.intp], rng: np.random.Generator) -> NDArray[np.intp]:
    """(N,) of each image the image whose values it gets when patients are shuffled.

    Each patient gets the values of one other patient's images, drawn as often as he has images. A patient's values
    thus come from one patient, however unequal their numbers of images: what a patient keeps, a patient keeps under
    the shuffle, without which the null would be too narrow.

    Args:
        codes: (N,) number of each image's patient.
        rng: draws the order.
    """
    rows = np.argsort(codes, kind="stable")
    of_patients = np.split(rows, np.flatnonzero(np.diff(codes[rows])) + 1)
    donors = np.empty_like(rows)
    for images, donor in zip(of_patients, rng.permutation(len(of_patients)), strict=True):
        # repeated, or cut, to the number of images of the one who receives
        donors[images] = np.resize(rng.permutation(of_patients[donor]), len(images))
    return donors


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values of several tests, such that one below 5 % is found by chance in 5 % of the runs (Holm 1979)."""
    p, rank = np.asarray(p_values, dtype=np.float64), np.arange(len(p_values))
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate((len(p) - rank) * p[order]), 1)
    return adjusted.tolist()


def fits_of_probe(folds: int, shuffles: int) -> int:
    """How many models :func:`fit_probe` fits."""
    return folds * (len(STRENGTHS) * INNER_FOLDS + 1 + shuffles) + len(STRENGTHS) * INNER_FOLDS + 1


def fit_probe(
    latents: Array,
    factor: Factor,
    patients: Sequence[str],
    *,
    folds: int = 5,
    shuffles: int = 200,
    resamples: int = CHEAP_RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> Probe:
    """A linear probe of one factor: logistic regression for labels and sex, ridge regression for age.

    Latents are standardised within each fold, and those of more than :data:`COMPONENTS` numbers projected to as many
    principal components. The strength of the regularisation is chosen within each fold, too, by :data:`INNER_FOLDS`
    folds of its own training patients, so that no figure has seen the patients it is measured on. Both classes weigh
    alike: the score of a rare label then has the same meaning in every fold.

    Intervals tell how much the figures vary with the patients who are scored, not how much with those who are fitted.
    Chance is measured rather than supposed: the probes are fitted again, in the same folds and with the strengths
    chosen before, to the values of shuffled patients (:func:`shuffle_patients`). That is most of the work, for each
    shuffle ``folds`` fits (:func:`fits_of_probe` counts them): with many thousands of images take fewer shuffles.

    Args:
        latents: (N, D), taken as float32.
        factor: with N values.
        patients: (N,) patient of each image.
        folds: of the cross-validation.
        shuffles: for the null; 0 for none.
        resamples: for the intervals.
        level: of confidence, of the intervals and of the null.
        seed: of folds, draws and shuffles.

    Raises:
        UserError: fewer patients than folds.
    """
    check_level(level)
    known = np.isfinite(factor.values)
    rows, y = np.flatnonzero(known), factor.values[known]
    x = np.asarray(latents, dtype=np.float32)
    of_images = [patients[row] for row in rows]
    codes = patient_codes(of_images, len(y))
    splits = list(patient_folds(y, codes, folds, seed))
    rng = np.random.default_rng([seed, 1])  # apart from the draws of the intervals
    shuffled = [y[shuffle_patients(codes, rng)] for _ in range(shuffles)]
    scores, places, by_chance = np.empty(len(y)), np.empty(len(y), dtype=np.intp), np.empty((shuffles, len(y)))
    for place, (train, test) in enumerate(splits):
        scaler, inside = _prepare(x[rows[train]], seed)
        outside = scaler.transform(x[rows[test]])
        strength = _choose_strength(inside, y[train], codes[train], factor.is_binary, seed)
        for values, found in zip([y, *shuffled], [scores, *by_chance], strict=True):
            coefficients, bias = _fit(inside, values[train], strength, factor.is_binary)
            found[test] = outside @ coefficients + bias
        places[test] = place
    centres = np.empty(len(y))
    for train, test in splits:
        centres[test] = y[train].mean()
    options = {"resamples": resamples, "level": level, "seed": seed}
    if factor.is_binary:
        figures = {
            "auroc": auroc_bootstrap(scores, y, of_images, **options),
            "average_precision": average_precision_bootstrap(scores, y, of_images, **options),
        }
        chance = {"auroc": 0.5, "average_precision": float(y.mean())}
    else:
        figures = {
            "r2": _r2_bootstrap(scores, y, codes, **options),
            "mae": bootstrap_mean(np.abs(scores - y), of_images, **options),
        }
        chance = {"r2": 0.0, "mae": float(np.abs(centres - y).mean())}
    measured = figures["auroc" if factor.is_binary else "r2"].value
    null = np.array([_score(*pair, factor.is_binary) for pair in zip(by_chance, shuffled, strict=True)])
    ends = None
    if shuffles:
        low, high = (float(np.quantile(null, q)) for q in ((1 - level) / 2, (1 + level) / 2))
        ends = float(null.mean()), low, high
    scaler, inside = _prepare(x[rows], seed)
    strength = _choose_strength(inside, y, codes, factor.is_binary, seed)
    coefficients, bias = _fit(inside, y, strength, factor.is_binary)
    weight = coefficients if len(scaler) == 1 else coefficients @ scaler[-1].components_
    weight = weight.astype(np.float64) / scaler[0].scale_
    bias += float((scaler.transform(np.zeros((1, x.shape[1]), np.float32)) @ coefficients)[0])
    all_scores, all_folds = np.full(len(known), np.nan), np.full(len(known), -1)
    all_scores[known], all_folds[known] = scores, places
    return Probe(
        factor,
        weight,
        bias,
        all_scores,
        all_folds,
        figures,
        chance,
        ends,
        float((1 + (null >= measured).sum()) / (1 + shuffles)) if shuffles else None,
        int(y.sum()) if factor.is_binary else 0,
        int(codes.max()) + 1,
        strength,
    )


def _prepare(x: NDArray[np.float32], seed: int) -> tuple[Pipeline, NDArray[np.float32]]:
    """What standardises latents, and those (N, D) it was fitted to, which are overwritten: they may fill the memory."""
    steps: list[Any] = [StandardScaler(copy=False)]
    if x.shape[1] > COMPONENTS:
        steps.append(PCA(min(COMPONENTS, len(x) - 1), copy=False, svd_solver="randomized", random_state=seed))
    scaler = make_pipeline(*steps)
    return scaler, scaler.fit_transform(x)


def _fit(x: Array, y: Array, strength: float, is_binary: bool) -> tuple[Array, float]:
    """Coefficients (D,) and intercept for standardised latents; 0 where a shuffle left one class to learn from."""
    if is_binary and len(np.unique(y)) < 2:
        return np.zeros(x.shape[1]), 0.0
    if is_binary:
        model = LogisticRegression(C=strength, class_weight="balanced", max_iter=1000)
    else:
        model = Ridge(alpha=1 / strength)
    with warnings.catch_warnings():
        # the weakest regularisation of separable classes has its optimum far away; it is one of six to choose from
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x, y)
    return model.coef_.reshape(-1), float(np.ravel(model.intercept_)[0])


def _choose_strength(x: Array, y: Array, codes: NDArray[np.intp], is_binary: bool, seed: int) -> float:
    """The strength whose scores of left-out patients have the highest likelihood, or R2; of equal ones the strongest.

    Not the highest AUROC, which does not see how far scores are apart: of a rare label it would now and then take the
    weakest regularisation, whose log-odds are absurd.
    """
    found = np.empty((len(STRENGTHS), len(y)))
    for train, test in patient_folds(y, codes, min(INNER_FOLDS, len(np.unique(codes))), seed):
        for row, strength in zip(found, STRENGTHS, strict=True):
            coefficients, bias = _fit(x[train], y[train], strength, is_binary)
            row[test] = x[test] @ coefficients + bias
    fits = [_log_likelihood(row, y) if is_binary else _score(row, y, False) for row in found]
    return STRENGTHS[int(np.argmax(fits))]


def _log_likelihood(scores: Array, y: Array) -> float:
    """Of log-odds, both classes weighing alike."""
    fits = -np.logaddexp(0, np.where(y > 0.5, -scores, scores))
    return float(fits[y > 0.5].mean() + fits[y < 0.5].mean())


def _score(scores: Array, y: Array, is_binary: bool) -> float:
    if is_binary:
        return auroc(scores, y)
    return float(1 - ((y - scores) ** 2).sum() / ((y - y.mean()) ** 2).sum())


def _r2_bootstrap(
    scores: Array, y: Array, codes: NDArray[np.intp], resamples: int, level: float, seed: int
) -> Estimate:
    """Share of the variance explained, with its interval by drawing patients with replacement."""
    counts = draw_counts(np.random.default_rng(seed), codes, resamples)
    total = counts.sum(1)
    spread = counts @ y**2 - (counts @ y) ** 2 / total
    with np.errstate(divide="ignore", invalid="ignore"):
        values = 1 - counts @ (y - scores) ** 2 / spread
    low, high, note = recentred_interval(_score(scores, y, False), values, level)
    note = with_few_patients(note, int(codes.max()) + 1)
    return Estimate(_score(scores, y, False), low, min(high, 1.0), len(y), len(y), level, note)
