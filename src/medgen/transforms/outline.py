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
        uint8 (factor · H, factor · W, 3), factor the least that makes the shorter side :data:`SMALLEST_PICTURE` pixels.
    """
    height, width = image.shape[1:]
    factor = -(-SMALLEST_PICTURE // min(height, width))
    pixels = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    pixels = np.broadcast_to(pixels, (3, height, width)).transpose(1, 2, 0)
    picture = Image.fromarray(np.ascontiguousarray(pixels.repeat(factor, axis=0).repeat(factor, axis=1)))
    pen = ImageDraw.Draw(picture)
    thick = max(1, round(min(picture.size) / 200))
    for colour, mask in masks.items():
        # a border of False closes the outline of a mask that touches the edge of the image
        for contour in find_contours(np.pad(mask, 1).astype(np.uint8), 0.5):
            points = (contour - 0.5) * factor  # the centre of pixel 0, which the border made 1, is at 0.5
            points = np.clip(points, 0, np.array([height, width]) * factor - 1)
            pen.line([(column, row) for row, column in points], fill=colour, width=thick)
    if box is not None:
        top, left, bottom, right = (edge * factor for edge in box)
        pen.rectangle((left, top, right - 1, bottom - 1), outline=BOX, width=thick)
    return np.asarray(picture)
