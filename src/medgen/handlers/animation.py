"""Moving pictures: GIF, WebP and MP4."""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from ignite.engine import Engine, Events
from PIL import Image

from medgen.errors import UserError
from medgen.handlers.pictures import save_grid
from medgen.output import atomic_file

__all__ = ["AnimationWriter", "GridWriter", "check_animation_name", "write_animation"]

SUFFIXES = (".gif", ".mp4", ".webp")
WEBP_QUALITY, X264_CRF = 90, "16"  # both without visible loss


def check_animation_name(file_name: str, suffixes: Sequence[str] = SUFFIXES) -> None:
    """See that a name is a file's name, of a format that can be written.

    Raises:
        UserError: it is not.
    """
    path = Path(str(file_name))
    if path.suffix.lower() not in suffixes or not path.stem or os.path.basename(str(file_name)) != str(file_name):
        raise UserError(
            f"file_name must be a name that ends in {', '.join(suffixes)}, without a folder, got {file_name!r}; set "
            f"--file_name animation{suffixes[0]}"
        )


def write_animation(path: str | os.PathLike[str], frames: Sequence[np.ndarray], fps: float = 25) -> None:
    """Write frames as a moving picture that begins anew at its end.

    GIF keeps grey levels exactly (256 of them) and reduces colour to 256; its clock knows hundredths of a second only.
    WebP and MP4 (H.264, yuv420p, which every browser plays) are compressed. H.264 of this kind has even sides: an odd
    one gets its last row or column twice.

    Args:
        path: ``.gif``, ``.webp`` or ``.mp4``; written whole or not at all.
        frames: (H, W) grey or (H, W, 3) RGB, uint8, of one shape; at least one.
        fps: frames a second.

    Raises:
        UserError: another suffix, no frames, or frames of several shapes.
        OSError: it cannot be written.
    """
    path = Path(path)
    check_animation_name(path.name)
    shapes = {frame.shape for frame in frames}
    if len(shapes) != 1:
        raise UserError(f"an animation takes frames of one shape, got {sorted(shapes) or 'none'}")
    buffer = io.BytesIO()
    if path.suffix.lower() == ".mp4":
        _encode_h264(buffer, frames, fps)
    else:
        images = [Image.fromarray(frame) for frame in frames]
        kind = {"format": "GIF"} if path.suffix.lower() == ".gif" else {"format": "WEBP", "quality": WEBP_QUALITY}
        images[0].save(
            buffer, save_all=True, append_images=images[1:], duration=max(round(1000 / fps), 1), loop=0, **kind
        )
    with atomic_file(path) as file:
        file.write(buffer.getvalue())


def _encode_h264(buffer: io.BytesIO, frames: Iterable[np.ndarray], fps: float) -> None:
    import av  # starts FFmpeg's libraries, which only films need

    with av.open(buffer, "w", format="mp4") as container:
        stream = None
        for frame in frames:
            even = np.pad(frame, [(0, side % 2) for side in frame.shape[:2]] + [(0, 0)] * (frame.ndim - 2), mode="edge")
            if stream is None:
                stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
                stream.height, stream.width = even.shape[:2]
                stream.pix_fmt, stream.options = "yuv420p", {"crf": X264_CRF}
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), "rgb24" if even.ndim == 3 else "gray")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


class _Collector(ABC):
    """Keeps the images that an evaluator puts out, and writes them when it is done."""

    def attach(self, engine: Engine) -> None:
        """Register on an evaluator whose output is a list of dictionaries with ``pred``."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def start(self, engine: Engine) -> None:
        """Forget the images of the run before."""
        self._images: list[torch.Tensor] = []

    def collect(self, engine: Engine) -> None:
        """Keep the images of a batch, in 8 bits."""
        for item in engine.state.output:
            self._images.append((item["pred"].clamp(0, 1) * 255).round().to(torch.uint8).cpu())

    @abstractmethod
    def write(self, engine: Engine) -> None:
        """Write them."""


class AnimationWriter(_Collector):
    """Writes what an evaluator generates, in its order, as a moving picture.

    Args:
        path: see :func:`write_animation`.
        fps: frames a second.

    Raises:
        UserError: the path's suffix is none that can be written.
    """

    def __init__(self, path: str | os.PathLike[str], fps: float = 25) -> None:
        check_animation_name(Path(path).name)
        self.path, self.fps = Path(path), fps

    def write(self, engine: Engine) -> None:
        """Write the animation."""
        frames = [image[0] if image.shape[0] == 1 else image.permute(1, 2, 0) for image in self._images]
        write_animation(self.path, [np.ascontiguousarray(frame.numpy()) for frame in frames], self.fps)


class GridWriter(_Collector):
    """Writes what an evaluator generates, in its order, as a grid of rows.

    Args:
        path: the PNG.
        columns: images in a row.
    """

    def __init__(self, path: str | os.PathLike[str], columns: int) -> None:
        self.path, self.columns = Path(path), columns

    def write(self, engine: Engine) -> None:
        """Write the grid."""
        images = torch.stack(self._images).float() / 255
        save_grid(images.split(self.columns), self.path)
