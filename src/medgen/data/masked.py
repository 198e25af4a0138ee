"""Items of a datalist that all have a mask, and what is inside a mask."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from medgen.data.datalist import Item, load_datalist
from medgen.data.reader import UnreadableImageError
from medgen.errors import UserError

if TYPE_CHECKING:
    from monai.data import MetaTensor

__all__ = ["binary_mask", "load_masked", "mask_level"]

GREY_LEVELS = 16  # more than a map of labels has: blurred edges


def mask_level(pixels: np.ndarray, file_format: str = "") -> float:
    """The value above which pixels are inside.

    It is 0, so that every label counts, whatever its number and the file's bits. A JPEG has noise around edges, and a
    picture of many grey levels was a JPEG once or was interpolated: for these it is half of the maximum.

    Args:
        pixels: of the mask, any shape.
        file_format: of its file, as readers name it (``JPEG``). JPEGs of high quality have few levels.

    Returns:
        The value, in the pixels' units.

    Raises:
        UnreadableImageError: no pixel is above 0.
    """
    top = float(pixels.max())
    if not top > 0:
        raise UnreadableImageError("the mask marks no pixel")
    # MPO: JPEGs of cameras and phones
    return top / 2 if file_format in ("JPEG", "MPO") or len(np.unique(pixels)) > GREY_LEVELS else 0.0


def binary_mask(mask: MetaTensor) -> MetaTensor:
    """A mask that was read from a file as 0 and 1.

    Args:
        mask: (C, H, W) with the metadata of its file, as :class:`~medgen.data.MedicalImageReader` gives them.

    Returns:
        The same shape, float32.

    Raises:
        UserError: it marks no pixel.
    """
    try:
        level = mask_level(mask.numpy(), mask.meta.get("format", ""))
    except UnreadableImageError as error:
        raise UserError(f"{mask.meta['filename_or_obj']}: {error}; leave its image out of the datalist") from error
    return (mask > level).float()


def load_masked(
    datalist: str | os.PathLike[str], split: str, dataset_dir: str | os.PathLike[str] | None = None
) -> list[Item]:
    """Items of one split as :func:`load_datalist` gives them, each with its ``mask``.

    Args:
        datalist: JSON file.
        split: ``training``, ``validation``, ``test`` or another list in it.
        dataset_dir: base of the relative paths; default: the datalist's folder.

    Returns:
        The items.

    Raises:
        UserError: as :func:`load_datalist`, or an item without a mask.
    """
    items = load_datalist(datalist, split, dataset_dir)
    without = [item["image"] for item in items if not item.get("mask")]
    if without:
        raise UserError(
            f"datalist {datalist}: {len(without)} of {len(items)} items of split {split} have no mask, the first is "
            f"{without[0]}; give them masks with: python -m preprocessing.masks --target DIR --masks DIR"
        )
    return items
