"""Phantom studies written as public datasets are: one function per layout, and the registry of them."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from scipy.ndimage import find_objects, label
from tqdm import tqdm

from medgen import __version__
from medgen.data.phantom.abdomen import (
    CT_FINDINGS,
    AbdomenAnatomy,
    AbdomenFinding,
    AbdomenPhantom,
    AbdomenScan,
    AbdomenVolume,
)
from medgen.data.phantom.reports import CHEXPERT, FORMS, write_report
from medgen.data.phantom.skin import BENIGN, MALIGNANT, Lesion, Photograph, Skin, SkinPhantom
from medgen.data.phantom.thorax import (
    FIELD_OF_VIEW_CM,
    FINDINGS,
    MAX_SIZE,
    MIN_SIZE,
    Acquisition,
    Anatomy,
    Finding,
    ThoraxImage,
    ThoraxPhantom,
)
from medgen.errors import UserError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

__all__ = [
    "LAYOUTS",
    "CtStudy",
    "Layout",
    "PhantomSpec",
    "SkinStudy",
    "Study",
    "draw_ct_studies",
    "draw_skin_studies",
    "draw_studies",
    "write_phantom",
]

MANIFEST = "phantom.json"
NO_FINDING = "No Finding"
SECOND_FINDING = 0.25  # share of the abnormal radiographs that show two
TEST_SHARE = 0.2  # of the patients, as in ChestX-ray14's official lists

CT_TRUTH_COLUMNS = ("file", "patient", "sex", "age", "labels", "liver_mask", "anomaly_mask")
TRUTH_COLUMNS = ("file", "patient", "sex", "age", "view", "labels", "lung_mask", "anomaly_mask")
# The header of ChestX-ray14's table as it was published: its commas cut two of the names in half
DATA_ENTRY_COLUMNS = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
MIMIC_METADATA, MIMIC_CHEXPERT, MIMIC_SPLIT = (
    f"mimic-cxr-2.0.0-{table}.csv.gz" for table in ("metadata", "chexpert", "split")
)
MIMIC_METADATA_COLUMNS = (
    *("dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition", "Rows", "Columns"),
    *("StudyDate", "StudyTime", "ProcedureCodeSequence_CodeMeaning", "ViewCodeSequence_CodeMeaning"),
    "PatientOrientationCodeSequence_CodeMeaning",
)
MIMIC_TRUTH_COLUMNS = (
    *("file", "patient", "study", "sex", "age", "view", "labels", "report", "findings", "impression"),
    *("lung_mask", "anomaly_mask"),
)
MIMIC_SPLITS = {"validate": 0.1, "test": 0.1}  # of the patients; the rest is train
LATERAL_EVERY = 2  # of the erect radiographs come with a lateral one
UNNAMED_EVERY = 8  # of the radiographs have no ViewPosition in the table, as some of MIMIC-CXR's
LATERAL_WIDTH = 0.75  # of the frontal radiograph's
SIDE_MARGIN = 0.08  # of the image's width: what lies nearer to its middle is on neither side
SIDED = ("Nodule", "Mass", "Consolidation", "Effusion", "Pneumothorax")

RSNA_IMAGES = "stage_2_train_images"
RSNA_LABELS, RSNA_CLASSES = "stage_2_train_labels.csv", "stage_2_detailed_class_info.csv"
RSNA_MAPPING = "pneumonia-challenge-dataset-mappings_2018.json"
RSNA_UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
RSNA_OPACITIES = ("Consolidation", "Mass", "Nodule")  # denser than the lung about them; each has a box

ISIC_COLUMNS = (
    *("isic_id", "patient_id", "lesion_id", "diagnosis", "benign_malignant", "age_approx", "sex"),
    "anatom_site_general",
)
ISIC_TRUTH_COLUMNS = ("file", "patient", "lesion", "diagnosis", "copy_of", "copy", "lesion_mask")
SAME_LESION = 0.4  # share of a patient's further photographs that show the lesion of the one before
COPY_EVERY = 8  # photographs, of which one is in the archive twice
COPIES = ("exact", "mirrored", "turned", "smaller")  # in turn
SMALLER = 0.75  # of the side

# Stored values of the DICOM files. The film's black and white are not the ends of the 12 bits, so that a reader which
# ignores the window, or applies it before inverting MONOCHROME1, gives a visibly wrong image.
BITS_STORED = 12
STORED_BLACK, STORED_WHITE = 248, 3848
STUDY_DATE = "20200101"
DX_STORAGE = "1.2.840.10008.5.1.4.1.1.1.1"  # Digital X-Ray Image Storage - For Presentation
CR_STORAGE = "1.2.840.10008.5.1.4.1.1.1"
SC_STORAGE = "1.2.840.10008.5.1.4.1.1.7"  # Secondary Capture
VIEW_CODES = {  # DICOM CID 4010
    "PA": ("272479007", "postero-anterior"),
    "AP": ("399348003", "antero-posterior"),
    "LATERAL": ("399067008", "lateral"),
}
CHEST_CODE = ("816094009", "Chest")  # DICOM CID 4031
CT_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
RESCALE_INTERCEPT = -1024  # HU of stored value 0, as most scanners have it
DICOM_EVERY = 2  # of the patients' scans are DICOM series, the rest NIfTI
# NIfTI files of different converters store the axes in different directions
NIFTI_AXES = ("LPS", "RAS", "LAS")


@dataclass(frozen=True)
class PhantomSpec:
    """How much to write, and of what.

    Args:
        patients: number of patients.
        images_per_patient: radiographs or scans of each.
        size: height and width in pixels, from 32 to 2048.
        seed: of everything drawn; a patient's anatomy depends on it and on the patient's number alone.
        anomaly_fraction: share of the images with findings, in [0, 1]; met to the nearest whole number.

    Raises:
        UserError: when one of them is out of range.
    """

    patients: int = 20
    images_per_patient: int = 1
    size: int = 256
    seed: int = 0
    anomaly_fraction: float = 0.3

    def __post_init__(self) -> None:
        for name, low, high in (
            ("patients", 1, 99_999),
            ("images_per_patient", 1, 999),
            ("size", MIN_SIZE, MAX_SIZE),
            ("seed", 0, 2**63 - 1),
            ("anomaly_fraction", 0, 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"{name} must be from {low} to {high}, got {value}; change --{name.replace('_', '-')}")


@dataclass(frozen=True)
class Study:
    """One radiograph of one patient, drawn but not rendered.

    Args:
        patient: number from 0.
        follow_up: number of the radiograph among the patient's, from 0.
        phantom: patient and exposure.
        findings: what to insert; empty for a normal radiograph.
    """

    patient: int
    follow_up: int
    phantom: ThoraxPhantom
    findings: tuple[Finding, ...]

    @property
    def labels(self) -> str:
        """The findings' names divided by ``|``, or "No Finding"."""
        return "|".join(finding.label for finding in self.findings) or NO_FINDING


