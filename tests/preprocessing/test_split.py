"""The datalist of a study: who goes where, that nobody leaks, and paths that load_datalist takes."""

from __future__ import annotations

import json
import random

import pytest

from medgen.data import load_datalist, validate_datalist
from preprocessing import _convert as c
from preprocessing import split as module
from preprocessing.split import assign_splits, pick_images


def make_dataset(root, splits, name=None, **extra):
    """A dataset of empty files: split -> list of (file, patient, further fields)."""
    content = {"name": name or root.name, "modality": "CR", **extra}
    for split, rows in splits.items():
        content[split] = []
        for file, patient, fields in rows:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            for path in (file, *(value for key, value in fields.items() if key.endswith("mask"))):
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                (root / path).touch()
            content[split].append({"image": file, "patient": patient, **fields})
    (root / "datalist.json").write_text(json.dumps(content))
    return root


def rows(prefix, count, patients=None, **fields):
    return [(f"images/{prefix}{n}.png", f"{prefix}{n % (patients or count)}", fields) for n in range(count)]


def run(*arguments):
    return c.main(module.app, [str(argument) for argument in arguments])


def patients_of(content, split):
    return {item["patient"] for item in content[split]}


@pytest.fixture
def normal(tmp_path):
    return make_dataset(
        tmp_path / "data/normal",
        {"training": rows("n", 8), "validation": rows("v", 2), "test": rows("t", 6, patients=3)},
    )


@pytest.fixture
def odd(tmp_path):
    """Anomalous images as preprocessing left them: split like any others."""
    masked = [("images/a9.png", "a9", {"anomaly_mask": "masks/a9.png", "corruption": "line"})]
    return make_dataset(tmp_path / "data/odd", {"training": rows("a", 6), "validation": [], "test": masked})


# ---------------------------------------------------------------------------------------------------------------------
# a study


def test_normal_splits_are_kept_and_all_anomalous_images_are_tested(normal, odd, tmp_path):
    target = tmp_path / "data"

    assert run("--normal", normal, "--anomalous", odd / "datalist.json", "--target", target) == 0

    content = validate_datalist(target / "datalist.json")
    assert patients_of(content, "training") == {f"n{n}" for n in range(8)}
    assert patients_of(content, "validation") == {"v0", "v1"}
    assert [item["anomaly"] for item in content["test"]].count(1) == 7
    assert {item["patient"] for item in content["test"] if item["anomaly"] == 0} == {"t0", "t1", "t2"}
    assert not any(item["anomaly"] for split in ("training", "validation") for item in content[split])
    masked = next(item for item in content["test"] if item["patient"] == "a9")
    assert masked == {
        "dataset": "odd",
        "image": "odd/images/a9.png",
        "patient": "a9",
        "anomaly_mask": "odd/masks/a9.png",
        "corruption": "line",
        "anomaly": 1,
    }
    # the target holds both datasets: no --dataset_dir is needed
    assert len(load_datalist(target / "datalist.json", "test")) == 13
    assert (target / "rejected.csv").read_text() == "file,reason\n"


def test_the_dataset_dir_it_prints_is_the_one_that_works(normal, odd, tmp_path, capsys):
    target = tmp_path / "studies/first one"

    run("--normal", normal, "--anomalous", odd, "--target", target)

    line = capsys.readouterr().out.splitlines()[-1]
    assert line == (f"use it with: --datalist '{target}/datalist.json' --dataset_dir {tmp_path / 'data'}")
    for split in ("training", "validation", "test"):
        assert load_datalist(target / "datalist.json", split, tmp_path / "data")


def test_paths_start_from_the_dataset_dir_that_was_given_if_it_holds_the_inputs(normal, odd, tmp_path, capsys):
    arguments = ("--normal", normal, "--anomalous", odd, "--target", tmp_path / "out", "--dataset_dir")

    assert run(*arguments, tmp_path) == 0
    assert validate_datalist(tmp_path / "out/datalist.json")["validation"][0]["image"] == "data/normal/images/v0.png"
    assert run(*arguments, normal) == 1
    assert "--dataset_dir must hold all inputs" in capsys.readouterr().err


def test_patient_with_an_anomalous_image_never_trains(tmp_path, capsys):
    normal = make_dataset(
        tmp_path / "normal",
        {"training": [*rows("n", 4), ("images/x0.png", "x", {})], "validation": [], "test": rows("t", 2)},
    )
    odd = make_dataset(tmp_path / "odd", {"training": [("images/x1.png", "x", {})]})

    run("--normal", normal, "--anomalous", odd, "--target", tmp_path / "out")

    content = validate_datalist(tmp_path / "out/datalist.json")
    assert patients_of(content, "training") == {"n0", "n1", "n2", "n3"}
    assert [(item["image"], item["anomaly"]) for item in content["test"] if item["patient"] == "x"] == [
        ("normal/images/x0.png", 0),
        ("odd/images/x1.png", 1),
    ]
    assert "moved 1 patients" in capsys.readouterr().err


