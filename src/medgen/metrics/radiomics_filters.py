"""Normalisation, resampling and filters that come before radiomic features, as SimpleITK and PyWavelets give them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pywt
import SimpleITK as sitk

from medgen.errors import UserError

__all__ = ["halve", "halve_mask", "laplacian_of_gaussian", "normalise", "wavelet_bands"]

# Rounding matters here. The wavelet bands of a flat part of an image (a black border) are zero but for rounding, and
# zero is an edge of grey levels: which of two levels the whole border gets hangs on the last bit of its intensity. So
# sums are taken in ITK's order throughout, and the results are ITK's to the last bit.

_POLE = np.sqrt(3.0) - 2.0  # of the cubic B-spline
_HORIZON = int(np.ceil(np.log(1e-10) / np.log(-_POLE)))  # terms of a starting value after which ITK stops
_BLOCK = 32  # rows that are interpolated at a time, so that they stay in the cache


def normalise(image: np.ndarray, scale: float) -> np.ndarray:
    """Zero mean and a standard deviation (n - 1) of ``scale`` over the whole image, mask or not.

    Args:
        image: (H, W) whole numbers, which make both sums exact.
        scale: standard deviation wanted.

    Returns:
        (H, W) float64.

    Raises:
        UserError: the image is constant.
    """
    values = image.astype(np.float64)
    if values.min() == values.max():
        raise UserError(
            f"an image to be normalised must not be constant, got {image.flat[0]:g} in every pixel; leave it out"
        )
    n, total = values.size, values.sum()
    deviation = np.sqrt((np.sum(values * values) - total * total / n) / (n - 1))
    values -= total / n
    values *= 1 / deviation
    values *= scale
    return values


def _spline_coefficients(values: np.ndarray) -> np.ndarray:
    """Cubic B-spline coefficients along the first axis, mirrored at both ends; overwrites its argument.

    Unser, Aldroubi and Eden 1993, part II, section II.C.
    """
    n = len(values)
    if n == 1:
        return values
    values *= (1 - _POLE) * (1 - 1 / _POLE)
    power = _POLE
    if n > _HORIZON:
        first = values[0].copy()
        for k in range(1, _HORIZON):
            first += power * values[k]
            power *= _POLE
    else:
        mirrored = _POLE ** float(n - 1)
        first = values[0] + mirrored * values[-1]
        mirrored *= mirrored / _POLE
        for k in range(1, n - 1):
            first += (power + mirrored) * values[k]
            power *= _POLE
            mirrored /= _POLE
        first /= 1 - power * power
    values[0] = first
    work = np.empty_like(first)
    for before, here in pairwise(values):
        np.multiply(before, _POLE, out=work)
        here += work
    values[-1] = _POLE / (_POLE * _POLE - 1) * (_POLE * values[-2] + values[-1])
    for after, here in pairwise(values[::-1]):
        np.subtract(after, here, out=work)
        np.multiply(work, _POLE, out=here)
    return values


def _spline_weights(t: np.ndarray | float) -> tuple[np.ndarray | float, ...]:
    """Weights of the four coefficients around a position ``t`` (0 to 1) past the second of them."""
    last = 1 / 6 * t * t * t
    first = 1 / 6 + 0.5 * t * (t - 1) - last
    third = t + first - 2 * last
    return first, 1 - first - third - last, third, last


def _coarse_span(low: int, extent: int, size: int, margin: int) -> tuple[int, int]:
    """First index and number of the new pixels that cover an interval of old ones and a margin around it."""
    begin = max(int(np.floor((low - 0.5) / 2 - margin)), 0)
    end = min(int(np.ceil((low + extent - 0.5) / 2 + margin)), (size + 1) // 2 - 1)
    return begin, end - begin + 1


def _positions(begin: int, count: int, fastest: bool) -> np.ndarray:
    """Centres of the new pixels on an axis, in old pixels."""
    start = 0.5 + 2 * begin
    if not fastest:
        return start + 2 * np.arange(count)
    # ITK walks from a line's start to its end by fractions of its length, which are not always two pixels exactly.
    return start + np.arange(count) / count * (start + 2 * count - start)


def halve(image: np.ndarray, box: tuple[int, int, int, int], margin: int, as_slice: bool) -> np.ndarray:
    """Cubic B-spline interpolation onto pixels twice as wide, without smoothing first.

    Args:
        image: (H, W) float64.
        box: row, column, height and width of the region that must be covered.
        margin: new pixels kept around it, as far as the image reaches.
        as_slice: sum as for one slice of a volume, whose three weights across slices add up to 1 but for rounding.

    Returns:
        (h, w) float64; zero where a new pixel's centre lies outside the image.
    """
    top, left, height, width = box
    (row, rows), (column, columns) = (
        _coarse_span(low, extent, size, margin)
        for low, extent, size in zip((top, left), (height, width), image.shape, strict=True)
    )
    along_rows = _spline_coefficients(np.array(image.T, order="C"))
    coefficients = _spline_coefficients(np.array(along_rows.T, order="C"))
    # Taps are at 2i - 1 to 2i + 2: every second sample, from four starts.
    mirrored = np.pad(coefficients, (1, 2), "reflect")[2 * row : 2 * (row + rows + 1)]
    taps = [
        np.ascontiguousarray(mirrored[:, 2 * column + start : 2 * (column + columns) + start : 2]) for start in range(4)
    ]
    positions = _positions(column, columns, fastest=True)
    across = _spline_weights(positions - np.floor(positions))
    down = _spline_weights(0.5)
    weights = [(y, x, across[x] * down[y]) for y in range(4) for x in range(4)]
    if as_slice:
        weights = [(y, x, weight * z) for z in _spline_weights(0.0)[:3] for y, x, weight in weights]

    result = np.zeros((rows, columns))
    for start in range(0, rows, _BLOCK):
        block = result[start : start + _BLOCK]
        work = np.empty_like(block)
        for y, x, weight in weights:
            np.multiply(taps[x][2 * start + y :: 2][: len(block)], weight, out=work)
            block += work
    result[_positions(row, rows, fastest=False) >= image.shape[0] - 0.5] = 0
    result[:, positions >= image.shape[1] - 0.5] = 0
    return result


def halve_mask(mask: np.ndarray, box: tuple[int, int, int, int], margin: int) -> np.ndarray:
    """Nearest neighbour of a region on the grid of :func:`halve`.

    Args:
        mask: (H, W) bool.
        box: row, column, height and width of the region.
        margin: new pixels kept around it.

    Returns:
        (h, w) bool.
    """
    top, left, height, width = box
    row, rows = _coarse_span(top, height, mask.shape[0], margin)
    column, columns = _coarse_span(left, width, mask.shape[1], margin)
    result = np.zeros((rows, columns), bool)
    # a position half-way between two pixels is the upper one's, and past the last pixel it is outside
    down, across = (
        np.floor(_positions(begin, count, fastest) + 0.5).astype(np.intp)
        for begin, count, fastest in ((row, rows, False), (column, columns, True))
    )
    down, across = down[down < mask.shape[0]], across[across < mask.shape[1]]
    result[: len(down), : len(across)] = mask[np.ix_(down, across)]
    return result


def laplacian_of_gaussian(image: np.ndarray, sigma: float, spacing: float) -> np.ndarray:
    """Laplacian of the image smoothed by a Gaussian, normalised across scales.

    Args:
        image: (H, W) float64.
        sigma: standard deviation of the Gaussian, in units of the original pixels.
        spacing: width of a pixel in the same units.

    Returns:
        (H, W) float32.

    Raises:
        UserError: the image is smaller than the recursive filter can take.
    """
    least = max(4, int(np.ceil(sigma / spacing)) + 1)
    if min(image.shape) < least:
        raise UserError(
            f"LoG of sigma {sigma:g} wants at least {least} pixels a side, got an image of "
            f"{image.shape[0]} x {image.shape[1]}; use larger images or leave that sigma out of log_sigmas"
        )
    source = sitk.GetImageFromArray(image)
    source.SetSpacing((spacing, spacing))
    laplacian = sitk.LaplacianRecursiveGaussianImageFilter()
    laplacian.SetNormalizeAcrossScale(True)
    laplacian.SetSigma(sigma)
    laplacian.SetNumberOfThreads(1)  # images are worked on side by side instead
    return sitk.GetArrayFromImage(laplacian.Execute(source))


def wavelet_bands(image: np.ndarray) -> dict[str, np.ndarray]:
    """One level of the undecimated Coiflet-1 transform.

    Args:
        image: (H, W) float64.

    Returns:
        Four (H, W) float64 images under LH, HL, HH and LL; the first letter is the filter along the rows' direction x,
        the second along y.
    """
    height, width = image.shape
    even = np.pad(image, ((0, height % 2), (0, width % 2)), "wrap")
    bands = pywt.swtn(even, "coif1", level=1, axes=(1, 0))[0]
    names = {"LH": "ad", "HL": "da", "HH": "dd", "LL": "aa"}
    return {name: np.ascontiguousarray(bands[key][:height, :width]) for name, key in names.items()}
