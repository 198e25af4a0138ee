"""Mixtures of patients' styles, ways between patients, and samples around one."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image

from medgen.apps import StylisedSet, select_images
from medgen.apps.stylisation import step_aside
from medgen.data import Embedding, derive_seed, load_datalist
from medgen.errors import UserError
from medgen.inferers import draw_latents
from medgen.inferers.generation import NOISE_STREAM
from medgen.networks import LatentGenerator, PGGANGenerator, StyleGAN2Generator

SMALL = {"latent_dim": 8, "w_dim": 12, "num_mapping_layers": 2, "channel_base": 128, "channel_max": 16}
NAMES = ["a/one.png", "a/two.png", "b/two.png", "b/00000042_003.png"]


def generator_of(space: str, num_classes: int = 0) -> LatentGenerator:
    torch.manual_seed(0)
    if space == "z":
        return LatentGenerator(PGGANGenerator([8, 8, 8], 8, num_classes=num_classes), "z", "ab" * 32)
    return LatentGenerator(StyleGAN2Generator(16, num_classes=num_classes, **SMALL), space, "cd" * 32)


@pytest.fixture(scope="module", params=["z", "w", "w+"])
def generator(request) -> LatentGenerator:
    return generator_of(request.param)


@torch.no_grad()
def embedding_of(generator: LatentGenerator, labels: list[int] | None = None) -> Embedding:
    z = torch.randn(len(NAMES), generator.z_dim, generator=torch.Generator().manual_seed(1))
    latents = generator.from_z(z, None if labels is None else torch.tensor(labels))
    if generator.space == "w+":  # what an optimisation finds has a style of its own in each layer
        latents = latents + 0.3 * generator.std * torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
    items = [{"image": name, "patient": f"patient{i // 2}"} for i, name in enumerate(NAMES)]
    for item, label in zip(items, labels or [], strict=False):
        item["label"] = label
    return Embedding(
        latents.numpy(), items, generator.space, generator.sha256, "", generator.mean.numpy(), float(generator.std),
        "encoder",
    )  # fmt: skip


def styled(generator: LatentGenerator, folder: Path, mode: str, embedding: Embedding | None = None, **settings):
    return StylisedSet(embedding or embedding_of(generator), generator, folder, mode, **settings)


@torch.no_grad()
def make(samples: StylisedSet) -> list[dict]:
    """Write what is to do, as the bundle does, and return the datalist's items."""
    samples.begin()
    for item in samples.todo:
        samples.save({**item, "pred": samples.generator(item["latent"][None])[0]})
    samples.finish()
    return load_datalist(samples.output_dir / "datalist.json", "training")


def latents_of(samples: StylisedSet) -> dict[str, torch.Tensor]:
    return {item["name"]: item["latent"] for item in samples.items}


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------ which images


@pytest.mark.parametrize(
    ("images", "indices"),
    [
        ("a/one.png,b/two.png", [0, 2]),
        ("one.png", [0]),
        ("one, 00000042_003", [0, 3]),
        (3, [3]),
        ((1, "one"), [1, 0]),
        (["a/one.png", 0], [0]),
    ],
)
def test_images_are_named_by_path_name_stem_or_index(images, indices):
    assert select_images(embedding_of(generator_of("z")), images) == indices


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("onne.png", r"no image 'onne.png' in the embedding; the closest are .*one.png"),
        ("two.png", r"'two.png' is the name of 2, among them a/two.png and b/two.png"),
        ("7", "indices from 0 to 3, got 7"),
        (None, "must name images of the embedding, such as one.png or 0, got none; set --images"),
        ([], "got none"),
    ],
)
def test_names_that_are_none_are_told_in_one_line(images, message):
    with pytest.raises(UserError, match=message) as error:
        select_images(embedding_of(generator_of("z")), images)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------ mixtures


def test_mixture_has_the_given_layers_of_the_column_and_the_rest_of_the_row(tmp_path):
    generator = generator_of("w+")
    embedding = embedding_of(generator)
    samples = styled(generator, tmp_path, "mix", embedding, images="one,3", columns="b/two.png", layers="0,2-3")

    wanted = torch.from_numpy(embedding.latents[3]).clone()
    wanted[[0, 2, 3]] = torch.from_numpy(embedding.latents[2])[[0, 2, 3]]
    torch.testing.assert_close(latents_of(samples)["styles_0003_0002"], wanted, rtol=0, atol=0)
    assert list(latents_of(samples)) == ["styles_0000_0002", "styles_0003_0002"]