def test_patient_of_two_normal_inputs_goes_to_the_later_split(tmp_path):
    one = make_dataset(tmp_path / "one", {"training": [*rows("n", 3), ("images/x.png", "x", {})], "test": rows("t", 1)})
    two = make_dataset(tmp_path / "two", {"training": rows("m", 3), "validation": [("images/x.png", "x", {})]})

    run("--normal", one, "--normal", two, "--target", tmp_path / "out")

    content = validate_datalist(tmp_path / "out/datalist.json")
    assert [item["image"] for item in content["validation"]] == ["one/images/x.png", "two/images/x.png"]


def test_distinct_keeps_people_apart_whose_numbers_are_equal(tmp_path):
    normal = make_dataset(tmp_path / "cxr", {"training": rows("", 5), "test": [("images/9.png", 9, {})]})
    odd = make_dataset(tmp_path / "hand", {"test": rows("", 5)})

    run("--normal", normal, "--anomalous", odd, "--target", tmp_path / "out", "--distinct")

    content = validate_datalist(tmp_path / "out/datalist.json")
    assert patients_of(content, "training") == {f"cxr/{n}" for n in range(5)}
    assert patients_of(content, "test") == {"cxr/9", *(f"hand/{n}" for n in range(5))}


def test_items_own_word_on_anomaly_is_believed(tmp_path):
    mixed = make_dataset(
        tmp_path / "liver",
        {
            "training": [*rows("n", 4, anomaly=0), ("images/x0.png", "x", {"anomaly": 0})],
            "test": [*rows("t", 2, anomaly=0), ("images/x1.png", "x2", {"anomaly": 1})],
            "validation": [("images/x2.png", "x3", {"anomaly": 1})],
        },
    )
    copies = make_dataset(tmp_path / "copies", {"test": [*rows("o", 2, anomaly=0), *rows("l", 2, anomaly=1)]})

    run("--normal", mixed, "--anomalous", copies, "--target", tmp_path / "out")

    content = validate_datalist(tmp_path / "out/datalist.json")
    told = {item["image"]: item["anomaly"] for item in content["test"]}
    assert {image for image, anomaly in told.items() if anomaly} == {
        "liver/images/x1.png",
        "liver/images/x2.png",
        "copies/images/l0.png",
        "copies/images/l1.png",
    }
    assert len(told) == 8
    assert content["validation"] == []


def test_counts_limit_the_test_set_and_spread_over_patients(normal, odd, tmp_path):
    arguments = ("--normal", normal, "--anomalous", odd, "--test_count", 3, "--max-anomalous", 4)

    run(*arguments, "--target", tmp_path / "a")
    run(*arguments, "--target", tmp_path / "b", "--seed", 1)

    first, second = (validate_datalist(tmp_path / name / "datalist.json") for name in "ab")
    for content in (first, second):
        well = [item["patient"] for item in content["test"] if item["anomaly"] == 0]
        assert sorted(well) == ["t0", "t1", "t2"]
        assert sum(item["anomaly"] for item in content["test"]) == 4
    assert first["test"] != second["test"]
    assert first["training"] == second["training"]


def test_unchanged_copies_beside_their_originals_do_not_count_twice(normal, tmp_path, capsys):
    originals = [
        (f"images/original/t{n}.png", f"t{n % 3}", {"anomaly": 0, "source": f"images/t{n}.png"}) for n in (0, 1)
    ]
    lines = [(f"images/line/t{n}.png", f"t{n % 3}", {"anomaly": 1, "source": f"images/t{n}.png"}) for n in (0, 1)]
    copies = make_dataset(tmp_path / "data/copies", {"test": originals + lines}, source_name="normal")
    # of another dataset whose files are called alike
    strange = make_dataset(
        tmp_path / "data/strange", {"test": [("o/t0.png", "s", originals[0][2])]}, source_name="other"
    )
    arguments = ("--anomalous", copies, "--anomalous", strange, "--target")

    assert run("--normal", normal, *arguments, tmp_path / "study") == 0

    note = capsys.readouterr().err
    assert "note: left out 2 unchanged copies of images that the inputs have themselves" in note
    test = validate_datalist(tmp_path / "study/datalist.json")["test"]
    assert sorted(item["image"] for item in test if not item["anomaly"]) == [
        *(f"normal/images/t{n}.png" for n in range(6)),
        "strange/o/t0.png",
    ]
    assert sum(item["anomaly"] for item in test) == 2
    # a study of the same images starts its paths elsewhere
    run("--normal", normal, "--split", 0.5, 0.1, 0.4, "--target", tmp_path / "data")
    capsys.readouterr()
    run("--normal", tmp_path / "data", *arguments, tmp_path / "second")
    assert "left out 2 unchanged copies" in capsys.readouterr().err
    # alone they are the normal images of the test
    assert run("--normal", copies, "--target", tmp_path / "alone", "--split", 0, 0, 1) == 1
    assert "left out" not in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# splitting again


