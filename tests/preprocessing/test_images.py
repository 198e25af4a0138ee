"""The command for any folder: formats, patients, labels."""

from __future__ import annotations

import csv
import json
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from medgen.data import validate_datalist
from preprocessing import _convert as c
from preprocessing import images

DATA = Path(__file__).parents[3] / "shared" / "data"


MONOCHROME2_TWIN = "1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819"
REAL_IMAGES = [
    *(
        f"dicom_real/{name}"
        for name in (
            MONOCHROME2_TWIN,
            "693_J2KR",
            "693_UNCR",
            "Fake_MONOHR1",
            "JPEG-LL",
            "RG1_J2KI",
            "RG3_J2KR",
            "SC_rgb",
            "bad_sequence",  # one sequence of its header is written as UN, which DICOM allows; the rest is whole
            *(f"eCT_Supplemental.frame{number:04d}" for number in range(2)),
            *(f"emri_small.frame{number:04d}" for number in range(10)),
            "mlut_18",
            "vlut_04",
        )
    ),
    *(
        f"odd_images/{name}"
        for name in (
            "L_58cb9263f16e94305c730685358e4e_jumbo",
            "L_9fdd3c3032296fd04d2cad5d9070d4_jumbo",
            "L_all14238-fig-0001-m-b",
            "L_all14238-fig-0002-m-e",
            "RGBA_1.CXRCTThoraximagesofCOVID-19fromSingapore.pdf-002-fig3b",
            "RGBA_1.CXRCTThoraximagesofCOVID-19fromSingapore.pdf-003-fig4b",
            "RGBA_41591_2020_819_Fig1_HTML.webp-day5",
            "RGBA_ciaa199.pdf-001-c",
            "RGB_1-s2.0-S1684118220300608-main.pdf-002",
            "RGB_93FE0BB1-022D-4F24-9727-987A07975FFB",
            "RGB_covid-19-rapidly-progressive-acute-respiratory-distress-syndrome-ards-admission",
            "RGB_ryct.2020200034.fig5-day7",
        )
    ),
]


def _run(*arguments):
    # one worker unless the test says so: each costs the start of an interpreter
    workers = () if "--workers" in arguments else ("--workers", 1)
    return c.main(images.app, [str(argument) for argument in (*arguments, *workers)])


def _items(target):
    content = validate_datalist(target / "datalist.json")
    return {item["image"]: item for split in ("training", "validation", "test") for item in content[split]}


