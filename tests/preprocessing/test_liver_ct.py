"""CT volumes to slices: orientation, what is wrong with a series, window, masks, and the datalist."""

from __future__ import annotations

import csv
import itertools
import json
import shutil

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from here import convert_here
from PIL import Image
from pydicom.uid import generate_uid

from medgen.data import load_datalist, validate_datalist
from medgen.data.phantom import PhantomSpec, draw_ct_studies, write_phantom
from medgen.data.reader import UnreadableImageError
from preprocessing import _convert as c
from preprocessing import liver_ct as module
from preprocessing.liver_ct import read_nifti

SPEC = PhantomSpec(patients=4, size=32, seed=2, anomaly_fraction=0.5)
EVERY_ORIENTATION = [
    "".join(axes) for order in itertools.permutations(("LR", "PA", "IS")) for axes in itertools.product(*order)
]


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    out = tmp_path_factory.mktemp("liver") / "phantom"
    write_phantom("liver_ct", out, SPEC)
    return out


@pytest.fixture(scope="module")
def volumes():
    """What the phantom's files hold: (H, W, S), rows to the back, columns to the left, slices upwards."""
    return [study.phantom.render(SPEC.size, study.findings) for study in draw_ct_studies(SPEC)]


@pytest.fixture
def series(phantom, tmp_path):
    """A DICOM series of 24 slices that a test may spoil."""
    shutil.copytree(phantom / "images/PHANTOM00002/PHANTOM00002", tmp_path / "source/series")
    return tmp_path / "source/series"


def run(*arguments):
    """The command; in this process, whose start is most of a small dataset's time, unless the test says how many."""
    with pytest.MonkeyPatch.context() as patch:
        if "--workers" not in arguments:
            patch.setattr(c, "_pool", convert_here)
        return c.main(module.app, [str(argument) for argument in arguments])


def volume_of(folder):
    """The one series of a folder, as the command finds and reads it."""
    (entries,), strangers = module._series_of(folder)
    assert strangers == []
    return module._assemble(entries)


def reasons_of(target):
    with open(target / "rejected.csv", newline="") as file:
        return {row["file"]: row["reason"] for row in csv.DictReader(file)}


def by_height(folder):
    heads = {path: pydicom.dcmread(path) for path in folder.iterdir()}
    return sorted(heads.items(), key=lambda entry: float(entry[1].ImagePositionPatient[2]))


def items_of(target):
    content = validate_datalist(target / "datalist.json")
    items = [item for split in ("training", "validation", "test") for item in content[split]]
    return sorted(items, key=lambda item: (item["volume"], item["slice"]))


def pixels_of(path):
    return np.asarray(Image.open(path))


def windowed(hu, low=-125, high=225):
    return (np.clip(hu, low, high) - low) / (high - low) * 255


def save_nifti(path, values, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, np.diag([-2.0, -2, 5, 1]) if affine is None else affine), path)


# ---------------------------------------------------------------------------------------------------------------------
# orientation


@pytest.mark.parametrize("axes", EVERY_ORIENTATION)
def test_every_order_of_axes_is_displayed_alike(axes, tmp_path):
    # three different sides, random values: any wrong turn shows
    values = np.random.default_rng(0).integers(-1000, 1000, (5, 7, 4)).astype(np.int16)
    image = nib.Nifti1Image(values, np.diag([2.0, 3.0, 4.0, 1.0]))
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes))
    nib.save(image.as_reoriented(turn), tmp_path / "volume.nii")

    volume = read_nifti(tmp_path / "volume.nii")

    # an independent reader; its LPS has rows to the back and columns to the patient's left
    expected = sitk.GetArrayFromImage(sitk.DICOMOrient(sitk.ReadImage(str(tmp_path / "volume.nii")), "LPS"))
    shown = np.stack([module._displayed(volume.hu[:, :, n]) for n in range(volume.hu.shape[2])])
    np.testing.assert_array_equal(shown, expected)
    assert np.linalg.norm(volume.affine[:3, :3], axis=0) == pytest.approx((2, 3, 4))
    np.testing.assert_allclose(volume.affine, np.diag([2.0, 3.0, 4.0, 1.0]), atol=1e-6)


def test_series_is_sorted_by_position_and_equals_its_phantom(phantom, volumes):
    for number in (1, 3):
        folder = phantom / f"images/PHANTOM0000{number + 1}/PHANTOM0000{number + 1}"

        volume = volume_of(folder)

        np.testing.assert_array_equal(volume.hu[::-1, ::-1].transpose(1, 0, 2), volumes[number].image)
        label = nib.as_closest_canonical(nib.load(phantom / f"labels/PHANTOM0000{number + 1}.nii.gz"))
        np.testing.assert_allclose(volume.affine, label.affine, atol=1e-4)


