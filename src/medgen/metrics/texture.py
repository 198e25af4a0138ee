"""The 93 two-dimensional radiomic features of one grey image: intensity statistics and five texture matrices."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from skimage.measure import label

from medgen.errors import UserError

__all__ = ["FEATURE_CLASSES", "MAX_LEVELS", "discretise", "region_features"]

# Names and order as pyradiomics writes them, so that tables from either can be laid side by side.
FEATURE_CLASSES: dict[str, tuple[str, ...]] = {
    "firstorder": (
        "10Percentile", "90Percentile", "Energy", "Entropy", "InterquartileRange", "Kurtosis", "Maximum",
        "MeanAbsoluteDeviation", "Mean", "Median", "Minimum", "Range", "RobustMeanAbsoluteDeviation",
        "RootMeanSquared", "Skewness", "TotalEnergy", "Uniformity", "Variance",
    ),
    "glcm": (
        "Autocorrelation", "ClusterProminence", "ClusterShade", "ClusterTendency", "Contrast", "Correlation",
        "DifferenceAverage", "DifferenceEntropy", "DifferenceVariance", "Id", "Idm", "Idmn", "Idn", "Imc1", "Imc2",
        "InverseVariance", "JointAverage", "JointEnergy", "JointEntropy", "MCC", "MaximumProbability", "SumAverage",
        "SumEntropy", "SumSquares",
    ),
    "glrlm": (
        "GrayLevelNonUniformity", "GrayLevelNonUniformityNormalized", "GrayLevelVariance", "HighGrayLevelRunEmphasis",
        "LongRunEmphasis", "LongRunHighGrayLevelEmphasis", "LongRunLowGrayLevelEmphasis", "LowGrayLevelRunEmphasis",
        "RunEntropy", "RunLengthNonUniformity", "RunLengthNonUniformityNormalized", "RunPercentage", "RunVariance",
        "ShortRunEmphasis", "ShortRunHighGrayLevelEmphasis", "ShortRunLowGrayLevelEmphasis",
    ),
    "gldm": (
        "DependenceEntropy", "DependenceNonUniformity", "DependenceNonUniformityNormalized", "DependenceVariance",
        "GrayLevelNonUniformity", "GrayLevelVariance", "HighGrayLevelEmphasis", "LargeDependenceEmphasis",
        "LargeDependenceHighGrayLevelEmphasis", "LargeDependenceLowGrayLevelEmphasis", "LowGrayLevelEmphasis",
        "SmallDependenceEmphasis", "SmallDependenceHighGrayLevelEmphasis", "SmallDependenceLowGrayLevelEmphasis",
    ),
    "glszm": (
        "GrayLevelNonUniformity", "GrayLevelNonUniformityNormalized", "GrayLevelVariance", "HighGrayLevelZoneEmphasis",
        "LargeAreaEmphasis", "LargeAreaHighGrayLevelEmphasis", "LargeAreaLowGrayLevelEmphasis",
        "LowGrayLevelZoneEmphasis", "SizeZoneNonUniformity", "SizeZoneNonUniformityNormalized", "SmallAreaEmphasis",
        "SmallAreaHighGrayLevelEmphasis", "SmallAreaLowGrayLevelEmphasis", "ZoneEntropy", "ZonePercentage",
        "ZoneVariance",
    ),
    "ngtdm": ("Busyness", "Coarseness", "Complexity", "Contrast", "Strength"),
}  # fmt: skip

MAX_LEVELS = 2048  # occupied grey levels; the four co-occurrence matrices of more would take over 100 MB

_EPSILON = np.spacing(1.0)  # inside every logarithm, as the reference implementation has it
_ANGLES = ((0, 1), (1, 0), (1, 1), (1, -1))  # the four in-plane directions at distance 1
_DENSE_LEVELS = 32  # below this the mutual information is summed cell by cell, rounding included


def discretise(values: np.ndarray, ascending: np.ndarray, bin_width: float) -> tuple[np.ndarray, np.ndarray]:
    """Grey levels by fixed bin width, with bin edges at multiples of the width.

    Args:
        values: intensities, any shape; the edges are computed in their precision.
        ascending: the same values, sorted.
        bin_width: width of a bin in units of intensity.

    Returns:
        Levels (integers from 1 up, of the shape of ``values``) and how many values each level from 1 to the highest
        has.

    Raises:
        UserError: the range holds too many bins.
    """
    low, high = ascending[0], ascending[-1]
    if (float(high) - float(low)) / bin_width > 1e6:
        raise UserError(
            f"intensities from {low:g} to {high:g} must be at most a million bins wide, got bin_width {bin_width:g}; "
            "normalise the image or raise bin_width"
        )
    edges = np.arange(low - low % bin_width, high + 2 * bin_width, bin_width)
    if len(edges) < 2:
        return np.ones(values.shape, np.intp), np.array([ascending.size])
    counts = np.diff(np.searchsorted(ascending, edges))
    counts = counts[: np.flatnonzero(counts)[-1] + 1]
    # Multiplying is several times faster than searching the edges, but may round a value over one. Both maps are
    # monotone, so equal histograms mean equal levels for every value.
    levels = ((values - edges[0]) * (1.0 / bin_width)).astype(np.intp)
    if not np.array_equal(np.bincount(levels.ravel()), counts):
        levels -= values < edges[levels]
        levels += values >= edges[levels + 1]
    levels += 1
    return levels, counts


def region_features(
    image: np.ndarray,
    mask: np.ndarray | None,
    *,
    bin_width: float,
    voxel_shift: float,
    pixel_area: float,
    features: dict[str, tuple[str, ...]],
) -> np.ndarray:
    """Radiomic features of one (filtered) image inside one region.

    Args:
        image: (H, W) intensities, finite.
        mask: (H, W) bool, the region, or None for the whole image.
        bin_width: width of a grey level in units of intensity.
        voxel_shift: added to intensities in the energy features and the root mean square.
        pixel_area: area (or volume) of a pixel, for TotalEnergy.
        features: names per feature class, in the order wanted.

    Returns:
        One float64 value per name. A feature that is undefined in the region (no two neighbouring pixels) is NaN.

    Raises:
        UserError: the region holds more than :data:`MAX_LEVELS` grey levels.
    """
    values = image.ravel() if mask is None else image[mask]
    ascending = np.sort(values)
    levels, counts = discretise(values, ascending, bin_width)
    present = np.flatnonzero(counts)
    if present.size > MAX_LEVELS:
        raise UserError(
            f"at most {MAX_LEVELS} grey levels can be told apart, got {present.size} with bin_width {bin_width:g}; "
            "normalise the image or raise bin_width"
        )
    # Matrices are indexed by rank among the levels that occur: an outlier then costs one row, not thousands.
    if present.size == counts.size:
        ranks = levels
        ranks -= 1
    else:
        rank_of = np.zeros(counts.size + 1, np.intp)
        rank_of[present + 1] = np.arange(present.size)
        ranks = rank_of[levels]
    grid: np.ndarray = ranks.reshape(image.shape) if mask is None else np.full(image.shape, present.size, np.intp)
    if mask is not None:
        grid[mask] = ranks
    region = _Region(grid, mask, (present + 1).astype(np.float64), counts[present].astype(np.float64), int(counts.size))

    found: dict[str, dict[str, np.ndarray | float]] = {}
    with np.errstate(divide="ignore", invalid="ignore"):
        for name in features:
            if name == "firstorder":
                found[name] = _first_order(values, ascending, region.counts, voxel_shift, pixel_area)
            elif name == "glcm":
                found[name] = _glcm(region, with_mcc="MCC" in features[name])
            else:
                found[name] = {"glrlm": _glrlm, "gldm": _gldm, "glszm": _glszm, "ngtdm": _ngtdm}[name](region)
    return np.array([found[name][feature] for name, wanted in features.items() for feature in wanted], np.float64)


class _Region:
    """Grey levels of a region, as every texture matrix wants them.

    Args:
        grid: (H, W) rank of each pixel's level; the number of levels marks pixels outside.
        mask: (H, W) bool, or None when no pixel is outside.
        levels: the levels that occur, ascending.
        counts: pixels per level that occurs.
        top: highest level (the N_g of the definitions).
    """

    def __init__(
        self, grid: np.ndarray, mask: np.ndarray | None, levels: np.ndarray, counts: np.ndarray, top: int
    ) -> None:
        self.grid, self.mask, self.levels, self.counts, self.top = grid, mask, levels, counts, top
        # One byte a pixel makes comparisons and gathers several times faster.
        kind = np.uint8 if levels.size < 255 else np.uint16
        self.compact = grid.astype(kind)

    @property
    def size(self) -> int:
        return self.levels.size


# ---------------------------------------------------------------------------------------------------- intensities


def _quantile(ascending: np.ndarray, share: float) -> float:
    """Linear interpolation between the order statistics, rounded as ``numpy.percentile`` does."""
    position = (ascending.size - 1) * share
    below = int(position)
    left, right = float(ascending[below]), float(ascending[min(below + 1, ascending.size - 1)])
    part = position - below
    return left + (right - left) * part if part < 0.5 else right - (right - left) * (1 - part)


def _first_order(
    values: np.ndarray, ascending: np.ndarray, counts: np.ndarray, shift: float, pixel_area: float
) -> dict[str, float]:
    x, values = ascending.astype(np.float64), values.astype(np.float64)
    n = x.size
    p10, p25, p75, p90 = (_quantile(x, share) for share in (0.1, 0.25, 0.75, 0.9))
    # In the image's order: a wavelet band's mean is nothing but rounding, and other orders round otherwise.
    mean = values.mean()
    centred = values - mean
    squares = centred * centred
    variance = squares.mean()
    spread = variance if variance != 0 else 1.0
    shifted = x + shift
    energy = float(np.sum(shifted * shifted))
    middle = x[np.searchsorted(x, p10, "left") : np.searchsorted(x, p90, "right")]
    p = counts / n
    return {
        "10Percentile": p10,
        "90Percentile": p90,
        "Energy": energy,
        "TotalEnergy": energy * pixel_area,
        "RootMeanSquared": np.sqrt(energy / n),
        "Entropy": -np.sum(p * np.log2(p + _EPSILON)),
        "Uniformity": np.sum(p * p),
        "InterquartileRange": p75 - p25,
        "Minimum": x[0],
        "Maximum": x[-1],
        "Range": x[-1] - x[0],
        "Mean": mean,
        "Median": (x[(n - 1) // 2] + x[n // 2]) / 2,
        "MeanAbsoluteDeviation": np.abs(centred).mean(),
        "RobustMeanAbsoluteDeviation": np.abs(middle - middle.mean()).mean() if middle.size else float("nan"),
        "Skewness": (squares * centred).mean() / spread**1.5,
        "Kurtosis": (squares * squares).mean() / spread**2,
        "Variance": variance,
    }


# ---------------------------------------------------------------------------------------------------- co-occurrence


def _pair(grid: np.ndarray, step: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Views of the pixels that have a neighbour one ``step`` on, and of those neighbours."""
    down, right = step
    height, width = grid.shape
    if right >= 0:
        return grid[: height - down, : width - right], grid[down:, right:]
    return grid[: height - down, -right:], grid[down:, : width + right]