def draw_studies(spec: PhantomSpec) -> Iterator[Study]:
    """Draw patients, exposures and findings; rendering is left to the caller.

    Args:
        spec: how many and which.

    Yields:
        the studies, patient by patient.
    """
    total = spec.patients * spec.images_per_patient
    rng = np.random.default_rng([spec.seed, 0])
    abnormal = rng.permutation(total)[: round(spec.anomaly_fraction * total)]
    # in turn, not at random: a handful of studies shall show each finding once
    kinds = rng.permutation(len(FINDINGS))
    first = {int(study): FINDINGS[kinds[n % len(FINDINGS)]] for n, study in enumerate(abnormal)}
    for patient in range(spec.patients):
        anatomy = Anatomy.draw(np.random.default_rng([spec.seed, 1, patient]))
        for follow_up in range(spec.images_per_patient):
            rng = np.random.default_rng([spec.seed, 2, patient, follow_up])
            acquisition = Acquisition.draw(rng)
            labels = []
            if (label := first.get(patient * spec.images_per_patient + follow_up)) is not None:
                labels.append(label)
                if rng.random() < SECOND_FINDING:
                    labels.append(str(rng.choice([other for other in FINDINGS if other != label])))
            findings = tuple(Finding(label, int(rng.integers(2**32))) for label in labels)
            yield Study(patient, follow_up, ThoraxPhantom(anatomy, acquisition), findings)


@dataclass(frozen=True)
class CtStudy:
    """One abdominal CT of one patient, drawn but not rendered.

    Args:
        patient: number from 0.
        follow_up: number of the scan among the patient's, from 0.
        phantom: patient and scan.
        findings: what to insert; empty for a normal scan.
    """

    patient: int
    follow_up: int
    phantom: AbdomenPhantom
    findings: tuple[AbdomenFinding, ...]

    @property
    def labels(self) -> str:
        """The findings' names divided by ``|``, or "No Finding"."""
        return "|".join(finding.label for finding in self.findings) or NO_FINDING


def draw_ct_studies(spec: PhantomSpec) -> Iterator[CtStudy]:
    """Draw patients, scans and findings of :data:`medgen.data.phantom.CT_FINDINGS`, one to a scan.

    Args:
        spec: how many and which.

    Yields:
        the studies, patient by patient.
    """
    total = spec.patients * spec.images_per_patient
    rng = np.random.default_rng([spec.seed, 4])
    abnormal = rng.permutation(total)[: round(spec.anomaly_fraction * total)]
    kinds = rng.permutation(len(CT_FINDINGS))
    found = {int(study): CT_FINDINGS[kinds[n % len(CT_FINDINGS)]] for n, study in enumerate(abnormal)}
    for patient in range(spec.patients):
        anatomy = AbdomenAnatomy.draw(np.random.default_rng([spec.seed, 5, patient]))
        for follow_up in range(spec.images_per_patient):
            rng = np.random.default_rng([spec.seed, 6, patient, follow_up])
            scan = AbdomenScan.draw(rng)
            label = found.get(patient * spec.images_per_patient + follow_up)
            findings = () if label is None else (AbdomenFinding(label, int(rng.integers(2**32))),)
            yield CtStudy(patient, follow_up, AbdomenPhantom(anatomy, scan), findings)


@dataclass(frozen=True)
class SkinStudy:
    """One dermoscopic photograph, drawn but not rendered, or a copy of one.

    Args:
        patient: number from 0.
        lesion: number of the lesion among the patient's, from 0.
        index: number of the photograph among all, from 0.
        phantom: patient, lesion and photograph.
        copy: how it was made of the photograph before it, of :data:`COPIES`; empty for an original.
    """

    patient: int
    lesion: int
    index: int
    phantom: SkinPhantom
    copy: str = ""

    @property
    def findings(self) -> tuple[str, ...]:
        """The diagnosis, if it is malignant."""
        diagnosis = self.phantom.lesion.diagnosis
        return (diagnosis,) if diagnosis in MALIGNANT else ()


def draw_skin_studies(spec: PhantomSpec) -> Iterator[SkinStudy]:
    """Draw patients, their lesions and photographs; every eighth photograph is followed by a copy of it.

    Args:
        spec: how many and which; ``anomaly_fraction`` is the share of the lesions that are malignant.

    Yields:
        the photographs, patient by patient.
    """
    lesions = []  # of each patient, the lesion's number in each photograph
    for patient in range(spec.patients):
        again = np.random.default_rng([spec.seed, 9, patient]).random(spec.images_per_patient) < SAME_LESION
        again[0] = False
        lesions.append(np.cumsum(~again) - 1)
    total = sum(int(numbers[-1]) + 1 for numbers in lesions)
    malignant = set(np.random.default_rng([spec.seed, 10]).permutation(total)[: round(spec.anomaly_fraction * total)])
    turns = {True: cycle(MALIGNANT), False: cycle(BENIGN)}
    diagnoses = [next(turns[lesion in malignant]) for lesion in range(total)]
    index = first = 0
    for patient, numbers in enumerate(lesions):
        skin = Skin.draw(np.random.default_rng([spec.seed, 11, patient]))
        for follow_up, lesion in enumerate(numbers.tolist()):
            rng = np.random.default_rng([spec.seed, 12, patient, lesion])
            drawn = Lesion.draw(rng, diagnoses[first + lesion])
            photograph = Photograph.draw(np.random.default_rng([spec.seed, 13, patient, follow_up]))
            phantom = SkinPhantom(skin, drawn, photograph)
            yield SkinStudy(patient, lesion, index, phantom)
            index += 1
            copies, left = divmod(patient * spec.images_per_patient + follow_up, COPY_EVERY)
            if left == COPY_EVERY - 1:
                yield SkinStudy(patient, lesion, index, phantom, COPIES[copies % len(COPIES)])
                index += 1
        first += int(numbers[-1]) + 1


