"""RSNA challenge: tables that agree or do not, whose image it is, crops to the lungs, splits of every class."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from here import convert_here
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from medgen.data import load_classes, validate_datalist
from medgen.data.phantom import PhantomSpec, write_phantom
from medgen.errors import UserError
from preprocessing import _convert as c
from preprocessing import rsna

REPO = Path(__file__).parents[2]
DATA = Path(__file__).parents[3] / "shared" / "data"
SPLITS = ("training", "validation", "test")
IMAGES = "stage_2_train_images"
LABELS, CLASSES = "stage_2_train_labels.csv", "stage_2_detailed_class_info.csv"
MAPPING = "pneumonia-challenge-dataset-mappings_2018.json"
LABELS_HEADER, CLASSES_HEADER = "patientId,x,y,width,height,Target", "patientId,class"
NORMAL, OPACITY, OTHER = "Normal", "Lung Opacity", "No Lung Opacity / Not Normal"
LISTS = {"normal": {0}, "lung_opacity": {1}, "not_normal": {2}, "abnormal": {1, 2}}


def _run(*arguments):
    # one worker unless the test says so: each costs the start of an interpreter
    workers = () if "--workers" in arguments else ("--workers", 1)
    return c.main(rsna.app, [str(argument) for argument in (*arguments, *workers)])


def _organise(source, target, *arguments):
    size = () if "--size" in arguments else ("--size", 32)
    return _run("organise", "--source", source, "--target", target, *size, *arguments)


def _crop(source, target, boxes, *arguments):
    return _run("crop", "--source", source, "--target", target, "--boxes", boxes, *arguments)


def _dicom(path, pixels, patient=None, **elements):
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    ds.PatientID = path.stem if patient is None else patient
    ds.Modality, ds.ViewPosition = "CR", "PA"
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = pixels.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    ds.PixelData = pixels.tobytes()
    ds["PixelData"].VR = "OB"
    ds.update({})
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)


def _pixels(number, shape=(32, 32)):
    """Noise that has both ends of the 8 bits, so that it is the same in the PNG."""
    pixels = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
    pixels[0, :2] = 0, 255
    return pixels


def _source(root, labels, classes, files=None):
    """A folder of the challenge with these rows, and an image for each id (or for ``files``)."""
    root.mkdir(parents=True, exist_ok=True)
    (root / LABELS).write_text("\n".join([LABELS_HEADER, *labels]) + "\n")
    (root / CLASSES).write_text("\n".join([CLASSES_HEADER, *classes]) + "\n")
    names = files if files is not None else sorted({row.split(",")[0] for row in [*labels, *classes]})
    (root / IMAGES).mkdir(exist_ok=True)
    for number, name in enumerate(names):
        _dicom(root / IMAGES / f"{name}.dcm", _pixels(number))
    return root


def _normals(root, count):
    names = [f"n{number}" for number in range(count)]
    return _source(root, [f"{name},,,,,0" for name in names], [f"{name},{NORMAL}" for name in names])


def _mapping(path, patients):
    entries = [{"subset_img_id": name, "img_id": image, "orig_labels": []} for name, image in patients.items()]
    path.write_text(json.dumps(entries))
    return path


def _organised(root, images, patients=None):
    """What organise writes, by hand: images by name, or one number for each label's count."""
    (root / "images").mkdir(parents=True)
    items = []
    for number, (name, (label, pixels)) in enumerate(images.items()):
        Image.fromarray(pixels).save(root / f"images/{name}.png")
        patient = str(number) if patients is None else patients[name]
        item = {"image": f"images/{name}.png", "patient": patient, "label": label, "class": rsna.CLASSES[label]}
        items.append({**item, "boxes": []})
    (root / "datalist.json").write_text(json.dumps({"name": "x", "modality": "X-ray", "all": items}))
    return root


def _boxes(path, rows):
    text = [f"images/{name}.png,{','.join(map(str, box))}" for name, box in rows.items()]
    path.write_text("\n".join(["image,top,left,bottom,right", *text]) + "\n")
    return path


def _all(target):
    return validate_datalist(target / "datalist.json")["all"]


def _items(target, name="datalist"):
    content = validate_datalist(target / f"{name}.json")
    return [{**item, "split": split} for split in SPLITS for item in content[split]]


def _reasons(target):
    with open(target / "rejected.csv", encoding="utf-8", newline="") as file:
        return {row["file"]: row["reason"] for row in csv.DictReader(file)}


def _png(target, name):
    return np.asarray(Image.open(target / f"images/{name}.png"))


