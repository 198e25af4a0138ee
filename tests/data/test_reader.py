"""read_frames: every format upright, in [0, 1], or refused with a reason."""

from __future__ import annotations

import contextlib
import gzip
import logging
import shutil
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    EncapsulatedPDFStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    SegmentationStorage,
    generate_uid,
)

from medgen.data import reader
from medgen.data.reader import UnreadableImageError, read_frames
from medgen.errors import UserError

REAL = Path(__file__).parents[2].parent / "shared" / "data"

# An F, 64 high and 48 wide in blocks of 8: no flip, turn or transposition maps it onto itself.
F_BLOCKS = np.array(
    [
        [0, 0, 0, 0, 0, 0],
        [0, 3, 3, 3, 3, 0],
        [0, 3, 0, 0, 0, 0],
        [0, 3, 3, 3, 0, 0],
        [0, 3, 0, 0, 0, 0],
        [0, 3, 0, 0, 0, 0],
        [0, 3, 0, 0, 0, 1],
        [0, 0, 0, 0, 0, 2],
    ]
)
F8 = np.kron(F_BLOCKS * 85, np.ones((8, 8))).astype(np.uint8)
F_PIXELS = (F8 / 255).astype(np.float32)


def write_dicom(path: Path, stored: np.ndarray, transfer_syntax: str | None = None, **elements: object) -> Path:
    """A DICOM file of (H, W), (frames, H, W) or (H, W, 3) stored values."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = elements.pop("SOPClassUID", ComputedRadiographyImageStorage)
    ds.SOPInstanceUID = generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID = "1.2.3", "1.2.3.4"
    ds.Modality, ds.PatientID = "CR", "P1"
    colour = stored.ndim == 3 and stored.shape[2] == 3
    ds.SamplesPerPixel = 3 if colour else 1
    ds.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        ds.PlanarConfiguration = 0
    elif stored.ndim == 3:
        ds.NumberOfFrames = len(stored)
    ds.Rows, ds.Columns = stored.shape[:2] if colour else stored.shape[-2:]
    ds.BitsAllocated = ds.BitsStored = stored.dtype.itemsize * 8
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(stored.dtype.kind == "i")
    if stored.dtype.kind == "f":
        del ds.PixelRepresentation, ds.HighBit, ds.BitsStored
        ds.FloatPixelData = stored.tobytes()
    else:
        ds.PixelData = stored.tobytes() + b"\0" * (stored.nbytes % 2)
        ds["PixelData"].VR = "OW"
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    if transfer_syntax:
        ds.compress(transfer_syntax)
    ds.save_as(path, enforce_file_format=True)
    return path


def lut(first: int, bits: int, data: list[int]) -> list[Dataset]:
    """The one item of a modality or VOI LUT sequence."""
    item = Dataset()
    item.LUTDescriptor = [len(data), first, bits]
    item.add_new("LUTData", "US", data)
    return [item]


def group(sequence: str, **elements: object) -> Dataset:
    """A functional group with one sequence of one item."""
    item, inner = Dataset(), Dataset()
    for keyword, value in elements.items():
        setattr(inner, keyword, value)
    setattr(item, sequence, [inner])
    return item


# --------------------------------------------------------------------------------------------------- orientation


def write_png(path: Path) -> None:
    Image.fromarray(F8).save(path, format="PNG")


def write_png_16_bit(path: Path) -> None:
    Image.fromarray(F8.astype(np.uint16) * 257).save(path, format="PNG")


def write_rotated_jpeg(path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6  # the viewer must turn it clockwise
    Image.fromarray(np.rot90(F8)).save(path, format="JPEG", quality=95, exif=exif)


def write_nifti(path: Path) -> None:
    """One axial slice as a scanner's converter stores it: x to the left, y to the back, so columns and rows."""
    nib.Nifti1Image(F8.T[..., None], np.diag([-1.0, -1.0, 1.0, 1.0])).to_filename(path)


WRITERS = {
    "x.png": write_png,
    "x16.png": write_png_16_bit,
    "x.jpg": lambda path: Image.fromarray(F8).save(path, quality=95),
    "rotated.jpg": write_rotated_jpeg,
    "x.tif": lambda path: Image.fromarray(F8).save(path),
    "x.bmp": lambda path: Image.fromarray(F8).save(path),
    "x.dcm": lambda path: write_dicom(path, F8),
    "inverted.dcm": lambda path: write_dicom(path, 255 - F8, PhotometricInterpretation="MONOCHROME1"),
    "rle.dcm": lambda path: write_dicom(path, F8, RLELossless),
    "inverted_rle.dcm": lambda path: write_dicom(path, 255 - F8, RLELossless, PhotometricInterpretation="MONOCHROME1"),
    "jpeg_ls.dcm": lambda path: write_dicom(path, F8, JPEGLSLossless),
    "jpeg_2000.dcm": lambda path: write_dicom(path, F8, JPEG2000Lossless),
    "x.nii": write_nifti,
    "x.nii.gz": write_nifti,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_upright_picture(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path)

    (frame,) = read_frames(path)

    assert frame.pixels.dtype == np.float32
    assert frame.pixels.flags.c_contiguous
    tolerance = 0.06 if name.endswith(".jpg") else 1e-6
    np.testing.assert_allclose(frame.pixels, F_PIXELS, atol=tolerance)


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.dcm", "x.nii", "x.nii.gz"])
def test_format_is_recognised_by_content_not_by_suffix(tmp_path, name):
    WRITERS[name](tmp_path / name)
    disguised = (tmp_path / name).rename(tmp_path / "scan.txt")

    (frame,) = read_frames(disguised)

    np.testing.assert_allclose(frame.pixels, F_PIXELS, atol=0.06)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_undone(tmp_path, orientation):
    undo = {  # how a stored picture of that orientation is displayed, EXIF 2.32, table 6
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: np.transpose,
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).T,
        8: np.rot90,
    }[orientation]
    redo = {6: np.rot90, 8: lambda a: np.rot90(a, -1)}.get(orientation, undo)
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(np.ascontiguousarray(redo(F8)).astype(np.uint16) * 257).save(tmp_path / "x.png", exif=exif)

    (frame,) = read_frames(tmp_path / "x.png")

    np.testing.assert_allclose(frame.pixels, F_PIXELS, atol=1e-6)


