"""The Fréchet distance between two sets of feature vectors, from the vectors or from their streamed moments."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import linalg

from medgen.errors import UserError
from medgen.output import atomic_file

__all__ = ["FeatureMoments", "frechet_distance", "small_sample_note", "trace_sqrt_product"]

CHUNK_ROWS = 1024  # rows that are turned to float64 at a time
EPS = float(np.finfo(np.float64).eps)
ACCURACY = 1e-9  # relative, of a trace from eigenvalues; what falls short is computed from singular values
RESOLVED = 1000 * EPS  # a smaller share of a variance may be rounding


class FeatureMoments:
    """Number, mean and covariance of feature vectors that come in batches; memory does not grow with their number.

    Batches are centred on their own mean and joined as in Chan, Golub and LeVeque 1983, in float64, so that neither
    the size of the batches nor a mean far from zero costs digits.

    Args:
        dim: number of features D.
        protocol: name of what made the features; moments of different protocols are not compared.
        settings: everything else that changes the numbers, as JSON text or as a mapping that is turned into it.
    """

    def __init__(self, dim: int, protocol: str = "", settings: str | Mapping[str, Any] = "") -> None:
        if dim < 1:
            raise UserError(f"the number of features must be at least 1, got {dim}; check the feature extractor")
        self.dim = int(dim)
        self.protocol = protocol
        self.settings = settings if isinstance(settings, str) else json.dumps(dict(settings), sort_keys=True)
        self._n = 0
        self._mean = np.zeros(dim)
        # lower triangle of sum((x - mean) (x - mean)^T); BLAS adds to it in place only in Fortran's order
        self._scatter = np.zeros((dim, dim), order="F")

    @classmethod
    def from_features(
        cls,
        features: ArrayLike,
        counts: ArrayLike | None = None,
        *,
        protocol: str = "",
        settings: str | Mapping[str, Any] = "",
    ) -> FeatureMoments:
        """Moments of (N, D) features, which may be a memory map: they are read in chunks."""
        features = _as_table(features)
        moments = cls(features.shape[1], protocol, settings)
        moments.update(features, counts)
        return moments

    @property
    def n(self) -> int:
        """Number of vectors so far."""
        return self._n

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean, (D,)."""
        return self._mean.copy()

    @property
    def covariance(self) -> NDArray[np.float64]:
        """Unbiased covariance, (D, D), exactly symmetric.

        Raises:
            UserError: fewer than two vectors.
        """
        if self._n < 2:
            raise UserError(f"a covariance takes at least 2 images, got {self._n}; give more images")
        lower = np.tril(self._scatter)
        covariance = lower + lower.T
        covariance[np.diag_indices(self.dim)] /= 2
        return covariance / (self._n - 1)

    def update(self, features: ArrayLike, counts: ArrayLike | None = None) -> None:
        """Add a batch.

        Args:
            features: (B, D).
            counts: (B,) whole numbers, how often each row counts; once each by default.

        Raises:
            UserError: another width, or values that are not finite.
        """
        features = _as_table(features)
        if features.shape[1] != self.dim:
            raise UserError(
                f"features must have {self.dim} columns, got {features.shape[1]}; use one extractor for all images"
            )
        repeats = None if counts is None else _as_counts(counts, len(features))
        for start in range(0, len(features), CHUNK_ROWS):
            rows = np.asarray(features[start : start + CHUNK_ROWS], dtype=np.float64)
            _check_finite(rows, start)
            self._add(rows, None if repeats is None else repeats[start : start + CHUNK_ROWS])

    def merge(self, other: FeatureMoments) -> None:
        """Add the vectors that another object has seen.

        Raises:
            UserError: another width, protocol or settings.
        """
        _check_comparable(self, other)
        self.protocol, self.settings = self.protocol or other.protocol, self.settings or other.settings
        n = self._n + other._n
        if not other._n:
            return
        shift = other._mean - self._mean
        # the triangle above the diagonal is never read, so that adding whole matrices is right
        self._scatter += other._scatter
        self._add_products(shift[None] * np.sqrt(self._n * other._n / n))
        self._mean += shift * (other._n / n)
        self._n = n

    def save(self, path: str | Path) -> None:
        """Write an ``.npz`` file, whole or not at all."""
        with atomic_file(path) as file:  # a name without .npz would be changed by numpy
            np.savez(
                file,
                n=np.int64(self._n),
                mean=self._mean,
                scatter=np.tril(self._scatter),
                protocol=np.str_(self.protocol),
                settings=np.str_(self.settings),
            )

    @classmethod
    def load(cls, path: str | Path) -> FeatureMoments:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: no such file, or not one of :meth:`save`.
        """
        # here: distances between arrays do not wait for what reads images
        from medgen.metrics.feature_set import read_arrays

        names = ("n", "mean", "scatter", "protocol", "settings")
        try:
            n, mean, scatter, protocol, settings = read_arrays(path, names)
            dim = len(mean)
            numbers = all(part.dtype == np.float64 for part in (mean, scatter)) and n.dtype.kind == "i"
            whole = mean.shape == (dim,) and scatter.shape == (dim, dim) and n.shape == () and n >= 0
            if not (numbers and whole and np.isfinite(mean).all() and np.isfinite(scatter).all()):
                raise ValueError("n, mean and scatter do not belong together")
        except UserError:
            raise
        except Exception as error:  # damaged bytes raise whatever they lead to
            raise UserError(
                f"{path} must be an .npz file of feature moments ({' '.join(str(error).split())}); write it again"
            ) from error
        moments = cls(dim, str(protocol), str(settings))
        moments._n, moments._mean, moments._scatter = int(n), mean, np.asfortranarray(np.tril(scatter))
        return moments

    def _add(self, rows: NDArray[np.float64], repeats: NDArray[np.float64] | None) -> None:
        if repeats is not None:
            rows, repeats = rows[repeats > 0], repeats[repeats > 0]
        batch = len(rows) if repeats is None else int(repeats.sum())
        if not batch:
            return
        mean = rows.mean(axis=0) if repeats is None else repeats @ rows / batch
        shift = mean - self._mean
        n = self._n + batch
        products = np.empty((len(rows) + 1, self.dim))
        np.subtract(rows, mean, out=products[:-1])
        if repeats is not None:
            products[:-1] *= np.sqrt(repeats)[:, None]
        products[-1] = shift * np.sqrt(self._n * batch / n)
        self._add_products(products)
        self._mean += shift * (batch / n)
        self._n = n

    def _add_products(self, rows: NDArray[np.float64]) -> None:
        self._scatter = linalg.blas.dsyrk(1.0, rows.T, beta=1.0, c=self._scatter, lower=1, overwrite_c=1)


def trace_sqrt_product(s1: ArrayLike, s2: ArrayLike) -> float:
    """tr((S1 S2)^1/2) of two covariance matrices.

    With S1 = L L^T, the eigenvalues of S1 S2 are those of the symmetric L^T S2 L: a Cholesky factor and ``eigvalsh``
    take the place of a matrix root, and nothing turns complex. An eigenvalue may be wrong by eps times the largest, and
    the root of a small one then by up to sqrt(eps): where these errors could add up to 1e-9 of the trace (singular or
    nearly singular matrices) it is computed as the nuclear norm of F1^T F2 with S = F F^T, which does not square them.

    Args:
        s1: (D, D), symmetric, positive semi-definite.
        s2: (D, D), symmetric, positive semi-definite.
    """
    s1, s2 = np.asarray(s1, dtype=np.float64), np.asarray(s2, dtype=np.float64)
    if s1.ndim != 2 or s1.shape != s2.shape or s1.shape[0] != s1.shape[1]:
        raise UserError(f"covariances must be two square matrices of one size, got {s1.shape} and {s2.shape}")
    for matrix in (s1, s2):
        _check_finite(matrix)
    lower = _cholesky(s1)
    if lower is not None:
        product = linalg.blas.dtrmm(1.0, lower, s2, side=1, lower=1)
        product = linalg.blas.dtrmm(1.0, lower, product, lower=1, trans_a=1, overwrite_b=1)
        values = linalg.eigvalsh(product, check_finite=False, overwrite_a=True)
        error, roots = EPS * values[-1], np.sqrt(np.maximum(values, 0.0))
        if error > 0 and (error / np.maximum(roots, np.sqrt(error))).sum() < ACCURACY * roots.sum():
            return float(roots.sum())
    return _nuclear_norm((_factor(s1) if lower is None else lower).T, _root(s2))


def frechet_distance(
    a: ArrayLike | FeatureMoments,
    b: ArrayLike | FeatureMoments,
    *,
    a_counts: ArrayLike | None = None,
    b_counts: ArrayLike | None = None,
) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2): the squared 2-Wasserstein distance of the fitted Gaussians.

    Dowson and Landau 1982; with Inception's features it is the FID of Heusel et al. 2017. Covariances are the unbiased
    ones. With fewer images than features the trace is the nuclear norm of A B^T, where A and B are the centred features
    over sqrt(n - 1): it costs n^3 instead of D^3 and is exact where a D x D matrix would be singular.

    The distance is a difference of large numbers: what lies below about 1e-13 of tr(S1) + tr(S2) is rounding, and a
    negative result, which only rounding can make, is returned as 0.

    It is biased upwards, by a term that falls as 1 / n (Chong and Forsyth 2020): compare only distances of equal n, and
    see :func:`small_sample_note` and :func:`medgen.metrics.intervals.real_baseline`.

    Args:
        a: (N, D) features, or their moments.
        b: (M, D) features, or their moments.
        a_counts: (N,) whole numbers, how often each row of ``a`` counts; once each by default.
        b_counts: the same for ``b``.

    Returns:
        The distance, at least 0, in squared units of the features.

    Raises:
        UserError: different widths or protocols, fewer than two images, values that are not finite.
    """
    if isinstance(a, FeatureMoments) and isinstance(b, FeatureMoments):
        _check_comparable(a, b)
    first, second = _Side(a, a_counts), _Side(b, b_counts)
    if len(first.mean) != len(second.mean):
        raise UserError(
            f"both sets must have the same number of features, got {len(first.mean)} and {len(second.mean)}; "
            "use one extractor for both"
        )
    if first.rows is None and second.rows is None:
        trace = trace_sqrt_product(first.covariance, second.covariance)
    else:
        trace = _nuclear_norm(first.root(), second.root().T)
    shift = first.mean - second.mean
    return max(float(shift @ shift + first.trace + second.trace - 2 * trace), 0.0)


