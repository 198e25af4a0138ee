"""Precision and recall, density and coverage of generated images in a feature space."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medgen.errors import UserError
from medgen.metrics.kernel import _check_pair

__all__ = ["PRDC_NAMES", "prdc_per_image", "precision_recall_density_coverage"]

PRDC_NAMES = ("precision", "recall", "density", "coverage")
BLOCK_VALUES = 2**22  # distances held at a time, 32 MB
SLACK = 1e-9  # relative to a squared radius: a point on the sphere is inside, whichever way its distance was rounded
CLOSE = 1e-8  # relative to the squared norms: nearer pairs are computed again, see _squared_distances


def precision_recall_density_coverage(real: ArrayLike, fake: ArrayLike, nearest_k: int = 5) -> dict[str, float]:
    """How many fakes lie among the reals, and how many reals among the fakes.

    With the closed ball around each image that reaches to its ``nearest_k``-th neighbour in its own set:

    - precision: share of fakes inside any real's ball (Kynkäänniemi et al. 2019, who take k = 3)
    - recall: share of reals inside any fake's ball
    - density: balls of reals around a fake, on average, over k; may exceed 1 (Naeem et al. 2020, who take k = 5)
    - coverage: share of reals with any fake in their ball

    All four depend on n and k: compare only equal ones. The first argument is the real set: torch-fidelity before 0.4
    has precision and recall the other way round, and its figures do not compare.

    Args:
        real: (N, D) features.
        fake: (M, D) features.
        nearest_k: neighbours that set the radius, the image itself not counted.

    Raises:
        UserError: ``nearest_k`` images or fewer in a set, different widths, values that are not finite.
    """
    return {name: float(values.mean()) for name, values in prdc_per_image(real, fake, nearest_k).items()}


def prdc_per_image(real: ArrayLike, fake: ArrayLike, nearest_k: int = 5) -> dict[str, NDArray[np.float64]]:
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
    # distances do not change, and lose fewer digits
    centre = real.mean(axis=0, dtype=np.float64)
    real, fake = (np.asarray(table, dtype=np.float64) - centre for table in (real, fake))
    real_radii = _squared_radii(real, nearest_k) * (1 + SLACK)
    fake_radii = _squared_radii(fake, nearest_k) * (1 + SLACK)
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


def _squared_radii(x: NDArray[np.float64], nearest_k: int) -> NDArray[np.float64]:
    radii = np.empty(len(x))
    step = max(1, BLOCK_VALUES // len(x))
    for start in range(0, len(x), step):
        distances = _squared_distances(x[start : start + step], x)
        # the image itself, at 0, comes first: number nearest_k is the neighbour that is meant
        radii[start : start + step] = np.partition(distances, nearest_k, axis=1)[:, nearest_k]
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