def _tree(folder):
    """All bytes of a target but the journal, whose lines are in the order of the workers."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != c.JOURNAL}


def _times(folder):
    return {path: path.stat().st_mtime_ns for path in (folder / "images").rglob("*.png")}


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    """Phantoms in the challenge's layout, what organise makes of them, and the boxes of their lungs."""
    root = tmp_path_factory.mktemp("rsna")
    write_phantom("rsna", root / "source", PhantomSpec(16, images_per_patient=2, size=64, seed=3, anomaly_fraction=0.6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(c, "_pool", convert_here)
        assert _organise(root / "source", root / "organised", "--size", 64) == 0
    rows = {}
    for path in (root / "source/masks").glob("*_lung.png"):
        lung = np.asarray(Image.open(path)) > 0
        rows_, columns = np.flatnonzero(lung.any(axis=1)), np.flatnonzero(lung.any(axis=0))
        rows[path.name.removesuffix("_lung.png")] = (rows_[0], columns[0], rows_[-1] + 1, columns[-1] + 1)
    _boxes(root / "boxes.csv", rows)
    return root


# ---------------------------------------------------------------------------------------------------------------------
# organise


@pytest.mark.usefixtures("in_this_process")
def test_items_carry_class_boxes_and_view_and_pngs_the_pixels(tmp_path):
    labels = ["b,4,2,8.5,20,1", "b,20,0,4,4,1", "b,4,2,8.5,20,1", "a,,,,,0", "c,,,,,0"]
    classes = [f"b,{OPACITY}", f"b,{OPACITY}", f"a,{NORMAL}", f"c,{OTHER}", f"c,{OTHER}"]
    source = _source(tmp_path / "s", labels, classes)

    assert _organise(source, tmp_path / "t") == 0

    assert _all(tmp_path / "t") == [
        {"image": "images/a.png", "patient": "a", "label": 0, "class": NORMAL, "boxes": [], "view": "PA"},
        {
            "image": "images/b.png",
            "patient": "b",
            "label": 1,
            "class": OPACITY,
            "boxes": [[4.0, 2.0, 8.5, 20.0], [20.0, 0.0, 4.0, 4.0]],  # the same row twice is one box
            "view": "PA",
        },
        {"image": "images/c.png", "patient": "c", "label": 2, "class": OTHER, "boxes": [], "view": "PA"},
    ]
    assert json.loads((tmp_path / "t/datalist.json").read_text())["label_names"] == [NORMAL, OPACITY, OTHER]
    assert _reasons(tmp_path / "t") == {}
    for number, name in enumerate("abc"):
        np.testing.assert_array_equal(_png(tmp_path / "t", name), _pixels(number))


@pytest.mark.usefixtures("in_this_process")
def test_boxes_shrink_with_the_image_and_end_at_its_border(tmp_path):
    source = _source(tmp_path / "s", ["a,8,16,64,24,1", "a,100,0,100,10,1"], [f"a,{OPACITY}"], files=[])
    _dicom(source / IMAGES / "a.dcm", _pixels(0, (64, 128)))

    assert _organise(source, tmp_path / "t", "--size", 16) == 0

    assert _png(tmp_path / "t", "a").shape == (16, 32)
    assert _all(tmp_path / "t")[0]["boxes"] == [[2.0, 4.0, 16.0, 6.0], [25.0, 0.0, 7.0, 2.5]]


@pytest.mark.usefixtures("in_this_process")
def test_grey_levels_are_those_that_a_viewer_shows(tmp_path):
    source = _source(tmp_path / "s", ["a,,,,,0", "b,,,,,0"], [f"a,{NORMAL}", f"b,{NORMAL}"], files=[])
    ramp = np.arange(256, dtype=np.uint8).repeat(4).reshape(32, 32)
    _dicom(source / IMAGES / "a.dcm", ramp, PhotometricInterpretation="MONOCHROME1")
    _dicom(source / IMAGES / "b.dcm", ramp, WindowCenter="100", WindowWidth="51", VOILUTFunction="LINEAR_EXACT")

    assert _organise(source, tmp_path / "t") == 0

    np.testing.assert_array_equal(_png(tmp_path / "t", "a"), 255 - ramp)
    # 100 ± 25.5 becomes black to white, five levels of the PNG for one of the file
    expected = np.clip((ramp.astype(int) - 74.5) * 5, 0, 255)
    np.testing.assert_allclose(_png(tmp_path / "t", "b"), expected, atol=0.51)


@pytest.mark.usefixtures("in_this_process")
def test_rows_that_contradict_each_other_are_rejected_each_with_its_reason(tmp_path):
    labels = ["good,,,,,0", "both,,,,,0", "both,1,1,5,5,1", "odd,,,,,2", "boxed,1,1,5,5,0", "boxless,,,,,1"]
    labels += ["words,a,1,5,5,1", "half,1,1,,,1", "flat,1,1,0,5,1", "opaque,,,,,0", "ill,1,1,5,5,1", "twice,,,,,0"]
    labels += ["other,,,,,0", "lone,,,,,0", "far,40,1,5,5,1", "nan,nan,1,5,5,1"]
    classes = [f"{name},{NORMAL}" for name in ("good", "twice", "ill")]
    classes += [f"{name},{OPACITY}" for name in ("both", "boxless", "words", "half", "flat", "opaque", "far", "nan")]
    classes += [f"boxed,{OTHER}", f"odd,{OTHER}", f"twice,{OTHER}", "other,Something", f"classed,{NORMAL}"]
    source = _source(tmp_path / "s", labels, classes)

    assert _organise(source, tmp_path / "t") == 3

    numbers = "x, y, width, height must be four numbers, the last two above 0, got "
    assert _reasons(tmp_path / "t") == {
        f"{IMAGES}/{name}.dcm": reason
        for name, reason in {
            "both": "Target must be 0 or 1 in all rows of an image, got 0, 1",
            "boxed": "Target 0 with a box",
            "boxless": "Target 1 without a box",
            "classed": f"listed in {CLASSES}, but not in {LABELS}",
            "far": "a box lies outside of the image, 32×32",
            "flat": numbers + "1, 1, 0, 5",
            "half": numbers + "1, 1, , ",
            "ill": "class Normal, but Target 1",
            "lone": f"listed in {LABELS}, but not in {CLASSES}",
            "nan": numbers + "nan, 1, 5, 5",
            "odd": "Target must be 0 or 1 in all rows of an image, got 2",
            "opaque": "class Lung Opacity, but Target 0",
            "other": f"class must be one of {NORMAL}, {OPACITY}, {OTHER}, got 'Something'",
            "twice": f"several classes in {CLASSES}: {OTHER}, {NORMAL}",
            "words": numbers + "a, 1, 5, 5",
        }.items()
    }
    assert [item["image"] for item in _all(tmp_path / "t")] == ["images/good.png"]


@pytest.mark.usefixtures("in_this_process")
def test_files_that_are_missing_surplus_or_unusable_are_rejected_by_name(tmp_path, capsys):
    names = ("absent", "garbage", "cut", "flat", "renamed", "good", "nameless", "png")
    classes = [f"{name},{NORMAL}" for name in (*names, "lost")]
    source = _source(tmp_path / "s", [f"{name},,,,,0" for name in names], classes, ["good", "cut"])
    images = source / IMAGES
    (images / "garbage.dcm").write_bytes(b"no image" * 99)
    (images / "cut.dcm").write_bytes((images / "cut.dcm").read_bytes()[:-100])
    _dicom(images / "flat.dcm", np.full((32, 32), 7, np.uint8))
    _dicom(images / "renamed.dcm", _pixels(1), patient="good")
    _dicom(images / "nameless.dcm", _pixels(2), patient="")
    _dicom(images / "stray.dcm", _pixels(3))
    _dicom(images / "more/good.dcm", _pixels(4))
    Image.fromarray(_pixels(5)).save(images / "png.png")
    _dicom(source / "stage_2_test_images/test.dcm", _pixels(6))  # has no labels, and is not asked for

    assert _organise(source, tmp_path / "t") == 3

    reasons = {file.removeprefix(f"{IMAGES}/"): reason for file, reason in _reasons(tmp_path / "t").items()}
    assert "truncated" in reasons.pop("cut.dcm")
    assert reasons == {
        "absent.dcm": f"listed in {LABELS}, but not found",
        "flat.dcm": "all pixels have the same value",
        "garbage.dcm": "not a PNG, JPEG, TIFF, BMP, DICOM or NIfTI file by its content",
        "lost.dcm": f"listed in {CLASSES}, but not in {LABELS}",
        "more/good.dcm": f"the same image as {IMAGES}/good.dcm",
        "png.dcm": f"listed in {LABELS}, but not found",
        "png.png": "no .dcm file",
        "renamed.dcm": "its PatientID is good: not the file that its name says",
        "stray.dcm": f"listed neither in {LABELS} nor in {CLASSES}",
    }
    assert [item["image"] for item in _all(tmp_path / "t")] == ["images/good.png", "images/nameless.png"]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("wrote 2 images, rejected 10 files (reasons: ")


@pytest.mark.usefixtures("in_this_process")
def test_ids_that_are_paths_lead_nowhere(tmp_path):
    names = ["good", "../../../escape", str(tmp_path / "absolute"), "", "..\\x"]
    source = _source(tmp_path / "s", [f"{n},,,,,0" for n in names], [f"{n},{NORMAL}" for n in names], ["good"])

    assert _organise(source, tmp_path / "t") == 3

    assert [item["image"] for item in _all(tmp_path / "t")] == ["images/good.png"]
    assert {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")} == {"s", "t"}
    assert len(_reasons(tmp_path / "t")) == 4


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("form", ["json in the source", "json", "csv"])
def test_mapping_says_whose_image_it_is(tmp_path, capsys, form):
    source = _normals(tmp_path / "s", 3)
    patients = {
        "n0": "00000007_000.png",
        "n1": "00000007_013.png",
        "n2": "00000008_000.png",
        "unused": "00000009_0.png",
    }
    path = _mapping((source if "source" in form else tmp_path) / MAPPING, patients)
    if form == "csv":
        path = tmp_path / "mapping.csv"
        rows = [f"{image},x,{name}" for name, image in patients.items()]
        path.write_text("\n".join(["img_id,note,subset_img_id", *rows]))

    assert _organise(source, tmp_path / "t", *(() if "source" in form else ("--mapping", path))) == 0

    assert [item["patient"] for item in _all(tmp_path / "t")] == ["00000007", "00000007", "00000008"]
    assert "note" not in capsys.readouterr().err


@pytest.mark.usefixtures("in_this_process")
def test_without_a_mapping_each_image_is_a_patient_and_a_note_says_so(tmp_path, capsys):
    assert _organise(_normals(tmp_path / "s", 2), tmp_path / "t") == 0

    assert [item["patient"] for item in _all(tmp_path / "t")] == ["n0", "n1"]
    (note,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note")]
    assert f"--mapping {MAPPING}" in note


@pytest.mark.usefixtures("in_this_process")
def test_images_that_the_mapping_lacks_or_gives_two_patients_are_rejected(tmp_path):
    source = _normals(tmp_path / "s", 3)
    path = _mapping(source / MAPPING, {"n0": "00000007_000.png", "n1": "00000007_001.png"})
    path.write_text(json.dumps([*json.loads(path.read_text()), {"subset_img_id": "n1", "img_id": "00000008_000.png"}]))

    assert _organise(source, tmp_path / "t") == 3

    assert _reasons(tmp_path / "t") == {
        f"{IMAGES}/n1.dcm": f"several patients in {MAPPING}",
        f"{IMAGES}/n2.dcm": f"no patient in {MAPPING}",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("{}", "must hold a list"),
        ('[{"subset_img_id": "a"}]', "entry 0 must be as in"),
        ('[{"subset_img_id": "a", "img_id": "scan.png"}]', "entry 0 must be as in"),
        ("[7]", "entry 0 must be as in"),
        (None, "cannot be read as JSON (No such file or directory"),
    ],
)
def test_mapping_that_is_none_is_one_line(tmp_path, capsys, text, message):
    if text is not None:
        (tmp_path / "m.json").write_text(text)

    assert _organise(_normals(tmp_path / "s", 1), tmp_path / "t", "--mapping", tmp_path / "m.json") == 1

    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'm.json'}")
    assert message.replace("(No", "([Errno 2] No") in error
    assert error.count("\n") == 1
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda s: (s / LABELS).unlink(), f"expected {LABELS} in --source"),
        (lambda s: (s / CLASSES).unlink(), f"expected {CLASSES} in --source"),
        (lambda s: (s / LABELS).write_text("patientId,x,y\n"), "lacks width, height, Target, has patientId, x, y"),
        (lambda s: (s / CLASSES).write_text(""), "lacks patientId, class, has an empty file"),
        (lambda s: (s / CLASSES).write_bytes(b"\xff\xfe\0\0"), "cannot be read as a CSV table"),
        (lambda s: shutil.rmtree(s / IMAGES), "expected a folder, got"),
        (lambda s: (s / IMAGES / "n0.dcm").unlink(), "none of the 1 images of"),
    ],
)
def test_source_of_another_form_is_one_line(tmp_path, capsys, break_it, message):
    source = _normals(tmp_path / "s", 1)
    break_it(source)

    assert _organise(source, tmp_path / "t") == 1

    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "t").exists()


