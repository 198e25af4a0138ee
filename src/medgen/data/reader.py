"""Reads medical images of any common format upright and scaled to [0, 1]."""

from __future__ import annotations

import gzip
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
import pydicom
from nibabel.spatialimages import SpatialImage
from PIL import Image, ImageOps, TiffImagePlugin
from pydicom.pixels import apply_color_lut, pixel_array

from medgen.errors import UserError

__all__ = ["Frame", "UnreadableImageError", "picture_frames", "read_frames"]

MAX_VOXELS = 2**30  # a whole-body CT of 512 x 512 x 4096; 4 GiB as float32

_UNKNOWN = "not a PNG, JPEG, TIFF, BMP, DICOM or NIfTI file by its content"
_PILLOW_FORMATS = ("PNG", "JPEG", TiffImagePlugin.TiffImageFile.format, "BMP")  # registered by that import
_MAGIC = {
    b"\x89PNG\r\n\x1a\n": "picture",
    b"\xff\xd8\xff": "picture",
    b"II*\0": "picture",
    b"MM\0*": "picture",
    b"II+\0": "picture",
    b"MM\0+": "picture",
    b"BM": "picture",
    b"\x1f\x8b": "gzip",
}
# Objects that have pixel data which is no picture of a patient; those without pixel data need no table.
_NO_PICTURE = {
    "1.2.840.10008.5.1.4.1.1.66.4": "a segmentation object holds labels, no image",
    "1.2.840.10008.5.1.4.1.1.66.7": "a label map segmentation object holds labels, no image",
    "1.2.840.10008.5.1.4.1.1.481.2": "a radiotherapy dose object holds a dose grid, no image",
}
_META_KEYWORDS = {
    "view_position": "ViewPosition",
    "photometric": "PhotometricInterpretation",
    "body_part": "BodyPartExamined",
    "patient_orientation": "PatientOrientation",
    "study": "StudyInstanceUID",
    "series": "SeriesInstanceUID",
    "sop_instance": "SOPInstanceUID",
    "sop_class": "SOPClassUID",
}


class UnreadableImageError(UserError):
    """A file that is no readable image; the message is the reason, one line without the file's name."""


@dataclass(frozen=True)
class Frame:
    """One picture of a file, as a viewer shows it: right side up, not mirrored.

    Attributes:
        pixels: (H, W) grey or (H, W, 3) colour, float32 in [0, 1], 0 is black.
        index: frame or slice number in its file, from 0; NIfTI slices are counted from the feet up.
        count: number of frames or slices in its file.
        modality: DICOM Modality; empty where the file does not say.
        patient: DICOM PatientID; None where the file does not say.
        meta: what else the file says, as text, keys only where known: ``format``, ``window`` (how values became
            grey levels), ``view_position``, ``photometric``, ``laterality``, ``body_part``, ``patient_orientation``,
            ``study``, ``series``, ``sop_instance``, ``sop_class``, ``transfer_syntax``.
    """

    pixels: np.ndarray
    index: int
    modality: str = ""
    patient: str | None = None
    meta: dict[str, str] = field(default_factory=dict)
    count: int = 1


def read_frames(path: str | PathLike[str], *, window: tuple[float, float] | None = None) -> list[Frame]:
    """Read every picture of an image file.

    The format is recognised by the file's content. What is done to the values:

    - **PNG, JPEG, TIFF, BMP**: any mode; 8 bits / 255, 16 bits / 65535; values without a known range (32-bit integers
      beyond 16 bits, floats outside [0, 1]) from their minimum to their maximum. Transparent pixels are laid on
      black, so that what a viewer hides stays hidden. The EXIF orientation is applied.
    - **DICOM**: modality LUT or rescale, then the first VOI LUT or else the first window (LINEAR, LINEAR_EXACT,
      SIGMOID), then the inversion of MONOCHROME1. Per-frame functional groups take precedence over shared ones and
      those over the file's own. Without a usable VOI LUT or window: minimum to maximum of the frame. Padding pixels
      take no part and become black. Rows and columns stay as stored, which is how a DICOM viewer shows them.
    - **NIfTI**: axial slices in radiological display (anterior on top, the patient's right on the image's left); a
      2-D file gives its one picture in the same convention. Without ``window``: the display range of the header
      (``cal_min`` to ``cal_max``) or else minimum to maximum of the volume.

    Colour whose three channels are equal comes back grey; a constant image is accepted.

    Args:
        path: the file.
        window: centre and width in the image's own units (HU for CT): centre ± width / 2 becomes [0, 1]; overrides
            what a DICOM file says. Pictures already made for display (PNG, JPEG, ..., colour) have no such units and
            are taken as they are.

    Returns:
        The frames in file order; at least one.

    Raises:
        UnreadableImageError: if the file is no readable image; the message is the reason in one line.
        UserError: if ``window`` is no centre and positive width.
        OSError: if the disk or the network fails, which says nothing about the file.
    """
    return read_some(Path(path), checked_window(window), None)


