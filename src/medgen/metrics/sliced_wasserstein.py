"""Sliced Wasserstein distance between patches of two image sets, level by level of a Laplacian pyramid.

Karras et al. 2018 (arXiv 1710.10196), section 5: the coarse levels tell whether large structures agree, the finest one
whether sharpness and noise do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray

from medgen.data.workers import default_workers
from medgen.errors import UserError

__all__ = [
    "laplacian_pyramid",
    "patch_descriptors",
    "pyramid_sides",
    "set_descriptors",
    "sliced_wasserstein",
    "sliced_wasserstein_distance",
]

# Shapes: B images of a batch, N and M of a set, C channels, S side of an image, L levels, P patches of an image and
# level, K pixels of a patch

PATCH = 7  # pixels; this and the next three: section 5 of the paper
PATCHES = 128  # of an image and level
DIRECTIONS = 4 * 128  # four repeats of 128, which are averaged
COARSEST = 16  # side of the last level
SCALE = 1000.0  # the paper's tables are "× 10³"
SMALLEST = 4  # pixels; the first images of a growing generator
FLAT = 1e-6  # standard deviation below which a level holds rounding alone; an 8-bit step is 4e-3
CHUNK = 2**18  # pixels whose pyramid is made at a time: more would leave a core's cache
BLOCK = 2**25  # projections of a set that are held at a time: 128 MiB
REAL, SAMPLES = 0, 1  # roles of a set


def pyramid_sides(side: int) -> tuple[int, ...]:
    """Sides of the levels, finest first: ``side``, half of it, ... down to 16.

    The paper has no images below 16 pixels; those of 8 and 4, with which a growing generator begins, have one level,
    which is the image itself.

    Raises:
        UserError: the side is no power of two from 4.
    """
    if side < SMALLEST or side & (side - 1):
        raise UserError(
            f"the sliced Wasserstein distance takes images whose side is a power of two from {SMALLEST}, got {side} "
            "pixels; resize them"
        )
    sides = [side]
    while sides[-1] > COARSEST:
        sides.append(sides[-1] // 2)
    return tuple(sides)


def laplacian_pyramid(images: ArrayLike) -> list[NDArray[np.float32]]:
    """Band-pass levels of images, finest first, and as the last the low-pass rest (Burt and Adelson 1983).

    A level is what the next smaller image, doubled, does not tell. The smaller image is filtered by
    (1, 4, 6, 4, 1) / 16 along both axes and halved; doubled, it is filtered again. Borders are mirrored about the
    outermost pixel.

    Args:
        images: (B, C, S, S).

    Returns:
        (B, C, s, s) for each s of :func:`pyramid_sides`.

    Raises:
        UserError: images that are not square, and what :func:`pyramid_sides` refuses.
    """
    rest = np.asarray(images, dtype=np.float32)
    if rest.ndim != 4 or rest.shape[2] != rest.shape[3]:
        raise UserError(
            f"the sliced Wasserstein distance takes square images (B, C, S, S), got {rest.shape}; crop or resize them"
        )
    levels = []
    for _ in pyramid_sides(rest.shape[-1])[1:]:
        smaller = _halved(_halved(rest).swapaxes(2, 3)).swapaxes(2, 3)
        levels.append(rest - _doubled(_doubled(smaller).swapaxes(2, 3)).swapaxes(2, 3))
        rest = smaller
    return [*levels, rest]


def patch_descriptors(images: ArrayLike, places: Sequence[int], seed: int = 0, role: int = REAL) -> NDArray[np.float32]:
    """Patches of 7 × 7 pixels at random positions of every level.

    The positions follow from the seed, the role of the set and an image's place in it. They depend neither on batches
    nor on the number of processes. Sets that are compared take different roles: as in the paper's code, each set's
    positions are then its own. Common ones would bring the sets closer than two sets of real images are.

    Args:
        images: (B, C, S, S).
        places: (B,) index of each image in its set.
        seed: of the positions.
        role: of the set: 0 for the real images, 1 for the samples.

    Returns:
        (B, L, P, C, K): P is 128; K is 49, and 16 for images of 4 pixels.

    Raises:
        UserError: as :func:`laplacian_pyramid`.
    """
    images = np.asarray(images, dtype=np.float32)
    parts = _chunks(len(images), images[0].size)
    return np.concatenate(
        [_patches(images[part.start : part.stop], places[part.start : part.stop], seed, role) for part in parts]
    )


def set_descriptors(images: Sequence[ArrayLike] | NDArray, seed: int = 0, role: int = REAL) -> NDArray[np.float32]:
    """:func:`patch_descriptors` of a set, whose images are read a few at a time; 25 KB an image, level and channel.

    Args:
        images: ``len()`` and ``[i]`` -> (C, S, S) in [0, 1], C = 1 or 3, such as a :class:`medgen.data.ImageSet`; or an
            array (N, C, S, S).
        seed: of the positions.
        role: of the set: 0 for the real images, 1 for the samples.

    Returns:
        (N, L, P, C, K).

    Raises:
        UserError: fewer than two images; images of two shapes; values outside [0, 1] or not finite; and as
            :func:`laplacian_pyramid`.
    """
    if len(images) < 2:
        raise UserError(f"a distance between sets takes at least 2 images in each, got {len(images)}; give more images")
    shape = np.shape(images[0])
    found = None
    for places in _chunks(len(images), math.prod(shape)):
        patches = _patches(np.stack([_checked(images[place], shape, place) for place in places]), places, seed, role)
        if found is None:
            found = np.empty((len(images), *patches.shape[1:]), dtype=np.float32)
        found[places.start : places.stop] = patches
    return found


def sliced_wasserstein(
    real: NDArray[np.float32], fake: NDArray[np.float32], *, seed: int = 0, directions: int = DIRECTIONS
) -> NDArray[np.float64]:
    """Sliced Wasserstein distance × 1000 of two sets of patches, level by level.

    Each channel of each set is brought to mean 0 and standard deviation 1 over all its patches, so that brightness and
    contrast of a whole set do not count. Along each random direction the distance is the exact 1-Wasserstein distance:
    for sets of one size the paper's mean absolute difference of the sorted projections, for others that of the
    quantile functions. It has a bias that falls with the number of images, like the Fréchet distance.

    Args:
        real: (N, L, P, C, K) of :func:`patch_descriptors`.
        fake: (M, L, P, C, K).
        seed: of the directions.
        directions: how many; half of them are the first half.

    Returns:
        (L,), finest level first.

    Raises:
        UserError: patches of images that differ in size or mode, or that are not finite.
    """
    if real.shape[1:] != fake.shape[1:]:
        raise UserError(
            "both sets must have images of one size and mode, got patches (levels, patches, channels, pixels) "
            f"{real.shape[1:]} and {fake.shape[1:]}; bring the images to one size first"
        )
    rng = np.random.default_rng([seed, 0])
    towards = rng.standard_normal((directions, real.shape[3] * real.shape[4]))
    towards = (towards / np.linalg.norm(towards, axis=1, keepdims=True)).astype(np.float32)
    with ThreadPoolExecutor(default_workers()) as threads:
        return np.array(
            [
                SCALE * _mean_distance(_normalised(real[:, level]), _normalised(fake[:, level]), towards, threads)
                for level in range(real.shape[1])
            ]
        )


def sliced_wasserstein_distance(
    real: Sequence[ArrayLike] | NDArray, fake: Sequence[ArrayLike] | NDArray, *, seed: int = 0
) -> dict[int, float]:
    """:func:`sliced_wasserstein` of two sets of images; 0 is best, and reached by no finite set.

    Each set has patches of its own, even a set that is compared with itself, whose distance falls to 0 as images grow
    in number.

    Args:
        real: ``len()`` and ``[i]`` -> (C, S, S) in [0, 1], C = 1 or 3; or an array (N, C, S, S).
        fake: the same; the number of images may be another.
        seed: of the patches' positions and the directions.

    Returns:
        Side of a level -> distance × 1000, finest level first; their mean is the paper's summary.

    Raises:
        UserError: as :func:`set_descriptors` and :func:`sliced_wasserstein`.
    """
    descriptors = (set_descriptors(images, seed, role) for images, role in ((real, REAL), (fake, SAMPLES)))
    distances = sliced_wasserstein(*descriptors, seed=seed)
    return dict(zip(pyramid_sides(np.shape(real[0])[-1]), distances.tolist(), strict=True))


def _halved(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Columns (axis 2) filtered by (1, 4, 6, 4, 1) / 16; every other pixel is computed, which is all that is kept."""
    padded = np.pad(x, ((0, 0), (0, 0), (2, 1), (0, 0)), mode="reflect")
    even, odd = padded[:, :, ::2], padded[:, :, 1::2]
    return (even[:, :, :-2] + even[:, :, 2:] + 6 * even[:, :, 1:-1] + 4 * (odd[:, :, :-1] + odd[:, :, 1:])) / 16


