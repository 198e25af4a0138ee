"""Anomaly maps as files: coloured overlays (PNG), float maps (NIfTI), and both as DICOM beside a DICOM source."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable, Hashable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import matplotlib
import nibabel as nib
import numpy as np
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import TransformBackends, convert_to_numpy
from PIL import Image, ImageDraw, ImageFont

from medgen.data.dicom_writer import pixel_affine, read_source, write_parametric_map, write_secondary_capture
from medgen.errors import UserError
from medgen.metrics.detection_table import MEASURES
from medgen.transforms.anomaly import pixels_of_file
from medgen.transforms.save import _Save

__all__ = [
    "SaveAnomalyDICOMd",
    "SaveMapd",
    "SaveOverlayd",
    "draw_overlay",
    "scale_top",
    "with_colour_bar",
    "worst_patch",
]

COLOUR_MAP = "plasma"  # perceptually uniform, and none of its colours is a grey
OPACITY = 0.65  # at the top of the scale; 0 at its foot
BOX_COLOUR = (0, 255, 255)  # not among the map's colours
SMALLEST_PICTURE = 512  # pixels of the shorter side: a small image is enlarged by a whole factor


def draw_overlay(
    image: np.ndarray,
    heat: np.ndarray,
    limit: float,
    box: tuple[float, float, float, float] | None = None,
    factor: int = 1,
) -> np.ndarray:
    """A heat map over a grey image that stays visible.

    Colour and opacity grow with the value: nothing at 0, ``plasma``'s yellow at ``limit`` and above. Where the map is
    NaN the image shows as it is.

    Args:
        image: (H, W) in [0, 1].
        heat: (H, W), 0 or more, or NaN.
        limit: top of the scale, above 0.
        box: first row, first column, last row, last column of a square to outline, in pixels.
        factor: whole number that the picture is enlarged by.

    Returns:
        uint8 (factor · H, factor · W, 3).
    """
    share = np.clip(np.nan_to_num(heat / limit, nan=0.0), 0, 1)[..., None]
    colour = _blend(np.clip(image, 0, 1)[..., None], share)
    picture = np.rint(colour * 255).astype(np.uint8).repeat(factor, axis=0).repeat(factor, axis=1)
    if box is not None:
        width = max(1, round(min(picture.shape[:2]) / 256))
        # around the patch: the outer edges of its pixels, which reach half a pixel beyond their centres
        top, left, bottom, right = (
            round((at + half) * factor) + outside
            for at, half, outside in zip(box, (0, 0, 1, 1), (-width, -width, width - 1, width - 1), strict=True)
        )
        drawn = Image.fromarray(picture)
        ImageDraw.Draw(drawn).rectangle((left, top, right, bottom), outline=BOX_COLOUR, width=width)
        picture = np.asarray(drawn)
    return picture


def _blend(grey: np.ndarray, share: np.ndarray) -> np.ndarray:
    """(..., 3) in [0, 1] from (..., 1) grey and (..., 1) share of the scale."""
    opacity = OPACITY * share
    return (1 - opacity) * grey + opacity * matplotlib.colormaps[COLOUR_MAP](share[..., 0])[..., :3]


def with_colour_bar(picture: np.ndarray, limit: float, title: str) -> np.ndarray:
    """The picture with the scale to its right, as it looks over middle grey."""
    height = picture.shape[0]
    font = ImageFont.load_default(size=max(14, height // 36))
    line = int(font.size)
    texts = [f"{share * limit:.2g}" for share in (1, 0.5, 0)]
    panel = Image.new("RGB", (int(3.5 * line + max(font.getlength(text) for text in [*texts, title])), height))
    draw = ImageDraw.Draw(panel)
    top, bottom = 3 * line, height - 2 * line
    share = np.linspace(1, 0, bottom - top)[:, None, None]
    bar = np.rint(_blend(np.full_like(share, 0.5), share) * 255).astype(np.uint8).repeat(line, axis=1)
    panel.paste(Image.fromarray(bar), (line, top))
    draw.text((line, line), title, fill="white", font=font)
    for text, at in zip(texts, (top, (top + bottom) / 2, bottom), strict=True):
        draw.text((2.5 * line, at), text, fill="white", font=font, anchor="lm")
    return np.concatenate([picture, np.asarray(panel)], axis=1)


class _Bytes(_Save):
    """Files of any content under the names that all savers share.

    Args:
        suffix: of the files.
        output_dir: see :class:`~medgen.transforms.SavePNG`.
        data_root: the same.
        postfix: the same.
        inputs: the same.
    """

    def __init__(
        self,
        suffix: str,
        output_dir: str | PathLike[str],
        data_root: str | PathLike[str],
        postfix: str,
        inputs: Sequence[str | PathLike[str]],
    ) -> None:
        super().__init__(output_dir, data_root, postfix, inputs)
        self.suffix = suffix

    def write(self, array: np.ndarray, path: Path, name: str) -> None:
        """Write the bytes of an array."""
        path.write_bytes(array.tobytes())


class _AnomalyFiles(MapTransform):
    """What the savers share: keys of maps such as ``mse_map``, whose files are named after the source.

    Args:
        keys: of the maps on the grid of the file (:class:`~medgen.transforms.RestoreGridd`), ``mse_map`` or ``wd_map``.
    """

    backend: ClassVar[list[TransformBackends]] = [TransformBackends.NUMPY]

    def __init__(self, keys: KeysCollection) -> None:
        super().__init__(keys)
        self.measures = [str(key).removesuffix("_map") for key in self.keys]
        unknown = [measure for measure in self.measures if measure not in MEASURES]
        if unknown:
            raise UserError(f"maps to save must be mse_map or wd_map, got {', '.join(map(str, self.keys))}")

    def check_limits(self, limits: Sequence[float | None] | float | None) -> list[float | None]:
        """Top of the scale per key; None: the map's own maximum."""
        found = list(limits) if isinstance(limits, list | tuple) else [limits] * len(self.keys)
        numbers = [value for value in found if value is not None]
        valid = all(isinstance(value, int | float) and not isinstance(value, bool) and value > 0 for value in numbers)
        if len(found) != len(self.keys) or not valid:
            raise UserError(
                f"limits must be a number above 0 or null for each of the {len(self.keys)} maps, got {limits}; "
                "set --mse_limit and --wd_limit"
            )
        return found


