"""EnsureChannels: grey to colour and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image

from medgen.errors import UserError
from medgen.transforms import EnsureChannels, EnsureChannelsd


def test_colour_to_grey_is_pillows_luma():
    colour = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    oracle = np.asarray(Image.fromarray(colour).convert("L"))

    grey = EnsureChannels(1)((colour / 255).astype(np.float32).transpose(2, 0, 1))

    assert grey.shape == (1, 20, 30)
    assert np.abs(grey[0] * 255 - oracle).max() <= 0.51  # Pillow rounds


@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor, MetaTensor])
def test_grey_to_colour_repeats_the_channel(make):
    grey = make(np.arange(6, dtype=np.float32).reshape(1, 2, 3))

    colour = EnsureChannels(3)(grey)

    assert type(colour) is type(grey)
    assert colour.shape == (3, 2, 3)
    assert all(np.array_equal(colour[i], grey[0]) for i in range(3))


def test_equal_channels_survive_the_way_to_grey():
    colour = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(3, 1, 1)

    torch.testing.assert_close(EnsureChannels(1)(colour), colour[:1])


def test_right_number_of_channels_is_left_alone():
    image = torch.zeros(3, 2, 2)

    assert EnsureChannels(3)(image) is image


def test_metadata_stay_and_other_keys_are_untouched():
    item = {"image": MetaTensor(torch.zeros(3, 2, 2), meta={"filename_or_obj": "a.png"}), "label": 1}

    out = EnsureChannelsd("image", 1)(item)

    assert out["image"].meta["filename_or_obj"] == "a.png"
    assert out["label"] == 1
    assert item["image"].shape == (3, 2, 2)


@pytest.mark.parametrize("shape", [(2, 4, 4), (4, 4, 4), (4, 4), (1, 1, 4, 4)])
def test_other_shapes_are_refused_with_the_file(shape):
    image = MetaTensor(torch.zeros(shape), meta={"filename_or_obj": "odd.png"})

    with pytest.raises(UserError, match=r"odd\.png: expected \(C, H, W\) with 1 or 3 channels"):
        EnsureChannels(1)(image)


def test_number_of_channels_is_checked_at_construction():
    with pytest.raises(UserError, match="channels must be 1"):
        EnsureChannels(4)


def test_missing_key_is_an_error_unless_allowed():
    assert EnsureChannelsd("image", 1, allow_missing_keys=True)({"label": 1}) == {"label": 1}
    with pytest.raises(KeyError):
        EnsureChannelsd("image", 1)({"label": 1})