def read_some(path: Path, window: tuple[float, float] | None, only: int | None) -> list[Frame]:
    """All frames of a file, or the one numbered ``only``."""
    try:
        kind = file_kind(path)
        with quiet_pydicom():
            if kind == "picture":
                return picture_frames(path, only)
            if kind == "DICOM":
                return _dicom_frames(path, window, only)
            return _nifti_frames(path, window, only, zipped=kind == "gzip")
    except (UnreadableImageError, MemoryError):
        raise
    except Exception as error:  # decoders of damaged bytes raise anything from OSError to struct.error
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system's word on the disk or the network, not a decoder's on the file
        said = str(error).replace(str(path), path.name) or type(error).__name__
        raise UnreadableImageError(f"cannot be decoded, truncated or damaged: {one_line(said)}") from error


def file_kind(path: Path) -> str:
    """``picture``, ``DICOM``, ``NIfTI`` or ``gzip``, from the first bytes of a file."""
    if path.is_dir():
        raise UnreadableImageError("expected an image file, got a folder; name its files one by one")
    try:
        with path.open("rb") as file:
            head = file.read(540)
    except FileNotFoundError:
        raise UnreadableImageError("no such file") from None
    except PermissionError:
        raise UnreadableImageError("no permission to read the file") from None
    if not head:
        raise UnreadableImageError("empty file (0 bytes)")
    if head[128:132] == b"DICM":  # first, since the 128 bytes before it may be anything, a TIFF header included
        return "DICOM"
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    if _is_nifti(head):
        return "NIfTI"
    # DICOM from before the preamble begins with an element of group 0002 or 0008, in either byte order
    if head[:2] in (b"\x02\0", b"\x08\0", b"\0\x02", b"\0\x08") and len(head) > 132:
        return "DICOM"
    raise UnreadableImageError(_UNKNOWN)


def _is_nifti(head: bytes) -> bool:
    return head[344:348] == b"n+1\0" or head[4:8] == b"n+2\0"


def has_known_content(path: Path) -> bool:
    """Whether the first bytes of a file are those of an image format."""
    try:
        return bool(file_kind(path))
    except UnreadableImageError:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# PNG, JPEG, TIFF, BMP


def picture_frames(path: Path | BinaryIO, only: int | None) -> list[Frame]:
    """Frames of a PNG, JPEG, TIFF or BMP, or that one alone whose number is given.

    Raises:
        UnreadableImageError: it is none, or damaged.
    """
    try:
        opened = Image.open(path, formats=_PILLOW_FORMATS)
    except Image.UnidentifiedImageError:
        raise UnreadableImageError("begins like a picture but has no readable header; truncated or damaged") from None
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(f"too many pixels: {one_line(error)}") from error
    with opened as image:
        # pages of a TIFF are pictures; further images in a JPEG are previews, in a PNG an animation
        count = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
        numbers = _chosen(count, only)
        if len(numbers) > 1:
            _check_volume(_page_values(image))
        frames = []
        for number in numbers:
            if number:
                image.seek(number)
            _check_size(image.height, image.width)
            meta = {"format": str(image.format), "photometric": image.mode}
            # Pillow inverts WhiteIsZero (film scans) at 8 bits but not at 16
            negative = image.format == "TIFF" and image.mode.startswith("I;16") and image.tag_v2.get(262) == 0
            pixels = _picture_pixels(ImageOps.exif_transpose(image))
            frames.append(_frame(1 - pixels if negative else pixels, number, count, meta=meta))
        return frames


