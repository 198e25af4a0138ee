"""Phantoms: what a radiograph must show, what the masks promise, and what readers of the files must find."""

from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.pixels import apply_voi_lut
from scipy.ndimage import binary_dilation
from skimage.measure import label, regionprops

from medgen.data.phantom import (
    FINDINGS,
    LAYOUTS,
    Acquisition,
    Anatomy,
    Finding,
    PhantomSpec,
    ThoraxPhantom,
    draw_studies,
    make_thorax,
    write_phantom,
)
from medgen.errors import UserError

SEEDS = range(16)
# ChestX-ray14's vocabulary (Wang et al. 2017, with the six classes of the released version)
CHESTXRAY14_LABELS = {
    *("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax"),
    *("Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia"),
}


def patient(seed: int) -> ThoraxPhantom:
    rng = np.random.default_rng(seed)
    return ThoraxPhantom(Anatomy.draw(rng), Acquisition.draw(rng))


def lungs_from_left_to_right(mask: np.ndarray) -> list:
    return sorted(regionprops(label(mask)), key=lambda region: region.centroid[1])


def upright(seed: int) -> ThoraxPhantom:
    """An erect patient who stands straight: left and right can be compared row by row."""
    phantom = patient(seed)
    still = replace(phantom.acquisition, view="PA", roll=0.0, yaw=0.0, shift=(0.0, 0.0))
    return ThoraxPhantom(replace(phantom.anatomy, scoliosis=0.0), still)


def domes(mask: np.ndarray) -> tuple[int, int]:
    """Rows of the patient's right and left dome, in the outer quarter of each lung: the heart hides the inner."""
    right, left = lungs_from_left_to_right(mask)
    columns = (3 * right.bbox[1] + right.bbox[3]) // 4, (left.bbox[1] + 3 * left.bbox[3]) // 4
    return tuple(int(np.flatnonzero(mask[:, column]).max()) for column in columns)


def borders(mask: np.ndarray, top: float, bottom: float, over=np.mean) -> tuple[float, float]:
    """Middle column and width of what lies between the lungs, over the rows from ``top`` to ``bottom``."""
    rows = [np.flatnonzero(row) for row in mask[int(top) : int(bottom)]]
    gaps = np.array([(row[np.diff(row).argmax()], row[np.diff(row).argmax() + 1]) for row in rows])
    return float(over(gaps.mean(axis=1))), float(over(np.diff(gaps, axis=1)))


