"""The kernel distance (KID): unbiased polynomial MMD^2 between two sets of feature vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medgen.errors import UserError
from medgen.metrics.frechet import _as_table, _check_finite, _check_two

__all__ = ["kernel_distance", "kernel_distance_resampled", "kernel_distance_subsets", "patient_codes"]

BLOCK = 1024  # rows: a block of the kernel matrix takes 8 MB, and the whole is never held


def kernel_distance(
    x: ArrayLike,
    y: ArrayLike,
    *,
    x_patients: Sequence[str] | None = None,
    y_patients: Sequence[str] | None = None,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (gamma a.b + coef0)^degree, on all images.

    Binkowski et al. 2018 (KID), equation 4; their estimate is the mean over random subsets
    (:func:`kernel_distance_subsets`), which has the same expectation and more noise. Unlike the Fréchet distance it has
    no bias from small n; slightly negative values are what two equal sets give half of the time.

    The estimate is unbiased because it leaves out each image paired with itself. Images of one patient resemble each
    other in the same way, and pairs of them would raise the distance of two equal sets above 0: where patients are
    known, the mean within a set is taken over the pairs of different patients only.

    The kernel is not invariant to the features' units: standardise features of different units (radiomics) first, with
    one mean and standard deviation for both sets.

    Args:
        x: (N, D) features.
        y: (M, D) features; N and M may differ.
        x_patients: (N,) patient of each image; each image its own by default.
        y_patients: (M,), the same for ``y``.
        degree: of the polynomial.
        gamma: 1 / D by default.
        coef0: constant of the polynomial.

    Raises:
        UserError: different widths, fewer than two images or patients in a set, values that are not finite.
    """
    x, y = _check_pair(x, y)
    ones = (np.ones((1, len(x))), np.ones((1, len(y))))
    codes = (patient_codes(x_patients, len(x)), patient_codes(y_patients, len(y)))
    return float(kernel_distance_resampled(x, y, *ones, *codes, degree=degree, gamma=gamma, coef0=coef0)[0])


def kernel_distance_subsets(
    x: ArrayLike,
    y: ArrayLike,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
) -> tuple[float, float]:
    """Mean and standard deviation of the kernel distance over random subsets, as Binkowski et al. 2018 report it.

    The standard deviation is that of a subset of this size. It is no standard error of the mean: subsets overlap.
    Images count as independent, as theirs are; several of one patient need :func:`kernel_distance`.
    For an interval see :func:`medgen.metrics.intervals.bootstrap_interval`.

    Args:
        x: (N, D) features.
        y: (M, D) features.
        subsets: how many.
        subset_size: images of each set in each, drawn without replacement.
        seed: of the draws.
        degree: of the polynomial.
        gamma: 1 / D by default.
        coef0: constant of the polynomial.

    Raises:
        UserError: a subset is larger than a set, or what :func:`kernel_distance` refuses.
    """
    x, y = _check_pair(x, y)
    if subsets < 1 or not 2 <= subset_size <= min(len(x), len(y)):
        raise UserError(
            f"subset_size must be from 2 to the {min(len(x), len(y))} images of the smaller set and subsets at least "
            f"1, got {subset_size} and {subsets}; lower subset_size"
        )
    rng = np.random.default_rng(seed)
    values = [
        kernel_distance(
            x[np.sort(rng.choice(len(x), subset_size, replace=False))],
            y[np.sort(rng.choice(len(y), subset_size, replace=False))],
            degree=degree,
            gamma=gamma,
            coef0=coef0,
        )
        for _ in range(subsets)
    ]
    return float(np.mean(values)), float(np.std(values))