# ---------------------------------------------------------------------------------------- modes of ordinary pictures


def test_eight_and_sixteen_bits_are_divided_by_their_full_scale(tmp_path):
    Image.fromarray(np.array([[0, 51, 255]], np.uint8)).save(tmp_path / "8.png")
    Image.fromarray(np.array([[0, 13107, 65535]], np.uint16)).save(tmp_path / "16.png")

    np.testing.assert_allclose(read_frames(tmp_path / "8.png")[0].pixels, [[0, 0.2, 1]], rtol=1e-6)
    np.testing.assert_allclose(read_frames(tmp_path / "16.png")[0].pixels, [[0, 0.2, 1]], rtol=1e-6)


def test_colour_stays_colour_and_equal_channels_become_grey(tmp_path):
    colour = np.array([[[255, 0, 51], [10, 20, 30]]], np.uint8)
    Image.fromarray(colour).save(tmp_path / "colour.png")
    Image.fromarray(np.repeat(F8[..., None], 3, axis=2)).save(tmp_path / "grey.png")

    np.testing.assert_allclose(read_frames(tmp_path / "colour.png")[0].pixels, colour / 255, rtol=1e-6)
    np.testing.assert_allclose(read_frames(tmp_path / "grey.png")[0].pixels, F_PIXELS, atol=1e-6)


def test_transparent_pixels_are_laid_on_black(tmp_path):
    rgba = np.array([[[200, 100, 50, 255], [200, 100, 50, 0], [255, 255, 255, 51]]], np.uint8)
    la = np.array([[[255, 255], [255, 0], [255, 51]]], np.uint8)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    Image.fromarray(la).save(tmp_path / "la.png")

    pixels = read_frames(tmp_path / "rgba.png")[0].pixels

    np.testing.assert_allclose(pixels[0, 0], np.array([200, 100, 50]) / 255, rtol=1e-6)
    assert (pixels[0, 1] == 0).all()
    np.testing.assert_allclose(pixels[0, 2], 0.2, rtol=1e-6)
    np.testing.assert_allclose(read_frames(tmp_path / "la.png")[0].pixels, [[1, 0, 0.2]], rtol=1e-6)


def test_palette_bilevel_and_float_pictures(tmp_path):
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), mode="P")
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.save(tmp_path / "p.png")
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "1.png")
    Image.fromarray(np.array([[0.0, 0.25, 1.0]], np.float32)).save(tmp_path / "unit.tif")
    Image.fromarray(np.array([[-1000.0, 0.0, 3000.0]], np.float32)).save(tmp_path / "hu.tif")

    np.testing.assert_array_equal(read_frames(tmp_path / "p.png")[0].pixels, [[[1, 0, 0], [0, 0, 1]]])
    np.testing.assert_array_equal(read_frames(tmp_path / "1.png")[0].pixels, [[1, 0]])
    np.testing.assert_array_equal(read_frames(tmp_path / "unit.tif")[0].pixels, [[0, 0.25, 1]])
    np.testing.assert_array_equal(read_frames(tmp_path / "hu.tif")[0].pixels, [[0, 0.25, 1]])


def test_sixteen_bit_film_scan_that_stores_white_as_zero_is_no_negative(tmp_path):
    Image.fromarray((255 - F8).astype(np.uint16) * 257).save(tmp_path / "film.tif", tiffinfo={262: 0})

    np.testing.assert_allclose(read_frames(tmp_path / "film.tif")[0].pixels, F_PIXELS, atol=1e-6)


def test_each_page_of_a_tiff_is_a_frame(tmp_path):
    pages = [Image.fromarray(np.full((4, 5), level, np.uint8)) for level in (0, 51, 255)]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])

    frames = read_frames(tmp_path / "x.tif")

    assert [frame.index for frame in frames] == [0, 1, 2]
    np.testing.assert_allclose([frame.pixels.mean() for frame in frames], [0, 0.2, 1], rtol=1e-6)


