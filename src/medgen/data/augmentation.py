"""Real images with synthetic ones beside them: how many of each class, and the arms of a study of what they are worth.

The arms are those of chestXray-PGGAN (none, classical, GAN), with more ratios, synthetic images alone, and the two ways
to fill a rare class.
"""

from __future__ import annotations

import logging
import os
import posixpath
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from medgen.data.datalist import Item, evenly, load_datalist, validate_datalist
from medgen.errors import UserError

__all__ = ["AUGMENTATION_ARMS", "augmentation_arm", "load_synthetic", "mix_synthetic", "synthetic_mismatch"]

logger = logging.getLogger(__name__)

HEADERS = 100  # images whose form is looked at
BALANCES = ("none", "synthetic", "oversample")

# augment: of the images, as they are drawn; ratio: synthetic images to a real one, class by class; only: without the
# real ones; balance: what fills a class up to the largest
_COLUMNS = ("augment", "ratio", "only", "balance")
_ROWS: dict[str, tuple[str, float, bool, str]] = {
    "real":                    ("none",      0.0, False, "none"),
    "classical":               ("classical", 0.0, False, "none"),
    "synthetic_050":           ("none",      0.5, False, "none"),
    "synthetic_100":           ("none",      1.0, False, "none"),
    "synthetic_200":           ("none",      2.0, False, "none"),
    "classical_synthetic_100": ("classical", 1.0, False, "none"),
    "synthetic_only":          ("none",      1.0, True,  "none"),
    "oversampled":             ("none",      0.0, False, "oversample"),
    "balanced":                ("none",      0.0, False, "synthetic"),
    "classical_balanced":      ("classical", 0.0, False, "synthetic"),
}  # fmt: skip
AUGMENTATION_ARMS: dict[str, dict[str, Any]] = {
    name: dict(zip(_COLUMNS, row, strict=True)) for name, row in _ROWS.items()
}


def augmentation_arm(arm: str, name: str) -> Any:
    """One entry of :data:`AUGMENTATION_ARMS`: what a bundle's JSON takes its defaults from.

    Args:
        arm: the row.
        name: the column: ``augment``, ``ratio``, ``only`` or ``balance``.

    Raises:
        UserError: no such arm.
    """
    if arm not in AUGMENTATION_ARMS:
        raise UserError(f"arm must be one of {', '.join(AUGMENTATION_ARMS)}, got {arm!r}; set --arm")
    return AUGMENTATION_ARMS[arm][name]


def load_synthetic(
    datalists: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None,
    num_classes: int,
    label_names: Sequence[str] = (),
) -> list[Item]:
    """Items of synthetic sets (:class:`medgen.data.SyntheticSet`), with labels as the real images' class indices.

    Args:
        datalists: JSON files, or one: a generator of one class each, or of all. Paths start from each one's own folder.
            None for none.
        num_classes: of the real images.
        label_names: names of their classes 0, 1, ...: where a synthetic datalist has names as well, classes of the same
            name are the same, whatever their numbers; otherwise those of the same number. Where the real images' have
            none, labels must be numbers.

    Returns:
        The items of ``training``, in which generators put all they make, ``label`` from 0 to ``num_classes - 1``.

    Raises:
        UserError: as :func:`load_datalist`, or an item that is not synthetic, without a label or with one that is no
            class of the real images, or that stands in two datalists.
    """
    if datalists is None:
        return []
    if isinstance(datalists, str | os.PathLike):
        datalists = [datalists]
    home: dict[str, int] = {}
    found: list[Item] = []
    for place, path in enumerate(datalists):
        content = validate_datalist(path)
        own = content.get("label_names") or []
        for item in load_datalist(path, "training"):
            if item.get("synthetic") is not True:
                raise UserError(
                    f"datalist {path}: {item['image']} is not marked as synthetic; name the datalist.json beside "
                    "generated samples"
                )
            first = home.setdefault(posixpath.normpath(os.path.abspath(item["image"])), place)
            if first != place:
                raise UserError(
                    f"{item['image']} stands in two synthetic datalists, {datalists[first]} and {path}; name it once"
                )
            found.append({**item, "label": _class_of(item, own, label_names, num_classes, path)})
    return found


def _class_of(
    item: Item, own: Sequence[str], names: Sequence[str], num_classes: int, path: str | os.PathLike[str]
) -> int:
    """Class of a synthetic item among those of the real images."""
    label = item.get("label")
    if label is None:
        raise UserError(
            f"datalist {path}: {item['image']} has no label, so its class is not known; generate with --label, the "
            "class that the generator was trained on"
        )
    is_number = isinstance(label, int) and not isinstance(label, bool)
    if is_number and names and 0 <= label < len(own):
        label = own[label]
    if isinstance(label, str) and not names:
        raise UserError(
            f"datalist {path}: {item['image']} is of class {label!r:.80}, and the classes of the real images have no "
            "names; write label_names into the real datalist"
        )
    if isinstance(label, str):
        label = names.index(label) if label in names else label
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < num_classes:
        known = f" ({', '.join(map(str, names))})" if names else ""
        raise UserError(
            f"datalist {path}: {item['image']}: label must be one of the {num_classes} classes of the real images"
            f"{known}, got {label!r:.80}; generate with their --label and --label_names"
        )
    return label


