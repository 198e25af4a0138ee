"""Latents from the disk are draws from the posterior; copies are a function of the item's seed."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from monai.transforms import (
    CenterSpatialCropd,
    Compose,
    Lambdad,
    LoadImaged,
    NormalizeIntensityd,
    Rand2DElasticd,
    RandAffined,
    RandBiasFieldd,
    RandFlipd,
    RandShiftIntensityd,
    RandSpatialCropd,
)

from medgen.data import LatentScaling, MedicalImageReader
from medgen.errors import UserError
from medgen.transforms import AugmentedCopiesd, LoadLatentd, ResizeShorterSided, transform_digest

SHAPE = (3, 4, 4)
SCALING = LatentScaling((2.0, 0.5, 1.0), (1.0, -1.0, 0.0), "sha")
PLAIN = LatentScaling((1.0,), (0.0,), "sha")


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """Three images with two copies each."""
    rng = np.random.default_rng(0)
    array = rng.normal(size=(3, 3, 2, *SHAPE)).astype(np.float16)
    array[:, :, 1] = abs(array[:, :, 1])
    path = tmp_path_factory.mktemp("latents") / "00000.npy"
    np.save(path, array)
    return path, array.astype(np.float32)


def place(shard, row: int = 1) -> dict:
    return {"image": "x.png", "latent": {"file": str(shard[0]), "row": row}, "label": 1}


def test_mean_is_whitened_and_takes_the_place_of_the_path(shard):
    item = place(shard)

    found = LoadLatentd("latent", SCALING, posterior="mean")(item)

    assert found.keys() == {"image", "label"}
    assert (found["image"].dtype, found["image"].shape) == (torch.float32, SHAPE)
    scale, shift = np.array([2, 0.5, 1])[:, None, None], np.array([1, -1, 0])[:, None, None]
    np.testing.assert_allclose(found["image"], (shard[1][1, 0, 0] - shift) * scale, rtol=1e-6)
    assert item == place(shard)


def test_samples_have_the_posteriors_mean_and_standard_deviation(shard):
    load = LoadLatentd("latent", PLAIN).set_random_state(0)

    draws = torch.stack([load(place(shard))["image"] for _ in range(4000)]).numpy()

    mean, std = shard[1][1, 0]
    np.testing.assert_array_less(abs(draws.mean(0) - mean), 4.5 * std / 4000**0.5 + 1e-6)
    np.testing.assert_allclose(draws.std(0), std, rtol=0.06, atol=1e-6)


def test_draw_is_a_function_of_the_random_state(shard):
    load = LoadLatentd("latent", SCALING, augment_prob=0.5)
    compose = Compose([load])

    def draw(seed: int) -> torch.Tensor:
        compose.set_random_state(seed)
        return compose(place(shard))["image"]

    first, other = draw(3), draw(4)
    assert torch.equal(draw(3), first)
    assert not torch.equal(other, first)


def test_copies_are_taken_as_often_as_asked_and_all_of_them(shard):
    load = LoadLatentd("latent", PLAIN, posterior="mean", augment_prob=0.3).set_random_state(0)

    drawn = [load(place(shard))["image"].numpy() for _ in range(2000)]

    taken = [next(k for k in range(3) if np.array_equal(image, shard[1][1, k, 0])) for image in drawn]
    shares = np.bincount(taken, minlength=3) / 2000
    np.testing.assert_allclose(shares, [0.7, 0.15, 0.15], atol=4 * (0.7 * 0.3 / 2000) ** 0.5)


def test_image_itself_is_taken_where_there_are_no_copies(tmp_path):
    array = np.ones((1, 1, 2, *SHAPE), np.float16)
    np.save(tmp_path / "00000.npy", array)

    found = LoadLatentd("latent", PLAIN, posterior="mean", augment_prob=1.0)(place((tmp_path / "00000.npy", array), 0))

    assert torch.equal(found["image"], torch.ones(SHAPE))


def test_worker_processes_are_not_sent_the_data(shard):
    load = LoadLatentd("latent", PLAIN, posterior="mean")
    before = load(place(shard))["image"]

    sent = pickle.dumps(load)

    assert len(sent) < shard[1].nbytes / 2
    assert torch.equal(pickle.loads(sent)(place(shard))["image"], before)


@pytest.mark.parametrize("content", [b"", b"no array", None])
def test_unreadable_shard_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "00000.npy"
    if content is None:
        np.save(path, np.array([None]), allow_pickle=True)
    else:
        path.write_bytes(content)

    with pytest.raises(UserError, match=r"00000\.npy cannot be read as latents"):
        LoadLatentd("latent", PLAIN)(place((path, None), 0))


def test_wrong_settings_are_refused_at_construction():
    with pytest.raises(UserError, match="posterior must be sample or mean"):
        LoadLatentd("latent", PLAIN, posterior="mode")
    with pytest.raises(UserError, match="augment_prob must be from 0 to 1"):
        LoadLatentd("latent", PLAIN, augment_prob=1.5)


# ---------------------------------------------------------------------------------------------------------------------


def affine(prob: float = 1.0, degrees: float = 5) -> RandAffined:
    return RandAffined("image", prob=prob, rotate_range=[np.deg2rad(degrees)], translate_range=[2, 2], mode="bilinear")


def test_copies_follow_the_image_and_depend_on_its_seed_alone():
    images = torch.rand(2, 1, 16, 16)
    copies = AugmentedCopiesd("image", affine(), 3)

    first = copies({"image": images[0], "seed": 11})
    copies({"image": images[1], "seed": 12})
    again = copies({"image": images[0], "seed": 11})

    assert first["image"].shape == (4, 1, 16, 16)
    assert torch.equal(first["image"][0], images[0])
    assert torch.equal(first["image"], again["image"])
    assert len({tuple(image.flatten().tolist()) for image in first["image"]}) == 4
    assert not torch.equal(copies({"image": images[0], "seed": 12})["image"][1], first["image"][1])
    assert first["seed"] == 11


def test_without_copies_the_image_is_alone():
    image = torch.rand(1, 16, 16)

    assert torch.equal(AugmentedCopiesd("image", affine(), 0)({"image": image, "seed": 1})["image"], image[None])


def chain(size: int = 64, crop: int = 64, degrees: float = 5) -> Compose:
    return Compose(
        [
            LoadImaged("image", ensure_channel_first=True, image_only=True),
            ResizeShorterSided("image", size=size, enlarge=False),
            CenterSpatialCropd("image", roi_size=(crop, crop)),
            affine(degrees=degrees),
        ]
    )


def test_digest_tells_settings_apart():
    digest = transform_digest(chain())

    assert transform_digest(chain()) == digest
    others = [chain(size=32), chain(crop=32), chain(degrees=6), Compose(chain().transforms[:3])]
    assert len({digest, *map(transform_digest, others)}) == 5


@pytest.mark.parametrize(
    "transform",
    [
        affine(),
        RandFlipd("image", prob=0.5),
        RandShiftIntensityd("image", offsets=0.1, prob=0.5),
        RandBiasFieldd("image", prob=0.5),
        RandSpatialCropd("image", roi_size=(8, 8)),
        Rand2DElasticd("image", spacing=(8, 8), magnitude_range=(1, 2), prob=0.5),
    ],
    ids=lambda transform: type(transform).__name__,
)
def test_what_a_random_transform_has_drawn_is_no_setting(transform):
    before = transform_digest(transform)
    transform.set_random_state(1)
    for _ in range(4):
        transform({"image": torch.rand(1, 16, 16)})

    assert transform_digest(transform) == before


def test_digest_takes_numbers_by_value_and_functions_by_name():
    digests = [
        transform_digest(transform)
        for transform in (
            NormalizeIntensityd("image", subtrahend=np.float32(1)),
            NormalizeIntensityd("image", subtrahend=np.float32(2)),
            NormalizeIntensityd("image", subtrahend=torch.tensor(1.0)),
            NormalizeIntensityd("image", subtrahend=torch.tensor(2.0)),
            Lambdad("image", torch.sqrt),
            Lambdad("image", torch.exp),
            LoadImaged("image", reader=MedicalImageReader),
            LoadImaged("image", reader=MedicalImageReader, frame=1),
        )
    ]

    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("function", [lambda x: x, torch.nn.ReLU(), np.sqrt], ids=["lambda", "module", "ufunc"])
def test_functions_that_cannot_be_told_apart_have_no_digest(function):
    with pytest.raises(UserError, match="a transform") as caught:
        transform_digest([Lambdad("image", function)])

    assert "\n" not in str(caught.value)


def test_digest_does_not_depend_on_the_readers_that_are_installed():
    load = LoadImaged("image", reader=MedicalImageReader)
    before = transform_digest(load)
    del load._loader.readers[0]

    assert transform_digest(load) == before
