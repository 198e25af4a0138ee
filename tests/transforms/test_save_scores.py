"""Records of scores: what they keep, and which are believed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from monai.data import Dataset, MetaTensor
from PIL import Image

from medgen.errors import UserError
from medgen.handlers import image_metrics
from medgen.transforms import SaveScoresd, ScoreAnomalyd, score_images

SETTINGS = {"patch": 4, "limits": [None, 0.5], "overlays": True}


@pytest.fixture
def items(tmp_path):
    """Three images with their reconstructions; the last has a mask."""
    found = []
    for number in range(3):
        item = {"image": str(tmp_path / "in" / f"{number}.png"), "reconstruction": str(tmp_path / f"{number}.rec.png")}
        if number == 2:
            item["anomaly_mask"] = str(tmp_path / "mask.png")
        for place, path in enumerate(item.values()):
            (tmp_path / "in").mkdir(exist_ok=True)
            Image.fromarray(np.full((8, 10), 50 * number + 20 * place, np.uint8)).save(path)
        found.append(item)
    return found


def make(tmp_path, items, **changes) -> SaveScoresd:
    arguments = {"items": items, "metrics": image_metrics(), "settings": SETTINGS, "data_root": tmp_path / "in"}
    return SaveScoresd(tmp_path / "scores", **{**arguments, **changes})


def scored(item: dict, patient: str = "") -> dict:
    """What the transforms before it hand on."""
    pixels = [torch.from_numpy(np.float32(Image.open(item[key])) / 255) for key in ("image", "reconstruction")]
    image = MetaTensor(pixels[0][None], meta={"filename_or_obj": item["image"], "patient": patient})
    entry = ScoreAnomalyd(patch=4)({"image": image, "reconstruction": pixels[1][None]})
    mask = torch.zeros(1, 8, 10, dtype=torch.uint8)
    if "anomaly_mask" in item:
        mask[0, 2:5, 3:9] = 1
    return {**entry, "anomaly_mask": mask}


def test_record_gives_back_what_was_scored(items, tmp_path):
    records = make(tmp_path, items)
    for item in items:
        records(scored(item, patient="p7"))
    for item in items:
        entry, found = scored(item), records.read(item)
        assert found["image"].meta["filename_or_obj"] == item["image"]
        assert found["image"].meta["patient"] == "p7"
        # by their texts, which tell whole numbers from others and know NaN (of an image without a body)
        assert list(map(repr, found["scores"].items())) == list(map(repr, entry["scores"].items()))
        error = np.float32(20 / 255)
        assert found["metrics"]["l1"] == pytest.approx(error, rel=1e-5)
        assert found["metrics"]["psnr"] == pytest.approx(-20 * np.log10(error), rel=1e-5)
        assert np.isnan(found["metrics"]["ms_ssim"])  # eight pixels are too few
        if "anomaly_mask" in item:
            torch.testing.assert_close(found["anomaly_mask"], entry["anomaly_mask"], rtol=0, atol=0)
        else:
            assert "anomaly_mask" not in found


def test_equal_images_have_an_infinite_ratio(items, tmp_path):
    same = [{**items[0], "reconstruction": items[0]["image"]}]
    records = make(tmp_path, same)
    records(scored(same[0]))
    assert records.read(same[0])["metrics"]["psnr"] == np.inf


def test_images_with_a_record_are_left_out_only_when_it_goes_on(items, tmp_path, caplog):
    records = make(tmp_path, items)
    assert records.pending(resume=False) == items
    score_images(Dataset(items[:2], scored), records)
    assert make(tmp_path, items).pending(resume=True, shard="0/2") == items[2:]
    assert "missing" not in caplog.text
    assert make(tmp_path, items).pending(resume=True) == items[2:]
    assert "1 of 3 items are missing; this process does them now" in caplog.text
    with pytest.raises(UserError, match=r"2 of 3 images are scored .* already; .* --resume true, or choose another"):
        make(tmp_path, items).pending(resume=False)


def test_image_that_is_replaced_while_it_is_scored_is_scored_again(items, tmp_path):
    def replaced(item: dict) -> dict:
        entry = scored(item)
        Image.fromarray(np.full((8, 10), 77, np.uint8)).save(item["image"])
        return entry

    score_images(Dataset(items[:1], replaced), make(tmp_path, items))
    assert make(tmp_path, items).pending(resume=True) == items


@pytest.mark.parametrize("key", ["image", "reconstruction", "anomaly_mask"])
def test_image_whose_files_have_changed_is_scored_again(items, tmp_path, key):
    records = make(tmp_path, items)
    records(scored(items[2]))
    assert records.is_finished(items[2])
    Image.fromarray(np.full((8, 10), 77, np.uint8)).save(items[2][key])
    assert not records.is_finished(items[2])


def test_other_settings_and_a_mask_more_or_less_are_scored_again(items, tmp_path):
    make(tmp_path, items)(scored(items[2]))
    assert not make(tmp_path, items, settings=SETTINGS | {"patch": 5}).is_finished(items[2])
    without = {key: path for key, path in items[2].items() if key != "anomaly_mask"}
    assert not make(tmp_path, items).is_finished(without)


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"settings": {}}'])
def test_broken_record_is_none(items, tmp_path, text):
    records = make(tmp_path, items)
    records(scored(items[0]))
    path = records.path_of(items[0]["image"])
    whole = path.read_text()
    assert json.loads(whole)["settings"] == SETTINGS
    for broken in (text, whole[: len(whole) // 2]):
        path.write_text(broken)
        assert not records.is_finished(items[0])
        with pytest.raises(UserError, match=r"0\.json is no whole record of scores; score again with --resume true"):
            records.read(items[0])