def kernel_distance_resampled(
    x: ArrayLike,
    y: ArrayLike,
    x_counts: NDArray[np.float64],
    y_counts: NDArray[np.float64],
    x_patients: NDArray[np.intp] | None = None,
    y_patients: NDArray[np.intp] | None = None,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
) -> NDArray[np.float64]:
    """The kernel distance of R bootstrap resamples, in one pass over the blocks of the kernel matrices.

    A resample holds some patients twice or more. The unbiased estimate leaves out the pairs of one patient; taken over
    the rows of a resample, it would bring them back as pairs of the patient with its copy, the largest values of the
    kernel, and every resample would lie above the estimate. So pairs are left out by where they came from: a pair of
    images counts w_p w_q times when their patients p and q differ, and never when they are one.

    Args:
        x: (N, D) features.
        y: (M, D) features.
        x_counts: (R, N), how often each image counts in each resample.
        y_counts: (R, M), the same for ``y``.
        x_patients: (N,) patient of each image as a number from 0; each image its own by default.
        y_patients: (M,), the same for ``y``.
        degree: of the polynomial.
        gamma: 1 / D by default.
        coef0: constant of the polynomial.

    Returns:
        (R,) distances; NaN for a resample that holds no pair of different patients.
    """
    x, y = _check_pair(x, y)
    gamma = 1 / x.shape[1] if gamma is None else gamma

    def kernel(products: NDArray[np.float64]) -> NDArray[np.float64]:
        products *= gamma
        products += coef0
        return products**degree

    cross = np.zeros(len(x_counts))
    for rows, columns in _blocks(len(x), len(y)):
        cross += ((x_counts[:, rows] @ kernel(_rows(x, rows) @ _rows(y, columns).T)) * y_counts[:, columns]).sum(axis=1)
    cross /= x_counts.sum(axis=1) * y_counts.sum(axis=1)
    return _mean_of_pairs(x, x_counts, x_patients, kernel) + _mean_of_pairs(y, y_counts, y_patients, kernel) - 2 * cross


def _mean_of_pairs(
    x: NDArray, counts: NDArray, codes: NDArray | None, kernel: Callable[[NDArray], NDArray]
) -> NDArray[np.float64]:
    """(R,) means of k over the pairs of different patients, weighted as :func:`kernel_distance_resampled` says."""
    codes = np.arange(len(x)) if codes is None else codes
    total = np.zeros(len(counts))
    for rows, columns in _blocks(len(x), len(x)):
        if columns.start < rows.start:
            continue
        values = kernel(_rows(x, rows) @ _rows(x, columns).T)
        values[codes[rows, None] == codes[columns]] = 0
        part = ((counts[:, rows] @ values) * counts[:, columns]).sum(axis=1)
        total += part if columns.start == rows.start else 2 * part
    order = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.append(True, np.diff(codes[order])))
    by_patient = np.add.reduceat(counts[:, order], starts, axis=1)
    pairs = counts.sum(axis=1) ** 2 - (by_patient**2).sum(axis=1)
    return np.divide(total, pairs, out=np.full(len(counts), np.nan), where=pairs > 0)


def patient_codes(patients: Sequence[str] | None, n: int) -> NDArray[np.intp]:
    """(N,) number from 0 of each image's patient; of the image itself where patients are None.

    Identifiers are compared as text: 12 and "12" are one patient.

    Raises:
        UserError: another number of patients than images, or fewer than two patients.
    """
    if patients is None:
        codes = np.arange(n)
    elif len(patients) != n:
        raise UserError(f"patients must be given for each of the {n} images, got {len(patients)}")
    else:
        codes = np.unique([str(patient) for patient in patients], return_inverse=True)[1].reshape(-1)
    if not n or codes.max() < 1:
        raise UserError(
            f"expected images of at least 2 patients, got {min(n, 1)} patient ({n} images); "
            "give images of more patients"
        )
    return codes


def _blocks(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    for i in range(0, rows, BLOCK):
        for j in range(0, columns, BLOCK):
            yield slice(i, min(i + BLOCK, rows)), slice(j, min(j + BLOCK, columns))


def _rows(x: NDArray, rows: slice) -> NDArray[np.float64]:
    return np.asarray(x[rows], dtype=np.float64)


def _check_pair(x: ArrayLike, y: ArrayLike) -> tuple[NDArray, NDArray]:
    x, y = _as_table(x), _as_table(y)
    if x.shape[1] != y.shape[1]:
        raise UserError(
            f"both sets must have the same number of features, got {x.shape[1]} and {y.shape[1]}; "
            "use one extractor for both"
        )
    for table in (x, y):
        _check_two(len(table))
        for start in range(0, len(table), BLOCK):
            _check_finite(_rows(table, slice(start, start + BLOCK)), start)
    return x, y