@pytest.mark.usefixtures("in_this_process")
def test_second_run_converts_only_what_is_new_and_drops_what_is_gone(tmp_path):
    source = _normals(tmp_path / "s", 3)
    assert _organise(source, tmp_path / "t") == 0
    before = _times(tmp_path / "t")

    _normals(source, 4)
    for number in (1, 2):  # as they were
        os.utime(source / IMAGES / f"n{number}.dcm", ns=(0, 0))
    assert _organise(source, tmp_path / "t") == 0
    again = _times(tmp_path / "t")
    assert _organise(source, tmp_path / "t") == 0
    assert _times(tmp_path / "t") == again
    (source / IMAGES / "n0.dcm").unlink()
    assert _organise(source, tmp_path / "t") == 3

    assert set(again) - set(before) == {tmp_path / "t/images/n3.png"}
    assert not (tmp_path / "t/images/n0.png").exists()
    assert [item["image"] for item in _all(tmp_path / "t")] == [f"images/n{number}.png" for number in (1, 2, 3)]


@pytest.mark.skipif(not (DATA / "dicom_real.zip").exists(), reason="real images (../shared/data) are absent")
@pytest.mark.usefixtures("in_this_process")
def test_file_of_the_challenge_is_read_as_it_is(tmp_path):
    name = "16d7f894-55d7-4d95-8957-d18987f0e981"
    source = _source(tmp_path / "s", [f"{name},100,200,300,400,1"], [f"{name},{OPACITY}"], files=[])
    with zipfile.ZipFile(DATA / "dicom_real.zip") as archive:
        (member,) = [file for file in archive.namelist() if "8323329.6904" in file]
        (source / IMAGES / f"{name}.dcm").write_bytes(archive.read(member))

    assert _organise(source, tmp_path / "t", "--size", 1024) == 0

    (item,) = _all(tmp_path / "t")
    assert item["boxes"] == [[100, 200, 300, 400]]
    pixels = _png(tmp_path / "t", name)
    assert pixels.shape == (1024, 1024)
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert pixels[100:160, 480:540].mean() > pixels[300:600, 250:350].mean() + 30  # spine and lung