@pytest.mark.parametrize(
    ("orientation", "step"),
    [((0, 1, 0, 0, 0, -1), (1, 0, 0)), ((1, 0, 0, 0, 0, -1), (0, 1, 0)), ((-1, 0, 0, 0, -1, 0), (0, 0, 1))],
    ids=["sagittal", "coronal", "prone"],
)
def test_series_of_any_plane_is_read_as_another_reader_does(orientation, step, series):
    for number, (path, ds) in enumerate(by_height(series)):
        ds.ImageOrientationPatient = [str(value) for value in orientation]
        ds.ImagePositionPatient = [str(number * 8.0 * value) for value in step]
        ds.save_as(path)

    volume = volume_of(series)

    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(series)))
    expected = sitk.GetArrayFromImage(sitk.DICOMOrient(reader.Execute(), "LPS"))
    np.testing.assert_array_equal(volume.hu[::-1, ::-1].T, expected)


def test_tilted_gantry_is_taken_as_acquired(series):
    original = volume_of(series)
    tilt = np.deg2rad(15)
    for path, ds in by_height(series):
        ds.ImageOrientationPatient = ["1", "0", "0", "0", f"{np.cos(tilt):.6f}", f"{np.sin(tilt):.6f}"]
        ds.GantryDetectorTilt = "15"
        ds.save_as(path)

    volume = volume_of(series)

    np.testing.assert_array_equal(volume.hu, original.hu)


# ---------------------------------------------------------------------------------------------------------------------
# what is wrong with a series


def drop(entries):
    entries[10][0].unlink()


def double(entries):
    path, ds = entries[5]
    ds.SOPInstanceUID = generate_uid()
    ds.save_as(path.with_name("other.dcm"))


def shift(entries):
    for path, ds in entries[12:]:
        ds.ImagePositionPatient[2] = str(float(ds.ImagePositionPatient[2]) + 3)
        ds.save_as(path)


def crop(entries):
    path, ds = entries[3]
    ds.Rows = 16
    ds.PixelData = ds.PixelData[: len(ds.PixelData) // 2]
    ds.save_as(path)


def turn_one(entries):
    path, ds = entries[3]
    ds.ImageOrientationPatient = ["1", "0", "0", "0", "0", "-1"]
    ds.save_as(path)


def truncate(entries):
    path = entries[7][0]
    path.write_bytes(path.read_bytes()[:-500])


def set_all(**tags):
    def change(entries):
        for path, ds in entries:
            for keyword, value in tags.items():
                if value is None:
                    delattr(ds, keyword)
                else:
                    setattr(ds, keyword, value)
            ds.save_as(path)

    return change


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (drop, "slices are missing or unequally spaced: 16 mm instead of 8 mm between"),
        (shift, "slices are missing or unequally spaced: 11 mm instead of 8 mm"),
        (double, "1 of 25 slices lie where another does"),
        (crop, "1 of 24 slices differ from the others in size"),
        (turn_one, "1 of 24 slices differ from the others in size, orientation"),
        (truncate, "cannot be decoded"),
        (set_all(Modality="MR"), "expected Modality CT, got MR"),
        (set_all(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "a localizer"),
        (set_all(RescaleIntercept=None), "no Hounsfield units"),
        (set_all(RescaleIntercept="0"), "expected Hounsfield units, in which air and fat are negative"),
        (set_all(ImagePositionPatient=None), "24 of 24 slices have no ImagePositionPatient of 3 numbers"),
        (set_all(ImagePositionPatient=["0", "0"]), "24 of 24 slices have no ImagePositionPatient of 3 numbers"),
        (set_all(ImageOrientationPatient=["1", "0", "0"]), "24 of 24 slices have no ImageOrientationPatient of 6"),
        (set_all(ImageOrientationPatient=["0"] * 6), "no pair of perpendicular directions"),
        (set_all(PixelSpacing="2"), "24 of 24 slices have no PixelSpacing of 2 numbers"),
        (set_all(PixelSpacing=["0", "0"]), "must be above 0"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_spoiled_series_is_refused_with_the_reason(spoil, reason, series, tmp_path):
    spoil(by_height(series))

    assert run("--source", series.parent, "--target", tmp_path / "out", "--size", 16) == 1

    assert reason in reasons_of(tmp_path / "out")["series"]
    assert not list((tmp_path / "out").rglob("*.png"))


def test_copies_of_a_slice_and_localizers_do_no_harm(series):
    whole = volume_of(series)
    entries = by_height(series)
    shutil.copy(entries[4][0], series / "copy.dcm")
    path, scout = entries[0]
    scout.SOPInstanceUID, scout.ImageType = generate_uid(), ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    scout.Rows, scout.PixelData = 16, scout.PixelData[: 16 * 32 * 2]
    scout.save_as(path.with_name("scout.dcm"))

    np.testing.assert_array_equal(volume_of(series).hu, whole.hu)


def test_slices_without_their_own_uid_are_slices_all_the_same(series, tmp_path):
    whole = volume_of(series)
    set_all(SOPInstanceUID=None, SeriesInstanceUID=None, SeriesNumber=None)(by_height(series))

    np.testing.assert_array_equal(volume_of(series).hu, whole.hu)
    assert run("--source", series.parent, "--target", tmp_path / "out", "--size", 16) == 0
    assert len(items_of(tmp_path / "out")) == 24


def test_rescale_is_applied_slice_by_slice(series):
    whole = volume_of(series)
    path, ds = by_height(series)[6]
    ds.PixelData = (ds.pixel_array // 2).astype("<u2").tobytes()
    ds.RescaleSlope = "2"
    ds.save_as(path)

    assert np.abs(volume_of(series).hu - whole.hu).max() <= 1


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.full((8, 8, 4), 30, np.int16), "expected Hounsfield units"),
        (np.full((8, 8, 4), np.nan, np.float32), "not finite"),
        (np.zeros((8, 8, 4, 3), np.int16), "expected a 3-D NIfTI volume, got 4-D"),
    ],
)
def test_nifti_that_is_no_ct_volume_is_refused(values, reason, tmp_path):
    save_nifti(tmp_path / "a.nii.gz", values)

    with pytest.raises(UnreadableImageError, match=reason):
        read_nifti(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kept", [0.0, 0.6], ids=["empty", "truncated"])
def test_damaged_nifti_is_refused(suffix, kept, tmp_path):
    path = tmp_path / f"a{suffix}"
    save_nifti(path, np.random.default_rng(0).integers(-1000, 1000, (30, 30, 20)).astype(np.int16))
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])

    with pytest.raises(UnreadableImageError):
        read_nifti(path)


