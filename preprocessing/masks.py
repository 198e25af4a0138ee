"""Masks for the images of a dataset: ``python -m preprocessing.masks --target DIR --masks DIR``.

The target is a folder that preprocessing.images or another command of this package has written. Each of its images
gets the mask of its path: ``images/a/b.png`` that of ``a/b.png``, or of ``a/b_mask.png`` with ``--postfix _mask``. If
there is none, it gets the one mask of its name in any folder, unless other images have that name, too. Several
``--masks`` are united, such as those of the left and of the right lung. Pixels above 0 are inside; in a JPEG or a
picture of many grey levels, those above half of its maximum.

Written are ``TARGET/masks`` (PNGs of 0 and 255, of the images' sizes), ``TARGET/datalist_masks.json``, which holds the
images that have a mask, in their splits, and ``TARGET/rejected_masks.csv``. The image must be all of the radiograph
that the mask was drawn on (``--fit shorter``): one whose sides have another ratio is rejected.

The same command again does what is missing or has changed.

With --shard 0/8 to --shard 7/8, on any machines at once, each of eight processes converts its part of the files; the
same command without --shard then does what is missing and writes the tables, the same bytes as one process alone.

Exit codes: 0 all went well; 3 the datalist was written, but masks were missing or rejected; 1 nothing could be written;
2 wrong usage; 75 some files could not be read, but may be the next time; 130 interrupted.
"""

from __future__ import annotations

import posixpath
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from medgen.data.datalist import (
    distinct_names,
    file_stem,
    list_files,
    validate_datalist,
    write_datalist,
    write_rejected,
)
from medgen.data.masked import mask_level
from medgen.data.reader import UnreadableImageError, read_frames
from medgen.errors import UserError
from preprocessing import _convert as c

__all__ = ["add_masks", "app", "read_mask"]

FOLDER = "masks"
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
    try:
        frame = read_frames(path)[0]
    except UnreadableImageError as error:
        raise UnreadableImageError(f"the mask {path.name}: {error}") from error
    pixels = frame.pixels if frame.pixels.ndim == 2 else frame.pixels.max(axis=-1)
    return pixels > mask_level(pixels, frame.meta.get("format", ""))


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


@dataclass(frozen=True)
class _MaskJob(c.Job):
    """An image and its masks, one of each folder."""

    masks: tuple[str, ...]

    def is_made_of(self, used: Sequence[str]) -> bool:
        """Whether the image still has the same masks."""
        return list(used) == list(self.masks)


@dataclass(frozen=True)
class _Masks:
    """The task."""

    dataset: str

    def convert(self, job: _MaskJob, target: Path) -> c.Outcome:
        """Unite the masks of one image."""
        used = tuple((path, *(c.file_key(path) or (None, None))) for path in job.masks)
        try:
            height, width = read_frames(job.path)[0].pixels.shape[:2]
            mask = np.logical_or.reduce([_fitted(read_mask(Path(path)), (width, height)) for path in job.masks])
        except UnreadableImageError as error:
            return c.Outcome(job.file, reason=c.one_line(error), used=used)
        name = f"{job.stem}.png"
        size = c.write_png(Image.fromarray(mask.astype(np.uint8) * 255), target, name)
        return c.Outcome(job.file, images=(name,), bytes=(size,), used=used)


def _key(path: str) -> str:
    """A path without its suffix."""
    return posixpath.join(posixpath.dirname(path), file_stem(path))


@dataclass
class _Folder:
    """The masks of one folder.

    Attributes:
        by_path: files, by their path without suffix and postfix.
        by_stem: the same, by their name alone.
    """

    by_path: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))
    by_stem: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def read(cls, folder: Path, postfix: str) -> _Folder:
        found = cls()
        for file in list_files(folder):
            if file_stem(file).endswith(postfix):
                key = _key(file).removesuffix(postfix)
                found.by_path[key].append(folder / file)
                found.by_stem[posixpath.basename(key)].append(folder / file)
        if not found.by_path:
            raise UserError(f"expected masks (*{postfix}.png and the like) below --masks {folder}, got none")
        return found

    def of(self, key: str) -> list[Path]:
        """The masks that may be an image's, given its path without suffix."""
        return self.by_path.get(key) or self.by_stem.get(posixpath.basename(key), [])


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
    workers: c.Workers = c.DEFAULT_WORKERS,
    shard: c.ShardOption = None,
) -> int:
    """Write masks and the datalist that has them; see the head of this module.

    Returns:
        The exit code.

    Raises:
        UserError: if there is no datalist, a folder of masks is empty, no image has a mask, a mask would lie where an
            image is or cannot be written, or the file of images to leave out cannot be read or names others.
    """
    content = validate_datalist(target / "datalist.json")
    splits = {
        name: items
        for name, items in content.items()
        if isinstance(items, list) and all(isinstance(item, dict) for item in items)
    }
    left_out = _names(skip, [item["image"] for items in splits.values() for item in items]) if skip else set()
    folders = [_Folder.read(folder, postfix) for folder in masks]

    images = [posixpath.normpath(item["image"]) for items in splits.values() for item in items]
    names = [image.removeprefix("images/") for image in images]
    keys = [_key(name) for name in names]
    same_stem = Counter(posixpath.basename(key) for key in keys)
    stems = distinct_names(keys, names, images)
    taken = {image.casefold() for image in images}
    for image, place in zip(images, (f"{FOLDER}/{stem}.png" for stem in stems), strict=True):
        if place.casefold() in taken:
            raise UserError(
                f"the mask of {image} would lie where an image is, {place}; rename the folder of that image"
            )

    reasons: dict[str, str] = {}
    used: set[Path] = set()
    jobs: list[c.Job] = []
    everything = [(name, item) for name, items in splits.items() for item in items]
    for (_, item), key, stem in zip(everything, keys, stems, strict=True):
        base, image = posixpath.basename(key), item["image"]
        found = [files for folder in folders if (files := folder.of(key))]
        used.update(*found)
        several = next((files for files in found if len(files) > 1), None)
        if base in left_out:
            reasons[image] = f"left out by {skip.name}"
        elif not found:
            reasons[image] = f"no mask named {base}{postfix}"
        elif several:
            reasons[image] = f"{len(several)} masks have its name, {several[0]} and {several[1]}"
        elif same_stem[base] > 1 and not all(key in folder.by_path for folder in folders if folder.of(key)):
            reasons[image] = (
                f"{same_stem[base]} images are named {base}: their masks must lie in folders as theirs, {key}"
            )
        else:
            paths = tuple(str(file.resolve()) for (file,) in found)
            jobs.append(_MaskJob(str(target / image), image, stem, paths))
    task = _Masks("masks")
    c.prepare_target(None, target / FOLDER, task, folder="")
    outcomes = c.convert(jobs, task, target / FOLDER, workers, shard)
    if shard:
        return c.finish_shard(outcomes, shard)
    c.clear_parts(target / FOLDER)
    reasons |= {image: outcome.reason for image, outcome in outcomes.items() if outcome.reason}

    with_mask: dict[str, list[dict[str, Any]]] = {name: [] for name in splits}
    for name, item in everything:
        if item["image"] not in reasons:
            with_mask[name].append({**item, "mask": f"{FOLDER}/{outcomes[item['image']].images[0]}"})
    rejected = {item["image"]: reasons[item["image"]] for _, item in everything if item["image"] in reasons}
    lost = [file for folder in folders for files in folder.by_path.values() for file in files if file not in used]
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
    return c.exit_code(outcomes, rejected)


app = c.new_app(add_masks, __doc__)

if __name__ == "__main__":
    sys.exit(c.main(app))
