"""Names of classes, and whether each has images."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medgen.errors import UserError

__all__ = ["check_each_class", "class_names"]


def class_names(path: str | os.PathLike, num_classes: int, numbered: bool = True) -> list[str]:
    """Names of the classes in their order, from a datalist, or from ``trained_as.json`` beside a classifier's weights.

    Args:
        path: the JSON file; its ``label_names`` are taken.
        num_classes: of the network.
        numbered: whether classes without names are called by their numbers.

    Returns:
        ``num_classes`` names; where the file has another number of them, none, or is not there, the classes' numbers,
        or an empty list.

    Raises:
        UserError: the file is no JSON.
    """
    names = None
    if Path(path).is_file():
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is no JSON ({error}); mend it, or copy it again") from error
        names = content.get("label_names") if isinstance(content, dict) else None
    if not isinstance(names, list) or len(names) != num_classes:
        return [str(number) for number in range(num_classes)] if numbered else []
    return [str(name) for name in names]


def check_each_class(names: Sequence[str], **splits: Sequence[Mapping[str, Any]]) -> None:
    """See that each class has an image in each split: without, it is not learnt, and has no AUROC.

    Args:
        names: of the classes, see :func:`class_names`.
        splits: name -> items with ``label``, an index of a class.

    Raises:
        UserError: names the first class without images.
    """
    for split, items in splits.items():
        counts = Counter(item.get("label") for item in items)
        for number, name in enumerate(names):
            if not counts[number]:
                there = ", ".join(f"{names[label]} ({count})" for label, count in sorted(counts.items()))
                raise UserError(
                    f"the {split} images must be of all {len(names)} classes, there is none of class {number} ({name}) "
                    f"among {there}; make the splits anew so that each class is in each, or set --num_classes"
                )