# ---------------------------------------------------------------------------------------------------------------------
# the command


@pytest.fixture(scope="module")
def prepared(phantom, tmp_path_factory):
    target = tmp_path_factory.mktemp("prepared") / "target"
    code = run(
        *("--source", phantom / "images", "--masks", phantom / "labels", "--anomalies", phantom / "anomalies"),
        *("--target", target, "--size", 32, "--workers", 2),
    )
    assert code == 0
    return target


def test_slices_are_the_phantoms_in_the_window_whatever_the_file(prepared, volumes):
    items = items_of(prepared)

    assert len(items) == 4 * 24
    for item in items:
        volume = volumes[int(item["patient"][-1]) - 1]
        number = item["slice"]
        grey = pixels_of(prepared / item["image"])
        np.testing.assert_allclose(grey, windowed(volume.image[..., number]), atol=0.5 + 1e-4)
        np.testing.assert_array_equal(pixels_of(prepared / item["mask"]), volume.liver_mask[..., number] * 255)
        anomalous = volume.anomaly_mask[..., number]
        assert item["anomaly"] == int(anomalous.any())
        assert ("anomaly_mask" in item) == bool(anomalous.any())
        if anomalous.any():
            np.testing.assert_array_equal(pixels_of(prepared / item["anomaly_mask"]), anomalous * 255)
        assert item["image"].endswith(f"_{number:04d}.png")


def test_anomalous_patients_are_tested_and_nobody_is_divided(prepared):
    content = validate_datalist(prepared / "datalist.json")  # refuses a patient in two splits

    told = {item["patient"] for split in ("training", "validation", "test") for item in content[split]}
    ill = {item["patient"] for item in items_of(prepared) if item["anomaly"]}
    assert told == {f"PHANTOM0000{n}" for n in range(1, 5)}
    assert len(ill) == 2
    assert ill <= {item["patient"] for item in content["test"]}
    assert content["training"]
    assert not any(item["anomaly"] for item in content["training"])
    assert content["window"] == {"level": 50.0, "width": 350.0, "unit": "HU"}
    assert len(load_datalist(prepared / "datalist.json", "test")) == len(content["test"])