def test_each_frame_knows_how_many_its_file_has(tmp_path):
    pages = [Image.fromarray(np.full((4, 5), level, np.uint8)) for level in (0, 51, 255)]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    write_dicom(tmp_path / "x.dcm", np.stack([F8] * 4))
    nib.Nifti1Image(np.zeros((6, 7, 5), np.float32), np.eye(4)).to_filename(tmp_path / "x.nii")
    write_png(tmp_path / "x.png")

    for name, count in (("x.tif", 3), ("x.dcm", 4), ("x.nii", 5), ("x.png", 1)):
        assert [frame.count for frame in read_frames(tmp_path / name)] == [count] * count
        assert [frame.count for frame in reader.read_some(tmp_path / name, None, 0)] == [count]


def test_only_the_first_picture_of_an_animated_png_is_read(tmp_path):
    pages = [Image.fromarray(np.full((4, 5), level, np.uint8)) for level in (51, 255)]
    pages[0].save(tmp_path / "x.png", save_all=True, append_images=pages[1:])

    assert [frame.pixels.mean() for frame in read_frames(tmp_path / "x.png")] == [pytest.approx(0.2)]


# ------------------------------------------------------------------------------------------------- DICOM grey levels


@pytest.mark.parametrize(
    ("function", "centre", "width", "expected"),
    [
        # PS3.3 C.11.2.1.2.1: below centre - 0.5 - (width - 1) / 2 black, above centre - 0.5 + (width - 1) / 2 white
        ("LINEAR", 50, 101, [0, 0.005, 0.095, 0.495, 0.995, 1]),
        (None, 50, 101, [0, 0.005, 0.095, 0.495, 0.995, 1]),
        ("LINEAR_EXACT", 50, 100, [0, 0, 0.09, 0.49, 0.99, 1]),
        ("SIGMOID", 49, 4, 1 / (1 + np.exp([50, 49, 40, 0, -50, -51]))),
        # C.11.2.1.2.1, note: a width of 1 is a threshold at centre - 0.5
        ("LINEAR", 50, 1, [0, 0, 0, 0, 1, 1]),
    ],
)
def test_window_of_the_file_by_the_formulas_of_the_standard(tmp_path, function, centre, width, expected):
    stored = np.array([[-1, 0, 9, 49, 99, 100]], np.int16)
    elements = {"VOILUTFunction": function} if function else {}
    path = write_dicom(tmp_path / "x.dcm", stored, WindowCenter=centre, WindowWidth=width, **elements)

    np.testing.assert_allclose(read_frames(path)[0].pixels, [expected], atol=1e-6)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_rescale_and_window_agree_with_pydicom(tmp_path, function):
    stored = np.random.default_rng(0).integers(-2048, 2048, (20, 30)).astype(np.int16)
    elements = {"RescaleSlope": 1.5, "RescaleIntercept": -200, "WindowCenter": [40, 900], "WindowWidth": [400, 10]}
    path = write_dicom(tmp_path / "x.dcm", stored, VOILUTFunction=function, BitsStored=12, HighBit=11, **elements)
    ds = pydicom.dcmread(path)

    oracle = apply_voi_lut(apply_modality_lut(ds.pixel_array, ds), ds)
    low, high = -2048 * 1.5 - 200, 2047 * 1.5 - 200

    np.testing.assert_allclose(read_frames(path)[0].pixels, (oracle - low) / (high - low), atol=1e-6)