def mix_synthetic(
    real: Sequence[Item],
    synthetic: Sequence[Item],
    ratio: float = 0.0,
    only: bool = False,
    balance: str = "none",
    seed: int = 0,
) -> list[Item]:
    """Training items of real images and synthetic ones.

    Which synthetic images are taken depends on the seed alone, and those for a smaller ratio are among those for a
    larger one: arms of one study differ in how many there are and in nothing else.

    Args:
        real: items with ``label``, a class index, as :func:`load_classes` gives them.
        synthetic: items with such labels, as :func:`load_synthetic` gives them.
        ratio: synthetic images to each real one of the same class, so that the balance of the classes stays; rounded to
            whole images, halves up.
        only: leave the real images out; a ratio of 0 then counts as 1.
        balance: "synthetic" adds synthetic images to each class until it has as many items as the largest, and
            "oversample" real ones again, each as often as any other but for one time; "none" does neither. Classes are
            those of the real images.
        seed: of the choice.

    Returns:
        The real items in their order, those that are repeated, then the synthetic ones class by class; each with
        ``synthetic``.

    Raises:
        UserError: ratio or balance is none of these, a real item lacks a label, or there are too few synthetic images
            of a class.
    """
    _check_mix(ratio, only, balance)
    if only and ratio == 0:
        ratio = 1.0
    of_class, pool = _by_class(real), _by_class(synthetic)
    ours = {label: 0 if only else len(items) for label, items in of_class.items()}
    wanted = {label: int(ratio * len(items) + 0.5) for label, items in of_class.items()}
    largest = max((ours[label] + wanted[label] for label in of_class), default=0)
    again: list[Item] = []
    for label, items in sorted(of_class.items()):
        lacking = largest - ours[label] - wanted[label]
        if balance == "synthetic":
            wanted[label] += lacking
        elif balance == "oversample":
            order = _order(len(items), seed, label)
            again += [items[order[place % len(items)]] for place in range(lacking)]
    taken: list[Item] = []
    for label, count in sorted(wanted.items()):
        there = pool.get(label, [])
        if count > len(there):
            if not synthetic:
                raise UserError(
                    f"class {label} needs {count} synthetic images, got none of any class; name the datalist.json of a "
                    "generator's images with --synthetic"
                )
            raise UserError(
                f"class {label} needs {count} synthetic images, got {len(there)}; generate {count - len(there)} more "
                f"of it (--seeds) beside its {len(of_class[label])} real ones, or lower the ratio"
            )
        taken += [there[place] for place in _order(len(there), seed, label)[:count]]
    kept = [] if only else [*real, *again]
    return [{**item, "synthetic": bool(item.get("synthetic"))} for item in kept] + [
        {**item, "synthetic": True} for item in taken
    ]


def synthetic_mismatch(real: Sequence[Item], synthetic: Sequence[Item]) -> str | None:
    """Whether synthetic images are stored otherwise than the real ones, by which a classifier could tell them.

    A class that was filled up with images of fewer pixels is told by their blur. Of each kind 100 headers are read;
    files that Pillow does not know are left out.

    Args:
        real: items, their images' paths as :func:`load_classes` gives them.
        synthetic: items.

    Returns:
        A sentence, which is logged as a warning as well; None where size (width and height) and mode of the synthetic
        images are found among the real ones.
    """
    found = {"real": _stored(real), "synthetic": _stored(synthetic)}
    if not all(found.values()) or found["synthetic"] <= found["real"]:
        return None
    shown = {
        name: ", ".join(sorted(forms)[:2]) + (f" and {len(forms) - 2} more forms" if len(forms) > 2 else "")
        for name, forms in found.items()
    }
    sentence = (
        f"synthetic images are stored as {shown['synthetic']}, real ones as {shown['real']}: a class with more "
        "of them is told by sharpness or colour, not by what is in its images"
    )
    logger.warning(f"{sentence}; bring the real ones to the same form before the training")
    return sentence


def _stored(items: Sequence[Item]) -> set[str]:
    forms = set()
    for item in evenly(items, HEADERS):
        try:
            with Image.open(item["image"]) as image:
                forms.add(f"{image.width}×{image.height} {image.mode}")
        except OSError:  # of another format; a broken file is told by the training
            continue
    return forms


def _check_mix(ratio: float, only: bool, balance: str) -> None:
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < float("inf"):
        raise UserError(f"synthetic_ratio must be a number from 0 up, got {ratio!r}; set --synthetic_ratio 1.0")
    if balance not in BALANCES:
        raise UserError(f"balance must be one of {', '.join(BALANCES)}, got {balance!r}; set --balance")
    if only and balance == "oversample":
        raise UserError("balance oversample repeats real images, of which synthetic_only leaves none; set one of them")


def _by_class(items: Sequence[Item]) -> dict[int, list[Item]]:
    """Items of each class, in their order."""
    found: dict[int, list[Item]] = defaultdict(list)
    for item in items:
        label = item.get("label")
        if isinstance(label, bool) or not isinstance(label, int):
            raise UserError(
                f"{item['image']}: label must be the index of a class, got {label!r:.80}; set --num_classes"
            )
        found[label].append(item)
    return dict(found)


def _order(count: int, seed: int, label: int) -> list[int]:
    """Places of a class's items in the order in which they are taken: a longer choice begins with a shorter one."""
    return np.random.default_rng((seed, label)).permutation(count).tolist()
