"""Records of a classifier's probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image

from medgen.errors import UserError
from medgen.transforms import SaveProbabilitiesd


@pytest.fixture
def saver(tmp_path):
    """A saver for two images of a folder, with settings."""
    torch.save({"x": torch.zeros(1)}, tmp_path / "model.pt")
    for name in ("a.png", "sub/a.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "images" / name)

    def make(**settings):
        return SaveProbabilitiesd(
            tmp_path / "out", settings, tmp_path / "model.pt", ["no", "yes"], data_root=tmp_path / "images"
        )

    return make


def item(folder, name, **more):
    return {"image": str(folder / "images" / name), "patient": name, **more}


def result(given, p1):
    image = MetaTensor(torch.zeros(1, 4, 4), meta={"filename_or_obj": given["image"]})
    return {"image": image, "pred": torch.tensor([1 - p1, p1])}


def test_table_is_made_of_the_records(saver, tmp_path, capsys):
    items = [item(tmp_path, "a.png", label="yes"), item(tmp_path, "sub/a.png", label=7)]
    for given, p1 in zip(items, (0.25, 0.75), strict=True):
        saver(image_size=32)(result(given, p1))
    again = saver(image_size=32)
    assert [again.is_finished(given) for given in items] == [True, True]

    again.finish(items)

    assert (tmp_path / "out" / "predictions.csv").read_text().splitlines() == [
        "image,patient,label,p0,p1,prediction",
        "a.png,a.png,1,0.75,0.25,no",
        "sub/a.png,sub/a.png,,0.25,0.75,yes",
    ]
    assert "2 images, by their likeliest class: no 1, yes 1" in capsys.readouterr().out


def test_record_of_other_settings_weights_or_another_image_is_refused(saver, tmp_path):
    given = item(tmp_path, "a.png")
    assert not saver(image_size=32).is_finished(given)
    saver(image_size=32)(result(given, 0.5))
    with pytest.raises(UserError, match="made with image_size 32, this run has 64; resume with what it was made with"):
        saver(image_size=64).is_finished(given)
    torch.save({"x": torch.ones(1)}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="made with model_sha256"):
        saver(image_size=32).is_finished(given)
    torch.save({"x": torch.zeros(1)}, tmp_path / "model.pt")
    Image.fromarray(np.ones((4, 4), np.uint8)).save(given["image"])
    with pytest.raises(UserError, match="made with image_sha256"):
        saver(image_size=32).is_finished(given)


def test_record_that_is_not_whole_is_made_anew(saver, tmp_path):
    given = item(tmp_path, "a.png")
    saver()(result(given, 0.5))
    (tmp_path / "out" / "records" / "a.json").write_text('{"settings"')
    assert not saver().has_record(given)
    assert not saver().is_finished(given)
