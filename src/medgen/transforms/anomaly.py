"""Scores an image against its reconstruction, and brings the maps back to the grid of the image's file.

Everything geometric goes by the affine of MONAI's ``MetaTensor``. Images read by
:class:`~medgen.data.MedicalImageReader` begin with the identity, and resizing and cropping multiply it: it always maps
(row, column) of the image as it is now to (row, column) of its file as it was read.
"""

from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import CenterSpatialCrop, MapTransform, Transform
from monai.utils import TransformBackends, convert_to_numpy
from PIL import Image, ImageOps
from scipy import ndimage
from torch.utils.data import DataLoader
from tqdm import tqdm

from medgen.data.datalist import printable
from medgen.data.image_set import file_sha256
from medgen.data.reader import UnreadableImageError, one_line, read_some
from medgen.errors import UserError
from medgen.metrics.anomaly import PATCH, heat_map, score_anomaly
from medgen.transforms.resize import ResizeShorterSide
from medgen.transforms.save import SavePNG
from medgen.transforms.save_projection import ProjectionRecord, RecordName

__all__ = [
    "FitAnomalyMaskd",
    "FitToReferenced",
    "RestoreGridd",
    "ScoreAnomalyd",
    "check_files",
    "check_scoring",
    "default_patch",
    "origin_of_reconstructions",
    "pair_reconstructions",
    "pixels_of_file",
    "read_anomaly_mask",
]

logger = logging.getLogger(__name__)

Item = dict[str, Any]


def check_scoring(
    items: Sequence[Mapping[str, Any]], patch: int | None = None, image_size: Sequence[int] | None = None
) -> None:
    """See before a projection of hours that its scoring will not fail by a setting or a class.

    Args:
        items: of a datalist.
        patch: side of the patches in pixels, or None.
        image_size: height and width that are scored; None where they are not known beforehand.

    Raises:
        UserError: an ``anomaly`` that is neither 0 nor 1 (nor absent), or a patch larger than the image.
    """
    wrong = [item for item in items if item.get("anomaly") not in (None, 0, 1)]
    if wrong:
        raise UserError(
            f"anomaly must be 1, or 0 or absent for a normal image, got {wrong[0]['anomaly']!r} for "
            f"{wrong[0]['image']} ({len(wrong)} of {len(items)} items); mend the datalist"
        )
    checked_patch(patch)
    if patch is not None and image_size is not None and patch > min(image_size):
        raise UserError(
            f"patch must be at most the shorter side of the image, {min(image_size)} pixels, got {patch}; set --patch"
        )


def checked_patch(patch: int | None) -> int | None:
    """The setting, if it is one; else a UserError."""
    if patch is not None and (isinstance(patch, bool) or not isinstance(patch, int) or patch < 1):
        raise UserError(f"patch must be a whole number of pixels of at least 1, got {patch!r}; set --patch {PATCH}")
    return patch