def test_resplit_gives_the_shares_of_normal_patients_and_still_never_trains_on_others(tmp_path):
    normal = make_dataset(tmp_path / "normal", {"training": rows("n", 40, patients=20)})
    odd = make_dataset(tmp_path / "odd", {"training": [("images/x.png", "n3", {})]})

    run("--normal", normal, "--anomalous", odd, "--target", tmp_path / "out", "--split", 0.5, 0.25, 0.25)

    content = validate_datalist(tmp_path / "out/datalist.json")
    # 38 images of 19 patients are split; n3's two and the anomalous one are tested besides
    assert abs(len(content["training"]) - 19) <= 1
    assert abs(len(content["validation"]) - 9.5) <= 1
    assert "n3" in patients_of(content, "test")
    assert patients_of(content, "training").isdisjoint(patients_of(content, "test"))


def test_parts_are_equal_and_share_nobody(normal, tmp_path):
    run("--normal", normal, "--target", tmp_path / "out", "--parts", 2)

    content = validate_datalist(tmp_path / "out/datalist.json")
    assert [len(content[part]) for part in ("part1", "part2")] == [8, 8]
    assert patients_of(content, "part1").isdisjoint(patients_of(content, "part2"))
    assert "anomaly" not in content["part1"][0]
    assert len(load_datalist(tmp_path / "out/datalist.json", "part2", normal)) == 8


def test_a_split_can_be_split_again(normal, tmp_path):
    run("--normal", normal, "--target", tmp_path / "first", "--resplit")

    code = run(
        *("--normal", tmp_path / "first", "--target", tmp_path / "second", "--parts", 4),
        *("--dataset_dir", normal),
    )

    assert code == 0
    assert load_datalist(tmp_path / "second/datalist.json", "part4", normal)


def test_patients_are_assigned_alike_whatever_the_order():
    items = [
        {"image": f"{n}.png", "patient": f"p{n % 13}", "anomaly": int(n % 13 == 5), "split": "training"}
        for n in range(60)
    ]
    shuffled = random.Random(0).sample(items, len(items))
    shares = {"training": 0.6, "validation": 0.2, "test": 0.2}

    first, second = (assign_splits(order, shares, seed=3)[0] for order in (items, shuffled))

    assert first == second
    assert {item["patient"] for item in first["test"]} >= {"p5"}


def test_pick_takes_everybodys_first_image_before_anybodys_second():
    items = [{"image": f"{patient}{n}", "patient": patient} for patient in "abcd" for n in range(5)]

    assert {item["patient"] for item in pick_images(items, 4)} == set("abcd")
    assert len(pick_images(items, 6)) == 6
    assert pick_images(items, 99) == items
    assert pick_images(items, 6) == sorted(pick_images(items[::-1], 6), key=items.index)


# ---------------------------------------------------------------------------------------------------------------------
# what is refused


def test_an_inputs_own_datalist_is_not_overwritten(normal, odd, capsys):
    before = (normal / "datalist.json").read_bytes()

    assert run("--normal", normal, "--anomalous", odd, "--target", normal) == 1
    assert "was not written by this command" in capsys.readouterr().err
    assert (normal / "datalist.json").read_bytes() == before


def test_the_same_target_again_is_replaced(normal, odd, tmp_path):
    for count in (1, 2):
        run("--normal", normal, "--anomalous", odd, "--target", tmp_path / "out", "--max_anomalous", count)

    content = validate_datalist(tmp_path / "out/datalist.json")
    assert sum(item["anomaly"] for item in content["test"]) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--normal", "normal", "--anomalous", "normal"), 1, "stands in two inputs"),
        (("--normal", "normal", "--split", "0.5", "0.1", "0.1"), 1, "must be 0 or more and sum to 1"),
        (("--normal", "normal", "--parts", "2", "--resplit"), 2, "--parts excludes"),
        (("--normal", "normal", "--max_anomalous", "2"), 1, "needs anomalous images"),
        (("--normal", "nowhere"), 1, "not found"),
        (("--normal", "odd", "--anomalous", "normal", "--split", "0", "0", "1"), 1, "training would have no normal"),
        (("--anomalous", "odd"), 2, "normal"),
    ],
)
def test_what_cannot_be_done_is_one_line(normal, odd, tmp_path, monkeypatch, capsys, arguments, code, message):
    monkeypatch.chdir(tmp_path / "data")

    assert run(*arguments, "--target", tmp_path / "out") == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_missing_images_are_told_of(normal, odd, tmp_path, capsys):
    (odd / "images/a3.png").unlink()

    assert run("--normal", normal, "--anomalous", odd, "--target", tmp_path / "out") == 1
    assert "a3.png not found (1 of the files" in capsys.readouterr().err


def test_anomaly_that_is_no_flag_is_refused(tmp_path, capsys):
    data = make_dataset(tmp_path / "data", {"training": rows("n", 2, anomaly="needle")})

    assert run("--normal", data, "--target", tmp_path / "out") == 1
    assert "anomaly must be 0 or 1, got 'needle'" in capsys.readouterr().err
