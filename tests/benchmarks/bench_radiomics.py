# ruff: noqa: E402 (threads must be counted before NumPy starts them)
"""Radiomic features per second, on one process and on two, and against pyradiomics where it is installed."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

# One core is one core: set before NumPy starts its threads, and inherited by the processes.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"):
    os.environ[_name] = "1"

import numpy as np
from scipy.ndimage import gaussian_filter

from medgen.data.workers import map_each
from medgen.metrics.radiomics import PRESETS, RadiomicsExtractor

SIDE, IMAGES, ROUNDS = 512, 4, 3
IMAGES_OF_PROCESSES = 48
ORACLE = Path(__file__).parents[1] / "assets" / "make_radiomics_golden.py"


def make_image(seed: int, side: int = SIDE) -> np.ndarray:
    """Soft shapes and noise with a flat border, (side, side) 8-bit levels: runs and zones as long as a radiograph's."""
    rng = np.random.default_rng(seed)
    shapes = gaussian_filter(rng.normal(size=(side, side)), side / 16)
    texture = gaussian_filter(rng.normal(size=(side, side)), 1.5)
    image = 128 + 45 * shapes / shapes.std() + 5 * texture / texture.std() + rng.normal(0, 1.5, (side, side))
    image[:, : side // 32] = 0
    return np.clip(image, 0, 255).astype(np.uint8)


class _Images:
    """Images made when asked for, as files are decoded."""

    def __len__(self) -> int:
        return IMAGES_OF_PROCESSES

    def __getitem__(self, index: int) -> np.ndarray:
        return _as_image(_MADE[index % IMAGES])


_MADE = [make_image(seed) for seed in range(IMAGES)]


def _as_image(levels: np.ndarray) -> np.ndarray:
    return levels[None].astype(np.float32) / np.float32(255)


def _features(shared: tuple[_Images, RadiomicsExtractor], index: int) -> np.ndarray:
    images, extractor = shared
    return extractor.on_image(images[index])


def _seconds(extractor: RadiomicsExtractor) -> float:
    """Seconds an image, median."""
    times = []
    for levels in _MADE:
        image = _as_image(levels)
        start = time.perf_counter()
        extractor.on_image(image)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _oracle_seconds(python: str, preset: str) -> float:
    """Seconds an image of the same images, median, its start not counted."""
    with tempfile.TemporaryDirectory() as folder:
        given, answer = Path(folder) / "in.npz", Path(folder) / "out.npz"
        np.savez(given, **{str(number): levels for number, levels in enumerate(_MADE)})
        subprocess.run([python, ORACLE, "--images", given, "--output", answer, "--presets", preset], check=True)
        with np.load(answer, allow_pickle=False) as found:
            return statistics.median(float(found[key]) for key in found.files if key.startswith("seconds/"))


def _images_per_second(extractor: RadiomicsExtractor, processes: int) -> float:
    """Through the worker pool, from the first answer on: processes take a second to start."""
    answers = map_each(
        _features, (_Images(), extractor), range(IMAGES_OF_PROCESSES), processes, np.empty(0), per_task=4
    )
    for _ in range(4 * processes):
        next(answers)
    start = time.perf_counter()
    rest = sum(1 for _ in answers)
    return rest / (time.perf_counter() - start)


def run(oracle_python: str | None = None) -> list[tuple[str, float, str]]:
    """Measure; with the oracle the ratio is how many times faster, without it the features per second.

    Args:
        oracle_python: a Python with pyradiomics and frd-score.

    Returns:
        (name, ratio, detail) per comparison.
    """
    results = []
    for preset in PRESETS:
        extractor = RadiomicsExtractor(preset)
        width = len(extractor.feature_names)
        _seconds(extractor)
        ours, theirs = [], []
        for _ in range(ROUNDS):  # in turn, so that a busy moment of the machine meets both
            ours.append(_seconds(extractor))
            if oracle_python:
                theirs.append(_oracle_seconds(oracle_python, preset))
        mine = statistics.median(ours)
        detail = f"{1000 * mine:.1f} ms an image of {SIDE} x {SIDE}, {width / mine:.0f} features per second"
        if theirs:
            other = statistics.median(theirs)
            results.append((f"{preset} against the oracle", other / mine, f"{detail}; oracle {1000 * other:.0f} ms"))
        else:
            results.append((f"{preset}, features per second", width / mine, detail))
    extractor = RadiomicsExtractor("frd_v1")
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(ROUNDS):
        for processes, found in rates.items():
            found.append(_images_per_second(extractor, processes))
    one, two = (statistics.median(found) for found in rates.values())
    results.append(("frd_v1, two processes against one", two / one, f"{two:.1f} against {one:.1f} images per second"))
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--oracle-python", help="a Python with pyradiomics 3.0.1 and frd-score 1.0.1")
    for name, ratio, detail in run(parser.parse_args().oracle_python):
        print(f"{name}: {ratio:.2f}, {detail}")