def test_without_layers_coarse_middle_and_fine_styles_are_mixed_in_turn(tmp_path):
    samples = styled(generator_of("w+"), tmp_path, "mix", images="0,1")

    assert samples.groups == {"coarse": [0, 1, 2, 3], "middle": [4, 5]}  # a network of 16 pixels has six styles
    # nobody is mixed with himself
    assert list(latents_of(samples)) == ["coarse_0000_0001", "coarse_0001_0000", "middle_0000_0001", "middle_0001_0000"]
    items = make(samples)
    assert items[0]["derived_from"] == ["a/one.png", "a/two.png"]
    assert items[0]["styles"] == [0, 1, 2, 3]
    with Image.open(tmp_path / "images" / "mix_coarse.png") as grid:  # tiles of 128 pixels, and a line of text
        assert grid.size[0] == 3 * 128 + 2 * 4


def test_latents_of_w_are_mixed_as_their_expansion(tmp_path):
    generator = generator_of("w")
    embedding = embedding_of(generator)
    samples = styled(generator, tmp_path, "mix", embedding, images="0", columns="1", layers="1")

    a, b = torch.from_numpy(embedding.latents[:2, 0])
    mixed = latents_of(samples)["styles_0000_0001"]
    torch.testing.assert_close(mixed, torch.stack([a, b, a, a, a, a]))
    assert samples.generator.space == "w+"
    assert samples.generator.mean.device == generator.mean.device
    assert make(samples)[0]["synthetic"]


def test_z_has_no_styles_to_mix(tmp_path):
    with pytest.raises(
        UserError, match=r"mode mix .* must be of w or w.*, got z, .* set --mode interpolate or"
    ) as error:
        styled(generator_of("z"), tmp_path, "mix", images="0,1")
    assert "\n" not in str(error.value)


def test_mixing_one_patient_and_layers_that_are_none_are_refused(tmp_path):
    with pytest.raises(UserError, match="two or more patients, got one"):
        styled(generator_of("w+"), tmp_path, "mix", images="0")
    with pytest.raises(UserError, match="layers must be whole numbers from 0 to 5"):
        styled(generator_of("w+"), tmp_path, "mix", images="0,1", layers="4-6")


# ------------------------------------------------------------------ ways


