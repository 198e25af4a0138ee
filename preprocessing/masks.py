"""Masks for the images of a dataset: ``python -m preprocessing.masks --target DIR --masks DIR``.

The target is a folder that preprocessing.images or another command of this package has written. Each of its images
gets the mask of its name: ``a/b.png`` that of ``b.png``, or of ``b_mask.png`` with ``--postfix _mask``. Several
``--masks`` are united, such as those of the left and of the right lung. Pixels above 0 are inside; in a grey picture
(a mask saved as JPEG), those above half of its maximum.

Written are ``TARGET/masks`` (PNGs of 0 and 255, of the images' sizes), ``TARGET/datalist_masks.json``, which holds the
images that have a mask, in their splits, and ``TARGET/rejected_masks.csv``. The image must be all of the radiograph
that the mask was drawn on (``--fit shorter``): one whose sides have another ratio is rejected.

Exit codes: 0 all went well; 3 the datalist was written, but masks were missing or rejected; 1 nothing could be
written; 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from medgen.data.datalist import file_stem, list_files, validate_datalist, write_datalist, write_rejected
from medgen.data.reader import UnreadableImageError, read_frames
from medgen.errors import UserError
from medgen.output import atomic_file
from preprocessing import _convert as c

__all__ = ["add_masks", "app", "read_mask"]

GREY_LEVELS = 16  # more than a map of labels has: the blurred edges of a JPEG
RATIO_TOLERANCE = 0.02  # of height to width: rounding to whole pixels makes 1 / side


def read_mask(path: Path) -> np.ndarray:
    """Read a mask of any format.

    Args:
        path: the file.

    Returns:
        (H, W) bool.

    Raises:
        UnreadableImageError: it cannot be read, or marks no pixel.
    """
    pixels = read_frames(path)[0].pixels
    pixels = pixels if pixels.ndim == 2 else pixels.max(axis=-1)
    grey = len(np.unique(pixels)) > GREY_LEVELS
    mask = pixels > (pixels.max() / 2 if grey else 0)
    if not mask.any():
        raise UnreadableImageError("the mask marks no pixel")
    return mask


def _fitted(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The mask with the image's (width, height)."""
    height, width = mask.shape
    ratio = (size[1] / size[0]) / (height / width)
    if abs(ratio - 1) > RATIO_TOLERANCE:
        raise UnreadableImageError(
            f"the mask is {width}×{height}, the image {size[0]}×{size[1]}: not all of one radiograph; preprocess the "
            "images with --fit shorter"
        )
    return np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)) > 0


def _names(file: Path, images: Sequence[str]) -> set[str]:
    """The names in a text file, all of which must be those of images; lines that begin with # are remarks."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--skip {file} cannot be read ({c.one_line(error)})") from error
    names = {line for line in lines if line and not line.startswith("#")}
    unknown = sorted(names - {PurePosixPath(image).stem for image in images})
    if unknown:
        raise UserError(f"--skip {file} names {len(unknown)} images that the datalist lacks, {unknown[0]} first")
    return names


def add_masks(
    target: Annotated[Path, typer.Option(help="Folder of preprocessed images with a datalist.json.")],
    masks: Annotated[list[Path], typer.Option(help="Folder of masks; may be repeated, and is then united.")],
    postfix: Annotated[str, typer.Option(help="What masks have after the image's name, such as _mask.")] = "",
    skip: Annotated[
        Path | None, typer.Option(help="Text file of images to leave out, a name without suffix a line.")
    ] = None,
) -> int:
    """Write masks and the datalist that has them; see the head of this module.

    Returns:
        The exit code.

    Raises:
        UserError: if there is no datalist, a folder of masks is empty, two masks in it have one name, no image has a
            mask, or the file of images to leave out cannot be read or names others.
    """
    content = validate_datalist(target / "datalist.json")
    splits = {
        name: items
        for name, items in content.items()
        if isinstance(items, list) and all(isinstance(item, dict) for item in items)
    }
    left_out = _names(skip, [item["image"] for items in splits.values() for item in items]) if skip else set()
    found: dict[str, list[Path]] = defaultdict(list)
    for folder in masks:
        names: dict[str, str] = {}
        for file in list_files(folder):
            stem = file_stem(file)
            if not stem.endswith(postfix):
                continue
            if stem in names:
                raise UserError(f"two masks below {folder} have one name, {names[stem]} and {file}; remove one")
            names[stem] = file
            found[stem.removesuffix(postfix)].append(folder / file)
        if not names:
            raise UserError(f"expected masks (*{postfix}.png and the like) below --masks {folder}, got none")

    rejected: dict[str, str] = {}
    with_mask: dict[str, list[dict[str, Any]]] = {name: [] for name in splits}
    for name, items in splits.items():
        for item in items:
            path = PurePosixPath(item["image"])
            try:
                files = found.get(path.stem, [])
                if path.stem in left_out:
                    raise UnreadableImageError(f"left out by {skip.name}")
                if not files:
                    raise UnreadableImageError(f"no mask named {path.stem}{postfix}")
                with Image.open(target / item["image"]) as image:
                    size = image.size
                mask = np.logical_or.reduce([_fitted(read_mask(file), size) for file in files])
            except UnreadableImageError as error:
                rejected[item["image"]] = c.one_line(error)
                continue
            where = PurePosixPath("masks", *path.with_suffix(".png").parts[1:])
            with atomic_file(target / where) as file:
                Image.fromarray(mask.astype(np.uint8) * 255).save(file, format="PNG", **c.PNG_OPTIONS)
            with_mask[name].append({**item, "mask": where.as_posix()})
    known = {PurePosixPath(item["image"]).stem for items in splits.values() for item in items}
    lost = [file for stem, files in found.items() if stem not in known for file in files]
    rejected |= dict.fromkeys(map(str, lost), "a mask of no image of the datalist")

    write_rejected(target / "rejected_masks.csv", rejected)
    count = sum(len(items) for items in with_mask.values())
    if not count:
        raise UserError(f"no image has a mask; see {target / 'rejected_masks.csv'}, and set --postfix")
    rest = {key: value for key, value in content.items() if key not in splits}
    datalist = target / "datalist_masks.json"
    name, modality = rest.pop("name", target.resolve().name), rest.pop("modality", "unknown")
    write_datalist(datalist, name, modality, with_mask, **rest)
    for name, items in with_mask.items():
        print(f"{name}: {len(items)} images of {len({item['patient'] for item in items})} patients")
    why = f" (reasons: {target / 'rejected_masks.csv'})" if rejected else ""
    print(f"{count} images have masks, rejected {len(rejected)} files{why}; datalist: {datalist}", flush=True)
    return 3 if rejected else 0


app = c.new_app(add_masks, __doc__)

if __name__ == "__main__":
    sys.exit(c.main(app))