def _angles(shape: tuple[int, int]) -> list[tuple[int, int]]:
    """The directions in which a region of this shape has neighbours at all."""
    return [(down, right) for down, right in _ANGLES if down < shape[0] and abs(right) < shape[1]]


def _entropy(p: np.ndarray) -> np.ndarray:
    return -np.sum(p * np.log2(p + _EPSILON), axis=-1)


def _over_angles(values: dict[str, np.ndarray]) -> dict[str, float]:
    """Mean of each feature over the angles in which it is defined; NaN without any."""
    table = np.stack(list(values.values()))
    defined = ~np.isnan(table)
    means = np.where(defined, table, 0).sum(axis=1) / defined.sum(axis=1)
    return dict(zip(values, means.tolist(), strict=True))


def _cooccurrences(region: _Region) -> np.ndarray:
    """Symmetrical co-occurrence counts of the angles that have pairs, (angles, levels, levels)."""
    side = region.size + (region.mask is not None)
    # the narrowest integers that hold a pair: most of the time goes into moving them
    kind = np.uint16 if side * side <= 1 << 16 else np.int32
    columns = region.compact.astype(kind)
    rows = columns * kind(side)
    matrices = []
    for step in _angles(region.grid.shape):
        here, _ = _pair(rows, step)
        _, there = _pair(columns, step)
        pairs = np.bincount((here + there).ravel(), minlength=side * side).reshape(side, side)
        pairs = pairs[: region.size, : region.size]
        matrices.append(pairs + pairs.T)
    matrices = np.stack(matrices)
    return matrices[matrices.any(axis=(1, 2))] if len(matrices) > 1 else matrices