# ---------------------------------------------------------------------------------------------------------------------
# crop: pixels


@pytest.mark.usefixtures("in_this_process")
def test_crop_is_the_box_pixel_for_pixel_unless_it_is_resized(tmp_path):
    pixels = _pixels(0, (64, 80))
    root = _organised(tmp_path / "o", {"a": (0, pixels)})

    assert _crop(root, tmp_path / "t", _boxes(tmp_path / "b.csv", {"a": (10, 20, 42, 52)}), "--size", 32) == 0

    np.testing.assert_array_equal(_png(tmp_path / "t", "a"), pixels[10:42, 20:52])


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("aspect", ["stretch", "keep"])
def test_box_that_is_no_square_is_stretched_or_grown(tmp_path, aspect):
    # a grid of 4 pixels in a picture of 96: columns 32 to 64, rows 0 to 64 are the lungs
    pixels = np.zeros((96, 96), np.uint8)
    pixels[:, 48:] = 255
    root = _organised(tmp_path / "o", {"a": (0, pixels)})
    boxes = _boxes(tmp_path / "b.csv", {"a": (0, 40, 64, 72)})

    assert _crop(root, tmp_path / "t", boxes, "--size", 64, "--aspect", aspect) == 0

    edge = np.flatnonzero(_png(tmp_path / "t", "a")[32] > 127)[0]
    # 8 of 32 columns are black; in the square 24 to 88 around them 24 of 64
    assert edge == (16 if aspect == "stretch" else 24)


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((10, 10, 30, 20), (10, 5, 30, 25)),
        ((0, 10, 20, 14), (0, 2, 20, 22)),
        ((10, 0, 30, 10), (10, 0, 30, 20)),  # moved to the right
        ((10, 95, 30, 100), (10, 80, 30, 100)),  # moved to the left
        ((45, 0, 50, 40), (10, 0, 50, 40)),  # moved up
        ((0, 0, 50, 60), (-5, 0, 55, 60)),  # too wide for the height
        ((7, 3, 9, 5), (7, 3, 9, 5)),
    ],
)
def test_square_around_a_box_stays_in_the_image_where_it_can(box, expected):
    assert rsna._square(box, 50, 100) == expected