def _picture(path, seed=0, colour=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (20, 24, 3) if colour else (20, 24)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(path)


def _ct(path, hu, patient):
    """A CT slice of Hounsfield units, stored with the usual intercept of -1024."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = pydicom.Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    data.PatientID, data.Modality = patient, "CT"
    data.Rows, data.Columns = hu.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
    data.RescaleIntercept, data.RescaleSlope = -1024, 1
    data.PixelData = (hu + 1024).astype(np.uint16).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)


def test_window_in_hounsfield_units_reaches_dicom_and_patient_comes_from_it(tmp_path):
    hu = np.tile(np.linspace(-1000, 1000, 64), (64, 1)).round()
    _ct(tmp_path / "source/1.2.3", hu, "P1")
    _ct(tmp_path / "source/a/slice.dcm", hu + 5, "P1")

    code = _run("--source", tmp_path / "source", "--target", tmp_path / "t", "--size", 64, "--window", 50, 350)

    got = np.asarray(Image.open(tmp_path / "t/images/1.2.3.png")).astype(int)
    assert code == 0
    assert np.abs(got - np.clip((hu + 125) / 350, 0, 1) * 255).max() <= 1
    assert {image: item["patient"] for image, item in _items(tmp_path / "t").items()} == {
        "images/1.2.3.png": "P1",
        "images/a/slice.png": "P1",
    }
    assert json.loads((tmp_path / "t/datalist.json").read_text())["modality"] == "CT"


def test_volume_becomes_numbered_slices_and_blank_ones_are_reported(tmp_path):
    volume = np.random.default_rng(0).normal(size=(20, 20, 4)).astype(np.float32)
    volume[..., 2] = volume.min()
    (tmp_path / "source").mkdir()
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "source/liver.nii.gz")

    code = _run("--source", tmp_path / "source", "--target", tmp_path / "t", "--size", 20)

    items = _items(tmp_path / "t")
    with open(tmp_path / "t/rejected.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert code == 3
    assert set(items) == {f"images/liver.frame000{n}.png" for n in (0, 1, 3)}
    assert {item["patient"] for item in items.values()} == {"liver"}
    assert len(rows) == 1
    assert rows[0]["file"] == "liver.nii.gz"
    assert rows[0]["reason"].startswith("1 of 4 frames left out (numbers 2)")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_gives_patient_labels_and_text(tmp_path, delimiter):
    for name in ("a/x.png", "b/x.png", "y.png", "z.png"):
        _picture(tmp_path / "source" / name, seed=len(name))
    rows = [
        ("Filename", "Patient_ID", "Class", "Report", "Finding Labels", "ignored"),
        ("a/x.png", "P1", "1", 'two\nlines, "quoted"', "Mass|Edema", "?"),
        ("b\\x", "P1", "0", "", "", "?"),
        ("y", "", "2", "", "", ""),
        ("gone.png", "P9", "0", "", "", ""),
    ]
    with open(tmp_path / "labels.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)

    code = _run("--source", tmp_path / "source", "--target", tmp_path / "t", "--labels", tmp_path / "labels.csv")

    assert code == 3
    assert _items(tmp_path / "t") == {
        "images/a/x.png": {
            "image": "images/a/x.png",
            "patient": "P1",
            "label": 1,
            "text": 'two\nlines, "quoted"',
            "labels": ["Mass", "Edema"],
        },
        "images/b/x.png": {"image": "images/b/x.png", "patient": "P1", "label": 0},
        "images/y.png": {"image": "images/y.png", "patient": "y", "label": 2},
        "images/z.png": {"image": "images/z.png", "patient": "z"},
    }
    assert 'gone.png,"listed in labels.csv, but not found' in (tmp_path / "t/rejected.csv").read_text()
    assert json.loads((tmp_path / "t/datalist.json").read_text("utf-8"))["label_names"] == [0, 1, 2]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("file,label\nx,1\n", "names 2 files"),
        ("file,label\na/x,1\na/x.png,2\n", "two rows name a/x.png"),
        ("file,label\na/x,1\na/x,2\n", "says two things about a/x"),
        ("name,label\nx,1\n", "must have a column file"),
        ("file\nx\n", "must have a column file"),
        ("", "got an empty file"),
    ],
)
def test_ambiguous_table_is_refused_before_anything_is_converted(tmp_path, capsys, table, message):
    for name in ("a/x.png", "b/x.png"):
        _picture(tmp_path / "source" / name)
    (tmp_path / "labels.csv").write_text(table)

    code = _run("--source", tmp_path / "source", "--target", tmp_path / "t", "--labels", tmp_path / "labels.csv")

    assert code == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


def test_equal_rows_about_one_file_are_one(tmp_path):
    # detection tables have a row per box
    (tmp_path / "labels.csv").write_text("image,x,target\na,1,1\na,2,1\nb,,0\n")

    assert images.read_labels(tmp_path / "labels.csv") == {"a": {"label": 1}, "b": {"label": 0}}


def test_files_that_name_no_patient_are_counted_and_said(tmp_path, capsys):
    for number in range(3):
        _picture(tmp_path / "in" / f"{number}.png", seed=number)
    (tmp_path / "patients.csv").write_text("file,patient\n0.png,a\n")
    arguments = ("--source", tmp_path / "in", "--size", 16)

    _run(*arguments, "--target", tmp_path / "unnamed")
    assert "note: 3 of 3 files name no patient" in capsys.readouterr().err

    _run(*arguments, "--target", tmp_path / "named", "--labels", tmp_path / "patients.csv")
    assert "note: 2 of 3 files name no patient" in capsys.readouterr().err


def test_folders_can_be_labels_and_mixed_colours_are_noted(tmp_path, capsys):
    _picture(tmp_path / "source/nevus/1.png", 1, colour=True)
    _picture(tmp_path / "source/melanoma/deep/2.png", 2)

    code = _run("--source", tmp_path / "source", "--target", tmp_path / "t", "--folder-labels", "--size", 20)

    assert code == 0
    labels = {image: item["label"] for image, item in _items(tmp_path / "t").items()}
    assert labels == {"images/nevus/1.png": "nevus", "images/melanoma/deep/2.png": "melanoma"}
    assert "1 files are grey and 1 in colour" in capsys.readouterr().err


def test_split_shares_and_seed_reach_the_datalist(tmp_path):
    for number in range(10):
        _picture(tmp_path / f"source/{number}.png", number)
    options = ("--source", tmp_path / "source", "--target", tmp_path / "t", "--size", 16, "--split", 0.5, 0.2, 0.3)

    splits = []
    for seed in (1, 2):  # the images are not converted again, only dealt out anew
        assert _run(*options, "--seed", seed) == 0
        splits.append(json.loads((tmp_path / "t/datalist.json").read_text()))

    assert [len(splits[0][name]) for name in ("training", "validation", "test")] == [5, 2, 3]
    assert splits[0]["test"] != splits[1]["test"]


@pytest.mark.skipif(not (DATA / "dicom_real.zip").exists(), reason="real images (../shared/data) are absent")
def test_every_real_file_is_converted_or_has_a_reason(tmp_path):
    for name in ("dicom_real", "odd_images"):
        with zipfile.ZipFile(DATA / f"{name}.zip") as archive:
            archive.extractall(tmp_path / "source" / name)

    code = _run("--source", tmp_path / "source", "--target", tmp_path / "t", "--size", 64, "--channels", "grey")

    with open(tmp_path / "t/rejected.csv", newline="") as file:
        rejected = {row["file"]: row["reason"] for row in csv.DictReader(file)}
    written = {path.relative_to(tmp_path / "t").as_posix() for path in (tmp_path / "t").rglob("*.png")}
    assert code == 3
    assert rejected == {
        "dicom_real/emri_small_jpeg_2k_lossless_too_short.dcm": (
            "truncated DICOM file: End of file reached before delimiter (FFFE,E0DD) found"
        ),
        "dicom_real/liver_rle.dcm": "a segmentation object holds labels, no image",
    }
    assert written == {f"images/{name}.png" for name in REAL_IMAGES}
    assert set(_items(tmp_path / "t")) == written
    pixels = {image: np.asarray(Image.open(tmp_path / "t" / image)) for image in written}
    for values in pixels.values():
        assert (values.ndim, min(values.shape)) == (2, 64)
        assert values.std() > 5
    # the same radiograph stored once as MONOCHROME1 and once as MONOCHROME2, neither with a window
    negative, positive = (pixels[f"images/dicom_real/{name}.png"] for name in ("Fake_MONOHR1", MONOCHROME2_TWIN))
    np.testing.assert_array_equal(negative, 255 - positive)
