"""The augmentation study as its users run it: trainings, evaluations, shards and the report."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from running import assert_one_line

from medgen.apps import run_config
from medgen.data import load_classes, trained_on, write_datalist

BUNDLE = Path(__file__).parents[2] / "bundles" / "augmentation_classifier"
NAMES = ["dark", "bright"]
COUNTS = {"training": (8, 3), "validation": (4, 3), "test": (8, 6)}


def draw(path, rng, label):
    """Noise, brighter on average in class 1 than in class 0."""
    Image.fromarray(np.clip(rng.normal(90 + 60 * label, 25, (32, 32)), 0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Datalists of real and of synthetic images."""
    rng = np.random.default_rng(0)
    real, synthetic = (tmp_path_factory.mktemp(name) / "datalist.json" for name in ("real", "synthetic"))
    splits = {
        split: [
            {"image": f"{split}{label}_{n}.png", "patient": f"{split}{label}_{n}", "label": NAMES[label]}
            for label, count in enumerate(counts)
            for n in range(count)
        ]
        for split, counts in COUNTS.items()
    }
    for item in [item for items in splits.values() for item in items]:
        draw(real.parent / item["image"], rng, NAMES.index(item["label"]))
    write_datalist(real, "brightness", "X-ray", splits, label_names=NAMES)
    made = [{"image": f"{n}.png", "patient": f"synthetic-{n}", "label": 1, "synthetic": True} for n in range(5)]
    for item in made:
        draw(synthetic.parent / item["image"], rng, 1)
    saw = trained_on(real, load_classes(real, "training"), [])
    write_datalist(synthetic, "made", "X-ray", {"training": made}, label_names=NAMES, trained_on=saw)
    return str(real), str(synthetic)


def test_arms_are_trained_by_shards_and_reported_together(images, tmp_path):
    real, synthetic = images
    settings = {"datalist": real, "synthetic": synthetic, "output_dir": str(tmp_path), "device": "cpu"}
    settings |= {"num_workers": 0, "overlays": ["demo.json"], "max_steps": 3, "training": {"val_interval": 3}}
    settings |= {"arms": ["real", "balanced"], "seeds": "4", "resamples": 200, "shuffles": 99}

    run_config("study.json", BUNDLE, shard="0/2", **settings)
    assert not (tmp_path / "study.md").exists()
    assert [path.parent.parent.name for path in tmp_path.glob("runs/*/seed4/metrics.json")] == ["real"]
    run_config("study.json", BUNDLE, shard="1/2", **settings)
    figures = sorted(tmp_path.glob("runs/*/seed4/metrics.json"))
    before = [path.stat().st_mtime_ns for path in figures]
    run_config("study.json", BUNDLE, **settings)

    assert [path.stat().st_mtime_ns for path in figures] == before  # nothing is made twice
    with open(tmp_path / "study.csv", newline="") as file:
        rows = {(row["arm"], row["metric"]): row for row in csv.DictReader(file)}
    for arm, path in zip(("balanced", "real"), figures, strict=True):
        found = json.loads(path.read_text())
        for metric in ("accuracy", "auroc", "sensitivity", "ece"):
            # a table of nine digits
            assert float(rows[arm, metric]["value"]) == pytest.approx(found[metric], abs=1e-6), (arm, metric)
    text = (tmp_path / "study.md").read_text()
    assert "| real | 8 | 3 | 0 | 0 | 3 | 4 |" in text
    assert "| balanced | 8 | 3 | 0 | 5 | 3 | 4 |" in text
    assert "DenseNet, 3 steps of 8 images at 32 pixels in every arm" in text
    assert "one seed: how far trainings scatter is not in it" in text
    assert (tmp_path / "study.png").is_file()
    with pytest.raises(RuntimeError) as error:  # MONAI's own around the user's
        run_config("study.json", BUNDLE, **{**settings, "max_steps": 6})
    assert_one_line(error.value, "was made with max_steps 3, this study has 6")
