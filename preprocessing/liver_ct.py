"""CT volumes to windowed axial slices: ``python -m preprocessing.liver_ct --source DIR --target DIR``.

The source holds NIfTI volumes, or DICOM series in folders, or both, in any folders. With --masks, a folder of NIfTI
segmentations, only the slices that show the liver need be kept; with --anomalies, a folder of NIfTI masks of what is
anomalous, the datalist is one to test a detector with:

python -m preprocessing.liver_ct --source lits/volumes --masks lits/segmentations --target data/liver --slices mask

python -m preprocessing.liver_ct --source cohort --target data/liver --masks labels --slices first_run --size 256

Slices lie as radiologists look at them, the front on top and the patient's right on the left, whatever the order of
the axes in the file: its affine, or its DICOM orientation and positions, decide. They are counted from the feet up.

--slices takes all, those with liver (mask), or the first run of consecutive ones with liver (first_run), which is what
gan_anom_detect trained on. Values are clipped to --level ± --width / 2, by default -125 to 225 HU, and that window
becomes black to white: the same tissue is the same grey in every image. --per-slice-minmax stretches each slice to its
own darkest and brightest pixel instead, as gan_anom_detect did; the liver's grey then depends on whether bone, contrast
medium or a needle is in the slice, and what is anomalous changes pixels far from it. --format nifti writes slices in
HU, clipped, to <name>_<slice>.nii.gz, the window in cal_min and cal_max of the header, by which the bundles read the
same greys as from the PNGs.

A mask or anomaly file is called like its volume: the SeriesInstanceUID, the path of the NIfTI file or DICOM folder
below --source (case1/imaging.nii.gz), its name alone, or the PatientID, whichever is there first. A file that two
volumes would take belongs to neither, and both are rejected. Mask and volume must have the same voxels, in whatever
orientation each is stored. LiTS' pairs volume-1, segmentation-1 and suffixes _seg, _mask and _label are known. Any
value but 0 is liver; --mask-label picks some of a segmentation of many organs.

The patient is what --patient, a regular expression, finds in the path, else DICOM's PatientID, else the name of the
NIfTI file or folder; where two are called alike, the path. Items have volume, slice, mask (of the liver, or without
--masks of the body; see --mask), and with --anomalies anomaly (0 or 1) and anomaly_mask. Splits are by patient;
patients with anomalies are all in test.

A series is rejected, with the reason, when slices are missing, unequally spaced, doubled, of several sizes or
orientations, or no CT in Hounsfield units. Several series of one folder are volumes of their own. A tilted gantry is no
hindrance: slices are taken as they were acquired.

The same command again converts what is new or has changed: volumes, masks and anomaly files.

With --shard 0/8 to --shard 7/8, on any machines at once, each of eight processes converts its part of the files; the
same command without --shard then does what is missing and writes the tables, the same bytes as one process alone.

Exit codes: 0 all went well; 3 the datalist was written, but files were rejected; 1 nothing could be written; 2 wrong
usage; 75 some files could not be read, but may be the next time; 130 interrupted.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import nibabel as nib
import numpy as np
import pydicom
import typer
from PIL import Image
from scipy.ndimage import binary_opening

from medgen.data.datalist import file_stem, list_files, natural_key, split_by_patient
from medgen.data.reader import MAX_VOXELS, UnreadableImageError
from medgen.errors import UserError
from medgen.metrics.anomaly import body_region
from preprocessing import _convert as c
from preprocessing.split import assign_splits

__all__ = ["Volume", "app", "convert_liver_ct", "read_nifti"]

LEVEL, WIDTH = 50.0, 350.0  # HU; gan_anom_detect
BODY_HU = -300.0
COUCH_MM = 2.0  # what is thinner than twice this is no body: the couch's cover and its sheet may touch the back
NOT_DICOM = (".csv", ".json", ".txt", ".xml", ".md", ".html", ".pdf", ".png", ".jpg", ".jpeg", ".gif", ".zip", ".py")
NIFTI = (".nii", ".nii.gz")
# a mask's name, of a volume called {0}
MASK_NAMES = ("{0}", "{0}_seg", "{0}-seg", "{0}_mask", "{0}_label", "{0}_liver", "{0}_segmentation")
PLACE = "ImagePositionPatient"
GEOMETRY = {PLACE: 3, "ImageOrientationPatient": 6, "PixelSpacing": 2, "Rows": 1, "Columns": 1}  # numbers of each
SAME_POSITION = 0.01  # mm
SPACING_TOLERANCE = 0.1  # of the distance of slices; scanners round positions
SAME_GRID = 0.05  # mm between voxels of a volume and its mask: tools round affines
ANOMALY_SHARE = 0.25  # of a pixel of the slice written; a needle is thinner than the pixels of a small image


class Slices(StrEnum):
    """Slices to keep."""

    all = "all"
    mask = "mask"
    first_run = "first_run"


class Mask(StrEnum):
    """What the masks beside the images show."""

    liver = "liver"
    body = "body"
    none = "none"


class Format(StrEnum):
    """Files to write."""

    png = "png"
    nifti = "nifti"


@dataclass(frozen=True)
class Volume:
    """A CT volume, axes growing to the patient's right, front and head.

    Attributes:
        hu: (X, Y, Z) float32.
        affine: voxels to mm in the same directions.
        patient: PatientID; empty if the file does not say.
        series: SeriesInstanceUID; empty if the file does not say.
    """

    hu: np.ndarray
    affine: np.ndarray
    patient: str = ""
    series: str = ""


# ---------------------------------------------------------------------------------------------------------------------
# reading


def read_nifti(path: Path, *, is_mask: bool = False) -> Volume:
    """Read a NIfTI volume or segmentation in any orientation.

    Args:
        path: ``.nii`` or ``.nii.gz``.
        is_mask: whether it holds labels instead of Hounsfield units.

    Returns:
        The volume.

    Raises:
        UnreadableImageError: if it is damaged, not 3-D, too large, not finite, or shows no Hounsfield units.
    """
    try:
        image = nib.load(path)
        shape = image.shape
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        if len(shape) != 3:
            raise UnreadableImageError(f"expected a 3-D NIfTI volume, got {len(image.shape)}-D {image.shape}")
        if np.prod(shape, dtype=np.int64) > MAX_VOXELS:
            raise UnreadableImageError(f"too many voxels: {shape} is more than {MAX_VOXELS}")
        values = image.get_fdata(dtype=np.float32, caching="unchanged").reshape(shape)
    except (EOFError, zlib.error, nib.filebasedimages.ImageFileError, ValueError) as error:
        raise UnreadableImageError(f"damaged or no NIfTI file: {c.one_line(error)}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise UnreadableImageError(f"damaged NIfTI file: {c.one_line(error)}") from error
    if np.isnan(nib.io_orientation(image.affine)).any():
        raise UnreadableImageError("the NIfTI affine maps two axes onto one; mend its sform or qform")
    if not is_mask:
        _check_hounsfield(values)
    return _upright(values, image.affine)


def _header(file: Path) -> pydicom.Dataset | None:
    """A DICOM file without its pixels; None if it is none, or a DICOMDIR."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            head = pydicom.dcmread(file, stop_before_pixels=True, force=True)
            return head if head.get("SOPClassUID") and "Rows" in head else None
    except OSError as error:
        if error.errno is not None:
            raise
        return None
    except Exception:  # bytes that are no DICOM raise anything
        return None


