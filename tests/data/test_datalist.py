"""Datalists: splits by patient, checks, loading, folders."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medgen.data import (
    datalist_hash,
    items_from_folder,
    load_classes,
    load_datalist,
    readable_items,
    reader,
    select_label,
    split_by_patient,
    validate_datalist,
    write_datalist,
)
from medgen.data.datalist import evenly, file_stem, list_files, natural_key
from medgen.errors import UserError


def _items(images_per_patient):
    return [
        {"image": f"p{p}/{n}.png", "patient": f"p{p}"}
        for p, count in enumerate(images_per_patient)
        for n in range(count)
    ]


def _one(image="a.png", patient="1", **more):
    return {"image": image, "patient": patient, **more}


# ---------------------------------------------------------------------------------------------------------------------
# split_by_patient


def test_no_patient_stands_in_two_splits_and_no_image_is_lost():
    items = _items(random.Random(1).choices(range(1, 30), k=100))

    splits = split_by_patient(items, seed=3)

    homes = Counter(patient for part in splits.values() for patient in {item["patient"] for item in part})
    assert set(homes.values()) == {1}
    assert sorted(item["image"] for part in splits.values() for item in part) == sorted(item["image"] for item in items)


def test_split_does_not_depend_on_input_order_but_on_the_seed():
    items = _items([1, 2, 3] * 20)
    shuffled = random.Random(0).sample(items, len(items))

    assert split_by_patient(items, seed=5) == split_by_patient(shuffled, seed=5)
    assert split_by_patient(items, seed=5) != split_by_patient(items, seed=6)


def test_fractions_are_met_exactly_when_patients_have_one_image():
    splits = split_by_patient(_items([1] * 200), {"training": 0.7, "validation": 0.1, "test": 0.2}, seed=1)

    assert {name: len(part) for name, part in splits.items()} == {"training": 140, "validation": 20, "test": 40}


@pytest.mark.parametrize("seed", range(5))
def test_fractions_are_met_within_one_image_when_many_patients_differ_in_size(seed):
    items = _items(random.Random(seed).choices([1, 1, 2, 3, 8, 40], k=120))

    splits = split_by_patient(items, seed=seed)

    for name, share in {"training": 0.8, "validation": 0.1, "test": 0.1}.items():
        assert abs(len(splits[name]) - share * len(items)) <= 1


def test_few_patients_are_split_nearly_as_well_as_by_trying_every_split():
    shares = (0.6, 0.2, 0.2)
    for seed in range(10):
        sizes = random.Random(seed).choices(range(1, 10), k=7)
        total = sum(sizes)

        def error(counts, total=total):
            return sum(abs(count - share * total) for count, share in zip(counts, shares, strict=True))

        best = min(
            error([sum(s for s, home in zip(sizes, homes, strict=True) if home == part) for part in range(3)])
            for homes in product(range(3), repeat=7)
            if set(homes) == {0, 1, 2}
        )
        splits = split_by_patient(_items(sizes), dict(zip("abc", shares, strict=True)), seed=seed)

        assert error([len(part) for part in splits.values()]) <= best + 2


def test_patients_with_many_images_are_not_kept_for_training():
    # dealing out the largest first would send every one of them there: a shift between training and test
    items = _items([20] * 20 + [1] * 400)

    held_out = 0
    for seed in range(10):
        splits = split_by_patient(items, {"training": 0.5, "test": 0.5}, seed=seed)
        held_out += sum(count == 20 for count in Counter(item["patient"] for item in splits["test"]).values())

    assert 70 <= held_out <= 130  # 100 expected


@pytest.mark.parametrize("sizes", [[1, 1, 1], [50, 1, 1], [9, 9, 9], [100, 1, 1, 1]])
def test_no_split_is_empty_when_there_are_enough_patients(sizes):
    for seed in range(10):
        splits = split_by_patient(_items(sizes), {"training": 0.98, "validation": 0.01, "test": 0.01}, seed=seed)
        assert all(splits.values())


def test_single_patient_goes_to_training():
    splits = split_by_patient(_items([4]))

    assert {name: len(part) for name, part in splits.items()} == {"training": 4, "validation": 0, "test": 0}


def test_split_with_fraction_zero_stays_empty():
    splits = split_by_patient(_items([1] * 10), {"training": 0.9, "validation": 0.1, "test": 0.0})

    assert [len(part) for part in splits.values()] == [9, 1, 0]


@pytest.mark.parametrize("fractions", [{"a": 0.5, "b": 0.4}, {"a": 1.2, "b": -0.2}, {}])
def test_fractions_that_are_no_shares_are_refused(fractions):
    with pytest.raises(UserError, match="sum to 1"):
        split_by_patient(_items([1, 1]), fractions)


def test_item_without_patient_is_refused_by_split():
    with pytest.raises(UserError, match=r"a\.png"):
        split_by_patient([{"image": "a.png"}])


# ---------------------------------------------------------------------------------------------------------------------
# validate, write, hash


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"training": [_one()], "test": [_one("b.png")]}, "patient 1 stands in two splits, training and test"),
        ({"training": [_one(patient=7)], "test": [_one("b.png", "7")]}, "patient 7 stands in two splits"),
        ({"training": [_one()], "extra": [_one("b.png")]}, "patient 1 stands in two splits, training and extra"),
        ({"training": [_one()], "test": [_one("./a.png", "2")]}, "image a.png stands already in training"),
        ({"training": [_one(), _one("x/../a.png")]}, "image a.png stands already in training"),
        ({"training": [{"patient": "1"}]}, r"training\[0\] must have an image"),
        ({"training": [_one(), {"image": "b.png"}]}, r"training\[1\] \(b.png\) must have a patient"),
        ({"training": [_one(patient="")]}, "must have a patient"),
        ({"training": [_one("/etc/a.png")]}, "path below the dataset's folder"),
        ({"training": [_one("C:\\a.png")]}, "path below the dataset's folder"),
        ({"training": [_one("\\\\host\\share\\a.png")]}, "path below the dataset's folder"),
        ({"training": [_one("x/../../a.png")]}, "path below the dataset's folder"),
        ({"training": [_one("..\\a.png")]}, "path below the dataset's folder"),
        ({"training": [_one(mask="../m.png")]}, "mask must be a path below"),
        ({"training": [_one(anomaly_mask=3)]}, "anomaly_mask must be a path below"),
        ({"training": {"image": "a.png"}}, "training must be a list"),
        ({"training": ["a.png"]}, r"training\[0\] must be an object"),
        ({"name": "x", "modality": "CT"}, "got no split"),
        ([_one()], "expected an object"),
    ],
)
def test_bad_datalist_is_refused_with_its_place(content, message):
    with pytest.raises(UserError, match=message) as caught:
        validate_datalist(content)
    assert "\n" not in str(caught.value)


def test_good_datalist_passes_with_everything_it_holds():
    content = {
        "name": "x",
        "labels": {"0": "background"},
        "training": [_one("a..b/a.png", mask="m.png"), _one("b.png", mask="m.png")],
        "validation": [],
    }

    assert validate_datalist(content) == content


@pytest.mark.parametrize("text", ["", "{", '{"training": [', "\xff", "[" * 100_000])
def test_file_that_is_not_json_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "datalist.json"
    path.write_bytes(text.encode("latin-1"))

    with pytest.raises(UserError, match="is not JSON") as caught:
        validate_datalist(path)
    assert "\n" not in str(caught.value)


def test_written_datalist_is_decathlon_json_with_extra_keys(tmp_path):
    path = tmp_path / "datalist.json"

    write_datalist(path, "näme", "CT", {"training": [_one(text="Zwerchfell é")], "test": []}, label_names=["a"])

    assert json.loads(path.read_text("utf-8")) == {
        "name": "näme",
        "modality": "CT",
        "label_names": ["a"],
        "training": [{"image": "a.png", "patient": "1", "text": "Zwerchfell é"}],
        "test": [],
    }


def test_bad_datalist_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "datalist.json"
    write_datalist(path, "x", "CT", {"training": [_one()]})
    before = path.read_bytes()

    with pytest.raises(UserError):
        write_datalist(path, "x", "CT", {"training": [_one("/a.png")]})

    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["datalist.json"]


def test_hash_ignores_formatting_and_key_order_but_not_content(tmp_path):
    texts = [
        '{"training": [{"image": "a", "patient": "é"}], "name": "x"}',
        '{\n "name": "x",\n "training": [{"patient": "\\u00e9", "image": "a"}]}',
        '{"training": [{"image": "b", "patient": "é"}], "name": "x"}',
    ]
    hashes = []
    for text in texts:
        (tmp_path / "d.json").write_text(text, encoding="utf-8")
        hashes.append(datalist_hash(tmp_path / "d.json"))

    canonical = '{"name":"x","training":[{"image":"a","patient":"\\u00e9"}]}'
    assert hashes[0] == hashes[1] == hashlib.sha256(canonical.encode()).hexdigest()
    assert hashes[2] != hashes[0]


# ---------------------------------------------------------------------------------------------------------------------
# load_datalist


@pytest.fixture
def dataset(tmp_path):
    for name in ("images/a.png", "images/b.png", "masks/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    training = [_one("images/a.png", "1", mask="masks/a.png", label=1), _one("images/b.png", "2")]
    write_datalist(tmp_path / "datalist.json", "x", "CR", {"training": training, "test": []})
    return tmp_path


def test_loading_joins_images_and_masks_and_keeps_the_rest(dataset):
    items = load_datalist(dataset / "datalist.json", "training")

    assert items == [
        {
            "image": str(dataset / "images/a.png"),
            "patient": "1",
            "mask": str(dataset / "masks/a.png"),
            "label": 1,
        },
        {"image": str(dataset / "images/b.png"), "patient": "2"},
    ]


def test_dataset_dir_replaces_the_datalists_folder(dataset, tmp_path_factory):
    moved = tmp_path_factory.mktemp("lists") / "list.json"
    (dataset / "datalist.json").rename(moved)

    assert load_datalist(str(moved), "training", str(dataset))[1]["image"] == str(dataset / "images/b.png")
    with pytest.raises(UserError, match=r"3 of the files of split training are missing.*dataset_dir"):
        load_datalist(moved, "training", "")


def test_first_missing_file_is_named_unless_files_are_not_required(dataset):
    (dataset / "images/b.png").unlink()

    with pytest.raises(UserError, match=r"b\.png not found \(1 of"):
        load_datalist(dataset / "datalist.json", "training")
    assert len(load_datalist(dataset / "datalist.json", "training", require_files=False)) == 2


@pytest.mark.parametrize(("split", "state"), [("test", "empty"), ("tests", "missing")])
def test_absent_or_empty_split_lists_those_that_exist(dataset, split, state):
    with pytest.raises(UserError, match=rf"split {split} is {state}; it has training \(2\), test \(0\)"):
        load_datalist(dataset / "datalist.json", split)


def test_missing_datalist_says_how_one_is_made(tmp_path):
    with pytest.raises(UserError, match=r"python -m preprocessing\.images --source DIR --target DIR"):
        load_datalist(tmp_path / "none.json", "training")


# ---------------------------------------------------------------------------------------------------------------------
# folders


def test_folder_gives_items_in_natural_order_without_tables_and_hidden_files(tmp_path):
    for name in ("s10/i2.png", "s2/i10.dcm", "s2/i9.nii.gz", "labels.csv", "a.TXT", ".x.png", ".git/i.png", "b.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    assert items_from_folder(tmp_path) == [
        {"image": str(tmp_path / "s2/i9.nii.gz"), "patient": "i9"},
        {"image": str(tmp_path / "s2/i10.dcm"), "patient": "i10"},
        {"image": str(tmp_path / "s10/i2.png"), "patient": "i2"},
    ]


def test_folder_without_images_is_refused(tmp_path):
    (tmp_path / "labels.csv").touch()
    with pytest.raises(UserError, match="empty folder"):
        items_from_folder(tmp_path)
    with pytest.raises(UserError, match="not found"):
        items_from_folder(tmp_path / "none")
    with pytest.raises(UserError, match="a file"):
        items_from_folder(tmp_path / "labels.csv")


@pytest.fixture
def mixed_folder(tmp_path):
    """Two plain pictures of one name, a TIFF of three pages, and four files that are no images."""
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    picture = Image.fromarray(np.arange(100, dtype=np.uint8).reshape(10, 10))
    picture.save(folder / "a.png")
    picture.save(folder / "a.jpg")
    picture.save(folder / "deep/run.tif", save_all=True, append_images=[picture] * 2)
    whole = (folder / "a.png").read_bytes()
    (folder / "deep/cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.dcm").touch()
    (folder / "thesis.pdf").write_bytes(b"%PDF-1.7 " + bytes(1000))
    (folder / os.fsdecode(b"caf\xe9.png")).write_text("no image")
    (folder / "labels.csv").write_text("file,label\n")
    return folder


def _rejected(path):
    with open(path, newline="", encoding="utf-8") as file:
        return {row["file"]: row["reason"] for row in csv.DictReader(file)}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_files_of_a_folder_are_tried_and_each_one_not_used_has_its_reason(mixed_folder, tmp_path, capsys, num_workers):
    items = items_from_folder(mixed_folder, tmp_path / "out/rejected.csv", num_workers)

    assert [item["image"] for item in items] == [
        str(mixed_folder / name) for name in ("a.jpg", "a.png", "deep/run.tif")
    ]
    rejected = _rejected(tmp_path / "out/rejected.csv")
    assert "truncated or damaged" in rejected.pop("deep/cut.png")
    assert rejected == {
        "caf\\xe9.png": "not a PNG, JPEG, TIFF, BMP, DICOM or NIfTI file by its content",
        "deep/run.tif": (
            "2 of 3 frames left out, only the first is used; python -m preprocessing.images converts them all"
        ),
        "empty.dcm": "empty file (0 bytes)",
        "thesis.pdf": "not a PNG, JPEG, TIFF, BMP, DICOM or NIfTI file by its content",
    }
    (line,) = capsys.readouterr().out.splitlines()
    assert "3 of 7 files are readable images, 1 of them with further frames" in line
    assert str(tmp_path / "out/rejected.csv") in line
    assert line.endswith("; 1 CSV, JSON or TXT passed over")


def test_table_of_rejected_files_has_its_header_only_when_all_were_used(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "in/a.png")
    (tmp_path / "rejected.csv").write_text("file,reason\nold.png,of an earlier run\n")

    items = items_from_folder(tmp_path / "in", tmp_path / "rejected.csv")

    assert items == items_from_folder(tmp_path / "in")
    assert (tmp_path / "rejected.csv").read_text() == "file,reason\n"


def test_folder_without_a_readable_image_is_refused_after_the_reasons_are_written(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").touch()
    (tmp_path / "in/notes.md").write_text("# no image")

    with pytest.raises(UserError, match=r"none of the 2 files below \S+in is a readable image; see \S+rejected\.csv"):
        items_from_folder(tmp_path / "in", tmp_path / "rejected.csv")

    assert set(_rejected(tmp_path / "rejected.csv")) == {"a.png", "notes.md"}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "too large for the memory"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (RecursionError("too\ndeep"), "RecursionError: too; deep"),
    ],
)
def test_whatever_a_decoder_raises_is_a_reason_and_no_end(mixed_folder, tmp_path, monkeypatch, error, reason):
    read = reader.read_some

    def read_some(path, *options):
        if path.name == "a.png":
            raise error
        return read(path, *options)

    monkeypatch.setattr(reader, "read_some", read_some)

    items = items_from_folder(mixed_folder, tmp_path / "rejected.csv")

    assert [Path(item["image"]).name for item in items] == ["a.jpg", "run.tif"]
    assert _rejected(tmp_path / "rejected.csv")["a.png"] == reason


def test_trying_the_files_leaves_the_random_numbers_of_the_run_alone(mixed_folder, tmp_path):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)

    items_from_folder(mixed_folder, tmp_path / "rejected.csv")

    assert torch.equal(torch.rand(3), expected)


def test_table_that_cannot_be_written_is_a_user_error(mixed_folder, tmp_path):
    (tmp_path / "out").touch()

    with pytest.raises(UserError, match=r"out/rejected\.csv cannot be written"):
        items_from_folder(mixed_folder, tmp_path / "out/rejected.csv")


def test_linked_folders_are_entered_once_and_loops_end(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/a.png").touch()
    (tmp_path / "source").mkdir()
    (tmp_path / "source/images_001").symlink_to(tmp_path / "disk")
    (tmp_path / "source/images_002").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/loop").symlink_to(tmp_path / "source")

    assert list_files(tmp_path / "source") == ["images_001/a.png"]


def test_natural_order_is_total():
    names = ["a1", "a01", "a10", "a2", "b", "1", "A1", "a", "10a", "2a"]
    backwards = names[::-1]

    assert sorted(names, key=natural_key) == sorted(backwards, key=natural_key)
    assert sorted(names, key=natural_key)[:3] == ["1", "2a", "10a"]


@pytest.mark.parametrize(
    ("name", "stem"),
    [("a/b.nii.gz", "b"), ("1.2.840.113", "1.2.840.113"), ("1.2.DCM", "1.2"), ("x.tar", "x.tar"), (".png", ".png")],
)
def test_stem_cuts_image_suffixes_only(name, stem):
    assert file_stem(name) == stem


def test_labels_become_class_indices_in_the_order_of_their_names(tmp_path):
    items = [{"image": f"{n}.png", "patient": str(n), "label": label} for n, label in enumerate(["b", "a", 1])]
    for item in items:
        (tmp_path / item["image"]).touch()
    write_datalist(tmp_path / "d.json", "n", "CT", {"training": items}, label_names=["b", "a"])
    assert [item["label"] for item in load_classes(tmp_path / "d.json", "training", num_classes=2)] == [0, 1, 1]
    assert [item["label"] for item in load_classes(tmp_path / "d.json", "training")] == ["b", "a", 1]


@pytest.mark.parametrize(("label", "got"), [("c", "'c'"), (2, "2"), (-1, "-1"), (True, "True"), (None, "none")])
def test_label_that_is_no_class_is_refused(label, got, tmp_path):
    (tmp_path / "0.png").touch()
    splits = {"training": [{"image": "0.png", "patient": "p", "label": label}]}
    write_datalist(tmp_path / "d.json", "n", "CT", splits, label_names=["b", "a"])
    with pytest.raises(UserError, match=rf"0.png: label must be a class from 0 to 1 or one of .*b, a.*, got {got};"):
        load_classes(tmp_path / "d.json", "training", num_classes=2)


def test_split_that_must_be_normal_holds_no_anomaly(tmp_path):
    items = [{"image": f"{n}.png", "patient": str(n), "anomaly": int(n == 1)} for n in range(3)]
    for item in items:
        (tmp_path / item["image"]).touch()
    write_datalist(tmp_path / "d.json", "n", "CT", {"training": items, "test": items[:0]})
    assert len(load_classes(tmp_path / "d.json", "training")) == 3
    with pytest.raises(UserError, match=r"1 of 3 items of split training are anomalous, the first is .*1\.png; "):
        load_classes(tmp_path / "d.json", "training", normal=True)


@pytest.mark.parametrize(("label", "images"), [(None, "abcde"), (1, "bd"), ("1", "bd"), ("normal", "c")])
def test_items_of_one_class(label, images):
    labels = [0, 1, "normal", "1", None]
    items = [{"image": name, "label": value} for name, value in zip("abcde", labels, strict=True)]

    assert "".join(item["image"] for item in select_label(items, label)) == images


def test_a_class_that_no_item_has_is_named_with_those_that_there_are():
    items = [{"image": "a", "label": 0}, {"image": "b", "label": 0}, {"image": "c"}]

    with pytest.raises(
        UserError, match=r"label must be one that the datalist's items have, 0 \(2\), None \(1\), got 2"
    ):
        select_label(items, 2)
    with pytest.raises(UserError, match="got 'None'"):
        select_label(items, "None")


@pytest.mark.parametrize(("n", "count", "expected"), [(5, 9, [0, 1, 2, 3, 4]), (4, 2, [0, 2]), (0, 3, [])])
def test_items_are_taken_evenly(n, count, expected):
    assert evenly([{"image": place} for place in range(n)], count) == [{"image": place} for place in expected]


def test_few_items_of_a_long_list_reach_its_end():
    taken = [item["image"] for item in evenly([{"image": place} for place in range(3999)], 2000)]
    assert len(set(taken)) == 2000
    assert taken[-1] >= 3996


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_images_of_a_datalist_are_left_out_and_known_ones_not_read(tmp_path, num_workers):
    (tmp_path / "sub").mkdir()
    items = [{"image": str(tmp_path / name), "patient": name} for name in ("a.png", "sub/b.png", "c.png")]
    Image.fromarray(np.eye(8, dtype=np.uint8)).save(items[0]["image"])
    for item in items[1:]:
        Path(item["image"]).write_bytes(b"no picture")
    found = readable_items(items, tmp_path, tmp_path / "rejected.csv", num_workers, lambda item: item is items[2])
    assert found == [items[0], items[2]]
    with open(tmp_path / "rejected.csv", newline="") as file:
        assert [row["file"] for row in csv.DictReader(file)] == ["sub/b.png"]
    with pytest.raises(UserError, match="none of the 2 images of the datalist can be read"):
        readable_items(items[1:], tmp_path, tmp_path / "rejected.csv", num_workers)


def test_parts_of_a_folder_are_read_by_themselves_and_the_whole_as_ever(tmp_path, capsys):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/c.png"):
        Image.fromarray(np.eye(8, dtype=np.uint8)).save(folder / name)
    frames = [Image.fromarray(np.eye(8, dtype=np.uint8))] * 2
    frames[0].save(folder / "d.tif", save_all=True, append_images=frames[1:])
    for name in ("b.png", "note.txt"):
        (folder / name).write_bytes(b"no picture")
    expected = items_from_folder(folder, tmp_path / "expected.csv")
    printed = capsys.readouterr().out
    listed = items_from_folder(folder)

    parts = [readable_items(listed[start::2], folder, None, from_folder=True) for start in range(2)]
    assert sorted(item["image"] for part in parts for item in part) == sorted(item["image"] for item in expected)
    assert [path.name for path in tmp_path.glob("*.csv")] == ["expected.csv"]
    # whatever is finished: the table is of all files
    whole = readable_items(listed, folder, tmp_path / "expected2.csv", 0, lambda item: True, from_folder=True)
    assert whole == expected
    assert (tmp_path / "expected2.csv").read_bytes() == (tmp_path / "expected.csv").read_bytes()
    assert capsys.readouterr().out == printed.replace("expected.csv", "expected2.csv")


def test_shard_without_a_readable_image_says_so_and_writes_nothing(tmp_path, caplog):
    (tmp_path / "a.png").write_bytes(b"no picture")
    assert readable_items([{"image": str(tmp_path / "a.png")}], tmp_path, None) == []
    assert readable_items([], tmp_path, None) == []
    assert f"{tmp_path / 'a.png'} is left out: " in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