class _Problems:
    """Map-style data set over items: what is wrong with the files of each, or an empty text."""

    def __init__(self, items: Sequence[Mapping[str, Any]]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> str:
        item = self.items[number]
        name = item["image"]
        try:
            shape = read_some(Path(name), None, 0)[0].pixels.shape[:2]
            if item.get("anomaly_mask"):
                name = item["anomaly_mask"]
                _check_mask(name, read_anomaly_mask(name), shape)
        except UnreadableImageError as error:
            return f"{name}: {error}"
        except UserError as error:
            return str(error)
        except MemoryError:
            return f"{name}: too large for the memory"
        except Exception as error:  # one odd file must not hide the others
            return f"{name}: {type(error).__name__}: {one_line(error)}"
        return ""


def check_files(items: Sequence[Mapping[str, Any]], num_workers: int = 0) -> None:
    """Read all images and anomaly masks of a datalist once, before a projection of hours stops at one of them.

    Args:
        items: with ``image`` and perhaps ``anomaly_mask``.
        num_workers: processes that read; 0 reads in this one.

    Raises:
        UserError: files that cannot be read, or masks that do not have their image's size; names the first.
    """
    # a generator of its own: the check must not change what a seed gives
    loader = DataLoader(_Problems(items), batch_size=None, num_workers=num_workers, generator=torch.Generator())
    checked = tqdm(loader, desc="checking", unit="image", leave=False, disable=None)
    problems = [problem for problem in checked if problem]
    if problems:
        raise UserError(
            f"{problems[0]} ({len(problems)} of {len(items)} items cannot be used); mend the files, or take the items "
            "out of the datalist"
        )


def read_anomaly_mask(path: str | PathLike[str]) -> np.ndarray:
    """Where the mask of a known anomaly is above 0, by the values as they are stored.

    Not as an image is read: that scales a NIfTI by its minimum and maximum, and a mask of ones alone would be empty.

    Args:
        path: of the first frame; PNG, TIFF, BMP, DICOM or NIfTI.

    Returns:
        (H, W) bool in the rows and columns in which the image of the file would be read.

    Raises:
        UserError: it cannot be read, or is a JPEG, whose compression leaves no exact 0 around the anomaly.
    """
    try:
        frame = read_some(Path(path), (0.5, 1.0), 0)[0]
    except UnreadableImageError as error:
        raise UserError(f"{path}: {error}") from error.__cause__
    if frame.meta["format"] in ("JPEG", "MPO"):
        raise UserError(f"{path}: a JPEG is blurred around its edges and no mask; save the mask as PNG, above 0 inside")
    pixels = frame.pixels
    if frame.meta.get("photometric") in ("I", "F") and frame.meta["format"] not in ("DICOM", "NIfTI"):
        with Image.open(
            path, formats=("PNG", "TIFF", "BMP")
        ) as image:  # whole numbers and floats of 32 bits were scaled from their minimum
            pixels = np.asarray(ImageOps.exif_transpose(image))
    return (pixels if pixels.ndim == 2 else pixels.max(axis=-1)) > 0


def _check_mask(path: str | PathLike[str], mask: np.ndarray, shape: Sequence[int]) -> None:
    if mask.shape != tuple(shape):
        raise UserError(
            f"{path}: an anomaly_mask must have its image's {shape[0]}×{shape[1]} pixels (height × width), got "
            f"{mask.shape[0]}×{mask.shape[1]}; make it from the same file"
        )


def pair_reconstructions(
    items: Sequence[Mapping[str, Any]],
    folder: str | PathLike[str],
    data_root: str | PathLike[str] = "",
    require_files: bool = True,
    inputs: Sequence[str | PathLike[str]] = (),
    rejected: str | PathLike[str] | None = None,
    at_most: int | None = None,
) -> list[Item]:
    """Datalist items with the path of each image's reconstruction as ``reconstruction``.

    It is named as :class:`~medgen.transforms.SavePNG` names it; where no such file is there, a file of the image's own
    name (``p1/a.jpg`` for ``p1/a.jpg``) will do, so that any two parallel folders can be compared.

    Args:
        items: with ``image``.
        folder: of the reconstructions.
        data_root: folder of the images, whose sub-folders are repeated below ``folder``.
        require_files: False where the reconstructions are still to be written; their names follow from the images'.
        inputs: all images of the run that made the reconstructions, where ``items`` are some of them; default: those of
            ``items``.
        rejected: CSV in which a projection says which images it gave none (``file``, relative to ``data_root``): those
            of them that have no reconstruction are left out, with a warning. None, or no such file: none is.
        at_most: how many pairs are wanted, of the first items that have one; None: all.

    Returns:
        Copies of the items, without entries that are None.

    Raises:
        UserError: a reconstruction is missing, all are left out, or an image lies outside ``data_root``.
    """
    namer = SavePNG(folder, data_root, inputs=inputs or [item["image"] for item in items])
    known = _rejected_files(rejected)
    pairs, missing, left_out = [], [], []
    for item in items:
        if at_most is not None and len(pairs) == at_most:
            break
        path = namer.path(None, {"filename_or_obj": item["image"]})
        if require_files and not path.is_file():
            root = os.path.abspath(data_root) if str(data_root) else os.path.dirname(os.path.abspath(item["image"]))
            twin = Path(folder) / os.path.relpath(os.path.abspath(item["image"]), root)
            if twin.is_file():
                path = twin
            elif printable(Path(os.path.relpath(os.path.abspath(item["image"]), root)).as_posix()) in known:
                left_out.append(item)
                continue
            else:
                missing.append(path)
                if at_most is not None:
                    continue
        # a datalist may say null for a mask that is not there
        present = {key: value for key, value in item.items() if value is not None}
        pairs.append({**present, "reconstruction": str(path)})
    if missing and (at_most is None or not pairs):
        raise UserError(
            f"{missing[0]} not found ({len(missing)} of {len(items)} reconstructions are missing); project the images "
            "first (configs/project.json), name the folder with --reconstruction_dir, or leave out of the data what a "
            "projection listed in rejected.csv"
        )
    if left_out and not pairs:
        raise UserError(
            f"none of {len(items)} images has a reconstruction in {folder}, {rejected} says why; project anew"
        )
    if left_out and at_most is None:
        logger.warning(
            f"{len(left_out)} of {len(items)} images have no reconstruction and are left out, see {rejected}"
        )
    return pairs


def _rejected_files(path: str | PathLike[str] | None) -> set[str]:
    """The files of a table of those that could not be used; none where there is no table."""
    if path is None or not Path(path).is_file():
        return set()
    with open(path, newline="", encoding="utf-8") as table:
        return {row["file"] for row in csv.DictReader(table)}


def origin_of_reconstructions(
    pairs: Sequence[Mapping[str, Any]],
    projection_dir: str | PathLike[str] | None = None,
    data_root: str | PathLike[str] = "",
    inputs: Sequence[str | PathLike[str]] = (),
) -> str:
    """What made the reconstructions of a folder: the settings and weights of their projection.

    Args:
        pairs: of :func:`pair_reconstructions`; the first is enough.
        projection_dir: folder of the projections' records, or None.
        data_root: see :func:`pair_reconstructions`.
        inputs: see :func:`pair_reconstructions`.

    Returns:
        :meth:`~medgen.transforms.SaveProjectiond.origin` of the first record; where there is none, the SHA-256 of the
        first reconstruction: those of another detector have another.
    """
    if projection_dir is not None:
        names = RecordName(projection_dir, data_root, inputs=inputs or [pair["image"] for pair in pairs])
        path = names.path(np.empty(0), {"filename_or_obj": pairs[0]["image"]})
        if path.is_file():
            return json.dumps(ProjectionRecord(path).settings, sort_keys=True)
    return file_sha256(pairs[0]["reconstruction"])


def default_patch(shape: Sequence[int]) -> int:
    """Side of a patch in pixels: the source's 32, or a quarter of the shorter side where that is less (16 at 64×64).

    Args:
        shape: height and width of the image.
    """
    return max(1, min(PATCH, min(shape) // 4))


def pixels_of_file(image: MetaTensor) -> tuple[np.ndarray, tuple[int, int]]:
    """Where the pixels of an image lie in its file.

    Args:
        image: (C, H, W) with the metadata of its file.

    Returns:
        (3, 3) homogeneous matrix from (row, column) of ``image`` to (row, column) of the file as it was read, and the
        file's rows and columns.

    Raises:
        UserError: no metadata, or rows and columns that were turned.
    """
    meta = getattr(image, "meta", {})
    name = meta.get("filename_or_obj", "the image")
    if "spatial_shape" not in meta or "original_affine" not in meta:
        raise UserError(f"{name}: its maps need the metadata that MedicalImageReader gives; load it with that reader")
    both = np.linalg.inv(_numpy(meta["original_affine"])) @ _numpy(image.affine)
    matrix = both[np.ix_([0, 1, -1], [0, 1, -1])]
    if np.abs(matrix[[0, 1], [1, 0]]).max() > 1e-6 or matrix[0, 0] <= 0 or matrix[1, 1] <= 0:
        raise UserError(f"{name}: was rotated or flipped; only resizing and cropping can be undone for its maps")
    rows, columns = (int(side) for side in _numpy(meta["spatial_shape"])[:2])
    return matrix, (rows, columns)


class FitToReferenced(MapTransform):
    """Resize and centre crop an image to the size of another: what the projection did before the network saw it.

    The shorter side becomes the reference's, with antialiasing, then the centre is cut out; an image that has the size
    already stays as it is.

    Args:
        keys: keys of the images, (C, H, W).
        reference: key of the image whose height and width they get.
    """

    backend = ResizeShorterSide.backend

    def __init__(self, keys: KeysCollection, reference: Hashable) -> None:
        super().__init__(keys)
        self.reference = reference

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Fit the images of one item; returns a new dictionary.

        Raises:
            UserError: an image whose sides are so unequal that the crop would leave it.
        """
        d = dict(data)
        shape = tuple(d[self.reference].shape[1:])
        for key in self.key_iterator(d):
            before = tuple(d[key].shape[1:])
            if before != shape:
                d[key] = CenterSpatialCrop(shape)(ResizeShorterSide(min(shape))(d[key]))
            if tuple(d[key].shape[1:]) != shape:
                name = getattr(d[key], "meta", {}).get("filename_or_obj", key)
                raise UserError(
                    f"{name}: {before[0]}×{before[1]} pixels (height × width) cannot be fitted to the reconstruction's "
                    f"{shape[0]}×{shape[1]}; the reconstruction is of another image"
                )
        return d


class FitAnomalyMaskd(Transform):
    """Bring the mask of a known anomaly to the pixels of the image that is scored.

    A pixel is anomalous where the nearest pixel of the file is, or where it is the nearest one of an anomalous pixel of
    the file: nearest neighbour both ways, so that a needle of one pixel does not vanish when the image shrinks.

    Args:
        key: key of the mask's path (:func:`read_anomaly_mask`); the mask has the rows and columns of the image's file.
            An item without it gets a mask of zeros.
        image_key: key of the image, resized and cropped.
    """

    backend: ClassVar[list[TransformBackends]] = [TransformBackends.NUMPY]

    def __init__(self, key: Hashable = "anomaly_mask", image_key: Hashable = "image") -> None:
        self.key, self.image_key = key, image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Fit the mask of one item; returns a new dictionary with a uint8 tensor (1, H, W) of 0 and 1.

        Raises:
            UserError: the mask cannot be read, or has another size than the image's file.
        """
        d = dict(data)
        image = d[self.image_key]
        fitted = np.zeros(tuple(image.shape[1:]), dtype=np.uint8)
        if self.key in d:
            matrix, shape = pixels_of_file(image)
            mask = read_anomaly_mask(d[self.key])
            _check_mask(d[self.key], mask, shape)
            scale, shift = np.diag(matrix)[:2], matrix[:2, 2]
            rows, columns = (
                np.clip(np.rint(np.arange(n) * scale[axis] + shift[axis]).astype(int), 0, shape[axis] - 1)
                for axis, n in enumerate(fitted.shape)
            )
            fitted |= mask[np.ix_(rows, columns)]
            found = np.rint((np.argwhere(mask) - shift) / scale).astype(int)
            inside = ((found >= 0) & (found < fitted.shape)).all(axis=1)
            fitted[tuple(found[inside].T)] = 1
        d[self.key] = torch.from_numpy(fitted)[None]
        return d


class ScoreAnomalyd(MapTransform):
    """Score an image against its reconstruction, and draw up the heat maps.

    Both are rounded to 8 bits first. The source scored 8-bit files, reconstructions are stored as such, and on 256
    levels the Wasserstein distance of every patch is exact.

    Args:
        keys: of the image and of its reconstruction, (1, H, W) in [0, 1], of one size.
        patch: side of the patches in pixels; None: :func:`default_patch` of the image.
        body_threshold: the body is brighter than this, in [0, 1]; see :func:`~medgen.metrics.body_region`.

    Raises:
        UserError: not two keys, or a setting out of range.
    """

    backend: ClassVar[list[TransformBackends]] = [TransformBackends.NUMPY]

    def __init__(
        self,
        keys: KeysCollection = ("image", "reconstruction"),
        patch: int | None = None,
        body_threshold: float = 0.0,
    ) -> None:
        super().__init__(keys)
        if len(self.keys) != 2:
            raise UserError(f"scoring takes the keys of the image and of its reconstruction, got {self.keys}")
        if not isinstance(body_threshold, int | float) or not 0 <= body_threshold < 1:
            raise UserError(f"body_threshold must be at least 0 and below 1, got {body_threshold!r}; take 0")
        self.patch, self.body_threshold = checked_patch(patch), body_threshold

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Score one item.

        Returns:
            A new dictionary with ``scores``, the fields of :class:`~medgen.metrics.anomaly.AnomalyScores` (NaN where
            there is no body: a batch cannot hold None), and ``mse_map`` and ``wd_map``, float32 (1, H, W), of each
            pixel the mean over the patches that cover it, with the image's metadata.

        Raises:
            UserError: images of different sizes, not grey, not finite or out of range, or smaller than a patch.
        """
        d = dict(data)
        image, reconstruction = (d[key] for key in self.keys)
        name = getattr(image, "meta", {}).get("filename_or_obj", self.keys[0])
        try:
            patch = default_patch(image.shape[-2:]) if self.patch is None else self.patch
            scores, maps = score_anomaly(
                *(_levels(values) for values in (image, reconstruction)),
                patch=patch,
                body_threshold=self.body_threshold,
            )
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        d["scores"] = {key: float("nan") if value is None else value for key, value in asdict(scores).items()}
        for key, values in (("mse_map", maps.mse), ("wd_map", maps.wd)):
            # the mean of non-negative scores may come out a rounding error below 0
            heat = torch.from_numpy(np.maximum(heat_map(values, patch), 0).astype(np.float32))[None]
            if isinstance(image, MetaTensor):
                heat = MetaTensor(heat, meta=dict(image.meta))
            d[key] = heat
        return d


class RestoreGridd(MapTransform):
    """Bring maps back to the pixels of the image's file: the inverse of resizing and centre crop.

    Between the centres of pixels values are interpolated linearly. What lay outside the crop was not scored and is NaN.

    Args:
        keys: keys of the maps, (C, H, W) ``MetaTensor`` with the affine of the image.
    """

    backend: ClassVar[list[TransformBackends]] = [TransformBackends.NUMPY]

    def __init__(self, keys: KeysCollection) -> None:
        super().__init__(keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Bring back the maps of one item; returns a new dictionary with float32 (C, H', W').

        Raises:
            UserError: as for :func:`pixels_of_file`.
        """
        d = dict(data)
        for key in self.key_iterator(d):
            matrix, shape = pixels_of_file(d[key])
            restored = torch.from_numpy(_restored(convert_to_numpy(d[key]), matrix, shape))
            d[key] = MetaTensor(restored, meta={**d[key].meta, "affine": d[key].meta["original_affine"]})
        return d


def _restored(values: np.ndarray, matrix: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(C, H, W) at the pixels of the file, (C, *shape); NaN outside."""
    scale, shift = np.diag(matrix)[:2], matrix[:2, 2]
    # of each row and column of the file, where in the map it lies
    rows, columns = ((np.arange(side) - shift[axis]) / scale[axis] for axis, side in enumerate(shape))
    out = np.full((len(values), *shape), np.nan, dtype=np.float32)
    # a pixel reaches half a pixel beyond its centre, and what the affine has of rounding
    inside = [
        (at >= -0.5 - 1e-6) & (at <= side - 0.5 + 1e-6)
        for at, side in zip((rows, columns), values.shape[1:], strict=True)
    ]
    grid = np.meshgrid(rows[inside[0]], columns[inside[1]], indexing="ij")
    for plane, result in zip(values, out, strict=True):
        result[np.ix_(*inside)] = ndimage.map_coordinates(plane, grid, order=1, mode="nearest")
    return out


def _levels(values: torch.Tensor) -> np.ndarray:
    """uint8 of [0, 1]; what cannot be rounded is left for the scoring to refuse."""
    array = convert_to_numpy(values)
    if array.dtype == np.uint8 or not np.isfinite(array).all() or array.min() < -1e-5 or array.max() > 1 + 1e-5:
        return array
    return np.rint(np.clip(array, 0, 1) * 255).astype(np.uint8)


def _numpy(values: Any) -> np.ndarray:
    return np.asarray(convert_to_numpy(values))
