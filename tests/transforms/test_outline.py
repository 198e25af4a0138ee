"""Outlines between the pixels of a mask and those around it."""

from __future__ import annotations

import numpy as np
import pytest

from medgen.transforms import draw_outlines
from medgen.transforms.outline import BOX, LARGEST_PICTURE, SMALLEST_PICTURE

RED = (255, 0, 0)


def rectangle(shape=(300, 400), rows=(50, 100), columns=(80, 200)) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[rows[0] : rows[1], columns[0] : columns[1]] = True
    return mask


def coloured(picture, colour):
    return np.argwhere((picture == colour).all(axis=-1))


def test_outline_runs_around_the_mask_and_leaves_its_inside():
    picture = draw_outlines(np.full((1, 300, 400), 0.5), {RED: rectangle()})
    points = coloured(picture, RED)
    assert picture.shape == (300, 400, 3)
    np.testing.assert_allclose(points.min(axis=0), (50, 80), atol=2)
    np.testing.assert_allclose(points.max(axis=0), (100, 200), atol=2)
    assert (picture[60:90, 90:190] == 128).all()


def test_small_image_is_enlarged_by_a_whole_factor():
    picture = draw_outlines(np.zeros((1, 60, 90)), {RED: rectangle((60, 90), (10, 20), (30, 60))})
    factor = -(-SMALLEST_PICTURE // 60)
    assert picture.shape == (60 * factor, 90 * factor, 3)
    points = coloured(picture, RED)
    np.testing.assert_allclose(points.min(axis=0), (10 * factor, 30 * factor), atol=2)
    np.testing.assert_allclose(points.max(axis=0), (20 * factor, 60 * factor), atol=2)


def test_mask_of_the_whole_image_is_outlined_at_its_edge():
    points = coloured(draw_outlines(np.zeros((1, 256, 256)), {RED: np.ones((256, 256), dtype=bool)}), RED)
    assert points.min() == 0
    assert points.max() == 255


@pytest.mark.parametrize("channels", [1, 3])
def test_image_without_a_mask_is_itself(channels):
    image = np.random.default_rng(0).random((channels, 256, 300))
    picture = draw_outlines(image, {RED: np.zeros((256, 300), dtype=bool)})
    expected = np.rint(image * 255).astype(np.uint8).transpose(1, 2, 0)
    np.testing.assert_array_equal(picture, np.broadcast_to(expected, (256, 300, 3)))


def test_box_lies_on_its_first_and_last_pixels():
    points = coloured(draw_outlines(np.zeros((1, 256, 300)), {}, box=(10, 20, 110, 220)), BOX)
    assert tuple(points.min(axis=0)) == (10, 20)
    assert tuple(points.max(axis=0)) == (109, 219)


@pytest.mark.parametrize(("height", "width"), [(1024, 768), (200, 400), (40, 2000)])
def test_large_image_is_reduced_with_its_outline_and_box(height, width):
    mask = rectangle((height, width), (height // 4, height // 2), (width // 4, width // 2))
    picture = draw_outlines(np.zeros((1, height, width)), {RED: mask})
    scale = min(1, LARGEST_PICTURE / max(height, width))
    assert picture.shape == (round(height * scale), round(width * scale), 3)
    corners = scale * np.array([[height // 4, width // 4], [height // 2, width // 2]])
    points = coloured(picture, RED)
    np.testing.assert_allclose([points.min(axis=0), points.max(axis=0)], corners, atol=2)
    boxed = draw_outlines(np.zeros((1, height, width)), {}, (height // 4, width // 4, height // 2, width // 2))
    points = coloured(boxed, BOX)
    np.testing.assert_allclose([points.min(axis=0), points.max(axis=0) + 1], corners, atol=2)
