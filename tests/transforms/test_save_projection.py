"""Records of projections: content, names, settings and broken files."""

from __future__ import annotations

import hashlib
import io
import json

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from medgen.errors import UserError
from medgen.transforms import ProjectionRecord, SavePNG, SaveProjectiond

SETTINGS = {"space": "w", "steps": 3, "seed": 303}


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"weights")
    return path


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


def test_record_holds_what_was_found(weights, tmp_path):
    saved = make_saver(weights, tmp_path / "out")(item("/data/a.png"))
    record = ProjectionRecord(saved["projection_path"])
    np.testing.assert_array_equal(record.w, np.arange(12.0).reshape(3, 4))
    np.testing.assert_array_equal(record.loss_curve, [2, 1, np.nan])
    assert [noise.shape for noise in record.noise] == [(2, 2), (4, 4)]
    assert (record.steps, record.distance) == (2, 0.75)
    digest = hashlib.sha256(b"weights").hexdigest()
    assert record.settings == {**SETTINGS, "save_noise": True, "model_sha256": digest}
    with np.load(saved["projection_path"], allow_pickle=False) as file:
        assert all(file[name].dtype != object for name in file.files)


def test_record_is_named_as_the_reconstruction_is(weights, tmp_path):
    files = [str(tmp_path / name) for name in ("a/x.png", "a/x.dcm", "b/x.png")]
    saver = make_saver(weights, tmp_path / "out", data_root=tmp_path, inputs=files)
    png = SavePNG(tmp_path / "out", tmp_path, inputs=files)
    for file in files:
        assert saver.path_of(file) == png.path(np.empty(0), {"filename_or_obj": file}).with_suffix(".npz")
    assert len({saver.path_of(file) for file in files}) == 3


def test_noise_maps_may_be_left_out(weights, tmp_path):
    saved = make_saver(weights, tmp_path / "out", save_noise=False)(item("/data/a.png"))
    assert ProjectionRecord(saved["projection_path"]).noise == []


def test_same_result_gives_the_same_bytes(weights, tmp_path):
    first, second = (make_saver(weights, tmp_path / name)(item("/data/a.png"))["projection_path"] for name in "ab")
    assert open(first, "rb").read() == open(second, "rb").read()


def test_image_is_finished_when_its_record_is_whole(weights, tmp_path):
    saver = make_saver(weights, tmp_path / "out")
    assert not saver.is_finished({"image": "/data/a.png"})
    path = saver.path_of("/data/a.png")
    saver(item("/data/a.png"))
    assert make_saver(weights, tmp_path / "out").is_finished({"image": "/data/a.png"})
    whole = path.read_bytes()
    bare = io.BytesIO()
    np.save(bare, np.zeros(3))
    for content in (b"", whole[: len(whole) // 2], bare.getvalue()):
        path.write_bytes(content)
        assert not saver.is_finished({"image": "/data/a.png"})
        with pytest.raises(UserError, match="no whole record of a projection"):
            ProjectionRecord(path)
    np.savez(path, w=np.zeros(3))
    assert not saver.is_finished({"image": "/data/a.png"})


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
def test_record_of_other_settings_is_refused(weights, tmp_path, changes, message):
    make_saver(weights, tmp_path / "out")(item("/data/a.png"))
    with pytest.raises(UserError, match=message):
        make_saver(weights, tmp_path / "out", **changes).is_finished({"image": "/data/a.png"})


def test_record_of_other_weights_is_refused(weights, tmp_path):
    make_saver(weights, tmp_path / "out")(item("/data/a.png"))
    weights.write_bytes(b"trained further")
    with pytest.raises(UserError, match="made with model_sha256"):
        make_saver(weights, tmp_path / "out").is_finished({"image": "/data/a.png"})


def test_pickles_are_not_executed(weights, tmp_path):
    saver = make_saver(weights, tmp_path / "out")
    path = saver.path_of("/data/a.png")
    path.parent.mkdir(parents=True)
    pickled = np.array([{"a": 1}], dtype=object)
    np.savez(path, w=pickled, loss_curve=pickled, steps=1, distance=1, settings=pickled)
    assert not saver.is_finished({"image": "/data/a.png"})


def test_settings_are_a_json_text(weights, tmp_path):
    saved = make_saver(weights, tmp_path / "out")(item("/data/a.png"))
    with np.load(saved["projection_path"], allow_pickle=False) as file:
        assert json.loads(str(file["settings"]))["steps"] == 3


def test_missing_weights_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no weights at .*absent\.pt; .*--model_path"):
        make_saver(tmp_path / "absent.pt", tmp_path / "out")(item("/data/a.png"))