def _page_values(image: Image.Image) -> int:
    """Number of values of all pages of a TIFF together, by their headers alone: no two need be alike."""
    total = 0
    for number in range(image.n_frames):
        image.seek(number)
        total += image.height * image.width * (1 if image.mode in ("1", "L", "I", "F") or ";" in image.mode else 3)
    image.seek(0)
    return total


def _picture_pixels(image: Image.Image) -> np.ndarray:
    """(H, W) or (H, W, 3) in [0, 1] from a Pillow image of any mode."""
    if image.mode.startswith("I;16"):
        return np.asarray(image, dtype=np.float32) / 65535
    if image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        _check_finite(values)
        top = 65535 if image.mode == "I" else 1  # Pillow opens 16-bit files of some formats in mode I
        return values / top if values.min() >= 0 and values.max() <= top else _full_range(values)
    if image.has_transparency_data:
        rgba = np.asarray(image.convert("RGBA"), dtype=np.float32) / 255
        return rgba[..., :3] * rgba[..., 3:]
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"), dtype=np.float32) / 255
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255


# ---------------------------------------------------------------------------------------------------------------------
# DICOM


def _dicom_frames(path: Path, window: tuple[float, float] | None, only: int | None) -> list[Frame]:
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        ds = pydicom.dcmread(path, force=True)  # force: without preamble; file_kind() saw the first bytes
    sop_class = pydicom.uid.UID(str(ds.get("SOPClassUID") or ds.file_meta.get("MediaStorageSOPClassUID", "")))
    if ds.preamble is None and not sop_class and "Rows" not in ds:
        raise UnreadableImageError(_UNKNOWN)
    if sop_class in _NO_PICTURE:
        raise UnreadableImageError(_NO_PICTURE[sop_class])
    if not any(keyword in ds for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        # pydicom returns what came before the end of a file that was cut off, and only warns
        cut = [str(note.message).split(" in file ")[0] for note in notes if "nd of file" in str(note.message)]
        if cut:
            raise UnreadableImageError(f"truncated DICOM file: {one_line(cut[0])}")
        if "Image Storage" in sop_class.name:
            raise UnreadableImageError("DICOM image without pixel data, truncated or stored without it")
        raise UnreadableImageError(f"DICOM object without an image ({sop_class.name or 'no SOP class'})")
    if not ds.file_meta.get("TransferSyntaxUID"):
        implicit, little = ds.original_encoding
        ds.file_meta.TransferSyntaxUID = (
            pydicom.uid.ImplicitVRLittleEndian
            if implicit
            else pydicom.uid.ExplicitVRLittleEndian
            if little
            else pydicom.uid.ExplicitVRBigEndian
        )
    _check_size(int(ds.get("Rows") or 0), int(ds.get("Columns") or 0))

    meta = {key: _text(ds.get(keyword)) for key, keyword in _META_KEYWORDS.items()}
    meta["laterality"] = str(ds.get("ImageLaterality") or ds.get("Laterality") or "")
    meta["transfer_syntax"] = str(ds.file_meta.TransferSyntaxUID)
    meta["format"] = "DICOM"
    meta = {key: value for key, value in meta.items() if value}
    count = int(ds.get("NumberOfFrames") or 1)
    numbers = _chosen(count, only)
    in_colour = ds.get("SamplesPerPixel", 1) == 3 or "RedPaletteColorLookupTableDescriptor" in ds
    _check_volume(len(numbers), int(ds.Rows), int(ds.Columns), *([3] if in_colour else []))
    frames = []
    for number in numbers:
        stored = _decoded(ds, number)
        if ds.get("SamplesPerPixel", 1) == 3:
            pixels, how = stored.astype(np.float32) / (2 ** int(ds.BitsStored) - 1), "colour"
        elif ds.PhotometricInterpretation == "PALETTE COLOR":
            colour = apply_color_lut(stored, ds)
            pixels, how = colour.astype(np.float32) / np.iinfo(colour.dtype).max, "palette"
        else:
            pixels, how = _dicom_grey(stored, ds, number, window)
        frames.append(
            _frame(
                pixels,
                number,
                count,
                modality=str(ds.get("Modality") or ""),
                patient=str(ds.get("PatientID") or "") or None,
                meta={**meta, "window": how},
            )
        )
    return frames


def _decoded(ds: pydicom.Dataset, number: int) -> np.ndarray:
    """Stored values of one frame; alone, since a long cine run need not lie in memory twice."""
    try:
        return pixel_array(ds, index=number)
    except Exception as error:
        # one line per decoder; GDCM's is an accident of its wrapper and says nothing
        lines = [line for line in str(error).splitlines() if "NoneType" not in line and "all available" not in line]
        syntax = ds.file_meta.TransferSyntaxUID.name
        detail = one_line("\n".join(lines) or "no decoder could read it")
        raise UnreadableImageError(f"truncated, damaged or unsupported pixel data ({syntax}): {detail}") from error


def _dicom_grey(
    stored: np.ndarray, ds: pydicom.Dataset, number: int, window: tuple[float, float] | None
) -> tuple[np.ndarray, str]:
    """Grey levels of one frame of stored values, (H, W), and a word on how they were found.

    The result is (H, W, 3) where the frame has a supplemental palette and says that it is meant in colour.
    """
    _check_finite(stored)
    transform = functional_group(ds, number, "PixelValueTransformationSequence")
    voi = functional_group(ds, number, "FrameVOILUTSequence")
    colour = stored >= ds.RedPaletteColorLookupTableDescriptor[1] if _has_colour_overlay(ds, number) else None
    hidden = _padding(stored, ds)
    if colour is not None:
        hidden = hidden | colour

    # pydicom.pixels has these three steps too, but scales to the range of the *stored* bits, knows no per-frame
    # values, and indexes a LUT in the LUT's own type: 12-bit values wrap around in an 8-bit table.
    if ds.get("ModalityLUTSequence"):
        item = ds.ModalityLUTSequence[0]
        values = _lookup(stored, item.LUTDescriptor, item.LUTData, item)[0]
    else:
        values = stored * _number(transform, "RescaleSlope", 1.0) + _number(transform, "RescaleIntercept", 0.0)
    centre, width = _number(voi, "WindowCenter"), _number(voi, "WindowWidth")
    function = str(voi.get("VOILUTFunction") or "LINEAR").upper()
    if window is not None:
        grey, how = _window(values, *window, "LINEAR_EXACT"), f"{window[0]:g}/{window[1]:g} LINEAR_EXACT"
    elif voi.get("VOILUTSequence"):
        item = voi.VOILUTSequence[0]
        mapped, top = _lookup(values, item.LUTDescriptor, item.LUTData, item)
        grey, how = mapped / top, "VOI LUT"
    elif centre is not None and width is not None and width >= (1 if function == "LINEAR" else 1e-6):
        grey, how = _window(values, centre, width, function), f"{centre:g}/{width:g} {function}"
    else:
        grey, how = _full_range(values, hidden), "full range"
    # PresentationLUTShape INVERSE is what newer objects say beside MONOCHROME1: one inversion, not two
    if ds.PhotometricInterpretation == "MONOCHROME1" or ds.get("PresentationLUTShape") == "INVERSE":
        grey = 1 - grey
    grey = np.where(hidden, 0, grey)
    if colour is not None:
        # pydicom's apply_color_lut() refuses a supplemental palette
        palette = []
        for name in ("Red", "Green", "Blue"):
            table = f"{name}PaletteColorLookupTable"
            mapped, top = _lookup(stored, ds[f"{table}Descriptor"].value, ds[f"{table}Data"].value, ds)
            palette.append(mapped / top)
        grey = np.where(colour[..., None], np.stack(palette, axis=-1), grey[..., None])
    return grey, how


def functional_group(ds: pydicom.Dataset, number: int, sequence: str) -> pydicom.Dataset:
    """The group of one frame, else the one that all frames share, else the data set itself."""
    per_frame = ds.get("PerFrameFunctionalGroupsSequence") or []
    shared = ds.get("SharedFunctionalGroupsSequence") or []
    for groups in [*per_frame[number : number + 1], *shared[:1]]:
        if groups.get(sequence):
            return groups[sequence].value[0]
    return ds


def _has_colour_overlay(ds: pydicom.Dataset, number: int) -> bool:
    """Whether values from the supplemental palette on are colours, such as a perfusion map upon a grey CT slice."""
    if "RedPaletteColorLookupTableDescriptor" not in ds:
        return False
    types = (functional_group(ds, number, f"{kind}ImageFrameTypeSequence") for kind in ("CT", "MR"))
    return any(frame_type.get("PixelPresentation") == "COLOR" for frame_type in types)


def _padding(stored: np.ndarray, ds: pydicom.Dataset) -> np.ndarray:
    value = ds.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, dtype=bool)
    limit = ds.get("PixelPaddingRangeLimit", value)
    return (stored >= min(value, limit)) & (stored <= max(value, limit))


