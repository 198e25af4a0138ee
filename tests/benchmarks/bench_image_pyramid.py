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
from monai.transforms import Compose, LoadImaged, Transform
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


class Stamped(Transform):
    """Decodes, and writes down when."""

    def __init__(self, record: str) -> None:
        self.record = record

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        with open(self.record, "a") as file:
            file.write(f"{time.time()}\n")
        return LOAD(data)


def images_built_per_second(items: list[dict[str, Any]], folder: Path, workers: int) -> float:
    """Over the second half of a build, when all processes have started."""
    record = folder / f"{workers}.txt"
    ImagePyramid(items, Stamped(str(record)), SIDE, 1, folder, workers)
    stamps = sorted(map(float, record.read_text().split()))[len(items) // 2 :]
    return (len(stamps) - 1) / (stamps[-1] - stamps[0])


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

        alone, *helped = (images_built_per_second(items, folder, workers) for workers in (0, 1, 2))
        for workers, rate in enumerate(helped, start=1):
            name = f"building at {SIDE}×{SIDE}, {workers} worker(s) / this process"
            results.append((name, rate / alone, f"{rate:.0f} images/s against {alone:.0f}"))
    return results


if __name__ == "__main__":
    for name, ratio, detail in run():
        print(f"{name}: {ratio:.2f}, {detail}")