def _numbers(head: pydicom.Dataset, keyword: str, count: int) -> np.ndarray | None:
    """Values of an element, (count,) float; None if it lacks them: headers hold empty, short and wordy ones."""
    try:
        values = np.array(head.get(keyword), float).ravel()
    except (TypeError, ValueError):
        return None
    return values if len(values) == count and np.isfinite(values).all() else None


def _assemble(slices: Sequence[tuple[Path, pydicom.Dataset]]) -> Volume:
    """The volume of one series' slices, given in any order and sorted by their positions along the slices' normal."""
    slices = _checked(slices)
    first = slices[0][1]
    row, column = _numbers(first, "ImageOrientationPatient", 6).reshape(2, 3)
    positions = np.array([_numbers(head, "ImagePositionPatient", 3) for _, head in slices])
    order = np.argsort(positions @ np.cross(row, column), kind="stable")
    slices, positions = [slices[n] for n in order], positions[order]
    _check_spacing(positions @ np.cross(row, column))

    values = np.empty((int(first.Columns), int(first.Rows), len(slices)), np.float32)
    for number, (file, _) in enumerate(slices):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ds = pydicom.dcmread(file, force=True)
                if not ds.file_meta.get("TransferSyntaxUID"):
                    ds.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
                stored = ds.pixel_array
        except OSError as error:
            if error.errno is not None:
                raise
            raise UnreadableImageError(f"{file.name} cannot be decoded: {c.one_line(error)}") from error
        except MemoryError:
            raise
        except Exception as error:  # decoders of damaged bytes raise anything
            raise UnreadableImageError(f"{file.name} cannot be decoded: {c.one_line(error)}") from error
        if stored.shape != values.shape[1::-1]:
            raise UnreadableImageError(f"{file.name} is no grey slice of {first.Columns}×{first.Rows} pixels")
        values[:, :, number] = stored.T * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
    _check_hounsfield(values)

    affine = np.eye(4)
    down, across = _numbers(first, "PixelSpacing", 2)
    affine[:3, 0], affine[:3, 1] = row * across, column * down
    if len(slices) > 1:
        # not the normal: under a tilted gantry the slices are displaced in their planes
        affine[:3, 2] = (positions[-1] - positions[0]) / (len(slices) - 1)
    else:
        thickness = _numbers(first, "SliceThickness", 1)
        affine[:3, 2] = np.cross(row, column) * (1.0 if thickness is None or thickness <= 0 else thickness)
    affine[:3, 3] = positions[0]
    lps_to_ras = np.diag([-1.0, -1.0, 1.0, 1.0])
    known = {"patient": str(first.get("PatientID") or ""), "series": str(first.get("SeriesInstanceUID") or "")}
    return replace(_upright(values, lps_to_ras @ affine), **known)