def test_only_slices_with_liver_or_only_their_first_run(tmp_path):
    values = np.random.default_rng(0).integers(-200, 200, (16, 16, 12)).astype(np.int16)
    mask = np.zeros((16, 16, 12), np.uint8)
    mask[4:8, 4:8, [2, 3, 4, 7, 8]] = 1
    save_nifti(tmp_path / "in/a.nii.gz", values)
    # stored the other way round: the run is counted from the feet in any file
    flipped = nib.Nifti1Image(mask, np.diag([-2.0, -2, 5, 1]))
    turn = nib.orientations.axcodes2ornt("LPS"), nib.orientations.axcodes2ornt("LPI")
    (tmp_path / "masks").mkdir()
    nib.save(flipped.as_reoriented(nib.orientations.ornt_transform(*turn)), tmp_path / "masks/a_seg.nii.gz")
    common = ("--source", tmp_path / "in", "--masks", tmp_path / "masks", "--size", 16, "--slices")

    run(*common, "mask", "--target", tmp_path / "with")
    run(*common, "first_run", "--target", tmp_path / "run")

    assert [item["slice"] for item in items_of(tmp_path / "with")] == [2, 3, 4, 7, 8]
    assert [item["slice"] for item in items_of(tmp_path / "run")] == [2, 3, 4]


def test_window_is_the_same_grey_everywhere_and_minmax_is_not(tmp_path):
    values = np.full((16, 16, 2), -100, np.int16)
    values[4:12, 4:12] = 50
    values[6, 6, 1] = 3000  # a needle in the second slice
    save_nifti(tmp_path / "in/a.nii", values)
    common = ("--source", tmp_path / "in", "--size", 16)

    run(*common, "--target", tmp_path / "fixed", "--level", 40, "--width", 400)
    run(*common, "--target", tmp_path / "minmax", "--per_slice_minmax")

    fixed, minmax = (
        [pixels_of(tmp_path / name / item["image"]) for item in items_of(tmp_path / name)]
        for name in ("fixed", "minmax")
    )
    liver = np.rint(windowed(50, -160, 240))
    # the file's axes are LPS, as displayed, but for rows and columns
    assert [picture[8, 8] for picture in fixed] == [liver, liver]
    assert fixed[1][6, 6] == 255
    assert minmax[0][8, 8] == 255
    assert minmax[1][8, 8] == pytest.approx(255 * (50 + 100) / (225 + 100), abs=1)
    assert minmax[0].min() == minmax[1].min() == 0


def test_nifti_slices_keep_hounsfield_units_and_their_place(phantom, volumes, tmp_path):
    common = ("--source", phantom / "images", "--masks", phantom / "labels", "--format", "nifti")
    for size in (32, 16):
        assert run(*common, "--target", tmp_path / str(size), "--size", size) == 0

    for item in items_of(tmp_path / "32")[5::24]:
        volume = volumes[int(item["patient"][-1]) - 1]
        path = tmp_path / "32" / item["image"]
        array = sitk.GetArrayFromImage(sitk.DICOMOrient(sitk.ReadImage(str(path)), "LPS"))[0]
        np.testing.assert_array_equal(array, np.clip(volume.image[..., 5], -125, 225))
        mask = sitk.GetArrayFromImage(sitk.DICOMOrient(sitk.ReadImage(str(tmp_path / "32" / item["mask"])), "LPS"))[0]
        np.testing.assert_array_equal(mask, volume.liver_mask[..., 5])
        large, small = nib.load(path), nib.load(tmp_path / "16" / item["image"])
        assert (float(large.header["cal_min"]), float(large.header["cal_max"])) == (-125, 225)
        assert small.shape == (16, 16, 1)
        for corner in (0, 1):  # edges, not centres, of the first and the last pixel
            ends = [
                image.affine @ (corner * n - 0.5, corner * n - 0.5, 0, 1) for image, n in ((large, 32), (small, 16))
            ]
            np.testing.assert_allclose(*ends, atol=1e-3)


def test_both_formats_are_read_as_the_same_grey(phantom, tmp_path):
    from medgen.data import MedicalImageReader  # imports PyTorch, which no other test of this file needs

    for file_format in ("png", "nifti"):
        run(
            *("--source", phantom / "images", "--target", tmp_path / file_format, "--size", 24, "--mask", "none"),
            *("--format", file_format),
        )
    reader = MedicalImageReader()

    pairs = zip(items_of(tmp_path / "png"), items_of(tmp_path / "nifti"), strict=True)
    for picture, volume in itertools.islice(pairs, 0, None, 8):
        greys = [
            reader.get_data(reader.read(tmp_path / name / item["image"]))[0]
            for name, item in (("png", picture), ("nifti", volume))
        ]
        np.testing.assert_allclose(greys[1], greys[0], atol=1 / 255)


