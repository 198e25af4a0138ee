"""How far an image lies from its reconstruction, and where: MSE and Wasserstein distance, whole, in the body, by patch.

Images are grey, (H, W) or (1, H, W), either uint8 or floating point in [0, 1]. uint8 is divided by 255, so that both
give the same scores: an MSE is in [0, 1], a Wasserstein distance (that of two distributions of intensities, which knows
nothing of where they lie) in [0, 1]. For figures in grey levels multiply by 255² and 255.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from skimage.measure import label

from medgen.errors import UserError
from medgen.metrics.intervals import Estimate, bootstrap_mean, check_level, exact_binomial

__all__ = [
    "AnomalyMaps",
    "AnomalyScores",
    "Localisation",
    "Patch",
    "body_region",
    "heat_map",
    "localisation_rate",
    "mse_by_patch",
    "score_anomaly",
    "top_patches",
    "wasserstein_by_patch",
    "wasserstein_distance",
]

PATCH = 32  # pixels; gan_anom_detect
RANGE_SLACK = 1e-6  # resampling in float32 leaves the range by this much
STRIP = 2**18  # pixels worked on at a time: what a strip needs stays in the cache


@dataclass(frozen=True)
class Patch:
    """A square of an image, in pixels.

    Args:
        row: its first.
        column: its first.
        size: of a side.
        score: how anomalous it is.
    """

    row: int
    column: int
    size: int
    score: float

    @property
    def slices(self) -> tuple[slice, slice]:
        """To cut it out of an image (H, W)."""
        return slice(self.row, self.row + self.size), slice(self.column, self.column + self.size)


@dataclass(frozen=True)
class AnomalyScores:
    """One image's row of the table; ``dataclasses.asdict`` makes it one.

    Args:
        mse_full: mean squared difference of all pixels.
        mse_body: of the body's pixels; None where no body was found.
        mse_patch: of the worst patch.
        wd_full: Wasserstein distance of all pixels' intensities.
        wd_body: of the body's; None where no body was found.
        wd_patch: of the worst patch.
        mse_patch_row: first row of the patch that is worst by MSE.
        mse_patch_column: its first column.
        wd_patch_row: first row of the patch that is worst by Wasserstein distance.
        wd_patch_column: its first column.
        patch: side of a patch in pixels.
        body_share: of the image's pixels; 0 where no body was found.
    """

    mse_full: float
    mse_body: float | None
    mse_patch: float
    wd_full: float
    wd_body: float | None
    wd_patch: float
    mse_patch_row: int
    mse_patch_column: int
    wd_patch_row: int
    wd_patch_column: int
    patch: int
    body_share: float


@dataclass(frozen=True)
class AnomalyMaps:
    """What the scores of one image were read from.

    Args:
        mse: float64 (H - P + 1, W - P + 1), the MSE of the patch of P pixels whose first pixel stands there.
        wd: the same for the Wasserstein distance.
        body: bool (H, W).
        patch: P.
    """

    mse: NDArray[np.float64]
    wd: NDArray[np.float64]
    body: NDArray[np.bool_]
    patch: int


@dataclass(frozen=True)
class Localisation:
    """Result of :func:`localisation_rate`.

    Args:
        rate: share of patches that hit, with its interval; ``n_reference`` is the number of images, ``n_samples`` that
            of patches.
        chance: the share that would hit if each patch were put down anywhere at random.
        hits: per image, of each of its patches.
    """

    rate: Estimate
    chance: float
    hits: tuple[tuple[bool, ...], ...]


def score_anomaly(
    image: ArrayLike,
    reconstruction: ArrayLike,
    *,
    patch: int = PATCH,
    body: ArrayLike | None = None,
    body_threshold: float = 0.0,
) -> tuple[AnomalyScores, AnomalyMaps]:
    """MSE and Wasserstein distance between an image and its reconstruction, with the maps they come from.

    Args:
        image: (H, W) or (1, H, W), uint8 or float in [0, 1].
        reconstruction: of the same shape and kind.
        patch: side of the patches in pixels; they stand at every offset.
        body: bool (H, W), the body where it is known; by default :func:`body_region` of the image. The
            reconstruction is judged inside the image's body, not its own.
        body_threshold: for :func:`body_region`, in [0, 1].

    Returns:
        The row of scores, and the maps.

    Raises:
        UserError: shapes or kinds that differ, values that are not finite or outside [0, 1], a patch larger than the
            image.
    """
    image, reconstruction = _check_pair(image, reconstruction)
    _check_patch(patch, image.shape)
    if body is None:
        body = body_region(image, body_threshold)
    else:
        body = _check_mask(body, image.shape, "body")
    maps = AnomalyMaps(
        mse_by_patch(image, reconstruction, patch), wasserstein_by_patch(image, reconstruction, patch), body, patch
    )
    worst_mse, worst_wd = (top_patches(scores, patch)[0] for scores in (maps.mse, maps.wd))
    squares, peak = _squares(image, reconstruction)
    scores = AnomalyScores(
        mse_full=float(squares.mean() / peak**2),
        mse_body=float(squares[body].mean() / peak**2) if body.any() else None,
        mse_patch=worst_mse.score,
        wd_full=wasserstein_distance(image, reconstruction),
        wd_body=wasserstein_distance(image, reconstruction, body) if body.any() else None,
        wd_patch=worst_wd.score,
        mse_patch_row=worst_mse.row,
        mse_patch_column=worst_mse.column,
        wd_patch_row=worst_wd.row,
        wd_patch_column=worst_wd.column,
        patch=patch,
        body_share=float(body.mean()),
    )
    return scores, maps


def wasserstein_distance(image: ArrayLike, reconstruction: ArrayLike, mask: ArrayLike | None = None) -> float:
    """1-Wasserstein distance of the intensities of two images; exact.

    For as many values on both sides it is the mean absolute difference of the sorted values.

    Args:
        image: (H, W) or (1, H, W), uint8 or float in [0, 1].
        reconstruction: of the same shape and kind.
        mask: bool (H, W), the pixels that count; all by default.

    Returns:
        In [0, 1].

    Raises:
        UserError: as for :func:`score_anomaly`, or a mask without pixels.
    """
    image, reconstruction = _check_pair(image, reconstruction)
    if mask is not None:
        mask = _check_mask(mask, image.shape, "mask")
        if not mask.any():
            raise UserError("a distance within a mask needs pixels, got an empty mask; leave the mask out")
        image, reconstruction = image[mask], reconstruction[mask]
    first, second = (np.sort(values, axis=None, kind="stable") for values in (image, reconstruction))
    return float(np.abs(_unit(first) - _unit(second)).mean())


def mse_by_patch(image: ArrayLike, reconstruction: ArrayLike, patch: int = PATCH) -> NDArray[np.float64]:
    """MSE of every patch, by an integral image.

    Args:
        image: (H, W) or (1, H, W), uint8 or float in [0, 1].
        reconstruction: of the same shape and kind.
        patch: side in pixels.

    Returns:
        float64 (H - patch + 1, W - patch + 1): at [r, c] that of the patch whose first pixel is (r, c).

    Raises:
        UserError: as for :func:`score_anomaly`.
    """
    image, reconstruction = _check_pair(image, reconstruction)
    _check_patch(patch, image.shape)
    squares, peak = _squares(image, reconstruction)
    # the differences of an integral image may come out a rounding error below 0
    return np.maximum(_window_sums(squares, patch), 0) / (peak * patch) ** 2


def wasserstein_by_patch(image: ArrayLike, reconstruction: ArrayLike, patch: int = PATCH) -> NDArray[np.float64]:
    """1-Wasserstein distance of the intensities of every patch.

    It is the integral of the absolute difference of the two cumulative distributions (Vallender 1974): over the grey
    levels, the sum of |pixels of one patch up to this level - pixels of the other|. For each level these counts are
    window sums of small integers for all patches at once. So the result is exact for uint8; floating point images are
    rounded to 256 levels first, which moves a distance by at most 1 / 255.

    Args:
        image: (H, W) or (1, H, W), uint8 or float in [0, 1].
        reconstruction: of the same shape and kind.
        patch: side in pixels.

    Returns:
        float64 (H - patch + 1, W - patch + 1): at [r, c] that of the patch whose first pixel is (r, c).

    Raises:
        UserError: as for :func:`score_anomaly`.
    """
    image, reconstruction = (_levels(values) for values in _check_pair(image, reconstruction))
    _check_patch(patch, image.shape)
    H, W = image.shape
    rows = max(STRIP // W, 4 * patch)  # the next strip starts patch - 1 rows before the end of this one
    strips = [
        _wasserstein_strip(image[start : start + rows], reconstruction[start : start + rows], patch)
        for start in range(0, H - patch + 1, rows - patch + 1)
    ]
    return np.concatenate(strips) / (255.0 * patch**2)


def body_region(image: ArrayLike, threshold: float = 0.0) -> NDArray[np.bool_]:
    """The body: the largest connected region brighter than the background, with its holes.

    Regions touch along sides and corners. A hole is whatever the background cannot be reached from, by steps along
    sides from any border of the image: a body that fills the frame may cut the background into parts, of which only
    some hold a corner. Air inside a CT's body is thus body, the table usually is not. Where the background is not
    exactly 0 (JPEG, noise) give a threshold; where there is none, as in most cropped radiographs, the body is nearly
    the whole image.

    Args:
        image: (H, W) or (1, H, W), uint8 or float in [0, 1].
        threshold: the body is brighter than this, in [0, 1).

    Returns:
        bool (H, W); all False where nothing is brighter than the threshold.

    Raises:
        UserError: an image that is not grey, finite and in range, or a threshold out of range.
    """
    image = _check_image(image, "image")
    if not 0 <= threshold < 1:
        raise UserError(f"the body's threshold must be at least 0 and below 1, got {threshold}; take 0")
    regions = label(_unit(image) > threshold, connectivity=2)
    sizes = np.bincount(regions.ravel())
    if len(sizes) == 1:
        return np.zeros(image.shape, dtype=bool)
    return ndimage.binary_fill_holes(regions == 1 + int(np.argmax(sizes[1:])))


def top_patches(scores: ArrayLike, patch: int, count: int = 1, *, overlap: bool = False) -> tuple[Patch, ...]:
    """The highest scoring patches, best first; the first in reading order where scores tie.

    Args:
        scores: (H - patch + 1, W - patch + 1) of :func:`mse_by_patch` or :func:`wasserstein_by_patch`.
        patch: side in pixels that the scores were computed with.
        count: how many.
        overlap: whether patches may share pixels. Without, each is the best of those apart from all before.

    Returns:
        ``count`` patches, or fewer where no more find room.

    Raises:
        UserError: scores that are not a map of finite numbers, or numbers out of range.
    """
    scores = _check_map(scores, patch)
    if count < 1:
        raise UserError(f"count must be at least 1, got {count}; take 1")
    if overlap:
        order = np.argsort(-scores, axis=None, kind="stable")[:count]
        return tuple(_patch_at(scores, patch, int(position)) for position in order)
    left = scores.copy()
    found: list[Patch] = []
    while len(found) < count:
        best = _patch_at(left, patch, int(np.argmax(left)))
        if best.score == -np.inf:
            break
        found.append(best)
        near = (slice(max(start - patch + 1, 0), start + patch) for start in (best.row, best.column))
        left[tuple(near)] = -np.inf
    return tuple(found)


def heat_map(scores: ArrayLike, patch: int, reduce: str = "mean") -> NDArray[np.float64]:
    """Score of each pixel, from the patches that cover it.

    Args:
        scores: (H - patch + 1, W - patch + 1) of :func:`mse_by_patch` or :func:`wasserstein_by_patch`.
        patch: side in pixels that the scores were computed with.
        reduce: ``mean`` of those patches, which shows where an anomaly is, or their ``max``, which shows every pixel
            that a high patch contains.

    Returns:
        float64 (H, W).

    Raises:
        UserError: scores that are not a map of finite numbers, or another ``reduce``.
    """
    scores = _check_map(scores, patch)
    if reduce not in ("mean", "max"):
        raise UserError(f"reduce must be mean or max, got {reduce!r}; take mean")
    H, W = (n + patch - 1 for n in scores.shape)
    if reduce == "max":
        padded = np.pad(scores, patch - 1, constant_values=-np.inf)
        middle = patch // 2  # where the filter puts the result of a window
        return ndimage.maximum_filter(padded, patch)[middle : middle + H, middle : middle + W]
    down, across = (
        np.minimum(np.minimum(np.arange(1, side + 1), np.arange(side, 0, -1)), min(patch, n))
        for side, n in zip((H, W), scores.shape, strict=True)
    )
    means = _window_sums(np.pad(scores, patch - 1), patch) / np.outer(down, across)
    # a mean lies between the extremes; the integral image may be a rounding error off
    return np.clip(means, scores.min(), scores.max())


def localisation_rate(
    patches: Sequence[Patch | Sequence[Patch]],
    masks: Sequence[ArrayLike],
    patients: Sequence[str] | None = None,
    *,
    min_pixels: int = 1,
    level: float = 0.95,
    seed: int = 0,
) -> Localisation:
    """Share of the top patches that hit a known anomaly.

    The rate means little without that of chance beside it: a large patch hits a large anomaly wherever it lies.
    The interval is Clopper and Pearson's where each image gives one patch and each patient one image; otherwise
    patches depend on each other and patients are drawn with replacement.

    Args:
        patches: of each image its top patch, or several.
        masks: of each image the anomaly, bool (H, W); every image must have one.
        patients: of each image; each image its own by default.
        min_pixels: a patch hits when it holds so many anomalous pixels.
        level: of confidence, between 0 and 1.
        seed: of the draws.

    Returns:
        Rate with its interval, chance, and each hit.

    Raises:
        UserError: no image, lists that do not match, an image without anomaly or patches, a patch outside its mask, or
            several patches that are all of one image or patient.
    """
    check_level(level)
    groups = [(found,) if isinstance(found, Patch) else tuple(found) for found in patches]
    if not groups or len(groups) != len(masks):
        raise UserError(f"patches and masks must be as many, at least 1, got {len(groups)} and {len(masks)}")
    if patients is not None and len(patients) != len(groups):
        raise UserError(f"patients must be given for each of the {len(groups)} images, got {len(patients)}")
    if min_pixels < 1:
        raise UserError(f"min_pixels must be at least 1, got {min_pixels}; take 1")
    hits, chances = [], []
    for number, (group, mask) in enumerate(zip(groups, masks, strict=True)):
        mask = _check_mask(mask, None, f"mask {number}")
        if not group or not mask.any():
            lacks = "patch" if mask.any() else "anomalous pixel"
            raise UserError(
                f"every image needs a patch and an anomaly, got no {lacks} in number {number}; leave it out"
            )
        held = {}
        for size in {found.size for found in group}:
            _check_patch(size, mask.shape)
            held[size] = _window_sums(mask, size) >= min_pixels
        for found in group:
            if not (0 <= found.row < held[found.size].shape[0] and 0 <= found.column < held[found.size].shape[1]):
                raise UserError(
                    f"patches must lie inside their masks, got one at ({found.row}, {found.column}) of side "
                    f"{found.size} in a mask of shape {mask.shape}; give masks of the scored size"
                )
        hits.append(tuple(bool(held[found.size][found.row, found.column]) for found in group))
        chances.extend(float(held[found.size].mean()) for found in group)
    flat = np.concatenate(hits)
    names = np.arange(len(groups)) if patients is None else np.asarray(patients, dtype=str)
    names = names.repeat([len(group) for group in groups])
    return Localisation(
        replace(_rate(flat, names, level, seed), n_reference=len(groups)), float(np.mean(chances)), tuple(hits)
    )


def _wasserstein_strip(image: NDArray[np.uint8], reconstruction: NDArray[np.uint8], patch: int) -> NDArray[np.int64]:
    """Sum over the grey levels of |difference of the cumulative counts| of every patch."""
    # the narrower the integers, the more of them a vector instruction adds
    across, both, total_type = (np.min_scalar_type(-largest - 1) for largest in (patch, patch**2, 255 * patch**2))
    counts = np.bincount(image.ravel(), minlength=256) + np.bincount(reconstruction.ravel(), minlength=256)
    levels = np.flatnonzero(counts).astype(np.uint8)
    total = np.zeros([side - patch + 1 for side in image.shape], dtype=total_type)
    # between two levels that occur the counts stay as they are
    for level, gap in zip(levels[:-1], np.diff(levels), strict=True):
        difference = (image <= level).view(np.int8) - (reconstruction <= level).view(np.int8)
        sums = _running_sums(_running_sums(difference, patch, 1, across), patch, 0, both)
        np.abs(sums, out=sums)
        total += sums if gap == 1 else sums * total_type.type(gap)
    return total


def _running_sums(values: NDArray, size: int, axis: int, dtype: np.dtype) -> NDArray:
    """Sums over all windows of ``size`` along an axis, put together from windows of 1, 2, 4, ... values."""

    def cut(array: NDArray, start: int, length: int) -> NDArray:
        return array[start : start + length] if axis == 0 else array[:, start : start + length]

    length = values.shape[axis] - size + 1
    doubled, width = values.astype(dtype, copy=False), 1
    total, done = None, 0
    while True:
        if size & width:
            part = cut(doubled, done, length)
            total = part if total is None else total + part
            done += width
        if 2 * width > size:
            return total
        rest = doubled.shape[axis] - width
        doubled = cut(doubled, 0, rest) + cut(doubled, width, rest)
        width *= 2


def _window_sums(values: NDArray, size: int) -> NDArray:
    """(H - size + 1, W - size + 1) sums over all squares, by an integral image."""
    integral = np.pad(np.cumsum(np.cumsum(values, axis=0), axis=1), ((1, 0), (1, 0)))
    return integral[size:, size:] - integral[:-size, size:] - integral[size:, :-size] + integral[:-size, :-size]


def _squares(image: NDArray, reconstruction: NDArray) -> tuple[NDArray, float]:
    """Squared differences, and the largest intensity; whole numbers for uint8, so that their sums are exact."""
    kind, peak = (np.int64, 255.0) if image.dtype == np.uint8 else (np.float64, 1.0)
    difference = image.astype(kind) - reconstruction
    return difference * difference, peak


def _unit(values: NDArray) -> NDArray[np.float64]:
    return values / 255.0 if values.dtype == np.uint8 else values


def _levels(values: NDArray) -> NDArray[np.uint8]:
    return values if values.dtype == np.uint8 else np.rint(values * 255).astype(np.uint8)


def _patch_at(scores: NDArray[np.float64], patch: int, position: int) -> Patch:
    row, column = divmod(position, scores.shape[1])
    return Patch(row, column, patch, float(scores[row, column]))


def _rate(hits: NDArray[np.bool_], names: NDArray, level: float, seed: int) -> Estimate:
    """Share of hits; patches of one name depend on each other."""
    n, independent = len(hits), len(np.unique(names))
    value, note = float(hits.mean()), "exact binomial interval"
    if independent < n:
        found = bootstrap_mean(hits, names, level=level, seed=seed)
        if found.low < found.high:
            # moving the resamples back may have moved an end over the edge
            return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))
        note += f" for {independent} images or patients, as all their patches agree"
    low, high = exact_binomial(round(value * independent), independent, level)
    return Estimate(value, low, high, n, n, level, note)


def _check_pair(image: ArrayLike, reconstruction: ArrayLike) -> tuple[NDArray, NDArray]:
    image, reconstruction = _check_image(image, "image"), _check_image(reconstruction, "reconstruction")
    if image.shape != reconstruction.shape:
        raise UserError(
            f"image and reconstruction must have one shape, got {image.shape} and {reconstruction.shape}; "
            "resize the image to the generator's size first"
        )
    if image.dtype != reconstruction.dtype:
        raise UserError(
            f"image and reconstruction must be of one kind, got {image.dtype} and {reconstruction.dtype}; "
            "give both as uint8 or both as floating point in [0, 1]"
        )
    return image, reconstruction


def _check_image(values: ArrayLike, name: str) -> NDArray:
    """(H, W), uint8 or float64 in [0, 1]."""
    values = _plane(np.asarray(values), name)
    if values.dtype == np.uint8:
        return values
    if not np.issubdtype(values.dtype, np.floating):
        raise UserError(f"the {name} must be uint8 or floating point in [0, 1], got {values.dtype}; convert it")
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise UserError(f"the {name} must be finite, got {int((~np.isfinite(values)).sum())} NaN or infinite pixels")
    low, high = float(values.min()), float(values.max())
    if low < -RANGE_SLACK or high > 1 + RANGE_SLACK:
        raise UserError(f"the {name} must lie in [0, 1], got {low:g} to {high:g}; rescale or clip it")
    return np.clip(values, 0, 1)


def _check_mask(values: ArrayLike, shape: tuple[int, ...] | None, name: str) -> NDArray[np.bool_]:
    values = _plane(np.asarray(values), name)
    if shape is not None and values.shape != shape:
        raise UserError(f"the {name} must have the image's shape {shape}, got {values.shape}")
    if values.dtype.kind not in "biuf" or not np.isfinite(values).all():
        raise UserError(f"the {name} must be boolean or finite numbers, got {values.dtype}; give 0 and 1")
    return values != 0


def _plane(values: NDArray, name: str) -> NDArray:
    if values.ndim == 3 and len(values) == 1:
        values = values[0]
    if values.ndim != 2 or not values.size:
        raise UserError(f"the {name} must be grey, (H, W) or (1, H, W), got shape {values.shape}; convert it to grey")
    return values


def _check_map(scores: ArrayLike, patch: int) -> NDArray[np.float64]:
    scores = _plane(np.asarray(scores, dtype=np.float64), "map of patches")
    if not np.isfinite(scores).all():
        raise UserError("the map of patches must be finite, got NaN or infinite scores")
    if patch < 1:
        raise UserError(f"patch must be at least 1, got {patch}; take {PATCH}")
    return scores


def _check_patch(patch: int, shape: tuple[int, ...]) -> None:
    if not 1 <= patch <= min(shape):
        raise UserError(
            f"patch must be between 1 and the image's shorter side, got {patch} for {shape}; take a smaller"
        )
