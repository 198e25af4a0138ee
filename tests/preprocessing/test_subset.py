"""Datalists with fewer training images: nested, by patient, and nothing else changed."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from medgen.data import load_classes, load_datalist, write_datalist
from preprocessing import _convert as c
from preprocessing.subset import app, first_images

NAMES = ["Abdomen", "CXR", "Hand"]


def make(folder: Path, labels, patients: int = 20, **extra) -> Path:
    """Images of a few patients, each with two or three of one class, in three splits."""
    splits: dict[str, list[dict]] = {"training": [], "validation": [], "test": []}
    for patient in range(patients):
        split = "test" if patient % 5 == 4 else "validation" if patient % 5 == 3 else "training"
        for number in range(2 + patient % 2):
            image = f"images/p{patient}_{number}.png"
            splits[split].append({"image": image, "patient": f"p{patient}", **labels(patient)})
            (folder / "images").mkdir(parents=True, exist_ok=True)
            (folder / image).touch()
    write_datalist(folder / "datalist.json", "whole", "X-ray", splits, **extra)
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    return make(tmp_path / "data", lambda patient: {"label": patient % 3}, 60, label_names=NAMES)


def call(source, target, *words):
    return c.main(app, ["--datalist", str(source), "--target", str(target), *map(str, words)])


def read(target, name="datalist.json"):
    return json.loads((target / name).read_text())


def counts(items):
    return Counter(item["label"] for item in items)


def test_training_has_the_images_asked_for_and_the_other_splits_are_whole(data, tmp_path, capsys):
    whole = read(data)
    assert call(data, tmp_path / "out", "--training", "Hand=5", "--training", "1=12") == 0
    part = read(tmp_path / "out")
    assert counts(part["training"]) == {0: counts(whole["training"])[0], 1: 12, 2: 5}
    assert (part["validation"], part["test"]) == (whole["validation"], whole["test"])
    assert part["label_names"] == NAMES
    assert part["modality"] == "X-ray"
    assert "training: 47 images" in (told := capsys.readouterr().out)
    assert told.splitlines()[-1] == f"use it with: --datalist {tmp_path}/out/datalist.json --dataset_dir {data}"
    assert len(load_datalist(tmp_path / "out" / "datalist.json", "training", data)) == 47


def test_smaller_numbers_are_parts_of_larger_ones_of_as_few_patients_as_possible(data):
    items = [item for item in read(data)["training"] if item["label"] == 0]
    taken = [{item["image"] for item in first_images(items, count, seed=1)} for count in range(1, len(items) + 1)]
    assert [len(images) for images in taken] == list(range(1, len(items) + 1))
    assert all(small < large for small, large in pairwise(taken))
    size = Counter(item["patient"] for item in items)
    for images in taken:
        seen = Counter(item["patient"] for item in items if item["image"] in images)
        assert sum(seen[patient] < size[patient] for patient in seen) <= 1
    backwards = {item["image"] for item in first_images(items[::-1], 7, seed=1)}
    assert backwards == taken[6] != {item["image"] for item in first_images(items, 7, seed=2)}


def test_one_class_does_not_change_when_another_gets_more(data, tmp_path):
    for name, other in (("a", 3), ("b", 20)):
        call(data, tmp_path / name, "--training", "Hand=5", "--training", f"CXR={other}", "--validation", "CXR=4")
    first, second = ([item for item in read(tmp_path / name)["training"] if item["label"] == 2] for name in ("a", "b"))
    assert first == second
    assert counts(read(tmp_path / "a")["validation"])[1] == 4


def test_classes_kept_are_numbered_in_the_order_of_their_names(data, tmp_path):
    call(data, tmp_path / "only", "--training", "Hand=5", "--training", "CXR=12", "--only")
    call(data, tmp_path / "keep", "--keep", "CXR", "--keep", "Hand", "--training", "Hand=5")
    whole = read(data)
    for name, names in (("only", ["Hand", "CXR"]), ("keep", ["CXR", "Hand"])):
        part = read(tmp_path / name)
        assert part["label_names"] == names
        for split in ("training", "validation", "test"):
            for item in part[split]:
                (before,) = (one for one in whole[split] if one["image"] == item["image"])
                assert names[item["label"]] == NAMES[before["label"]]
        assert len(part["test"]) == sum(item["label"] > 0 for item in whole["test"])
        assert len(load_classes(tmp_path / name / "datalist.json", "test", data, num_classes=2)) == len(part["test"])


def test_each_class_has_a_datalist_of_its_own_with_the_same_items(data, tmp_path):
    call(data, tmp_path / "out", "--training", "Hand=5")
    call(data, tmp_path / "out", "--training", "Hand=6", "--keep", "CXR", "--keep", "Hand")
    assert {path.name for path in (tmp_path / "out").glob("*.json")} == {
        "datalist.json",
        "datalist_cxr.json",
        "datalist_hand.json",
    }
    part = read(tmp_path / "out")
    for number, name in enumerate(("cxr", "hand")):
        own = read(tmp_path / "out", f"datalist_{name}.json")
        for split in ("training", "validation", "test"):
            assert own[split] == [item for item in part[split] if item["label"] == number]
    assert len(read(tmp_path / "out", "datalist_hand.json")["training"]) == 6


def test_names_that_are_alike_have_files_of_their_own(tmp_path):
    names = ["a", "a!", "a 1", "皮"]
    data = make(tmp_path / "data", lambda patient: {"label": patient // 5}, label_names=names)
    assert call(data, tmp_path / "out") == 0
    singles = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("datalist_*.json")]
    assert {single["name"] for single in singles} == {f"out, {name}" for name in names}
    assert all(len(counts(single["training"])) == 1 for single in singles)


def test_an_empty_list_of_names_is_no_split_and_paths_are_whole(tmp_path, monkeypatch, capsys):
    make(tmp_path / "data", lambda patient: {"label": patient % 2}, label_names=[])
    monkeypatch.chdir(tmp_path)
    assert call("data", "out", "--training", "1=3") == 0
    assert read(tmp_path / "out")["label_names"] == ["0", "1"]
    told = f"use it with: --datalist {tmp_path}/out/datalist.json --dataset_dir {tmp_path}/data"
    assert capsys.readouterr().out.splitlines()[-1] == told


def test_a_class_without_a_training_image_is_refused(tmp_path, capsys):
    data = make(tmp_path / "data", lambda patient: {"label": int(patient % 5 == 4)}, label_names=["x", "y", "z"])
    for words, name in (([], "y"), (["--keep", "x", "--keep", "z"], "z")):
        assert call(data, tmp_path / "out", *words) == 1
        assert f"class {name} has no training image" in capsys.readouterr().err
    assert call(data, tmp_path / "out", "--keep", "x") == 0


def test_labels_that_are_names_become_numbers(tmp_path):
    data = make(tmp_path / "data", lambda patient: {"label": "ab"[patient % 2]})
    call(data, tmp_path / "out", "--training", "b=3")
    part = read(tmp_path / "out")
    assert part["label_names"] == ["a", "b"]
    assert counts(part["training"])[1] == 3
    assert all(item["label"] == int(item["patient"][1:]) % 2 for item in part["training"])


def test_a_finding_becomes_the_label_and_other_findings_are_left_out(tmp_path, capsys):
    findings = ([], ["Pneumonia"], ["Mass"], ["Mass", "Pneumonia"])
    data = make(tmp_path / "data", lambda patient: {"labels": findings[patient % 4]}, label_names=["Mass", "Pneumonia"])
    call(data, tmp_path / "out", "--label-from", "Pneumonia", "--training", "Pneumonia=4", "--training", "No Finding=5")
    part = read(tmp_path / "out")
    assert part["label_names"] == ["No Finding", "Pneumonia"]
    assert counts(part["training"]) == {0: 5, 1: 4}
    for item in part["training"] + part["validation"] + part["test"]:
        assert item["label"] == int("Pneumonia" in item["labels"])
        assert item["labels"] != ["Mass"]
    assert "left out by --label_from Pneumonia: 10 images" in capsys.readouterr().out
    assert call(data, tmp_path / "none", "--label-from", "Hernia") == 1
    assert "Mass, Pneumonia; got 'Hernia'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--training", "Hand=1000"], "needs as many training images of that class, got 30; ask for fewer"),
        (["--training", "Foot=1"], "expected a class of Abdomen, CXR, Hand"),
        (["--training", "Hand"], "must be CLASS=N"),
        (["--training", "Hand=1", "--training", "2=2"], "names Hand twice"),
        (["--training", "Hand=1", "--keep", "CXR"], "--training names Hand, but --keep leaves it out"),
        (["--validation", "CXR=1", "--training", "Hand=1", "--only"], "--validation names CXR, but --only keeps"),
        (["--keep", "CXR", "--keep", "1"], "--keep names CXR twice"),
        (["--only"], "--only keeps the classes of --training"),
        (["--dataset_dir", "/nowhere"], "not found; name the folder"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(words, said, data, tmp_path, capsys):
    assert call(data, tmp_path / "out", *words) in (1, 2)
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_items_without_a_class_are_refused(tmp_path, capsys):
    data = make(tmp_path / "data", lambda patient: {"label": 0} if patient else {})
    assert call(data, tmp_path / "out") == 1
    assert "images/p0_0.png must have a label" in capsys.readouterr().err


def test_a_datalist_of_another_command_is_not_overwritten(data, capsys):
    before = (data / "datalist.json").read_bytes()
    assert call(data, data, "--training", "Hand=5") == 1
    assert "choose another --target" in capsys.readouterr().err
    assert (data / "datalist.json").read_bytes() == before
    assert not list(data.glob("datalist_*"))


def test_a_subset_is_taken_of_a_subset_too(data, tmp_path):
    call(data, tmp_path / "large", "--training", "Hand=20")
    assert call(tmp_path / "large", tmp_path / "small", "--training", "Hand=5") == 1  # its images lie elsewhere
    assert call(tmp_path / "large", tmp_path / "small", "--training", "Hand=5", "--dataset-dir", data) == 0
    call(data, tmp_path / "direct", "--training", "Hand=5")
    assert read(tmp_path / "small")["training"] == read(tmp_path / "direct")["training"]


def test_first_images_takes_all_when_there_are_fewer():
    items = [{"image": "a", "patient": "1"}, {"image": "b", "patient": "2"}]
    assert first_images(items, 5) == items
