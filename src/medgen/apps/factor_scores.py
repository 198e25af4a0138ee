"""Whether single coordinates of a latent space stand for single factors: DCI and SAP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import entropy
from sklearn.ensemble import RandomForestRegressor

from medgen.apps.probes import Factor, patient_folds, shuffle_patients
from medgen.errors import UserError
from medgen.metrics.intervals import patient_codes

__all__ = ["FactorScores", "completeness", "disentanglement", "factor_scores", "importances", "sap", "sap_matrix"]

FOREST_FOLDS, TREES, SMALLEST_LEAF, TREE_SAMPLES = 3, 50, 5, 2000
SAP_NUMBERS = 2**24  # of the latents that are sorted at once

Array = NDArray[np.float64]


@dataclass(frozen=True)
class FactorScores:
    """Result of :func:`factor_scores`.

    Args:
        scores: ``dci_disentanglement``, ``dci_completeness``, ``dci_informativeness`` and ``sap``.
        shuffled: the same of shuffled patients' factors: what chance gives, as mean and lower and upper end of the
            interval.
        names: of the factors.
        importances: (D, K) of the coordinates for the factors.
        n: images.
    """

    scores: dict[str, float]
    shuffled: dict[str, tuple[float, float, float]]
    names: tuple[str, ...]
    importances: Array
    n: int


def disentanglement(importance: Array) -> float:
    """Whether each coordinate matters for one factor alone (Eastwood and Williams 2018, section 2).

    ``D_i = 1 - H_K(P_i)`` of the shares ``P_ij = R_ij / Σ_k R_ik``, averaged with weights ``Σ_j R_ij / Σ_ij R_ij``.

    Args:
        importance: R, (D, K), at least 0.

    Returns:
        In [0, 1], 1 at best; 0 where nothing matters for anything.
    """
    total = importance.sum()
    if total == 0 or importance.shape[1] < 2:
        return 0.0
    rows = importance[importance.sum(1) > 0]
    return float(rows.sum(1) / total @ (1 - entropy(rows, base=rows.shape[1], axis=1)))


def completeness(importance: Array) -> float:
    """Whether each factor depends on one coordinate alone (Eastwood and Williams 2018, section 2).

    ``C_j = 1 - H_D(P_j)`` of the shares ``P_ij = R_ij / Σ_k R_kj``, averaged with weights ``Σ_i R_ij / Σ_ij R_ij``.

    Args:
        importance: R, (D, K), at least 0.

    Returns:
        In [0, 1], 1 at best; 0 where nothing matters for anything.
    """
    if importance.shape[0] < 2:
        return 0.0
    total = importance.sum()
    if total == 0:
        return 0.0
    columns = importance[:, importance.sum(0) > 0]
    return float(columns.sum(0) / total @ (1 - entropy(columns, base=len(columns), axis=0)))


def importances(latents: Array, values: Array, codes: NDArray[np.intp], seed: int = 0) -> tuple[Array, float]:
    """What each coordinate is worth to random forests that predict a factor, and how much they explain.

    The forest is one of the two regressors of Eastwood and Williams 2018; with the other, the lasso, a factor that
    cannot be predicted depends on a few coordinates by chance, and looks all the more disentangled. Importance is the
    decrease in variance by the splits at a coordinate, mean over the forests of the folds.

    Args:
        latents: (N, D).
        values: (N,).
        codes: (N,) number of each image's patient.
        seed: of folds and forests.

    Returns:
        (D,), summing to 1, and R2 of left-out patients, at least 0: the informativeness.
    """
    found, predicted = np.zeros(latents.shape[1]), np.empty(len(values))
    for train, test in patient_folds(values, codes, FOREST_FOLDS, seed):
        forest = RandomForestRegressor(
            TREES,
            min_samples_leaf=SMALLEST_LEAF,
            max_samples=min(len(train), TREE_SAMPLES),  # the time of a large set is that of a small one
            random_state=seed,
        ).fit(latents[train], values[train])
        found += forest.feature_importances_ / FOREST_FOLDS
        predicted[test] = forest.predict(latents[test])
    return found, float(max(1 - np.square(values - predicted).mean() / values.var(), 0.0))


def sap_matrix(latents: Array, factors: Sequence[Factor]) -> Array:
    """How well each coordinate alone predicts each factor (Kumar et al. 2018, section 3).

    Of age the square of the correlation; of a label the balanced accuracy of the best threshold.

    Args:
        latents: (N, D).
        factors: K, known for all N images.

    Returns:
        (D, K); a coordinate without variance has 0.
    """
    block = max(1, SAP_NUMBERS // len(latents))
    starts = range(0, latents.shape[1], block)
    return np.concatenate([_sap_block(latents[:, start : start + block], factors) for start in starts])


def _sap_block(latents: Array, factors: Sequence[Factor]) -> Array:
    moving = latents.std(0) > 0
    columns = np.zeros((latents.shape[1], len(factors)))
    x = latents[:, moving].astype(np.float64)
    x -= x.mean(0)
    for number, factor in enumerate(factors):
        if factor.is_binary:
            predicted = _threshold_accuracy(x, factor.values > 0.5)
        else:
            y = factor.values - factor.values.mean()
            predicted = (y @ x) ** 2 / ((x**2).sum(0) * (y**2).sum())
        columns[moving, number] = predicted
    return columns


def _threshold_accuracy(x: Array, is_positive: NDArray[np.bool_]) -> Array:
    """(D,) the highest mean of sensitivity and specificity over thresholds and both directions, at least 0.5."""
    order = np.argsort(x, axis=0, kind="stable")
    ascending, labels = np.take_along_axis(x, order, 0), is_positive[order]
    # how far the classes' distribution functions are apart, at the last of equal values
    apart = np.abs(np.cumsum(labels, 0) / is_positive.sum() - np.cumsum(~labels, 0) / (~is_positive).sum())
    is_last = np.vstack([ascending[1:] > ascending[:-1], np.ones((1, x.shape[1]), dtype=bool)])
    return (1 + np.where(is_last, apart, 0).max(0)) / 2


def sap(matrix: Array) -> float:
    """Separated attribute predictability: the best coordinate of a factor before the next best, mean over factors.

    Kumar et al. 2018, "Variational inference of disentangled latent concepts from unlabeled observations", section 3.

    Args:
        matrix: (D, K), D at least 2, of :func:`sap_matrix`.
    """
    top = np.sort(matrix, axis=0)[-2:]
    return float((top[1] - top[0]).mean())


def factor_scores(
    latents: Array,
    factors: Sequence[Factor],
    patients: Sequence[str],
    *,
    shuffles: int = 5,
    level: float = 0.95,
    seed: int = 0,
) -> FactorScores:
    """DCI and SAP over the images of which all factors are known, and both for shuffled patients.

    They judge coordinates. No coordinate of a space that looks the same in every direction, as PGGAN's z does, has a
    reason to stand for a factor: scores stay low there, however well a probe reads the factor. The shuffled patients'
    scores, and not 0, are what a space that knows nothing reaches.

    Args:
        latents: (N, D).
        factors: at least two, with N values each.
        patients: (N,) patient of each image.
        shuffles: for chance; each takes as long as the scores themselves. 0 for none.
        level: of confidence, of what chance gives.
        seed: of folds and shuffles.

    Raises:
        UserError: fewer than two factors, or fewer than ten patients of whom all are known.
    """
    if len(factors) < 2:
        raise UserError(f"factor scores take at least 2 factors, got {len(factors)}; take data with more labels")
    known = np.isfinite([factor.values for factor in factors]).all(0)
    rows = np.flatnonzero(known)
    complete = [Factor(factor.name, factor.kind, factor.values[rows]) for factor in factors]
    varying = [factor for factor in complete if len(np.unique(factor.values)) > 1]
    of_images = [patients[row] for row in rows]
    if len(set(of_images)) < 10 or len(varying) < 2:
        raise UserError(
            f"factor scores take 10 patients of whom all {len(factors)} factors are known, and two factors that "
            f"differ among them, got {len(set(of_images))} and {len(varying)}; take data with more labels"
        )
    x, codes = np.asarray(latents)[rows], patient_codes(of_images, len(rows))
    scores, importance = _scores(x, varying, codes, seed)
    rng = np.random.default_rng([seed, 2])
    by_chance = []
    for _ in range(shuffles):
        donors = shuffle_patients(codes, rng)
        shuffled = [Factor(factor.name, factor.kind, factor.values[donors]) for factor in varying]
        by_chance.append(_scores(x, shuffled, codes, seed)[0])
    chance = {}
    for name in scores if by_chance else ():
        values = [found[name] for found in by_chance]
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2]).tolist()
        chance[name] = float(np.mean(values)), low, high
    return FactorScores(scores, chance, tuple(factor.name for factor in varying), importance, len(rows))


def _scores(x: Array, factors: Sequence[Factor], codes: NDArray[np.intp], seed: int) -> tuple[dict[str, float], Array]:
    found = [importances(x, factor.values, codes, seed) for factor in factors]
    importance = np.stack([column for column, _ in found], 1)
    scores = {
        "dci_disentanglement": disentanglement(importance),
        "dci_completeness": completeness(importance),
        "dci_informativeness": float(np.mean([explained for _, explained in found])),
        "sap": sap(sap_matrix(x, factors)),
    }
    return scores, importance
