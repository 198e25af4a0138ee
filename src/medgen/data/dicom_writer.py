"""Writes pictures and float maps as DICOM objects that refer to the image they were made from.

Real files lack attributes that the standard asks for, or hold values it forbids. So nothing is handed to highdicom as
it stands: it sees a stand-in of one frame with the source's geometry, checked and filled; the patient, the study and
the references to the source are written afterwards.

What is written is a function of the arguments: UIDs are digests of them, and the only date of its own, a map's
ContentDate, is the source's. A run that is repeated writes the same bytes, and an archive sees the same objects again,
not new ones.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom import Dataset, config
from pydicom.datadict import tag_for_keyword
from pydicom.sr.coding import Code
from pydicom.uid import UID, ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid
from pydicom.valuerep import PersonName

from medgen import __version__
from medgen.data.reader import UnreadableImageError, file_kind, functional_group, quiet_pydicom
from medgen.errors import UserError
from medgen.output import atomic_file

__all__ = ["pixel_affine", "read_source", "write_parametric_map", "write_secondary_capture"]

logging.getLogger("highdicom").setLevel(logging.WARNING)  # it tells seven lines an object

NO_UNITS = Code("1", "UCUM", "no units")
SOURCE_IMAGE = Code("121322", "DCM", "Source image for image processing operation")
SERIES_OF_PICTURES, SERIES_OF_MAPS = 9001, 9002  # far above a scanner's own: viewers list them last
UTF_8 = "ISO_IR 192"
NO_DATE, NO_TIME = "19700101", "000000"  # of a map whose source has none: its ContentDate must not be empty
ANY_ORIENTATION = ("L", "P")  # highdicom takes none that is empty, which the standard allows; it is replaced
SHORT, LONG, TEXT = 16, 64, 1024  # characters of the value representations SH, LO and ST

# What identifies a patient and a study in the source does so in what is made from it.
_IDENTITY = {
    "PatientID": r"[^\x00-\x1f]*",
    "PatientName": r"[^\x00-\x1f]*",
    "PatientBirthDate": r"\d{8}",
    "PatientSex": r"[MFO]",
    "AccessionNumber": r"[^\x00-\x1f]*",
    "StudyID": r"[^\x00-\x1f]*",
    "StudyDate": r"\d{8}",
    "StudyTime": r"\d{2,6}(\.\d{1,6})?",
    "ReferringPhysicianName": r"[^\x00-\x1f]*",
}
_MORE_IDENTITY = {
    "IssuerOfPatientID": r"[^\x00-\x1f]+",
    "PatientAge": r"\d{3}[DWMY]",
    "PatientIdentityRemoved": r"YES|NO",
    "StudyDescription": r"[^\x00-\x1f]+",
}
# how the identity was removed: one of them must stand beside PatientIdentityRemoved (PS3.3 C.7.1.1)
_DEIDENTIFICATION = ("DeidentificationMethod", "DeidentificationMethodCodeSequence")
# A picture of the source's pixels shows what they show; where the source does not say, nobody knows.
_SHOWN = {"BurnedInAnnotation": r"YES|NO", "RecognizableVisualFeatures": r"YES|NO"}
_SEEN_FROM = {
    "BodyPartExamined": r"[A-Z0-9_ ]{1,16}",
    "ViewPosition": r"[A-Z0-9_ ]{1,16}",
    "ImageLaterality": r"[RLUB]",
}


def read_source(path: str | os.PathLike[str]) -> Dataset | None:
    """The DICOM dataset of an image file, whatever of the standard it lacks.

    Args:
        path: the file that an image came from.

    Returns:
        The dataset with its pixel data; None for a file of another format, or none.
    """
    try:
        if file_kind(Path(path)) != "DICOM":
            return None
    except UnreadableImageError:
        return None
    with _SWITCHES, quiet_pydicom():
        return pydicom.dcmread(path, force=True)  # force: files without preamble


def pixel_affine(source: Dataset, frame: int = 0) -> np.ndarray:
    """Where the pixels of a DICOM image lie in the patient (PS3.3 C.7.6.2.1.1).

    Args:
        source: the image.
        frame: of it, from 0.

    Returns:
        (4, 4) from (column, row, 0) to mm (left, posterior, superior). What the source does not say, or gets wrong, is
        left out: without a position, or its orientation, the pixels have their spacing alone, without that 1 mm.

    Raises:
        UserError: the source has no such frame.
    """
    known = _Known.of(source, frame)
    between_rows, between_columns = known.spacing or (1.0, 1.0)
    affine = np.eye(4)
    if known.position is not None:
        along_row, along_column = np.reshape(known.orientation, (2, 3))
        affine[:3, :3] = np.stack([along_row, along_column, np.cross(along_row, along_column)], axis=1)
        affine[:3, 3] = known.position
    affine[:3, :3] *= [between_columns, between_rows, known.thickness or 1.0]
    return affine


def write_secondary_capture(
    path: str | os.PathLike[str],
    pixels: np.ndarray,
    source: Dataset | None = None,
    *,
    description: str,
    derivation: str = "",
    frame: int = 0,
    synthetic: bool = False,
    patient: str = "",
    origin: str = "",
) -> None:
    """Write a picture as a DICOM secondary capture (PS3.3 A.8.1), by highdicom.

    With a source the picture goes to a series of its own in the source's study. Where it has the source's rows and
    columns it has its pixel spacing, too, and says that it shows the same places (SpatialLocationsPreserved).

    Args:
        path: the file; its folder is made.
        pixels: (H, W) grey, 0 is black whatever the source's photometric interpretation, or (H, W, 3) RGB; uint8.
        source: the DICOM image it was made from; None begins a study of its own.
        description: of the series, at most 64 characters.
        derivation: what was done to the source, or how the picture was generated; at most 1,024 characters.
        frame: of the source, from 0.
        synthetic: whether a network generated the picture: SyntheticData (0008,001C) is YES, ConversionType SYN, and
            ImageType ends in SYNTHETIC.
        patient: PatientID where there is no source. PatientName is SYNTHETIC then for a synthetic picture; of any other
            nothing is said, since whose it is and what it shows is known to the caller alone.
        origin: what made the pictures, such as the SHA-256 of the weights; those of another origin are another series.

    Raises:
        UserError: no picture of that kind, or the source has no such frame.
        OSError: it cannot be written.
    """
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        raise UserError(f"expected a picture (H, W) or (H, W, 3) of uint8, got {pixels.dtype} of shape {pixels.shape}")
    if not pixels.size:
        raise UserError(f"expected a picture with pixels, got shape {pixels.shape}")
    from highdicom.sc import SCImage

    with _lenient():
        known = _Known.of(source, frame) if source is not None else _Known.nothing(patient, origin)
        same_grid = pixels.shape[:2] == known.shape
        series = _uid("picture", known.series, description, origin)
        image = SCImage(
            pixel_array=np.ascontiguousarray(pixels),
            photometric_interpretation="RGB" if pixels.ndim == 3 else "MONOCHROME2",
            bits_allocated=8,
            coordinate_system="PATIENT",
            patient_orientation=ANY_ORIENTATION,
            pixel_spacing=known.spacing if same_grid else None,
            study_instance_uid=known.study,
            series_instance_uid=series,
            series_number=SERIES_OF_PICTURES,
            sop_instance_uid=_uid("instance", series, known.instance, str(frame), _digest(pixels)),
            instance_number=known.number,
            manufacturer="medgen",
            manufacturer_model_name="medgen",
            software_versions=__version__,
            series_description=_cut(description, LONG),
            specific_character_set=UTF_8,
            transfer_syntax_uid=ExplicitVRLittleEndian,
        )
        image.PatientOrientation = None
        image.ImageType = ["DERIVED", "SECONDARY", "SYNTHETIC" if synthetic else "OTHER"]
        image.ConversionType = "SYN" if synthetic else "WSD"  # PS3.3 C.8.6.1: synthetic image; workstation
        image.SyntheticData = "YES" if synthetic else "NO"
        image.pop("BurnedInAnnotation", None)
        if derivation:
            image.DerivationDescription = _cut(derivation, TEXT)
        if source is None:
            image.update(_empty_identity())
            image.PatientID = _cut(patient, LONG)
            if synthetic:
                image.PatientName, image.BurnedInAnnotation = "SYNTHETIC", "NO"
                image.PatientIdentityRemoved = "YES"
                image.DeidentificationMethod = "generated by a neural network"
        else:
            image.update(_identity(source))
            image.update(_texts(source, _SEEN_FROM | _SHOWN))
            image.update(_lossy(source))
            image.SourceImageSequence = [_source_image(source, frame, same_grid)]
        if source is not None and same_grid:
            orientation = source.get("PatientOrientation")
            image.PatientOrientation = list(orientation) if orientation and len(orientation) == 2 else None
            if (detector := _spacing(source.get("ImagerPixelSpacing"))) is not None:
                image.ImagerPixelSpacing = detector
        _without_clock(image)
        _write(image, path)


def write_parametric_map(
    path: str | os.PathLike[str],
    values: np.ndarray,
    source: Dataset,
    *,
    name: str,
    explanation: str = "",
    unit: Code = NO_UNITS,
    window: tuple[float, float] | None = None,
    frame: int = 0,
    origin: str = "",
) -> None:
    """Write a float map over an image as a DICOM parametric map (PS3.3 A.75), by highdicom.

    The map has the source's pixel grid. Where the source has a position in the patient (CT, MR), so has the map, in
    the same frame of reference. A projection radiograph has none: there the reference to its SOP instance, with
    SpatialLocationsPreserved YES, is what tells a viewer to lay one over the other; the frame of reference that the
    standard wants of every map is then one of the source alone.

    Args:
        path: the file; its folder is made.
        values: (H, W) in the source's rows and columns, finite; stored as float32 without any scaling.
        source: the DICOM image that the map is of.
        name: of the map and its series, such as ``anomaly MSE``.
        explanation: what the values mean, at most 64 characters; default: the name.
        unit: of the values; default: UCUM's 1.
        window: centre and width for display; default: the range of the values.
        frame: of the source, from 0.
        origin: what made the map, such as the SHA-256 of the weights; those of another origin are another series.

    Raises:
        UserError: the map is not of the source's shape or not finite, or the source has no such frame.
        OSError: it cannot be written.
    """
    shape = (source.get("Rows"), source.get("Columns"))
    if values.shape != shape:
        raise UserError(
            f"expected a map of the source's rows and columns {shape}, got shape {values.shape}; resample it"
        )
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(values, dtype=np.float32)
    if not np.isfinite(stored).all():
        raise UserError(
            f"the map {name!r} has values that are not finite in float32; mend them before they are written"
        )
    low, high = float(stored.min()), float(stored.max())
    # a constant map has no range, and a window must have a width
    centre, width = window if window is not None else ((low + high) / 2, (high - low) or 1.0)
    if not (math.isfinite(centre) and math.isfinite(width) and width > 0):
        raise UserError(f"window must be a centre and a positive width, got {window}")

    import highdicom as hd

    with _lenient():
        known = _Known.of(source, frame)
        series = _uid("map", known.series, name, origin)
        image = hd.pm.ParametricMap(
            source_images=[known.stand_in()],
            pixel_array=stored,
            series_instance_uid=series,
            series_number=SERIES_OF_MAPS,
            sop_instance_uid=_uid("instance", series, known.instance, str(frame), _digest(stored)),
            instance_number=known.number,
            manufacturer="medgen",
            manufacturer_model_name="medgen",
            software_versions=__version__,
            device_serial_number="none",
            contains_recognizable_visual_features=source.get("RecognizableVisualFeatures") == "YES",
            real_world_value_mappings=[
                hd.pm.RealWorldValueMapping(
                    lut_label=_cut(name, SHORT),
                    lut_explanation=_cut(explanation or name, LONG),
                    unit=unit,
                    value_range=(low, high),
                )
            ],
            voi_lut_transformations=[
                hd.VOILUTTransformation(window_center=centre, window_width=width, voi_lut_function="LINEAR_EXACT")
            ],
            image_flavor="STATIC",
            content_label=_cut(re.sub(r"[^A-Z0-9_ ]", "_", name.upper()), SHORT),
            content_description=_cut(explanation or name, LONG),
            series_description=_cut(name, LONG),
            specific_character_set=UTF_8,
        )
        image.update(_identity(source))
        image.update(_lossy(source))
        shared = image.SharedFunctionalGroupsSequence[0]
        of_frame = image.PerFrameFunctionalGroupsSequence[0]
        image.SourceImageSequence = [_source_image(source, frame, same_grid=True)]
        of_frame.DerivationImageSequence[0].SourceImageSequence = [_source_image(source, frame, same_grid=True)]
        instance = _reference(source, frame)
        instance.pop("ReferencedFrameNumber", None)
        image.ReferencedSeriesSequence[0].ReferencedInstanceSequence = [instance]
        if known.position is None:
            _forget_position(image, _cut(name, LONG))
        # the sequence must be there (PS3.3 table A.75-2), what is in it need not
        if known.spacing is None:
            shared.PixelMeasuresSequence[0].pop("PixelSpacing", None)
        if known.between is None:
            shared.PixelMeasuresSequence[0].pop("SpacingBetweenSlices", None)  # highdicom makes one up for one slice
        image.PositionReferenceIndicator = None
        dimensions = _uid("dimensions", image.SOPInstanceUID)
        for item in (*image.DimensionIndexSequence, *image.DimensionOrganizationSequence):
            item.DimensionOrganizationUID = dimensions
        _without_clock(image)
        image.ContentDate, image.ContentTime = _content_time(source)
        _write(image, path)


def _forget_position(image: Dataset, label: str) -> None:
    """Take off the plane of the stand-in from a map whose source has none, and number the one frame by a label."""
    of_frame = image.PerFrameFunctionalGroupsSequence[0]
    del image.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence, of_frame.PlanePositionSequence
    of_frame.FrameContentSequence[0].FrameLabel = label
    index = image.DimensionIndexSequence[0]
    index.DimensionIndexPointer = tag_for_keyword("FrameLabel")
    index.FunctionalGroupPointer = tag_for_keyword("FrameContentSequence")
    index.DimensionDescriptionLabel = "Frame Label"


_SWITCHES = threading.Lock()  # pydicom's and Python's, which all threads share


@contextmanager
def _lenient() -> Iterator[None]:
    """What the standard forbids and a source has (UIDs with letters, long texts) is taken over without a word."""
    with _SWITCHES, warnings.catch_warnings(), config.disable_value_validation():
        warnings.simplefilter("ignore")
        yield


def _uid(*parts: str) -> UID:
    """The same UID for the same parts."""
    return generate_uid(entropy_srcs=["\0".join(parts)])


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()


def _cut(text: str, length: int) -> str:
    """A text that fits its value representation: of that length, without the sign that divides values."""
    return text.replace("\\", "/")[:length].strip()


# ---------------------------------------------------------------------------------------------------------------------
# what is known of the source


@dataclass(frozen=True)
class _Known:
    """UIDs and geometry of one frame of the source, checked; None for what it does not say.

    Attributes:
        study: UID.
        series: UID.
        instance: UID.
        number: of the instance in its series, or of the frame, from 1.
        shape: rows and columns.
        spacing: of rows and of columns, in mm.
        position: of the first pixel in the patient, in mm; only together with spacing and orientation.
        orientation: cosines of a row and of a column.
        frame_of_reference: UID.
        thickness: of the slice, in mm.
        between: spacing of the slices, in mm.
    """

    study: str
    series: str
    instance: str
    number: int = 1
    shape: tuple[int, int] | None = None
    spacing: list[float] | None = None
    position: list[float] | None = None
    orientation: list[float] | None = None
    frame_of_reference: str = ""
    thickness: float | None = None
    between: float | None = None

    @classmethod
    def of(cls, source: Dataset, frame: int) -> _Known:
        """One frame of a source."""
        frames = int(source.get("NumberOfFrames") or 1)
        if not 0 <= frame < frames:
            raise UserError(f"frame must be from 0 to {frames - 1} for this source, got {frame}")
        instance = _reference(source, frame).ReferencedSOPInstanceUID
        series = source.get("SeriesInstanceUID") or _uid("series", instance)
        number = source.get("InstanceNumber")
        measures = functional_group(source, frame, "PixelMeasuresSequence")
        # "the same values as Imager Pixel Spacing" mean: not corrected for magnification (PS3.3 10.7.1.3)
        spacing = _spacing(measures.get("PixelSpacing")) or _spacing(source.get("ImagerPixelSpacing"))
        plane = functional_group(source, frame, "PlaneOrientationSequence")
        orientation = _numbers(plane.get("ImageOrientationPatient"), 6)
        plane = functional_group(source, frame, "PlanePositionSequence")
        position = _numbers(plane.get("ImagePositionPatient"), 3)
        placed = spacing is not None and position is not None and _is_orientation(orientation)
        thickness = _numbers([measures.get("SliceThickness")], 1) or [0.0]
        between = _numbers([measures.get("SpacingBetweenSlices")], 1)
        return cls(
            study=source.get("StudyInstanceUID") or _uid("study", series),
            series=series,
            instance=instance,
            number=frame + 1 if frames > 1 else number if isinstance(number, int) and number > 0 else 1,
            shape=(int(source.get("Rows") or 0), int(source.get("Columns") or 0)),
            spacing=spacing,
            position=position if placed else None,
            orientation=orientation if placed else None,
            # Slices without one lie in a frame that nobody has named: their series'. The standard wants one of every
            # map, so a radiograph's is the radiograph's alone.
            frame_of_reference=source.get("FrameOfReferenceUID") or _uid("frame", series if placed else instance),
            thickness=thickness[0] if thickness[0] > 0 else None,
            between=between[0] if between else None,
        )

    @classmethod
    def nothing(cls, patient: str, origin: str) -> _Known:
        """A study, made from no source."""
        study = _uid("study", patient, origin)
        return cls(study=study, series=study, instance="")

    def stand_in(self) -> Dataset:
        """What highdicom reads of a source, one frame without pixels.

        It can place a map only where the source is placed: others get the first plane there is, which is taken off
        afterwards.
        """
        stand_in = _empty_identity()
        # of the classes that highdicom knows, one that asks for nothing
        stand_in.SOPClassUID = SecondaryCaptureImageStorage
        stand_in.SOPInstanceUID = self.instance
        stand_in.SeriesInstanceUID, stand_in.StudyInstanceUID = self.series, self.study
        stand_in.Rows, stand_in.Columns = self.shape
        stand_in.FrameOfReferenceUID = self.frame_of_reference
        stand_in.PixelSpacing = self.spacing or [1.0, 1.0]
        stand_in.ImagePositionPatient = self.position or [0.0, 0.0, 0.0]
        stand_in.ImageOrientationPatient = self.orientation or [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
        stand_in.SliceThickness = self.thickness
        if self.between is not None:
            stand_in.SpacingBetweenSlices = self.between
        return stand_in


def _reference(source: Dataset, frame: int) -> Dataset:
    """The image SOP instance reference (PS3.3 table 10-3), letter by letter as the source names itself."""
    meta = getattr(source, "file_meta", {})
    instance = source.get("SOPInstanceUID") or meta.get("MediaStorageSOPInstanceUID")
    reference = Dataset()
    reference.ReferencedSOPClassUID = source.get("SOPClassUID") or meta.get(
        "MediaStorageSOPClassUID", SecondaryCaptureImageStorage
    )
    reference.ReferencedSOPInstanceUID = instance or _uid(
        "source", hashlib.sha256(bytes(source.get("PixelData", b""))).hexdigest()
    )
    if int(source.get("NumberOfFrames") or 1) > 1:
        reference.ReferencedFrameNumber = frame + 1
    return reference


def _source_image(source: Dataset, frame: int, same_grid: bool) -> Dataset:
    """An item of SourceImageSequence."""
    item = _reference(source, frame)
    item.SpatialLocationsPreserved = "YES" if same_grid else "NO"
    purpose = Dataset()
    purpose.CodeValue, purpose.CodingSchemeDesignator, purpose.CodeMeaning = SOURCE_IMAGE[:3]
    item.PurposeOfReferenceCodeSequence = [purpose]
    return item


def _identity(source: Dataset) -> Dataset:
    """Elements of patient and study; empty where the standard wants one and the source has none that is valid."""
    identity = _empty_identity()
    identity.update(_texts(source, _IDENTITY | _MORE_IDENTITY))
    for keyword in _DEIDENTIFICATION:
        with suppress(Exception):  # as in _texts
            if source.get(keyword):
                identity[keyword] = deepcopy(source[keyword])
    return identity


def _empty_identity() -> Dataset:
    identity = Dataset()
    for keyword in _IDENTITY:
        setattr(identity, keyword, "")
    return identity


def _texts(source: Dataset, patterns: dict[str, str]) -> Dataset:
    """Those of the elements that hold one text of the pattern."""
    texts = Dataset()
    for keyword, pattern in patterns.items():
        try:
            value = source.get(keyword)
        except Exception:  # decoded when it is asked for, a broken value raises whatever its bytes lead to
            continue
        # not several values: an identity with a backslash in it is none
        if isinstance(value, str | PersonName) and re.fullmatch(pattern, text := str(value).strip()) and text:
            setattr(texts, keyword, text)
    return texts


def _lossy(source: Dataset) -> Dataset:
    """What the source says of lossy compression, which holds for whatever is made from it (PS3.3 C.7.6.1.1.5)."""
    lossy = Dataset()
    for keyword in ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"):
        if source.get(keyword):
            lossy[keyword] = source[keyword]
    return lossy


def _numbers(values: Any, count: int) -> list[float] | None:
    """That many finite numbers, or None."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def _spacing(values: Any) -> list[float] | None:
    """Two distances above zero, or None."""
    spacing = _numbers(values, 2)
    return spacing if spacing and min(spacing) > 0 else None