class SaveOverlayd(_AnomalyFiles):
    """Write each map over its source image as a PNG with a colour bar, the worst patch outlined.

    Args:
        keys: see :class:`_AnomalyFiles`.
        output_dir: see :class:`~medgen.transforms.SavePNG`.
        data_root: the same.
        inputs: the same.
        limits: top of the colour scale, one for each map; None: the map's own maximum, which makes each picture as
            telling as it can be, and pictures incomparable.
        source_key: key of the image on the grid of its file, (1, H, W) in [0, 1].
        image_key: key of the image that was scored, whose affine says where the worst patch lies in the file.
    """

    def __init__(
        self,
        keys: KeysCollection,
        output_dir: str | PathLike[str],
        data_root: str | PathLike[str] = "",
        inputs: Sequence[str | PathLike[str]] = (),
        limits: Sequence[float | None] | float | None = None,
        source_key: Hashable = "source",
        image_key: Hashable = "image",
    ) -> None:
        super().__init__(keys)
        self.limits = self.check_limits(limits)
        self.source_key, self.image_key = source_key, image_key
        self.savers = [_Bytes(".png", output_dir, data_root, f"_{measure}", inputs) for measure in self.measures]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the overlays of one item; returns a new dictionary with the same entries."""
        d = dict(data)
        source = convert_to_numpy(d[self.source_key])[0]
        factor = -(-SMALLEST_PICTURE // min(source.shape))
        for key, measure, limit, saver in self.key_iterator(d, self.measures, self.limits, self.savers):
            heat = convert_to_numpy(d[key])[0]
            top = scale_top(heat, limit)
            box = worst_patch(d["scores"], measure, d[self.image_key])
            picture = with_colour_bar(draw_overlay(source, heat, top, box, factor), top, measure.upper())
            file = io.BytesIO()
            # over a radiograph the usual level takes six times as long, for a file a sixth smaller
            Image.fromarray(picture).save(file, format="PNG", compress_level=1)
            saver.save(np.frombuffer(file.getbuffer(), dtype=np.uint8), d[self.source_key].meta)
        return d


class SaveMapd(_AnomalyFiles):
    """Write each map as float32 NIfTI (``.nii.gz``) that lies upon its source in a viewer.

    Of a NIfTI volume the map is the one slice, in the volume's space; of a DICOM image with a position in the patient
    (CT, MR) it has that position; a radiograph has its pixel spacing, and any other picture pixels of 1 mm. There is
    NaN where nothing was scored.

    Args:
        keys: see :class:`_AnomalyFiles`.
        output_dir: see :class:`~medgen.transforms.SavePNG`.
        data_root: the same.
        inputs: the same.
    """

    def __init__(
        self,
        keys: KeysCollection,
        output_dir: str | PathLike[str],
        data_root: str | PathLike[str] = "",
        inputs: Sequence[str | PathLike[str]] = (),
    ) -> None:
        super().__init__(keys)
        self.savers = [_Bytes(".nii.gz", output_dir, data_root, f"_{measure}", inputs) for measure in self.measures]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the maps of one item; returns a new dictionary with the same entries."""
        d = dict(data)
        for key, saver in self.key_iterator(d, self.savers):
            voxels, affine = _in_space(convert_to_numpy(d[key])[0], d[key].meta)
            content = nib.Nifti1Image(voxels.astype(np.float32), affine).to_bytes()
            # noise hardly shrinks at any level; without a time the same map gives the same file
            packed = gzip.compress(content, compresslevel=1, mtime=0)
            saver.save(np.frombuffer(packed, dtype=np.uint8), d[key].meta)
        return d