@dataclass(frozen=True)
class Layout:
    """A folder layout.

    Args:
        summary: one line for ``--help``.
        entries: names directly below the output folder that ``write`` makes; ``--force`` removes these.
        write: takes the output folder, the specification and the studies; gives the next command to type.
        draw: gives the studies of a specification.
        noun: what one study is called, in the plural.
        masks: where its masks are, below the output folder.
        size: height and width in pixels, unless the user says otherwise.
        images_per_patient: radiographs or scans of each patient, unless the user says otherwise.
    """

    summary: str
    entries: tuple[str, ...]
    write: Callable[[Path, PhantomSpec, Iterable[Any]], str]
    draw: Callable[[PhantomSpec], Iterator[Any]] = draw_studies
    noun: str = "synthetic radiographs"
    masks: str = "masks of lungs and anomalies: {out}/masks"
    size: int = PhantomSpec.size
    images_per_patient: int = PhantomSpec.images_per_patient


def _write_chest(out: Path, spec: PhantomSpec, studies: Iterable[Study]) -> str:
    """``images/<patient>/<study>/<sop>.dcm``; ``file`` in the truth is relative to ``images``."""
    rows = []
    for number, study in enumerate(studies):
        image = study.phantom.render(spec.size, study.findings)
        dataset = _dicom(study, image, spec, inverted=bool(number & 1), rle=bool(number & 2))
        file = f"{dataset.PatientID}/{dataset.StudyInstanceUID}/{dataset.SOPInstanceUID}.dcm"
        path = out / "images" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        dataset.save_as(path, enforce_file_format=True)
        masks = _save_masks(out, f"{dataset.PatientID}_{study.follow_up:03d}", image, "png")
        rows.append((file, dataset.PatientID, *_truth(study), *masks))
    _save_csv(out / "truth.csv", TRUTH_COLUMNS, rows)
    return _command(
        "preprocessing.images", source=out / "images", labels=out / "truth.csv", target=_sibling(out), size=spec.size
    )


def _write_chestxray14(out: Path, spec: PhantomSpec, studies: Iterable[Study]) -> str:
    """``images_001/images/<patient>_<follow-up>.png``, the official table and the two official lists."""
    images = out / "images_001" / "images"
    images.mkdir(parents=True, exist_ok=True)
    truth, entries, lists = [], [], {"train_val_list.txt": [], "test_list.txt": []}
    order = np.random.default_rng([spec.seed, 3]).permutation(spec.patients)
    tested = set(order[: max(round(TEST_SHARE * spec.patients), min(1, spec.patients - 1))].tolist())
    spacing = _spacing_mm(spec.size)
    for study in studies:
        image = study.phantom.render(spec.size, study.findings)
        name = f"{study.patient + 1:08d}_{study.follow_up:03d}"
        Image.fromarray(np.rint(image.image * 255).astype(np.uint8)).save(images / f"{name}.png")
        # TIFF: any PNG below the dataset's folder that its table does not list would count as a stray radiograph
        masks = _save_masks(out, name, image, "tif")
        sex, age, view, labels = _truth(study)
        truth.append((f"images_001/images/{name}.png", study.patient + 1, sex, age, view, labels, *masks))
        # a device is no finding in the dataset's vocabulary
        official = "|".join(label for label in labels.split("|") if label != "Support Devices") or NO_FINDING
        size = spec.size
        row = (f"{name}.png", official, study.follow_up, study.patient + 1, age, sex, view)
        entries.append((*row, size, size, spacing, spacing))
        lists["test_list.txt" if study.patient in tested else "train_val_list.txt"].append(f"{name}.png\n")
    _save_csv(out / "Data_Entry_2017_v2020.csv", DATA_ENTRY_COLUMNS.split(","), entries)
    for name, lines in lists.items():
        (out / name).write_text("".join(lines), encoding="utf-8", newline="\n")
    _save_csv(out / "truth.csv", TRUTH_COLUMNS, truth)
    return _command("preprocessing.chestxray14", source=out, target=_sibling(out), size=spec.size)


