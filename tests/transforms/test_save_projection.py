"""Records of projections: content, names, settings and broken files."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from medgen.errors import UserError
from medgen.transforms import ProjectionRecord, SavePNG, SaveProjectiond, SaveUnlessDiverged

SETTINGS = {"space": "w", "steps": 3, "seed": 303}


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"weights")
    return path


@pytest.fixture
def image(tmp_path):
    """An image's file, of which only the bytes count here."""
    path = tmp_path / "a.png"
    path.write_bytes(b"pixels")
    return str(path)


def item(file: str) -> dict:
    """What the evaluator hands on, after decollating."""
    return {
        "image": MetaTensor(torch.zeros(1, 4, 4), meta={"filename_or_obj": file}),
        "w": torch.arange(12.0).reshape(3, 4),
        "noise": [torch.full((1, 2, 2), 0.5), torch.full((1, 4, 4), 0.25)],
        "loss_curve": torch.tensor([2.0, 1.0, torch.nan]),
        "steps": 2,
        "distance": 0.75,
    }


def make_saver(weights, folder, settings=SETTINGS, **changes) -> SaveProjectiond:
    return SaveProjectiond(folder, settings, weights, **changes)


def test_record_holds_what_was_found(weights, tmp_path, image):
    saved = make_saver(weights, tmp_path / "out")(item(image))
    record = ProjectionRecord(saved["projection_path"])
    np.testing.assert_array_equal(record.w, np.arange(12.0).reshape(3, 4))
    np.testing.assert_array_equal(record.loss_curve, [2, 1, np.nan])
    assert [noise.shape for noise in record.noise] == [(2, 2), (4, 4)]
    assert (record.steps, record.distance) == (2, 0.75)
    digest = hashlib.sha256(b"weights").hexdigest()
    assert record.settings == {**SETTINGS, "save_noise": True, "model_sha256": digest}
    assert record.source == {"image_sha256": hashlib.sha256(b"pixels").hexdigest()}
    with np.load(saved["projection_path"], allow_pickle=False) as file:
        assert all(file[name].dtype != object for name in file.files)


def test_record_is_named_as_the_reconstruction_is(weights, tmp_path):
    files = [str(tmp_path / name) for name in ("a/x.png", "a/x.dcm", "b/x.png")]
    saver = make_saver(weights, tmp_path / "out", data_root=tmp_path, inputs=files)
    png = SavePNG(tmp_path / "out", tmp_path, inputs=files)
    for file in files:
        assert saver.path_of(file) == png.path(np.empty(0), {"filename_or_obj": file}).with_suffix(".npz")
    assert len({saver.path_of(file) for file in files}) == 3


def test_noise_maps_may_be_left_out(weights, tmp_path, image):
    saved = make_saver(weights, tmp_path / "out", save_noise=False)(item(image))
    assert ProjectionRecord(saved["projection_path"]).noise == []


def test_same_result_gives_the_same_bytes(weights, tmp_path, image):
    first, second = (make_saver(weights, tmp_path / name)(item(image))["projection_path"] for name in "ab")
    assert open(first, "rb").read() == open(second, "rb").read()


def test_image_is_finished_when_its_record_is_whole(weights, tmp_path, image):
    saver = make_saver(weights, tmp_path / "out")
    assert not saver.is_finished({"image": image})
    path = saver.path_of(image)
    saver(item(image))
    assert make_saver(weights, tmp_path / "out").is_finished({"image": image})
    whole = path.read_bytes()
    bare = io.BytesIO()
    np.save(bare, np.zeros(3))
    for content in (b"", whole[: len(whole) // 2], bare.getvalue()):
        path.write_bytes(content)
        assert not saver.is_finished({"image": image})
        with pytest.raises(UserError, match="no whole record of a projection"):
            ProjectionRecord(path)
    np.savez(path, w=np.zeros(3))
    assert not saver.is_finished({"image": image})


def test_image_without_its_reconstruction_is_not_finished(weights, tmp_path, image):
    saver = make_saver(weights, tmp_path / "out", reconstruction_dir=tmp_path / "reconstructions")
    saver(item(image))
    assert not saver.is_finished({"image": image})
    SavePNG(tmp_path / "reconstructions").save(torch.zeros(1, 4, 4), {"filename_or_obj": image})
    assert saver.is_finished({"image": image})
    # a record of other settings is refused all the same: it would be overwritten
    (tmp_path / "reconstructions/a.png").unlink()
    changed = make_saver(
        weights, tmp_path / "out", {**SETTINGS, "steps": 9}, reconstruction_dir=tmp_path / "reconstructions"
    )
    with pytest.raises(UserError, match="made with steps"):
        changed.is_finished({"image": image})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"settings": {**SETTINGS, "steps": 4}},
            "made with steps 3, this run has 4; resume with what it was made with",
        ),
        ({"settings": {**SETTINGS, "loss": "other"}}, "made with loss None, this run has other"),
        ({"settings": {"space": "w", "steps": 3}}, "made with seed 303, this run has None"),
        ({"save_noise": False}, "made with save_noise True, this run has False"),
    ],
)
def test_record_of_other_settings_is_refused(weights, tmp_path, changes, message, image):
    make_saver(weights, tmp_path / "out")(item(image))
    with pytest.raises(UserError, match=message):
        make_saver(weights, tmp_path / "out", **changes).is_finished({"image": image})


def test_record_of_other_weights_is_refused(weights, tmp_path, image):
    make_saver(weights, tmp_path / "out")(item(image))
    weights.write_bytes(b"trained further")
    with pytest.raises(UserError, match="made with model_sha256"):
        make_saver(weights, tmp_path / "out").is_finished({"image": image})


