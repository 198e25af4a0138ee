"""Scores of every patch of an image against the plain double loop over skimage's MSE and scipy's distance."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.stats import wasserstein_distance
from skimage.metrics import mean_squared_error

from medgen.metrics.anomaly import mse_by_patch, wasserstein_by_patch

SIDES = (256, 512)
PATCH = 32
ROUNDS = 5
LOOP_OFFSETS = 500  # of all, that the plain loop does in a round; its time goes with their number
WARM_UP = 20


def _pair(side: int) -> tuple[np.ndarray, np.ndarray]:
    """An image of all grey levels, and a smoother one with noise of its own."""
    rng = np.random.default_rng(side)
    image = gaussian_filter(rng.standard_normal((side, side)), 3)
    image = np.clip((image / image.std() + 2.5) / 5, 0, 1)
    reconstruction = np.clip(gaussian_filter(image, 2) + 0.03 * rng.standard_normal(image.shape), 0, 1)
    return tuple((values * 255).round().astype(np.uint8) for values in (image, reconstruction))


def _loop(score: Callable[[np.ndarray, np.ndarray], float], pair: tuple, offsets: np.ndarray) -> tuple[float, list]:
    """Seconds an offset, and the scores."""
    start = time.perf_counter()
    scores = [score(*(values[r : r + PATCH, c : c + PATCH] for values in pair)) for r, c in offsets]
    return (time.perf_counter() - start) / len(offsets), scores


def _plain_mse(image: np.ndarray, reconstruction: np.ndarray) -> float:
    return mean_squared_error(image, reconstruction) / 255**2


def _plain_wasserstein(image: np.ndarray, reconstruction: np.ndarray) -> float:
    return wasserstein_distance(image.ravel(), reconstruction.ravel()) / 255


def run() -> list[tuple[str, float, str]]:
    """Measure; a ratio above 1 is how many times faster than the loop.

    Returns:
        (name, ratio, detail) per comparison.
    """
    results = []
    for side in SIDES:
        pair, count = _pair(side), (side - PATCH + 1) ** 2
        offsets = np.random.default_rng(0).integers(0, side - PATCH + 1, (LOOP_OFFSETS, 2))
        for name, ours, plain in (
            ("MSE", mse_by_patch, _plain_mse),
            ("Wasserstein distance", wasserstein_by_patch, _plain_wasserstein),
        ):
            ours(*pair, PATCH)
            _loop(plain, pair, offsets[:WARM_UP])
            seconds: dict[str, list[float]] = {"ours": [], "loop": []}
            for _ in range(ROUNDS):
                start = time.perf_counter()
                found = ours(*pair, PATCH)
                seconds["ours"].append(time.perf_counter() - start)
                each, expected = _loop(plain, pair, offsets)
                seconds["loop"].append(each * count)
            fast, slow = (statistics.median(values) for values in seconds.values())
            error = float(np.abs(found[offsets[:, 0], offsets[:, 1]] - expected).max())
            results.append(
                (
                    f"{name} of every patch of {PATCH} px, {side} px image, against a plain double loop",
                    slow / fast,
                    f"{1000 * fast:.1f} ms against {slow:.1f} s for {count} offsets (median of {ROUNDS}; loop timed "
                    f"on {LOOP_OFFSETS} of them and scaled; largest difference {error:.0e})",
                )
            )
    return results


if __name__ == "__main__":
    for name, ratio, detail in run():
        print(f"{name}: {ratio:.0f}x, {detail}")
