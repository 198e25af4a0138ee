"""``study.json`` of skin_sngan: in one process, and in shares of which one is told to end, with the same results."""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from running import Forked, start

from medgen.data import write_datalist
from medgen.preemption import AGAIN

BUNDLE = Path(__file__).parents[2] / "bundles" / "skin_sngan"
SETTINGS = {"presets": ["batch_16", "batch_64"], "image_size": 32, "base_channels": 4, "max_images": 48}
TOO_FEW = "a training step takes 64 images (batch_size 64 × 1 processes), the training split holds 18"


@pytest.fixture(scope="module")
def spots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty brown spots on skin, of as many patients, too few for batches of 64."""
    folder = tmp_path_factory.mktemp("spots")
    rng = np.random.default_rng(0)
    row, column = np.mgrid[:32, :32]
    splits: dict[str, list[dict]] = {"training": [], "validation": [], "test": []}
    for number in range(30):
        centre, radius = rng.uniform((12, 12), (20, 20)), rng.uniform(4, 10)
        spot = ((row - centre[0]) ** 2 + (column - centre[1]) ** 2 < radius**2)[..., None]
        pixels = np.where(spot, [120, 70, 50], [230, 190, 170]) + rng.normal(0, 9, (32, 32, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
        split = "training" if number < 18 else "validation" if number < 22 else "test"
        splits[split].append({"image": f"{number}.png", "patient": f"p{number}"})
    write_datalist(folder / "datalist.json", "spots", "dermoscopy", splits)
    return folder / "datalist.json"


def study(datalist: Path, output_dir: Path, **settings: object) -> Forked:
    """The study as a process."""
    given = {"datalist": datalist, "output_dir": output_dir, "num_workers": 0, **SETTINGS, **settings}
    options = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    return start(BUNDLE, ["-m", "monai.bundle", "run", "--config_file", "configs/study.json", *options])


def end(process: Forked) -> tuple[int | None, str]:
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def test_shares_and_interruptions_leave_the_table_of_one_process(spots, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDGEN_CACHE", str(tmp_path / "cache"))
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    in_one = study(spots, whole)
    share = study(spots, shared, shard="1/2")
    begun = shared / "batch_16" / "checkpoints" / ".training"
    while share.poll() is None and not begun.exists():
        time.sleep(0.005)
    os.killpg(share.pid, signal.SIGTERM)
    code, output = end(share)
    assert code == AGAIN, output
    assert not (shared / "batch_16" / "metrics.json").exists()

    code, output = end(study(spots, shared, shard="1/2"))
    assert code == 0, output
    assert "shard 1/2: 1 of 1 runs are done" in output
    assert not (shared / "study.md").exists()
    code, output = end(study(spots, shared))

    # the other share's runs, and the tables
    assert code == 3, output
    assert "2 of 3 items are missing" in output
    assert "[2/3] batch_16: done before" in output
    assert f"1 of 3 runs have failed, the others are done: batch_64: {TOO_FEW}" in output
    assert "Traceback" not in output
    code, output = end(in_one)
    assert code == 3, output
    # batch_16 was the second of a process there, was told to end and was alone in its process here
    a, b = (torch.load(folder / "batch_16" / "model.pt", weights_only=True) for folder in (whole, shared))
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    tables = ("study.md", "study.csv", "study.json", "study.png", "batch_16/samples/seed000007.png")
    assert {name: (whole / name).read_bytes() for name in tables} == {
        name: (shared / name).read_bytes() for name in tables
    }
    check_tables(whole)
    before = (whole / "batch_16" / "metrics.json").stat().st_mtime_ns
    refused = end(study(spots, whole, max_images=64))
    assert refused[0] == 1
    assert "batch_16 was made with max_images 48, this study has 64; choose another --output_dir" in refused[1]
    assert "Traceback" not in refused[1]
    assert (whole / "batch_16" / "metrics.json").stat().st_mtime_ns == before


def check_tables(folder: Path) -> None:
    """That a study's files tell what its runs have measured, what was published, and what has failed."""
    metrics = json.loads((folder / "batch_16" / "metrics.json").read_text())
    with open(folder / "study.csv", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["untrained", "batch_16", "batch_64", "real images, 32 px"]
    trained = rows["batch_16"]
    for name in ("kid", "frd", "frd_equal_n", "swd", "unpaired_psnr", "unpaired_mdsi", "unpaired_haarpsi"):
        assert float(trained[name]) == metrics[name], name
    expected = {"batch_size": "16", "latent_dim": "100", "g_channels": "4", "image_size": "32", "real_label": "1.0"}
    assert {name: trained[name] for name in expected} == expected
    assert (trained["published_psnr"], trained["published_ms_gmsd"]) == ("12.76", "0.25")
    assert trained["images_seen"] == "48"  # max_images: three steps
    assert rows["untrained"]["images_seen"] == "0"
    real = rows["real images, 32 px"]
    assert float(real["frd_equal_n"]) == metrics["frd_real"]
    assert float(real["unpaired_psnr"]) == metrics["unpaired_psnr_real"]
    assert rows["batch_64"]["failed"].startswith(TOO_FEW)
    text = (folder / "study.md").read_text()
    assert (
        "Dataset spots: 18 training images. Measured: 8 samples against as many images of the test split; seed 0."
        in text
    )
    assert "| batch_16 | 16 | 48 |\n| batch_64 | 64 | – |\n" in text  # what all have in common stands below
    assert f"{metrics['kid_equal_n']:.3g} ({metrics['kid_real']:.3g})" in text
    assert "max_images 48.\n" in text  # and no epochs, which it takes the place of
    assert f"{metrics['unpaired_psnr']:.3g} (12.8)" in text
    assert f"- batch_64: {TOO_FEW}" in text
    with Image.open(folder / "study.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    rows_of_picture = np.array_split(pixels[:, 170:], 4)  # real, untrained, batch_16, batch_64
    assert rows_of_picture[0].std() > 20
    assert (rows_of_picture[3] == 255).all()  # nothing to be shown of what has failed
