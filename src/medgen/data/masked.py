"""Items of a datalist that all have a mask."""

from __future__ import annotations

import os

from medgen.data.datalist import Item, load_datalist
from medgen.errors import UserError

__all__ = ["load_masked"]


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