@pytest.mark.usefixtures("in_this_process")
def test_square_beyond_a_narrow_image_is_filled_with_black(tmp_path):
    pixels = _pixels(0, (40, 64))
    pixels[pixels == 0] = 1
    root = _organised(tmp_path / "o", {"a": (0, pixels)})
    boxes = _boxes(tmp_path / "b.csv", {"a": (5, 0, 35, 64)})

    assert _crop(root, tmp_path / "t", boxes, "--size", 64, "--aspect", "keep") == 0

    np.testing.assert_array_equal(_png(tmp_path / "t", "a"), np.pad(pixels, ((12, 12), (0, 0))))


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    ("aspect", "expected"),
    [
        # of a box 20 wide and 40 high at 40×40: columns are doubled
        ("stretch", [[0.0, 0.0, 20.0, 10.0], [20.0, 30.0, 20.0, 10.0]]),
        # the square is 10 to 50 by 20 to 60: pixels stay as they are
        ("keep", [[5.0, 0.0, 15.0, 10.0], [20.0, 30.0, 15.0, 10.0]]),
    ],
)
def test_boxes_of_opacities_move_with_the_crop(tmp_path, aspect, expected):
    root = _organised(tmp_path / "o", {"a": (1, _pixels(0, (80, 80)))})
    content = json.loads((root / "datalist.json").read_text())
    # across the crop's corner, inside, and outside
    content["all"][0]["boxes"] = [[15.0, 10.0, 15.0, 20.0], [30.0, 50.0, 15.0, 10.0], [70.0, 70.0, 5.0, 5.0]]
    (root / "datalist.json").write_text(json.dumps(content))
    boxes = _boxes(tmp_path / "b.csv", {"a": (20, 20, 60, 40)})

    assert _crop(root, tmp_path / "t", boxes, "--size", 40, "--aspect", aspect, "--split", 1, 0, 0) == 0

    assert _items(tmp_path / "t")[0]["boxes"] == expected


@pytest.mark.usefixtures("in_this_process")
def test_images_of_opacities_outside_of_the_crop_are_counted(tmp_path, capsys):
    root = _organised(tmp_path / "o", {name: (label, _pixels(label)) for name, label in (("a", 1), ("b", 1), ("c", 0))})
    content = json.loads((root / "datalist.json").read_text())
    for item, box in zip(content["all"], ([24.0, 24.0, 4.0, 4.0], [2.0, 2.0, 4.0, 4.0]), strict=False):
        item["boxes"] = [box]
    (root / "datalist.json").write_text(json.dumps(content))
    boxes = _boxes(tmp_path / "b.csv", dict.fromkeys("abc", (0, 0, 16, 16)))

    assert _crop(root, tmp_path / "t", boxes, "--size", 16, "--split", 1, 0, 0) == 0

    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "1 of 2 images of Lung Opacity have no box: their opacities lie outside of the crop"
    assert [(item["label"], len(item["boxes"])) for item in _items(tmp_path / "t")] == [(1, 0), (1, 1), (0, 0)]