def small_sample_note(n: int, d: int) -> str:
    """A warning where a Fréchet distance of ``n`` images with ``d`` features says more about n than about the images.

    For two sets of n draws from one Gaussian with covariance proportional to the identity, expanding the distance
    to first order in 1 / n gives (d / 2 + 2) / n of the covariance's trace, where the true distance is 0. The note
    appears where that is more than a twentieth: below about 10 images a feature.

    Args:
        n: images of the smaller set.
        d: number of features.

    Returns:
        One line, empty where n is large enough.
    """
    if n <= d:
        return (
            f"{n} images are too few for {d} features: the covariance is singular and the Fréchet distance mostly "
            f"bias; compare only with a baseline of the same n, or take the kernel distance"
        )
    if (d / 2 + 2) / n > 0.05:
        return (
            f"{n} images are few for {d} features: the Fréchet distance is biased upwards by about "
            f"{100 * (d / 2 + 2) / n:.0f}% of the features' variance; compare only with distances of the same n"
        )
    return ""


class _Side:
    """One of the two sets: centred rows where they are fewer than the features, else the covariance."""

    def __init__(self, source: ArrayLike | FeatureMoments, counts: ArrayLike | None) -> None:
        self.rows: NDArray[np.float64] | None = None
        if isinstance(source, FeatureMoments):
            if counts is not None:
                raise UserError("counts say how often each image counts, got moments; give the features")
            self._from_moments(source)
            return
        features = _as_table(source)
        if counts is not None:
            repeats = _as_counts(counts, len(features))
            _check_two(int(repeats.sum()))
            features, repeats = features[repeats > 0], repeats[repeats > 0]
        else:
            repeats = None
            _check_two(len(features))
        if len(features) >= features.shape[1]:
            self._from_moments(FeatureMoments.from_features(features, repeats))
            return
        rows = np.array(features, dtype=np.float64)
        _check_finite(rows)
        self.mean = np.average(rows, axis=0, weights=repeats)
        rows -= self.mean
        if repeats is not None:
            rows *= np.sqrt(repeats)[:, None]
        rows /= np.sqrt((len(rows) if repeats is None else repeats.sum()) - 1)
        self.rows = rows
        self.trace = float(np.vdot(rows, rows))

    def _from_moments(self, moments: FeatureMoments) -> None:
        _check_two(moments.n)
        self.mean, self.covariance = moments.mean, moments.covariance
        self.trace = float(np.trace(self.covariance))

    def root(self) -> NDArray[np.float64]:
        """(R, D) matrix F with F^T F the covariance."""
        if self.rows is not None:
            return self.rows
        return _root(self.covariance).T


