"""Outlines of masks drawn over images."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw
from skimage.measure import find_contours

__all__ = ["PREDICTED", "TRUE", "draw_outlines"]

TRUE, PREDICTED = (0, 200, 90), (255, 140, 0)  # told apart by those who confuse red and green, too
BOX = (0, 200, 255)
SMALLEST_PICTURE = 256  # pixels of the shorter side: a small image is enlarged by a whole factor
LARGEST_PICTURE = 512  # pixels of the longer side: a picture to look at, and there may be tens of thousands


def draw_outlines(
    image: np.ndarray,
    masks: Mapping[tuple[int, int, int], np.ndarray],
    box: tuple[int, int, int, int] | None = None,
) -> np.ndarray:
    """An image with the outlines of masks, which run between the pixels inside and outside.

    Args:
        image: (C, H, W) in [0, 1], C 1 or 3.
        masks: colour -> (H, W) bool; later ones are drawn over earlier ones.
        box: top, left, bottom, right of a rectangle to draw, bottom and right exclusive.

    Returns:
        uint8 (h, w, 3): the image enlarged by the least whole factor that makes its shorter side
        :data:`SMALLEST_PICTURE` pixels, or reduced, but in no case longer than :data:`LARGEST_PICTURE`.
    """
    height, width = image.shape[1:]
    factor = min(-(-SMALLEST_PICTURE // min(height, width)), LARGEST_PICTURE // max(height, width))
    pixels = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    pixels = np.broadcast_to(pixels, (3, height, width)).transpose(1, 2, 0)
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    if factor:
        picture = picture.resize((factor * width, factor * height), Image.Resampling.NEAREST)
    else:
        picture.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE), Image.Resampling.BOX)
    scale = np.array([picture.height / height, picture.width / width])
    pen = ImageDraw.Draw(picture)
    thick = max(1, round(min(picture.size) / 200))
    for colour, mask in masks.items():
        # a border of False closes the outline of a mask that touches the edge of the image
        for contour in find_contours(np.pad(mask, 1).astype(np.uint8), 0.5):
            points = (contour - 0.5) * scale  # the centre of pixel 0, which the border made 1, is at 0.5
            points = np.clip(points, 0, np.array([picture.height, picture.width]) - 1)
            pen.line([(column, row) for row, column in points], fill=colour, width=thick)
    if box is not None:
        top, left, bottom, right = np.rint(np.array(box) * np.tile(scale, 2)).astype(int).tolist()
        pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=BOX, width=thick)
    return np.asarray(picture)
