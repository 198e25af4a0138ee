"""Batches of small images from a pyramid against decoding and resizing on the fly; and what building it takes."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import Dataset
from monai.transforms import Compose, LoadImaged
from PIL import Image

from medgen.data import (
    GrowingDataLoader,
    GrowthSchedule,
    ImagePyramid,
    MedicalImageReader,
    ResumableDataLoader,
    pyramid,
)
from medgen.transforms import ResizeShorterSided

SIDE, IMAGES, BATCH = 512, 256, 32
RESOLUTIONS = (4, 16, 64)
STEPS, ROUNDS, WORKERS = 6, 3, 2
LOAD = LoadImaged("image", reader=MedicalImageReader, ensure_channel_first=True, image_only=True)


def make_data(folder: Path) -> list[dict[str, Any]]:
    """PNGs with the spectrum of a blurred, noisy picture."""
    random, items = np.random.default_rng(0), []
    for number in range(IMAGES):
        coarse = Image.fromarray(random.random((32, 32), dtype=np.float32))
        smooth = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        pixels = smooth + random.normal(0, 0.01, (SIDE, SIDE))
        Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8)).save(folder / f"{number}.png")
        items.append({"image": str(folder / f"{number}.png")})
    return items


def on_the_fly(items: list[dict[str, Any]], resolution: int) -> Iterator[dict[str, Any]]:
    """Each image decoded and resized each time, by two worker processes."""
    transform = Compose([LOAD, ResizeShorterSided("image", size=resolution)])
    return iter(ResumableDataLoader(Dataset(items, transform), batch_size=BATCH, num_workers=WORKERS))


def from_pyramid(images: ImagePyramid, resolution: int) -> Iterator[dict[str, Any]]:
    """Rows of the level's array."""
    return iter(GrowingDataLoader(images, GrowthSchedule([resolution], [BATCH], [1e-3], [1], [0]), mirror=True))


def batches_per_second(batches: Iterator[dict[str, Any]], steps: int) -> float:
    """Once the loader runs and what it has read ahead is taken."""
    for _ in islice(batches, 2 * WORKERS + 1):
        pass
    start = time.perf_counter()
    for _ in islice(batches, steps):
        pass
    return steps / (time.perf_counter() - start)


def seconds_to_build(items: list[dict[str, Any]], folder: Path, workers: int) -> float:
    """Wall-clock seconds, the start of the processes included."""
    start = time.perf_counter()
    ImagePyramid(items, Compose([LOAD]), SIDE, 1, folder, workers)
    return time.perf_counter() - start


def run() -> list[tuple[str, float, str]]:
    """Measure the two in turn; a ratio of 100 is a hundred batches in the time of one.

    Returns:
        (name, ratio, detail) per comparison.
    """
    results = []
    pyramid.WORTH_A_PROCESS = 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        items = make_data(folder)
        images = ImagePyramid(items, Compose([LOAD]), SIDE, 1, folder / "cache")
        for resolution in RESOLUTIONS:
            pairs = [
                (
                    batches_per_second(from_pyramid(images, resolution), 100 * STEPS),
                    batches_per_second(on_the_fly(items, resolution), STEPS),
                )
                for _ in range(ROUNDS)
            ]
            ratio = statistics.median(ours / theirs for ours, theirs in pairs)
            ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
            detail = f"{ours:,.0f} batches/s against {theirs:.1f} of {WORKERS} workers"
            results.append((f"pyramid / on the fly, {resolution}×{resolution}, batch {BATCH}", ratio, detail))

        few, rates = IMAGES // 8, []
        for workers in (0, 1, 2):
            # the difference of two builds: without the start of the processes
            first, whole = (
                seconds_to_build(items[:count], folder / f"{workers}-{count}", workers) for count in (few, IMAGES)
            )
            rates.append((IMAGES - few) / (whole - first))
        for workers in (1, 2):
            name = f"building at {SIDE}×{SIDE}, {workers} worker(s) / this process"
            results.append((name, rates[workers] / rates[0], f"{rates[workers]:.0f} images/s against {rates[0]:.0f}"))
    return results


if __name__ == "__main__":
    for name, ratio, detail in run():
        print(f"{name}: {ratio:.2f}, {detail}")