@pytest.mark.usefixtures("in_this_process")
def test_images_without_a_usable_box_are_rejected_and_the_rest_goes_on(tmp_path, capsys):
    names = "good none outside above empty crossed words broken two same constant gone".split()
    images = {name: (0, _pixels(number)) for number, name in enumerate(names)}
    images["constant"] = (0, np.pad(np.full((16, 16), 9, np.uint8), 8, constant_values=200))
    root = _organised(tmp_path / "o", images)
    (root / "images/gone.png").unlink()
    rows = dict.fromkeys(names, (0, 0, 16, 16))
    del rows["none"]
    rows |= {"outside": (20, 0, 40, 32), "above": (-1, 0, 16, 16), "empty": (5, 5, 5, 9), "crossed": (9, 9, 5, 12)}
    rows |= {"words": (1, 1, "x", 9), "broken": (1, 1, 8.5, 9), "constant": (8, 8, 24, 24), "../../etc/x": (0, 0, 9, 9)}
    boxes = _boxes(tmp_path / "b.csv", rows)
    with open(boxes, "a") as file:
        file.write("images/two.png,0,0,16,17\nimages/same.png,0,0,16,16.0\n")

    assert _crop(root, tmp_path / "t", boxes, "--size", 16) == 3

    whole = "top, left, bottom, right must be four whole numbers, got "
    expected = {
        "above": "its box leaves the image, 32×32: top -1, left 0, bottom 16, right 16",
        "broken": whole + "1, 1, 8.5, 9",
        "constant": "all pixels in its box have the same value",
        "crossed": "its box is empty: top 9, left 9, bottom 5, right 12",
        "empty": "its box is empty: top 5, left 5, bottom 5, right 9",
        "gone": "no such file",
        "none": "no box in b.csv: no lungs were found in it, or it was not looked at",
        "outside": "its box leaves the image, 32×32: top 20, left 0, bottom 40, right 32",
        "two": "two boxes in b.csv: top 0, left 0, bottom 16, right 16 and top 0, left 0, bottom 16, right 17",
        "words": whole + "1, 1, x, 9",
    }
    assert _reasons(tmp_path / "t") == {
        **{f"images/{name}.png": reason for name, reason in expected.items()},
        "../etc/x.png": "has a box, but is not in datalist.json",
    }
    assert {item["image"] for item in _items(tmp_path / "t")} == {"images/good.png", "images/same.png"}
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("wrote 2 images, rejected 11 files (reasons: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "b.csv").write_text("image,top\n"), "lacks left, bottom, right, has image, top"),
        (lambda root: (root / "b.csv").unlink(), "cannot be read as a CSV table"),
        (lambda root: _boxes(root / "b.csv", {"b": (0, 0, 9, 9)}), "got 1 boxes, the first of images/b.png; name the"),
        (lambda root: _boxes(root / "b.csv", {"a": (9, 0, 3, 9)}), "got images/a.png: its box is empty: top 9, left 0"),
        (lambda root: (root / "o/datalist.json").unlink(), "run: python -m preprocessing.rsna organise --source"),
        (lambda root: (root / "o/datalist.json").write_text('{"test": []}'), "got no list called all in"),
        (
            lambda root: (root / "o/datalist.json").write_text('{"all": [{"image": "x.png", "patient": 1}]}'),
            "got the label None of x.png in",
        ),
        (
            lambda root: (root / "o/datalist.json").write_text('{"all": [{"image": "../x.png", "patient": 1}]}'),
            "must be a path below the dataset's folder",
        ),
    ],
)
def test_crop_of_what_organise_has_not_written_is_one_line(tmp_path, capsys, change, message):
    root = _organised(tmp_path / "o", {"a": (0, _pixels(0))})
    boxes = _boxes(tmp_path / "b.csv", {"a": (0, 0, 16, 16)})
    change(tmp_path)

    assert _crop(root, tmp_path / "t", boxes, "--size", 16) == 1

    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "t").exists()


@pytest.mark.usefixtures("in_this_process")
def test_new_boxes_are_used_and_old_ones_cost_nothing(tmp_path):
    pixels = _pixels(0, (64, 64))
    root = _organised(tmp_path / "o", {"a": (0, pixels), "b": (0, _pixels(1, (64, 64)))})
    boxes = _boxes(tmp_path / "b.csv", {"a": (0, 0, 32, 32), "b": (50, 0, 82, 32)})
    arguments = (root, tmp_path / "t", boxes, "--size", 32)
    assert _crop(*arguments) == 3

    before = _times(tmp_path / "t")
    assert _crop(*arguments) == 3
    assert _times(tmp_path / "t") == before
    _boxes(boxes, {"a": (0, 0, 32, 32), "b": (32, 0, 64, 32)})
    assert _crop(*arguments) == 0  # what was refused for its box is not refused for good
    _boxes(boxes, {"a": (16, 0, 48, 32)})
    assert _crop(*arguments) == 3

    np.testing.assert_array_equal(_png(tmp_path / "t", "a"), pixels[16:48, :32])
    assert not (tmp_path / "t/images/b.png").exists()
    assert [item["image"] for item in _items(tmp_path / "t")] == ["images/a.png"]


@pytest.mark.usefixtures("in_this_process")
def test_target_of_other_settings_is_refused(tmp_path, capsys):
    root = _organised(tmp_path / "o", {"a": (0, _pixels(0))})
    boxes = _boxes(tmp_path / "b.csv", {"a": (0, 0, 16, 16)})
    assert _crop(root, tmp_path / "t", boxes, "--size", 16) == 0

    assert _crop(root, tmp_path / "t", boxes, "--size", 16, "--aspect", "keep") == 1
    assert "was made with other settings: aspect stretch (now keep)" in capsys.readouterr().err
    assert _crop(root, root, boxes, "--size", 16) == 1
    assert "--target must lie outside of --source" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# crop: splits


