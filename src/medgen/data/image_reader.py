"""MONAI image reader: one upright picture per file, scaled to [0, 1]."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import PathLike
from monai.data import ImageReader
from monai.utils import MetaKeys, ensure_tuple

from medgen.data.reader import UnreadableImageError, checked_window, has_known_content, read_some
from medgen.errors import UserError

__all__ = ["MedicalImageReader"]

# LoadImage makes one of each of MONAI's readers beside the one it is given, and this one complains of a missing decoder
warnings.filterwarnings("ignore", message="NvImgCodecPydicomReader")

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".dcm", ".dicom", ".nii", ".nii.gz")


class MedicalImageReader(ImageReader):
    """MONAI reader of one picture per file through :func:`read_frames`.

    MONAI's own readers swap rows and columns (``PILReader``, ``PydicomReader``), which shows every picture transposed
    unless each later step swaps back, and its DICOM reader ignores MONOCHROME1, windows and VOI LUTs, which shows some
    radiographs as negatives. This one never transposes: after ``ensure_channel_first`` a tensor is (C, H, W).

    Example::

        LoadImaged(keys="image", reader=MedicalImageReader(window=(40, 400)), ensure_channel_first=True)
        {"_target_": "LoadImaged", "keys": "image", "reader": "$medgen.data.MedicalImageReader",
         "ensure_channel_first": true}

    Args:
        window: centre and width in the image's own units, see :func:`read_frames`.
        frame: which frame or slice of the file, from 0.
    """

    def __init__(self, window: Sequence[float] | None = None, frame: int = 0) -> None:
        super().__init__()
        if frame < 0:
            raise UserError(f"frame must be 0 or more, got {frame}; frames are counted from 0")
        self.window = checked_window(window)
        self.frame = frame

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """Whether the content of every file, or else its suffix, is one this reader knows."""
        paths = [Path(name) for name in ensure_tuple(filename)]
        return all(path.name.lower().endswith(SUFFIXES) or has_known_content(path) for path in paths)

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> list[Path]:
        """Only remember the paths.

        ``LoadImage`` takes an exception in here as an invitation to try its other readers, which would load a refused
        file transposed, uninverted or as something it is not: all reading waits for :meth:`get_data`.
        """
        return [Path(name) for name in ensure_tuple(data)]

    def get_data(self, img: Sequence[Path]) -> tuple[np.ndarray, dict[str, Any]]:
        """Read the chosen frame.

        Args:
            img: what :meth:`read` returned; several files of the same size become channels of one image.

        Returns:
            The pixels, (H, W), (H, W, 3) or (files, H, W), float32 in [0, 1], and the metadata: ``affine`` (identity),
            ``spatial_shape`` (H, W), ``original_channel_dim``, ``frame``, ``modality``, ``patient`` and the keys of
            :attr:`Frame.meta`.

        Raises:
            UserError: if a file cannot be read; the message is its path and the reason.
        """
        frames = []
        for path in img:
            try:
                frames.append(read_some(path, self.window, self.frame)[0])
            except UnreadableImageError as error:
                # in the place of the error without the path: a DataLoader worker sends home the text of the whole chain
                raise UserError(f"{path}: {error}") from error.__cause__
        shapes = [frame.pixels.shape for frame in frames]
        if len(frames) == 1:
            pixels, channel_dim = frames[0].pixels, float("nan") if len(shapes[0]) == 2 else -1
        elif len(set(shapes)) == 1 and len(shapes[0]) == 2:
            pixels, channel_dim = np.stack([frame.pixels for frame in frames]), 0
        else:
            raise UserError(f"files loaded as channels of one image must be grey and of one size, got {shapes}")
        meta: dict[str, Any] = {
            **frames[0].meta,
            MetaKeys.AFFINE: np.eye(4),
            MetaKeys.ORIGINAL_AFFINE: np.eye(4),
            MetaKeys.SPATIAL_SHAPE: np.asarray(shapes[0][:2]),
            MetaKeys.ORIGINAL_CHANNEL_DIM: channel_dim,
            "frame": frames[0].index,
            "modality": frames[0].modality,
            "patient": frames[0].patient or "",
        }
        return pixels, meta
