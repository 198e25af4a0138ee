"""Animations read back by the decoders that others use."""

from __future__ import annotations

import av
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from PIL import Image, ImageSequence

from medgen.errors import UserError
from medgen.handlers import AnimationWriter, GridWriter, check_animation_name, write_animation

RAMP = np.arange(256, dtype=np.uint8).reshape(8, 32)
FRAMES = [np.roll(RAMP, shift, axis=1) for shift in range(5)]


def test_gif_keeps_every_grey_level(tmp_path):
    write_animation(tmp_path / "x.gif", FRAMES, fps=10)

    with Image.open(tmp_path / "x.gif") as image:
        frames = [np.asarray(frame.convert("L")) for frame in ImageSequence.Iterator(image)]
        assert image.info["duration"] == 100
        assert image.info["loop"] == 0
    np.testing.assert_array_equal(frames, FRAMES)


def smooth(size: tuple[int, int]) -> list[np.ndarray]:
    row, column = np.mgrid[: size[0], : size[1]]
    return [np.uint8(127 + 100 * np.sin((row + 2 * column + 5 * number) / 20)) for number in range(6)]


def test_webp_is_close(tmp_path):
    frames = smooth((40, 60))

    write_animation(tmp_path / "x.webp", frames, fps=20)

    with Image.open(tmp_path / "x.webp") as image:
        got = []
        for frame in ImageSequence.Iterator(image):
            got.append(np.asarray(frame.convert("L")))
            assert frame.info["duration"] == 50
    assert np.abs(np.int16(got) - np.int16(frames)).max() < 12


@pytest.mark.parametrize("size", [(40, 60), (33, 47)])
@pytest.mark.parametrize("colour", [False, True])
def test_mp4_is_h264_that_browsers_play(size, colour, tmp_path):
    frames = [np.stack([f, f // 2, 255 - f], axis=2) if colour else f for f in smooth(size)]

    write_animation(tmp_path / "x.mp4", frames, fps=12.5)

    with av.open(str(tmp_path / "x.mp4")) as film:
        stream = film.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate) == pytest.approx(12.5)
        got = [frame.to_ndarray(format="rgb24" if colour else "gray") for frame in film.decode(stream)]
    assert len(got) == len(frames)
    assert got[0].shape[:2] == (size[0] + size[0] % 2, size[1] + size[1] % 2)
    inside = np.int16(got)[:, : size[0], : size[1]]
    assert np.abs(inside - np.int16(frames)).mean() < 4


def test_one_frame_is_a_film_too(tmp_path):
    for suffix in ("gif", "webp", "mp4"):
        write_animation(tmp_path / f"x.{suffix}", FRAMES[:1])
        assert (tmp_path / f"x.{suffix}").stat().st_size > 0


@pytest.mark.parametrize("name", ["x.avi", "x", ".gif", "a/x.gif", "../x.gif", "/x.gif", ""])
def test_names_that_cannot_be_written_are_refused(name):
    with pytest.raises(UserError, match=r"file_name must be a name that ends in .gif, .mp4, .webp, without a folder"):
        check_animation_name(name)


def test_frames_of_two_shapes_are_refused(tmp_path):
    for frames in ([RAMP, RAMP.T], []):
        with pytest.raises(UserError, match="frames of one shape"):
            write_animation(tmp_path / "x.gif", frames)
    assert list(tmp_path.iterdir()) == []


def run(handler, images: torch.Tensor) -> None:
    engine = Engine(lambda engine, batch: [{"pred": image} for image in batch])
    handler.attach(engine)
    engine.run(images.split(2))


def test_handler_writes_the_images_of_all_batches_in_order(tmp_path):
    images = torch.as_tensor(np.stack(FRAMES) / np.float32(255))[:, None]
    writer = AnimationWriter(tmp_path / "images" / "x.gif", fps=10)

    run(writer, images)
    run(writer, images)  # a second run begins anew

    with Image.open(tmp_path / "images" / "x.gif") as image:
        frames = [np.asarray(frame.convert("L")) for frame in ImageSequence.Iterator(image)]
    np.testing.assert_array_equal(frames, FRAMES)


def test_grid_is_filled_row_by_row(tmp_path):
    images = torch.arange(6)[:, None, None, None].expand(-1, 1, 4, 4) / 10

    run(GridWriter(tmp_path / "grid.png", columns=3), images)

    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (10, 16)
    np.testing.assert_array_equal(grid[[0, 0, 0, 9, 9, 9], [0, 6, 12, 0, 6, 12]], [0, 26, 51, 76, 102, 128])
