"""Masks beside preprocessed images."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from PIL import Image

from medgen.data import write_datalist
from preprocessing import _convert as c
from preprocessing.masks import app


@pytest.fixture
def target(tmp_path):
    """Three images of 40×60 pixels, as a preprocessing command leaves them."""
    folder = tmp_path / "target"
    (folder / "images" / "sub").mkdir(parents=True)
    names = ["a", "sub/b", "c"]
    for number, name in enumerate(names):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 60), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{name}.png")
    items = [{"image": f"images/{name}.png", "patient": name} for name in names]
    write_datalist(
        folder / "datalist.json", "three", "X-ray", {"training": items[:2], "validation": [], "test": items[2:]}
    )
    return folder


def save_mask(path, rows, columns, shape=(40, 60), values=(0, 255)):
    mask = np.full(shape, values[0], dtype=np.uint8)
    mask[rows[0] : rows[1], columns[0] : columns[1]] = values[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)
    return mask > values[0]


def rejected(target):
    with open(target / "rejected_masks.csv", newline="") as file:
        return {row["file"]: row["reason"] for row in csv.DictReader(file)}


def call(target, *masks, **options):
    words = [str(word) for folder in masks for word in ("--masks", folder)]
    words += [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    return c.main(app, ["--target", str(target), *words])


def test_masks_find_their_images_and_keep_their_splits(target, tmp_path):
    for name in ("a", "b", "c"):
        save_mask(tmp_path / "masks" / f"{name}.png", (5, 20), (10, 30))
    assert call(target, tmp_path / "masks") == 0
    content = json.loads((target / "datalist_masks.json").read_text())
    assert [item["mask"] for item in content["training"]] == ["masks/a.png", "masks/sub/b.png"]
    assert [item["mask"] for item in content["test"]] == ["masks/c.png"]
    assert content["validation"] == []
    assert "mask" not in (target / "datalist.json").read_text()
    written = np.asarray(Image.open(target / "masks" / "sub" / "b.png"))
    assert written.shape == (40, 60)
    assert (written > 0).sum() == 15 * 20
    assert set(np.unique(written)) == {0, 255}


def test_masks_of_both_lungs_are_united_and_any_number_above_zero_is_inside(target, tmp_path):
    left = save_mask(tmp_path / "left" / "a_mask.png", (5, 20), (10, 20), values=(0, 1))
    right = save_mask(tmp_path / "right" / "a_mask.png", (8, 25), (40, 50), values=(0, 2))
    assert call(target, tmp_path / "left", tmp_path / "right", postfix="_mask") == 3  # b and c have none
    np.testing.assert_array_equal(np.asarray(Image.open(target / "masks" / "a.png")) > 0, left | right)
    assert rejected(target) == {"images/sub/b.png": "no mask named b_mask", "images/c.png": "no mask named c_mask"}


def test_larger_mask_of_the_same_ratio_is_brought_to_the_images_size(target, tmp_path):
    save_mask(tmp_path / "masks" / "a.png", (20, 80), (40, 120), shape=(160, 240))
    call(target, tmp_path / "masks")
    mask = np.asarray(Image.open(target / "masks" / "a.png")) > 0
    assert mask.shape == (40, 60)
    assert mask[5:20, 10:30].all()
    assert mask.sum() == 15 * 20


def test_grey_edges_of_a_jpeg_are_cut_at_half(target, tmp_path):
    mask = save_mask(tmp_path / "masks" / "a.jpg", (5, 25), (10, 40))
    assert len(np.unique(Image.open(tmp_path / "masks" / "a.jpg"))) > 16
    call(target, tmp_path / "masks")
    written = np.asarray(Image.open(target / "masks" / "a.png")) > 0
    assert (written != mask).mean() < 0.01


def test_masks_that_cannot_be_used_are_named(target, tmp_path):
    save_mask(tmp_path / "masks" / "a.png", (5, 20), (10, 20))
    save_mask(tmp_path / "masks" / "b.png", (5, 20), (10, 20), shape=(60, 40))
    save_mask(tmp_path / "masks" / "c.png", (0, 0), (0, 0))
    save_mask(tmp_path / "masks" / "d.png", (5, 20), (10, 20))
    assert call(target, tmp_path / "masks") == 3
    reasons = rejected(target)
    assert "the mask is 40×60, the image 60×40" in reasons["images/sub/b.png"]
    assert reasons["images/c.png"] == "the mask marks no pixel"
    assert reasons[str(tmp_path / "masks" / "d.png")] == "a mask of no image of the datalist"
    content = json.loads((target / "datalist_masks.json").read_text())
    assert [item["image"] for item in content["training"]] == ["images/a.png"]


def test_images_of_a_list_are_left_out(target, tmp_path, capsys):
    for name in ("a", "b", "c"):
        save_mask(tmp_path / "masks" / f"{name}.png", (5, 20), (10, 30))
    skip = tmp_path / "bad.txt"
    skip.write_text("# seen by eye\nb\n\n")
    assert call(target, tmp_path / "masks", skip=skip) == 3
    assert rejected(target) == {"images/sub/b.png": "left out by bad.txt"}
    skip.write_text("nobody\n")
    assert call(target, tmp_path / "masks", skip=skip) == 1
    assert "names 1 images that the datalist lacks, nobody first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "postfix", "message"),
    [
        (["z.png"], "", "no image has a mask"),
        (["a.png"], "_lung", r"expected masks (*_lung.png and the like)"),
        (["a.png", "sub/a.png"], "", "two masks below"),
    ],
)
def test_mistakes_are_one_line(target, tmp_path, capsys, names, postfix, message):
    for name in names:
        save_mask(tmp_path / "masks" / name, (5, 20), (10, 20))
    assert call(target, tmp_path / "masks", postfix=postfix) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
