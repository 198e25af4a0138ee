"""Preprocessing against the same work in plain Pillow and pydicom in one process."""

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
import pydicom
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

from medgen.data.datalist import list_files

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO))  # preprocessing/ lies beside src/, where a script in another folder does not see it

from preprocessing._convert import PNG_OPTIONS, Settings, convert_file, make_jobs, prepare_target  # noqa: E402

SIDE, SIZE = 1024, 512
JPEGS, DICOMS = 60, 30
COPIES = 3  # for the command: enough that its start-up is not all that is measured
ROUNDS = 5
WORKERS = 2


def make_source(folder: Path) -> None:
    """60 JPEGs and 30 uncompressed 12-bit DICOM files with the spectrum of a blurred, noisy picture."""
    rng = np.random.default_rng(0)
    for number in range(JPEGS + DICOMS):
        coarse = Image.fromarray(rng.random((32, 32), dtype=np.float32)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        pixels = np.clip(np.asarray(coarse) + rng.normal(0, 0.01, (SIDE, SIDE)), 0, 1)
        if number < JPEGS:
            Image.fromarray((pixels * 255).astype(np.uint8)).save(folder / f"{number:03d}.jpg", quality=92)
        else:
            _write_dicom(folder / f"{number:03d}.dcm", (pixels * 4095).astype(np.uint16), f"P{number}")


def _write_dicom(path: Path, pixels: np.ndarray, patient: str) -> None:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = pydicom.Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.PatientID, data.Modality = patient, "DX"
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.WindowCenter, data.WindowWidth = 2048, 4096
    data.PixelData = pixels.tobytes()
    data.save_as(path, enforce_file_format=True)


def plain(source: Path, target: Path, **png_options: int) -> None:
    """What a short script does: read, window, resize, save; no checks, no names, no patients."""
    for file in list_files(source):
        if file.endswith(".dcm"):
            data = pydicom.dcmread(source / file)
            values = apply_voi_lut(apply_modality_lut(data.pixel_array, data), data).astype(np.float32)
            values = (values - values.min()) / (values.max() - values.min())
            image = Image.fromarray((values * 255).astype(np.uint8))
        else:
            image = Image.open(source / file).convert("L")
        scale = SIZE / min(image.size)
        shape = (round(image.width * scale), round(image.height * scale))
        image.resize(shape, Image.Resampling.BICUBIC).save(target / f"{Path(file).stem}.png", **png_options)


def _ours(source: Path, target: Path) -> None:
    settings = Settings("images", SIZE)
    prepare_target(source, target, settings)
    for job in make_jobs(source, list_files(source)):
        convert_file(job, settings, str(target))


def _command(source: Path, target: Path) -> None:
    folders = ["--source", str(source), "--target", str(target)]
    options = ["--size", str(SIZE), "--workers", str(WORKERS)]
    command = [sys.executable, "-m", "preprocessing.images", *folders, *options]
    subprocess.run(command, cwd=REPO, check=True, capture_output=True)


def _compare(name: str, source: Path, ours: Callable, theirs: Callable) -> tuple[str, float, str]:
    """Median time of each over interleaved rounds, so that a busy moment of the machine meets both."""
    times: dict[Callable, list[float]] = {ours: [], theirs: []}
    for number in range(ROUNDS):
        for function in (ours, theirs) if number % 2 else (theirs, ours):
            with tempfile.TemporaryDirectory() as target:
                start = time.perf_counter()
                function(source, Path(target))
                times[function].append(time.perf_counter() - start)
    images = len(list_files(source))
    mine, other = (images / statistics.median(times[function]) for function in (ours, theirs))
    return name, mine / other, f"{mine:.1f} images/s against {other:.1f} (median of {ROUNDS}, {images} images)"


def run() -> list[tuple[str, float, str]]:
    """Measure; a ratio above 1 is how many times more images a second than plain Pillow and pydicom.

    Returns:
        (name, ratio, detail) per comparison.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        parts = {suffix: root / suffix for suffix in ("jpg", "dcm", "many")}
        for part in parts.values():
            part.mkdir()
        make_source(root)
        for file in sorted(root.glob("*.*")):
            for copy in range(COPIES):
                os.link(file, parts["many"] / f"{copy}-{file.name}")
            file.rename(parts[file.suffix[1:]] / file.name)

        def plain_same_png(source: Path, target: Path) -> None:
            plain(source, target, **PNG_OPTIONS)

        return [
            _compare(f"inner function, 1 process, JPEG {SIDE} to PNG {SIZE}", parts["jpg"], _ours, plain),
            _compare(f"inner function, 1 process, DICOM {SIDE} to PNG {SIZE}", parts["dcm"], _ours, plain),
            _compare(f"whole command, {WORKERS} workers, JPEG and DICOM", parts["many"], _command, plain),
            _compare("the same, plain script with the same PNG options", parts["many"], _command, plain_same_png),
        ]


if __name__ == "__main__":
    for name, ratio, detail in run():
        print(f"{name}: {ratio:.2f}x, {detail}")
