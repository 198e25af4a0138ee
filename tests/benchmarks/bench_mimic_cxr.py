"""MIMIC-CXR's images to PNGs against the loop of generative_chestxray; its reports to sections, reports a second."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from medgen.data.phantom.reports import FORMS, write_report

REPO = Path(__file__).parents[2]
WIDTH, HEIGHT, SIZE = 2544, 3056, 512  # what most of MIMIC-CXR-JPG's files have
FILES, COPIES = 12, 15  # enough that the start of the command is not all that is measured
REPORTS = 5000
ROUNDS = 3
WORKERS = 2


def make_images(root: Path) -> None:
    """Grey JPEGs with the spectrum of a blurred, noisy picture, one a study; copies are links."""
    rng = np.random.default_rng(0)
    for number in range(FILES):
        coarse = Image.fromarray(rng.random((48, 40), dtype=np.float32))
        fine = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
        pixels = np.clip(fine + rng.normal(0, 0.01, fine.shape), 0, 1)
        for copy in range(COPIES):
            folder = root / f"files/p10/p1000{copy:04d}/s5000{number:04d}"
            folder.mkdir(parents=True)
            if copy:
                os.link(root / f"files/p10/p10000000/s5000{number:04d}/image.jpg", folder / "image.jpg")
            else:
                Image.fromarray((pixels * 255).astype(np.uint8)).save(folder / "image.jpg", quality=95)


def make_reports(root: Path) -> None:
    """Reports of phantoms in all forms that make a file."""
    forms = [form for form in FORMS if form != "missing"]
    for number in range(REPORTS):
        folder = root / f"files/p10/p10{number // 5:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(number)
        report = write_report(forms[number % len(forms)], [("Effusion", "left")], "PA", "F", True, rng)
        (folder / f"s5{number:07d}.txt").write_bytes(report.data)


def plain(source: Path, target: Path) -> None:
    """The source's loop: RGB, shorter side by Pillow's bilinear filter (torchvision's default), JPEG; one process."""
    for path in sorted(source.rglob("*.jpg")):
        image = Image.open(path).convert("RGB")
        scale = SIZE / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
        out = target / path.relative_to(source)
        out.parent.mkdir(parents=True, exist_ok=True)
        image.save(out)


def _command(step: str, source: Path, target: Path, workers: int) -> None:
    options = ["--source", str(source), "--target", str(target), "--workers", str(workers)]
    command = [sys.executable, "-m", "preprocessing.mimic_cxr", step, *options]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 3):  # 3: some of the reports are empty or no UTF-8, as they shall be
        raise RuntimeError(done.stderr)


def _median(functions: dict[str, Callable[[Path], None]]) -> dict[str, float]:
    """Median time of each over interleaved rounds, so that a busy moment of the machine meets all."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(ROUNDS):
        for name in list(functions)[:: 1 if number % 2 else -1]:
            with tempfile.TemporaryDirectory() as target:
                start = time.perf_counter()
                functions[name](Path(target))
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def run() -> list[str]:
    """Measure.

    Returns:
        One line per result.
    """
    with tempfile.TemporaryDirectory() as folder:
        images, reports = Path(folder) / "images", Path(folder) / "reports"
        make_images(images)
        make_reports(reports)
        taken = _median(
            {
                "plain": lambda target: plain(images, target),
                "one": lambda target: _command("organise", images, target, 1),
                "two": lambda target: _command("organise", images, target, WORKERS),
            }
        )
        rate = {name: FILES * COPIES / seconds for name, seconds in taken.items()}
        seconds = _median({"sections": lambda target: _command("sections", reports, target, WORKERS)})["sections"]
    what = f"{WIDTH}×{HEIGHT} to {SIZE}, median of {ROUNDS}, {FILES * COPIES} images"
    return [
        f"organise, {n} workers: {rate[key] / rate['plain']:.2f}x, {rate[key]:.1f} images/s against "
        f"{rate['plain']:.1f} of the plain loop in one process ({what})"
        for n, key in ((1, "one"), (WORKERS, "two"))
    ] + [f"sections, {WORKERS} workers: {REPORTS / seconds:.0f} reports/s (median of {ROUNDS}, {REPORTS} reports)"]


if __name__ == "__main__":
    print("\n".join(run()))