def _number(ds: pydicom.Dataset, keyword: str, default: float | None = None) -> float | None:
    """The first value of an element, or the default where it is absent, empty or not finite."""
    value = ds.get(keyword)
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = value[0] if len(value) else None
    if value is None or value == "" or not math.isfinite(value):
        return default
    return float(value)


def _text(value: object) -> str:
    """An element's value as DICOM writes it: several values with a backslash between them."""
    several = isinstance(value, Sequence) and not isinstance(value, str)
    return "\\".join(map(str, value)) if several else str(value or "")


def _lookup(
    values: np.ndarray, descriptor: Sequence[int], data: bytes | Sequence[int], owner: pydicom.Dataset
) -> tuple[np.ndarray, float]:
    """Values through a LUT (PS3.3 C.11.1.1 and C.11.2.1.1), and the greatest value the LUT's bits allow."""
    entries, first, bits = (int(number) for number in descriptor)
    if isinstance(data, bytes):
        wide = bits > 8 or len(data) >= 2 * (entries or 65536)
        table = np.frombuffer(data, dtype=(">u2" if owner.original_encoding[1] is False else "<u2") if wide else "u1")
    else:
        table = np.atleast_1d(np.asarray(data))
    table = table[: entries or 65536].astype(np.float64)
    if first > 32767 and values.min() < 0:
        first -= 65536  # a negative first value written as unsigned, since the *stored* values are unsigned
    index = np.clip(np.rint(values).astype(np.int64) - first, 0, len(table) - 1)
    return table[index], float(2**bits - 1)