class SaveAnomalyDICOMd(_AnomalyFiles):
    """Write, where the source is a DICOM image, each map as a parametric map and its overlay as a secondary capture.

    Both have the source's rows and columns and refer to it, so that a viewer lays them over each other. The overlay has
    no colour bar; its DerivationDescription names the scale. A parametric map must be finite: where nothing was scored
    it is 0. Items of other formats pass.

    Args:
        keys: see :class:`_AnomalyFiles`.
        output_dir: see :class:`~medgen.transforms.SavePNG`.
        data_root: the same.
        inputs: the same.
        limits: see :class:`SaveOverlayd`; also the upper end of the parametric map's display window.
        source_key: see :class:`SaveOverlayd`.
        image_key: see :class:`SaveOverlayd`.
        origin: what made the reconstructions, such as the settings and weights of their projection, or what gives it
            when the first map is written. Maps of another origin, other patches or other limits are another series,
            which an archive keeps beside the first.
    """

    def __init__(
        self,
        keys: KeysCollection,
        output_dir: str | PathLike[str],
        data_root: str | PathLike[str] = "",
        inputs: Sequence[str | PathLike[str]] = (),
        limits: Sequence[float | None] | float | None = None,
        source_key: Hashable = "source",
        image_key: Hashable = "image",
        origin: str | Callable[[], str] = "",
    ) -> None:
        super().__init__(keys)
        self.limits = self.check_limits(limits)
        self.source_key, self.image_key, self.origin = source_key, image_key, origin
        self.savers = [
            [_Bytes(".dcm", output_dir, data_root, f"_{measure}_{kind}", inputs) for kind in ("overlay", "map")]
            for measure in self.measures
        ]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the objects of one item; returns a new dictionary with the same entries."""
        d = dict(data)
        meta = d[self.source_key].meta
        if meta.get("format") != "DICOM":
            return d
        source = read_source(meta["filename_or_obj"])
        frame = int(meta.get("frame", 0))
        pixels = convert_to_numpy(d[self.source_key])[0]
        settings = ", ".join(f"{key}: {limit}" for key, limit in zip(self.keys, self.limits, strict=True))
        made_by = self.origin() if callable(self.origin) else self.origin
        origin = f"{made_by}, patch {d['scores']['patch']}, limits {settings}"
        scored = "x".join(str(side) for side in d[self.image_key].shape[1:])
        for key, measure, limit, savers in self.key_iterator(d, self.measures, self.limits, self.savers):
            heat = convert_to_numpy(d[key])[0]
            top = scale_top(heat, limit)
            name, patch = measure.upper(), d["scores"]["patch"]
            box = worst_patch(d["scores"], measure, d[self.image_key])
            overlay, parametric = (saver.path(d[key], meta) for saver in savers)
            write_secondary_capture(
                overlay,
                draw_overlay(pixels, heat, top, box),
                source,
                description=f"anomaly {name} overlay",
                derivation=(
                    f"{name} between the image and its reconstruction by a generative model, at {scored} pixels, mean "
                    f"over the patches of {patch} pixels that cover a pixel; colour scale {COLOUR_MAP} from 0 to "
                    f"{top:.4g}; outlined: the patch of the highest {name}; no colour where nothing was scored"
                ),
                frame=frame,
                origin=origin,
            )
            write_parametric_map(
                parametric,
                np.nan_to_num(heat, nan=0.0),
                source,
                name=f"anomaly {name}",
                explanation=f"{name} to reconstruction, {patch} px patches; 0 if not scored",
                window=(top / 2, top),
                frame=frame,
                origin=origin,
            )
        return d


def scale_top(heat: np.ndarray, limit: float | None) -> float:
    """Top of the colour scale; above 0 also for a reconstruction without any error."""
    return limit if limit is not None else max(float(np.nanmax(heat)), 1e-6)


def worst_patch(scores: Mapping[str, float], measure: str, image: MetaTensor) -> tuple[float, float, float, float]:
    """First and last row and column of the worst patch, in pixels of the file."""
    matrix, _ = pixels_of_file(image)
    first = np.array([scores[f"{measure}_patch_row"], scores[f"{measure}_patch_column"]], dtype=float)
    scale, shift = np.diag(matrix)[:2], matrix[:2, 2]
    # outer edges of its pixels, then the pixels of the file inside them
    low, high = ((edge - 0.5) * scale + shift for edge in (first, first + scores["patch"]))
    return tuple(float(at) for at in (*np.ceil(low), *(np.ceil(high) - 1)))


def _in_space(values: np.ndarray, meta: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Voxels, three axes, and their (4, 4) affine to mm (right, anterior, superior) of a map (H, W)."""
    kind, frame = meta.get("format"), int(meta.get("frame", 0))
    if kind == "NIfTI":
        return _in_volume(values, nib.load(meta["filename_or_obj"]), frame)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])  # columns to the patient's left, rows to the back, as on any display
    if kind == "DICOM":
        affine = affine @ pixel_affine(read_source(meta["filename_or_obj"]), frame)
    return values.T[..., None], affine


def _in_volume(values: np.ndarray, volume: nib.spatialimages.SpatialImage, frame: int) -> tuple[np.ndarray, np.ndarray]:
    """The slice of a volume that :func:`~medgen.data.read_frames` shows, undone."""
    shape = (*volume.shape, 1, 1)[:3]
    orientation = nib.io_orientation(volume.affine)
    affine = volume.affine @ nib.orientations.inv_ornt_aff(orientation, shape)
    sides = np.empty(3, dtype=int)
    sides[orientation[:, 0].astype(int)] = shape
    single = np.flatnonzero(sides == 1)
    axis = int(single[0]) if len(single) == 1 else 2
    affine[:3, 3] += frame * affine[:3, axis]
    return np.expand_dims(values.T[::-1, ::-1], axis), affine
