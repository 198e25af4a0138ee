"""Peak memory of feature extraction with 1,000 and 10,000 images; two processes that decode against one."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from medgen.data import ImageSet
from medgen.metrics.feature_set import extract_features
from medgen.metrics.protocols import get_protocol

SIDE = 64  # of the images that memory is measured with
WIDTH = 2048  # features an image, as of Inception's last pooling
FILES, FILE_SIDE = 1500, 512
NETWORK_SIDE = 299
ROUNDS = 3


class Synthetic(Sequence):
    """Images made when asked for, so that the set itself takes no memory."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return np.random.default_rng(index).random((1, SIDE, SIDE), dtype=np.float32)


def _peak(count: int) -> tuple[float, float]:
    """MiB that a fresh process took beyond its imports, and its seconds."""
    command = [sys.executable, __file__, str(count)]
    # glibc raises this limit as it goes and then keeps what was freed: its habits are not what is measured
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    added, seconds = json.loads(done.stdout)
    return added, seconds


def _measure_peak(count: int) -> None:
    import torch

    from medgen.metrics.extractors import ModuleFeatures

    torch.manual_seed(0)
    network = ModuleFeatures("module:benchmark", network=torch.nn.Conv2d(1, WIDTH, 8, stride=8))
    with tempfile.TemporaryDirectory() as cache:
        # what the first call loads is no part of the set
        extract_features(Synthetic(300), network.protocol, extractor=network, cache_dir=cache, progress=False)
        Path("/proc/self/clear_refs").write_text("5")  # the imports' own peak is forgotten (Linux)
        before, start = _resident("VmRSS"), time.perf_counter()
        found = extract_features(Synthetic(count), network.protocol, extractor=network, cache_dir=cache, progress=False)
        after, seconds = _resident("VmHWM"), time.perf_counter() - start
        assert found.features.shape == (count, WIDTH)
    print(json.dumps([after - before, seconds]))


def _resident(field: str) -> float:
    """MiB; getrusage would also count what the parent process held when it started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def _write_files(folder: Path) -> None:
    """Grey PNGs with the coarse structure and the grain of a radiograph."""
    for number in range(FILES):
        rng = np.random.default_rng(number)
        coarse = Image.fromarray(rng.random((8, 8), dtype=np.float32)).resize(
            (FILE_SIDE,) * 2, Image.Resampling.BICUBIC
        )
        levels = 255 * np.asarray(coarse) + 4 * rng.standard_normal((FILE_SIDE, FILE_SIDE))
        Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8)).save(folder / f"{number:04d}.png")


def _seconds(images: ImageSet, num_workers: int) -> float:
    # not at the head: the processes import this file, and need no torch
    import torch

    from medgen.metrics.extractors import ModuleFeatures

    protocol = get_protocol("module:benchmark", feature_size=NETWORK_SIDE, feature_channels=3)
    # hardly any work: decoding and resizing are what is measured
    network = ModuleFeatures(protocol, network=torch.nn.AvgPool2d(NETWORK_SIDE))
    with tempfile.TemporaryDirectory() as cache:
        start = time.perf_counter()
        extract_features(images, protocol, extractor=network, num_workers=num_workers, cache_dir=cache, progress=False)
        return time.perf_counter() - start


def run() -> list[tuple[str, float, str]]:
    """Measure; a ratio above 1 is how many times the memory, or how many times faster.

    Returns:
        (name, ratio, detail) per comparison.
    """
    thousand, seconds = _peak(1000)
    ten_thousand, more_seconds = _peak(10_000)
    with tempfile.TemporaryDirectory() as folder:
        _write_files(Path(folder))
        images = ImageSet.from_source(folder)
        times: dict[int, list[float]] = {0: [], 1: [], 2: []}
        for _ in range(ROUNDS):
            for num_workers, measured in times.items():
                measured.append(_seconds(images, num_workers))
    here, one, two = (statistics.median(measured) for measured in times.values())
    how = f"median of {ROUNDS}, the start of the processes included"
    return [
        (
            f"peak memory of feature extraction, {WIDTH} features an image, 10,000 images against 1,000",
            ten_thousand / thousand,
            f"{ten_thousand:.0f} MiB against {thousand:.0f}, the features alone being 78 and 8; images made when asked "
            f"for; {more_seconds:.0f} s against {seconds:.0f}",
        ),
        (
            f"decoding and resizing {FILES} PNGs from {FILE_SIDE} to {NETWORK_SIDE} px in 2 processes against 1",
            one / two,
            f"{FILES / two:.0f} images a second against {FILES / one:.0f}, {FILES / here:.0f} in this process ({how})",
        ),
    ]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _measure_peak(int(sys.argv[1]))
    else:
        for name, ratio, detail in run():
            print(f"{name}: {ratio:.2f}x, {detail}")