def _write_liver_ct(out: Path, spec: PhantomSpec, studies: Iterable[CtStudy]) -> str:
    """``images/<study>.nii.gz`` or ``images/<patient>/<series>/<sop>.dcm``, with the masks in the same geometry."""
    rows = []
    for folder in ("images", "labels", "anomalies"):
        (out / folder).mkdir(exist_ok=True)
    for number, study in enumerate(studies):
        volume = study.phantom.render(spec.size, study.findings)
        patient = f"PHANTOM{study.patient + 1:05d}"
        name = patient if spec.images_per_patient == 1 else f"{patient}_{study.follow_up:03d}"
        axes = NIFTI_AXES[number // DICOM_EVERY % len(NIFTI_AXES)]
        if number % DICOM_EVERY:
            file = f"{patient}/{name}"
            (out / "images" / file).mkdir(parents=True, exist_ok=True)
            for dataset in _ct_series(study, volume, spec):
                dataset.save_as(out / "images" / file / f"{dataset.SOPInstanceUID}.dcm", enforce_file_format=True)
        else:
            file = f"{name}.nii.gz"
            _save_nifti(out / "images" / file, volume.image, volume, axes)
        _save_nifti(out / "labels" / f"{name}.nii.gz", volume.liver_mask.astype(np.uint8), volume, axes)
        anomaly = ""
        if volume.anomaly_mask.any():
            anomaly = f"anomalies/{name}.nii.gz"
            _save_nifti(out / anomaly, volume.anomaly_mask.astype(np.uint8), volume, axes)
        anatomy = study.phantom.anatomy
        rows.append((file, patient, anatomy.sex, anatomy.age, study.labels, f"labels/{name}.nii.gz", anomaly))
    _save_csv(out / "truth.csv", CT_TRUTH_COLUMNS, rows)
    return _command(
        "preprocessing.liver_ct",
        source=out / "images",
        masks=out / "labels",
        anomalies=out / "anomalies",
        target=_sibling(out),
        size=spec.size,
        # several scans of a patient, of which the NIfTI files say so by their names alone
        **({} if spec.images_per_patient == 1 else {"patient": r"PHANTOM\d+"}),
    )


def _write_mimic_cxr(out: Path, spec: PhantomSpec, studies: Iterable[Study], dicom: bool = False) -> str:
    """``files/p10/p10000032/s50414267/<dicom_id>.jpg`` with the reports beside the studies, and the official tables.

    A study is a frontal radiograph with its report; some have a lateral one too, or no view in the table.
    """
    metadata, chexpert, split, truth = [], [], [], []
    part = _mimic_splits(spec)
    forms = list(FORMS)
    for number, study in enumerate(studies):
        image = study.phantom.render(spec.size, study.findings)
        subject, study_id = _mimic_numbers(spec, study)
        folder = f"files/p{subject[:2]}/p{subject}/s{study_id}"
        (out / folder).mkdir(parents=True, exist_ok=True)
        view = study.phantom.acquisition.view
        views = [view] + ["LATERAL"] * (view == "PA" and number % LATERAL_EVERY == 0)
        named = number % UNNAMED_EVERY != UNNAMED_EVERY - 1
        for shown in views:
            name = _mimic_dicom_id(spec, study, shown)
            pixels = image if shown == view else _lateral(image)
            path = out / folder / f"{name}.{'dcm' if dicom else 'jpg'}"
            if dicom:
                _save_mimic_dicom(path, study, pixels, spec, subject, shown)
            else:
                Image.fromarray(np.rint(pixels.image * 255).astype(np.uint8)).save(path, quality=95)
            step = f"CHEST ({'PORTABLE AP' if view == 'AP' else 'PA AND LAT' if len(views) > 1 else 'SINGLE VIEW'})"
            described = (step, shown if named else "", *pixels.image.shape)
            when = (f"{2110 + study.follow_up % 90}0{1 + study.patient % 9}12", f"12{study.follow_up % 60:02d}14.531")
            orientation = "Recumbent" if view == "AP" else "Erect"
            coded = (step, VIEW_CODES[shown][1] if named else "", orientation)
            metadata.append((name, subject, study_id, *described, *when, *coded))
            split.append((name, study_id, subject, part[study.patient]))
        rng = np.random.default_rng([spec.seed, 7, study.patient, study.follow_up])
        said = [(finding.label, _side(study, finding)) for finding in study.findings]
        form = forms[number % len(forms)]
        report = write_report(form, said, view, study.phantom.anatomy.sex, study.follow_up > 0, rng)
        if report.data is not None:
            (out / f"{folder}.txt").write_bytes(report.data)
        if report.labels is not None:
            chexpert.append((subject, study_id, *(report.labels.get(column, "") for column in CHEXPERT)))
        masks = _save_masks(out, f"s{study_id}", image, "png")
        sex, age, _, labels = _truth(study)
        file = f"{folder}/{_mimic_dicom_id(spec, study, view)}.{'dcm' if dicom else 'jpg'}"
        written = (report.form, report.findings, report.impression)
        truth.append((file, subject, study_id, sex, age, view, labels, *written, *masks))
    _save_zipped_csv(out / MIMIC_METADATA, MIMIC_METADATA_COLUMNS, metadata)
    _save_zipped_csv(out / MIMIC_CHEXPERT, ("subject_id", "study_id", *CHEXPERT), chexpert)
    _save_zipped_csv(out / MIMIC_SPLIT, ("dicom_id", "study_id", "subject_id", "split"), split)
    _save_csv(out / "truth.csv", MIMIC_TRUTH_COLUMNS, truth)
    first = _command("preprocessing.mimic_cxr", "organise", source=out, target=_sibling(out), size=spec.size)
    return f"{first}; then create_ids, sections and sentences with the same --source and --target"


def _mimic_splits(spec: PhantomSpec) -> list[str]:
    """MIMIC's name of the split of each patient; with three patients or more, none is empty."""
    order = np.random.default_rng([spec.seed, 8]).permutation(spec.patients)
    part = ["train"] * spec.patients
    start = 0
    for name, share in MIMIC_SPLITS.items():
        count = max(round(share * spec.patients), spec.patients > 2)
        for patient in order[start : start + count]:
            part[patient] = name
        start += count
    return part


def _mimic_numbers(spec: PhantomSpec, study: Study) -> tuple[str, str]:
    """Numbers of patient (1xxxxxxx) and study (5xxxxxxx), scattered as the official ones are, and never twice."""
    space = 10_000_000
    index = study.patient * spec.images_per_patient + study.follow_up
    start = spec.seed * 1_000_003
    # the factors are coprime to the space, so that no two indices meet
    subject = space + (start + study.patient * 6_180_339) % space
    return str(subject), str(5 * space + (start + index * 3_819_661) % space)


def _mimic_dicom_id(spec: PhantomSpec, study: Study, view: str) -> str:
    digest = hashlib.sha256(f"{spec!r} {study.patient} {study.follow_up} {view}".encode()).hexdigest()
    return "-".join(digest[start : start + 8] for start in range(0, 40, 8))


def _lateral(image: ThoraxImage) -> ThoraxImage:
    """A stand-in of another shape: the phantom knows no lateral projection, and readers of PA images leave it out."""
    height, width = image.image.shape
    narrow = Image.fromarray(image.image).resize((round(LATERAL_WIDTH * width), height), Image.Resampling.BICUBIC)
    empty = np.zeros((height, narrow.width), bool)
    return ThoraxImage(np.clip(np.asarray(narrow), 0, 1), empty, empty, image.labels)


def _side(study: Study, finding: Finding) -> str:
    """The patient's side that a finding lies on, as it is seen; empty for one in the middle, or on both."""
    if finding.label not in SIDED:
        return ""
    mask = study.phantom.render(MIN_SIZE, [finding]).anomaly_mask
    if not mask.any():
        return ""
    middle = (np.nonzero(mask)[1].mean() + 0.5) / mask.shape[1] - 0.5
    return "" if abs(middle) < SIDE_MARGIN else "left" if middle > 0 else "right"


def _save_mimic_dicom(path: Path, study: Study, image: ThoraxImage, spec: PhantomSpec, subject: str, view: str) -> None:
    dataset = _dicom(study, image, spec, inverted=study.patient % 2 == 1, rle=False)
    dataset.PatientID = subject
    if view == "LATERAL":
        dataset.ViewPosition = "LL"
        code = dataset.ViewCodeSequence[0]
        code.CodeValue, code.CodeMeaning = VIEW_CODES[view]
        dataset.SOPInstanceUID = _uids(spec)("lateral", study.patient, study.follow_up)
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.InstanceNumber = 2
    dataset.save_as(path, enforce_file_format=True)


def _write_rsna(out: Path, spec: PhantomSpec, studies: Iterable[Study]) -> str:
    """``stage_2_train_images/<id>.dcm``, the two tables, and the mapping that tells whose radiograph an id is."""
    (out / RSNA_IMAGES).mkdir(exist_ok=True)
    labels, classes, mapping, truth = [], [], [], []
    for study in studies:
        image = study.phantom.render(spec.size, study.findings)
        name = _rsna_id(spec, study)
        dataset = _rsna_dicom(study, image, spec, name)
        dataset.save_as(out / RSNA_IMAGES / f"{name}.dcm", enforce_file_format=True)
        boxes = _opacity_boxes(study, image, spec)
        kind = "Lung Opacity" if boxes else "No Lung Opacity / Not Normal" if study.findings else "Normal"
        # a row for each box in both tables
        labels += [(name, *box, 1) for box in boxes] or [(name, "", "", "", "", 0)]
        classes += [(name, kind)] * max(1, len(boxes))
        nih = f"{study.patient + 1:08d}_{study.follow_up:03d}.png"
        uids = {keyword: dataset[keyword].value for keyword in RSNA_UIDS}
        mapping.append({"subset_img_id": name, "img_id": nih, "orig_labels": study.labels.split("|"), **uids})
        masks = _save_masks(out, name, image, "png")
        truth.append((f"{RSNA_IMAGES}/{name}.dcm", study.patient + 1, *_truth(study), *masks))
    # by id, as published: neither table nor mapping shall give a patient's images one after the other
    _save_csv(
        out / RSNA_LABELS, ("patientId", "x", "y", "width", "height", "Target"), sorted(labels, key=itemgetter(0))
    )
    _save_csv(out / RSNA_CLASSES, ("patientId", "class"), sorted(classes, key=itemgetter(0)))
    mapping.sort(key=itemgetter("subset_img_id"))
    (out / RSNA_MAPPING).write_text(json.dumps(mapping) + "\n", encoding="utf-8", newline="\n")
    _save_csv(out / "truth.csv", TRUTH_COLUMNS, truth)
    first = _command("preprocessing.rsna", "organise", source=out, target=_sibling(out), size=spec.size)
    return f"{first}; then the lungs' boxes by the bundle lung_segmentation, and crop"


def _rsna_id(spec: PhantomSpec, study: Study) -> str:
    """In the form of a UUID, as the challenge's ids are."""
    digest = hashlib.sha256(f"{spec!r} {study.patient} {study.follow_up}".encode()).hexdigest()
    return "-".join((digest[:8], digest[8:12], digest[12:16], digest[16:20], digest[20:32]))


def _opacity_boxes(study: Study, image: ThoraxImage, spec: PhantomSpec) -> list[tuple[float, float, float, float]]:
    """Left, top, width and height in pixels of each opacity; other findings have no boxes."""
    opacities = [finding for finding in study.findings if finding.label in RSNA_OPACITIES]
    if not opacities:
        return []
    alone = len(opacities) == len(study.findings)
    mask = image.anomaly_mask if alone else study.phantom.render(spec.size, opacities).anomaly_mask
    places = find_objects(label(mask, np.ones((3, 3)))[0])
    return [(float(x.start), float(y.start), float(x.stop - x.start), float(y.stop - y.start)) for y, x in places]


def _rsna_dicom(study: Study, image: ThoraxImage, spec: PhantomSpec, name: str) -> Dataset:
    """A radiograph as the challenge has them: 8-bit JPEG without a window, the id as the patient's."""
    from pydicom.dataset import Dataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEGBaseline8Bit

    view = study.phantom.acquisition.view
    uid = _uids(spec)
    ds = Dataset()
    _describe(ds, "CR", study, "analytic thorax phantom", "chest radiograph", view)
    ds.SOPClassUID = SC_STORAGE
    ds.SOPInstanceUID = uid("image", study.patient, study.follow_up)
    ds.StudyInstanceUID = uid("study", study.patient, study.follow_up)
    ds.SeriesInstanceUID = uid("series", study.patient, study.follow_up)
    ds.PatientID = name
    ds.ConversionType = "WSD"
    ds.BodyPartExamined = "CHEST"
    ds.ViewPosition = view
    ds.PatientOrientation = ""
    ds.PixelSpacing = [str(_spacing_mm(spec.size))] * 2
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = image.image.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
    ds.PixelRepresentation = 0
    ds.LossyImageCompression, ds.LossyImageCompressionMethod = "01", "ISO_10918_1"
    stream = io.BytesIO()
    Image.fromarray(np.rint(image.image * 255).astype(np.uint8)).save(stream, "JPEG", quality=95)
    ds.LossyImageCompressionRatio = f"{image.image.size / stream.tell():.2f}"
    ds.PixelData = encapsulate([stream.getvalue()])
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    _finish_file(ds)
    ds.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    return ds


def _write_isic(out: Path, spec: PhantomSpec, studies: Iterable[SkinStudy]) -> str:
    """``images/<id>.jpg``, ``masks/<id>_segmentation.png`` and the archive's table, which does not tell copies."""
    rows, truth = [], []
    for folder in ("images", "masks"):
        (out / folder).mkdir(exist_ok=True)
    original = ""
    for study in studies:
        skin, lesion = study.phantom.skin, study.phantom.lesion
        image = study.phantom.render(spec.size)
        name = _isic_id(spec, study.index)
        pictures = [
            Image.fromarray(np.rint(image.image * 255).astype(np.uint8)),
            Image.fromarray(image.lesion_mask.astype(np.uint8) * 255),
        ]
        pictures = [_copied(picture, study.copy) for picture in pictures]
        pictures[0].save(out / "images" / f"{name}.jpg", quality=95, subsampling=0)
        pictures[1].save(out / "masks" / f"{name}_segmentation.png")
        # a copy comes from another source, which knows neither patient nor lesion
        ids = ("", "") if study.copy else (_isic_patient(spec, study.patient), _isic_lesion(spec, study))
        malignancy = "malignant" if study.findings else "benign"
        age = 5 * round(skin.age / 5)  # as the archive has it
        rows.append((name, *ids, lesion.diagnosis, malignancy, age, skin.sex, lesion.site))
        truth.append(
            (
                f"images/{name}.jpg",
                _isic_patient(spec, study.patient),
                _isic_lesion(spec, study),
                lesion.diagnosis,
                original if study.copy else "",
                study.copy,
                f"masks/{name}_segmentation.png",
            )
        )
        original = name
    # by id, as the archive has them: a patient's images do not come one after the other, nor a copy after the original
    _save_csv(out / "metadata.csv", ISIC_COLUMNS, sorted(rows))
    _save_csv(out / "truth.csv", ISIC_TRUTH_COLUMNS, truth)
    return _command("preprocessing.isic", source=out, target=_sibling(out), size=spec.size)


def _copied(picture: Image.Image, copy: str) -> Image.Image:
    """A copy in one of the ways of :data:`COPIES`; the picture itself for an original."""
    if copy == "mirrored":
        return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if copy == "turned":
        return picture.transpose(Image.Transpose.ROTATE_90)
    if copy == "smaller":
        return picture.resize([round(SMALLER * side) for side in picture.size], Image.Resampling.BOX)
    return picture


def _isic_id(spec: PhantomSpec, index: int) -> str:
    # the factor is coprime to the space, so that no two indices meet
    return f"ISIC_{(spec.seed * 1_000_003 + index * 3_819_661) % 10_000_000:07d}"


def _isic_patient(spec: PhantomSpec, patient: int) -> str:
    return f"IP_{(spec.seed * 1_000_003 + patient * 6_180_339) % 10_000_000:07d}"


def _isic_lesion(spec: PhantomSpec, study: SkinStudy) -> str:
    number = study.patient * spec.images_per_patient + study.lesion
    return f"IL_{(spec.seed * 1_000_003 + number * 7_236_067) % 10_000_000:07d}"


_MIMIC_ENTRIES = ("files", "masks", "truth.csv", MIMIC_METADATA, MIMIC_CHEXPERT, MIMIC_SPLIT)
LAYOUTS: dict[str, Layout] = {
    "chest": Layout("radiographs as a DICOM tree", ("images", "masks", "truth.csv"), _write_chest),
    "chestxray14": Layout(
        "NIH ChestX-ray14: PNG, table and official lists",
        ("images_001", "masks", "truth.csv", "Data_Entry_2017_v2020.csv", "train_val_list.txt", "test_list.txt"),
        _write_chestxray14,
    ),
    "isic": Layout(
        "ISIC archive: dermoscopic JPEGs of 4:3, their table, lesion masks, and copies that the table does not tell",
        ("images", "masks", "metadata.csv", "truth.csv"),
        _write_isic,
        draw=draw_skin_studies,
        noun="synthetic dermoscopic images",
        masks="masks of lesions: {out}/masks",
        images_per_patient=2,
    ),
    "liver_ct": Layout(
        "CT of the upper abdomen as NIfTI and as DICOM series, with liver masks",
        ("images", "labels", "anomalies", "truth.csv"),
        _write_liver_ct,
        draw=draw_ct_studies,
        noun="synthetic CT scans",
        masks="masks of livers: {out}/labels, of anomalies: {out}/anomalies",
        size=128,
    ),
    "mimic-cxr": Layout(
        "MIMIC-CXR-JPG: JPEG, reports in all their forms, and the official tables",
        _MIMIC_ENTRIES,
        _write_mimic_cxr,
        noun="synthetic studies",
        images_per_patient=2,
    ),
    "mimic-cxr-dicom": Layout(
        "the same with the radiographs as DICOM",
        _MIMIC_ENTRIES,
        partial(_write_mimic_cxr, dicom=True),
        noun="synthetic studies",
        images_per_patient=2,
    ),
    "rsna": Layout(
        "RSNA Pneumonia Detection Challenge 2018: DICOM, both tables, and the mapping to NIH patients",
        (RSNA_IMAGES, "masks", "truth.csv", RSNA_LABELS, RSNA_CLASSES, RSNA_MAPPING),
        _write_rsna,
        images_per_patient=2,
    ),
}


def write_phantom(layout: str, out: Path, spec: PhantomSpec, force: bool = False) -> list[str]:
    """Write phantom studies in the layout of a public dataset.

    The same arguments write the same bytes, so a run that was interrupted is simply repeated.

    Args:
        layout: a key of :data:`LAYOUTS`.
        out: folder to write; it must be new, empty, or made by the same call.
        spec: how much and of what.
        force: replace phantoms of other arguments. Files that are no phantom's are never removed.

    Returns:
        what was made and the next command, one line each.

    Raises:
        UserError: when the layout is unknown, ``out`` holds something else, or it cannot be written.
    """
    if layout not in LAYOUTS:
        raise UserError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    manifest = {"made_by": "medgen phantom", "version": __version__, "layout": layout, **asdict(spec)}
    form = LAYOUTS[layout]
    studies = list(form.draw(spec))
    try:
        _claim(out, manifest, force)
        command = form.write(out, spec, tqdm(studies, desc=layout, unit="image", disable=None))
    except OSError as error:
        where = error.filename or out
        raise UserError(f"expected to write {where}, got {error.strerror or error}; choose another folder") from error
    abnormal = sum(bool(study.findings) for study in studies)
    return [
        f"wrote {len(studies)} {form.noun} of {spec.patients} patients, {abnormal} with findings: {out}",
        f"truth: {out / 'truth.csv'}, {form.masks.format(out=out)}",
        f"next: {command}",
    ]


def _claim(out: Path, manifest: dict[str, Any], force: bool) -> None:
    """Make ``out`` ready for what the manifest describes, or refuse to touch it."""
    if out.exists() and not out.is_dir():
        raise UserError(f"OUT must be a folder, got the file {out}; choose another name")
    path = out / MANIFEST
    if out.is_dir() and any(out.iterdir()):
        try:
            made = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            made = None
        if not isinstance(made, dict) or made.get("layout") not in LAYOUTS:
            raise UserError(f"OUT must be new or empty, got {out} with files of another origin; choose another folder")
        if made != manifest:
            if not force:
                differing = [key for key in {**made, **manifest} if made.get(key) != manifest.get(key)]
                raise UserError(
                    f"{out} holds phantoms made with other values of {', '.join(differing)}; "
                    "choose another folder, or give --force to replace them"
                )
            for name in LAYOUTS[made["layout"]].entries:
                entry = out / name
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8", newline="\n")


def _truth(study: Study) -> tuple[str, int, str, str]:
    """Sex, age, view and labels."""
    anatomy = study.phantom.anatomy
    return anatomy.sex, anatomy.age, study.phantom.acquisition.view, study.labels


def _save_masks(out: Path, stem: str, image: ThoraxImage, suffix: str) -> tuple[str, str]:
    """Write the masks, 0 or 255; their paths relative to ``out``, empty for a mask that would be."""
    names = []
    (out / "masks").mkdir(exist_ok=True)
    for kind, mask in (("lung", image.lung_mask), ("anomaly", image.anomaly_mask)):
        name = f"masks/{stem}_{kind}.{suffix}" if mask.any() else ""
        if name:
            options = {"compression": "tiff_deflate"} if suffix == "tif" else {}
            Image.fromarray(mask.astype(np.uint8) * 255).save(out / name, **options)
        names.append(name)
    return names[0], names[1]


def _save_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    path.write_bytes(_csv(header, rows))


def _save_zipped_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    # without the time, so that the same table is the same file
    path.write_bytes(gzip.compress(_csv(header, rows), mtime=0))


def _csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return table.getvalue().encode()


def _spacing_mm(size: int) -> float:
    return round(10 * FIELD_OF_VIEW_CM / size, 6)


def _sibling(out: Path) -> Path:
    """Where the next step may write: beside ``out``, so that neither is mistaken for a part of the other."""
    return out.with_name(f"{out.resolve().name}-prepared")


def _command(module: str, *arguments: str, **options: object) -> str:
    given = [part for k, v in options.items() for part in (f"--{k}", str(v))]
    return shlex.join(["python", "-m", module, *arguments, *given])


def _save_nifti(path: Path, voxels: np.ndarray, volume: AbdomenVolume, axes: str) -> None:
    """Write voxels, stored as rows, columns, slices, with the axes in other directions, such as ``LAS``."""
    import nibabel as nib

    origin = _origin_mm(volume)
    # NIfTI's world grows to the right, front and head; columns grow to the left and rows to the back
    affine = np.diag([-volume.spacing[1], -volume.spacing[0], volume.spacing[2], 1])
    affine[:3, 3] = (-origin[0], -origin[1], origin[2])
    image = nib.Nifti1Image(np.ascontiguousarray(voxels.transpose(1, 0, 2)), affine)
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(axes))
    image = image.as_reoriented(turn)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = b"SYNTHETIC: medgen analytic abdomen phantom"
    image.set_sform(image.affine, "scanner")
    image.set_qform(image.affine, "scanner")
    nib.save(image, path)


