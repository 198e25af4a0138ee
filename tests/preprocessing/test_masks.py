"""Masks beside preprocessed images."""

from __future__ import annotations

import csv
import errno
import json

import numpy as np
import pytest
from PIL import Image

from medgen.data import write_datalist
from preprocessing import _convert as c
from preprocessing.masks import app

pytestmark = pytest.mark.usefixtures("in_this_process")


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


@pytest.mark.parametrize("quality", [75, 90, 95, 98, 100])
def test_grey_edges_and_noise_of_a_jpeg_are_cut_at_half(target, tmp_path, quality):
    row, column = np.mgrid[:40, :60]
    mask = (row - 20) ** 2 + (column - 30) ** 2 < 200
    (tmp_path / "masks").mkdir()
    Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "masks" / "a.jpg", quality=quality)
    call(target, tmp_path / "masks")
    written = np.asarray(Image.open(target / "masks" / "a.png")) > 0
    np.testing.assert_array_equal(written, mask)


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
        (["x/a.png", "sub/a.png"], "", "no image has a mask"),
    ],
)
def test_mistakes_are_one_line(target, tmp_path, capsys, names, postfix, message):
    for name in names:
        save_mask(tmp_path / "masks" / name, (5, 20), (10, 20))
    assert call(target, tmp_path / "masks", postfix=postfix) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def of_images(folder, **images):
    """A target with these images (name -> path), each another patient."""
    for number, path in enumerate(images.values()):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(1, 255, (40, 60), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / path)
    items = [{"image": path, "patient": name} for name, path in images.items()]
    write_datalist(folder / "datalist.json", "some", "X-ray", {"training": items})
    return folder


def masks_of(folder):
    items = json.loads((folder / "datalist_masks.json").read_text())["training"]
    return {item["image"]: np.asarray(Image.open(folder / item["mask"])) > 0 for item in items}


@pytest.mark.parametrize(
    "paths",
    [("a.png", "b.png"), ("images/a.png", "a2/b.png"), ("x/a.png", "images/y/b.png")],
)
def test_each_image_has_a_mask_of_its_own_wherever_it_lies(tmp_path, paths):
    target = of_images(tmp_path / "target", a=paths[0], b=paths[1])
    expected = [save_mask(tmp_path / "masks" / f"{n}.png", (5, 20), (10 * k, 30)) for k, n in enumerate("ab")]
    assert call(target, tmp_path / "masks") == 0
    found = masks_of(target)
    for path, mask in zip(paths, expected, strict=True):
        np.testing.assert_array_equal(found[path], mask)


def test_images_that_differ_in_their_suffix_do_not_share_a_mask_file(tmp_path):
    target = of_images(tmp_path / "target", a="images/a.png", b="images/a.bmp")
    save_mask(tmp_path / "masks" / "a.png", (5, 20), (10, 30))
    assert call(target, tmp_path / "masks") == 0  # one picture in two formats
    items = json.loads((target / "datalist_masks.json").read_text())["training"]
    assert [item["mask"] for item in items] == ["masks/a.png.png", "masks/a.bmp.png"]


def test_mask_never_replaces_an_image(tmp_path, capsys):
    target = of_images(tmp_path / "target", a="images/a.png")
    content = json.loads((target / "datalist.json").read_text())
    content["training"][0]["image"] = "x/../images/a.png"
    (target / "x").mkdir()
    (target / "datalist.json").write_text(json.dumps(content))
    before = (target / "images" / "a.png").read_bytes()
    save_mask(tmp_path / "masks" / "a.png", (5, 20), (10, 30))
    assert call(target, tmp_path / "masks") == 0
    assert (target / "images" / "a.png").read_bytes() == before
    assert list(masks_of(target)) == ["x/../images/a.png"]

    target = of_images(tmp_path / "other", a="images/a.png", b="masks/a.png")
    assert call(target, tmp_path / "masks") == 1
    assert "the mask of images/a.png would lie where an image is, masks/a.png" in capsys.readouterr().err


def test_images_of_one_name_are_told_apart_by_their_folders(tmp_path):
    target = of_images(tmp_path / "target", a="images/p1/1.png", b="images/p2/1.png")
    first = save_mask(tmp_path / "masks" / "p1" / "1.png", (5, 20), (10, 30))
    assert call(target, tmp_path / "masks") == 3
    assert list(masks_of(target)) == ["images/p1/1.png"]
    reason = "2 images are named 1: their masks must lie in folders as theirs, p2/1"
    assert rejected(target) == {"images/p2/1.png": reason}

    second = save_mask(tmp_path / "masks" / "p2" / "1.png", (1, 9), (1, 9))
    assert call(target, tmp_path / "masks") == 0
    found = masks_of(target)
    np.testing.assert_array_equal(found["images/p1/1.png"], first)
    np.testing.assert_array_equal(found["images/p2/1.png"], second)


def test_image_with_two_masks_of_its_name_is_rejected(target, tmp_path):
    for name in ("a.png", "a.bmp", "c.png"):
        save_mask(tmp_path / "masks" / name, (5, 20), (10, 30))
    assert call(target, tmp_path / "masks") == 3
    assert rejected(target)["images/a.png"].startswith("2 masks have its name, ")


@pytest.mark.parametrize("cut", [4, 400])
def test_unreadable_image_is_rejected_and_the_rest_goes_on(target, tmp_path, cut):
    for name in ("a", "b", "c"):
        save_mask(tmp_path / "masks" / f"{name}.png", (5, 20), (10, 30))
    image = target / "images" / "a.png"
    image.write_bytes(image.read_bytes()[:cut])  # no header, or one that promises more than there is
    assert call(target, tmp_path / "masks") == 3
    assert list(rejected(target)) == ["images/a.png"]
    assert list(masks_of(target)) == ["images/sub/b.png"]


def test_unreadable_mask_is_named(target, tmp_path):
    save_mask(tmp_path / "masks" / "c.png", (5, 20), (10, 30))
    (tmp_path / "masks" / "a.png").write_bytes(b"nothing")
    assert call(target, tmp_path / "masks") == 3
    assert rejected(target)["images/a.png"].startswith("the mask a.png: ")


def test_full_disk_is_one_line(target, tmp_path, monkeypatch, capsys):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    save_mask(tmp_path / "masks" / "a.png", (5, 20), (10, 30))
    monkeypatch.setattr(Image.Image, "save", full)
    assert call(target, tmp_path / "masks") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "cannot be written (No space left on device); mend that" in error
