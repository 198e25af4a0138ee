"""The CT phantom: attenuation and place of the organs, findings, and files that others read as what was drawn."""

from __future__ import annotations

import csv
import json
from itertools import combinations

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from scipy.ndimage import binary_erosion, binary_fill_holes, center_of_mass, label

from medgen.data.phantom import (
    CT_FINDINGS,
    AbdomenAnatomy,
    AbdomenFinding,
    AbdomenPhantom,
    AbdomenScan,
    PhantomSpec,
    draw_ct_studies,
    write_phantom,
)
from medgen.errors import UserError

SEEDS = range(6)
SPEC = PhantomSpec(patients=6, size=48, seed=3, anomaly_fraction=0.5)


def patient(seed):
    rng = np.random.default_rng(seed)
    return AbdomenPhantom(AbdomenAnatomy.draw(rng), AbdomenScan.draw(rng))


def body_of(volume):
    """The largest part above -300 HU: the patient without the couch."""
    parts, _ = label(volume.image > -300)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return parts == sizes.argmax()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("ct") / "phantom"
    lines = write_phantom("liver_ct", out, SPEC)
    with open(out / "truth.csv", encoding="utf-8", newline="") as file:
        return out, list(csv.DictReader(file)), list(draw_ct_studies(SPEC)), lines


# --- the volume ---


@pytest.mark.parametrize("size", [32, 64, 100])
def test_volume_is_hounsfield_units_of_the_size_asked_for(size):
    volume = patient(0).render(size)

    assert volume.image.shape == volume.liver_mask.shape == volume.anomaly_mask.shape == (size, size, 24)
    assert volume.image.dtype == np.int16
    assert volume.image.min() >= -1024
    assert volume.image.max() <= 3071
    assert volume.spacing == pytest.approx((380 / size, 380 / size, 8))
    assert not volume.anomaly_mask.any()


@pytest.mark.parametrize("seed", SEEDS)
def test_liver_lies_on_the_left_of_the_image_and_the_spine_at_its_bottom(seed):
    volume = patient(seed).render(64)
    body = body_of(volume)

    middle_row, middle_column, _ = center_of_mass(body)
    _, liver_column, liver_slice = center_of_mass(volume.liver_mask)
    bone = (volume.image > 250) & (np.abs(np.arange(64) - middle_column) < 5)[None, :, None]
    assert liver_column < middle_column - 4  # the patient's right
    assert 8 < liver_slice < 18
    assert center_of_mass(bone)[0] > middle_row + 3
    # air over fluid in the stomach, which is on the patient's left
    filled = np.stack([binary_fill_holes(body[:, :, n]) for n in range(10, 18)], axis=2)
    gas = filled & (volume.image[:, :, 10:18] < -930)  # the lungs are denser
    assert center_of_mass(gas)[0] < middle_row
    assert center_of_mass(gas)[1] > middle_column


@pytest.mark.parametrize("seed", SEEDS)
def test_tissues_have_the_attenuation_of_a_portal_venous_ct(seed):
    phantom = patient(seed)
    volume = phantom.render(96)

    liver = volume.image[binary_erosion(volume.liver_mask, iterations=2)]
    assert np.median(liver) == pytest.approx(phantom.anatomy.liver, abs=8)
    assert liver.std() > phantom.scan.noise * 0.8
    corner = volume.image[:6, :6].astype(float)
    assert corner.mean() == pytest.approx(-1000, abs=2)
    assert corner.std() == pytest.approx(phantom.scan.noise, rel=0.15)
    values = volume.image[body_of(volume)]
    for low, high in ((-130, -70), (45, 75), (300, 800)):  # fat, muscle, bone
        assert 0.005 < ((values > low) & (values < high)).mean()


