"""Phantoms in MIMIC-CXR's layout: official names and tables, reports in all forms, labels that are true."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image

from medgen.data.phantom import FINDINGS, PhantomSpec, write_phantom
from medgen.data.phantom.reports import CHEXPERT, FORMS, write_report

SPEC = PhantomSpec(patients=14, images_per_patient=2, size=32, seed=2, anomaly_fraction=0.7)
OFFICIAL = {  # as PhysioNet publishes them
    "metadata": "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,StudyDate,"
    "StudyTime,ProcedureCodeSequence_CodeMeaning,ViewCodeSequence_CodeMeaning,"
    "PatientOrientationCodeSequence_CodeMeaning",
    "chexpert": "subject_id,study_id,Atelectasis,Cardiomegaly,Consolidation,Edema,Enlarged Cardiomediastinum,Fracture,"
    "Lung Lesion,Lung Opacity,No Finding,Pleural Effusion,Pleural Other,Pneumonia,Pneumothorax,Support Devices",
    "split": "dicom_id,study_id,subject_id,split",
}
IN_CHEXPERT = {"Nodule": "Lung Lesion", "Mass": "Lung Lesion", "Effusion": "Pleural Effusion"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("mimic") / "phantom"
    write_phantom("mimic-cxr", out, SPEC)
    return out


def table(tree: Path, name: str) -> list[dict[str, str]]:
    data = gzip.decompress((tree / f"mimic-cxr-2.0.0-{name}.csv.gz").read_bytes()).decode()
    return list(csv.DictReader(io.StringIO(data, newline="")))


def truth(tree: Path) -> list[dict[str, str]]:
    with open(tree / "truth.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def report(tree: Path, row: dict[str, str]) -> Path:
    return (tree / row["file"]).parent.with_suffix(".txt")


@pytest.mark.parametrize("name", OFFICIAL)
def test_tables_have_the_official_header(tree, name):
    header = gzip.decompress((tree / f"mimic-cxr-2.0.0-{name}.csv.gz").read_bytes()).decode().split("\n", 1)[0]

    assert header == OFFICIAL[name]


def test_every_image_has_an_official_name_and_is_in_the_tables(tree):
    metadata = table(tree, "metadata")

    paths = [
        f"files/p{row['subject_id'][:2]}/p{row['subject_id']}/s{row['study_id']}/{row['dicom_id']}.jpg"
        for row in metadata
    ]
    assert sorted(paths) == sorted(path.relative_to(tree).as_posix() for path in tree.rglob("*.jpg"))
    for path, row in zip(paths, metadata, strict=True):
        assert re.fullmatch(r"files/p1\d/p1\d{7}/s5\d{7}/([0-9a-f]{8}-){4}[0-9a-f]{8}\.jpg", path)
        image = Image.open(tree / path)
        assert (image.mode, image.height, image.width) == ("L", int(row["Rows"]), int(row["Columns"]))
    assert len({row["study_id"] for row in metadata}) == 28
    assert len({row["subject_id"] for row in metadata}) == 14


def test_views_are_pa_with_and_without_lateral_ap_alone_and_unknown(tree):
    studies: dict[str, list[str]] = {}
    for row in table(tree, "metadata"):
        studies.setdefault(row["study_id"], []).append(row["ViewPosition"])

    found = Counter(map(tuple, studies.values()))
    assert {("PA",), ("PA", "LATERAL"), ("AP",), ("",)} <= set(found)
    assert set(found) <= {("PA",), ("PA", "LATERAL"), ("AP",), ("",), ("", "")}


def test_official_split_is_by_patient_and_has_all_parts(tree):
    parts: dict[str, set[str]] = {}
    for row in table(tree, "split"):
        parts.setdefault(row["subject_id"], set()).add(row["split"])

    assert all(len(part) == 1 for part in parts.values())
    assert set().union(*parts.values()) == {"train", "validate", "test"}


def test_every_form_of_report_is_there_with_its_oddity(tree):
    rows = {row["report"]: row for row in truth(tree)}
    data = {form: report(tree, row).read_bytes() for form, row in rows.items() if form != "missing"}

    assert set(rows) == set(FORMS)
    assert not report(tree, rows["missing"]).exists()
    assert data["empty"] == b""
    assert data["Windows line ends"].count(b"\r\n") == data["Windows line ends"].count(b"\n") >= 5
    with pytest.raises(UnicodeDecodeError):
        data["not UTF-8"].decode()
    assert "5° ± 2°" in " ".join(data["not UTF-8"].decode("latin-1").split())
    assert re.search(rb"\n COMPARISON: .*FINDINGS: ", data["two headers on a line"])
    assert b":" not in data["no header"]
    assert data["empty impression"].rstrip().endswith(b"IMPRESSION:")
    assert re.search(rb"\n [a-z]+:", data["lower-case headers"].lower())
    assert b"FINDINGS:" not in data["lower-case headers"]
    assert data["blanks"].count(b"___") > 5
    assert re.search(rb"IMPRESSION:\s+1\. ", data["numbered"])


def test_reports_are_written_as_mimic_cxr_writes_them(tree):
    for row in truth(tree):
        if row["report"] in ("missing", "empty"):
            continue
        text = report(tree, row).read_bytes().decode("latin-1").replace("\r\n", "\n")

        lines = text.removesuffix("\n").split("\n")
        assert all(line.startswith(" ") and len(line) <= 79 for line in lines)
        # what the truth says stands in the file, whatever the line breaks
        flat = " ".join(text.split())
        assert row["findings"] in flat
        assert re.sub(r"\d\. ", "", flat).endswith(row["impression"]) or row["impression"] in flat


def test_some_sentence_runs_over_a_line_break(tree):
    texts = [report(tree, row).read_text("latin-1") for row in truth(tree) if row["report"] == "standard"]

    assert any(re.search(r"[a-z]\n [a-z]", text) for text in texts)


def test_labels_are_those_of_the_phantom_as_far_as_the_report_tells(tree):
    by_study = {row["study_id"]: row for row in table(tree, "chexpert")}

    values = Counter()
    for row in truth(tree):
        if row["report"] in ("missing", "empty"):
            assert row["study"] not in by_study
            continue
        shown = {IN_CHEXPERT.get(label, label) for label in row["labels"].split("|")}
        given = {name: by_study[row["study"]][name] for name in CHEXPERT}
        values.update(given.values())
        assert {name for name, value in given.items() if value == "1.0"} - {"No Finding"} == shown - {"No Finding"}
        assert (given["No Finding"] == "1.0") == (shown <= {"No Finding", "Support Devices"})
        assert {name for name, value in given.items() if value == "-1.0"} <= {"Pneumonia"}
    assert set(values) == {"", "1.0", "0.0", "-1.0"}


@pytest.mark.parametrize("label", FINDINGS)
@pytest.mark.parametrize("form", ["standard", "findings alone", "impression alone"])
def test_a_finding_is_told_positive_in_whatever_part_of_the_report_there_is(label, form):
    said = write_report(form, [(label, "left")], "PA", "F", False, np.random.default_rng(0))

    assert said.labels[IN_CHEXPERT.get(label, label)] == 1.0
    assert bool(said.findings) == (form != "impression alone")
    assert bool(said.impression) == (form != "findings alone")
    assert said.labels.get("Pneumonia") == (-1.0 if label == "Consolidation" and form != "findings alone" else None)


def test_side_told_is_the_side_seen(tree):
    sides = []
    for row in truth(tree):
        side = re.search(r"\b(left|right)\b", row["findings"].lower())
        if "|" in row["labels"] or side is None:
            continue
        columns = np.nonzero(np.asarray(Image.open(tree / row["anomaly_mask"])))[1]
        # radiographs are read as if the patient faced the reader
        assert ("left" if columns.mean() > (32 - 1) / 2 else "right") == side[1]
        sides.append(side[1])
    assert set(sides) == {"left", "right"}


def test_the_seed_decides_every_byte(tmp_path):
    spec = PhantomSpec(patients=4, images_per_patient=2, size=32, anomaly_fraction=0.5)
    for name in ("a", "b"):
        write_phantom("mimic-cxr", tmp_path / name, spec)
    write_phantom("mimic-cxr", tmp_path / "c", PhantomSpec(4, 2, 32, seed=1, anomaly_fraction=0.5))

    first, second, other = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("a", "b", "c")
    )
    assert first == second
    images = {path: data for path, data in first.items() if path.suffix == ".jpg"}
    assert images
    assert set(images).isdisjoint(other)
    assert set(images.values()).isdisjoint(other.values())


def test_dicom_layout_differs_in_the_images_alone(tmp_path):
    spec = PhantomSpec(patients=4, images_per_patient=2, size=32, seed=3)
    write_phantom("mimic-cxr-dicom", tmp_path / "d", spec)
    write_phantom("mimic-cxr", tmp_path / "j", spec)

    assert table(tmp_path / "d", "metadata") == table(tmp_path / "j", "metadata")
    uids = set()
    for row in table(tmp_path / "d", "metadata"):
        folder = f"files/p{row['subject_id'][:2]}/p{row['subject_id']}/s{row['study_id']}"
        ds = pydicom.dcmread(tmp_path / "d" / folder / f"{row['dicom_id']}.dcm")
        assert ds.PatientID == row["subject_id"]
        assert (ds.Rows, ds.Columns) == (int(row["Rows"]), int(row["Columns"]))
        assert ds.ViewPosition == {"LATERAL": "LL"}.get(row["ViewPosition"], row["ViewPosition"] or ds.ViewPosition)
        assert ds.SyntheticData == "YES"
        uids.add(ds.SOPInstanceUID)
    assert len(uids) == len(table(tmp_path / "d", "metadata"))
    assert json.loads((tmp_path / "d" / "phantom.json").read_text())["layout"] == "mimic-cxr-dicom"