def _checked(slices: Sequence[tuple[Path, pydicom.Dataset]]) -> list[tuple[Path, pydicom.Dataset]]:
    """The slices of a series without localizers and copies, all of one kind."""
    modalities = sorted({str(head.get("Modality") or "none") for _, head in slices})
    if modalities != ["CT"]:
        raise UnreadableImageError(f"expected Modality CT, got {', '.join(modalities) or 'no image'}")
    if any((_numbers(head, "NumberOfFrames", 1) or 1) > 1 for _, head in slices):
        raise UnreadableImageError("an enhanced (multi-frame) CT object; convert it to NIfTI first")
    slices = [entry for entry in slices if "LOCALIZER" not in (entry[1].get("ImageType") or [])]
    if not slices:
        raise UnreadableImageError("a localizer (scout view), no volume")
    for keyword, count in GEOMETRY.items():
        lack = sum(_numbers(head, keyword, count) is None for _, head in slices)
        if lack:
            told = f" of {count} numbers" if count > 1 else ""
            raise UnreadableImageError(f"{lack} of {len(slices)} slices have no {keyword}{told}")
    if any(
        _numbers(head, keyword, 1) is None for _, head in slices for keyword in ("RescaleSlope", "RescaleIntercept")
    ):
        raise UnreadableImageError("slices have no RescaleSlope or RescaleIntercept: no Hounsfield units")
    kinds = Counter(
        (*(tuple(np.round(_numbers(head, keyword, GEOMETRY[keyword]), 3)) for keyword in GEOMETRY if keyword != PLACE),)
        for _, head in slices
    )
    if len(kinds) > 1:
        most = kinds.most_common(1)[0][1]
        raise UnreadableImageError(
            f"{len(slices) - most} of {len(slices)} slices differ from the others in size, orientation or pixel "
            "spacing: several acquisitions in one series"
        )
    first = slices[0][1]
    row, column = _numbers(first, "ImageOrientationPatient", 6).reshape(2, 3)
    if np.abs([row @ row - 1, column @ column - 1, row @ column]).max() > 0.01:
        raise UnreadableImageError("ImageOrientationPatient is no pair of perpendicular directions of length 1")
    if min(*_numbers(first, "PixelSpacing", 2), first.Rows, first.Columns) <= 0:
        raise UnreadableImageError("PixelSpacing, Rows and Columns must be above 0")
    copies = {str(head.get("SOPInstanceUID") or file): (file, head) for file, head in slices}
    return list(copies.values())


def _check_spacing(heights: np.ndarray) -> None:
    """Refuse gaps and doubled positions; ``heights`` is sorted, mm."""
    steps = np.diff(heights)
    if not len(steps):
        return
    doubled = int((steps < SAME_POSITION).sum())
    if doubled:
        raise UnreadableImageError(
            f"{doubled} of {len(heights)} slices lie where another does: several phases or kernels in one series"
        )
    usual = float(np.median(steps))
    odd = np.flatnonzero(np.abs(steps - usual) > SPACING_TOLERANCE * usual)
    if len(odd):
        n = odd[0]
        raise UnreadableImageError(
            f"slices are missing or unequally spaced: {steps[n]:.4g} mm instead of {usual:.4g} mm between positions "
            f"{heights[n]:.4g} and {heights[n + 1]:.4g} mm ({len(odd)} such gaps)"
        )


def _check_hounsfield(values: np.ndarray) -> None:
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise UnreadableImageError("some voxels are not finite (NaN or infinity)")
    if low >= 0:
        raise UnreadableImageError(
            f"expected Hounsfield units, in which air and fat are negative, got values from {low:g} to {high:g}"
        )