def _glcm(region: _Region, with_mcc: bool) -> dict[str, float]:
    matrices = _cooccurrences(region)
    angles, side = len(matrices), region.size
    totals = matrices.sum(axis=(1, 2)).astype(np.float64)
    if not angles or not totals.all():
        undefined = dict.fromkeys(FEATURE_CLASSES["glcm"], float("nan"))
        if not angles and side == 1:
            undefined["MCC"] = 1.0
        return undefined
    levels, top = region.levels, region.top

    # Only the pairs that occur: a smooth image fills a few hundredths of the matrix.
    cells = np.flatnonzero(matrices)
    angle, cell = np.divmod(cells, side * side)
    row, column = np.divmod(cell, side)
    p = matrices.ravel()[cells] / totals[angle]
    start = np.searchsorted(angle, np.arange(angles))
    first, second = region.levels.astype(np.intp)[row], region.levels.astype(np.intp)[column]
    p_sum = np.bincount(angle * (2 * top + 1) + first + second, p, angles * (2 * top + 1)).reshape(angles, -1)
    p_diff = np.bincount(angle * top + np.abs(first - second), p, angles * top).reshape(angles, -1)
    p_x = matrices.sum(axis=2) / totals[:, None]
    sums, k = np.arange(2 * top + 1.0), np.arange(float(top))

    mean = p_x @ levels
    variance = np.sum(p_x * (levels - mean[:, None]) ** 2, axis=1)
    from_centre = sums - 2 * mean[:, None]
    tendency = np.sum(p_sum * from_centre**2, axis=1)
    contrast = p_diff @ k**2
    deviation = np.sqrt(variance)
    # (i - mu)(j - mu) is a quarter of the difference of these two squares, without a cancellation of large products.
    correlation = (tendency - contrast) / 4 / (deviation * deviation + _EPSILON)
    correlation[deviation * deviation == 0] = 1
    difference = p_diff @ k
    joint_entropy = -np.add.reduceat(p * np.log2(p + _EPSILON), start)
    imc1, imc2 = _mutual_information(p, p_x, joint_entropy, angle, row, column, start)
    result = {
        "Autocorrelation": (p_sum @ sums**2 - contrast) / 4,
        "ClusterProminence": np.sum(p_sum * from_centre**4, axis=1),
        "ClusterShade": np.sum(p_sum * from_centre**3, axis=1),
        "ClusterTendency": tendency,
        "Contrast": contrast,
        "Correlation": correlation,
        "DifferenceAverage": difference,
        "DifferenceEntropy": _entropy(p_diff),
        "DifferenceVariance": np.sum(p_diff * (k - difference[:, None]) ** 2, axis=1),
        "Id": p_diff @ (1 / (1 + k)),
        "Idm": p_diff @ (1 / (1 + k**2)),
        "Idmn": p_diff @ (1 / (1 + k**2 / top**2)),
        "Idn": p_diff @ (1 / (1 + k / top)),
        "Imc1": imc1,
        "Imc2": imc2,
        "InverseVariance": p_diff[:, 1:] @ (1 / k[1:] ** 2),
        "JointAverage": mean,
        "JointEnergy": np.add.reduceat(p * p, start),
        "JointEntropy": joint_entropy,
        "MaximumProbability": np.maximum.reduceat(p, start),
        "SumAverage": p_sum @ sums,
        "SumEntropy": _entropy(p_sum),
        "SumSquares": variance,
    }
    if with_mcc:
        result["MCC"] = np.array([_maximal_correlation(m / n) for m, n in zip(matrices, totals, strict=True)])
    return _over_angles(result)


