"""Phantoms in the layout of the RSNA challenge: its tables, true classes and boxes, and patients by the mapping."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image

from medgen.data.phantom import PhantomSpec, draw_studies, write_phantom
from medgen.data.reader import read_frames

SPEC = PhantomSpec(patients=12, images_per_patient=2, size=64, seed=4, anomaly_fraction=0.7)
OPACITIES = {"Consolidation", "Mass", "Nodule"}
MAPPING = "pneumonia-challenge-dataset-mappings_2018.json"


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("rsna") / "phantom"
    write_phantom("rsna", out, SPEC)
    return out


def table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def truth(tree: Path) -> dict[str, dict[str, str]]:
    return {Path(row["file"]).stem: row for row in table(tree / "truth.csv")}


def test_tables_are_as_the_challenge_has_them(tree):
    labels = (tree / "stage_2_train_labels.csv").read_text().splitlines()
    classes = (tree / "stage_2_detailed_class_info.csv").read_text().splitlines()

    assert labels[0] == "patientId,x,y,width,height,Target"
    assert classes[0] == "patientId,class"
    # a row for each box in both, by id
    ids = [row.split(",")[0] for row in labels[1:]]
    assert ids == sorted(ids) == [row.split(",")[0] for row in classes[1:]]
    assert set(ids) == {path.stem for path in (tree / "stage_2_train_images").glob("*.dcm")}
    assert len(set(ids)) == 24 < len(ids)
    blank, boxed = r"[0-9a-f-]{36},,,,,0", r"[0-9a-f-]{36}(,\d+\.0){4},1"
    assert all(re.fullmatch(blank, row) or re.fullmatch(boxed, row) for row in labels[1:])


def test_files_are_8_bit_jpegs_without_a_window_that_show_the_phantom(tree):
    studies = list(draw_studies(SPEC))
    paths = {path.stem: path for path in (tree / "stage_2_train_images").iterdir()}

    for study, name in list(zip(studies, truth(tree), strict=True))[:4]:
        ds = pydicom.dcmread(paths[name])
        assert ds.PatientID == name
        assert (ds.Rows, ds.Columns, ds.BitsAllocated, ds.BitsStored) == (64, 64, 8, 8)
        assert ds.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.4.50"  # JPEG baseline
        assert (ds.PhotometricInterpretation, ds.Modality) == ("MONOCHROME2", "CR")
        assert "WindowCenter" not in ds
        assert ds.SyntheticData == "YES"
        (frame,) = read_frames(paths[name])
        shown = study.phantom.render(64, study.findings).image
        assert frame.meta["view_position"] == study.phantom.acquisition.view
        assert np.corrcoef(frame.pixels.ravel(), shown.ravel())[0, 1] > 0.999


def test_class_and_target_follow_the_findings(tree):
    classes = {row["patientId"]: row["class"] for row in table(tree / "stage_2_detailed_class_info.csv")}
    targets = {row["patientId"]: row["Target"] for row in table(tree / "stage_2_train_labels.csv")}

    for name, row in truth(tree).items():
        findings = set(row["labels"].split("|"))
        opacity = bool(findings & OPACITIES)
        expected = "Normal" if findings == {"No Finding"} else "Lung Opacity" if opacity else None
        assert classes[name] == (expected or "No Lung Opacity / Not Normal")
        assert targets[name] == str(int(opacity))
    assert min(Counter(classes.values()).values()) > 3


def test_boxes_are_as_large_as_the_opacities(tree):
    boxes: dict[str, list[tuple[int, ...]]] = {}
    for row in table(tree / "stage_2_train_labels.csv"):
        if row["Target"] == "1":
            boxes.setdefault(row["patientId"], []).append(
                tuple(round(float(row[side])) for side in ("x", "y", "width", "height"))
            )
    alone = 0
    for name, row in truth(tree).items():
        covered = np.zeros((64, 64), bool)
        for x, y, width, height in boxes.get(name, []):
            covered[y : y + height, x : x + width] = True
        mask = np.zeros((64, 64), bool)
        if row["anomaly_mask"]:
            mask = np.asarray(Image.open(tree / row["anomaly_mask"])) > 0
        findings = set(row["labels"].split("|"))
        if findings <= OPACITIES:
            alone += 1
            assert not (mask & ~covered).any()
            for x, y, width, height in boxes[name]:  # no side can be moved inwards
                part = mask[y : y + height, x : x + width]
                assert all(edge.any() for edge in (part[0], part[-1], part[:, 0], part[:, -1]))
        elif findings & OPACITIES:  # what else is in the image has no box
            assert (mask & covered).any()
            assert (mask & ~covered).any()
    assert alone > 3
    assert len(boxes) > alone


def test_mapping_names_the_patient_of_each_image(tree):
    mapping = json.loads((tree / MAPPING).read_text())

    rows = truth(tree)
    assert {entry["subset_img_id"]: int(entry["img_id"][:8]) for entry in mapping} == {
        name: int(row["patient"]) for name, row in rows.items()
    }
    assert all(re.fullmatch(r"\d{8}_\d{3}\.png", entry["img_id"]) for entry in mapping)
    assert len({entry["img_id"] for entry in mapping}) == 24
    assert set(Counter(row["patient"] for row in rows.values()).values()) == {2}
    for entry in mapping[:3]:
        ds = pydicom.dcmread(tree / "stage_2_train_images" / f"{entry['subset_img_id']}.dcm", stop_before_pixels=True)
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
            assert entry[keyword] == ds[keyword].value
