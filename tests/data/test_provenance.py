"""Whose images a model saw: recorded, carried along, and held against the patients of a test."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from medgen.data import check_synthetic, check_unseen, datalist_hash, read_trained_on, trained_on, write_datalist
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


def saw(*patients: str | int, chosen_by: str = "", **more: Any) -> dict[str, Any]:
    """Record of a training on patients, of which those of its validation are letters."""
    of = {"training": patients, "validation": chosen_by}
    return {"patients": {name: sorted(map(digest, each)) for name, each in of.items()}, **more}


def weights(path: Path, record: dict[str, Any] | None, content: str = "weights") -> Path:
    """Weights, with the record of their training beside them."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    if record is not None:
        sha256 = hashlib.sha256(content.encode()).hexdigest()
        path.with_name("trained_on.json").write_text(json.dumps({"weights_sha256": [sha256], **record}))
    return path


def test_record_names_the_data_and_each_patient_once_by_a_digest(real):
    record = trained_on(real, items("b", "a", "a"), items("c", "a"))

    assert record == {
        "datalist_sha256": datalist_hash(real),
        "dataset": "lesions",
        "images": {"training": 3, "validation": 2},
        "patients": {"training": sorted(map(digest, "ab")), "validation": [digest("c")]},
    }


def test_patients_of_weights_that_a_training_begins_with_are_added(real, tmp_path, caplog):
    before = weights(tmp_path / "autoencoder.pt", saw("x", "c", chosen_by="ay", unknown=["older.pt"]))
    began_with = [before, None, tmp_path / "real" / "published.pt"]

    record = trained_on(real, items("a"), items("c"), began_with)

    assert record["patients"] == saw("a", "c", "x", chosen_by="y")["patients"]
    assert record["images"] == {"training": 1, "validation": 1}
    assert record["unknown"] == ["older.pt", "published.pt"]
    assert "published.pt: whose images those weights were trained on is not known" in caplog.text


def test_patients_of_the_generators_that_a_training_learns_from_are_added(real, synthetic):
    sets = [synthetic(saw("x", chosen_by="y"), "one"), synthetic(None, "two"), synthetic(saw("z"), "three")]

    record = trained_on(real, items("a"), items("c"), generated=sets)

    assert record["patients"] == saw("a", "x", "z", chosen_by="cy")["patients"]
    assert record["unknown"] == ["two/datalist.json"]


def test_record_vouches_for_the_content_of_weights_not_for_their_name(tmp_path, caplog):
    path = weights(tmp_path / "abnormal.pt", saw("a"))
    assert read_trained_on(path) == saw("a")
    assert read_trained_on(weights(tmp_path / "normal.pt", None, "others")) is None
    # a registered model is called model.pt
    path.rename(tmp_path / "model.pt")
    assert read_trained_on(tmp_path / "model.pt") == saw("a")
    assert not path.exists()
    assert read_trained_on(path) is None
    assert read_trained_on(tmp_path / "nowhere" / "model.pt") is None

    (tmp_path / "model.pt").write_text("published weights, copied over them")
    assert read_trained_on(tmp_path / "model.pt") is None
    assert "is the record of other weights than" in caplog.text

    (tmp_path / "trained_on.json").write_text(json.dumps(saw("a")))
    assert read_trained_on(tmp_path / "model.pt") is None


def test_record_of_an_earlier_version_is_told_from_a_broken_one(real, synthetic):
    with pytest.raises(UserError, match=r"must tell the patients of training from those of validation.*train, or gen"):
        check_synthetic(synthetic({"patients": [digest("a")]}), real)


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
        json.dumps({"patients": {"training": ["0123456789abcdeg"], "validation": []}}),
        json.dumps({"patients": {"training": [], "validation": ["0" * 15]}}),
        json.dumps({"patients": {"training": [17], "validation": []}}),
        json.dumps({"patients": {"training": [], "validation": []}, "unknown": "all"}),
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


def test_generator_may_be_chosen_by_the_validation_but_not_trained_on_it(real, synthetic):
    assert check_synthetic(synthetic(saw("a", "b", chosen_by="c"), "chosen"), real) == 0
    with pytest.raises(UserError, match=r"was trained on 1 of the 1 patients of split validation .*, such as c; "):
        check_synthetic(synthetic(saw("a", "c"), "trained"), real)
    with pytest.raises(UserError, match=r"was trained on, or chosen by, 1 of the 2 patients of split test .* as d; "):
        check_synthetic(synthetic(saw("a", chosen_by="d"), "chosen by the test"), real)


def test_weights_are_not_tested_on_patients_they_saw(real, tmp_path, caplog):
    clean = weights(tmp_path / "clean" / "model.pt", saw("a", "b", chosen_by="c"))
    check_unseen(clean, real)
    check_unseen(clean, real, ["validation"])
    with pytest.raises(UserError, match=r"clean/model\.pt was trained on 2 of the 2 patients of split training"):
        check_unseen(clean, real, ["training"])
    with pytest.raises(UserError, match=r"was trained on 1 of the 2 patients of split test"):
        check_unseen(weights(tmp_path / "leaky" / "model.pt", saw("d")), real, allow_unknown=True)
    with pytest.raises(UserError, match=r"was trained on 1 of the 1 patients of split validation"):
        check_unseen(weights(tmp_path / "other" / "model.pt", saw("c")), real)  # whose threshold it would take

    unknown = weights(tmp_path / "unknown" / "model.pt", saw("a", unknown=["densenet.pth"]))
    for path, why in ((weights(tmp_path / "bare" / "model.pt", None), "it has no"), (unknown, "densenet.pth, which")):
        with pytest.raises(UserError, match=rf"model\.pt was trained on is not known: {why}.*--allow_unknown true"):
            check_unseen(path, real)
        check_unseen(path, real, allow_unknown=True)
    assert caplog.text.count("is taken for granted") == 2


def test_patients_that_only_the_generator_saw_are_counted(real, synthetic, caplog):
    assert check_synthetic(synthetic(saw("a", chosen_by="c")), real) == 0
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
    with pytest.raises(UserError, match=r"trained_on in .*synthetic/datalist\.json must hold lists of patients"):
        check_synthetic(synthetic({"patients": {"training": [["a"]], "validation": []}}), real, allow_unknown=True)


@pytest.mark.parametrize("split", ["training", "validation", "test"])
def test_real_images_are_real_whether_or_not_synthetic_ones_are_named(split, real, synthetic):
    content = json.loads(real.read_text())
    content[split][0]["synthetic"] = True
    real.write_text(json.dumps(content))

    for named in ([], synthetic(saw("a"))):
        with pytest.raises(
            UserError, match=rf"1 items of split {split} are synthetic, such as [acd]\.png; .*--synthetic"
        ):
            check_synthetic(named, real)


def test_split_that_is_not_there_is_no_test(real, synthetic):
    with pytest.raises(UserError, match=r"split held_out must hold items to test on, got none"):
        check_synthetic(synthetic(saw("a")), real, ["held_out"])
    assert check_synthetic([], real, ["held_out"]) == 0  # a training alone tests nothing