def _mutual_information(
    p: np.ndarray,
    p_x: np.ndarray,
    joint_entropy: np.ndarray,
    angle: np.ndarray,
    row: np.ndarray,
    column: np.ndarray,
    start: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Haralick's two informational measures of correlation, one value an angle."""
    entropy = _entropy(p_x)
    product = p_x[angle, row] * p_x[angle, column]
    first = -np.add.reduceat(p * np.log2(product + _EPSILON), start)
    if p_x.shape[1] <= _DENSE_LEVELS:
        outer = p_x[:, :, None] * p_x[:, None, :]
        second = -np.sum(outer * np.log2(outer + _EPSILON), axis=(1, 2))
    else:
        # The logarithm of the product splits in two; epsilon adds epsilon / ln 2 for every occupied cell of the outer
        # product (its second order is below 1e-20), so no logarithm is taken of the tens of thousands of cells.
        occupied = np.count_nonzero(p_x, axis=1)
        exact = -np.sum(p_x * np.log2(np.where(p_x > 0, p_x, 1)), axis=1)
        second = 2 * exact - occupied**2 * _EPSILON / np.log(2)
    imc1 = joint_entropy - first
    imc1 = np.where(entropy != 0, imc1 / np.where(entropy != 0, entropy, 1), 0.0)
    imc2 = np.sqrt(1 - np.exp(-2 * (second - joint_entropy)))
    imc2[second == joint_entropy] = 0
    return imc1, imc2


def _maximal_correlation(p: np.ndarray) -> float:
    """Root of the second largest eigenvalue of Q(i, j) = sum over k of p(i, k) p(j, k) / (p_x(i) p_x(k) + epsilon).

    Without epsilon, Q is similar to the square of a symmetric matrix, whose eigenvectors are cheap and stable. Epsilon
    matters for the rarest levels only, so Q is projected onto the leading eigenvectors and the few that remain are
    solved for exactly (the error is of second order in that perturbation).
    """
    if len(p) < 2:
        return 1.0
    p_x = p.sum(axis=1)
    root = np.sqrt(p_x)
    inverse = np.divide(1, root, out=np.zeros_like(root), where=root > 0)
    values, vectors = np.linalg.eigh(inverse[:, None] * p * inverse)
    leading = vectors[:, np.argsort(values**2)[-8:]]
    q_leading = (p / (p_x[:, None] * p_x + _EPSILON)) @ (p @ (inverse[:, None] * leading))
    small = np.linalg.eigvals((root[:, None] * leading).T @ q_leading)
    small = np.sort(small)
    return float(np.sqrt(small[-2].astype(complex)).real)


# -------------------------------------------------------------------------------- matrices of level and size


def _size_features(
    counts: np.ndarray, level: np.ndarray, size: np.ndarray, start: np.ndarray, levels: np.ndarray
) -> dict[str, np.ndarray]:
    """What the run length, size zone and dependence matrices have in common.

    Args:
        counts: (E,) the matrices' non-zero entries, those of one matrix together.
        level: (E,) rank of the grey level of each entry.
        size: (E,) run length, zone size or dependence (from 1).
        start: (M,) index of the first entry of each matrix.
        levels: (L,) grey level of each rank.

    Returns:
        (M,) values under neutral names.
    """
    matrices = len(start)
    matrix = np.repeat(np.arange(matrices), np.diff(start, append=counts.size))
    total = np.add.reduceat(counts, start)
    i, j = levels[level], size.astype(np.float64)
    i2, j2 = i * i, j * j

    def expect(*terms: np.ndarray) -> np.ndarray:
        # the sums of whole numbers are exact, so that one level or size alone has no variance
        return np.add.reduceat(np.stack(terms) * counts, start, axis=1) / total

    longest = int(size.max()) + 1
    by_level = np.bincount(matrix * levels.size + level, counts, matrices * levels.size).reshape(matrices, -1)
    by_size = np.bincount(matrix * longest + size, counts, matrices * longest).reshape(matrices, -1)
    level_squares, size_squares = np.sum(by_level**2, axis=1), np.sum(by_size**2, axis=1)
    mean_i, mean_j, high, large, large_high = expect(i, j, i2, j2, i2 * j2)
    low, small, small_low, small_high, large_low, level_variance, size_variance, entropy = expect(
        1 / i2,
        1 / j2,
        1 / (i2 * j2),
        i2 / j2,
        j2 / i2,
        (i - mean_i[matrix]) ** 2,
        (j - mean_j[matrix]) ** 2,
        -np.log2(counts / total[matrix] + _EPSILON),
    )
    return {
        "small": small,
        "large": large,
        "low": low,
        "high": high,
        "small_low": small_low,
        "small_high": small_high,
        "large_low": large_low,
        "large_high": large_high,
        "level_nonuniformity": level_squares / total,
        "level_nonuniformity_normalised": level_squares / total**2,
        "size_nonuniformity": size_squares / total,
        "size_nonuniformity_normalised": size_squares / total**2,
        "level_variance": level_variance,
        "size_variance": size_variance,
        "entropy": entropy,
        "percentage": 1 / mean_j,
    }


_SIZE_NAMES = {
    "glrlm": {
        "small": "ShortRunEmphasis",
        "large": "LongRunEmphasis",
        "low": "LowGrayLevelRunEmphasis",
        "high": "HighGrayLevelRunEmphasis",
        "small_low": "ShortRunLowGrayLevelEmphasis",
        "small_high": "ShortRunHighGrayLevelEmphasis",
        "large_low": "LongRunLowGrayLevelEmphasis",
        "large_high": "LongRunHighGrayLevelEmphasis",
        "level_nonuniformity": "GrayLevelNonUniformity",
        "level_nonuniformity_normalised": "GrayLevelNonUniformityNormalized",
        "size_nonuniformity": "RunLengthNonUniformity",
        "size_nonuniformity_normalised": "RunLengthNonUniformityNormalized",
        "level_variance": "GrayLevelVariance",
        "size_variance": "RunVariance",
        "entropy": "RunEntropy",
        "percentage": "RunPercentage",
    },
    "glszm": {
        "small": "SmallAreaEmphasis",
        "large": "LargeAreaEmphasis",
        "low": "LowGrayLevelZoneEmphasis",
        "high": "HighGrayLevelZoneEmphasis",
        "small_low": "SmallAreaLowGrayLevelEmphasis",
        "small_high": "SmallAreaHighGrayLevelEmphasis",
        "large_low": "LargeAreaLowGrayLevelEmphasis",
        "large_high": "LargeAreaHighGrayLevelEmphasis",
        "level_nonuniformity": "GrayLevelNonUniformity",
        "level_nonuniformity_normalised": "GrayLevelNonUniformityNormalized",
        "size_nonuniformity": "SizeZoneNonUniformity",
        "size_nonuniformity_normalised": "SizeZoneNonUniformityNormalized",
        "level_variance": "GrayLevelVariance",
        "size_variance": "ZoneVariance",
        "entropy": "ZoneEntropy",
        "percentage": "ZonePercentage",
    },
    "gldm": {
        "small": "SmallDependenceEmphasis",
        "large": "LargeDependenceEmphasis",
        "low": "LowGrayLevelEmphasis",
        "high": "HighGrayLevelEmphasis",
        "small_low": "SmallDependenceLowGrayLevelEmphasis",
        "small_high": "SmallDependenceHighGrayLevelEmphasis",
        "large_low": "LargeDependenceLowGrayLevelEmphasis",
        "large_high": "LargeDependenceHighGrayLevelEmphasis",
        "level_nonuniformity": "GrayLevelNonUniformity",
        "size_nonuniformity": "DependenceNonUniformity",
        "size_nonuniformity_normalised": "DependenceNonUniformityNormalized",
        "level_variance": "GrayLevelVariance",
        "size_variance": "DependenceVariance",
        "entropy": "DependenceEntropy",
    },
}


def _named(family: str, values: dict[str, np.ndarray]) -> dict[str, float]:
    return _over_angles({name: values[neutral] for neutral, name in _SIZE_NAMES[family].items()})


@lru_cache(maxsize=32)
def _lines(height: int, width: int, down: int, right: int) -> tuple[np.ndarray | None, np.ndarray]:
    """Order in which to read an image so that the pixels along one direction follow each other.

    Returns:
        (H * W,) flat pixel indices (None: as they lie), and the positions at which a new line begins.
    """
    rows, columns = np.divmod(np.arange(height * width, dtype=np.int32), np.int32(width))
    if down == 0:
        return None, np.arange(0, height * width, width)
    line = columns - right * rows
    order = np.argsort(line, kind="stable")
    ordered = line[order]
    return order, np.flatnonzero(np.diff(ordered, prepend=ordered[0] - 1))


def _glrlm(region: _Region) -> dict[str, float]:
    flat = region.compact.ravel()
    angles = _angles(region.grid.shape)
    entries = []
    for down, right in angles:
        order, line_starts = _lines(*region.grid.shape, down, right)
        sequence = flat if order is None else flat[order]
        if region.mask is not None and np.add.reduceat(sequence < region.size, line_starts, dtype=np.intp).max() < 2:
            continue  # the region is a line across this direction: it has no runs to speak of
        begins = np.empty(sequence.size, bool)
        np.not_equal(sequence[1:], sequence[:-1], out=begins[1:])
        begins[line_starts] = True
        starts = np.flatnonzero(begins)
        lengths = np.empty_like(starts)
        np.subtract(starts[1:], starts[:-1], out=lengths[:-1])
        lengths[-1] = sequence.size - starts[-1]
        levels = sequence[starts]
        if region.mask is not None:
            inside = levels < region.size
            levels, lengths = levels[inside], lengths[inside]
        longest = int(lengths.max()) + 1
        histogram = np.bincount(levels * np.intp(longest) + lengths, minlength=region.size * longest)
        cells = np.flatnonzero(histogram)
        entries.append((histogram[cells], *np.divmod(cells, longest)))
    if not entries:
        return dict.fromkeys(FEATURE_CLASSES["glrlm"], float("nan"))
    counts, level, size = (np.concatenate(part) for part in zip(*entries, strict=True))
    start = np.cumsum([0] + [len(part[0]) for part in entries[:-1]])
    return _named("glrlm", _size_features(counts.astype(np.float64), level, size, start, region.levels))


def _glszm(region: _Region) -> dict[str, float]:
    zones = label(region.grid, background=region.size, connectivity=2).ravel()
    grid = region.grid.ravel()
    sizes = np.bincount(zones)
    level_of = np.empty(sizes.size, np.intp)
    level_of[zones] = grid
    # Without a mask no pixel is background and label 0 stays empty.
    sizes, level_of = sizes[1:], level_of[1:]
    longest = int(sizes.max()) + 1
    cells, counts = np.unique(level_of * longest + sizes, return_counts=True)
    level, size = np.divmod(cells, longest)
    return _named("glszm", _size_features(counts.astype(np.float64), level, size, np.array([0]), region.levels))


def _gldm(region: _Region) -> dict[str, float]:
    grid = region.compact
    dependence = np.ones(grid.shape, np.uint8)  # a pixel depends on itself
    for step in _angles(grid.shape):
        here, there = _pair(grid, step)
        equal = here == there
        for view in _pair(dependence, step):
            view += equal
    ranks = region.grid * 10 + dependence
    ranks = ranks.ravel() if region.mask is None else ranks[region.mask]
    histogram = np.bincount(ranks)
    cells = np.flatnonzero(histogram)
    level, size = np.divmod(cells, 10)
    counts = histogram[cells].astype(np.float64)
    return _named("gldm", _size_features(counts, level, size, np.array([0]), region.levels))


# ---------------------------------------------------------------------------------------- neighbourhood differences


def _box_sum(values: np.ndarray) -> np.ndarray:
    """Sum over the 3 x 3 neighbourhood, the pixel itself included, zero beyond the border."""
    tall = values.copy()
    tall[1:] += values[:-1]
    tall[:-1] += values[1:]
    wide = tall.copy()
    wide[:, 1:] += tall[:, :-1]
    wide[:, :-1] += tall[:, 1:]
    return wide


@lru_cache(maxsize=32)
def _neighbours(height: int, width: int) -> np.ndarray:
    return _box_sum(np.ones((height, width), np.float32)) - 1


def _ngtdm(region: _Region) -> dict[str, float]:
    # Whole numbers below 2^24, exact in single precision, until the division.
    grey = np.append(region.levels, 0).astype(np.float32)[region.compact]
    mask = region.mask
    if mask is None:
        neighbours = _neighbours(*region.grid.shape)
    else:
        neighbours = _box_sum(mask.astype(np.float32)) - mask
    difference = np.abs(grey * (neighbours + 1) - _box_sum(grey)) / np.maximum(neighbours, 1, dtype=np.float64)
    if mask is None:
        sums = np.bincount(region.grid.ravel(), difference.ravel(), region.size)
    else:
        inside = mask & (neighbours > 0)
        sums = np.bincount(region.grid[inside], difference[inside], region.size)

    levels, n = region.levels, region.size
    pixels = region.counts.sum()
    p = region.counts / pixels
    weighted = float(p @ sums)
    total = float(sums.sum())
    mean = p @ levels
    apart = np.abs(levels[:, None] - levels)
    scaled = levels * p
    busy = np.abs(scaled[:, None] - scaled).sum()
    shares = p * sums
    strength = 2 * np.sum(p * (n * levels**2 - 2 * levels * levels.sum() + np.sum(levels**2)))
    return {
        "Coarseness": 1 / weighted if weighted != 0 else 1e6,
        "Contrast": 2 * (p @ (levels - mean) ** 2) * total / pixels / (n * (n - 1)) if n > 1 else 0.0,
        "Busyness": weighted / busy if busy != 0 else 0.0,
        "Complexity": np.sum(apart * (shares[:, None] + shares) / (p[:, None] + p)) / pixels,
        "Strength": strength / total if total != 0 else 0.0,
    }
