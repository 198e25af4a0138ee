"""Precision and recall, density and coverage of generated images in a feature space."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medgen.errors import UserError
from medgen.metrics.kernel import _check_pair, patient_codes

__all__ = ["PRDC_NAMES", "prdc_per_image", "precision_recall_density_coverage"]

PRDC_NAMES = ("precision", "recall", "density", "coverage")
BLOCK_VALUES = 2**22  # distances held at a time, 32 MB
SLACK = 1e-9  # relative to a squared radius: a point on the sphere is inside, whichever way its distance was rounded
CLOSE = 1e-8  # relative to the squared norms: nearer pairs are computed again, see _squared_distances


def precision_recall_density_coverage(
    real: ArrayLike,
    fake: ArrayLike,
    nearest_k: int = 5,
    *,
    real_patients: Sequence[str] | None = None,
    fake_patients: Sequence[str] | None = None,
) -> dict[str, float]:
    """How many fakes lie among the reals, and how many reals among the fakes.

    With the closed ball around each image that reaches to its ``nearest_k``-th neighbour in its own set:

    - precision: share of fakes inside any real's ball (Kynkäänniemi et al. 2019, who take k = 3)
    - recall: share of reals inside any fake's ball
    - density: balls of reals around a fake, on average, over k; may exceed 1 (Naeem et al. 2020, who take k = 5)
    - coverage: share of reals with any fake in their ball

    Neighbours are images of other patients: those of the same patient resemble the image more than a good fake ever
    could, and would leave a ball too small to hold one.

    All four depend on n and k: compare only equal ones. The first argument is the real set: torch-fidelity before 0.4
    has precision and recall the other way round, and its figures do not compare.

    Args:
        real: (N, D) features.
        fake: (M, D) features.
        nearest_k: neighbours that set the radius, the image itself not counted.
        real_patients: (N,) patient of each real image; each image its own by default.
        fake_patients: (M,), the same for the fakes.

    Raises:
        UserError: fewer than ``nearest_k`` images beside those of some patient, different widths, values that are not
            finite.
    """
    values = prdc_per_image(real, fake, nearest_k, real_patients=real_patients, fake_patients=fake_patients)
    return {name: float(value.mean()) for name, value in values.items()}


def prdc_per_image(
    real: ArrayLike,
    fake: ArrayLike,
    nearest_k: int = 5,
    *,
    real_patients: Sequence[str] | None = None,
    fake_patients: Sequence[str] | None = None,
) -> dict[str, NDArray[np.float64]]:
    """What :func:`precision_recall_density_coverage` averages: one value per image.

    The values of recall and coverage belong to the reals (N,), those of precision and density to the fakes (M,).
    An interval comes from resampling these values with the balls as they are: a resample of the features holds images
    twice, whose nearest neighbour is their copy, and its balls are too small.
    """
    real, fake = _check_pair(real, fake)
    if nearest_k < 1 or nearest_k >= min(len(real), len(fake)):
        raise UserError(
            f"nearest_k must be at least 1 and less than the {min(len(real), len(fake))} images of the smaller set, "
            f"got {nearest_k}; lower it or give more images"
        )
    real_codes = _codes(real_patients, len(real), nearest_k, "real")
    fake_codes = _codes(fake_patients, len(fake), nearest_k, "fake")
    # distances do not change, and lose fewer digits
    centre = real.mean(axis=0, dtype=np.float64)
    real, fake = (np.asarray(table, dtype=np.float64) - centre for table in (real, fake))
    real_radii = _squared_radii(real, real_codes, nearest_k) * (1 + SLACK)
    fake_radii = _squared_radii(fake, fake_codes, nearest_k) * (1 + SLACK)
    inside_reals = np.empty(len(fake))
    inside_fakes, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
    step = max(1, BLOCK_VALUES // len(real))
    for start in range(0, len(fake), step):
        part = slice(start, start + step)
        distances = _squared_distances(fake[part], real)
        inside = distances <= real_radii
        inside_reals[part] = inside.sum(axis=1)
        covered |= inside.any(axis=0)
        inside_fakes |= (distances <= fake_radii[part, None]).any(axis=0)
    values = (inside_reals > 0, inside_fakes, inside_reals / nearest_k, covered)
    return {name: value.astype(np.float64) for name, value in zip(PRDC_NAMES, values, strict=True)}


def _codes(patients: Sequence[str] | None, n: int, nearest_k: int, name: str) -> NDArray[np.intp]:
    codes = patient_codes(patients, n)
    largest = int(np.bincount(codes).max())
    if n - largest < nearest_k:
        raise UserError(
            f"each {name} image needs {nearest_k} neighbours of other patients, got a patient with {largest} of the "
            f"{n} {name} images; lower nearest_k or give images of more patients"
        )
    return codes


def _squared_radii(x: NDArray[np.float64], codes: NDArray[np.intp], nearest_k: int) -> NDArray[np.float64]:
    radii = np.empty(len(x))
    step = max(1, BLOCK_VALUES // len(x))
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        distances = _squared_distances(x[part], x)
        distances[codes[part, None] == codes] = np.inf  # the image itself, too
        radii[part] = np.partition(distances, nearest_k - 1, axis=1)[:, nearest_k - 1]
    return radii


def _squared_distances(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, M) squared distances by a matrix product; near-copies, where that cancels, by the difference itself."""
    norms = np.einsum("ij,ij->i", a, a)[:, None] + np.einsum("ij,ij->i", b, b)
    distances = norms - 2 * (a @ b.T)
    rows, columns = np.nonzero(distances <= CLOSE * norms)
    step = max(1, BLOCK_VALUES // a.shape[1])
    for start in range(0, len(rows), step):
        i, j = rows[start : start + step], columns[start : start + step]
        difference = a[i] - b[j]
        distances[i, j] = np.einsum("ij,ij->i", difference, difference)
    return distances
