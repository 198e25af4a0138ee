"""SavePNG and SaveArray: upright, rounded, named after the input, never outside the folder."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image

import medgen.transforms.save
from medgen.errors import UserError
from medgen.transforms import SaveArray, SaveArrayd, SavePNG, SavePNGd

PICTURE = np.arange(256, dtype=np.uint8).reshape(8, 32)  # every grey level, no symmetry


def tensor(values: np.ndarray, name: str = "x.png") -> MetaTensor:
    return MetaTensor(torch.as_tensor(values), meta={"filename_or_obj": name})


def test_every_grey_level_comes_back_upright(tmp_path):
    image = tensor(PICTURE[None] / np.float32(255), "scan.dcm")

    out = SavePNG(tmp_path)(image)

    assert out is image
    with Image.open(tmp_path / "scan.png") as saved:
        assert saved.mode == "L"
        np.testing.assert_array_equal(np.asarray(saved), PICTURE)


def test_sixteen_bits(tmp_path):
    levels = np.array([[0, 1, 257], [40000, 65534, 65535]], np.uint16)

    SavePNG(tmp_path, bits=16)(tensor(levels[None] / np.float32(65535)))

    with Image.open(tmp_path / "x.png") as saved:
        assert saved.mode == "I;16"
        np.testing.assert_array_equal(np.asarray(saved), levels)


def test_colour(tmp_path):
    colour = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)

    SavePNG(tmp_path)(tensor(colour.transpose(2, 0, 1) / np.float32(255)))

    with Image.open(tmp_path / "x.png") as saved:
        np.testing.assert_array_equal(np.asarray(saved), colour)


def test_values_are_rounded_and_clipped(tmp_path):
    SavePNG(tmp_path)(tensor(np.array([[[-0.5, 0.999, 1.5, 0.4 / 255, 0.6 / 255]]], np.float32)))

    with Image.open(tmp_path / "x.png") as saved:
        np.testing.assert_array_equal(np.asarray(saved), [[0, 255, 255, 0, 1]])


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("root/p1/s1/a.jpg", "p1/s1/a_pred.png"),
        ("root/a.nii.gz", "a_pred.png"),
        ("root/p1/../p2/a.dcm", "p2/a_pred.png"),
        ("root/1.2.840.10008.5", "1.2.840.10008.5_pred.png"),
        ("root/1.2.840.dcm", "1.2.840_pred.png"),
    ],
)
def test_path_below_the_data_root_is_mirrored(tmp_path, source, expected):
    save = SavePNGd("pred", tmp_path / "out", data_root=tmp_path / "root", postfix="_pred")

    item = save({"pred": tensor(np.zeros((1, 2, 2)), str(tmp_path / source)), "label": 3})

    assert item["pred_path"] == str(tmp_path / "out" / expected)
    assert (tmp_path / "out" / expected).is_file()
    assert item["label"] == 3


@pytest.mark.parametrize("source", ["elsewhere/a.png", "root/../a.png", "rooted/a.png"])
def test_input_outside_the_data_root_is_refused(tmp_path, source):
    save = SavePNG(tmp_path / "out", data_root=tmp_path / "root")

    with pytest.raises(UserError, match="expected a file below data_root"):
        save(tensor(np.zeros((1, 2, 2)), str(tmp_path / source)))

    assert not list(tmp_path.rglob("*.png"))


def test_link_out_of_the_output_folder_is_not_followed(tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "p1").symlink_to(tmp_path / "private")
    save = SavePNG(tmp_path / "out", data_root=tmp_path / "root")

    with pytest.raises(UserError, match="outside output_dir"):
        save(tensor(np.zeros((1, 2, 2)), str(tmp_path / "root" / "p1" / "a.png")))

    assert not list((tmp_path / "private").iterdir())


def test_input_is_never_overwritten(tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    image = tensor(np.zeros((1, 2, 2)), str(tmp_path / "a.png"))

    with pytest.raises(UserError, match="overwrite its own input"):
        SavePNG(tmp_path)(image)

    with Image.open(tmp_path / "a.png") as kept:
        np.testing.assert_array_equal(np.asarray(kept), PICTURE)


def test_two_inputs_of_one_name_are_refused_rather_than_one_lost(tmp_path):
    save = SavePNG(tmp_path)
    save(tensor(np.zeros((1, 2, 2)), "p1/a.png"))
    save(tensor(np.ones((1, 2, 2)), "p1/a.png"))  # the same input again is fine

    with pytest.raises(UserError, match=r"p1/a\.png and p2/a\.png would both be saved as"):
        save(tensor(np.zeros((1, 2, 2)), "p2/a.png"))


@pytest.mark.parametrize("order", [1, -1])
def test_inputs_of_one_name_keep_their_suffix_and_others_do_not(tmp_path, order):
    # DICOM files often end in a number, which is no suffix; "A" is "a" on some file systems
    names = ["p1/a.png", "p1/A.dcm", "p1/a.nii.gz", "p1/b.png", "p2/a.png", "p2/1.2.3", "p2/1.2.4"]
    sources = [str(tmp_path / "root" / name) for name in names]
    save = SaveArrayd("x", tmp_path / "out", data_root=tmp_path / "root", postfix="_mean", inputs=sources)

    for number in range(len(names))[::order]:  # whichever comes first
        save({"x": tensor(np.full((1, 2, 2), number, np.float32), sources[number])})

    saved = {path.relative_to(tmp_path / "out").as_posix(): np.load(path).max() for path in tmp_path.rglob("*.npy")}
    assert saved == {
        "p1/a.png_mean.npy": 0,
        "p1/A.dcm_mean.npy": 1,
        "p1/a.nii.gz_mean.npy": 2,
        "p1/b_mean.npy": 3,
        "p2/a_mean.npy": 4,
        "p2/1.2.3_mean.npy": 5,
        "p2/1.2.4_mean.npy": 6,
    }


def test_inputs_of_one_file_name_in_one_output_folder_are_told_apart_by_a_digest(tmp_path):
    sources = ["p1/a.png", "p2/a.png", "p2/a.png", "p3/b.png"]  # no data_root: all outputs go into one folder
    save = SavePNG(tmp_path, inputs=sources)

    for number, source in enumerate(sources):
        save(tensor(np.full((1, 2, 2), number / 255), source))

    levels = {path.name: np.asarray(Image.open(path)).max() for path in tmp_path.iterdir()}
    assert levels.pop("b.png") == 3
    assert sorted(levels.values()) == [0, 2]
    assert all(re.fullmatch(r"a\.png-[0-9a-f]{12}\.png", name) for name in levels)


def test_inputs_outside_the_data_root_are_refused_before_any_is_saved(tmp_path):
    with pytest.raises(UserError, match="expected a file below data_root"):
        SavePNG(tmp_path / "out", data_root=tmp_path / "root", inputs=[tmp_path / "elsewhere" / "a.png"])


@pytest.mark.parametrize("name", ["", "..", "folder/"])
def test_image_without_a_file_name_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="filename_or_obj"):
        SavePNG(tmp_path)(tensor(np.zeros((1, 2, 2)), name))
    with pytest.raises(UserError, match="filename_or_obj"):
        SavePNG(tmp_path)(np.zeros((1, 2, 2)))


def test_metadata_may_be_given_beside_an_array(tmp_path):
    SavePNG(tmp_path)(np.zeros((1, 2, 2)), {"filename_or_obj": "b.jpg"})

    assert (tmp_path / "b.png").is_file()


@pytest.mark.parametrize(
    ("values", "bits", "message"),
    [
        (np.zeros((2, 4, 4)), 8, "x.png: expected a (C, H, W) image with 1 or 3 channels"),
        (np.zeros((4, 4)), 8, "x.png: expected a (C, H, W) image with 1 or 3 channels"),
        (np.zeros((3, 4, 4)), 16, "x.png: 16-bit PNG is for grey images"),
        (np.full((1, 4, 4), np.nan), 8, "x.png: expected values in [0, 1]"),
    ],
)
def test_what_no_png_can_hold_is_refused_and_leaves_no_file(tmp_path, values, bits, message):
    with pytest.raises(UserError) as caught:
        SavePNG(tmp_path, bits=bits)(tensor(values))

    assert str(caught.value).startswith(message)
    assert not os.listdir(tmp_path)


def test_arguments_are_checked_at_construction(tmp_path):
    with pytest.raises(UserError, match="bits must be 8 or 16"):
        SavePNG(tmp_path, bits=12)
    with pytest.raises(UserError, match="postfix must be part of a file name"):
        SavePNG(tmp_path, postfix="/../x")
    with pytest.raises(UserError, match="dtype must be float16 or float32"):
        SaveArray(tmp_path, dtype="int8")
    with pytest.raises(UserError, match="output_dir"):
        SavePNG("")
    with pytest.raises(UserError, match="different postfix for each"):
        SavePNGd(["a", "b"], tmp_path, postfix="_x")
    with pytest.raises(UserError, match="different postfix for each"):
        SavePNGd(["a", "b"], tmp_path, postfix=["_x", "_x"])


def test_several_keys_of_one_item_get_a_file_each(tmp_path):
    item = {key: tensor(np.full((4, 2, 2), value, np.float32)) for key, value in (("mean", 1), ("std", 2))}

    out = SaveArrayd(["mean", "std"], tmp_path)(item)

    assert out["mean_path"] == str(tmp_path / "x_mean.npy")
    assert np.load(out["mean_path"]).mean() == 1
    assert np.load(out["std_path"]).mean() == 2


@pytest.mark.parametrize("named", ["samples/7.png", tensor(np.zeros(1), "samples/7.png")])
def test_another_key_may_name_the_file(tmp_path, named):
    out = SavePNGd("pred", tmp_path, name_key="name")({"pred": torch.zeros(1, 2, 2), "name": named})

    assert out["pred_path"] == str(tmp_path / "7.png")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_array_keeps_shape_and_signed_values(tmp_path, dtype):
    latent = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))

    SaveArray(tmp_path, dtype=dtype)(MetaTensor(latent, meta={"filename_or_obj": "x.png"}))

    loaded = np.load(tmp_path / "x.npy", allow_pickle=False)
    assert loaded.dtype == dtype
    np.testing.assert_array_equal(loaded, latent.numpy().astype(dtype))


def test_array_that_overflows_float16_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"x\.png: has values that are not finite in float16"):
        SaveArray(tmp_path, dtype="float16")(tensor(np.full((1, 2, 2), 1e5, np.float32)))

    assert not os.listdir(tmp_path)


def test_image_that_was_replaced_since_is_not_done(tmp_path):
    source = tmp_path / "in.png"
    save = SaveArray(tmp_path / "out")
    assert not save.is_written(source)
    Image.fromarray(PICTURE).save(source)
    assert not save.is_written(source)
    save(tensor(PICTURE[None] / np.float32(255), str(source)))
    os.utime(source, ns=(0, 10**9))
    os.utime(tmp_path / "out" / "in.npy", ns=(0, 10**9))
    assert save.is_written(source)
    os.utime(source, ns=(0, 10**9 + 1))
    assert not save.is_written(source)


def test_names_of_many_inputs_are_made_once_for_all_savers(tmp_path, monkeypatch):
    calls = []
    real = medgen.transforms.save.distinct_names
    monkeypatch.setattr("medgen.transforms.save.distinct_names", lambda *lists: calls.append(1) or real(*lists))
    inputs = [str(tmp_path / "in" / name) for name in ("a.png", "a.dcm", "b.png")]
    savers = [kind(tmp_path / "out", tmp_path / "in", inputs=list(inputs)) for kind in (SavePNG, SaveArray, SavePNG)]
    assert calls == [1]
    names = [saver.path(np.empty(0), {"filename_or_obj": inputs[1]}).name for saver in savers]
    assert names == ["a.dcm.png", "a.dcm.npy", "a.dcm.png"]
    other = SavePNG(tmp_path / "out", tmp_path, inputs=inputs)
    assert other.path(np.empty(0), {"filename_or_obj": inputs[2]}) == tmp_path / "out" / "in" / "b.png"
    assert calls == [1, 1]
