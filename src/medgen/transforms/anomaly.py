"""Scores an image against its reconstruction, and brings the maps back to the grid of the image's file.

Everything geometric goes by the affine of MONAI's ``MetaTensor``. Images read by
:class:`~medgen.data.MedicalImageReader` begin with the identity, and resizing and cropping multiply it: it always maps
(row, column) of the image as it is now to (row, column) of its file as it was read.
"""

from __future__ import annotations

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
from scipy import ndimage

from medgen.errors import UserError
from medgen.metrics.anomaly import PATCH, heat_map, score_anomaly
from medgen.transforms.resize import ResizeShorterSide
from medgen.transforms.save import SavePNG

__all__ = [
    "FitAnomalyMaskd",
    "FitToReferenced",
    "RestoreGridd",
    "ScoreAnomalyd",
    "default_patch",
    "pair_reconstructions",
    "pixels_of_file",
]

Item = dict[str, Any]


def pair_reconstructions(
    items: Sequence[Mapping[str, Any]],
    folder: str | PathLike[str],
    data_root: str | PathLike[str] = "",
    require_files: bool = True,
) -> list[Item]:
    """Datalist items with the path of each image's reconstruction as ``reconstruction``.

    It is named as :class:`~medgen.transforms.SavePNG` names it; where no such file is there, a file of the image's own
    name (``p1/a.jpg`` for ``p1/a.jpg``) will do, so that any two parallel folders can be compared.

    Args:
        items: with ``image``.
        folder: of the reconstructions.
        data_root: folder of the images, whose sub-folders are repeated below ``folder``.
        require_files: False where the reconstructions are still to be written; their names follow from the images'.

    Returns:
        Copies of the items, without entries that are None.

    Raises:
        UserError: a reconstruction is missing, or an image lies outside ``data_root``.
    """
    namer = SavePNG(folder, data_root, inputs=[item["image"] for item in items])
    pairs, missing = [], []
    for item in items:
        path = namer.path(None, {"filename_or_obj": item["image"]})
        if require_files and not path.is_file():
            root = os.path.abspath(data_root) if str(data_root) else os.path.dirname(os.path.abspath(item["image"]))
            twin = Path(folder) / os.path.relpath(os.path.abspath(item["image"]), root)
            if twin.is_file():
                path = twin
            else:
                missing.append(path)
        # a datalist may say null for a mask that is not there
        present = {key: value for key, value in item.items() if value is not None}
        pairs.append({**present, "reconstruction": str(path)})
    if missing:
        raise UserError(
            f"{missing[0]} not found ({len(missing)} of {len(pairs)} reconstructions are missing); project the images "
            "first (configs/project.json), or name the folder with --reconstruction_dir"
        )
    return pairs


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
        key: key of the mask as it was read, (C, H', W') in the rows and columns of the image's file, anomalous where it
            is above 0. An item without it gets a mask of zeros.
        image_key: key of the image, resized and cropped.
    """

    backend: ClassVar[list[TransformBackends]] = [TransformBackends.NUMPY]

    def __init__(self, key: Hashable = "anomaly_mask", image_key: Hashable = "image") -> None:
        self.key, self.image_key = key, image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Fit the mask of one item; returns a new dictionary with a uint8 tensor (1, H, W) of 0 and 1.

        Raises:
            UserError: the mask has another size than the image's file.
        """
        d = dict(data)
        image = d[self.image_key]
        fitted = np.zeros(tuple(image.shape[1:]), dtype=np.uint8)
        if self.key in d:
            matrix, shape = pixels_of_file(image)
            mask = convert_to_numpy(d[self.key]).max(axis=0) > 0
            if mask.shape != shape:
                name = getattr(d[self.key], "meta", {}).get("filename_or_obj", self.key)
                raise UserError(
                    f"{name}: an anomaly_mask must have its image's {shape[0]}×{shape[1]} pixels (height × width), got "
                    f"{mask.shape[0]}×{mask.shape[1]}; make it from the same file"
                )
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
        if patch is not None and (isinstance(patch, bool) or not isinstance(patch, int) or patch < 1):
            raise UserError(f"patch must be a whole number of pixels of at least 1, got {patch!r}; take {PATCH}")
        if not 0 <= body_threshold < 1:
            raise UserError(f"body_threshold must be at least 0 and below 1, got {body_threshold}; take 0")
        self.patch, self.body_threshold = patch, body_threshold

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