def _origin_mm(volume: AbdomenVolume) -> tuple[float, float, float]:
    """Centre of the first voxel in DICOM's coordinates; the middle of the volume is at 0."""
    rows, columns, slices = (-(n - 1) / 2 * mm for n, mm in zip(volume.image.shape, volume.spacing, strict=True))
    return round(columns, 4), round(rows, 4), round(slices, 4)


def _ct_series(study: CtStudy, volume: AbdomenVolume, spec: PhantomSpec) -> Iterator[Dataset]:
    """A scan as one CT object a slice, from the head down, as scanners number them."""
    from pydicom.dataset import Dataset

    origin = _origin_mm(volume)
    slices = volume.image.shape[2]
    for number in range(slices):
        level = slices - 1 - number
        z = round(origin[2] + level * volume.spacing[2], 4)
        ds = Dataset()
        uid = _uids(spec)
        _describe(ds, "CT", study, "analytic abdomen phantom", "abdominal CT", "axial")
        ds.SOPClassUID = CT_STORAGE
        ds.SOPInstanceUID = uid("ct", study.patient, study.follow_up, level)
        ds.StudyInstanceUID = uid("ct study", study.patient, study.follow_up)
        ds.SeriesInstanceUID = uid("ct series", study.patient, study.follow_up)
        ds.FrameOfReferenceUID = uid("ct frame", study.patient, study.follow_up)
        ds.PositionReferenceIndicator = ""
        ds.ImageType = ["DERIVED", "PRIMARY", "AXIAL"]
        ds.BodyPartExamined = "ABDOMEN"
        ds.PatientPosition = "HFS"
        ds.PatientOrientation = ["L", "P"]
        ds.InstanceNumber = number + 1
        ds.KVP = "120"
        ds.GantryDetectorTilt = "0"
        ds.SliceThickness = str(volume.spacing[2])
        ds.PixelSpacing = [str(mm) for mm in volume.spacing[:2]]
        ds.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
        ds.ImagePositionPatient = [str(origin[0]), str(origin[1]), str(z)]
        ds.SliceLocation = str(z)
        ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = str(RESCALE_INTERCEPT), "1", "HU"
        ds.WindowCenter, ds.WindowWidth = "40", "400"
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.Rows, ds.Columns = volume.image.shape[:2]
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, BITS_STORED, BITS_STORED - 1
        ds.PixelRepresentation = 0
        stored = volume.image[:, :, level].astype(np.int32) - RESCALE_INTERCEPT
        ds.PixelData = stored.astype("<u2").tobytes()
        ds["PixelData"].VR = "OW"
        _finish_file(ds)
        yield ds