def test_ends_of_a_way_are_the_patients(generator, tmp_path):
    embedding = embedding_of(generator)
    samples = styled(generator, tmp_path, "interpolate", embedding, images="0,3", frames=5)

    latents = latents_of(samples)
    ends = torch.from_numpy(embedding.latents[[0, 3]])
    torch.testing.assert_close(latents["frame_0000"], ends[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(latents["frame_0004"], ends[1], rtol=1e-5, atol=1e-6)
    middle = latents["frame_0002"]
    if generator.space == "z":
        torch.testing.assert_close(middle, generator.nearest(ends.mean(0, keepdim=True))[0])
    else:
        torch.testing.assert_close(middle, ends.mean(0))


def test_frames_are_films_and_files_and_know_their_patients(generator, tmp_path):
    items = make(styled(generator, tmp_path, "interpolate", images="one,b/two.png", frames=5))

    assert [item["derived_from"] for item in items] == [
        ["a/one.png"], *[["a/one.png", "b/two.png"]] * 3, ["b/two.png"],
    ]  # fmt: skip
    assert items[2]["derived_from_patients"] == ["patient0", "patient1"]
    assert [item["position"] for item in items] == [0, 0.25, 0.5, 0.75, 1]
    with Image.open(tmp_path / "images" / "interpolation.gif") as film:
        assert film.n_frames == 5
        np.testing.assert_array_equal(np.array(film.convert("L")), np.array(Image.open(items[0]["image"])))


def test_closed_way_returns_without_standing_still(tmp_path):
    samples = styled(generator_of("z"), tmp_path, "interpolate", images="0,1,2", frames=6, closed=True)

    assert [item["sources"] for item in samples.items] == [[0], [0, 1], [1], [1, 2], [2], [2, 0]]


def test_way_needs_two_patients(tmp_path):
    with pytest.raises(UserError, match="interpolate takes two or more patients, got one"):
        styled(generator_of("z"), tmp_path, "interpolate", images="0,one")


# ------------------------------------------------------------------ around


def test_sigma_0_is_the_patient(generator, tmp_path):
    embedding = embedding_of(generator)
    samples = styled(generator, tmp_path, "around", embedding, images="1", seeds="0-2", sigma=0)

    for latent in latents_of(samples).values():
        torch.testing.assert_close(latent, torch.from_numpy(embedding.latents[1]), rtol=1e-5, atol=1e-6)
    make(samples)
    for row in csv.DictReader((tmp_path / "distances.csv").open()):
        assert float(row["latent_distance"]) < 1e-3
        assert float(row["mse"]) < 1e-6


def test_z_is_turned_by_an_angle_on_its_sphere():
    generator = generator_of("z")
    latents = torch.from_numpy(embedding_of(generator).latents)
    z = torch.randn(4, 8, generator=torch.Generator().manual_seed(5))

    aside = step_aside(latents, generator, z, 0.5)

    torch.testing.assert_close(aside.square().mean(2), torch.ones(4, 1), rtol=1e-4, atol=1e-4)
    angles = torch.nn.functional.cosine_similarity(aside, latents, dim=2).acos()
    torch.testing.assert_close(angles, torch.full((4, 1), math.atan(0.5)), rtol=1e-3, atol=1e-3)


def test_class_in_z_stays():
    generator = generator_of("z", num_classes=2)
    latents = torch.from_numpy(embedding_of(generator, labels=[0, 1, 0, 1]).latents)

    aside = step_aside(latents, generator, torch.randn(4, 8), 0.5)

    assert (aside[:, 0, 8:] > 0).float().argmax(1).tolist() == [0, 1, 0, 1]
    assert aside[:, 0, 8:].abs().min(1).values.max() < 1e-6


@pytest.mark.parametrize("space", ["w", "w+"])
def test_w_is_moved_towards_a_random_latent_by_sigma_spreads(space):
    generator = generator_of(space)
    latents = torch.from_numpy(embedding_of(generator).latents)
    z = torch.randn(4, 8, generator=torch.Generator().manual_seed(5))

    with torch.no_grad():
        aside = step_aside(latents, generator, z, 0.25)
        way = generator.from_z(z) - latents

    torch.testing.assert_close(generator.relative_error(aside, latents).sqrt(), torch.full((4,), 0.25))
    cosine = torch.nn.functional.cosine_similarity((aside - latents).flatten(1), way.flatten(1))
    torch.testing.assert_close(cosine, torch.ones(4))


def test_random_latents_of_w_have_the_patients_class(tmp_path):
    generator = generator_of("w", num_classes=2)
    embedding = embedding_of(generator, labels=[0, 1, 0, 1])
    samples = styled(generator, tmp_path, "around", embedding, images="1", seeds=0, sigma=0.5)

    (moved,) = latents_of(samples).values()
    truth = torch.from_numpy(embedding.latents[1:2])
    with torch.no_grad():
        wanted = step_aside(truth, generator, draw_latents([derive_seed(0, NOISE_STREAM)], 8), 0.5, torch.tensor([1]))
    torch.testing.assert_close(moved, wanted[0])
    del embedding.items[1]["label"]
    with pytest.raises(UserError, match=r"around a/two.png needs its class from 0 to 1, got None"):
        styled(generator, tmp_path, "around", embedding, images="1", seeds=0)


def test_distances_grow_with_sigma_and_are_those_of_the_files(generator, tmp_path):
    embedding, means = embedding_of(generator), []
    for sigma in (0.1, 0.5):
        items = make(styled(generator, tmp_path / str(sigma), "around", embedding, images="0", sigma=sigma))
        rows = list(csv.DictReader((tmp_path / str(sigma) / "distances.csv").open()))
        assert len(rows) == len(items) == 16
        means.append(np.mean([float(row["mse"]) for row in rows]))
        with torch.no_grad():
            own = generator(torch.from_numpy(embedding.latents[:1]))[0, 0].clamp(0, 1).numpy()
        sample = np.array(Image.open(items[4]["image"])) / 255
        assert float(rows[4]["mse"]) == pytest.approx(np.square(sample - np.rint(own * 255) / 255).mean(), rel=1e-3)
        assert (rows[4]["image"], rows[4]["seed"]) == ("a/one.png", "4")
    assert means[0] < means[1]


@pytest.mark.parametrize("sigma", [-0.1, 1.5, math.nan, "0.5"])
def test_distance_that_is_none_is_refused(tmp_path, sigma):
    with pytest.raises(UserError, match="sigma must be a number from 0 to 1, got"):
        styled(generator_of("z"), tmp_path, "around", images="0", sigma=sigma)


def test_sample_of_a_seed_does_not_depend_on_the_other_seeds(generator, tmp_path):
    many = styled(generator, tmp_path, "around", images="0", seeds="0-5")
    one = styled(generator, tmp_path, "around", images="0", seeds="4")
    torch.testing.assert_close(latents_of(many)["image0000_seed000004"], latents_of(one)["image0000_seed000004"])


# ------------------------------------------------------------------ the folder


def test_every_output_says_that_it_is_synthetic_and_where_it_comes_from(generator, tmp_path):
    items = make(styled(generator, tmp_path, "around", images="one,3", seeds="7,8"))

    assert len(items) == 4
    sources = [("a/one.png", "patient0")] * 2 + [(NAMES[3], "patient1")] * 2
    for item, (name, patient) in zip(items, sources, strict=True):
        assert item["synthetic"] is True
        assert item["derived_from"] == [name]
        assert item["derived_from_patients"] == [patient]
        assert item["generator_sha256"] == generator.sha256
        assert item["patient"].startswith("synthetic-")
        assert patient not in item["patient"]
    assert [item["seed"] for item in items] == [7, 8, 7, 8]
    patients = [item["patient"] for item in items]
    assert patients[0] == patients[1] != patients[2] == patients[3]  # a split must not divide what is of one origin
    with Image.open(items[2]["image"]) as picture:
        assert picture.text["Description"].startswith("synthetic image")
        assert picture.text["Source"].startswith(f"generator_sha256 {generator.sha256}, derived_from ['{NAMES[3]}']")
        assert "patient1" not in picture.text["Source"]
    record = json.loads((tmp_path / "generation.json").read_text())
    assert record["generator_sha256"] == generator.sha256
    assert (record["mode"], record["seeds"], record["images"]) == ("around", [7, 8], ["a/one.png", NAMES[3]])


def test_frames_between_patients_have_one_synthetic_patient_whatever_the_order(generator, tmp_path):
    there = make(styled(generator, tmp_path / "there", "interpolate", images="0,2,1", frames=5))
    back = make(styled(generator, tmp_path / "back", "interpolate", images="2,0", frames=3))

    # images 0 and 1 are of one patient
    assert len({item["patient"] for item in there + back}) == 1
    around = make(styled(generator, tmp_path / "around", "around", images="0", seeds=0))
    assert around[0]["patient"] != there[0]["patient"]


def test_image_of_an_unknown_patient_stands_for_him(tmp_path):
    generator = generator_of("z")
    embedding = embedding_of(generator)
    del embedding.items[0]["patient"]

    items = make(styled(generator, tmp_path, "around", embedding, images="0,1", seeds=0))

    assert [item["derived_from_patients"] for item in items] == [["a/one.png"], ["patient0"]]
    assert items[0]["patient"] != items[1]["patient"]


def test_dicom_files_say_that_nobody_was_imaged_and_have_the_same_distances(tmp_path):
    generator = generator_of("z")
    tables = []
    for file_format in ("png", "dicom"):
        samples = styled(generator, tmp_path / file_format, "around", images="0", seeds="0-1", file_format=file_format)
        items = make(samples)
        rows = csv.DictReader((tmp_path / file_format / "distances.csv").open())
        tables.append([float(row["mse"]) for row in rows])
    assert tables[0] == tables[1]
    picture = pydicom.dcmread(items[0]["image"])
    assert (picture.SyntheticData, picture.PatientName, picture.PatientID) == ("YES", "SYNTHETIC", items[0]["patient"])


def test_interrupted_set_is_finished_with_the_same_files(generator, tmp_path):
    for name in ("whole", "killed"):
        make(styled(generator, tmp_path / name, "around", images="0,1", seeds="0-4", batch_size=3))
    for lost in ("samples/image0000_seed000003.png", "samples/image0001_seed000001.png", "datalist.json"):
        (tmp_path / "killed" / lost).unlink()

    with pytest.raises(UserError, match="--resume true"):
        styled(generator, tmp_path / "killed", "around", images="0,1", seeds="0-4", batch_size=3)
    rest = styled(generator, tmp_path / "killed", "around", images="0,1", seeds="0-4", batch_size=3, resume=True)

    # those groups of three that lack one
    assert [item["name"] for item in rest.todo] == [item["name"] for item in rest.items[3:9]]
    make(rest)
    assert files_in(tmp_path / "killed") == files_in(tmp_path / "whole")


def test_set_is_not_continued_with_other_settings(tmp_path):
    generator = generator_of("z")
    make(styled(generator, tmp_path, "around", images="0", seeds="0-1", sigma=0.2))
    with pytest.raises(UserError, match=r"were made with sigma 0.2, this run has 0.4"):
        styled(generator, tmp_path, "around", images="0", seeds="0-1", sigma=0.4, resume=True).begin()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "blend"}, "mode must be one of mix, interpolate, around, got 'blend'; set --mode"),
        ({"file_format": "jpeg"}, "file_format must be png or dicom"),
        ({"file_name": "film.avi"}, "file_name must be"),
    ],
)
def test_settings_that_are_none_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        styled(generator_of("z"), tmp_path, **{"mode": "around", "images": "0", **changes})


def test_latents_of_another_generator_or_space_are_refused(tmp_path):
    embedding = embedding_of(generator_of("w"))
    with pytest.raises(UserError, match="latents are of the space w, the generator was loaded for z; set --space w"):
        styled(generator_of("z"), tmp_path, "around", embedding, images="0")
    other = LatentGenerator(generator_of("w").network, "w", "ef" * 32)
    with pytest.raises(UserError, match="belong to the generator cdcdcdcdcdcd, this one is efefefefefef"):
        styled(other, tmp_path, "around", embedding, images="0")
