"""Images of requests and answers: base64 PNG or JPEG, or nested lists of numbers."""

from __future__ import annotations

import base64
import binascii
import io
import re
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.utils import MetaKeys
from PIL import Image

from medgen.data.reader import UnreadableImageError, picture_frames
from medgen.errors import UserError
from medgen.output import plain_json

__all__ = ["FORMATS", "decode_image", "encode_image", "encode_picture"]

FORMATS = ("png", "png16", "array")
SMALLEST_SIDE = 16  # pixels
# of the longer side to the shorter: the shorter side is brought to the network's size, and a thread of 1×16,000,000
# pixels, whose file has a few kB, would become one of 512×8,192,000,000
LARGEST_RATIO = 8
ROUNDING = 1e-4  # a resized image may exceed [0, 1] by the rounding of float32

_DATA_URL = re.compile(r"data:image/(?:png|jpe?g);base64,", re.IGNORECASE)
_KINDS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
_WANTED = "must be a PNG or JPEG in base64, or a list of numbers (H, W) or (C, H, W) in [0, 1]"


def decode_image(value: Any, max_pixels: int, name: str = "image") -> MetaTensor:
    """The image of a request, with the values that :class:`~medgen.data.MedicalImageReader` gives its file.

    Nothing of a request is ever taken for a path.

    Args:
        value: base64 text of a PNG or JPEG of 8 or 16 bits, with or without ``data:image/png;base64,`` before it; or
            nested lists or an array, (H, W) or (C, H, W) with C 1 or 3, in [0, 1].
        max_pixels: height times width.
        name: what to call it in messages.

    Returns:
        (C, H, W) float32 in [0, 1], with the metadata that maps are brought back to its pixels by.

    Raises:
        UserError: anything else; the message says nothing of the content.
    """
    if isinstance(value, str | bytes):
        pixels = _decode_file(value, max_pixels, name)
    elif isinstance(value, list | tuple | np.ndarray):
        pixels = _decode_array(value, name)
        _check_size(*pixels.shape[1:], max_pixels, name)
    else:
        got = "none" if value is None else f"something of type {type(value).__name__}"
        raise UserError(f"{name} {_WANTED}, got {got}; send one under the key image")
    return MetaTensor(
        torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32)),
        affine=torch.eye(4, dtype=torch.float64),
        meta={
            MetaKeys.ORIGINAL_AFFINE: np.eye(4),
            MetaKeys.SPATIAL_SHAPE: np.asarray(pixels.shape[1:]),
            "filename_or_obj": name,
        },
    )


def _decode_file(text: str | bytes, max_pixels: int, name: str) -> np.ndarray:
    if isinstance(text, bytes):
        text = text.decode("ascii", "replace")
    text = text.strip()
    if match := _DATA_URL.match(text):
        text = text[match.end() :]
    try:
        # command lines break base64 into lines
        content = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{name} {_WANTED}, got a text that is no base64; encode the file's bytes") from error
    if not content.startswith(_KINDS):
        raise UserError(f"{name} {_WANTED}, got {len(content)} bytes of another kind; convert it to PNG")
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:  # reads the header alone
            width, height = image.size
        _check_size(height, width, max_pixels, name)
        frame = picture_frames(io.BytesIO(content), 0)[0]
    except UnreadableImageError as error:
        raise UserError(f"{name} must be a PNG or JPEG that is whole: {error}; send another") from error
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} must have at most {max_pixels:,} pixels, got far more; make it smaller") from error
    # decoders of damaged bytes raise anything from OSError to struct.error
    except Exception as error:
        raise UserError(
            f"{name} must be a PNG or JPEG that is whole, got one that is truncated or damaged "
            f"({type(error).__name__}); send the file anew"
        ) from error
    pixels = frame.pixels
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _decode_array(value: Any, name: str) -> np.ndarray:
    try:
        pixels = np.asarray(value)
        if pixels.dtype.kind not in "iuf":
            raise ValueError("no numbers")
        pixels = pixels.astype(np.float32)
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{name} {_WANTED}, got a list that is no such array; see that its rows are equal") from error
    if pixels.ndim == 2:
        pixels = pixels[None]
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
        raise UserError(
            f"{name} must be an array (H, W) or (C, H, W) with 1 or 3 channels, got shape {pixels.shape}; send several "
            "images as a list of them"
        )
    if not np.isfinite(pixels).all():
        raise UserError(
            f"{name} must be finite, got {np.count_nonzero(~np.isfinite(pixels))} NaN or infinite values of "
            f"{pixels.size}; clean it before it is sent"
        )
    low, high = float(pixels.min(initial=1)), float(pixels.max(initial=0))
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise UserError(f"{name} must have values in [0, 1], got {low:.4g} to {high:.4g}; divide 8 bits by 255")
    return np.clip(pixels, 0, 1)


def _check_size(height: int, width: int, max_pixels: int, name: str) -> None:
    if height * width > max_pixels:
        raise UserError(f"{name} must have at most {max_pixels:,} pixels, got {height}×{width}; make it smaller")
    if min(height, width) < SMALLEST_SIDE or max(height, width) > LARGEST_RATIO * min(height, width):
        raise UserError(
            f"{name} must have sides of at least {SMALLEST_SIDE} pixels, the longer at most {LARGEST_RATIO} times the "
            f"shorter, got {height}×{width}; send a whole picture"
        )


def encode_image(image: torch.Tensor | np.ndarray, format: str) -> str | list[Any]:
    """An image of an answer.

    Args:
        image: (C, H, W) in [0, 1], C 1 or 3; values outside are clipped. NaN, which says that there is no value, is
            black in a PNG and null in an array.
        format: ``png`` (8 bits), ``png16`` (16 bits, where it is grey) or ``array``.

    Returns:
        base64 text, or nested lists (C, H, W).
    """
    array = np.asarray(image.detach().cpu() if isinstance(image, torch.Tensor) else image, dtype=np.float32)
    if format == "array":
        return plain_json(array) if np.isnan(array).any() else array.tolist()
    top = 65535 if format == "png16" and len(array) == 1 else 255
    levels = np.rint(np.clip(np.nan_to_num(array.astype(np.float64), nan=0.0), 0, 1) * top)
    levels = levels.astype(np.uint8 if top == 255 else np.uint16)
    return encode_picture(levels[0] if len(levels) == 1 else np.ascontiguousarray(levels.transpose(1, 2, 0)))


def encode_picture(pixels: np.ndarray) -> str:
    """Base64 PNG of pixels (H, W) or (H, W, 3), uint8 or uint16."""
    file = io.BytesIO()
    # over a radiograph the usual level takes six times as long, for a file a sixth smaller
    Image.fromarray(pixels).save(file, format="PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode("ascii")
