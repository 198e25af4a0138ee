"""Moved images: what was changed of them, what stays, and what is written."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image

from medgen.apps.directions import Directions
from medgen.apps.manipulation import (
    _random_direction,
    change_between,
    changed_region,
    guided_direction,
    manipulate,
    parse_strengths,
)
from medgen.apps.stylisation import StylisedSet
from medgen.data import Embedding, load_datalist
from medgen.errors import UserError
from medgen.networks import LatentGenerator, PGGANGenerator, StyleGAN2Generator

Z = 8


def embedding_of(generator, n=30, seed=1):
    z = torch.randn(n, generator.z_dim, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(n) % generator.num_classes if generator.num_classes else None
    with torch.no_grad():
        latents = generator.from_z(z, labels)
    if generator.space != "z":
        latents = latents + 0.3 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    items = [{"image": f"{number % 3}/image{number}.png", "patient": f"p{number // 2}"} for number in range(n)]
    mean, std = generator.mean.numpy(), float(generator.std)
    return Embedding(latents.numpy(), items, generator.space, generator.sha256, "", mean, std, "encoder")


def directions_of(embedding, seed=2):
    random = np.random.default_rng(seed)
    found = Directions(embedding.space, embedding.generator_sha256)
    latents = embedding.latents.astype(np.float64)
    for name in ("Pneumonia", "age", "sex"):
        found.add_probe(name, random.normal(size=latents.shape[1:]), 1.0, latents, kind="label")
    found.add("sefa_0", random.normal(size=latents.shape[1:]), latents, kind="sefa")
    return found


@pytest.fixture(scope="module")
def pggan():
    torch.manual_seed(0)
    generator = LatentGenerator(PGGANGenerator((12, 8, 8), latent_dim=Z), sha256="a" * 64)
    embedding = embedding_of(generator)
    return embedding, directions_of(embedding), generator


@pytest.fixture(scope="module")
def stylegan():
    torch.manual_seed(0)
    network = StyleGAN2Generator(16, latent_dim=Z, w_dim=6, num_mapping_layers=2, channel_base=128, channel_max=8)
    generator = LatentGenerator(network, "w+", "b" * 64)
    embedding = embedding_of(generator)
    return embedding, directions_of(embedding), generator


@pytest.fixture
def disc():
    """A radiograph-like ramp of 64 pixels, and the same with a bright disc."""
    row, column = np.mgrid[:64, :64] / 64
    before = (0.2 + 0.5 * row + 0.05 * np.sin(40 * column))[None].astype(np.float32)
    inside = (row - 0.4) ** 2 + (column - 0.6) ** 2 < 0.15**2
    return before, np.where(inside, before + 0.3, before).astype(np.float32), inside


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class TestChange:
    def test_region_is_where_the_difference_is(self, disc):
        before, after, inside = disc

        region = changed_region(before, after)

        assert (region & inside).sum() / (region | inside).sum() > 0.85

    def test_outside_of_a_changed_disc_is_kept(self, disc):
        before, after, inside = disc

        change = change_between(before, after, changed_region(before, after))

        assert change.region_share == pytest.approx(inside.mean(), rel=0.15)
        assert change.region_change_share > 0.97
        assert change.mae == pytest.approx(0.3 * inside.mean(), rel=1e-4)
        assert change.outside_mae < 0.03 * change.mae
        assert change.outside_ms_ssim > 0.995 > change.ms_ssim

    def test_change_elsewhere_is_seen_outside(self, disc):
        before, after, inside = disc
        noise = np.where(inside, 0, 0.05 * np.random.default_rng(0).normal(size=before.shape)).astype(np.float32)

        region = changed_region(before, after + noise)
        change = change_between(before, after + noise, region)

        mean_of_noise = float(np.abs(noise)[0][~region].mean())
        assert change.outside_mae == pytest.approx(mean_of_noise, rel=0.1)
        assert change.outside_ms_ssim < 0.97
        assert change.region_change_share < 0.7

    def test_no_change_has_no_region(self, disc):
        before, _, _ = disc

        change = change_between(before, before, changed_region(before, before))

        assert (change.region_share, change.region_change_share, change.mae, change.outside_mae) == (0, 0, 0, 0)
        assert change.outside_ms_ssim == pytest.approx(1)

    def test_change_everywhere_alike_leaves_no_outside(self, disc):
        black, grey = np.zeros_like(disc[0]), np.full_like(disc[0], 0.25)

        change = change_between(black, grey, changed_region(black, grey))

        assert change.region_share == 1
        assert change.outside_mae == 0

    def test_small_images_have_no_ms_ssim(self):
        change = change_between(np.zeros((1, 16, 16)), np.eye(16)[None], np.eye(16, dtype=bool))

        assert change.ms_ssim is None
        assert change.outside_ms_ssim is None


class TestStrengths:
    @pytest.mark.parametrize(
        ("given", "expected"),
        [("-3,0,3", [-3, 0, 3]), ((-1, 2.5), [-1, 2.5]), (2, [2]), ([1, 1, 0], [1, 0])],
    )
    def test_of_the_command_line(self, given, expected):
        assert parse_strengths(given) == expected

    @pytest.mark.parametrize("given", ["", "a,b", "nan", [], None, "1,inf"])
    def test_nonsense_is_refused(self, given):
        with pytest.raises(UserError, match="strengths must be finite numbers"):
            parse_strengths(given)


class TestGuidedDirection:
    @pytest.mark.parametrize("hold", ["age,sex", ["age", "sex"], "all"])
    def test_is_orthogonal_to_what_is_held(self, pggan, hold):
        embedding, directions, generator = pggan

        vector, _, names, kept = guided_direction(directions, "Pneumonia", hold, embedding, generator)

        assert names == ["age", "sex"]
        for name in names:
            assert abs((directions.probe(name)[0] * vector).sum()) < 1e-12
        projections = (embedding.latents * vector / np.linalg.norm(vector)).sum((1, 2))
        assert np.linalg.norm(vector) == pytest.approx(projections.std(ddof=1), rel=1e-5)
        assert 0 < kept < 1

    @pytest.mark.parametrize("hold", ["none", None, []])
    def test_nothing_held_is_the_direction_of_the_file(self, pggan, hold):
        embedding, directions, generator = pggan

        vector, _, names, kept = guided_direction(directions, "Pneumonia", hold, embedding, generator)

        assert names == []
        assert kept == pytest.approx(1)
        assert vector == pytest.approx(directions.vector("Pneumonia"), rel=1e-5)

    def test_layers_alone_are_moved_and_still_hold(self, stylegan):
        embedding, directions, generator = stylegan

        vector, *_ = guided_direction(directions, "Pneumonia", "all", embedding, generator, [1, 2])

        assert np.flatnonzero(vector.any(1)).tolist() == [1, 2]
        assert abs((directions.probe("age")[0] * vector).sum()) < 1e-12

    def test_class_of_the_generator_is_held(self):
        torch.manual_seed(0)
        generator = LatentGenerator(PGGANGenerator((12, 8), latent_dim=Z, num_classes=2), sha256="a" * 64)
        embedding = embedding_of(generator)

        vector, *_ = guided_direction(directions_of(embedding), "age", "none", embedding, generator)

        assert np.abs(vector[:, Z:]).max() < 1e-12

    def test_direction_cannot_be_held_against_itself(self, pggan):
        embedding, directions, generator = pggan
        with pytest.raises(UserError, match="age cannot be moved and held at once"):
            guided_direction(directions, "age", "sex,age", embedding, generator)

    def test_direction_without_probe_cannot_be_held(self, pggan):
        embedding, directions, generator = pggan
        with pytest.raises(UserError, match="sefa_0 is no probe"):
            guided_direction(directions, "age", "sefa_0", embedding, generator)

    def test_layers_need_w_plus(self, pggan):
        embedding, directions, generator = pggan
        with pytest.raises(UserError, match="layers must be null in the space z"):
            guided_direction(directions, "age", "none", embedding, generator, [0])


@pytest.fixture(scope="module")
def done(pggan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("manipulate")
    return manipulate(*pggan, folder, "image3.png,4", "Pneumonia", "age", "-2,0,2"), folder


class TestManipulate:
    def test_strength_0_is_the_image_of_the_latent(self, pggan, done):
        embedding, _, generator = pggan
        with torch.no_grad():
            expected = generator(torch.from_numpy(embedding.latents[3:4]))[0, 0].clamp(0, 1).numpy()

        pixels = np.asarray(Image.open(done[1] / "samples" / "image0003_Pneumonia_+0.png"))

        assert np.abs(pixels - expected * 255).max() <= 0.51
        row = next(row for row in rows_of(done[1] / "manipulation.csv") if row["strength"] == "0.0")
        assert all(float(row[name]) == 0 for name in ("mae", "outside_mae", "control_mae", "change_Pneumonia"))

    def test_held_score_stays_and_the_target_follows_the_strength(self, done):
        rows = rows_of(done[1] / "manipulation.csv")

        assert len(rows) == 6
        for row in rows:
            assert abs(float(row["change_age"])) < 1e-5
            if float(row["strength"]):
                assert float(row["change_Pneumonia"]) * float(row["strength"]) > 0
        assert done[0]["held_change"] < 1e-5
        assert any(abs(float(row["change_sex"])) > 0.01 for row in rows)

    def test_every_image_is_marked_with_its_source(self, done):
        items = load_datalist(done[1] / "datalist.json", "training")

        assert len(items) == 6
        assert all(item["synthetic"] is True for item in items)
        assert [item["derived_from"] for item in items] == [["0/image3.png"]] * 3 + [["1/image4.png"]] * 3
        assert [item["derived_from_patients"] for item in items] == [["p1"]] * 3 + [["p2"]] * 3
        assert len({item["patient"] for item in items}) == 2
        assert all(item["patient"].startswith("synthetic-") for item in items)

    def test_strips_and_figures_are_written(self, done):
        figures, folder = done

        assert {path.name for path in (folder / "images").iterdir()} == {
            "manipulation_image0003.png",
            "manipulation_image0004.png",
        }
        assert json.loads((folder / "metrics.json").read_text()) == figures
        assert figures["n"] == 2
        assert (figures["lowest_strength"], figures["highest_strength"]) == (-2, 2)
        assert (folder / "generation.json").is_file()

    def test_both_ends_are_reported(self, done):
        rows = rows_of(done[1] / "manipulation.csv")

        for end, strength in (("lowest", "-2.0"), ("highest", "2.0")):
            of_end = [row for row in rows if row["strength"] == strength]
            for name in ("mae", "outside_mae", "control_mae", "control_region_change_share"):
                assert done[0][f"{end}_{name}"] == pytest.approx(np.mean([float(row[name]) for row in of_end]))
        assert done[0]["lowest_target_change"] < 0 < done[0]["highest_target_change"]

    def test_region_is_the_union_of_both_ends_at_every_strength(self, done):
        rows = rows_of(done[1] / "manipulation.csv")
        pixels = {
            row["strength"]: np.asarray(Image.open(done[1] / row["file"]), dtype=float)[None] / 255 for row in rows[:3]
        }
        union = changed_region(pixels["0.0"], pixels["-2.0"]) | changed_region(pixels["0.0"], pixels["2.0"])

        assert [float(row["region_share"]) for row in rows[:3]] == pytest.approx([union.mean()] * 3)
        change = change_between(pixels["0.0"], pixels["-2.0"], union)
        assert float(rows[0]["outside_mae"]) == pytest.approx(change.outside_mae, rel=1e-3)

    def test_control_has_the_length_layers_and_held_scores_of_the_direction(self, stylegan):
        embedding, directions, generator = stylegan
        vector, held, *_ = guided_direction(directions, "Pneumonia", "age", embedding, generator, [1, 2])

        first, again, other = (_random_direction(vector, held, embedding.latents, seed) for seed in (0, 0, 1))

        assert np.linalg.norm(first) == pytest.approx(np.linalg.norm(vector))
        assert np.flatnonzero(first.any(1)).tolist() == [1, 2]
        assert abs((directions.probe("age")[0] * first).sum()) < 1e-9
        assert (first == again).all()
        assert abs((first * other).sum() / np.square(first).sum()) < 0.95

    def test_what_the_reconstruction_lost_is_in_the_table(self, pggan, tmp_path):
        embedding, directions, generator = pggan
        items = [{**item, "ms_ssim": 0.5 + number / 100} for number, item in enumerate(embedding.items)]

        figures = manipulate(
            replace(embedding, items=items), directions, generator, tmp_path, "3,4", "age", strengths=1
        )

        assert [row["reconstruction_ms_ssim"] for row in rows_of(tmp_path / "manipulation.csv")] == ["0.53", "0.54"]
        assert figures["reconstruction_ms_ssim"] == pytest.approx(0.535)

    def test_strips_left_out_are_told(self, pggan, tmp_path, caplog):
        with caplog.at_level("INFO"):
            manipulate(*pggan, tmp_path, list(range(18)), "age", strengths=1)

        assert len(list((tmp_path / "images").iterdir())) == 16
        assert "2 are left out" in caplog.text

    def test_files_say_what_they_are_and_their_names_do_not_name_the_source(self, pggan, done, tmp_path):
        embedding, _, generator = pggan
        items = load_datalist(done[1] / "datalist.json", "training")

        for item in items:
            assert Path(item["derived_from"][0]).stem not in item["image"]
            with Image.open(item["image"]) as picture:
                assert picture.text["Description"].startswith("synthetic image")
                assert item["derived_from"][0] in picture.text["Source"]
                assert generator.sha256 in picture.text["Source"]
        around = StylisedSet(embedding, generator, tmp_path, "around", "3", seeds=0)
        around.begin()
        around.save({"name": around.todo[0]["name"], "pred": torch.zeros(1, 16, 16)})
        around_item = next(iter(around._listed.values()))
        assert around_item["patient"] == items[0]["patient"]  # one patient, whatever the mode

    def test_folder_with_samples_is_refused_without_resume(self, pggan, done):
        with pytest.raises(UserError, match="holds images already"):
            manipulate(*pggan, done[1], "image3.png,4", "Pneumonia", "age", "-2,0,2")
        with pytest.raises(UserError, match="were made with direction Pneumonia, this run has sex"):
            manipulate(*pggan, done[1], "image3.png,4", "sex", "age", "-2,0,2", resume=True)

    def test_resumed_run_writes_the_same(self, pggan, done):
        before = (done[1] / "samples" / "image0004_Pneumonia_+2.png").read_bytes()

        again = manipulate(*pggan, done[1], "image3.png,4", "Pneumonia", "age", "-2,0,2", resume=True)

        assert again == done[0]
        assert (done[1] / "samples" / "image0004_Pneumonia_+2.png").read_bytes() == before

    def test_dicom_says_that_it_is_synthetic(self, stylegan, tmp_path):
        manipulate(*stylegan, tmp_path, 0, "sefa_0", "none", [1], "0-2", "dicom")

        dataset = pydicom.dcmread(tmp_path / "samples" / "image0000_sefa_0_+1.dcm")
        assert dataset.PatientID.startswith("synthetic-")
        assert "SYNTHETIC" in "".join(dataset.ImageType) or "synthetic" in dataset.SeriesDescription
        assert "0/image0.png" in dataset.DerivationDescription

    def test_latents_of_another_generator_are_refused(self, pggan, stylegan, tmp_path):
        with pytest.raises(UserError, match="generator"):
            manipulate(pggan[0], stylegan[1], stylegan[2], tmp_path, 0, "age")

    def test_unknown_direction_tells_the_closest(self, pggan, tmp_path):
        with pytest.raises(UserError, match=r"no direction 'Pnuemonia' .* did you mean Pneumonia"):
            manipulate(*pggan, tmp_path, 0, "Pnuemonia")
        assert not any(tmp_path.iterdir())

    def test_unknown_image_tells_the_closest(self, pggan, tmp_path):
        with pytest.raises(UserError, match=r"no image 'imag3\.png' in the embedding"):
            manipulate(*pggan, tmp_path, "imag3.png", "age")
