"""Pictures that are kept with a registered model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from medgen import serving
from medgen.errors import UserError

__all__ = ["save_pictures"]

EXAMPLE = "example.png"  # what the bundle itself makes
GAP = 4  # pixels between what the bundle is given and what it makes of that
LONGEST_SIDE = 2048  # pixels; a picture is for looking at


def save_pictures(bundle: Path, pictures: Sequence[str | Path], folder: Path) -> list[str]:
    """Write the pictures of a model as PNG files, with nothing but pixels in them.

    Args:
        bundle: the bundle's folder; where it can be served, it makes the first picture.
        pictures: image files, which keep their names.
        folder: where to put them; made if there are any.

    Returns:
        Their names.

    Raises:
        UserError: a file is no image, or two have one name.
    """
    shown = serving.example(bundle)
    images = {EXAMPLE: _row(shown)} if shown else {}
    for path in map(Path, pictures):
        name = re.sub(r"[^\w.-]", "_", path.stem, flags=re.ASCII).lstrip(".") + ".png"
        if name in images:
            raise UserError(f"pictures must have names of their own, got {name} twice; rename {path}")
        images[name] = _read(path)
    for name, image in images.items():
        folder.mkdir(exist_ok=True)
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        image.save(folder / name)
    return list(images)


def _row(images: Sequence[Image.Image]) -> Image.Image:
    """Pictures side by side, those that are smaller enlarged to the height of the others."""
    height = max(image.height for image in images)
    images = [
        image.resize((round(image.width * height / image.height), height), Image.Resampling.NEAREST) for image in images
    ]
    mode = "L" if all(image.mode == "L" for image in images) else "RGB"
    row = Image.new(mode, (sum(image.width + GAP for image in images) - GAP, height), "white")
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width + GAP
    return row


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path, formats=("PNG", "JPEG", "GIF")) as image:
            pixels = image.convert("L" if image.mode in ("1", "L", "LA", "I;16") else "RGB")
    except FileNotFoundError:
        raise UserError(f"no picture at {path}; name PNG files with --pictures") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} must be a PNG or JPEG picture ({type(error).__name__}); name another") from error
    pixels.info.clear()  # the file's notes, which may name a patient, and which Pillow would write again
    return pixels
