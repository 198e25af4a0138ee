"""NIH ChestX-ray14: table, published lists, images wherever they lie."""

from __future__ import annotations

import csv
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medgen.data import validate_datalist
from preprocessing import _convert as c
from preprocessing import chestxray14

DATA = Path(__file__).parents[3] / "shared" / "data"
HEADER_2017 = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
)
HEADER_2020 = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Sex,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
ROWS = [
    "00000001_000.png,Cardiomegaly|Effusion,0,1,058Y,M,PA,2682,2749,0.143,0.143,",
    "00000001_001.png,No Finding,1,1,58,M,AP,2894,2729,0.143,0.143,",
    "00000002_000.png,Hernia,0,2,411,F,PA,2500,2048,0.168,0.168,",
    "00000003_000.png,No Finding,0,3,011M,F,AP,2500,2048,0.168,0.168,",
    "00000004_000.png,Mass,0,4,70,F,PA,2500,2048,0.168,0.168,",
    "00000005_000.png,Nodule,0,5,71,M,PA,2500,2048,0.168,0.168,",
]


def _run(*arguments):
    # one worker unless the test says so: each costs the start of an interpreter
    workers = () if "--workers" in arguments else ("--workers", 1)
    return c.main(chestxray14.app, [str(argument) for argument in (*arguments, *workers)])


def _make(root, names, rows=ROWS, header=HEADER_2017, table="Data_Entry_2017.csv"):
    root.mkdir(exist_ok=True)
    (root / table).write_text("\n".join([header, *rows]) + "\n")
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (32, 32), dtype=np.uint8)).save(path)


def _items(target):
    content = validate_datalist(target / "datalist.json")
    return {
        Path(item["image"]).stem: {**item, "split": split}
        for split in ("training", "validation", "test")
        for item in content[split]
    }


ALL = [f"images_00{n + 1}/images/{row.split(',')[0]}" for n, row in enumerate(ROWS)]


@pytest.mark.parametrize(
    ("header", "table"),
    [
        (HEADER_2017, "Data_Entry_2017.csv"),
        (HEADER_2020, "Data_Entry_2017_v2020.csv"),
        (HEADER_2020.replace("OriginalImage[Width,Height]", '"OriginalImage[Width,Height]"'), "Data_Entry_2017.csv"),
    ],
)
def test_items_carry_the_fields_of_the_table_in_both_forms(tmp_path, header, table):
    _make(tmp_path / "s", ALL, header=header, table=table)

    code = _run("--source", tmp_path / "s", "--target", tmp_path / "t", "--size", 32)

    items = _items(tmp_path / "t")
    assert code == 0
    assert len(items) == 6
    del items["00000001_000"]["split"], items["00000001_001"]["split"]
    assert items["00000001_000"] == {
        "image": "images/00000/00000001_000.png",
        "patient": "1",
        "labels": ["Cardiomegaly", "Effusion"],
        "age": 58,
        "sex": "M",
        "view": "PA",
        "follow_up": 0,
    }
    assert items["00000001_001"]["labels"] == []
    assert "age" not in items["00000002_000"]  # 411 years
    assert items["00000003_000"]["age"] == 0  # 11 months
    written = np.asarray(Image.open(tmp_path / "t/images/00000/00000004_000.png"))
    np.testing.assert_array_equal(written, np.asarray(Image.open(tmp_path / "s" / ALL[4])))


def test_published_lists_are_kept_and_validation_comes_from_train_val_by_patient(tmp_path):
    _make(tmp_path / "s", ALL)
    (tmp_path / "s/train_val_list.txt").write_text("\n".join(row.split(",")[0] for row in ROWS[:4]) + "\n")
    (tmp_path / "s/test_list.txt").write_text("00000004_000.png\r\n")

    code = _run("--source", tmp_path / "s", "--target", tmp_path / "t", "--size", 32)

    items = _items(tmp_path / "t")
    assert code == 3
    assert {name for name, item in items.items() if item["split"] == "test"} == {"00000004_000"}
    assert {item["split"] for name, item in items.items() if name < "00000004"} == {"training", "validation"}
    assert (
        "00000005_000.png,neither in train_val_list.txt nor in test_list.txt"
        in (tmp_path / "t/rejected.csv").read_text()
    )
    assert _run("--source", tmp_path / "s", "--target", tmp_path / "t2", "--size", 32, "--no-official") == 0


def test_views_left_out_are_no_rejections(tmp_path, capsys):
    _make(tmp_path / "s", ALL)

    code = _run("--source", tmp_path / "s", "--target", tmp_path / "t", "--size", 32, "--view", "PA")

    assert code == 0
    assert {item["view"] for item in _items(tmp_path / "t").values()} == {"PA"}
    assert "left out by --view PA: 2 images" in capsys.readouterr().out
    assert (tmp_path / "t/rejected.csv").read_text() == "file,reason\n"