def _window(values: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """Grey levels in [0, 1] by PS3.3 C.11.2.1.2 and C.11.2.1.3; the output bounds of the standard are 0 and 1."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - centre) / width))
    if function == "LINEAR":
        centre, width = centre - 0.5, width - 1
    elif function != "LINEAR_EXACT":
        raise UnreadableImageError(f"VOI LUT Function must be LINEAR, LINEAR_EXACT or SIGMOID, got {function}")
    if width == 0:
        return (values > centre).astype(np.float64)
    return np.clip((values - centre) / width + 0.5, 0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# NIfTI


def _nifti_frames(path: Path, window: tuple[float, float] | None, only: int | None, zipped: bool) -> list[Frame]:
    with gzip.open(path) if zipped else path.open("rb") as stream:
        head = stream.read(540)
        if not _is_nifti(head):
            raise UnreadableImageError("a gzip archive that holds no NIfTI image")
        stream.seek(0)
        # by stream, since nibabel.load() goes by the suffix
        kind = nib.Nifti1Image if head[344:348] == b"n+1\0" else nib.Nifti2Image
        image = kind.from_stream(stream)
        volume = _canonical(image)
    _check_finite(volume)
    if window is None:
        # one slice of a CT volume need not hold the air and the bone that would fix its greys
        black, white = float(image.header["cal_min"]), float(image.header["cal_max"])
        if math.isfinite(black) and math.isfinite(white) and black < white:
            window = (black + white) / 2, white - black
    single = [axis for axis in range(3) if volume.shape[axis] == 1]
    axis = single[0] if len(single) == 1 else 2  # one sagittal or coronal slice is a picture too
    low, high = float(volume.min()), float(volume.max())
    how = "full range" if window is None else f"{window[0]:g}/{window[1]:g} LINEAR_EXACT"
    frames = []
    for number in _chosen(volume.shape[axis], only):
        plane = np.take(volume, number, axis=axis)
        plane = _scaled(plane, low, high) if window is None else _window(plane, *window, "LINEAR_EXACT")
        # canonical axes grow to the patient's right, front and head: reversed, right is left and front (head) is top
        meta = {"format": "NIfTI", "window": how}
        frames.append(_frame(plane[::-1, ::-1].T, number, volume.shape[axis], meta=meta))
    return frames


def _canonical(image: SpatialImage) -> np.ndarray:
    """The voxels, (X, Y, Z) float32, axes growing to the patient's right, anterior and superior."""
    shape = image.shape
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (2, 3):
        raise UnreadableImageError(f"expected a 2-D or 3-D NIfTI image, got {len(shape)}-D {image.shape}; split it")
    _check_volume(*shape)
    _check_size(*shape[:2])
    if image.get_data_dtype().fields or image.get_data_dtype().kind == "c":
        raise UnreadableImageError(f"expected grey NIfTI voxels, got {image.get_data_dtype()}")
    data = image.get_fdata(dtype=np.float32, caching="unchanged").reshape((*shape, 1)[:3])
    orientation = nib.io_orientation(image.affine)
    if np.isnan(orientation).any():
        raise UnreadableImageError("the NIfTI affine maps two axes onto one; mend its sform or qform")
    return nib.apply_orientation(data, orientation)


# ---------------------------------------------------------------------------------------------------------------------
# Common to all formats


def _frame(
    pixels: np.ndarray,
    index: int,
    count: int,
    modality: str = "",
    patient: str | None = None,
    meta: dict[str, str] | None = None,
) -> Frame:
    """A frame of checked, clipped, contiguous pixels; colour without colour becomes grey."""
    _check_finite(pixels)
    if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]
    pixels = np.ascontiguousarray(np.clip(pixels, 0, 1), dtype=np.float32)
    return Frame(pixels, index, modality, patient, meta or {}, count)