def _doubled(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Columns (axis 2) with zeros between, filtered by (1, 4, 6, 4, 1) / 8, without touching the zeros."""
    # the doubled image ends in a zero, about which the mirror brings the last pixel again
    padded = np.concatenate([x[:, :, 1:2], x, x[:, :, -1:]], axis=2)
    larger = np.empty((*x.shape[:2], 2 * x.shape[2], x.shape[3]), dtype=np.float32)
    larger[:, :, ::2] = (padded[:, :, :-2] + padded[:, :, 2:] + 6 * x) / 8
    larger[:, :, 1::2] = (x + padded[:, :, 2:]) / 2
    return larger


def _chunks(n: int, pixels: int) -> list[range]:
    """Indices of n images in parts of about CHUNK pixels."""
    step = max(1, CHUNK // max(1, pixels))
    return [range(start, min(start + step, n)) for start in range(0, n, step)]


def _patches(images: NDArray[np.float32], places: Sequence[int], seed: int, role: int) -> NDArray[np.float32]:
    levels = laplacian_pyramid(images)
    patch = min(PATCH, levels[-1].shape[-1])
    room = np.array([level.shape[-1] - patch + 1 for level in levels])[:, None]
    corners = [
        np.random.default_rng([seed, 1, role, place]).integers(room, size=(2, len(levels), PATCHES)) for place in places
    ]
    rows, columns = np.stack(corners, axis=1)
    found = np.empty((len(images), len(levels), PATCHES, images.shape[1], patch, patch), dtype=np.float32)
    image = np.arange(len(images))[:, None]
    for number, level in enumerate(levels):
        windows = sliding_window_view(level, (patch, patch), axis=(2, 3))
        found[:, number] = windows[image, :, rows[:, number], columns[:, number]]
    return found.reshape(*found.shape[:4], -1)


def _checked(image: ArrayLike, shape: tuple[int, ...], place: int) -> NDArray[np.float32]:
    image = np.asarray(image, dtype=np.float32)
    if image.shape != shape or image.ndim != 3 or image.shape[0] not in (1, 3):
        raise UserError(
            f"images must all be (1, S, S) or (3, S, S) of one size, got {shape} and, for image {place}, "
            f"{image.shape}; bring them to one size and mode first"
        )
    if not (image.min() >= 0 and image.max() <= 1):  # NaN is neither
        raise UserError(
            f"images must lie in 0..1, got {image.min():g} to {image.max():g} for image {place}; scale or clip them"
        )
    return image


def _normalised(patches: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N, P, C, K) -> (C * K, N * P), each channel with mean 0 and standard deviation 1."""
    n, p, c, k = patches.shape
    # a row for each pixel of a patch: products with directions then lie as rows, and rows are what sorts fast
    table = np.ascontiguousarray(patches.reshape(n * p, c, k).transpose(1, 2, 0))
    for channel in table:
        mean = channel.mean(dtype=np.float64)
        if not np.isfinite(mean):
            raise UserError("patches must be finite, got NaN or infinity; check the images")
        channel -= np.float32(mean)
        deviation = np.sqrt(np.mean([np.square(row).mean(dtype=np.float64) for row in channel]))
        # nothing but rounding would be blown up to a texture of its own
        channel *= np.float32(1 / deviation if deviation > FLAT else 0)
    return table.reshape(c * k, n * p)


def _mean_distance(
    x: NDArray[np.float32], y: NDArray[np.float32], towards: NDArray[np.float32], threads: ThreadPoolExecutor
) -> float:
    """1-Wasserstein distance of the columns of two tables along directions, the mean over them."""
    step = max(1, min(len(towards), BLOCK // max(x.shape[1], y.shape[1])))
    # made once: fresh memory for each block costs as much as sorting it
    onto_x, onto_y = (np.empty((step, table.shape[1]), dtype=np.float32) for table in (x, y))
    total_distance = _comparison(x.shape[1], y.shape[1])
    total = 0.0
    for start in range(0, len(towards), step):
        block = towards[start : start + step]
        rows = [np.matmul(block, table, out=out[: len(block)]) for table, out in ((x, onto_x), (y, onto_y))]
        total += sum(threads.map(total_distance, *(np.array_split(of, default_workers()) for of in rows)))
    return total / len(towards)


def _comparison(n: int, m: int) -> Callable[[NDArray[np.float32], NDArray[np.float32]], float]:
    """The 1-Wasserstein distances of rows of n and of m numbers, summed; the rows are sorted in their place."""
    if n != m:
        # both quantile functions are constant between the multiples of 1/n and 1/m, here in units of 1 / (n m)
        ends = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)
        of_x, of_y = (ends - 1) // m, (ends - 1) // n
        widths = np.diff(ends, prepend=0) / (n * m)

    def total_distance(x: NDArray[np.float32], y: NDArray[np.float32]) -> float:
        x.sort(axis=1)
        y.sort(axis=1)
        total = 0.0
        for a, b in zip(x, y, strict=True):
            if n == m:
                total += np.abs(np.subtract(a, b, out=a), out=a).mean(dtype=np.float64)
            else:
                total += widths @ np.abs(a[of_x] - b[of_y])
        return float(total)

    return total_distance