def test_pixels_that_are_not_square_become_so(tmp_path):
    values = np.random.default_rng(0).integers(-120, 220, (20, 30, 2)).astype(np.int16)
    save_nifti(tmp_path / "in/a.nii", values, np.diag([-3.0, -1, 5, 1]))  # 60 mm wide, 30 mm deep

    run("--source", tmp_path / "in", "--target", tmp_path / "out", "--size", 30)

    assert pixels_of(tmp_path / "out" / items_of(tmp_path / "out")[0]["image"]).shape == (30, 60)


def test_body_mask_holds_the_air_inside_but_not_the_couch(phantom, volumes, tmp_path):
    run("--source", phantom / "images", "--target", tmp_path / "out", "--size", 32)

    for item in items_of(tmp_path / "out")[3::8]:
        mask = pixels_of(tmp_path / "out" / item["mask"]) > 0
        image = volumes[int(item["patient"][-1]) - 1].image[..., item["slice"]]
        rows = np.flatnonzero(mask.any(axis=1))
        assert 0.2 < mask.mean() < 0.6
        assert (image[mask] > -300).mean() > 0.5
        assert mask[rows[len(rows) // 2], 16]
        assert not mask[-3:].any()
        assert "anomaly" not in item


def test_labels_of_other_organs_are_no_liver(tmp_path):
    values = np.random.default_rng(0).integers(-200, 200, (16, 16, 3)).astype(np.int16)
    mask = np.zeros((16, 16, 3), np.uint8)
    mask[2:6, 2:6, 0], mask[2:6, 2:6, 1] = 5, 6
    save_nifti(tmp_path / "in/volume-7.nii", values)
    save_nifti(tmp_path / "in/segmentation-7.nii", mask)  # LiTS' names, in the same folder

    run(
        *("--source", tmp_path / "in", "--masks", tmp_path / "in", "--target", tmp_path / "out", "--size", 16),
        *("--slices", "mask", "--mask_label", 6),
    )

    items = items_of(tmp_path / "out")
    assert [(item["volume"], item["slice"]) for item in items] == [("volume-7", 1)]


def test_bad_volumes_are_rejected_with_reasons_and_the_rest_goes_on(phantom, series, tmp_path, capsys):
    source = series.parent
    by_height(series)[3][0].unlink()
    shutil.copy(phantom / "images/PHANTOM00001.nii.gz", source / "good.nii.gz")
    shutil.copy(phantom / "images/PHANTOM00001.nii.gz", source / "unmasked.nii.gz")
    shutil.copy(phantom / "images/PHANTOM00001.nii.gz", source / "other grid.nii.gz")
    (source / "broken.nii.gz").write_bytes(b"\x1f\x8b nothing")
    (source / "report").mkdir()
    (source / "report/letter.doc").write_text("no image")
    labels = tmp_path / "labels"
    labels.mkdir()
    shutil.copy(phantom / "labels/PHANTOM00001.nii.gz", labels / "good.nii.gz")
    shutil.copy(phantom / "labels/PHANTOM00002.nii.gz", labels / "PHANTOM00002.nii.gz")
    save_nifti(labels / "other grid.nii.gz", np.ones((32, 32, 23), np.uint8))

    code = run("--source", source, "--masks", labels, "--target", tmp_path / "out", "--size", 32)

    reasons = reasons_of(tmp_path / "out")
    assert code == 3
    assert {file: reason[:24] for file, reason in reasons.items()} == {
        "broken.nii.gz": reasons["broken.nii.gz"][:24],
        "other grid.nii.gz": "mask other grid.nii.gz h",
        "report": "no DICOM images in this ",
        "series": "slices are missing or un",
        "unmasked.nii.gz": "no mask of the name unma",
    }
    assert {item["volume"] for item in items_of(tmp_path / "out")} == {"good"}
    assert "rejected 5 files" in capsys.readouterr().out


def test_several_series_of_a_folder_are_volumes_of_their_own(phantom, series, tmp_path):
    other = generate_uid()
    for path, ds in by_height(series)[::2]:
        ds.SeriesInstanceUID, ds.SOPInstanceUID, ds.SeriesNumber = other, generate_uid(), 2
        ds.save_as(path.with_name(f"second{path.name}"))

    code = run("--source", series.parent, "--target", tmp_path / "out", "--size", 32)

    assert code == 0
    volumes = [item["volume"] for item in items_of(tmp_path / "out")]
    assert (volumes.count("series-1"), volumes.count("series-2")) == (24, 12)
    assert {item["patient"] for item in items_of(tmp_path / "out")} == {"PHANTOM00002"}


def test_a_bad_series_costs_neither_the_good_one_beside_it_nor_leaves_pictures(series, tmp_path, monkeypatch):
    for number, (path, ds) in enumerate(by_height(series)):
        for series_number, tags in ((2, {"ImagePositionPatient": ["0", "0"]}), (3, {"PatientName": "odd"})):
            ds.SeriesInstanceUID, ds.SOPInstanceUID = f"1.2.{series_number}", f"1.2.{series_number}.{number}"
            ds.SeriesNumber = series_number
            for keyword, value in tags.items():
                setattr(ds, keyword, value)
            ds.save_as(path.with_name(f"{series_number} {path.name}"))
            if "ImagePositionPatient" in tags:
                ds.ImagePositionPatient = ["0", "0", str(8.0 * number)]
    # what no check foresees, after some pictures are written
    marked = module._Task._region

    def fail_late(self, hu, liver, spacing):
        calls.append(1)
        if len(calls) == 24 + 5:
            raise KeyError("odd")
        return marked(self, hu, liver, spacing)

    calls = []
    monkeypatch.setattr(module._Task, "_region", fail_late)

    code = run("--source", series.parent, "--target", tmp_path / "out", "--size", 16)

    assert code == 3
    items = items_of(tmp_path / "out")
    assert [item["volume"] for item in items] == ["series-1"] * 24
    first, second = reasons_of(tmp_path / "out")["series"].split("; ")
    assert first == "series-2: 24 of 24 slices have no ImagePositionPatient of 3 numbers"
    assert second == "series-3: its headers or voxels make no CT volume (KeyError: 'odd')"
    on_disk = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png")}
    assert on_disk == {item[key] for item in items for key in ("image", "mask")}


def test_patient_is_found_in_the_path(phantom, tmp_path):
    for name in ("p1_a", "p1_b", "p2_a"):
        (tmp_path / "in").mkdir(exist_ok=True)
        shutil.copy(phantom / "images/PHANTOM00001.nii.gz", tmp_path / f"in/{name}.nii.gz")
    # its PatientID is another: a cohort that was made anonymous carelessly has one for all
    shutil.copytree(phantom / "images/PHANTOM00002", tmp_path / "in/p3_a")

    run("--source", tmp_path / "in", "--target", tmp_path / "out", "--size", 16, "--patient", r"(p\d)_")

    assert [item["patient"] for item in items_of(tmp_path / "out")[::24]] == ["p1", "p1", "p2", "p3"]


def test_the_same_command_again_finishes_what_is_missing(phantom, tmp_path):
    arguments = ("--source", phantom / "images", "--target", tmp_path / "out", "--size", 16)
    run(*arguments)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.png")}
    datalist = (tmp_path / "out/datalist.json").read_bytes()
    next(path for path in before if "PHANTOM00003" in path.name).unlink()
    stamps = {path: path.stat().st_mtime_ns for path in before if "PHANTOM00001" in path.name}

    run(*arguments)

    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.png")} == before
    assert (tmp_path / "out/datalist.json").read_bytes() == datalist
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_a_mask_that_was_mended_is_read_again_and_one_of_no_volume_is_reported(phantom, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(phantom / "images/PHANTOM00001.nii.gz", tmp_path / "in/a.nii.gz")
    grid = nib.load(phantom / "labels/PHANTOM00001.nii.gz")
    odd = np.zeros(grid.shape, np.uint8)
    odd[3, 3, 3] = 1
    save_nifti(tmp_path / "odd/a.nii.gz", odd, grid.affine)
    arguments = (
        *("--source", tmp_path / "in", "--anomalies", tmp_path / "odd", "--target", tmp_path / "out"),
        *("--size", 32),
    )
    assert run(*arguments) == 0
    assert sum(item["anomaly"] for item in items_of(tmp_path / "out")) == 1

    odd[3, 3, :2] = 1
    save_nifti(tmp_path / "odd/a.nii.gz", odd, grid.affine)
    save_nifti(tmp_path / "odd/b.nii.gz", odd, grid.affine)

    assert run(*arguments) == 3
    assert sum(item["anomaly"] for item in items_of(tmp_path / "out")) == 3
    assert "odd/b.nii.gz,an anomaly of no volume" in (tmp_path / "out/rejected.csv").read_text()


def test_masks_and_anomalies_that_are_added_later_are_read(phantom, tmp_path):
    shutil.copytree(phantom / "images/PHANTOM00002", tmp_path / "in/PHANTOM00002")
    shutil.copy(phantom / "images/PHANTOM00001.nii.gz", tmp_path / "in")
    (tmp_path / "masks").mkdir()
    (tmp_path / "odd").mkdir()
    arguments = (
        *("--source", tmp_path / "in", "--masks", tmp_path / "masks", "--anomalies", tmp_path / "odd"),
        *("--target", tmp_path / "out", "--size", 16, "--split", 1, 0, 0),
    )
    shutil.copy(phantom / "labels/PHANTOM00001.nii.gz", tmp_path / "masks")
    assert run(*arguments) == 3
    assert list(reasons_of(tmp_path / "out")) == ["PHANTOM00002/PHANTOM00002"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")}

    shutil.copy(phantom / "labels/PHANTOM00002.nii.gz", tmp_path / "masks/PHANTOM00002_seg.nii.gz")
    assert run(*arguments) == 0
    assert {item["patient"]: item["anomaly"] for item in items_of(tmp_path / "out")} == {
        "PHANTOM00001": 0,
        "PHANTOM00002": 0,
    }
    assert {path: path.stat().st_mtime_ns for path in before} == before

    grid = nib.load(phantom / "labels/PHANTOM00002.nii.gz")
    odd = np.zeros(grid.shape, np.uint8)
    odd[3:9, 3:9, 3] = 1
    (tmp_path / "odd/PHANTOM00002").mkdir()
    save_nifti(tmp_path / "odd/PHANTOM00002/PHANTOM00002.nii.gz", odd, grid.affine)
    assert run(*arguments) == 0
    content = validate_datalist(tmp_path / "out/datalist.json")
    assert {item["patient"] for item in content["training"]} == {"PHANTOM00001"}
    assert sum(item["anomaly"] for item in content["test"]) == 1


def test_slices_written_anew_in_place_are_read_again(series, tmp_path):
    arguments = ("--source", series.parent, "--target", tmp_path / "out", "--size", 32)
    run(*arguments)
    before = pixels_of(tmp_path / "out" / items_of(tmp_path / "out")[5]["image"])
    status = series.stat()
    path, ds = by_height(series)[5]
    ds.RescaleIntercept = str(float(ds.RescaleIntercept) + 100)
    with open(path, "r+b") as file:  # no file comes or goes, so the folder stays as it was
        ds.save_as(file)
    assert series.stat().st_mtime_ns == status.st_mtime_ns

    run(*arguments)

    assert not np.array_equal(pixels_of(tmp_path / "out" / items_of(tmp_path / "out")[5]["image"]), before)


@pytest.fixture
def kits(tmp_path):
    """KiTS' layout: volumes of one name in folders, with different voxels."""
    rng = np.random.default_rng(0)
    for case in ("case1", "case2"):
        save_nifti(tmp_path / f"in/{case}/imaging.nii.gz", rng.integers(-200, 200, (16, 16, 3)).astype(np.int16))
    (tmp_path / "masks").mkdir()
    return "--source", tmp_path / "in", "--masks", tmp_path / "masks", "--target", tmp_path / "out", "--size", 16


def slab(number):
    mask = np.zeros((16, 16, 3), np.uint8)
    mask[4:9, 4:9, number] = 1
    return mask


def test_masks_of_equal_names_are_told_apart_by_their_folders(kits, tmp_path, capsys):
    save_nifti(tmp_path / "masks/case1/imaging.nii.gz", slab(1))
    save_nifti(tmp_path / "masks/case2/imaging_seg.nii.gz", slab(2))

    assert run(*kits, "--slices", "mask") == 0

    items = items_of(tmp_path / "out")
    assert [(item["volume"], item["slice"]) for item in items] == [("case1/imaging", 1), ("case2/imaging", 2)]
    # nor are they one patient
    assert [item["patient"] for item in items] == ["case1/imaging", "case2/imaging"]
    assert "say how with --patient" in capsys.readouterr().err


def test_a_mask_that_two_volumes_would_take_is_refused_until_it_has_a_name(kits, tmp_path):
    save_nifti(tmp_path / "masks/imaging.nii.gz", slab(1))

    assert run(*kits) == 1

    assert reasons_of(tmp_path / "out")["case2/imaging.nii.gz"] == (
        "imaging.nii.gz is called like 2 volumes (case1/imaging, case2/imaging); name the file case2/imaging.nii.gz"
    )
    assert not list((tmp_path / "out").rglob("*.png"))
    for case in ("case1", "case2"):
        save_nifti(tmp_path / f"masks/{case}/imaging.nii.gz", slab(1))
    assert run(*kits) == 0
    assert len(items_of(tmp_path / "out")) == 6


@pytest.mark.parametrize("folders", [("pre", "post"), ("both", "both")], ids=["folders", "series of one folder"])
def test_an_anomaly_file_of_a_patient_with_two_series_needs_the_series(folders, phantom, tmp_path):
    for name, folder in zip(("1.2.1", "1.2.2"), folders, strict=True):
        (tmp_path / "in" / folder).mkdir(parents=True, exist_ok=True)
        for number, path in enumerate((phantom / "images/PHANTOM00002/PHANTOM00002").iterdir()):
            ds = pydicom.dcmread(path)
            ds.SeriesInstanceUID, ds.SOPInstanceUID = name, f"{name}.{number}"
            ds.save_as(tmp_path / "in" / folder / f"{name}.{number}.dcm")
    shutil.copy(phantom / "images/PHANTOM00001.nii.gz", tmp_path / "in")
    grid = nib.load(phantom / "labels/PHANTOM00002.nii.gz")
    odd = np.zeros(grid.shape, np.uint8)
    odd[3:9, 3:9, 3] = 1
    save_nifti(tmp_path / "odd/PHANTOM00002.nii.gz", odd, grid.affine)
    arguments = (
        *("--source", tmp_path / "in", "--anomalies", tmp_path / "odd", "--target", tmp_path / "out"),
        *("--size", 16, "--mask", "none"),
    )

    assert run(*arguments) == 3
    assert {item["patient"] for item in items_of(tmp_path / "out")} == {"PHANTOM00001"}
    assert set(reasons_of(tmp_path / "out")) == set(folders)
    assert all("is called like 2 volumes" in reason for reason in reasons_of(tmp_path / "out").values())
    assert len(list((tmp_path / "out").rglob("*.png"))) == 24

    (tmp_path / "odd/PHANTOM00002.nii.gz").rename(tmp_path / "odd/1.2.2.nii.gz")
    assert run(*arguments) == 0
    marked = {item["volume"] for item in items_of(tmp_path / "out") if item["anomaly"]}
    assert marked == {"post" if folders[0] == "pre" else "both-2"}
    assert len(items_of(tmp_path / "out")) == 3 * 24


def test_volume_is_not_its_own_mask_however_the_folder_is_spelled(tmp_path, monkeypatch):
    save_nifti(tmp_path / "in/volume-7.nii", np.random.default_rng(0).integers(-200, 200, (16, 16, 3)).astype(np.int16))
    save_nifti(tmp_path / "in/segmentation-7.nii", slab(1))
    monkeypatch.chdir(tmp_path)

    assert run("--source", "in", "--masks", "in", "--target", "out", "--size", 16, "--slices", "mask") == 0

    assert [item["slice"] for item in items_of(tmp_path / "out")] == [1]


def test_thin_anomaly_survives_a_smaller_size(tmp_path):
    values = np.random.default_rng(0).integers(-120, 220, (128, 128, 1)).astype(np.int16)
    mask = np.zeros((128, 128, 1), np.uint8)
    mask[64, 20:100] = 1
    save_nifti(tmp_path / "in/a.nii", values)
    save_nifti(tmp_path / "odd/a.nii", mask)

    run("--source", tmp_path / "in", "--anomalies", tmp_path / "odd", "--target", tmp_path / "out", "--size", 16)

    item = items_of(tmp_path / "out")[0]
    assert item["anomaly"] == 1
    assert 8 <= (pixels_of(tmp_path / "out" / item["anomaly_mask"]) > 0).sum() <= 24


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--slices", "mask"), 2, "need --masks DIR"),
        (("--width", "0"), 2, "--width must be above 0"),
        (("--format", "nifti", "--per-slice-minmax"), 2, "keeps HU"),
        (("--masks", "nowhere"), 1, "--masks must be a folder"),
        (("--patient", "("), 2, "regular expression"),
        (("--masks", ".", "--anomalies", "."), 2, "another folder"),
        (("--slices", "some"), 2, "some"),
    ],
)
def test_wrong_usage_is_one_line(phantom, tmp_path, capsys, arguments, code, message):
    assert run("--source", phantom / "images", "--target", tmp_path / "out", *arguments) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_source_without_volumes_says_so(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/readme.txt").write_text(json.dumps({}))

    assert run("--source", tmp_path / "in", "--target", tmp_path / "out") == 1
    assert "expected NIfTI volumes or DICOM series" in capsys.readouterr().err