def _full_range(values: np.ndarray, hidden: np.ndarray | None = None) -> np.ndarray:
    """Minimum to 0 and maximum to 1, hidden values left out of account."""
    seen = values if hidden is None else values[~hidden]
    return _scaled(values, float(seen.min()), float(seen.max())) if seen.size else np.zeros(values.shape)


def _scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Low to 0 and high to 1; zeros where they are equal."""
    return (values.astype(np.float64) - low) / (high - low) if high > low else np.zeros(values.shape)


def _chosen(count: int, only: int | None) -> range:
    if only is None:
        return range(count)
    if only >= count:
        raise UnreadableImageError(f"frame {only} was asked for, the file has {count} (0 to {count - 1})")
    return range(only, only + 1)


def _check_size(height: int, width: int) -> None:
    if not height or not width:
        raise UnreadableImageError(f"the image has no pixels ({height} x {width})")
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and height * width > limit:
        raise UnreadableImageError(f"too many pixels: {height} x {width} is more than {limit}")


def _check_volume(*shape: int) -> None:
    """Refuse, before anything is decoded, what would fill the memory: the kernel ends a process without a word."""
    if math.prod(shape) > MAX_VOXELS:
        size = " x ".join(map(str, shape))
        raise UnreadableImageError(f"too many voxels in one file: {size} is more than {MAX_VOXELS}; split it")


def _check_finite(values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise UnreadableImageError("the image has values that are not finite (NaN or infinity)")


def checked_window(window: Sequence[float] | None) -> tuple[float, float] | None:
    """Centre and width as floats, or a UserError."""
    if window is None:
        return None
    numbers = tuple(window)
    if len(numbers) != 2 or not all(math.isfinite(number) for number in numbers) or numbers[1] <= 0:
        raise UserError(f"window must be centre and positive width, such as (40, 400), got {window}")
    return float(numbers[0]), float(numbers[1])


def one_line(error: object) -> str:
    """What an exception says, on one line that fits a table."""
    text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


@contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Keep what decoders say about odd but readable files off the user's terminal; exceptions pass."""
    logger = logging.getLogger("pydicom")
    logger.addFilter(_no_warning)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.removeFilter(_no_warning)


def _no_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