def _upright(values: np.ndarray, affine: np.ndarray) -> Volume:
    """Turn the axes, whatever their order, to the patient's right, front and head."""
    turn = nib.io_orientation(affine)
    turned = nib.apply_orientation(values, turn)
    return Volume(turned, affine @ nib.orientations.inv_ornt_aff(turn, values.shape))


def _same_grid(volume: Volume, mask: Volume) -> bool:
    """Whether the corners of two grids meet."""
    if volume.hu.shape != mask.hu.shape:
        return False
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in volume.hu.shape], [1], indexing="ij")).reshape(4, -1)
    return bool(np.abs((volume.affine - mask.affine) @ corners).max() < SAME_GRID)


# ---------------------------------------------------------------------------------------------------------------------
# one volume


@dataclass
class _Written:
    """What became of one volume; ``used`` as in an Outcome, each entry ending in the volume that read the file."""

    images: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    items: list[dict[str, Any]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    used: list[tuple[str, int | None, int | None, str]] = field(default_factory=list)

    def discard(self, target: Path) -> None:
        """Take back what was written; what was looked for stays known."""
        for image in self.images:
            (target / image).unlink(missing_ok=True)
        self.images, self.sizes, self.items = [], [], []


@dataclass(frozen=True)
class _Task:
    dataset: str
    size: int
    fit: str
    bits: int
    level: float
    width: float
    slices: str
    mask: str
    format: str
    per_slice_minmax: bool
    mask_label: tuple[int, ...]
    patient: str
    masks: str
    anomalies: str

    def convert(self, job: c.Job, target: Path) -> c.Outcome:
        """Write the slices of a NIfTI file, or of the series in a folder."""
        path = Path(job.path)
        reasons: list[str] = []
        volumes: list[tuple[str, Any]]
        if path.is_dir():
            series, strangers = _series_of(path)
            if strangers:
                reasons.append(f"{len(strangers)} files are no DICOM images: {', '.join(strangers[:3])}")
            if not series:
                raise UnreadableImageError("no DICOM images in this folder")
            several = len(series) > 1
            volumes = [
                (f"{job.stem}-{number}" if several else job.stem, entry) for number, entry in enumerate(series, 1)
            ]
        else:
            volumes = [(job.stem, None)]
        done: list[_Written] = []
        for stem, entries in volumes:
            written = _Written()
            done.append(written)
            try:
                volume = read_nifti(path) if entries is None else _assemble(entries)
                self._write(volume, job, stem, target, written)
            except UnreadableImageError as error:
                why = str(error)
            except (UserError, OSError, MemoryError):
                # no fault of this volume: the whole file is tried again, so nothing may stay that no journal line knows
                for written in done:
                    written.discard(target)
                raise
            except Exception as error:  # odd headers raise anything; the other series of the folder may be sound
                why = f"its headers or voxels make no CT volume ({type(error).__name__}: {c.one_line(error)})"
            else:
                reasons += written.reasons
                continue
            written.discard(target)
            reasons.append(f"{Path(stem).name}: {why}" if len(volumes) > 1 else why)
        return c.Outcome(
            job.file,
            tuple(image for written in done for image in written.images),
            "; ".join(reasons)[:1000],
            modality="CT",
            bytes=tuple(size for written in done for size in written.sizes),
            items=tuple(item for written in done for item in written.items),
            used=tuple(entry for written in done for entry in written.used),
        )

    def _write(self, volume: Volume, job: c.Job, stem: str, target: Path, written: _Written) -> None:
        base = stem.rpartition("/")[2]

        def mask_in(folder: str, wanted: Sequence[int]) -> np.ndarray | None:
            path, vain = _find_mask(Path(folder), _names(job, volume), Path(job.path))
            written.used += [(str(other), *(c.file_key(other) or (None, None)), "") for other in vain]
            if path is None:
                return None
            written.used.append((str(path), *(c.file_key(path) or (None, None)), stem))
            return _read_mask(path, volume, wanted)

        liver = mask_in(self.masks, self.mask_label) if self.masks else None
        if self.masks and liver is None:
            raise UnreadableImageError(f"no mask of the name {' or '.join(_names(job, volume))} in {self.masks}")
        anomaly = mask_in(self.anomalies, ()) if self.anomalies else None
        numbers = range(volume.hu.shape[2])
        if self.slices != Slices.all:
            numbers = _with_mask(liver, first_run=self.slices == Slices.first_run)
            if not len(numbers):
                raise UnreadableImageError("the mask is empty: no slice shows the liver")
        patient = self._patient(job, volume)
        spacing = np.linalg.norm(volume.affine[:3, :2], axis=0)
        scale = tuple((spacing / spacing.min()).tolist())
        left_out: dict[str, list[int]] = defaultdict(list)

        def keep(size: int, file: str) -> str:
            written.images.append(file)
            written.sizes.append(size)
            return file

        def save(plane: np.ndarray, folder: str, number: int) -> str:
            name = f"{folder}/{stem}/{base}_{number:04d}"
            if self.format == Format.nifti:
                file = f"{name}.nii.gz"
                image = nib.Nifti1Image(plane.astype(np.int16)[:, :, None], self._affine(volume, plane.shape, number))
                image.header.set_xyzt_units("mm")
                if folder == "images":
                    image.header["cal_min"], image.header["cal_max"] = self._window()
                return keep(c.write_whole(target, file, lambda part: nib.save(image, part)), file)
            file = f"{name}.png"
            return keep(c.write_png(Image.fromarray(plane), target, file), file)

        for number in numbers:
            hu = volume.hu[:, :, number]
            try:
                item: dict[str, Any] = {"image": save(self._picture(hu, scale), "images", number)}
            except c._RejectedError as error:
                left_out[str(error)].append(number)
                continue
            item |= {"patient": patient, "volume": stem, "slice": number}
            region = self._region(hu, None if liver is None else liver[:, :, number], float(spacing.min()))
            if region is not None:
                item["mask"] = save(self._marked(region, scale, 0.5), "masks", number)
            if self.anomalies:
                shown = anomaly is not None and bool(anomaly[:, :, number].any())
                item["anomaly"] = int(shown)
                if shown:
                    marked = self._marked(anomaly[:, :, number], scale, ANOMALY_SHARE)
                    item["anomaly_mask"] = save(marked, "anomalies", number)
            written.items.append(item)
        for why, lost in left_out.items():
            written.reasons.append(
                f"{base}: {len(lost)} of {len(numbers)} slices left out (numbers {c.ranges(lost)}): {why}"
            )

    def _window(self) -> tuple[float, float]:
        """Black and white in HU."""
        return self.level - self.width / 2, self.level + self.width / 2

    def _picture(self, hu: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
        """What is written of a slice (X, Y): grey levels (H, W) as displayed, or HU (X, Y)."""
        low, _ = self._window()
        grey = np.clip((hu - low) / self.width, 0, 1)
        if self.format == Format.nifti:
            if grey.min() == grey.max():
                raise c._RejectedError("all pixels have the same value")
            return np.rint(low + self.width * np.clip(c.resize(grey, self._shape(grey, scale), None), 0, 1))
        if self.per_slice_minmax and grey.max() > grey.min():
            grey = (grey - grey.min()) / (grey.max() - grey.min())
        return self._rendered(grey, scale, self.bits)

    def _rendered(self, plane: np.ndarray, scale: tuple[float, float], bits: int) -> np.ndarray:
        """A slice (X, Y) in [0, 1] as it is displayed: front on top, the patient's right on the left."""
        square = round(plane.shape[0] * scale[0]), round(plane.shape[1] * scale[1])
        shown = np.clip(c.resize(_displayed(plane), square, None), 0, 1)
        return np.asarray(c.render(shown, c.Settings(self.dataset, self.size, self.fit, bits)))

    def _marked(self, region: np.ndarray, scale: tuple[float, float], share: float) -> np.ndarray:
        """A mask in the geometry of the picture: 255 (NIfTI: 1) where ``share`` of a pixel or more is marked."""
        values = region.astype(np.float32)
        constant = values.min() == values.max()
        if constant:  # which would be refused; one voxel is taken back below
            values[0, 0] = 1 - values[0, 0]
        if self.format == Format.nifti:
            filled = np.clip(c.resize(values, self._shape(values, scale), None), 0, 1)
        else:
            filled = self._rendered(values, scale, 16) / 65535
        top = 1 if self.format == Format.nifti else 255
        if constant:
            return np.full(filled.shape, top * bool(region.all()), np.uint8)
        # what is smaller than the share of any pixel is kept, where most of it is
        return (filled >= min(share, filled.max() / 2)).astype(np.uint8) * np.uint8(top)

    def _shape(self, plane: np.ndarray, scale: tuple[float, float]) -> tuple[int, int]:
        """Y and X of a NIfTI slice, in Pillow's order for an array (X, Y)."""
        x, y = plane.shape[0] * scale[0], plane.shape[1] * scale[1]
        factor = self.size / min(x, y)
        return max(round(y * factor), 1), max(round(x * factor), 1)

    @staticmethod
    def _affine(volume: Volume, shape: tuple[int, ...], number: int) -> np.ndarray:
        """Of one slice (X, Y, 1) that was resized to ``shape``: its corners stay where they are."""
        zoom = np.array(volume.hu.shape[:2]) / shape
        inner = np.diag([*zoom, 1.0, 1.0])
        inner[:3, 3] = [*(zoom - 1) / 2, number]
        return volume.affine @ inner

    def _region(self, hu: np.ndarray, liver: np.ndarray | None, spacing: float) -> np.ndarray | None:
        if self.mask == Mask.none:
            return None
        if self.mask == Mask.liver:
            return liver
        dense = hu > BODY_HU
        reach = round(COUCH_MM / spacing)
        if reach:  # SciPy takes 0 for without end
            dense = binary_opening(dense, iterations=reach)
        return body_region(dense.astype(np.float32))

    def _patient(self, job: c.Job, volume: Volume) -> str:
        """Empty if only the name can tell: that is for who knows all names."""
        if self.patient:
            found = re.search(self.patient, job.file)
            if found is None:
                raise UnreadableImageError(f"--patient {self.patient} finds nothing in the path")
            return found[1] if found.groups() else found[0]
        return volume.patient


def _displayed(plane: np.ndarray) -> np.ndarray:
    """A slice (X, Y) as (H, W) with the front on top and the patient's right on the left."""
    return plane[::-1, ::-1].T


def _with_mask(mask: np.ndarray, first_run: bool) -> list[int]:
    """Numbers of the slices with mask, or of the first consecutive of them."""
    numbers = np.flatnonzero(mask.any(axis=(0, 1)))
    if first_run and len(numbers):
        ends = np.flatnonzero(np.diff(numbers) > 1)
        numbers = numbers[: ends[0] + 1] if len(ends) else numbers
    return numbers.tolist()


def _series_of(folder: Path) -> tuple[list[list[tuple[Path, pydicom.Dataset]]], list[str]]:
    """The series in a folder (not in those below), and the names of files that are no DICOM images."""
    groups: dict[tuple[int, str], list[tuple[Path, pydicom.Dataset]]] = defaultdict(list)
    strangers = []
    for path in sorted(folder.iterdir(), key=lambda path: natural_key(path.name)):
        if not path.is_file() or not _may_be_dicom(path.name):
            continue
        head = _header(path)
        if head is None:
            if path.name != "DICOMDIR":
                strangers.append(path.name)
            continue
        number = _numbers(head, "SeriesNumber", 1)
        series = 0 if number is None else int(number[0])
        groups[series, str(head.get("SeriesInstanceUID") or "")].append((path, head))
    return [groups[key] for key in sorted(groups)], strangers


def _may_be_dicom(name: str) -> bool:
    return not name.startswith(".") and not name.lower().endswith((*NOT_DICOM, *NIFTI))


def _called(job: c.Job) -> str:
    """Path of a NIfTI file or DICOM folder below the source, without suffix."""
    # the source itself may be the folder of a series
    path = job.file if job.file != "." else Path(job.path).resolve().name
    folder, slash, _ = path.rpartition("/")
    return folder + slash + file_stem(path)


def _names(job: c.Job, volume: Volume) -> list[str]:
    """What files that belong to a volume may be called; what is surest comes first."""
    called = _called(job)
    # a UID or PatientID is no path
    series, patient = ("" if re.search(r"[/\\]", name) else name for name in (volume.series, volume.patient))
    return [name for name in dict.fromkeys((series, called, called.rpartition("/")[2], patient)) if name]


def _find_mask(folder: Path, names: Sequence[str], own: Path) -> tuple[Path | None, list[Path]]:
    """The mask of a volume that is called any of ``names``, and where it was looked for in vain.

    ``own`` is the volume, which may lie in the same folder.
    """
    vain = []
    for name in names:
        above, slash, base = name.rpartition("/")
        if slash and not (folder / above).is_dir():
            vain.append(folder / above)
            continue
        stems = [form.format(base) for form in MASK_NAMES]
        if "volume" in base:
            stems.append(base.replace("volume", "segmentation"))
        for stem in stems:
            for suffix in NIFTI:
                path = folder / above / f"{stem}{suffix}"
                if not os.path.isfile(path):
                    vain.append(path)
                elif not path.samefile(own):
                    return path, vain
    return None, vain


def _read_mask(path: Path, volume: Volume, wanted: Sequence[int]) -> np.ndarray:
    """(X, Y, Z) bool: voxels of the values ``wanted``, or of any but 0."""
    try:
        mask = read_nifti(path, is_mask=True)
    except UnreadableImageError as error:
        raise UnreadableImageError(f"mask {path.name}: {error}") from error
    if not _same_grid(volume, mask):
        raise UnreadableImageError(
            f"mask {path.name} has other voxels than the volume: {mask.hu.shape} instead of {volume.hu.shape}, "
            "or another affine"
        )
    return np.isin(np.rint(mask.hu), wanted) if wanted else mask.hu > 0.5


def _without_shared_masks(
    outcomes: Mapping[str, c.Outcome], jobs: Sequence[c.Job], target: Path
) -> dict[str, c.Outcome]:
    """Reject volumes that took the same mask or anomaly file: of one at least it tells nothing."""
    users: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for outcome in outcomes.values():
        written = {item["volume"] for item in outcome.items}
        for path, _, _, volume in outcome.used:
            if volume in written:
                users[path].append((outcome.file, volume))
    checked = dict(outcomes)
    by_file = {job.file: job for job in jobs}
    for path, sharing in users.items():
        if len(sharing) == 1:
            continue
        told = ", ".join(volume for _, volume in sharing[:3])
        for file, volume in sharing:
            job, outcome = by_file[file], checked[file]
            for item in outcome.items:
                if item["volume"] == volume:
                    # the journal sees that they are gone, and converts the volume again
                    for kind in ("image", "mask", "anomaly_mask"):
                        if kind in item:
                            (target / item[kind]).unlink(missing_ok=True)
            name = f"{_called(job)}.nii.gz" if volume == job.stem else "after its SeriesInstanceUID"
            reason = f"{Path(path).name} is called like {len(sharing)} volumes ({told}); name the file {name}"
            checked[file] = replace(
                outcome,
                items=tuple(item for item in outcome.items if item["volume"] != volume),
                reason="; ".join(filter(None, (outcome.reason, reason))),
            )
    return checked


def _patients_by_name(jobs: Sequence[c.Job]) -> dict[str, str]:
    """Who a volume shows if nothing but its name tells: paths where names alone would make two people one."""
    called = {job.file: _called(job) for job in jobs}
    times = Counter(file_stem(name).casefold() for name in called.values())
    return {file: name if times[file_stem(name).casefold()] > 1 else file_stem(name) for file, name in called.items()}


# ---------------------------------------------------------------------------------------------------------------------
# the command


def _find_volumes(source: Path, folders: Sequence[Path]) -> list[str]:
    """NIfTI files, and folders that hold anything that may be DICOM, relative to the source; no masks."""
    found = set()
    root = source.resolve()
    inside = [folder.resolve() for folder in folders if folder.resolve() != root]
    for file in list_files(source):
        if any((root / file).is_relative_to(folder) for folder in inside):
            continue
        if file.lower().endswith(NIFTI):
            found.add(file)
        elif _may_be_dicom(file.rpartition("/")[2]):
            found.add(file.rpartition("/")[0] or ".")
    if root in [folder.resolve() for folder in folders]:  # masks lie beside their volumes
        for file in sorted(found):
            stem = file_stem(file)
            mask, _ = _find_mask(source, [file.rpartition("/")[0] + "/" + stem, stem], source / file)
            if mask is not None:
                found.discard(mask.relative_to(source).as_posix())
    return sorted(found, key=natural_key)


def convert_liver_ct(
    source: Annotated[Path, typer.Option(help="Folder of NIfTI volumes and DICOM series.", show_default=False)],
    target: c.Target,
    masks: Annotated[Path | None, typer.Option(help="Folder of NIfTI segmentations of the liver.")] = None,
    mask_label: Annotated[
        list[int] | None, typer.Option(help="Value of the liver in them; may be repeated; default: any but 0.")
    ] = None,
    anomalies: Annotated[Path | None, typer.Option(help="Folder of NIfTI masks of anomalies.")] = None,
    slices: Annotated[Slices, typer.Option(help="Slices to keep; see above.")] = Slices.all,
    level: Annotated[float, typer.Option(help="Middle of the window in HU.")] = LEVEL,
    width: Annotated[float, typer.Option(help="Width of the window in HU.")] = WIDTH,
    per_slice_minmax: Annotated[
        bool, typer.Option("--per-slice-minmax", help="Stretch each slice to black and white, as gan_anom_detect did.")
    ] = False,
    mask: Annotated[
        Mask | None, typer.Option(help="What masks to write; default: liver with --masks, else body.")
    ] = None,
    file_format: Annotated[Format, typer.Option("--format", help="PNG, or NIfTI in HU.")] = Format.png,
    size: c.Size = 512,
    fit: c.FitOption = c.Fit.shorter,
    bits: c.Bits = 8,
    patient: Annotated[
        str, typer.Option(metavar="REGEX", help="Finds the patient in the path; its first group, if any.")
    ] = "",
    split: c.SplitOption = c.DEFAULT_SPLIT,
    workers: c.Workers = c.DEFAULT_WORKERS,
    shard: c.ShardOption = None,
    seed: c.Seed = 0,
    name: Annotated[str, typer.Option(help="Dataset's name in the datalist; default: the source folder's.")] = "",
) -> int:
    """Convert volumes and write the datalist of their slices; see the head of this module.

    Returns:
        The exit code.

    Raises:
        UserError: if the source is empty, the target cannot be used, or no slice could be written.
    """
    if not width > 0:
        raise typer.BadParameter(f"--width must be above 0 HU, got {width:g}")
    if masks is None and (slices != Slices.all or mask == Mask.liver or mask_label):
        raise typer.BadParameter("--slices mask or first_run, --mask liver and --mask-label need --masks DIR")
    if file_format == Format.nifti and (per_slice_minmax or fit != c.Fit.shorter or bits != 8):
        raise typer.BadParameter("--format nifti keeps HU: leave out --per-slice-minmax, --fit and --bits")
    for option, folder in (("--masks", masks), ("--anomalies", anomalies)):
        if folder is not None and not folder.is_dir():
            raise UserError(f"{option} must be a folder of NIfTI files, got {folder}")
    if anomalies is not None and anomalies.resolve() in (source.resolve(), masks.resolve() if masks else None):
        raise typer.BadParameter("--anomalies must be another folder than --source and --masks")
    try:
        re.compile(patient)
    except re.error as error:
        raise typer.BadParameter(f"--patient must be a regular expression, got {patient} ({error})") from error
    fractions = dict(zip(("training", "validation", "test"), split, strict=True))
    split_by_patient([], fractions)
    task = _Task(
        dataset="liver_ct",
        size=size,
        fit=fit,
        bits=bits,
        level=level,
        width=width,
        slices=slices,
        mask=mask or (Mask.body if masks is None else Mask.liver),
        format=file_format,
        per_slice_minmax=per_slice_minmax,
        mask_label=tuple(mask_label or ()),
        patient=patient,
        masks=str(masks.resolve()) if masks else "",
        anomalies=str(anomalies.resolve()) if anomalies else "",
    )
    files = _find_volumes(source, [folder for folder in (masks, anomalies) if folder is not None])
    if not files:
        raise UserError(f"expected NIfTI volumes or DICOM series below --source {source}, got none")
    jobs = c.make_jobs(source, files, [source.resolve().name if file == "." else file for file in files])
    c.prepare_target(source, target, task)
    outcomes = c.convert(jobs, task, target, workers, shard)
    if shard:
        return c.finish_shard(outcomes, shard)

    outcomes = _without_shared_masks(outcomes, jobs, target)
    named = _patients_by_name(jobs)
    items = [
        {**item, "patient": item["patient"] or named[outcome.file]}
        for outcome in outcomes.values()
        for item in outcome.items
    ]
    alike = sorted({item["patient"] for item in items if "/" in item["patient"]} & set(named.values()), key=natural_key)
    if alike:
        print(
            f"note: volumes of several folders are called alike, so {len(alike)} patients are called by the path, "
            f"{alike[0]} first; if the path tells who it is, say how with --patient",
            file=sys.stderr,
        )
    rejected = {file: outcome.reason for file, outcome in outcomes.items() if outcome.reason}
    if anomalies is not None:
        used = {path for outcome in outcomes.values() for path, _, _, volume in outcome.used if volume}
        for file in list_files(anomalies):
            if file.lower().endswith(NIFTI) and str(Path(task.anomalies, file)) not in used:
                rejected[f"{anomalies.name}/{file}"] = "an anomaly of no volume that could be read"
    placed = [{**item, "anomaly": item.get("anomaly", 0)} for item in items]
    splits, _ = assign_splits(placed, fractions, seed)
    if anomalies is None:
        for item in (item for members in splits.values() for item in members):
            del item["anomaly"]
    window = {"level": level, "width": width, "unit": "HU"}
    return c.finish(target, name or source.resolve().name, "CT", splits, rejected, outcomes, window=window)


app = c.new_app(convert_liver_ct, __doc__)

if __name__ == "__main__":
    sys.exit(c.main(app))
