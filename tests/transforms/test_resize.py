"""ResizeShorterSide: the resize of the published preprocessing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image

from medgen.errors import UserError
from medgen.transforms import ResizeShorterSide, ResizeShorterSided


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).random(shape, dtype=np.float32)


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [
        ((100, 60), 30, (50, 30)),
        ((60, 100), 30, (30, 50)),
        ((61, 100), 30, (30, 49)),  # 49.2, and torchvision rounds down
        ((512, 513), 512, (512, 513)),
        ((20, 30), 50, (50, 75)),
        ((7, 7), 1, (1, 1)),
    ],
)
def test_shorter_side_gets_the_size_and_the_other_follows(shape, size, expected):
    assert ResizeShorterSide(size)(noise(1, *shape)).shape == (1, *expected)


@pytest.mark.parametrize(("shape", "size"), [((97, 61), 20), ((61, 97), 40), ((20, 31), 45)])
def test_values_are_those_of_pillows_bilinear_filter(shape, size):
    picture = noise(1, *shape)

    resized = ResizeShorterSide(size)(picture)

    height, width = resized.shape[1:]
    oracle = np.asarray(Image.fromarray(picture[0]).resize((width, height), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(resized[0], oracle, atol=1e-5)


def test_fine_stripes_average_out_instead_of_aliasing():
    stripes = np.tile(np.array([0, 1], np.float32), (1, 64, 32))

    resized = ResizeShorterSide(16)(stripes)

    np.testing.assert_allclose(resized, 0.5, atol=0.05)


@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor, MetaTensor])
def test_container_is_kept_and_the_input_is_not_changed(make):
    picture = make(noise(3, 10, 20))
    before = np.asarray(picture).copy()

    resized = ResizeShorterSide(5)(picture)

    assert type(resized) is type(picture)
    assert resized.shape == (3, 5, 10)
    np.testing.assert_array_equal(np.asarray(picture), before)


def test_integers_become_float32():
    assert ResizeShorterSide(2)(np.arange(64, dtype=np.uint8).reshape(1, 8, 8)).dtype == np.float32


def test_affine_follows_and_metadata_stay():
    affine = torch.diag(torch.tensor([2.0, 3.0, 1.0, 1.0], dtype=torch.float64))
    picture = MetaTensor(noise(1, 40, 80), affine=affine, meta={"filename_or_obj": "a.png"})

    resized = ResizeShorterSide(10)(picture)

    # pixels are four times as large, and the first one's centre lies 1.5 old pixels further in
    expected = torch.tensor([[8.0, 0, 0, 3], [0, 12, 0, 4.5], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(resized.affine, expected)
    assert resized.meta["filename_or_obj"] == "a.png"
    torch.testing.assert_close(picture.affine, affine)


def test_image_of_the_right_size_is_left_alone():
    picture = torch.zeros(1, 16, 30)

    assert ResizeShorterSide(16)(picture) is picture


def test_wrong_size_and_shape_are_user_errors():
    with pytest.raises(UserError, match="size must be at least 1"):
        ResizeShorterSide(0)
    with pytest.raises(UserError, match=r"shape \(C, H, W\)"):
        ResizeShorterSide(4)(torch.zeros(8, 8))


def test_dictionary_version_resizes_its_keys_only():
    item = {"image": torch.zeros(1, 8, 8), "mask": torch.zeros(1, 8, 8)}

    out = ResizeShorterSided(keys="image", size=4)(item)

    assert out["image"].shape == (1, 4, 4)
    assert out["mask"].shape == (1, 8, 8)
    assert ResizeShorterSided(keys="x", size=4, allow_missing_keys=True)(item).keys() == item.keys()


def test_smaller_images_are_left_for_a_check_to_refuse_where_they_are_not_to_be_enlarged():
    small, large = torch.rand(1, 30, 40), torch.rand(1, 80, 90)
    resize = ResizeShorterSide(32, enlarge=False)
    assert resize(small) is small
    assert resize(large).shape == (1, 32, 36)