def test_liver_is_one_organ_of_a_plausible_volume():
    litres = []
    for seed in SEEDS:
        mask = patient(seed).render(64).liver_mask
        parts, _ = label(mask)
        assert np.bincount(parts.ravel())[1:].max() > 0.97 * mask.sum()
        litres.append(mask.sum() * (0.38 / 64) ** 2 * 0.008 * 1000)

    assert 1 < min(litres) < max(litres) < 3


def test_no_two_patients_are_alike_and_one_is_alike_at_every_size():
    livers = [patient(seed).render(64).liver_mask for seed in SEEDS]
    overlaps = [(a & b).sum() / (a | b).sum() for a, b in combinations(livers, 2)]
    large = patient(0).render(128)

    reduced = large.liver_mask.reshape(64, 2, 64, 2, 24).mean(axis=(1, 3)) > 0.5
    assert max(overlaps) < 0.95
    assert (reduced & livers[0]).sum() / (reduced | livers[0]).sum() > 0.93


# --- findings ---


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("seed", SEEDS)
def test_needle_is_metal_that_reaches_from_outside_into_the_liver(size, seed):
    phantom = patient(seed)
    normal, pierced = phantom.render(size), phantom.render(size, [AbdomenFinding("Needle", seed)])
    mask = pierced.anomaly_mask

    assert pierced.image[mask].min() > 1000
    assert np.median(pierced.image[mask]) > 1500
    assert (normal.image[mask] < 700).all()
    assert mask.any(axis=(0, 1)).sum() <= 3
    assert (mask & normal.liver_mask).any()
    assert (mask & ~body_of(normal)).any()
    # streaks are mild, and in the slices of the needle only
    change = (pierced.image - normal.image)[..., ~mask.any(axis=(0, 1))]
    assert np.abs(change).max() <= 200


@pytest.mark.parametrize("seed", SEEDS)
def test_ascites_is_fluid_beside_the_liver_which_shrinks(seed):
    phantom = patient(seed)
    normal, filled = phantom.render(64), phantom.render(64, [AbdomenFinding("Ascites", seed)])
    mask = filled.anomaly_mask

    core = binary_erosion(mask)
    assert filled.image[core].mean() == pytest.approx(10, abs=5)
    assert 300 < mask.sum()
    assert not (mask & filled.liver_mask).any()
    assert not (filled.liver_mask & ~normal.liver_mask).any()
    assert filled.liver_mask.sum() < normal.liver_mask.sum()
    far = ~mask & (filled.image != normal.image)
    assert far.mean() < 0.05  # edges of the fluid, whose pixels it shares


def test_wrong_sizes_and_findings_are_refused():
    with pytest.raises(UserError, match="size must be from 32 to 2048 pixels, got 16"):
        patient(0).render(16)
    with pytest.raises(UserError, match=r"one of Ascites, Needle, got 'Nodule'"):
        AbdomenFinding("Nodule", 0)


# --- the files ---


def test_truth_names_the_files_and_findings(written):
    out, rows, studies, lines = written

    assert len(rows) == len(studies) == 6
    for row, study in zip(rows, studies, strict=True):
        assert (out / "images" / row["file"]).exists()
        assert row["labels"] == study.labels
        assert bool(row["anomaly_mask"]) == bool(study.findings)
    assert {label for row in rows for label in row["labels"].split("|")} == {*CT_FINDINGS, "No Finding"}
    assert "6 synthetic CT scans of 6 patients, 3 with findings" in lines[0]
    assert "preprocessing.liver_ct" in lines[2]
    assert json.loads((out / "phantom.json").read_text())["layout"] == "liver_ct"


