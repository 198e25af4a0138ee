"""``compress.json`` and ``stylise.json`` of the inversion encoder as their users run them, and with their mistakes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from monai.bundle import ConfigWorkflow
from PIL import Image
from running import assert_one_line, run, tiny_generator

from medgen.data import Embedding, load_datalist
from medgen.networks import PGGANGenerator, StyleGAN2Generator

BUNDLE = Path(__file__).parents[2] / "bundles" / "cxr_inversion_encoder"
DEFINITIONS = {
    "z": (PGGANGenerator, {"channels": [8, 8, 8, 4, 4], "latent_dim": 8}),
    "w+": (StyleGAN2Generator, {"image_size": 16, "channel_base": 128, "channel_max": 8, "latent_dim": 8, "w_dim": 8}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, datalist):
    """Tiny generators, and an embedding of the datalist's images under each: random latents serve as well."""
    folder = tmp_path_factory.mktemp("tiny")
    listed = json.loads(datalist.read_text())
    items = [
        {"image": item["image"], "patient": item["patient"], "split": split}
        for split in ("training", "test")
        for item in listed[split]
    ]
    for space, (family, arguments) in DEFINITIONS.items():
        generator = tiny_generator(folder, space, family, arguments)
        with torch.no_grad():
            latents = generator.from_z(torch.randn(len(items), 8)).numpy()
        parts = (latents, items, space, generator.sha256, "", generator.mean.numpy(), float(generator.std), "encoder")
        Embedding(*parts).write(folder / space)
    return folder


def make(folder: Path, config: str, output_dir: Path, of: str = "z", **overrides) -> ConfigWorkflow:
    settings = {"bundle_root": str(BUNDLE), "output_dir": str(output_dir), "num_workers": 0, "batch_size": 2}
    files = [str(BUNDLE / "configs" / f"{config}.json"), str(folder / f"{of}.json")]
    if of == "w+":
        files.insert(1, str(BUNDLE / "configs" / "w_plus.json"))
    return ConfigWorkflow(files, logging_file=False, workflow_type="infer", **{**settings, **overrides})


def assert_refused(message: str, *arguments, **overrides) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(make(*arguments, **overrides))
    assert_one_line(caught.value, message)


def test_images_are_compressed_from_the_command_line(folder, datalist, tmp_path):
    run(make(folder, "compress", tmp_path, datalist=str(datalist), bits=[8, 4], further=[8], max_images=3, split="all"))

    rows = list(csv.DictReader((tmp_path / "compression.csv").open()))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert len({row["image"] for row in rows}) == metrics["n"] == 3
    assert metrics["latent_8bit_bytes"] == 8
    assert metrics["jpeg_bare_at_8x_bytes"] <= 64 or metrics["jpeg_bare_at_8x_fits"] < 1
    assert {path.name for path in (tmp_path / "images").iterdir()} == {"compressed.png", "rate_distortion.png"}

    run(make(folder, "compress", tmp_path, datalist=str(datalist), bits=[8], further=[]))
    rows = list(csv.DictReader((tmp_path / "compression.csv").open()))
    assert {(row["image"], row["split"]) for row in rows} == {("image6.png", "test"), ("image7.png", "test")}


def test_compression_tells_mistakes_in_one_line(folder, datalist, tmp_path):
    settings = {"datalist": str(datalist)}
    assert_refused("bits must be from 1 to 12, or 16", folder, "compress", tmp_path, bits=[20], **settings)
    assert_refused("picture_bits must be one of bits", folder, "compress", tmp_path, bits=[16], **settings)
    assert_refused("further must be a whole number", folder, "compress", tmp_path, further=[0], **settings)
    assert_refused("no image of the split 'validation'", folder, "compress", tmp_path, split="validation", **settings)
    assert_refused("missing; make one with inference.json", folder, "compress", tmp_path, embedding="no", **settings)
    assert_refused("image6.png", folder, "compress", tmp_path, dataset_dir=str(tmp_path), **settings)
    other = {"embedding": str(folder / "w+")}
    assert_refused("belong to the generator .*, got", folder, "compress", tmp_path, **settings, **other)


def test_around_and_interpolation_are_made_and_resumed(folder, tmp_path):
    for mode, count in (("around", 4), ("interpolate", 5)):
        for resume in ("false", "true"):
            settings = {"mode": mode, "images": "image0.png,2", "seeds": "0-1", "frames": 5, "resume": resume}
            run(make(folder, "stylise", tmp_path / mode, **settings))
            items = load_datalist(tmp_path / mode / "datalist.json", "training")
            assert len(items) == count
            assert all(item["synthetic"] and item["derived_from"] for item in items)
            for item in items[:1]:
                Path(item["image"]).unlink() if resume == "false" else None


def test_mixtures_are_dicom_if_asked_for(folder, tmp_path):
    run(make(folder, "stylise", tmp_path, "w+", mode="mix", images="0,1", layers="0-3", file_format="dicom"))

    (first, second) = load_datalist(tmp_path / "datalist.json", "training")
    picture = pydicom.dcmread(first["image"])
    assert (picture.SyntheticData, picture.PatientID) == ("YES", first["patient"])
    assert first["generator_sha256"] in picture.DerivationDescription
    assert first["derived_from"] == list(reversed(second["derived_from"]))
    assert np.asarray(Image.open(tmp_path / "images" / "mix_styles.png")).ndim == 2


def test_stylisation_tells_mistakes_in_one_line(folder, tmp_path):
    settings = (folder, "stylise", tmp_path)
    assert_refused("got z, which has one style", *settings, mode="mix")
    assert_refused("no image 'image9.png' in the embedding; the closest are image", *settings, images="image9.png")
    assert_refused(
        r"latents are of the space w\+, .* for w; set --space w\+", folder, "stylise", tmp_path, "w+", space="w"
    )
    assert_refused("belong to the generator .*, got", *settings, embedding=str(folder / "w+"))
    assert_refused("sigma must be a number from 0 to 1", *settings, mode="around", sigma=2)
    assert not (tmp_path / "samples").exists()
