"""Items that must have a mask."""

from __future__ import annotations

import numpy as np
import pytest
from monai.transforms import LoadImage
from PIL import Image

from medgen.data import MedicalImageReader, binary_mask, load_masked, write_datalist
from medgen.errors import UserError


@pytest.fixture
def datalist(tmp_path):
    for name in ("a", "b", "a_mask"):
        (tmp_path / f"{name}.png").touch()
    with_mask = {"image": "a.png", "patient": "a", "mask": "a_mask.png"}
    without = {"image": "b.png", "patient": "b"}
    write_datalist(tmp_path / "datalist.json", "two", "X-ray", {"training": [with_mask], "test": [without]})
    return tmp_path / "datalist.json"


def test_items_come_with_full_paths(datalist, tmp_path):
    (item,) = load_masked(datalist, "training")
    assert (item["image"], item["mask"]) == (str(tmp_path / "a.png"), str(tmp_path / "a_mask.png"))


def test_item_without_a_mask_is_named_with_the_command_that_gives_it_one(datalist):
    with pytest.raises(UserError, match=r"1 of 1 items of split test have no mask.*b\.png.*preprocessing\.masks"):
        load_masked(datalist, "test")


def read(path):
    return LoadImage(reader=MedicalImageReader, ensure_channel_first=True, image_only=True)(path)


DISC = (np.mgrid[:40, :60] ** 2).sum(axis=0) < 900


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("labels", [(1,), (255,), (1, 2, 3)])
def test_every_label_is_inside_whatever_the_bits(tmp_path, kind, labels):
    pixels = np.zeros(DISC.shape, kind)
    for number, label in enumerate(labels):
        pixels[10 * number :] = label
    pixels[~DISC] = 0
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    mask = binary_mask(read(tmp_path / "mask.png"))
    np.testing.assert_array_equal(mask.numpy()[0], DISC.astype(np.float32))


@pytest.mark.parametrize("quality", [75, 90, 95, 98, 100])
def test_noise_of_a_jpeg_is_outside(tmp_path, quality):
    Image.fromarray(DISC.astype(np.uint8) * 255).save(tmp_path / "mask.jpg", quality=quality)
    mask = binary_mask(read(tmp_path / "mask.jpg"))
    np.testing.assert_array_equal(mask.numpy()[0], DISC.astype(np.float32))


def test_empty_mask_is_named(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=r"mask\.png: the mask marks no pixel; leave its image out of the datalist"):
        binary_mask(read(tmp_path / "mask.png"))