def test_nifti_and_masks_show_the_phantom_in_any_order_of_axes(written):
    out, rows, studies, _ = written
    orders = set()

    for row, study in zip(rows, studies, strict=True):
        expected = study.phantom.render(SPEC.size, study.findings)
        files = [(row["liver_mask"], expected.liver_mask), (row["anomaly_mask"], expected.anomaly_mask)]
        if row["file"].endswith(".nii.gz"):
            files.append((f"images/{row['file']}", expected.image))
        for file, values in files:
            if not file:
                continue
            # an independent reader: its LPS is rows to the back, columns to the left, slices upwards
            image = sitk.DICOMOrient(sitk.ReadImage(str(out / file)), "LPS")
            np.testing.assert_array_equal(sitk.GetArrayFromImage(image), values.transpose(2, 0, 1))
            assert image.GetSpacing() == pytest.approx(np.array(expected.spacing)[[1, 0, 2]])
            orders.add(nibabel.aff2axcodes(nibabel.load(out / file).affine))
    assert len(orders) == 3


def test_dicom_series_shows_the_phantom_to_an_independent_reader(written):
    out, rows, studies, _ = written
    chosen = [(row, study) for row, study in zip(rows, studies, strict=True) if not row["file"].endswith(".nii.gz")]
    assert len(chosen) == 3

    for row, study in chosen:
        expected = study.phantom.render(SPEC.size, study.findings)
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(out / "images" / row["file"])))
        image = reader.Execute()
        np.testing.assert_array_equal(sitk.GetArrayFromImage(image), expected.image.transpose(2, 0, 1))
        mask = sitk.DICOMOrient(sitk.ReadImage(str(out / row["liver_mask"])), "LPS")
        assert image.GetOrigin() == pytest.approx(mask.GetOrigin(), abs=1e-3)
        assert image.GetDirection() == pytest.approx((1, 0, 0, 0, 1, 0, 0, 0, 1))


def test_dicom_tags_are_those_of_a_ct_and_say_that_nobody_was_imaged(written):
    out = written[0]
    files = sorted((out / "images").rglob("*.dcm"))
    heads = [pydicom.dcmread(file, stop_before_pixels=True) for file in files]

    assert len(files) == 3 * 24
    assert len({head.SOPInstanceUID for head in heads}) == len(files)
    assert len({head.SeriesInstanceUID for head in heads}) == 3
    # names do not follow the positions, as in a PACS
    first = [head for head in heads if head.PatientID == heads[0].PatientID]
    heights = [float(head.ImagePositionPatient[2]) for head in first]
    assert heights not in (sorted(heights), sorted(heights)[::-1])
    for head in heads:
        # types 1 and 2 of the CT Image IOD (PS3.3 A.3)
        for keyword in (
            *("SOPClassUID", "StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "AccessionNumber"),
            *("ReferringPhysicianName", "PatientName", "PatientBirthDate", "PatientSex", "SeriesNumber"),
            *("FrameOfReferenceUID", "PositionReferenceIndicator", "Manufacturer", "ImageType", "AcquisitionNumber"),
            *("InstanceNumber", "PatientPosition", "PixelSpacing", "ImageOrientationPatient", "SliceThickness"),
            *("RescaleSlope", "RescaleIntercept", "KVP", "Rows", "Columns", "BitsStored", "HighBit"),
        ):
            assert keyword in head, keyword
        assert (head.SOPClassUID.name, head.Modality, head.BodyPartExamined) == ("CT Image Storage", "CT", "ABDOMEN")
        assert (head.SyntheticData, head.QualityControlSubject) == ("YES", "YES")
        assert "SYNTHETIC" in head.ImageComments


def test_follow_ups_have_names_of_their_own_and_the_same_anatomy(tmp_path):
    spec = PhantomSpec(patients=1, images_per_patient=2, size=32)
    lines = write_phantom("liver_ct", tmp_path / "out", spec)

    first, second = draw_ct_studies(spec)
    names = sorted(path.name for path in (tmp_path / "out" / "labels").iterdir())
    assert names == ["PHANTOM00001_000.nii.gz", "PHANTOM00001_001.nii.gz"]
    assert first.phantom.anatomy == second.phantom.anatomy
    assert first.phantom.scan != second.phantom.scan
    assert "--patient" in lines[2]