def _cholesky(covariance: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Lower Cholesky factor, or None where rounding has as much part in its pivots as the matrix."""
    try:
        lower = linalg.cholesky(covariance, lower=True, check_finite=False)
    except linalg.LinAlgError:
        return None
    # a squared pivot over the variance is the share of a feature that those before it do not explain
    return lower if (np.diagonal(lower) ** 2 > RESOLVED * np.diagonal(covariance)).all() else None


def _root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    lower = _cholesky(covariance)
    return _factor(covariance) if lower is None else lower


def _factor(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """(D, R) matrix F with F F^T the covariance, R its numerical rank."""
    # of the correlations: features in small units would else be lost beside those in large ones
    scale = np.sqrt(np.maximum(np.diagonal(covariance), 0.0))
    scale[scale == 0] = 1.0
    values, vectors = linalg.eigh(covariance / scale / scale[:, None], check_finite=False)
    kept = values > len(values) * EPS * max(values[-1], 0.0)
    return scale[:, None] * vectors[:, kept] * np.sqrt(values[kept])


def _nuclear_norm(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    product = left @ right
    return float(linalg.svdvals(product, check_finite=False, overwrite_a=True).sum()) if product.size else 0.0


def _as_table(features: ArrayLike) -> NDArray:
    table = features if isinstance(features, np.ndarray) else np.asarray(features)
    if table.ndim != 2 or table.shape[1] < 1 or table.dtype.kind not in "fiub":
        raise UserError(
            f"features must be a table of numbers (images, features), got {table.dtype} {table.shape}; "
            "give one row per image"
        )
    return table


def _as_counts(counts: ArrayLike, rows: int) -> NDArray[np.float64]:
    repeats = np.asarray(counts, dtype=np.float64)
    if repeats.shape != (rows,) or not (np.isfinite(repeats) & (repeats >= 0) & (repeats == np.rint(repeats))).all():
        raise UserError(f"counts must be {rows} whole numbers, one per image, got shape {repeats.shape}")
    return repeats


def _check_finite(table: NDArray[np.float64], first_row: int = 0) -> None:
    finite = np.isfinite(table).all(axis=1)
    if not finite.all():
        bad = np.flatnonzero(~finite) + first_row
        named = ", ".join(str(row) for row in bad[:5]) + (", ..." if len(bad) > 5 else "")
        raise UserError(
            f"features must be finite, got NaN or infinity in row {named} (counted from 0); "
            "check those images and the extractor"
        )


def _check_two(n: int) -> None:
    if n < 2:
        raise UserError(f"a distance between sets takes at least 2 images in each, got {n}; give more images")


def _check_comparable(a: FeatureMoments, b: FeatureMoments) -> None:
    if a.dim != b.dim:
        raise UserError(
            f"both sets must have the same number of features, got {a.dim} and {b.dim}; use one extractor for both"
        )
    if a.protocol and b.protocol and a.protocol != b.protocol:
        raise UserError(
            f"both sets must have been measured by one protocol, got {a.protocol!r} and {b.protocol!r}; "
            "extract one of them again"
        )
    if a.settings and b.settings and a.settings != b.settings:
        raise UserError(
            f"both sets must have been measured with the same settings, got {_difference(a.settings, b.settings)}; "
            "extract one of them again"
        )


def _difference(first: str, second: str) -> str:
    """What differs between two settings, one line."""
    try:
        one, other = json.loads(first), json.loads(second)
    except ValueError:
        one = other = None
    if not isinstance(one, dict) or not isinstance(other, dict):
        return f"{first!r} and {second!r}"
    names = [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
    return "; ".join(f"{name} {one.get(name)!r} and {other.get(name)!r}" for name in names[:3])