def _uids(spec: PhantomSpec) -> Callable[..., str]:
    """UIDs by what they are of; the specification enters, so that different phantoms never share one."""
    from pydicom.uid import generate_uid

    def uid(*what: object) -> str:
        return generate_uid(entropy_srcs=[f"medgen phantom {__version__}", repr(spec), *map(str, what)])

    return uid


def _describe(ds: Dataset, modality: str, study: Study | CtStudy, model: str, what: str, series: str) -> None:
    """Patient, study, series and equipment, with every mark that says that nobody was imaged."""
    anatomy = study.phantom.anatomy
    number = study.patient + 1
    ds.SpecificCharacterSet = "ISO_IR 100"
    ds.SyntheticData = "YES"
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = STUDY_DATE
    ds.StudyTime = ds.SeriesTime = ds.AcquisitionTime = ds.ContentTime = (
        f"12{study.follow_up // 60:02d}{study.follow_up % 60:02d}"
    )
    ds.AccessionNumber = ""
    ds.Modality = modality
    ds.Manufacturer = "medgen"
    ds.ManufacturerModelName = model
    ds.SoftwareVersions = __version__
    ds.ReferringPhysicianName = ""
    ds.StudyDescription = f"SYNTHETIC {what}"
    ds.SeriesDescription = f"SYNTHETIC {series}"
    ds.DerivationDescription = "Computed from analytic shapes; no patient was imaged"
    ds.PatientName = f"Phantom^Synthetic {number:05d}"
    ds.PatientID = f"PHANTOM{number:05d}"
    ds.PatientBirthDate = ""
    ds.PatientSex = anatomy.sex
    ds.PatientAge = f"{anatomy.age:03d}Y"
    ds.QualityControlSubject = "YES"
    ds.PatientIdentityRemoved = "YES"
    ds.DeidentificationMethod = "no patient: synthetic"
    ds.StudyID = str(study.follow_up + 1)
    ds.SeriesNumber = ds.InstanceNumber = ds.AcquisitionNumber = 1
    ds.ImageComments = f"SYNTHETIC phantom, not a patient. Findings: {study.labels}"
    ds.BurnedInAnnotation = "NO"
    ds.LossyImageCompression = "00"


