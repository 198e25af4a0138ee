"""Images of requests and answers."""

from __future__ import annotations

import base64
import io
import zlib

import numpy as np
import pytest
import torch
from base64_pictures import as_base64, picture
from monai.transforms import LoadImage
from PIL import Image

from medgen.data import MedicalImageReader
from medgen.errors import UserError
from medgen.serving import decode_image, encode_image

PIXELS = 2**16


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)


def rgb(image: np.ndarray) -> np.ndarray:
    return np.stack([image, image // 2, image // 3], axis=-1)


@pytest.mark.parametrize(
    ("kind", "convert"),
    [
        ("PNG", lambda image: image),
        ("PNG", lambda image: image.astype(np.uint16) * 257),
        ("PNG", rgb),
        ("JPEG", lambda image: image),
        ("JPEG", rgb),
    ],
)
def test_picture_has_the_values_that_the_reader_gives_its_file(image, kind, convert, tmp_path):
    Image.fromarray(convert(image)).save(tmp_path / f"image.{kind.lower()}")
    content = (tmp_path / f"image.{kind.lower()}").read_bytes()
    from_file = LoadImage(reader=MedicalImageReader, ensure_channel_first=True)(tmp_path / f"image.{kind.lower()}")

    decoded = decode_image(base64.b64encode(content).decode(), PIXELS)

    assert decoded.dtype == torch.float32
    assert torch.equal(decoded.as_tensor(), from_file.as_tensor())
    assert torch.equal(decoded.affine, from_file.affine)
    assert tuple(decoded.meta["spatial_shape"]) == tuple(from_file.meta["spatial_shape"])


@pytest.mark.parametrize("before", ["data:image/png;base64,", "data:image/jpeg;base64,", " \n"])
def test_data_urls_and_broken_lines_are_read(image, before):
    text = as_base64(image)
    lines = before + "\n".join(text[start : start + 76] for start in range(0, len(text), 76)) + "\n"

    assert torch.equal(decode_image(lines, PIXELS), decode_image(text, PIXELS))


@pytest.mark.parametrize("wrap", [lambda a: a, lambda a: a.tolist(), lambda a: a[None].tolist()])
def test_array_is_taken_as_it_is(image, wrap):
    array = image.astype(np.float64) / 255

    decoded = decode_image(wrap(array), PIXELS)

    np.testing.assert_array_equal(decoded.numpy(), array[None].astype(np.float32))


def cut(image: np.ndarray) -> str:
    content = base64.b64decode(as_base64(image))
    return base64.b64encode(content[: len(content) // 2]).decode()


def bomb() -> str:
    """A PNG of 50,000 × 50,000 pixels in its header, and nothing behind it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    header = (50_000).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")).decode()


def gif(image: np.ndarray) -> str:
    return as_base64(image, "GIF")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "must be a PNG or JPEG in base64, .* got none"),
        (3, "got something of type int"),
        ("not base64!", "no base64"),
        ("Zm9vYmFy", "6 bytes of another kind"),
        ("/etc/passwd", "got a text that is no base64|another kind"),
        ("", "another kind"),
        (cut, "truncated or damaged"),
        (gif, "another kind"),
        (lambda image: as_base64(np.zeros((300, 300), np.uint8)), "at most 65,536 pixels, got 300×300"),
        (lambda image: bomb(), "at most 65,536 pixels, got far more"),
        (lambda image: as_base64(np.zeros((16, 200), np.uint8)), "at most 8 times the shorter, got 16×200"),
        (lambda image: as_base64(np.zeros((8, 8), np.uint8)), "at least 16 pixels"),
        ([[0.5, float("nan")]] * 16, "finite, got 16 NaN"),
        ([[0.5, 255.0]] * 16, r"in \[0, 1\], got 0.5 to 255; divide"),
        ([[0.5, 0.2], [0.1]], "see that its rows are equal"),
        ([["a", "b"]], "no such array"),
        ([[True]], "no such array"),
        (np.zeros((2, 20, 20)), r"with 1 or 3 channels, got shape \(2, 20, 20\)"),
        (np.zeros((1, 1, 20, 20)), "with 1 or 3 channels"),
        ([], "with 1 or 3 channels"),
    ],
)
def test_what_is_no_image_is_told_in_one_line_without_its_content(image, value, message):
    with pytest.raises(UserError, match=message) as caught:
        decode_image(value(image) if callable(value) else value, PIXELS)

    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_encoded_png_is_rounded_and_clipped():
    values = torch.tensor([[[0.0, 0.5, 1.0, 1.5, -1.0, float("nan")]]])

    np.testing.assert_array_equal(picture(encode_image(values, "png")), [[0, 128, 255, 255, 0, 0]])
    np.testing.assert_array_equal(picture(encode_image(values, "png16")), [[0, 32768, 65535, 65535, 0, 0]])
    assert encode_image(values, "array") == [[[0.0, 0.5, 1.0, 1.5, -1.0, None]]]


def test_colour_comes_back_as_colour(image):
    colour = torch.from_numpy(rgb(image).transpose(2, 0, 1).copy()) / 255

    np.testing.assert_array_equal(picture(encode_image(colour, "png")), rgb(image))
    with Image.open(io.BytesIO(base64.b64decode(encode_image(colour, "png16")))) as again:
        assert again.mode == "RGB"