def digest(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def truth(folder: Path) -> list[dict[str, str]]:
    with open(folder / "truth.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# --- the radiograph ---


def test_same_seed_gives_the_same_bits_whatever_the_global_state():
    np.random.seed(1)
    first = make_thorax(np.random.default_rng(3), 64, findings=FINDINGS)
    np.random.seed(2)
    second = make_thorax(np.random.default_rng(3), 64, findings=FINDINGS)

    for name in ("image", "lung_mask", "anomaly_mask"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("size", [32, 50, 100, 256, 300])
def test_image_is_float32_in_zero_to_one_of_the_size_asked_for(size):
    result = make_thorax(np.random.default_rng(0), size, findings=["Mass"])

    assert result.image.shape == result.lung_mask.shape == result.anomaly_mask.shape == (size, size)
    assert result.image.dtype == np.float32
    assert result.lung_mask.dtype == result.anomaly_mask.dtype == bool
    assert result.image.min() >= 0
    assert result.image.max() <= 1
    assert np.ptp(result.image) > 0.5


def test_no_two_patients_have_the_same_lungs_under_the_same_exposure():
    still = Acquisition.draw(np.random.default_rng(0), "PA")
    lungs = [ThoraxPhantom(Anatomy.draw(np.random.default_rng(seed)), still).render(64).lung_mask for seed in range(8)]

    overlaps = [(a & b).sum() / (a | b).sum() for a, b in combinations(lungs, 2)]
    areas = [mask.sum() for mask in lungs]
    assert max(overlaps) < 0.97
    assert np.std(areas) > 0.04 * np.mean(areas)


def test_geometry_does_not_depend_on_the_size():
    findings = [Finding("Mass", 5), Finding("Support Devices", 2)]

    small, large = (patient(4).render(size, findings) for size in (128, 512))

    reduced = large.image.reshape(128, 4, 128, 4).mean(axis=(1, 3))
    lung = large.lung_mask.reshape(128, 4, 128, 4).mean(axis=(1, 3)) >= 0.5
    touched = large.anomaly_mask.reshape(128, 4, 128, 4).any(axis=(1, 3))
    assert np.corrcoef(reduced.ravel(), small.image.ravel())[0, 1] > 0.999
    assert (lung & small.lung_mask).sum() / (lung | small.lung_mask).sum() > 0.98
    assert not (small.anomaly_mask & ~binary_dilation(touched)).any()
    assert not (touched & ~binary_dilation(small.anomaly_mask)).any()


@pytest.mark.parametrize("seed", SEEDS)
def test_lungs_are_two_and_darker_than_the_mediastinum_between_them(seed):
    result = patient(seed).render(128)

    right, left = lungs_from_left_to_right(result.lung_mask)  # of the patient
    top, bottom = max(right.bbox[0], left.bbox[0]), min(right.bbox[2], left.bbox[2])
    middle = (right.bbox[3] + left.bbox[1]) // 2
    mediastinum = result.image[top:bottom, middle - 3 : middle + 3]
    assert result.image[result.lung_mask].mean() < mediastinum.mean() - 0.2
    assert 0.12 < result.lung_mask.mean() < 0.35
    assert not result.lung_mask[[0, -1]].any()
    assert not result.lung_mask[:, [0, -1]].any()


@pytest.mark.parametrize("seed", SEEDS)
def test_heart_lies_on_the_right_of_the_image_and_the_right_dome_higher(seed):
    mask = upright(seed).render(128).lung_mask

    right, left = domes(mask)
    assert right < left
    spine, _ = borders(mask, 0.3 * right, 0.45 * right)
    middle, _ = borders(mask, 0.75 * right, 0.95 * right)
    assert middle > spine + 2


def test_bedside_view_shows_a_larger_heart_and_a_higher_diaphragm():
    def lung_pixels(seed: int, view: str) -> int:
        return make_thorax(np.random.default_rng(seed), 64, view=view).lung_mask.sum()

    assert np.mean([lung_pixels(s, "AP") / lung_pixels(s, "PA") for s in range(8)]) < 0.95


def test_air_beside_the_trunk_is_black_and_the_abdomen_bright():
    images = [patient(seed).render(64).image for seed in SEEDS]

    assert np.median([image[-4:, :2].mean() for image in images]) < 0.1
    assert min(image[-6:, 28:36].mean() for image in images) > 0.6


# --- findings ---


@pytest.mark.parametrize("finding", FINDINGS)
@pytest.mark.parametrize("size", [64, 256])
def test_finding_changes_all_of_its_mask_and_nothing_else(finding, size):
    for seed in range(4):
        normal = patient(seed).render(size)
        abnormal = patient(seed).render(size, [Finding(finding, seed)])

        change = abnormal.image - normal.image
        assert not change[~abnormal.anomaly_mask].any()
        # the enlarged heart's silhouette holds the healthy one, which stays as it was
        assert (change[abnormal.anomaly_mask] != 0).mean() > (0.5 if finding == "Cardiomegaly" else 0.999)
        assert not normal.anomaly_mask.any()
        assert normal.labels == ()
        assert abnormal.labels == (finding,)


def test_change_spreads_beyond_the_mask_by_the_detectors_blur_alone():
    normal, abnormal = patient(1).render(512), patient(1).render(512, [Finding("Consolidation", 3)])

    change = np.abs(abnormal.image - normal.image)
    assert change[~abnormal.anomaly_mask].max() < 0.05
    assert not change[~binary_dilation(abnormal.anomaly_mask, iterations=4)].any()


@pytest.mark.parametrize("finding", FINDINGS)
def test_finding_brightens_and_only_air_darkens(finding):
    for seed in range(4):
        abnormal = patient(seed).render(128, [Finding(finding, seed)])
        change = (abnormal.image - patient(seed).render(128).image)[abnormal.anomaly_mask].mean()

        assert change < -0.03 if finding == "Pneumothorax" else change > 0.015


@pytest.mark.parametrize("finding", ["Nodule", "Mass", "Consolidation", "Pneumothorax"])
def test_finding_of_the_lung_lies_in_the_lung(finding):
    for seed in range(6):
        result = patient(seed).render(256, [Finding(finding, seed)])
        assert (result.anomaly_mask & result.lung_mask).sum() > 0.98 * result.anomaly_mask.sum()


def test_nodule_is_no_wider_than_three_centimetres_and_a_mass_is():
    for seed in range(6):
        breadth = patient(seed).anatomy.breadth * patient(seed).anatomy.stature
        areas = [patient(seed).render(256, [Finding(f, seed)]).anomaly_mask.sum() for f in ("Nodule", "Mass")]
        nodule, mass = (2 * np.sqrt(area * (37 / 256) ** 2 / breadth / np.pi) for area in areas)
        assert 1.2 < nodule < 3.0 < mass < 7.0


def test_effusion_fills_the_costophrenic_angle():
    for seed in range(6):
        result = patient(seed).render(256, [Finding("Effusion", seed)])

        blunted = [
            result.anomaly_mask[lung.coords[:, 0].max(), lung.coords[lung.coords[:, 0].argmax(), 1]]
            for lung in regionprops(label(result.lung_mask))
        ]
        assert blunted.count(True) == 1


def test_cardiomegaly_widens_the_heart_beyond_half_of_the_thorax_more_often_than_not():
    def cardiothoracic_ratio(findings: list[Finding], seed: int) -> float:
        mask = upright(seed).render(128, findings).lung_mask
        dome = domes(mask)[0]
        _, heart = borders(mask, 0.6 * dome, 0.95 * dome, np.max)
        return heart / max(np.ptp(np.flatnonzero(row)) for row in mask[:dome] if row.any())

    healthy = [cardiothoracic_ratio([], seed) for seed in SEEDS]
    enlarged = [cardiothoracic_ratio([Finding("Cardiomegaly", seed)], seed) for seed in SEEDS]

    assert np.median(healthy) < 0.5 < np.median(enlarged)
    assert np.min(np.subtract(enlarged, healthy)) > 0.03


def test_labels_are_those_of_chestxray14_but_for_devices():
    assert set(FINDINGS) - CHESTXRAY14_LABELS == {"Support Devices"}


@pytest.mark.parametrize("size", [31, 2049])
def test_size_out_of_range_is_refused(size):
    with pytest.raises(UserError, match=f"from 32 to 2048 pixels, got {size}"):
        make_thorax(np.random.default_rng(0), size)


def test_unknown_finding_and_view_are_refused_by_name():
    with pytest.raises(UserError, match=r"one of Cardiomegaly, .*got 'Fracture'"):
        make_thorax(np.random.default_rng(0), 64, findings=["Fracture"])
    with pytest.raises(UserError, match="'PA' or 'AP', got 'LL'"):
        make_thorax(np.random.default_rng(0), 64, view="LL")


# --- studies and layouts ---

SPEC = PhantomSpec(patients=4, images_per_patient=2, size=64, seed=5, anomaly_fraction=0.5)


@pytest.fixture(scope="module")
def chest(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("chest") / "phantom"
    write_phantom("chest", out, SPEC)
    return out


@pytest.fixture(scope="module")
def chestxray14(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("nih") / "phantom"
    write_phantom("chestxray14", out, PhantomSpec(patients=4, images_per_patient=2, size=64, anomaly_fraction=1.0))
    return out


@pytest.mark.parametrize(("fraction", "abnormal"), [(0, 0), (0.3, 3), (0.7, 7), (1, 10)])
def test_anomaly_fraction_is_met(fraction, abnormal):
    studies = list(draw_studies(PhantomSpec(patients=5, images_per_patient=2, anomaly_fraction=fraction)))

    assert sum(bool(study.findings) for study in studies) == abnormal


def test_every_finding_appears_once_there_are_as_many_abnormal_studies():
    studies = draw_studies(PhantomSpec(patients=len(FINDINGS), anomaly_fraction=1, seed=8))

    assert {study.findings[0].label for study in studies} == set(FINDINGS)


def test_a_patient_keeps_the_anatomy_over_follow_ups_and_when_patients_are_added():
    few = list(draw_studies(PhantomSpec(patients=2, images_per_patient=2)))
    many = list(draw_studies(PhantomSpec(patients=5, images_per_patient=2)))

    assert few[0].phantom.anatomy == few[1].phantom.anatomy == many[1].phantom.anatomy
    assert few[0].phantom.acquisition != few[1].phantom.acquisition
    assert few[0].phantom.anatomy != few[2].phantom.anatomy


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_runs_are_identical_to_the_byte_and_another_seed_is_not(layout, tmp_path):
    spec = PhantomSpec(patients=2, size=32, anomaly_fraction=0.5)

    for name in ("a", "b"):
        write_phantom(layout, tmp_path / name, spec)
    write_phantom(layout, tmp_path / "c", PhantomSpec(patients=2, size=32, anomaly_fraction=0.5, seed=1))

    first, second, other = (digest(tmp_path / name) for name in ("a", "b", "c"))
    assert first == second
    images = {value for name, value in first.items() if name.startswith("images")}
    assert images.isdisjoint(other.values())


@pytest.mark.parametrize("layout", ["chest", "chestxray14"])
def test_truth_names_files_that_exist_and_masks_that_are_exact(layout, request):
    out = request.getfixturevalue(layout)
    base = out / "images" if layout == "chest" else out
    spec = PhantomSpec(**{k: v for k, v in json.loads((out / "phantom.json").read_text()).items() if hasattr(SPEC, k)})

    rows = truth(out)
    studies = list(draw_studies(spec))
    assert len(rows) == len(studies) == spec.patients * spec.images_per_patient
    for row, study in zip(rows, studies, strict=True):
        expected = study.phantom.render(spec.size, study.findings)
        assert (base / row["file"]).is_file()
        assert (row["sex"], int(row["age"])) == (study.phantom.anatomy.sex, study.phantom.anatomy.age)
        assert row["labels"] == ("|".join(expected.labels) or "No Finding")
        np.testing.assert_array_equal(
            np.asarray(Image.open(out / row["lung_mask"])), expected.lung_mask * np.uint8(255)
        )
        assert bool(row["anomaly_mask"]) == bool(study.findings)
        if study.findings:
            anomaly = np.asarray(Image.open(out / row["anomaly_mask"]))
            np.testing.assert_array_equal(anomaly, expected.anomaly_mask * np.uint8(255))


def test_dicom_shows_the_image_within_quantisation(chest):
    encodings = set()
    for row, study in zip(truth(chest), draw_studies(SPEC), strict=True):
        ds = pydicom.dcmread(chest / "images" / row["file"])
        shown = apply_voi_lut(ds.pixel_array, ds)
        # PS3.3 C.11.2.1.2: apply_voi_lut maps the window onto the whole 12 bits
        shown = shown / (2**ds.BitsStored - 1)
        if ds.PhotometricInterpretation == "MONOCHROME1":
            shown = 1 - shown

        expected = study.phantom.render(SPEC.size, study.findings).image
        np.testing.assert_allclose(shown, expected, atol=0.5 / 3600 + 1e-5)
        assert ds.pixel_array.max() < 2**12
        encodings.add((ds.PhotometricInterpretation, ds.file_meta.TransferSyntaxUID.name))
    assert encodings == {
        (photometric, syntax)
        for photometric in ("MONOCHROME1", "MONOCHROME2")
        for syntax in ("Explicit VR Little Endian", "RLE Lossless")
    }


def test_dicom_tags_are_complete_and_say_that_nobody_was_imaged(chest):
    uids = []
    for row in truth(chest):
        path = chest / "images" / row["file"]
        ds = pydicom.dcmread(path)

        # types 1 and 2 of the modules of DX and CR (PS3.3 A.26, A.2)
        for keyword in (
            *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Modality", "ImageType"),
            *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID"),
            *("AccessionNumber", "ReferringPhysicianName", "SeriesNumber", "InstanceNumber", "PatientOrientation"),
            *("BodyPartExamined", "ViewPosition", "BurnedInAnnotation", "ImagerPixelSpacing", "DetectorType"),
            *("AnatomicRegionSequence", "ViewCodeSequence", "AcquisitionContextSequence", "ImageLaterality"),
            *("PixelIntensityRelationship", "PixelIntensityRelationshipSign", "RescaleIntercept", "RescaleSlope"),
            *("RescaleType", "PresentationLUTShape", "LossyImageCompression", "WindowCenter", "WindowWidth"),
            *("SamplesPerPixel", "PhotometricInterpretation", "Rows", "Columns", "BitsAllocated", "BitsStored"),
            *("HighBit", "PixelRepresentation", "PixelData"),
        ):
            assert keyword in ds, keyword
        assert (ds.Modality, ds.SOPClassUID.name) == (
            ("DX", "Digital X-Ray Image Storage - For Presentation")
            if row["view"] == "PA"
            else ("CR", "Computed Radiography Image Storage")
        )
        assert ds.get("PresentationIntentType") == ("FOR PRESENTATION" if row["view"] == "PA" else None)
        assert (ds.BodyPartExamined, ds.ViewPosition, ds.PatientID) == ("CHEST", row["view"], row["patient"])
        assert ds.PatientAge == f"{int(row['age']):03d}Y"
        assert ds.PixelSpacing == ds.ImagerPixelSpacing == [370 / 64] * 2
        assert (ds.SyntheticData, ds.QualityControlSubject, ds.BurnedInAnnotation) == ("YES", "YES", "NO")
        assert "Synthetic" in str(ds.PatientName)
        assert "SYNTHETIC" in ds.ImageComments
        assert path.parts[-3:] == (ds.PatientID, ds.StudyInstanceUID, f"{ds.SOPInstanceUID}.dcm")
        assert ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID
        uids += [ds.SOPInstanceUID, ds.SeriesInstanceUID, ds.StudyInstanceUID]
    assert all(uid.is_valid for uid in uids)
    assert len(set(uids)) == len(uids) == 3 * 8


def test_chestxray14_table_has_the_published_header_and_vocabulary(chestxray14):
    lines = (chestxray14 / "Data_Entry_2017_v2020.csv").read_text(encoding="utf-8").splitlines()
    rows = [line.split(",") for line in lines[1:]]

    assert lines[0] == (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
    )
    assert len(rows) == 8
    for row in rows:
        name, labels, follow_up, number = row[:4]
        assert len(row) == 11
        assert name == f"{int(number):08d}_{int(follow_up):03d}.png"
        assert set(labels.split("|")) <= CHESTXRAY14_LABELS | {"No Finding"}
    assert any("Support Devices" in row["labels"] for row in truth(chestxray14))


def test_chestxray14_images_are_the_phantoms_in_8_bits(chestxray14):
    spec = PhantomSpec(patients=4, images_per_patient=2, size=64, anomaly_fraction=1.0)
    study = next(draw_studies(spec))

    image = Image.open(chestxray14 / "images_001" / "images" / "00000001_000.png")

    assert (image.mode, image.size) == ("L", (64, 64))
    expected = study.phantom.render(64, study.findings).image
    np.testing.assert_allclose(np.asarray(image) / 255, expected, atol=0.5 / 255 + 1e-6)


def test_chestxray14_lists_divide_the_patients(chestxray14):
    learn, test = (
        (chestxray14 / name).read_text(encoding="utf-8").split() for name in ("train_val_list.txt", "test_list.txt")
    )

    images = sorted(path.name for path in (chestxray14 / "images_001" / "images").iterdir())
    assert sorted(learn + test) == images
    assert learn
    assert test
    assert {name[:8] for name in learn}.isdisjoint(name[:8] for name in test)


def test_no_mask_lies_where_a_reader_of_the_dataset_looks_for_images(chest, chestxray14):
    assert {path.suffix for path in (chest / "images").rglob("*") if path.is_file()} == {".dcm"}
    outside = [path for path in chestxray14.rglob("*.png") if path.parent != chestxray14 / "images_001" / "images"]
    assert outside == []


# --- what is refused ---


def test_the_same_call_mends_what_an_interruption_left(tmp_path):
    spec = PhantomSpec(patients=2, size=32)
    write_phantom("chest", tmp_path / "a", spec)
    whole = digest(tmp_path / "a")
    (tmp_path / "a" / "truth.csv").unlink()
    torn = next((tmp_path / "a" / "images").rglob("*.dcm"))
    torn.write_bytes(torn.read_bytes()[:100])

    write_phantom("chest", tmp_path / "a", spec)

    assert digest(tmp_path / "a") == whole


def test_other_arguments_need_force_which_spares_files_of_others(tmp_path):
    write_phantom("chest", tmp_path, PhantomSpec(patients=3, size=32))
    (tmp_path / "notes.txt").write_text("mine")

    with pytest.raises(UserError, match=r"made with other values of layout, patients; .*--force"):
        write_phantom("chestxray14", tmp_path, PhantomSpec(patients=2, size=32))
    write_phantom("chestxray14", tmp_path, PhantomSpec(patients=2, size=32), force=True)

    assert not (tmp_path / "images").exists()
    assert len(truth(tmp_path)) == 2
    assert len(list((tmp_path / "masks").glob("*_lung.*"))) == 2
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("manifest", [None, "{", "[]", '{"layout": "../.."}'])
def test_folder_of_another_origin_is_not_touched_even_with_force(manifest, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.png").write_bytes(b"x")
    if manifest is not None:
        (tmp_path / "phantom.json").write_text(manifest)
    before = digest(tmp_path)

    with pytest.raises(UserError, match="must be new or empty"):
        write_phantom("chest", tmp_path, PhantomSpec(patients=1, size=32), force=True)

    assert digest(tmp_path) == before


def test_out_that_is_a_file_or_cannot_be_made_is_one_line(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")

    with pytest.raises(UserError, match="must be a folder, got the file"):
        write_phantom("chest", file, PhantomSpec(patients=1, size=32))
    with pytest.raises(UserError, match="Not a directory; choose another folder"):
        write_phantom("chest", file / "below", PhantomSpec(patients=1, size=32))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("patients", 0),
        ("images_per_patient", 0),
        ("size", 16),
        ("size", 4096),
        ("seed", -1),
        ("anomaly_fraction", 1.5),
        ("anomaly_fraction", float("nan")),
    ],
)
def test_specification_out_of_range_names_the_option(field, value):
    with pytest.raises(UserError, match=rf"^{field} must be from .* got {value}; change --{field.replace('_', '-')}$"):
        PhantomSpec(**{field: value})


def test_unknown_layout_lists_the_known_ones(tmp_path):
    with pytest.raises(UserError, match=r"one of chest, chestxray14, isic, liver_ct, .*, rsna, got 'moon'"):
        write_phantom("moon", tmp_path / "a", PhantomSpec())
    assert not (tmp_path / "a").exists()