def _is_orientation(cosines: list[float] | None) -> bool:
    """Whether they are two unit vectors at a right angle."""
    if cosines is None:
        return False
    vectors = np.reshape(cosines, (2, 3))
    return bool(np.allclose(vectors @ vectors.T, np.eye(2), atol=1e-3))


def _content_time(source: Dataset) -> tuple[str, str]:
    for kind in ("Content", "Acquisition", "Series", "Study"):
        found = _texts(source, {f"{kind}Date": r"\d{8}", f"{kind}Time": r"\d{2,6}(\.\d{1,6})?"})
        if f"{kind}Date" in found:
            return str(found[f"{kind}Date"].value), str(found.get(f"{kind}Time") or NO_TIME)
    return NO_DATE, NO_TIME


# ---------------------------------------------------------------------------------------------------------------------
# writing


def _without_clock(image: Dataset) -> None:
    """Take off what highdicom read from the clock; all of it is optional but a map's ContentDate."""
    for keyword in ("InstanceCreation", "Content"):
        for part in ("Date", "Time"):
            image.pop(f"{keyword}{part}", None)
    for keyword in ("DateOfSecondaryCapture", "TimeOfSecondaryCapture"):
        image.pop(keyword, None)
    for item in image.get("ContributingEquipmentSequence") or []:
        item.pop("ContributionDateTime", None)


def _write(image: Dataset, path: str | os.PathLike[str]) -> None:
    with atomic_file(path) as file:
        buffer = io.BytesIO()
        image.save_as(buffer, enforce_file_format=True)
        file.write(buffer.getvalue())
