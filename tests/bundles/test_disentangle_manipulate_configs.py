"""``disentangle.json`` and ``manipulate.json`` of the inversion encoder as their users run them, and their mistakes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from PIL import Image
from running import assert_one_line, run, tiny_generator

from medgen.apps import Directions
from medgen.data import Embedding, load_datalist
from medgen.networks import PGGANGenerator, StyleGAN2Generator

BUNDLE = Path(__file__).parents[2] / "bundles" / "cxr_inversion_encoder"
DEFINITIONS = {
    "z": (PGGANGenerator, {"channels": [8, 8, 8], "latent_dim": 8}),
    "w+": (StyleGAN2Generator, {"image_size": 16, "channel_base": 128, "channel_max": 8, "latent_dim": 8, "w_dim": 8}),
}
IMAGES, SHOWN = 48, "<b>scan</b>"
QUICK = {"folds": 3, "min_patients": 6, "shuffles": 4, "factor_shuffles": 2, "resamples": 50, "ganspace_samples": 200}
COUNTS = {"ganspace_components": 2, "sefa_components": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny generators, and under each an embedding of 24 patients whose first number decides their label."""
    folder = tmp_path_factory.mktemp("tiny")
    for space, (family, arguments) in DEFINITIONS.items():
        generator = tiny_generator(folder, space, family, arguments)
        with torch.no_grad():
            latents = generator.from_z(torch.randn(IMAGES, 8)).numpy()
        along = latents[:, 0, 0] - np.median(latents[:, 0, 0])
        items = [
            {
                "image": f"{SHOWN if number == 0 else 'scan'}{number}.png",
                "patient": f"p{number // 2}",
                "labels": (["Effusion"] if along[number] > 0 else []) + (["Hernia"] if number == 5 else []),
                "age": 40 + number % 7,
                "sex": "FM"[number // 2 % 2],
                "split": "test",
                "mse": 0.01,
            }
            for number in range(IMAGES)
        ]
        parts = (latents, items, space, generator.sha256, "", generator.mean.numpy(), float(generator.std), "encoder")
        Embedding(*parts).write(folder / space)
    return folder


def make(folder: Path, config: str, output_dir: Path, of: str = "z", **overrides) -> ConfigWorkflow:
    settings = {"bundle_root": str(BUNDLE), "output_dir": str(output_dir)}
    settings |= {**QUICK, **COUNTS} if config == "disentangle" else {}
    files = [str(BUNDLE / "configs" / f"{config}.json"), str(folder / f"{of}.json")]
    if of == "w+":
        files.insert(1, str(BUNDLE / "configs" / "w_plus.json"))
    return ConfigWorkflow(files, logging_file=False, workflow_type="infer", **{**settings, **overrides})


def assert_refused(message: str, *arguments, **overrides) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(make(*arguments, **overrides))
    assert_one_line(caught.value, message)


@pytest.fixture(scope="module", params=["z", "w+"])
def measured(request, folder, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("disentangle")
    run(make(folder, "disentangle", output_dir, request.param))
    return request.param, output_dir


def test_everything_that_was_measured_is_written(measured):
    _, output_dir = measured

    rows = {row["factor"]: row for row in csv.DictReader((output_dir / "probes.csv").open())}
    metrics = json.loads((output_dir / "metrics.json").read_text())
    assert set(rows) == {"Effusion", "age", "sex", "Hernia"}
    assert "1 patients with it" in rows["Hernia"]["left_out"]
    assert rows["Hernia"]["auroc"] == ""
    assert metrics["auroc_effusion"] == pytest.approx(float(rows["Effusion"]["auroc"]))
    assert metrics["auroc_effusion"] > 0.8
    assert metrics["auroc_sex_null_low"] < 0.5 < metrics["auroc_sex_null_high"]
    assert metrics["p_adjusted_effusion"] == float(rows["Effusion"]["p_adjusted"]) >= metrics["p_value_effusion"]
    assert metrics["n"] == IMAGES
    assert metrics["n_patients"] == IMAGES // 2
    assert {
        f"dci_{name}{end}"
        for name in ("disentanglement", "informativeness")
        for end in ("", "_shuffled", "_shuffled_low", "_shuffled_high")
    } <= set(metrics)
    assert all(value is None or isinstance(value, int | float | str) for value in metrics.values())


def test_directions_are_those_of_the_generator(measured, folder):
    space, output_dir = measured
    embedding = Embedding.read(folder / space)

    directions = Directions.read(output_dir)

    assert list(directions.vectors) == [
        "Effusion", "age", "sex", "ganspace_0", "ganspace_1", "sefa_0", "sefa_1"
    ]  # fmt: skip
    assert directions.generator_sha256 == embedding.generator_sha256
    assert directions.probes == ["Effusion", "age", "sex"]
    assert 0 < directions.records["ganspace_0"]["largest_sefa_cosine"] <= 1
    assert directions.is_chance("age")
    weight, bias = directions.probe("Effusion")
    scores = (embedding.latents * weight).sum((1, 2)) + bias
    truth = np.array(["Effusion" in item["labels"] for item in embedding.items])
    assert scores[truth].mean() > scores[~truth].mean()


def test_map_opens_without_a_network_and_shows_names_as_text(measured):
    _, output_dir = measured

    page = (output_dir / "map.html").read_text()

    assert "<script src=" not in page
    assert len(page) > 1_000_000  # plotly itself
    assert SHOWN not in page
    assert "u003cb\\u003e" not in page  # nor as markup within the data
    assert "scan47.png" in page
    assert Image.open(output_dir / "images" / "map.png").size[0] > 300


def test_picture_has_a_row_for_each_direction(measured):
    size = Image.open(measured[1] / "images" / "directions.png").size

    assert size == (190 + 7 * (16 * 6 + 2), 20 + 7 * (16 * 6 + 2))


def test_images_are_moved_from_the_command_line(measured, folder, tmp_path):
    space, output_dir = measured
    settings = {"layers": "0-1"} if space == "w+" else {}

    run(
        make(
            folder, "manipulate", tmp_path, space, directions=str(output_dir), images="scan3.png,4",
            direction="Effusion", hold="age,sex", strengths="-1,0,1", **settings,
        )
    )  # fmt: skip

    rows = list(csv.DictReader((tmp_path / "manipulation.csv").open()))
    items = load_datalist(tmp_path / "datalist.json", "training")
    assert [row["file"] for row in rows] == [Path(item["image"]).relative_to(tmp_path).as_posix() for item in items]
    assert all(item["synthetic"] and item["derived_from"] for item in items)
    assert all(abs(float(row[f"change_{name}"])) < 1e-5 for row in rows for name in ("age", "sex"))
    assert {path.name for path in (tmp_path / "images").iterdir()} == {
        "manipulation_image0003.png",
        "manipulation_image0004.png",
    }


def test_mistakes_are_told_in_one_line(measured, folder, tmp_path):
    space, output_dir = measured
    both = {"directions": str(output_dir), "direction": "Effusion"}
    other, ours = "w+" if space == "z" else "z", str(folder / space)

    assert_refused("did you mean Effusion", folder, "manipulate", tmp_path, space, **{**both, "direction": "efusion"})
    assert_refused("this one is", folder, "manipulate", tmp_path, other, **both)
    assert_refused("belong to the generator", folder, "manipulate", tmp_path, other, embedding=ours, **both)
    assert_refused("no directions at", folder, "manipulate", tmp_path, space, directions=str(tmp_path))
    assert_refused("strengths must be", folder, "manipulate", tmp_path, space, **both, strengths="much")
    assert_refused("file_format must be", folder, "manipulate", tmp_path, space, **both, file_format="jpeg")
    assert not (tmp_path / "samples").exists()


def test_mistakes_of_a_measurement_are_told_in_one_line(folder, tmp_path):
    arguments = (folder, "disentangle", tmp_path)

    assert_refused("did you mean Effusion", *arguments, labels="Efusion")
    assert_refused("label Hernia cannot be probed: 1 patients with it", *arguments, labels="Hernia")
    assert_refused("min_patients must be at least folds, 3, got 2", *arguments, min_patients=2)
    assert_refused("map_method must be one of pca, umap, got 'tsne'", *arguments, map_method="tsne")
    assert_refused("sefa_layers must be null in the space z", *arguments, sefa_layers="0-3")
    assert_refused("ganspace_resolution must be one of 4, 8, 16, got 32", *arguments, ganspace_resolution=32)
    assert_refused("no image 'scan4.7' in the embedding", *arguments, image="scan4.7")
    assert_refused("image must be one image", *arguments, image="1,2")
    assert_refused("no embedding at", *arguments, embedding=str(tmp_path))


def test_embedding_without_labels_is_told_in_one_line(folder, tmp_path):
    embedding = Embedding.read(folder / "z")
    bare = [{"image": item["image"], "patient": item["patient"]} for item in embedding.items]
    parts = (embedding.space, embedding.generator_sha256, "", embedding.mean, embedding.std, "encoder")
    Embedding(embedding.latents, bare, *parts).write(tmp_path)

    message = "nothing of the 48 images can be probed"
    assert_refused(message, folder, "disentangle", tmp_path / "out", embedding=str(tmp_path))