def _population(seed=0, counts=(900, 600, 1200)):
    """Items of as many images with each label, of patients with one to many images who tend to one class."""
    rng = np.random.default_rng(seed)
    labels = np.repeat([0, 1, 2], counts)
    labels = labels[np.argsort((labels > 0) + rng.normal(0, 0.6, len(labels)))]
    patients = np.repeat(np.arange(len(labels)), rng.geometric(0.5, len(labels)))[: len(labels)]
    return [
        {"image": f"images/{number}.png", "patient": f"p{patient}", "label": int(label)}
        for number, (label, patient) in enumerate(zip(labels, patients, strict=True))
    ]


def test_each_class_is_divided_alike_and_no_patient_is():
    items = _population()
    shares = {"training": 0.7, "validation": 0.1, "test": 0.2}

    splits = rsna.split_classes(items, {(label,): shares for label in range(3)}, seed=1)

    homes = Counter(item["patient"] for items in splits.values() for item in {i["patient"]: i for i in items}.values())
    assert set(homes.values()) == {1}
    for label, count in enumerate((900, 600, 1200)):
        got = [sum(item["label"] == label for item in splits[name]) for name in SPLITS]
        assert sum(got) == count
        assert got == pytest.approx([share * count for share in shares.values()], abs=2)


def test_split_depends_on_the_seed_and_not_on_the_order_of_items():
    items = _population()
    goals = {(0,): dict(zip(SPLITS, (8, 1, 1), strict=True)), (1, 2): dict(zip(SPLITS, (6, 2, 2), strict=True))}

    first, again = rsna.split_classes(items, goals, 5), rsna.split_classes(items[::-1], goals, 5)

    assert first == again
    assert first != rsna.split_classes(items, goals, 6)
    assert [item["image"] for item in first["test"]] == sorted(
        (item["image"] for item in first["test"]), key=lambda image: int(image[7:-4])
    )


def test_split_with_share_zero_stays_empty():
    splits = rsna.split_classes(_population(), {(0, 1, 2): dict(zip(SPLITS, (9, 0, 1), strict=True))})

    assert [len(splits[name]) for name in SPLITS] == pytest.approx([2430, 0, 270], abs=2)


@pytest.mark.parametrize(
    ("counts", "validation", "expected", "note"),
    [
        # the paper's own numbers, with more images than it had
        ((8954, 0, 11653), 0, ((6268, 0, 2686), (6268, 0, 5385)), ""),
        ((9300, 6000, 12000), 0.05, ((6268, 313, 2686), (6268, 313, 5385)), ""),
        # the challenge's images: the test has what is left
        (
            (8851, 6012, 11821),
            0.05,
            ((6268, 313, 2270), (6268, 313, 5385)),
            "note: --preset paper is of 8,954 and 11,653 images (normal and abnormal), here are 8,851 and 17,833: "
            "taken for training 6,268 and 6,268, validation 313 and 313, test 2,270 and 5,385\n",
        ),
        ((8851, 6012, 11821), 0, ((6268, 0, 2583), (6268, 0, 5385)), "validation 0 and 0, test 2,583 and 5,385"),
        ((6270, 0, 11653), 0.05, ((6268, 1, 1), (6268, 313, 5072)), "test 1 and 5,072"),
        # fewer than training takes: 6,267 / 8,954 = 0.69991
        (
            (6267, 0, 11653),
            0,
            ((4387, 0, 1880), (4387, 0, 3769)),
            "test 1,880 and 3,769, the paper's numbers times 0.6",
        ),
        ((10, 6, 7), 0.05, ((7, 1, 2), (7, 1, 5)), "times 0.001116"),
        ((1, 0, 1), 0.05, ((1, 0, 0), (1, 0, 0)), "times 8.581e-05"),
    ],
)
def test_preset_has_the_papers_numbers_or_all_of_them_smaller(counts, validation, expected, note, capsys):
    items = [{"label": label} for label, count in enumerate(counts) for _ in range(count)]

    goals = rsna._preset_goals(rsna.Preset.paper, items, validation)

    assert {labels: tuple(goal.values()) for labels, goal in goals.items()} == {(0,): expected[0], (1, 2): expected[1]}
    error = capsys.readouterr().err
    assert note in error
    assert bool(error) == bool(note)


def test_preset_without_one_of_the_classes_is_refused():
    with pytest.raises(UserError, match="needs normal and abnormal images"):
        rsna._preset_goals(rsna.Preset.paper, [{"label": 0}], 0)


@pytest.mark.usefixtures("in_this_process")
def test_preset_draws_its_numbers_and_leaves_out_the_rest(tmp_path, capsys):
    images = {f"i{number}": ((0 if number < 10 else 1 + number % 2), _pixels(number)) for number in range(30)}
    root = _organised(tmp_path / "o", images)
    boxes = _boxes(tmp_path / "b.csv", dict.fromkeys(images, (0, 0, 16, 16)))

    assert _crop(root, tmp_path / "t", boxes, "--size", 16, "--preset", "paper", "--validation", 0.2) == 0

    said = capsys.readouterr().out
    assert "left out by --preset paper: 6 images" in said
    assert "datalist_abnormal.json: training 7, validation 1, test 6" in said
    found = {name: Counter(i["split"] for i in _items(tmp_path / "t", f"datalist_{name}")) for name in LISTS}
    assert found["normal"] == {"training": 7, "validation": 1, "test": 2}
    assert found["abnormal"] == {"training": 7, "validation": 1, "test": 6}
    assert json.loads((tmp_path / "t/datalist.json").read_text())["preset"] == "paper"
    assert len(list((tmp_path / "t/images").iterdir())) == 30  # another choice needs no new crops
    assert _crop(root, tmp_path / "t", boxes, "--size", 16) == 0
    assert len(_items(tmp_path / "t")) == 30