def _finish_file(ds: Dataset) -> None:
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian


def _dicom(study: Study, image: ThoraxImage, spec: PhantomSpec, inverted: bool, rle: bool) -> Dataset:
    """A radiograph as DX (erect, PA) or CR (bedside, AP), marked as synthetic.

    Args:
        study: what it shows.
        image: its pixels, (H, W) in [0, 1].
        spec: enters the UIDs, so that different phantoms never share one.
        inverted: MONOCHROME1 instead of MONOCHROME2.
        rle: RLE Lossless instead of uncompressed.
    """
    from pydicom.dataset import Dataset
    from pydicom.uid import RLELossless

    view = study.phantom.acquisition.view
    digital = view == "PA"
    uid = _uids(spec)

    def code(value: str, meaning: str) -> Dataset:
        item = Dataset()
        item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "SCT", meaning
        return item

    ds = Dataset()
    _describe(ds, "DX" if digital else "CR", study, "analytic thorax phantom", "chest radiograph", view)
    ds.ImageType = ["DERIVED", "PRIMARY"]
    ds.SOPClassUID = DX_STORAGE if digital else CR_STORAGE
    ds.SOPInstanceUID = uid("image", study.patient, study.follow_up)
    if digital:
        ds.PresentationIntentType = "FOR PRESENTATION"
    ds.BodyPartExamined = "CHEST"
    ds.ViewPosition = view
    ds.ViewCodeSequence = [code(*VIEW_CODES[view])]
    ds.AnatomicRegionSequence = [code(*CHEST_CODE)]
    ds.AcquisitionContextSequence = []
    ds.StudyInstanceUID = uid("study", study.patient, study.follow_up)
    ds.SeriesInstanceUID = uid("series", study.patient, study.follow_up)
    ds.PatientOrientation = ["L", "F"]
    ds.ImageLaterality = "U"
    ds.ImagerPixelSpacing = ds.PixelSpacing = [str(_spacing_mm(spec.size))] * 2
    ds.DetectorType = ""
    ds.PixelIntensityRelationship = "LOG"
    # +1: larger values where more of the beam arrives
    ds.PixelIntensityRelationshipSign = 1 if inverted else -1
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "0", "1", "US"
    ds.PresentationLUTShape = "INVERSE" if inverted else "IDENTITY"
    # PS3.3 C.11.2.1.2: black below center - 0.5 - (width - 1) / 2, white above center - 0.5 + (width - 1) / 2
    ds.WindowCenter = str((STORED_BLACK + STORED_WHITE) / 2 + 0.5)
    ds.WindowWidth = str(STORED_WHITE - STORED_BLACK + 1)
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    ds.Rows, ds.Columns = image.image.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, BITS_STORED, BITS_STORED - 1
    ds.PixelRepresentation = 0
    shown = 1 - image.image if inverted else image.image
    stored = np.rint(STORED_BLACK + shown * (STORED_WHITE - STORED_BLACK)).astype("<u2")
    ds.PixelData = stored.tobytes()
    ds["PixelData"].VR = "OW"

    _finish_file(ds)
    if rle:
        # pydicom's own encoder, not the fastest installed: the bytes must not depend on what is
        ds.compress(RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
    return ds
