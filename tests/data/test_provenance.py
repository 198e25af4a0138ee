"""Whose images a model saw: recorded, carried along, and held against the patients of a test."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from medgen.data import check_synthetic, datalist_hash, read_trained_on, trained_on, write_datalist
from medgen.errors import UserError

SPLITS = {"training": ("a", "b"), "validation": ("c",), "test": ("d", 5)}


def digest(patient: str | int) -> str:
    return hashlib.sha256(str(patient).encode()).hexdigest()[:16]


def items(*patients: str | int, **fields: Any) -> list[dict[str, Any]]:
    return [{"image": f"{patient}.png", "patient": patient, **fields} for patient in patients]


@pytest.fixture
def real(tmp_path) -> Path:
    splits = {name: items(*patients) for name, patients in SPLITS.items()}
    write_datalist(tmp_path / "real" / "datalist.json", "lesions", "RGB", splits)
    return tmp_path / "real" / "datalist.json"


@pytest.fixture
def synthetic(tmp_path):
    def write(record: Any, name: str = "synthetic") -> Path:
        path = tmp_path / name / "datalist.json"
        extra = {} if record is None else {"trained_on": record}
        write_datalist(path, name, "RGB", {"training": items("synthetic-0", synthetic=True)}, **extra)
        return path

    return write


def saw(*patients: str | int, **more: Any) -> dict[str, Any]:
    return {"patients": sorted(digest(patient) for patient in patients), **more}


def test_record_names_the_data_and_each_patient_once_by_a_digest(real):
    record = trained_on(real, items("b", "a", "a"), items("c"))

    assert record == {
        "datalist_sha256": datalist_hash(real),
        "dataset": "lesions",
        "images": {"training": 3, "validation": 1},
        "patients": sorted(map(digest, "abc")),
    }


def test_patients_of_weights_that_a_training_begins_with_are_added(real, tmp_path, caplog):
    (tmp_path / "trained_on.json").write_text(json.dumps(saw("x", "a", unknown=["older.pt"])))
    began_with = [tmp_path / "autoencoder.pt", None, tmp_path / "real" / "published.pt"]

    record = trained_on(real, items("a"), items("c"), began_with)

    assert record["patients"] == sorted(map(digest, "acx"))
    assert record["images"] == {"training": 1, "validation": 1}
    assert record["unknown"] == ["older.pt", "published.pt"]
    assert "published.pt: whose images those weights were trained on is not known" in caplog.text


def test_record_of_another_file_in_the_folder_is_not_taken_for_that_of_the_weights(tmp_path):
    for name in ("normal.pt", "abnormal.pt"):
        (tmp_path / name).touch()
    (tmp_path / "trained_on.json").write_text(json.dumps({"weights": "abnormal.pt", **saw("a")}))

    assert read_trained_on(tmp_path / "abnormal.pt") == saw("a")
    assert read_trained_on(tmp_path / "normal.pt") is None
    # the file was renamed: a registered model is called model.pt
    (tmp_path / "abnormal.pt").rename(tmp_path / "model.pt")
    assert read_trained_on(tmp_path / "model.pt") == saw("a")
    assert read_trained_on(tmp_path / "nowhere" / "model.pt") is None


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "\xff",
        "[" * 100_000,
        "null",
        "[]",
        "{}",
        json.dumps({"patients": "all"}),
        json.dumps({"patients": ["0123456789abcdeg"]}),
        json.dumps({"patients": ["0" * 15]}),
        json.dumps({"patients": [17]}),
        json.dumps({"patients": [], "unknown": "all"}),
    ],
    ids=range(11),
)
def test_broken_record_is_refused_in_one_line(text, tmp_path):
    (tmp_path / "trained_on.json").write_text(text, encoding="latin-1")

    with pytest.raises(UserError, match=r"trained_on\.json must .*, got .*; restore it") as caught:
        read_trained_on(tmp_path / "model.pt")
    assert "\n" not in str(caught.value)


def test_generator_that_saw_patients_of_the_test_is_refused(real, synthetic):
    clean, leaky = synthetic(saw("a"), "clean"), synthetic(saw("a", "5", "b"), "leaky")

    with pytest.raises(
        UserError, match=r"leaky/datalist\.json was trained on 1 of the 2 patients of split test"
    ) as one:
        check_synthetic([clean, leaky], real)
    assert ", such as 5; " in str(one.value)
    with pytest.raises(UserError, match=r"1 of the 2 patients of split test"):
        check_synthetic(leaky, real, allow_unknown=True)
    with pytest.raises(UserError, match=r"on 2 of the 3 patients of split validation, test .*, such as [cd]; "):
        check_synthetic(synthetic(saw("c", "d")), real, ["validation", "test"])


def test_patients_that_only_the_generator_saw_are_counted(real, synthetic, caplog):
    assert check_synthetic(synthetic(saw("a", "c")), real) == 0
    assert not caplog.messages

    assert check_synthetic([synthetic(saw("a", "x", "y"), "one"), synthetic(saw("y", "z"), "two")], real) == 3
    assert "one/datalist.json saw 2 patients, of 3, that are in no training or validation split" in caplog.text


@pytest.mark.parametrize("record", [None, saw("a", unknown=["published.pt"])])
def test_unknown_patients_are_refused_unless_allowed(record, real, synthetic, caplog):
    path = synthetic(record)

    with pytest.raises(UserError, match=r"does not say whose images its generator saw: .*--allow_unknown true"):
        check_synthetic(path, real)
    assert check_synthetic(path, real, allow_unknown=True) == 0
    assert "is taken for granted" in caplog.text


def test_tampered_record_in_a_synthetic_datalist_is_refused(real, synthetic):
    with pytest.raises(UserError, match=r"trained_on in .*synthetic/datalist\.json must hold a list of patients"):
        check_synthetic(synthetic({"patients": [["a"]]}), real, allow_unknown=True)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_synthetic_images_choose_and_test_no_model(split, real, synthetic):
    content = json.loads(real.read_text())
    content[split][0]["synthetic"] = True
    real.write_text(json.dumps(content))

    with pytest.raises(UserError, match=rf"1 items of split {split} are synthetic, such as [cd]\.png"):
        check_synthetic(synthetic(saw("a")), real)


def test_split_that_is_not_there_is_no_test(real, synthetic):
    with pytest.raises(UserError, match=r"split held_out must hold items to test on, got none"):
        check_synthetic(synthetic(saw("a")), real, ["held_out"])