def test_pickles_are_not_executed(weights, tmp_path, image):
    saver = make_saver(weights, tmp_path / "out")
    path = saver.path_of(image)
    path.parent.mkdir(parents=True)
    pickled = np.array([{"a": 1}], dtype=object)
    np.savez(path, w=pickled, loss_curve=pickled, steps=1, distance=1, settings=pickled)
    assert not saver.is_finished({"image": image})


def test_settings_are_a_json_text(weights, tmp_path, image):
    saved = make_saver(weights, tmp_path / "out")(item(image))
    with np.load(saved["projection_path"], allow_pickle=False) as file:
        assert json.loads(str(file["settings"]))["steps"] == 3


def test_missing_weights_are_one_line(tmp_path, image):
    with pytest.raises(UserError, match=r"no weights at .*absent\.pt; .*--model_path"):
        make_saver(tmp_path / "absent.pt", tmp_path / "out")(item(image))


def test_record_of_an_image_that_has_changed_is_refused(weights, tmp_path, image):
    make_saver(weights, tmp_path / "out")(item(image))
    Path(image).write_bytes(b"other pixels")
    with pytest.raises(UserError, match=r"a\.npz was made with image_sha256 \w+, this run has \w+; resume"):
        make_saver(weights, tmp_path / "out").is_finished({"image": image})


def test_record_of_another_label_is_refused(weights, tmp_path, image):
    saver = make_saver(weights, tmp_path / "out", label_key="label")
    saver(item(image) | {"label": torch.tensor(1)})
    assert saver.is_finished({"image": image, "label": 1})
    with pytest.raises(UserError, match="made with label 1, this run has 0"):
        saver.is_finished({"image": image, "label": 0})


def test_an_image_that_is_gone_is_one_line(weights, tmp_path, image):
    saver = make_saver(weights, tmp_path / "out")
    saver(item(image))
    Path(image).unlink()
    with pytest.raises(UserError, match=r"a\.png cannot be read \(No such file"):
        saver.is_finished({"image": image})


def test_the_models_own_maps_are_not_saved(weights, tmp_path, image):
    saver = make_saver(weights, tmp_path / "out", {**SETTINGS, "optimise_noise": False})
    assert ProjectionRecord(saver(item(image))["projection_path"]).noise == []
    assert saver.is_finished({"image": image})


@pytest.mark.parametrize(
    "change",
    [
        {"settings": np.array("[]")},
        {"settings": np.array("{")},
        {"source": np.array("1")},
        {"settings": np.zeros(3)},
        {"w": np.array(["a"])},
        {"w": np.zeros(4)},
        {"w": np.zeros((3, 4), dtype=np.complex64)},
        {"loss_curve": np.zeros((2, 2))},
        {"steps": np.array(1.5)},
        {"steps": np.zeros(2, dtype=int)},
        {"distance": np.array("near")},
        {"foo": np.zeros(1)},
        {"noise_x": np.zeros((2, 2))},
        {"noise_7": np.zeros((2, 2))},
    ],
)
def test_foreign_arrays_are_no_record(weights, tmp_path, image, change):
    saver = make_saver(weights, tmp_path / "out")
    path = saver(item(image))["projection_path"]
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{**arrays, **change})
    assert not saver.is_finished({"image": image})
    with pytest.raises(UserError, match="no whole record of a projection"):
        ProjectionRecord(path)


def test_noise_maps_of_another_kind_are_no_record(weights, tmp_path, image):
    path = make_saver(weights, tmp_path / "out")(item(image))["projection_path"]
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{**arrays, "noise_1": np.array(["a"])})
    record = ProjectionRecord(path)
    with pytest.raises(UserError, match="no whole record of a projection"):
        _ = record.noise


def test_an_image_that_diverged_is_listed_and_the_others_are_written(weights, tmp_path, image, caplog):
    other = str(tmp_path / "b.png")
    Path(other).write_bytes(b"more pixels")
    saver = make_saver(weights, tmp_path / "out", data_root=tmp_path)
    table = tmp_path / "rejected.csv"
    table.write_text("file,reason\nscan.dcm,2 of 3 frames left out\n")
    for _ in range(2):  # a resumed run meets it again
        write = SaveUnlessDiverged(saver, table, tmp_path)
        with caplog.at_level(logging.WARNING):
            write(item(image) | {"distance": torch.tensor(torch.nan)})
        write(item(other))
    with table.open(newline="") as file:
        rows = {row["file"]: row["reason"] for row in csv.DictReader(file)}
    assert rows == {
        "scan.dcm": "2 of 3 frames left out",
        "a.png": "its projection ended in values that are not finite",
    }
    assert f"{image}: its projection ended in values that are not finite; lower --initial_lr" in caplog.text
    assert not saver.is_finished({"image": image})
    assert saver.is_finished({"image": other})
    items = [{"image": image}, {"image": other}]
    assert saver.projected(items) == items[1:]
    with pytest.raises(UserError, match=r"none of 1 images could be projected, rejected\.csv says why"):
        saver.projected(items[:1])


def test_diverged_image_of_a_shard_is_logged_and_listed_nowhere(weights, image, tmp_path, caplog):
    saver = SaveProjectiond(tmp_path / "out", SETTINGS, weights)
    SaveUnlessDiverged(saver, None, tmp_path)(item(image) | {"distance": torch.tensor(torch.inf)})
    assert f"{image}: its projection ended in values that are not finite" in caplog.text
    assert not saver.has_record({"image": image})
    assert not list(tmp_path.rglob("*.csv"))
