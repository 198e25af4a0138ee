"""CheckImage: images pass untouched or are refused in one line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from medgen.errors import UserError
from medgen.transforms import CheckImage, CheckImaged


def image(*shape: int, value: float = 0.5) -> MetaTensor:
    return MetaTensor(torch.full(shape, value), meta={"filename_or_obj": "x.png"})


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (1, 5, 7)),
        ({"spatial_shape": (48, 64)}, (1, 48, 64)),
        ({"min_shape": 64}, (1, 64, 65)),
        ({"divisible_by": 8}, (1, 8, 24)),
        ({"spatial_shape": 64, "min_shape": (64, 64), "divisible_by": 64}, (1, 64, 64)),
    ],
)
@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor])
def test_what_is_expected_passes_unchanged(options, shape, make):
    picture = make(np.full(shape, 0.5, np.float32))

    assert CheckImage(channels=1, **options)(picture) is picture


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({}, (3, 8, 8), "x.png: expected 1 channel(s), got 3; preprocess with --channels grey"),
        ({}, (8, 8), "x.png: expected an image of shape (C, H, W), got (8, 8)"),
        ({}, (1, 0, 8), "x.png: is 0×8 pixels"),
        ({"spatial_shape": 64}, (1, 48, 64), "x.png: is 48×64 pixels (height × width), expected 64×64; preprocess"),
        (
            {"min_shape": (64, 64)},
            (1, 48, 64),
            "x.png: is 48×64 pixels (height × width), smaller than the crop of 64×64; preprocess with --size 64 or "
            "lower image_size",
        ),
        ({"divisible_by": 16}, (1, 48, 40), "x.png: is 48×40 pixels (height × width), expected multiples of 16"),
    ],
)
def test_wrong_shape_is_refused_with_file_expectation_and_advice(options, shape, message):
    with pytest.raises(UserError) as caught:
        CheckImage(channels=1, **options)(image(*shape))

    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("value_range", [(0, 1), None])
def test_values_that_are_not_finite_are_refused_whatever_the_range(bad, value_range):
    picture = image(1, 4, 4)
    picture[0, 2, 1] = bad

    with pytest.raises(UserError, match=r"x\.png: has values that are not finite"):
        CheckImage(channels=1, value_range=value_range)(picture)


def test_value_range():
    with pytest.raises(UserError, match="has values from 255 to 255, expected 0 to 1"):
        CheckImage(channels=1)(image(1, 4, 4, value=255))
    with pytest.raises(UserError, match=r"has values from -0\.5 to -0\.5"):
        CheckImage(channels=1)(image(1, 4, 4, value=-0.5))

    CheckImage(channels=1, value_range=(-1, 1))(image(1, 4, 4, value=-0.5))
    CheckImage(channels=1, value_range=None)(image(1, 4, 4, value=255))
    CheckImage(channels=1)(image(1, 4, 4, value=1 + 1e-6))  # rounding of float32


@pytest.mark.parametrize(
    "options",
    [
        {"channels": 0},
        {"channels": 1, "divisible_by": 0},
        {"channels": 1, "value_range": (1, 0)},
        {"channels": 1, "value_range": (1,)},
        {"channels": 1, "min_shape": (1, 2, 3)},
        {"channels": 1, "spatial_shape": 0},
        {"channels": 1, "spatial_shape": (64.5, 64)},
    ],
)
def test_arguments_are_checked_at_construction(options):
    with pytest.raises(UserError):
        CheckImage(**options)


def test_dictionary_version_names_the_key_of_an_image_without_file():
    check = CheckImaged(keys=["a", "b"], channels=1, allow_missing_keys=True)
    good = torch.zeros(1, 2, 2)

    assert check({"a": good})["a"] is good
    with pytest.raises(UserError, match="b: expected 1 channel"):
        check({"a": good, "b": torch.zeros(2, 2, 2)})