def test_first_of_several_windows_is_taken_and_a_given_window_overrides_it(tmp_path):
    stored = np.array([[0, 1024, 1064, 1074, 1099, 1224, 4095]], np.uint16)
    elements = {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": [50, 1], "WindowWidth": [101, 2]}
    path = write_dicom(tmp_path / "x.dcm", stored, **elements)

    (by_file,) = read_frames(path)
    (by_argument,) = read_frames(path, window=(50, 350))

    np.testing.assert_allclose(by_file.pixels, [[0, 0.005, 0.405, 0.505, 0.755, 1, 1]], atol=1e-6)
    # -125 .. 225 HU
    np.testing.assert_allclose(by_argument.pixels, [[0, 125 / 350, 165 / 350, 0.5, 200 / 350, 325 / 350, 1]], atol=1e-6)
    assert by_file.meta["window"] == "50/101 LINEAR"
    assert by_argument.meta["window"] == "50/350 LINEAR_EXACT"


@pytest.mark.parametrize("elements", [{}, {"WindowCenter": 5, "WindowWidth": 0}, {"WindowCenter": 5}])
def test_without_a_usable_window_minimum_to_maximum(tmp_path, elements):
    path = write_dicom(tmp_path / "x.dcm", np.array([[100, 200, 500]], np.uint16), **elements)

    (frame,) = read_frames(path)

    np.testing.assert_allclose(frame.pixels, [[0, 0.25, 1]], rtol=1e-6)
    assert frame.meta["window"] == "full range"


def test_monochrome1_is_inverted_after_windowing(tmp_path):
    stored = np.array([[0, 10, 50, 100, 255]], np.uint8)
    window = {"WindowCenter": 50, "WindowWidth": 80, "VOILUTFunction": "LINEAR_EXACT"}
    path = write_dicom(tmp_path / "x.dcm", stored, PhotometricInterpretation="MONOCHROME1", **window)

    np.testing.assert_allclose(read_frames(path)[0].pixels, [[1, 1, 0.5, 0, 0]], atol=1e-6)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_inverse_presentation_lut_inverts_once(tmp_path, photometric):
    elements = {"PhotometricInterpretation": photometric, "PresentationLUTShape": "INVERSE"}
    path = write_dicom(tmp_path / "x.dcm", 255 - F8, **elements)

    np.testing.assert_allclose(read_frames(path)[0].pixels, F_PIXELS, atol=1e-6)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_takes_no_part_in_the_range_and_is_black(tmp_path, photometric):
    stored = np.array([[-2000, 100, 200, 500]], np.int16)
    elements = {"PixelPaddingValue": -2000, "PhotometricInterpretation": photometric}
    path = write_dicom(tmp_path / "x.dcm", stored, **elements)

    expected = [[0, 1, 0.75, 0]] if photometric == "MONOCHROME1" else [[0, 0, 0.25, 1]]
    np.testing.assert_allclose(read_frames(path)[0].pixels, expected, rtol=1e-6)


def test_padding_range(tmp_path):
    stored = np.array([[0, 7, 10, 100, 300]], np.uint16)
    path = write_dicom(tmp_path / "x.dcm", stored, PixelPaddingValue=0, PixelPaddingRangeLimit=10)

    np.testing.assert_allclose(read_frames(path)[0].pixels, [[0, 0, 0, 0, 1]], rtol=1e-6)


def test_modality_lut_then_window(tmp_path):
    stored = np.array([[-5, -2, -1, 0, 1, 9]], np.int16)
    path = write_dicom(
        tmp_path / "x.dcm",
        stored,
        ModalityLUTSequence=lut(-2, 16, [0, 100, 400, 1000]),
        WindowCenter=500,
        WindowWidth=1000,
        VOILUTFunction="LINEAR_EXACT",
    )

    np.testing.assert_allclose(read_frames(path)[0].pixels, [[0, 0, 0.1, 0.4, 1, 1]], rtol=1e-6)


def test_voi_lut_is_preferred_to_a_window_and_scaled_by_its_bits(tmp_path):
    stored = np.array([[0, 10, 11, 12, 13, 99]], np.uint16)
    path = write_dicom(
        tmp_path / "x.dcm", stored, VOILUTSequence=lut(10, 10, [0, 1023, 341, 682]), WindowCenter=1, WindowWidth=2
    )

    (frame,) = read_frames(path)

    np.testing.assert_allclose(frame.pixels, [[0, 0, 1, 1 / 3, 2 / 3, 2 / 3]], rtol=1e-6)
    assert frame.meta["window"] == "VOI LUT"


def test_eight_bit_voi_lut_of_twelve_bit_values_does_not_wrap(tmp_path):
    stored = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    table = [value // 16 for value in range(4096)]
    path = write_dicom(tmp_path / "x.dcm", stored, BitsStored=12, HighBit=11, VOILUTSequence=lut(0, 8, table))

    np.testing.assert_allclose(read_frames(path)[0].pixels, (stored // 16) / 255, atol=1e-6)


def test_voi_lut_whose_negative_start_is_written_as_unsigned(tmp_path):
    stored = np.array([[0, 1, 2, 3]], np.uint16)
    elements = {"RescaleSlope": 1, "RescaleIntercept": -2, "VOILUTSequence": lut(65534, 16, [0, 65535, 13107, 26214])}
    path = write_dicom(tmp_path / "x.dcm", stored, **elements)

    np.testing.assert_allclose(read_frames(path)[0].pixels, [[0, 1, 0.2, 0.4]], rtol=1e-6)


def test_per_frame_values_take_precedence_over_shared_ones(tmp_path):
    stored = np.array([[[0, 50, 100, 100]]] * 3, np.uint16)
    exact = {"VOILUTFunction": "LINEAR_EXACT"}
    shared = group("FrameVOILUTSequence", WindowCenter=50, WindowWidth=100, **exact)
    shared.PixelValueTransformationSequence = group(
        "PixelValueTransformationSequence", RescaleIntercept=0, RescaleSlope=1
    ).PixelValueTransformationSequence
    path = write_dicom(
        tmp_path / "x.dcm",
        stored,
        SOPClassUID=EnhancedCTImageStorage,
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=[
            Dataset(),
            group("FrameVOILUTSequence", WindowCenter=50, WindowWidth=200, **exact),
            group("PixelValueTransformationSequence", RescaleIntercept=25, RescaleSlope=0.5),
        ],
    )

    frames = read_frames(path)

    assert [frame.index for frame in frames] == [0, 1, 2]
    np.testing.assert_allclose(
        [frame.pixels[0] for frame in frames],
        [[0, 0.5, 1, 1], [0.25, 0.5, 0.75, 0.75], [0.25, 0.5, 0.75, 0.75]],
        rtol=1e-6,
    )


def test_unused_bits_that_hold_an_overlay_are_ignored(tmp_path):
    stored = np.array([[0, 1000, 4095]], np.uint16)
    path = write_dicom(tmp_path / "x.dcm", stored | 0x8000, BitsStored=12, HighBit=11)

    np.testing.assert_allclose(read_frames(path)[0].pixels, [[0, 1000 / 4095, 1]], rtol=1e-6)


def test_constant_image_is_accepted(tmp_path):
    path = write_dicom(tmp_path / "x.dcm", np.full((4, 5), 7, np.uint16))

    np.testing.assert_array_equal(read_frames(path)[0].pixels, np.zeros((4, 5)))


def test_what_the_file_says_of_itself(tmp_path):
    path = write_dicom(tmp_path / "x.dcm", F8, ViewPosition="PA", ImageLaterality="U", PatientOrientation=["L", "F"])

    (frame,) = read_frames(path)

    assert (frame.index, frame.modality, frame.patient) == (0, "CR", "P1")
    expected = {
        "format": "DICOM",
        "view_position": "PA",
        "laterality": "U",
        "patient_orientation": "L\\F",
        "photometric": "MONOCHROME2",
        "study": "1.2.3",
        "series": "1.2.3.4",
        "sop_class": ComputedRadiographyImageStorage,
        "transfer_syntax": ExplicitVRLittleEndian,
    }
    assert expected.items() <= frame.meta.items()


def test_empty_patient_id_is_none(tmp_path):
    assert read_frames(write_dicom(tmp_path / "x.dcm", F8, PatientID=""))[0].patient is None


def test_dicom_without_preamble(tmp_path):
    whole = write_dicom(tmp_path / "x.dcm", F8).read_bytes()
    (tmp_path / "bare.dcm").write_bytes(whole[whole.index(b"\x08\0\x16\0UI") :])

    np.testing.assert_allclose(read_frames(tmp_path / "bare.dcm")[0].pixels, F_PIXELS, atol=1e-6)


# Files that pydicom installs with itself: the same picture in many encodings.


@pytest.mark.parametrize("name", ["RLE", "bigendian", "expb", "implicit", "jp2klossless", "jpeg_ls_lossless"])
def test_encodings_of_one_mr_slice_are_equal(name):
    reference = read_frames(get_testdata_file("MR_small.dcm", download=False))[0].pixels

    pixels = read_frames(get_testdata_file(f"MR_small_{name}.dcm", download=False))[0].pixels

    np.testing.assert_array_equal(pixels, reference)


@pytest.mark.parametrize(
    "name",
    [
        "SC_rgb_rle.dcm",
        "SC_rgb_rle_16bit.dcm",
        "SC_rgb_dcmtk_+eb+cr.dcm",
        "SC_rgb_dcmtk_+eb+cy+n1.dcm",
        "SC_rgb_dcmtk_+eb+cy+s2.dcm",
        "SC_rgb_jpeg_dcmtk.dcm",
        "SC_rgb_jpeg_gdcm.dcm",
        "SC_rgb_gdcm_KY.dcm",
        "SC_ybr_full_422_uncompressed.dcm",
    ],
)
def test_encodings_of_one_colour_picture_are_rgb(name):
    pixels = read_frames(get_testdata_file(name, download=False))[0].pixels

    bars = [[1, 0, 0], [1, 0.5, 0.5], [0, 1, 0], [0.5, 1, 0.5], [0, 0, 1], [0.5, 0.5, 1], [0] * 3, [0.25] * 3]
    np.testing.assert_allclose(pixels[5:85:10, 50], bars, atol=0.02)


def test_palette_colour_becomes_rgb():
    path = get_testdata_file("examples_palette.dcm", download=False)

    (frame,) = read_frames(path)

    ds = pydicom.dcmread(path)
    table = np.frombuffer(ds.BluePaletteColorLookupTableData, "<u2") / 65535
    np.testing.assert_allclose(frame.pixels[..., 2], table[ds.pixel_array], atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- NIfTI


def volume_with_marks() -> np.ndarray:
    """(X, Y, Z) whose axes grow to the patient's right, front and head, with one mark on each side."""
    volume = np.zeros((6, 8, 3), np.int16)
    volume[5, 4, :] = 100  # the patient's right
    volume[3, 7, :] = 200  # the front
    volume[:, :, 2] += 50  # the head
    return volume


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAS", "PIR", "SAL"])
def test_axial_slices_are_shown_as_a_radiologist_sees_them(tmp_path, axes):
    ras = nib.Nifti1Image(volume_with_marks(), np.eye(4))
    change = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes))
    ras.as_reoriented(change).to_filename(tmp_path / "x.nii.gz")

    frames = read_frames(tmp_path / "x.nii.gz")

    assert [frame.index for frame in frames] == [0, 1, 2]
    assert {frame.pixels.shape for frame in frames} == {(8, 6)}
    pixels = frames[0].pixels * 250
    assert pixels[3, 0] == pytest.approx(100)  # right of the patient: left of the image
    assert pixels[0, 2] == pytest.approx(200)  # front: top
    assert frames[1].pixels[7, 5] == 0
    assert frames[2].pixels[7, 5] == pytest.approx(0.2)


def test_nifti_window_in_hu_uses_the_scaling_of_the_header(tmp_path):
    image = nib.Nifti1Image(np.array([[[0], [450], [512], [975]]], np.int16), np.eye(4))
    image.header.set_slope_inter(2, -1000)  # HU: -1000, -100, 24, 950
    image.to_filename(tmp_path / "x.nii")

    (frame,) = read_frames(tmp_path / "x.nii", window=(50, 350))

    np.testing.assert_allclose(frame.pixels[::-1, 0], [0, 25 / 350, 149 / 350, 1], atol=1e-6)


def test_without_window_the_range_is_that_of_the_whole_volume(tmp_path):
    volume = np.zeros((2, 2, 2), np.float32)
    volume[..., 0], volume[..., 1] = [[0, 1], [2, 3]], [[4, 5], [6, 10]]
    nib.Nifti1Image(volume, np.eye(4)).to_filename(tmp_path / "x.nii")

    assert [frame.pixels.max() for frame in read_frames(tmp_path / "x.nii")] == [pytest.approx(0.3), pytest.approx(1)]


@pytest.mark.parametrize("shape", [(48, 64), (48, 64, 1), (48, 64, 1, 1)])
def test_two_dimensional_nifti_is_one_frame(tmp_path, shape):
    nib.Nifti2Image(F8.T.reshape(shape), np.diag([-1.0, -1.0, 1.0, 1.0])).to_filename(tmp_path / "x.nii")

    (frame,) = read_frames(tmp_path / "x.nii")

    np.testing.assert_allclose(frame.pixels, F_PIXELS, atol=1e-6)


def test_single_coronal_slice_is_shown_head_up(tmp_path):
    coronal = np.zeros((48, 1, 64), np.uint8)
    coronal[:, 0, :] = F8[::-1, ::-1].T  # x grows to the right of the patient, z to the head
    nib.Nifti1Image(coronal, np.eye(4)).to_filename(tmp_path / "x.nii")

    (frame,) = read_frames(tmp_path / "x.nii")

    np.testing.assert_allclose(frame.pixels, F_PIXELS, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- refusals


def refusal(path: Path) -> str:
    with pytest.raises(UnreadableImageError) as caught:
        read_frames(path)
    reason = str(caught.value)
    assert "\n" not in reason
    assert str(path) not in reason
    return reason


def test_missing_empty_unknown_file_and_folder_are_refused(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.dcm").write_text("Not an image. " * 50)
    (tmp_path / "zeros.dcm").write_bytes(bytes(1000))
    (tmp_path / "archive.nii.gz").write_bytes(gzip.compress(b"no image" * 100))

    assert refusal(tmp_path / "none.png") == "no such file"
    assert refusal(tmp_path / "empty.png") == "empty file (0 bytes)"
    assert "not a PNG" in refusal(tmp_path / "text.dcm")
    assert "not a PNG" in refusal(tmp_path / "zeros.dcm")
    assert "no NIfTI" in refusal(tmp_path / "archive.nii.gz")
    assert "folder" in refusal(tmp_path)


@pytest.mark.parametrize("name", WRITERS)
def test_truncated_file_is_refused(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 3 // 4])

    reason = refusal(path)

    assert "truncated" in reason or "damaged" in reason


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_compressed_frame_cut_short_inside_an_intact_file_is_refused(tmp_path, syntax):
    ds = pydicom.dcmread(write_dicom(tmp_path / "x.dcm", F8, syntax))
    frame = next(pydicom.encaps.generate_frames(ds.PixelData, number_of_frames=1))
    ds.PixelData = pydicom.encaps.encapsulate([frame[: len(frame) // 2]])
    ds.save_as(tmp_path / "x.dcm")

    assert "truncated, damaged or unsupported pixel data" in refusal(tmp_path / "x.dcm")


def test_files_cut_at_any_place_give_a_picture_or_a_reason(tmp_path):
    for name, write in WRITERS.items():
        path = tmp_path / name
        write(path)
        whole = path.read_bytes()
        for length in np.linspace(1, len(whole) - 1, 12).astype(int):
            path.write_bytes(whole[:length])
            with contextlib.suppress(UnreadableImageError):  # any other exception would stop a preprocessing run
                read_frames(path)


def test_objects_that_are_no_images_are_refused(tmp_path):
    segmentation = write_dicom(tmp_path / "seg.dcm", F8, SOPClassUID=SegmentationStorage)
    document = write_dicom(tmp_path / "pdf.dcm", F8, SOPClassUID=EncapsulatedPDFStorage)
    for path in (document, shutil.copy(write_dicom(tmp_path / "cr.dcm", F8), tmp_path / "no_pixels.dcm")):
        ds = pydicom.dcmread(path)
        del ds.PixelData
        ds.save_as(path)

    assert "segmentation" in refusal(segmentation)
    assert refusal(document) == "DICOM object without an image (Encapsulated PDF Storage)"
    assert refusal(tmp_path / "no_pixels.dcm") == "DICOM image without pixel data, truncated or stored without it"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("test-SR.dcm", "DICOM object without an image (Comprehensive SR Storage)"),
        ("waveform_ecg.dcm", "DICOM object without an image (12-lead ECG Waveform Storage)"),
        ("rtstruct.dcm", "DICOM object without an image (RT Structure Set Storage)"),
        ("rtdose.dcm", "a radiotherapy dose object holds a dose grid, no image"),
        ("MR_truncated.dcm", "(Explicit VR Little Endian): The number of bytes of pixel data is less than expected"),
        ("JPEG-lossy.dcm", "(JPEG Extended (Process 2 and 4))"),
    ],
)
def test_files_that_pydicom_installs_are_refused_with_their_reason(name, reason):
    assert reason in refusal(Path(get_testdata_file(name, download=False)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path, value):
    values = np.array([[0.5, value]], np.float32)
    Image.fromarray(values).save(tmp_path / "x.tif")
    nib.Nifti1Image(values[..., None], np.eye(4)).to_filename(tmp_path / "x.nii")
    write_dicom(tmp_path / "x.dcm", values)

    for name in ("x.tif", "x.nii", "x.dcm"):
        assert "not finite" in refusal(tmp_path / name)


def test_image_without_rows_is_refused(tmp_path):
    assert "no pixels (0 x 48)" in refusal(write_dicom(tmp_path / "x.dcm", F8, Rows=0))


@pytest.mark.parametrize(("shape", "reason"), [((4, 4, 4, 2), "got 4-D (4, 4, 4, 2)"), ((4,), "got 1-D")])
def test_nifti_of_other_dimensions_is_refused(tmp_path, shape, reason):
    nib.Nifti1Image(np.zeros(shape, np.float32), np.eye(4)).to_filename(tmp_path / "x.nii")

    assert reason in refusal(tmp_path / "x.nii")


def test_colour_nifti_is_refused(tmp_path):
    voxels = np.zeros((4, 4, 1), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.Nifti1Image(voxels, np.eye(4)).to_filename(tmp_path / "x.nii")

    assert "expected grey NIfTI voxels" in refusal(tmp_path / "x.nii")


@pytest.mark.parametrize("limit", [40 * 50 - 1, 900])  # Pillow warns beyond the limit, and raises beyond twice as many
def test_decompression_bombs_are_refused_before_they_are_decoded(tmp_path, monkeypatch, limit):
    picture = np.zeros((40, 50), np.uint8)
    Image.fromarray(picture).save(tmp_path / "x.png")
    write_dicom(tmp_path / "x.dcm", picture, RLELossless)
    nib.Nifti1Image(picture[..., None], np.eye(4)).to_filename(tmp_path / "x.nii.gz")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)

    for name in ("x.png", "x.dcm", "x.nii.gz"):
        assert "too many pixels" in refusal(tmp_path / name)


@pytest.mark.parametrize(
    ("frames", "colour", "size"), [(4000, False, "4000 x 1024 x 1024"), (400, True, "400 x 1024 x 1024 x 3")]
)
def test_run_of_frames_that_would_fill_the_memory_is_refused_before_any_is_decoded(tmp_path, frames, colour, size):
    # the pixel data is far too short: that nothing is said of it shows that nothing was decoded
    stored = np.zeros((2, 2, 3) if colour else (2, 2), np.uint8)
    path = write_dicom(tmp_path / "x.dcm", stored, NumberOfFrames=frames, Rows=1024, Columns=1024)

    assert refusal(path) == f"too many voxels in one file: {size} is more than 1073741824; split it"


def test_pages_that_would_fill_the_memory_together_are_refused_before_any_is_decoded(tmp_path, monkeypatch):
    pages = [Image.fromarray(np.zeros((10, side), np.uint8)) for side in (10, 20, 30)]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    monkeypatch.setattr(reader, "MAX_VOXELS", 600)
    assert len(read_frames(tmp_path / "x.tif")) == 3
    monkeypatch.setattr(reader, "MAX_VOXELS", 599)
    decoded = []
    monkeypatch.setattr(reader, "_picture_pixels", decoded.append)

    assert "too many voxels in one file: 600 is more than 599" in refusal(tmp_path / "x.tif")
    assert not decoded


def test_one_frame_of_a_file_too_large_as_a_whole_can_be_read(tmp_path, monkeypatch):
    pages = [Image.fromarray(F8)] * 3
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    write_dicom(tmp_path / "x.dcm", np.stack([F8] * 3))
    monkeypatch.setattr(reader, "MAX_VOXELS", F8.size)

    for name in ("x.tif", "x.dcm"):
        assert "too many voxels" in refusal(tmp_path / name)
        (frame,) = reader.read_some(tmp_path / name, None, 2)
        assert frame.pixels.shape == F8.shape


@pytest.mark.parametrize("window", [(40, 0), (40, -1), (40,), (40, float("nan")), (1, 2, 3)])
def test_window_without_a_positive_width_is_a_user_error(tmp_path, window):
    write_png(tmp_path / "x.png")

    with pytest.raises(UserError, match="centre and positive width"):
        read_frames(tmp_path / "x.png", window=window)


@pytest.mark.filterwarnings("ignore:.*VR (DA|LO):UserWarning")  # what writing such a file warns of
def test_nothing_is_said_on_the_terminal_about_odd_but_readable_files(tmp_path, caplog):
    path = write_dicom(tmp_path / "x.dcm", F8, StudyDate="not a date", PatientID="x" * 100)
    caplog.set_level(logging.DEBUG)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pydicom.dcmread(path).PatientID  # noqa: B018  what pydicom says by itself
        loud = len(said)
        said.clear()
        caplog.clear()

        read_frames(path)

    assert loud
    assert not said
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# ---------------------------------------------------------------------------------------------------------- real data


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    if not (REAL / "dicom_real.zip").exists():
        pytest.skip("needs the real images beside the repository, ../shared/data")
    folder = tmp_path_factory.mktemp("real")
    for name in ("dicom_real", "odd_images"):
        shutil.unpack_archive(REAL / f"{name}.zip", folder / name)
    return {path.name: path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "frames", "shape", "window"),
    [
        ("1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819.dcm", 1, (1024, 1024), "full range"),
        ("693_J2KR.dcm", 1, (512, 512), "40/100 LINEAR"),
        ("693_UNCR.dcm", 1, (512, 512), "40/100 LINEAR"),
        ("Fake_MONOHR1.dcm", 1, (1024, 1024), "full range"),
        ("JPEG-LL.dcm", 1, (1024, 256), "full range"),
        ("RG1_J2KI.dcm", 1, (1955, 1841), "15000/30000 LINEAR"),
        ("RG3_J2KR.dcm", 1, (1760, 1760), "550/1024 LINEAR"),
        ("SC_rgb.dcm", 1, (100, 100, 3), "colour"),
        ("bad_sequence.dcm", 1, (512, 512), "40/350 LINEAR"),  # its header is damaged, its pixels are whole
        ("eCT_Supplemental.dcm", 2, (512, 512, 3), "49/102 LINEAR"),  # a perfusion map in a supplemental palette
        ("emri_small.dcm", 10, (64, 64), "full range"),
        ("mlut_18.dcm", 1, (512, 512), "full range"),
        ("vlut_04.dcm", 1, (512, 512), "VOI LUT"),
    ],
)
def test_real_dicom_files_that_are_images(real, name, frames, shape, window):
    got = read_frames(real[name])

    assert len(got) == frames
    assert {frame.pixels.shape for frame in got} == {shape}
    assert {frame.meta["window"] for frame in got} == {window}
    for frame in got:
        assert 0 <= frame.pixels.min() < frame.pixels.max() <= 1


def test_real_dicom_files_that_are_refused(real):
    assert refusal(real["emri_small_jpeg_2k_lossless_too_short.dcm"]).startswith("truncated DICOM file")
    assert refusal(real["liver_rle.dcm"]) == "a segmentation object holds labels, no image"


def test_lossless_and_uncompressed_ct_are_equal(real):
    np.testing.assert_array_equal(
        read_frames(real["693_J2KR.dcm"])[0].pixels, read_frames(real["693_UNCR.dcm"])[0].pixels
    )


def test_same_pixels_under_the_other_photometric_interpretation_are_the_negative(real):
    twin = "1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819.dcm"  # equal but for that one element

    fake = read_frames(real["Fake_MONOHR1.dcm"])[0].pixels

    np.testing.assert_allclose(fake, 1 - read_frames(real[twin])[0].pixels, atol=1e-6)


@pytest.mark.parametrize("name", ["RG1_J2KI.dcm", "1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819.dcm"])
def test_lungs_are_darker_than_the_mediastinum(real, name):
    pixels = read_frames(real[name])[0].pixels
    height, width = pixels.shape
    middle = slice(int(height * 0.35), int(height * 0.5))

    mediastinum = pixels[middle, int(width * 0.46) : int(width * 0.54)].mean()

    assert pixels[middle, int(width * 0.2) : int(width * 0.35)].mean() < mediastinum - 0.05
    assert pixels[middle, int(width * 0.65) : int(width * 0.8)].mean() < mediastinum - 0.05


def test_real_luts_agree_with_pydicom(real):
    for name, apply in (("mlut_18.dcm", apply_modality_lut), ("vlut_04.dcm", apply_voi_lut)):
        ds = pydicom.dcmread(real[name])
        np.testing.assert_allclose(read_frames(real[name])[0].pixels, apply(ds.pixel_array, ds) / 65535, atol=1e-6)


def test_radiographs_from_the_wild_are_all_read(real):
    grey, colour = [], []
    for name, path in real.items():
        if not name.endswith(".dcm"):
            (frame,) = read_frames(path)
            (colour if frame.pixels.ndim == 3 else grey).append(name[:4])
            with Image.open(path) as image:
                assert frame.pixels.shape[:2] == (image.height, image.width)
                oracle = np.asarray(image.convert("RGB"), dtype=np.float32) / 255  # opaque throughout
            pixels = frame.pixels if frame.pixels.ndim == 3 else frame.pixels[..., None].repeat(3, axis=2)
            np.testing.assert_allclose(pixels, oracle, atol=1e-6)

    assert sorted(grey) == ["L_58", "L_9f", "L_al", "L_al", "RGBA", "RGB_", "RGB_", "RGB_", "RGB_"]
    assert sorted(colour) == ["RGBA", "RGBA", "RGBA"]
