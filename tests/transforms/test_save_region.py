"""Boxes, masks and records of a segmentation."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image

from medgen.data import load_datalist
from medgen.data.datalist import write_rejected
from medgen.errors import UserError
from medgen.transforms import InBackground, SaveRegiond, bounding_box


def mask_of(shape, *rectangles) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    for top, left, bottom, right in rectangles:
        mask[top:bottom, left:right] = True
    return mask


@pytest.mark.parametrize(
    ("rectangles", "margin", "expected"),
    [
        ([(10, 20, 60, 40)], 0, (10, 20, 60, 40)),
        ([(10, 20, 60, 40), (30, 50, 80, 70)], 0, (10, 20, 80, 70)),
        ([(10, 20, 60, 40)], 0.1, (5, 18, 65, 42)),  # 0.1 of 50 rows and of 20 columns
        ([(2, 1, 98, 119)], 0.1, (0, 0, 100, 120)),  # cut off at the image
        ([(7, 9, 8, 10)], 0, (7, 9, 8, 10)),
        ([], 0.1, None),
    ],
)
def test_box_of_a_mask_made_by_hand(rectangles, margin, expected):
    assert bounding_box(mask_of((100, 120), *rectangles), margin) == expected


@pytest.fixture
def data(tmp_path):
    """Two grey images of 100×120 pixels in a folder of their own."""
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    files = [folder / "a.png", folder / "sub" / "b.png"]
    for number, file in enumerate(files):
        pixels = np.random.default_rng(number).integers(0, 255, (100, 120), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    torch.save({}, tmp_path / "model.pt")
    write_rejected(tmp_path / "out" / "rejected.csv", {})  # as the check of the images leaves it
    return [{"image": str(file), "patient": file.stem, "label": 3} for file in files]


def saver(tmp_path, data, **kwargs) -> SaveRegiond:
    given = {"settings": {"threshold": 0.5}, "margin": 0.1, "min_area": 0.05, **kwargs}
    given = {"model_path": tmp_path / "model.pt", "data_root": tmp_path / "data", **given}
    return SaveRegiond(tmp_path / "out", inputs=[item["image"] for item in data], **given)


def found(item, mask, uncertainty=None):
    pixels = np.asarray(Image.open(item["image"]), dtype=np.float32)[None] / 255
    d = {"image": MetaTensor(pixels, meta={"filename_or_obj": item["image"]}), "mask": torch.tensor(mask[None])}
    return d if uncertainty is None else {**d, "uncertainty": torch.full((1, *mask.shape), uncertainty)}


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_blank_image_has_no_lungs_whatever_the_network_says(tmp_path, data):
    Image.fromarray(np.zeros((100, 120), dtype=np.uint8)).save(data[0]["image"])
    results = saver(tmp_path, data[:1], min_area=0.0)
    results(found(data[0], mask_of((100, 120), (10, 20, 60, 40))))
    results.finish(data[:1], tmp_path / "out" / "rejected.csv", split="all")
    assert table(tmp_path / "out" / "boxes.csv") == []
    (row,) = table(tmp_path / "out" / "rejected.csv")
    assert row["reason"] == "no lung found: the image is one grey level"


def test_results_of_a_run(tmp_path, data, capsys):
    results = saver(tmp_path, data)
    mask = mask_of((100, 120), (10, 20, 60, 40), (30, 50, 80, 100))
    results(found(data[0], mask, uncertainty=0.25))
    results(found(data[1], mask_of((100, 120), (0, 0, 5, 5)), uncertainty=0.125))
    results.finish(data, tmp_path / "out" / "rejected.csv", split="all")

    out = tmp_path / "out"
    (row,) = table(out / "boxes.csv")
    area = (50 * 20 + 50 * 50) / (100 * 120)
    assert row == {
        "image": "a.png",
        **{"top": "3", "left": "12", "bottom": "87", "right": "108"},
        "area_fraction": f"{area:.6f}",
        "mean_uncertainty": "0.250000",
    }
    np.testing.assert_array_equal(np.asarray(Image.open(out / "masks" / "a.png")), mask * np.uint8(255))
    assert np.unique(Image.open(out / "uncertainty" / "a.png")).tolist() == [128]
    assert Image.open(out / "overlays" / "a.png").size == (3 * 120, 3 * 100)
    assert table(out / "rejected.csv") == [
        {"file": "sub/b.png", "reason": "no lung found: 0.2% of the image, min_area is 5.0%"}
    ]
    assert not (out / "masks" / "sub").exists()
    assert (out / "overlays" / "sub" / "b.png").is_file()
    (item,) = load_datalist(out / "datalist.json", "all", tmp_path)
    assert item == {**data[0], "mask": str(out / "masks" / "a.png")}
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("2 images: 1 boxes")
    assert "no lung found in 1" in last


def test_datalist_keeps_the_masks_of_anomalies(tmp_path, data):
    items = [{**data[0], "anomaly_mask": data[1]["image"]}, {**data[1], "anomaly_mask": None}]
    results = saver(tmp_path, items)
    for item in items:
        results(found(item, np.ones((100, 120), dtype=bool)))
    results.finish(items, tmp_path / "out" / "rejected.csv")
    first, second = load_datalist(tmp_path / "out" / "datalist.json", "test", tmp_path)
    assert first["anomaly_mask"] == data[1]["image"]
    assert second["anomaly_mask"] is None


def test_results_can_be_written_in_threads(tmp_path, data):
    mask = mask_of((100, 120), (10, 20, 60, 100))
    for folder, workers in (("one", 0), ("three", 3)):
        results = saver(tmp_path / folder, data, data_root=tmp_path / "data", model_path=tmp_path / "model.pt")
        writer = InBackground(results, workers)
        for item in data:
            writer(found(item, mask, uncertainty=0.25))
        writer.finish()
    names = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*") if path.name != "model.pt"]
    assert len(names) == 2 * 4
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()


def test_mask_of_an_unsymmetrical_image_is_neither_mirrored_nor_transposed(tmp_path, data):
    mask = mask_of((100, 120), (0, 0, 20, 90))
    saver(tmp_path, data)(found(data[0], mask))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / "masks" / "a.png")) > 0, mask)


def test_without_uncertainty_its_column_is_empty_and_no_map_is_written(tmp_path, data):
    results = saver(tmp_path, data)
    results(found(data[0], np.ones((100, 120), dtype=bool)))
    results.finish(data[:1], tmp_path / "out" / "rejected.csv")
    assert table(tmp_path / "out" / "boxes.csv")[0]["mean_uncertainty"] == ""
    assert not (tmp_path / "out" / "uncertainty").exists()


def test_finished_images_are_known_by_all_their_files(tmp_path, data):
    results = saver(tmp_path, data)
    assert not results.is_finished(data[0])
    results(found(data[0], np.ones((100, 120), dtype=bool)))
    assert saver(tmp_path, data).is_finished(data[0])
    (tmp_path / "out" / "masks" / "a.png").unlink()
    assert not results.is_finished(data[0])


def test_refused_image_is_finished_without_a_mask(tmp_path, data):
    saver(tmp_path, data)(found(data[0], np.zeros((100, 120), dtype=bool)))
    assert saver(tmp_path, data).is_finished(data[0])


def test_torn_record_is_made_again(tmp_path, data):
    results = saver(tmp_path, data)
    results(found(data[0], np.ones((100, 120), dtype=bool)))
    record = tmp_path / "out" / "records" / "a.json"
    record.write_text(record.read_text()[:40])
    assert not results.is_finished(data[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tmp_path, data: saver(tmp_path, data, margin=0.2), r"made with margin 0\.1, this run has 0\.2"),
        (lambda tmp_path, data: saver(tmp_path, data, settings={"threshold": 0.4}), "made with threshold 0.5"),
    ],
)
def test_results_of_other_settings_are_refused(tmp_path, data, change, message):
    saver(tmp_path, data)(found(data[0], np.ones((100, 120), dtype=bool)))
    with pytest.raises(UserError, match=message):
        change(tmp_path, data).is_finished(data[0])


def test_results_of_other_weights_or_another_image_are_refused(tmp_path, data):
    saver(tmp_path, data)(found(data[0], np.ones((100, 120), dtype=bool)))
    Image.fromarray(np.zeros((100, 120), dtype=np.uint8)).save(data[0]["image"])
    with pytest.raises(UserError, match="made with image_sha256"):
        saver(tmp_path, data).is_finished(data[0])
    torch.save({"a": torch.ones(1)}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="made with model_sha256"):
        saver(tmp_path, data).is_finished(data[0])


def test_rows_of_unreadable_files_stay(tmp_path, data):
    results = saver(tmp_path, data)
    results(found(data[0], np.zeros((100, 120), dtype=bool)))
    rejected = tmp_path / "out" / "rejected.csv"
    rejected.write_text("file,reason\nbroken.png,truncated\n")
    results.finish(data[:1], rejected)
    assert [row["file"] for row in table(rejected)] == ["broken.png", "a.png"]
    assert json.loads((tmp_path / "out" / "datalist.json").read_text())["test"] == []