def test_missing_unlisted_and_doubled_images_have_rows_and_jpeg_copies_are_found(tmp_path):
    names = ["images/00000001_000.jpg", "images/00000001_001.png", "old/00000001_001.png", "images/99999999_000.png"]
    _make(tmp_path / "s", names, rows=ROWS[:3])
    (tmp_path / "s/README.pdf").write_text("no image of the dataset")

    code = _run("--source", tmp_path / "s", "--target", tmp_path / "t", "--size", 32)

    with open(tmp_path / "t/rejected.csv", newline="") as file:
        rejected = {row["file"]: row["reason"] for row in csv.DictReader(file)}
    assert code == 3
    assert set(_items(tmp_path / "t")) == {"00000001_000", "00000001_001"}
    assert rejected == {
        "00000002_000.png": "listed in Data_Entry_2017.csv, but not found below the source",
        "images/99999999_000.png": "not listed in Data_Entry_2017.csv",
        "old/00000001_001.png": "the same image as images/00000001_001.png",
    }


def test_table_names_that_are_paths_are_rejected_and_nothing_leaves_the_target(tmp_path):
    paths = ["../../../../escaped/evil.png", "..\\..\\worse.png", "/bad.png", "deep/down.png"]
    rows = [f"{path},Mass,0,{number + 10},50,M,PA,32,32,0.1,0.1," for number, path in enumerate(paths)]
    pictures = ["evil.jpg", "worse.jpg", "bad.jpg", "down.png", "00000001_000.png"]
    _make(tmp_path / "s", pictures, rows=[*rows, ROWS[0]])
    target = tmp_path / "1/2/3/4/5/6/7/t"
    before = set(tmp_path.rglob("*"))

    code = _run("--source", tmp_path / "s", "--target", target, "--size", 32)

    written = {path for path in set(tmp_path.rglob("*")) - before if path.is_file()}
    with open(target / "rejected.csv", newline="") as file:
        rejected = {row["file"]: row["reason"] for row in csv.DictReader(file)}
    assert code == 3
    assert all(path.is_relative_to(target) for path in written)
    assert {path.name for path in written if path.suffix == ".png"} == {"00000001_000.png"}
    assert set(_items(target)) == {"00000001_000"}
    assert rejected == {
        **dict.fromkeys(paths, "named in Data_Entry_2017.csv by a path, expected a plain file name"),
        **dict.fromkeys(pictures[:4], "not listed in Data_Entry_2017.csv"),
    }


def test_source_without_table_or_images_is_refused(tmp_path, capsys):
    (tmp_path / "s").mkdir()
    assert _run("--source", tmp_path / "s", "--target", tmp_path / "t") == 1
    assert "expected Data_Entry_2017*.csv" in capsys.readouterr().err
    _make(tmp_path / "s", [])
    assert _run("--source", tmp_path / "s", "--target", tmp_path / "t") == 1
    assert "none of the 6 images" in capsys.readouterr().err
    (tmp_path / "s/Data_Entry_2017.csv").write_text("a,b\n1,2\n")
    assert _run("--source", tmp_path / "s", "--target", tmp_path / "t") == 1
    assert "must have a column Image Index, got a, b" in capsys.readouterr().err


@pytest.mark.skipif(not (DATA / "nih_cxr512.zip").exists(), reason="real images (../shared/data) are absent")
def test_real_sample_is_converted_completely(tmp_path):
    with zipfile.ZipFile(DATA / "nih_cxr512.zip") as archive:
        archive.extractall(tmp_path / "s")

    code = _run("--source", tmp_path / "s", "--target", tmp_path / "t", "--size", 64)

    items = _items(tmp_path / "t")
    assert code == 0
    assert len(items) == 320
    content = json.loads((tmp_path / "t/datalist.json").read_text())
    assert [len(content[split]) for split in ("training", "validation", "test")] == [256, 32, 32]
    assert {label for item in items.values() for label in item["labels"]} <= set(chestxray14.FINDINGS)
    name, item = next(iter(items.items()))
    got = np.asarray(Image.open(tmp_path / "t" / item["image"])).astype(float)
    original = Image.open(next((tmp_path / "s").rglob(f"{name}.jpg"))).convert("L")
    expected = np.asarray(original.resize((64, 64), Image.Resampling.BOX)).astype(float)
    assert np.abs(got - expected).mean() < 2  # upright, not mirrored, not inverted
