"""Fréchet radiomic distance: radiomic features made comparable, the Fréchet distance of the two sets, its logarithm.

Osuala et al. 2024 (version 0) and Konz, Osuala et al. 2026, Medical Image Analysis 103943 (version 1), as their package
frd-score computes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from medgen.errors import UserError

__all__ = [
    "FRD_VERSIONS",
    "FRDVersion",
    "FeatureDifference",
    "NormalisedFeatures",
    "feature_table",
    "frd_score",
    "normalise_features",
]

V0_RANGE = 7.45670747756958  # what the largest value of a feature becomes in version 0, from frd-score


@dataclass(frozen=True)
class FRDVersion:
    """How features are made comparable, and what is done to the distance.

    Attributes:
        name: of the row, which is that of a protocol of features.
        normalisation: ``z-score`` by the mean and the standard deviation (n) of the reference, in single precision;
            or ``min-max``, by the smallest and the largest value in both sets, to 0..:data:`V0_RANGE`.
        log: whether the result is the natural logarithm of the squared distance.
    """

    name: str
    normalisation: str
    log: bool


# fmt: off
FRD_VERSIONS: dict[str, FRDVersion] = {
    row[0]: FRDVersion(*row)
    for row in [
        ("frd_v1",    "z-score", True),
        ("frd_v0",    "min-max", False),
        ("radiomics", "z-score", True),  # version 1 on more features
    ]
}
# fmt: on


@dataclass(frozen=True)
class NormalisedFeatures:
    """Two sets of features, ready for :func:`medgen.metrics.frechet.frechet_distance`.

    Attributes:
        reference: (N, D') float64.
        samples: (M, D') float64.
        names: of the D' features that are left.
        dropped: names of those that are not, because they do not vary in the reference.
    """

    reference: np.ndarray
    samples: np.ndarray
    names: tuple[str, ...]
    dropped: tuple[str, ...]


def normalise_features(
    reference: ArrayLike, samples: ArrayLike, names: Sequence[str], version: FRDVersion | str
) -> NormalisedFeatures:
    """Bring features of all magnitudes to one scale.

    By z-score, a feature that is constant in the reference has no scale and is left out. By min-max, one that is
    constant in both sets becomes the middle of the range, and none is left out.

    The z-score is computed in single precision, as frd-score does: a feature whose spread is less than a millionth of
    its size is then rounding, here as there.

    Args:
        reference: (N, D) features of real images.
        samples: (M, D) features of the images that are judged.
        names: D names.
        version: row of :data:`FRD_VERSIONS`, or its name.

    Raises:
        UserError: no such version; shapes that do not fit; values that are not finite; a z-score of which no feature is
            left.
    """
    version = _version(version)
    x, y = _tables(reference, samples, names)
    if version.normalisation == "min-max":
        low, high = (end(np.stack([end(x, axis=0), end(y, axis=0)]), axis=0) for end in (np.min, np.max))
        width = high - low
        constant = width == 0
        width[constant] = 1
        x, y = ((table - low) / width * V0_RANGE for table in (x, y))
        x[:, constant] = y[:, constant] = V0_RANGE / 2
        return NormalisedFeatures(x, y, tuple(names), ())

    with np.errstate(over="ignore"):
        x, y = x.astype(np.float32), y.astype(np.float32)
    kept = (x != x[:1]).any(axis=0) & np.isfinite(x).all(axis=0) & np.isfinite(y).all(axis=0)
    x, y = np.ascontiguousarray(x[:, kept]), np.ascontiguousarray(y[:, kept])
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    with np.errstate(all="ignore"):
        x, y = (x - mean) / deviation, (y - mean) / deviation
    # a spread below single precision, or a sample beyond its range
    finite = np.isfinite(x).all(axis=0) & np.isfinite(y).all(axis=0)
    kept[kept] = finite
    if not kept.any():
        raise UserError(
            f"some feature must vary among the reference's images, got {len(x)} images that are all alike to all "
            f"{len(kept)} features; give more or other images"
        )
    return NormalisedFeatures(
        x[:, finite].astype(np.float64),
        y[:, finite].astype(np.float64),
        tuple(name for name, keep in zip(names, kept, strict=True) if keep),
        tuple(name for name, keep in zip(names, kept, strict=True) if not keep),
    )


def frd_score(
    reference: ArrayLike, samples: ArrayLike, version: FRDVersion | str = "frd_v1", names: Sequence[str] | None = None
) -> float:
    """Fréchet radiomic distance of two sets of radiomic features; lower is better.

    Version 1 is not symmetric, for the reference alone sets the scale, and has no best value: identical sets have minus
    infinity. (The paper's equation 3 is half of it, the logarithm of the distance itself; frd-score computes this one.)

    Args:
        reference: (N, D) features of real images.
        samples: (M, D) features of the images that are judged.
        version: row of :data:`FRD_VERSIONS`, or its name.
        names: D names, for messages.

    Returns:
        log d² by version 1, d² by version 0.

    Raises:
        UserError: as :func:`normalise_features` and :func:`medgen.metrics.frechet.frechet_distance`.
    """
    # here: it needs scipy.linalg, which the processes that compute features do not
    from medgen.metrics.frechet import frechet_distance

    version = _version(version)
    names = range(np.asarray(reference).shape[-1]) if names is None else names
    normal = normalise_features(reference, samples, [str(name) for name in names], version)
    distance = frechet_distance(normal.reference, normal.samples)
    if not version.log:
        return distance
    return math.log(distance) if distance > 0 else -math.inf


@dataclass(frozen=True)
class FeatureDifference:
    """One feature in two sets.

    Attributes:
        name: of the feature.
        reference_mean: over the reference's images.
        reference_std: the standard deviation (n).
        samples_mean: over the samples.
        samples_std: the standard deviation (n).
        difference: samples' mean minus the reference's, in standard deviations of the reference; of both sets taken
            together where the reference has none.
    """

    name: str
    reference_mean: float
    reference_std: float
    samples_mean: float
    samples_std: float
    difference: float


def feature_table(reference: ArrayLike, samples: ArrayLike, names: Sequence[str]) -> list[FeatureDifference]:
    """Which features differ, the one that differs most first.

    Args:
        reference: (N, D) features of real images.
        samples: (M, D) features of the images that are judged.
        names: D names.

    Raises:
        UserError: shapes that do not fit; values that are not finite.
    """
    x, y = _tables(reference, samples, names)
    (x_mean, x_std), (y_mean, y_std) = _moments(x), _moments(y)
    _, joint = _moments(np.concatenate([x, y]))
    scale = np.where(x_std > 0, x_std, np.where(joint > 0, joint, 1.0))
    difference = (y_mean - x_mean) / scale
    columns = (x_mean, x_std, y_mean, y_std, difference)
    order = np.argsort(-np.abs(difference), kind="stable")
    return [FeatureDifference(names[i], *(float(column[i]) for column in columns)) for i in order]


def _moments(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column; exactly 0 for one that is constant."""
    mean, deviation = table.mean(axis=0), table.std(axis=0)
    constant = (table == table[:1]).all(axis=0)
    return np.where(constant, table[0], mean), np.where(constant, 0.0, deviation)


def _version(version: FRDVersion | str) -> FRDVersion:
    if isinstance(version, FRDVersion):
        return version
    if version not in FRD_VERSIONS:
        raise UserError(f"version must be one of {', '.join(FRD_VERSIONS)}, got {version!r}")
    return FRD_VERSIONS[version]


def _tables(reference: ArrayLike, samples: ArrayLike, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    x, y = (np.asarray(table, dtype=np.float64) for table in (reference, samples))
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not len(x) or not len(y):
        raise UserError(f"features must be (images, features) of one width, got {x.shape} and {y.shape}")
    if len(names) != x.shape[1]:
        raise UserError(f"names must be {x.shape[1]}, one per feature, got {len(names)}")
    for what, table in (("reference", x), ("samples", y)):
        bad = ~np.isfinite(table)
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise UserError(
                f"features must be finite, got {table[row, column]} for {names[column]} of image {row} of the {what}; "
                f"{np.count_nonzero(bad.any(axis=1))} images have such a value, leave them out"
            )
    return x, y
