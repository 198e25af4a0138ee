"""MS-SSIM over all pairs of one image set against the plain double loop over MONAI's metric; peak memory."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from monai.metrics import MultiScaleSSIMMetric

from medgen.metrics.diversity import pairwise_ms_ssim

SIDE = 256
IMAGES = 64  # all 2,016 pairs here
LOOP_PAIRS = 48  # of them that the plain loop does in a round; its time goes with the number of pairs
BATCH = 16
ROUNDS = 5
MEMORY_PAIRS = 1000
MEMORY_GIB = 0.25


class Synthetic:
    """Images made when asked for, so that the set itself takes no memory."""

    def __init__(self, count: int, side: int) -> None:
        self.count, self.side = count, side

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        rng = np.random.default_rng(index)
        coarse = np.kron(rng.random((8, 8), dtype=np.float32), np.ones((self.side // 8, self.side // 8), np.float32))
        return np.clip(coarse + 0.02 * rng.standard_normal((self.side, self.side), dtype=np.float32), 0, 1)[None]


def _first_pairs(count: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(count) for j in range(i + 1, count)][:LOOP_PAIRS]


def _plain(images: torch.Tensor, batch: int) -> float:
    """Seconds a pair of MONAI's metric over the first pairs of the double loop, ``batch`` pairs a call."""
    metric = MultiScaleSSIMMetric(spatial_dims=2)
    pairs = _first_pairs(len(images))
    start = time.perf_counter()
    for number in range(0, len(pairs), batch):
        first, second = zip(*pairs[number : number + batch], strict=True)
        metric(images[list(first)], images[list(second)])
    return (time.perf_counter() - start) / len(pairs)


def _ours(images: torch.Tensor) -> float:
    """Seconds a pair, moments included."""
    start = time.perf_counter()
    result = pairwise_ms_ssim(images, device="cpu")
    return (time.perf_counter() - start) / result.n_pairs


def _peak(count: int, side: int, pairs: str | int, gib: float) -> tuple[float, float]:
    """MiB that a fresh process took beyond its imports, and its seconds."""
    command = [sys.executable, __file__, json.dumps([count, side, pairs, gib])]
    added, seconds = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return added, seconds


def _measure_peak(count: int, side: int, pairs: str | int, gib: float) -> None:
    pairwise_ms_ssim(Synthetic(3, side), device="cpu")  # what the first call loads is no part of the set
    Path("/proc/self/clear_refs").write_text("5")  # the imports' own peak is forgotten (Linux)
    before, start = _resident("VmRSS"), time.perf_counter()
    pairwise_ms_ssim(Synthetic(count, side), pairs, max_memory=gib, device="cpu")
    print(json.dumps([_resident("VmHWM") - before, time.perf_counter() - start]))


def _resident(field: str) -> float:
    """MiB; getrusage would also count what the parent process held when it started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def run() -> list[tuple[str, float, str]]:
    """Measure; a ratio above 1 is how many times faster than MONAI's metric, or how many times the memory.

    Returns:
        (name, ratio, detail) per comparison.
    """
    images = torch.stack([torch.from_numpy(Synthetic(IMAGES, SIDE)[index]) for index in range(IMAGES)])
    times: dict[str, list[float]] = {"ours": [], "loop": [], "batched": []}
    _ours(images[:4])
    _plain(images[:4], 1)
    for _ in range(ROUNDS):
        times["ours"].append(_ours(images))
        times["loop"].append(_plain(images, 1))
        times["batched"].append(_plain(images, BATCH))
    ours, loop, batched = (1000 * statistics.median(values) for values in times.values())
    threads = torch.get_num_threads()
    total = IMAGES * (IMAGES - 1) // 2
    how = f"median of {ROUNDS}, {threads} threads, all {total} pairs of {IMAGES} images against {LOOP_PAIRS} of them"
    thousand, seconds = _peak(1000, SIDE, MEMORY_PAIRS, MEMORY_GIB)
    ten_thousand, more_seconds = _peak(10_000, SIDE, MEMORY_PAIRS, MEMORY_GIB)
    few, _ = _peak(250, 64, "all", 0.01)
    many, _ = _peak(1000, 64, "all", 0.01)
    return [
        (
            f"MS-SSIM of all pairs i < j, {SIDE} px, against a plain double loop over them",
            loop / ours,
            f"{ours:.2f} ms a pair against {loop:.1f} ({how})",
        ),
        (
            f"the same against the loop in batches of {BATCH} pairs",
            batched / ours,
            f"{ours:.2f} ms against {batched:.1f}",
        ),
        (
            f"peak memory of {MEMORY_PAIRS} drawn pairs, {SIDE} px, 10,000 images against 1,000",
            ten_thousand / thousand,
            f"{ten_thousand:.0f} MiB against {thousand:.0f} with max_memory {MEMORY_GIB} GiB; images made when asked "
            f"for; {more_seconds:.0f} s against {seconds:.0f}",
        ),
        (
            "peak memory of all pairs, 64 px, 1,000 images against 250",
            many / few,
            f"{many:.0f} MiB against {few:.0f} with max_memory 0.01 GiB, less than either set takes",
        ),
    ]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _measure_peak(*json.loads(sys.argv[1]))
    else:
        for name, ratio, detail in run():
            print(f"{name}: {ratio:.2f}x, {detail}")