@pytest.mark.usefixtures("in_this_process")
def test_lists_of_the_classes_are_parts_of_the_whole_and_no_patient_is_divided(phantom, tmp_path):
    assert _crop(phantom / "organised", tmp_path / "t", phantom / "boxes.csv", "--size", 64) == 0

    items = _items(tmp_path / "t")
    assert len(items) == 32
    homes = {}
    for item in items:
        assert homes.setdefault(item["patient"], item["split"]) == item["split"]
    assert len(homes) == 16
    for name, labels in LISTS.items():
        assert _items(tmp_path / "t", f"datalist_{name}") == [item for item in items if item["label"] in labels]
    assert {item["split"] for item in items if item["label"] == 0} == set(SPLITS)
    # a bundle of three classes trains on it as it is
    loaded = load_classes(tmp_path / "t/datalist.json", "training", num_classes=3)
    assert {item["label"] for item in loaded} == {0, 1, 2}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--preset", "paper", "--split", 1, 0, 0), 2, "--preset excludes --split"),
        (("--split", 0.9, 0.2, 0.1), 1, "split fractions must be 0 or more and sum to 1"),
        (("--preset", "paper", "--validation", 0.7), 2, "'--validation'"),
        (("--validation", 0.1), 2, "--validation goes with --preset"),
        (("--aspect", "squash"), 2, "'stretch', 'keep'"),
    ],
)
def test_wrong_options_are_one_line_before_anything_is_written(phantom, tmp_path, capsys, arguments, code, message):
    assert _crop(phantom / "organised", tmp_path / "t", phantom / "boxes.csv", *arguments) == code

    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "t").exists()


# ---------------------------------------------------------------------------------------------------------------------
# both steps


@pytest.mark.parametrize("step", ["organise", "crop"])
def test_result_is_the_same_for_any_number_of_workers(phantom, tmp_path, step):
    for workers in (1, 2):
        target = tmp_path / f"t{workers}"
        if step == "organise":
            assert _organise(phantom / "source", target, "--size", 48, "--workers", workers) == 0
        else:
            assert _crop(phantom / "organised", target, phantom / "boxes.csv", "--size", 48, "--workers", workers) == 0

    assert _tree(tmp_path / "t1") == _tree(tmp_path / "t2")


@pytest.mark.parametrize("step", ["organise", "crop"])
def test_killed_run_goes_on_and_ends_like_an_undisturbed_one(tmp_path, monkeypatch, step):
    names = [f"n{number}" for number in range(40)]
    if step == "organise":
        source = _source(tmp_path / "s", [f"{n},,,,,0" for n in names], [f"{n},{NORMAL}" for n in names])
        for number, name in enumerate(names):
            _dicom(source / IMAGES / f"{name}.dcm", _pixels(number, (600, 600)))
        options = ["organise", "--source", source, "--size", 512]
    else:
        root = _organised(tmp_path / "s", {name: (0, _pixels(number, (600, 600))) for number, name in enumerate(names)})
        boxes = _boxes(tmp_path / "b.csv", dict.fromkeys(names, (0, 0, 600, 500)))
        options = ["crop", "--source", root, "--boxes", boxes, "--size", 512]
    monkeypatch.setattr(c, "_pool", convert_here)
    assert _run(*options, "--target", tmp_path / "undisturbed") == 0

    for attempt in range(5):  # on a busy machine a run may be over before the signal reaches it
        target = tmp_path / f"target{attempt}"
        journal = target / c.JOURNAL
        command = [sys.executable, "-m", "preprocessing.rsna", *options, "--target", target, "--workers", 2]
        process = subprocess.Popen([str(part) for part in command], cwd=REPO, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (journal.exists() and journal.read_text().count("\n") > 4):
            time.sleep(0.01)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        if process.wait():
            break

    assert process.returncode == -signal.SIGKILL
    assert not (target / "datalist.json").exists()
    assert 0 < journal.read_text().count("\n") - 1 < 40
    for path in (target / "images").iterdir():
        Image.open(path).load()  # whole, or not there
    assert _run(*options, "--target", target) == 0
    assert _tree(target) == _tree(tmp_path / "undisturbed")


def test_command_imports_no_framework():
    code = (
        "import sys, preprocessing.rsna\n"
        "heavy = {'torch', 'monai', 'transformers'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )

    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr


def test_help_names_the_steps_and_an_unknown_one_is_a_usage_error(capsys):
    assert c.main(rsna.app, ["--help"]) == 0
    assert {"organise", "crop"} <= set(capsys.readouterr().out.split())
    assert c.main(rsna.app, ["organize"]) == 2
    assert "organize" in capsys.readouterr().err
