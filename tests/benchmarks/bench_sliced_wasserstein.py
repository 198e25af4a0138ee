"""Sliced Wasserstein distance against the plain procedure, and its peak memory at the paper's number of images."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy.ndimage import convolve

from medgen.metrics.sliced_wasserstein import (
    PATCHES,
    patch_descriptors,
    pyramid_sides,
    set_descriptors,
    sliced_wasserstein,
)

IMAGES, SIDE = 1000, 64  # of each set
LARGE, LARGE_IMAGES = 512, 48  # for descriptors alone
ROUNDS = 3
PAPER_IMAGES = 2**14
KERNEL = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]).astype(np.float32) / 256


def made(count: int, side: int, seed: int) -> np.ndarray:
    """Smooth structure and noise, (N, 1, S, S) float32 in [0, 1]."""
    rng = np.random.default_rng(seed)
    coarse = np.kron(rng.random((count, 1, 8, 8), dtype=np.float32), np.ones((side // 8, side // 8), np.float32))
    return np.clip(coarse + 0.05 * rng.standard_normal((count, 1, side, side), dtype=np.float32), 0, 1)


def plain_descriptors(images: np.ndarray, batch: int = 32) -> list[np.ndarray]:
    """Section 5 of the paper step by step: a two-dimensional convolution, zeros between pixels, one index per pixel."""
    rng = np.random.default_rng(0)
    found: list[list[np.ndarray]] = [[] for _ in pyramid_sides(images.shape[-1])]
    for start in range(0, len(images), batch):
        rest = images[start : start + batch]
        for number, side in enumerate(pyramid_sides(images.shape[-1])):
            level = rest
            if side > 16:
                smaller = convolve(rest, KERNEL[None, None], mode="mirror")[:, :, ::2, ::2]
                doubled = np.zeros_like(rest)
                doubled[:, :, ::2, ::2] = smaller
                level = rest - convolve(doubled, 4 * KERNEL[None, None], mode="mirror")
                rest = smaller
            image = np.repeat(np.arange(len(level)), PATCHES)[:, None, None]
            corner = rng.integers(side - 6, size=(2, len(image), 1, 1))
            offset = np.arange(7)
            patches = level[image, 0, corner[0] + offset[:, None], corner[1] + offset]
            found[number].append(patches.reshape(-1, 49))
    return [np.concatenate(parts) for parts in found]


def plain_distance(real: list[np.ndarray], fake: list[np.ndarray]) -> np.ndarray:
    """Whole columns sorted, 128 directions at a time."""
    rng = np.random.default_rng([0, 0])
    towards = rng.standard_normal((512, 49))
    towards = (towards / np.linalg.norm(towards, axis=1, keepdims=True)).astype(np.float32)
    distances = []
    for levels in zip(real, fake, strict=True):
        x, y = ((of - of.mean()) / of.std() for of in levels)
        parts = []
        for block in np.split(towards, 4):
            onto_x, onto_y = (np.sort(of @ block.T, axis=0) for of in (x, y))
            parts.append(np.abs(onto_x - onto_y).mean())
        distances.append(1000 * np.mean(parts))
    return np.array(distances)


def _timed(function, *arguments) -> tuple[float, object]:
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def run() -> Iterator[tuple[str, float, str]]:
    """Measure; a ratio above 1 is how many times faster than the plain procedure.

    Yields:
        (name, ratio, detail) per comparison.
    """
    for count, side in ((IMAGES, SIDE), (LARGE_IMAGES, LARGE)):
        images = made(count, side, 0)
        rounds = [(_timed(set_descriptors, images)[0], _timed(plain_descriptors, images)[0]) for _ in range(ROUNDS)]
        ours, plain = (1000 / count * statistics.median(times) for times in zip(*rounds, strict=True))
        detail = f"{ours:.2f} ms an image against {plain:.2f} (median of {ROUNDS})"
        yield f"patches of all levels, {side} px", plain / ours, detail
    sets = [set_descriptors(made(IMAGES, SIDE, seed)) for seed in (0, 1)]
    tables = [[of[:, level].reshape(-1, 49) for level in range(of.shape[1])] for of in sets]
    rounds = [(_timed(sliced_wasserstein, *sets), _timed(plain_distance, *tables)) for _ in range(ROUNDS)]
    ours, plain = (statistics.median(result[0] for result in results) for results in zip(*rounds, strict=True))
    difference = np.abs(rounds[0][0][1] / rounds[0][1][1] - 1).max()
    detail = f"{ours:.2f} s against {plain:.2f} (median of {ROUNDS}), relative difference {difference:.0e}"
    yield f"distance of {IMAGES} and {IMAGES} images, {SIDE} px, 512 directions", plain / ours, detail


def paper_size() -> None:
    """Seconds and peak memory of one level at the paper's size, beside the patches themselves."""
    pair = [patch_descriptors(made(PAPER_IMAGES, 16, seed), range(PAPER_IMAGES)) for seed in (0, 1)]
    held = sum(of.nbytes for of in pair) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # what making them took is forgotten (Linux)
    before = _resident("VmRSS")
    seconds, _ = _timed(sliced_wasserstein, *pair)
    peak = _resident("VmHWM") - before
    print(
        f"one grey level of {PAPER_IMAGES} and {PAPER_IMAGES} images: {seconds:.0f} s, {peak:.0f} MiB beside the "
        f"{held:.0f} MiB of their patches"
    )


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--paper_size", action="store_true", help="measure that alone")
    if parser.parse_args().paper_size:
        paper_size()
    else:
        for name, ratio, detail in run():
            print(f"{name}: {ratio:.2f}x, {detail}", flush=True)
        # in a process of its own: what the comparisons took would count as its memory
        subprocess.run([sys.executable, __file__, "--paper_size"], check=True)
