"""Corrupted copies: the source's noise and blur, inserts with exact masks, and a datalist that says what was done."""

from __future__ import annotations

import csv
import json

import nibabel
import numpy as np
import pytest
from here import convert_here
from PIL import Image
from scipy.ndimage import gaussian_filter

from medgen.data import load_datalist, validate_datalist
from medgen.data.reader import UnreadableImageError
from medgen.errors import UserError
from preprocessing import _convert as c
from preprocessing import corrupt as module
from preprocessing.corrupt import GLOBAL, LOCAL, Corruption, Kind, corrupt, gaussian_blur
from preprocessing.split import app as split_app


def radiograph(size=96, seed=0):
    """Dim, smooth, nowhere white: (size, size) float32."""
    noise = np.random.default_rng(seed).random((size, size))
    return (0.2 + 0.4 * gaussian_filter(noise, size / 12, mode="wrap") / 0.5).astype(np.float32)


def slice_of_ct(size=96, seed=0):
    """An ellipse of 0.6 in air, with a little noise inside."""
    y, x = (np.mgrid[:size, :size] - (size - 1) / 2) / size
    body = (x / 0.42) ** 2 + (y / 0.33) ** 2 < 1
    noise = 0.02 * np.random.default_rng(seed).standard_normal((size, size))
    return np.where(body, 0.6 + noise, 0).astype(np.float32), body


def picture(kind, size=96):
    return slice_of_ct(size)[0] if kind in (Kind.needle, Kind.ascites) else radiograph(size)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((pixels * 255).round().astype(np.uint8)).save(path)


def run(*arguments):
    """The command; in this process, whose start is most of a small dataset's time, unless the test says how many."""
    with pytest.MonkeyPatch.context() as patch:
        if "--workers" not in arguments:
            patch.setattr(c, "_pool", convert_here)
        return c.main(module.app, [str(argument) for argument in arguments])


def pixels_of(path):
    return np.asarray(Image.open(path))


@pytest.fixture
def dataset(tmp_path):
    """A preprocessed dataset: four images of two test patients, one of them anomalous, and one to train with."""
    root = tmp_path / "data"
    for number in range(5):
        save(root / f"images/sub/p{number}.png", radiograph(48, number))
    test = [
        {"image": "images/sub/p0.png", "patient": "a", "label": 3},
        {"image": "images/sub/p1.png", "patient": "a"},
        {"image": "images/sub/p2.png", "patient": "b"},
        {"image": "images/sub/p3.png", "patient": "b", "anomaly": 1},
    ]
    training = [{"image": "images/sub/p4.png", "patient": "c"}]
    content = {"name": "cxr", "modality": "CR", "label_names": ["x"], "training": training, "test": test}
    (root / "datalist.json").write_text(json.dumps(content))
    return root


# ---------------------------------------------------------------------------------------------------------------------
# noise and blur


def test_blur_of_5_pixels_is_opencvs_binomial_kernel():
    impulse = np.zeros((9, 9), np.float32)
    impulse[4, 4] = 1

    blurred = gaussian_blur(impulse, 5)

    # not a sampled Gaussian of sigma 1.1, whose centre would be 0.137
    np.testing.assert_allclose(blurred[2:7, 2:7], np.outer((1, 4, 6, 4, 1), (1, 4, 6, 4, 1)) / 256, atol=1e-7)
    assert blurred.sum() == pytest.approx(1)


@pytest.mark.parametrize("kernel", [11, 15])
def test_wider_blur_is_a_sampled_gaussian_with_a_mirrored_border(kernel):
    pixels = np.random.default_rng(0).random((17, 23))
    sigma = 0.3 * ((kernel - 1) * 0.5 - 1) + 0.8
    reach = kernel // 2
    offsets = np.arange(-reach, reach + 1)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * sigma**2))
    window /= window.sum()
    padded = np.pad(pixels, reach, mode="reflect")  # NumPy's name for reflect-101

    expected = [[(padded[y : y + kernel, x : x + kernel] * window).sum() for x in range(23)] for y in range(17)]

    np.testing.assert_allclose(gaussian_blur(pixels, kernel), expected, atol=1e-6)


@pytest.mark.parametrize("kernel", [3, 5, 7, 9, 11])
def test_blur_keeps_a_constant_and_treats_channels_alike(kernel):
    pixels = np.random.default_rng(0).random((20, 20, 3))

    np.testing.assert_allclose(gaussian_blur(np.full((20, 20), 0.3), kernel), 0.3, atol=1e-6)
    np.testing.assert_array_equal(gaussian_blur(pixels, kernel)[..., 1], gaussian_blur(pixels[..., 1], kernel))


def test_noise_has_the_variance_asked_for_and_is_clipped():
    grey, dark = np.full((200, 200), 0.5, np.float32), np.zeros((200, 200), np.float32)

    noisy, mask = corrupt(grey, "noise", np.random.default_rng(0))
    clipped, _ = corrupt(dark, "noise", np.random.default_rng(0), Corruption(variance=0.04))

    assert mask is None
    assert noisy.mean() == pytest.approx(0.5, abs=0.002)
    assert noisy.var() == pytest.approx(0.01, rel=0.03)
    assert (clipped == 0).mean() == pytest.approx(0.5, abs=0.01)
    # mean of the positive half of a normal distribution: sigma / sqrt(2 pi)
    assert clipped.mean() == pytest.approx(0.2 / np.sqrt(2 * np.pi), rel=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# inserts


@pytest.mark.parametrize("kind", [kind for kind in LOCAL if kind != Kind.needle])
@pytest.mark.parametrize("size", [32, 64, 200])
def test_nothing_changes_outside_of_the_mask_and_the_mask_is_small(kind, size):
    pixels = picture(kind, size)

    for seed in range(5):
        changed, mask = corrupt(pixels, kind, np.random.default_rng(seed))

        np.testing.assert_array_equal(changed[~mask], pixels[~mask])
        assert (changed[mask] != pixels[mask]).mean() > 0.9
        assert 0 < mask.mean() < 0.2


@pytest.mark.parametrize("kind", [Kind.line, Kind.disc, Kind.device, Kind.needle])
def test_metal_is_saturated_and_its_edges_are_soft(kind):
    pixels = picture(kind, 256)

    changed, mask = corrupt(pixels, kind, np.random.default_rng(1))

    assert (changed[mask] == 1).sum() > 20
    assert ((changed[mask] > pixels.max() + 0.02) & (changed[mask] < 0.98)).any()
    assert changed[mask].mean() > pixels[mask].mean() + 0.2


@pytest.mark.parametrize("kind", [kind for kind in LOCAL if kind != Kind.needle])  # whose streaks add to it
def test_half_the_contrast_changes_half_as_much(kind):
    pixels = picture(kind)

    full, mask = corrupt(pixels, kind, np.random.default_rng(2))
    half, same = corrupt(pixels, kind, np.random.default_rng(2), Corruption(contrast=0.5))

    np.testing.assert_array_equal(mask, same)
    ratio = np.abs(half - pixels)[mask].sum() / np.abs(full - pixels)[mask].sum()
    assert ratio == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("kind", [Kind.line, Kind.disc, Kind.needle, Kind.ascites])
def test_extent_scales_with_the_image(kind):
    small, large = (
        np.mean([corrupt(picture(kind, size), kind, np.random.default_rng(seed))[1].sum() for seed in range(8)])
        for size in (128, 256)
    )

    # edges are a pixel wide at either size, which makes the small ones relatively larger
    assert 2 < large / small < 4.5


def test_line_is_as_long_and_thin_as_promised():
    for seed in range(10):
        changed, _ = corrupt(np.full((400, 400), 0.1, np.float32), "line", np.random.default_rng(seed))
        inside = np.argwhere(changed > 0.55)
        length, width = np.sqrt(12 * np.linalg.eigvalsh(np.cov(inside.T))[::-1])  # of a uniform bar

        assert 0.14 * 400 < length < 0.43 * 400
        assert 0.005 * 400 < width < 0.015 * 400


def test_inserts_avoid_what_is_white_already():
    pixels = np.ones((100, 100), np.float32)
    pixels[:, :50] = 0.1

    gains = []
    for seed in range(20):
        changed, mask = corrupt(pixels, "disc", np.random.default_rng(seed))
        gains.append((changed - pixels)[mask].mean())

    assert min(gains) > 0.3


@pytest.mark.parametrize("kind", [Kind.line, Kind.disc, Kind.device, Kind.ascites])
def test_insert_that_nobody_would_see_is_refused(kind):
    pixels = np.full((64, 64), 0.98, np.float32)
    if kind == Kind.ascites:  # of the fluid's own grey
        pixels = np.where(slice_of_ct(64)[1], np.float32(module.FLUID), 0)

    with pytest.raises(UnreadableImageError, match=r"no place where .* would be visible"):
        corrupt(pixels, kind, np.random.default_rng(0))


def test_needle_avoids_what_is_white_already():
    pixels, body = slice_of_ct(100)
    pixels[:, :50][body[:, :50]] = 1

    gains = []
    for seed in range(20):
        changed, mask = corrupt(pixels, "needle", np.random.default_rng(seed))
        gains.append((changed - pixels)[mask & body].mean())

    # without a choice of places half of the needles would lie in the white half
    assert sum(gain < 0.1 for gain in gains) <= 5


def test_needle_enters_through_the_skin_and_darkens_only_the_body_beside_it():
    pixels, body = slice_of_ct(200)

    for seed in range(10):
        changed, mask = corrupt(pixels, "needle", np.random.default_rng(seed))

        assert (mask & body).any()
        assert (mask & ~body).any()
        outside = ~mask
        assert (changed[outside] <= pixels[outside] + 1e-6).all()
        np.testing.assert_array_equal(changed[outside & (pixels == 0)], 0)
        assert (changed[outside & body] < pixels[outside & body] - 0.05).any()


def test_ascites_is_fluid_within_the_wall_with_the_noise_of_the_image():
    pixels, body = slice_of_ct(200)

    changed, mask = corrupt(pixels, "ascites", np.random.default_rng(3))

    assert not (mask & ~body).any()
    solid = mask & (np.abs(changed - module.FLUID) < 0.1)
    assert solid.sum() > 0.8 * mask.sum()
    assert changed[solid].mean() == pytest.approx(module.FLUID, abs=0.01)
    assert 0.01 < changed[solid].std() < 0.04


@pytest.mark.parametrize("kind", ["needle", "ascites"])
@pytest.mark.parametrize("pixels", [np.zeros((64, 64)), radiograph(64)], ids=["black", "no air"])
def test_what_needs_a_body_refuses_a_picture_without(kind, pixels):
    with pytest.raises(UnreadableImageError, match="shows no body"):
        corrupt(pixels, kind, np.random.default_rng(0))


def test_body_is_found_in_front_of_grey_air():
    pixels, body = slice_of_ct(128)

    _, mask = corrupt(np.where(body, pixels, 0.4), "ascites", np.random.default_rng(0))

    assert mask.any()
    assert not (mask & ~body).any()


@pytest.mark.parametrize("kind", Kind)
def test_colour_stays_colour_and_grey_colour_changes_as_grey(kind):
    pixels = picture(kind)

    grey, _ = corrupt(pixels, kind, np.random.default_rng(4))
    colour, _ = corrupt(np.repeat(pixels[..., None], 3, axis=2), kind, np.random.default_rng(4))

    assert colour.shape == (*pixels.shape, 3)
    if kind != Kind.noise:  # whose channels are independent
        np.testing.assert_allclose(colour[..., 0], grey, atol=1e-5)
    else:
        assert not np.array_equal(colour[..., 0], colour[..., 1])


@pytest.mark.parametrize(
    ("name", "value"), [("variance", 0), ("kernel", 4), ("kernel", 1), ("contrast", 0), ("contrast", 1.1), ("fluid", 2)]
)
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(UserError, match=f"^{name} must be"):
        Corruption(**{name: value})


# ---------------------------------------------------------------------------------------------------------------------
# the command


def test_items_say_what_was_done_and_keep_what_was_known(dataset, tmp_path, capsys):
    target = tmp_path / "out"

    code = run(
        *("--source", dataset, "--target", target, "--kind", "line", "--kind", "noise"),
        *("--variance", 0.02, "--keep_originals"),
    )

    assert code == 0
    assert "1 images that are anomalous already are left out" in capsys.readouterr().err
    content = validate_datalist(target / "datalist.json")
    items = {item["image"]: item for item in content["test"]}
    assert list(content["corruptions"].items()) == [("noise", 0.02), ("line", 1.0)]
    assert (content["modality"], content["label_names"]) == ("CR", ["x"])
    assert len(items) == 9
    assert items["images/line/sub/p0.png"] == {
        "image": "images/line/sub/p0.png",
        "patient": "a",
        "label": 3,
        "source": "images/sub/p0.png",
        "anomaly": 1,
        "anomaly_mask": "masks/line/sub/p0.png",
        "corruption": "line",
        "severity": 1.0,
    }
    assert items["images/original/sub/p2.png"] == {
        "image": "images/original/sub/p2.png",
        "patient": "b",
        "source": "images/sub/p2.png",
        "anomaly": 0,
    }
    assert "anomaly_mask" not in items["images/noise/sub/p0.png"]
    for item in load_datalist(target / "datalist.json", "test"):
        original = pixels_of(dataset / item["source"])
        shown = pixels_of(item["image"])
        if item["anomaly"] == 0:
            np.testing.assert_array_equal(shown, original)
        elif "anomaly_mask" in item:
            mask = pixels_of(item["anomaly_mask"])
            assert set(np.unique(mask)) == {0, 255}
            np.testing.assert_array_equal(shown[mask == 0], original[mask == 0])


def test_values_are_rounded_not_cut_off(tmp_path):
    save(tmp_path / "in/a.png", np.linspace(0.3, 0.7, 128 * 128).reshape(128, 128))

    run("--source", tmp_path / "in", "--target", tmp_path / "out", "--kind", "noise", "--variance", 0.0004)

    difference = pixels_of(tmp_path / "out/images/noise/a.png").astype(float) - pixels_of(tmp_path / "in/a.png")
    assert difference.mean() == pytest.approx(0, abs=0.15)  # -0.5 if cut off; deviation of the mean: 0.04


def test_copies_depend_on_seed_and_name_alone(tmp_path):
    for number in range(4):
        save(tmp_path / f"many/p{number}.png", radiograph(40, number))
    save(tmp_path / "few/p2.png", radiograph(40, 2))
    kinds = ("--kind", "line", "--kind", "noise")

    run("--source", tmp_path / "many", "--target", tmp_path / "a", *kinds, "--workers", 2)
    run("--source", tmp_path / "few", "--target", tmp_path / "b", "--kind", "noise")
    run("--source", tmp_path / "many", "--target", tmp_path / "c", *kinds, "--seed", 1)

    first, alone, other = (pixels_of(tmp_path / name / "images/noise/p2.png") for name in "abc")
    np.testing.assert_array_equal(first, alone)
    assert not np.array_equal(first, other)
    lines = [pixels_of(tmp_path / f"a/masks/line/p{number}.png") for number in range(4)]
    assert all(not np.array_equal(lines[0], line) for line in lines[1:])


def test_the_same_command_again_mends_what_is_missing_and_other_settings_are_refused(dataset, tmp_path, capsys):
    arguments = ("--source", dataset, "--target", tmp_path / "out", "--kind", "disc")
    run(*arguments)
    mask = tmp_path / "out/masks/disc/sub/p1.png"
    before = mask.read_bytes(), (tmp_path / "out/datalist.json").read_bytes()
    mask.unlink()

    code = run(*arguments)

    assert code == 0
    assert (mask.read_bytes(), (tmp_path / "out/datalist.json").read_bytes()) == before
    assert run(*arguments, "--contrast", 0.5) == 1
    assert "made with other settings: corruption" in capsys.readouterr().err


def test_one_each_gives_every_image_one_of_the_kinds(tmp_path):
    for number in range(12):
        save(tmp_path / f"in/p{number}.png", radiograph(32, number))

    run(
        *("--source", tmp_path / "in", "--target", tmp_path / "out", "--one-each"),
        *("--kind", "line", "--kind", "disc", "--kind", "blur"),
    )

    items = validate_datalist(tmp_path / "out/datalist.json")["test"]
    assert sorted(item["source"] for item in items) == sorted(f"p{number}.png" for number in range(12))
    assert {item["corruption"] for item in items} == {"line", "disc", "blur"}


@pytest.mark.parametrize(("split", "count"), [("all", 4), ("training", 1)])
def test_copies_are_tested_whatever_split_their_images_are_of(split, count, dataset, tmp_path, capsys):
    save(dataset / "images/white.png", np.ones((48, 48)))  # cannot be corrupted, so it may stay where it stood
    content = json.loads((dataset / "datalist.json").read_text())
    content["training"].append({"image": "images/white.png", "patient": "d"})
    (dataset / "datalist.json").write_text(json.dumps(content))

    code = run(
        *("--source", dataset / "datalist.json", "--target", tmp_path / "out", "--kind", "line", "--split", split),
        "--keep_originals",
    )

    written = validate_datalist(tmp_path / "out/datalist.json")
    assert code == 3
    assert [(item["patient"], item["anomaly"]) for item in written["training"]] == [("d", 0)]
    assert len(written["test"]) == 2 * count
    assert {"c"} <= {item["patient"] for item in written["test"]}
    assert "note: 1 copies of images of other splits stand in test" in capsys.readouterr().err


def test_what_changes_nothing_is_rejected(tmp_path):
    save(tmp_path / "in/white.png", np.ones((48, 48)))
    save(tmp_path / "in/dim.png", radiograph(48))

    code = run(
        *("--source", tmp_path / "in", "--target", tmp_path / "out", "--kind", "line", "--kind", "blur"),
        *("--kind", "disc", "--contrast", 0.001),
    )

    assert code == 3
    assert [item["image"] for item in validate_datalist(tmp_path / "out/datalist.json")["test"]] == [
        "images/blur/dim.png"
    ]
    with open(tmp_path / "out/rejected.csv", newline="") as file:
        reasons = {row["file"]: row["reason"].split("; ") for row in csv.DictReader(file)}
    assert reasons["white.png"][0].startswith("blur: changes no pixel")
    assert (
        reasons["white.png"][1]
        == "line: no place where a line would be visible: what lies there is as bright, or leaves no room"
    )
    assert all("changes no pixel" in reason for reason in reasons["dim.png"])


def test_a_study_whose_images_lie_elsewhere_can_be_corrupted(dataset, tmp_path, capsys):
    normal = json.loads((dataset / "datalist.json").read_text())
    del normal["test"][3]
    (dataset / "datalist.json").write_text(json.dumps(normal))
    assert c.main(split_app, ["--normal", str(dataset), "--target", str(tmp_path / "study")]) == 0
    told = capsys.readouterr().out
    assert f"--dataset_dir {dataset}" in told
    arguments = ("--source", tmp_path / "study", "--target", dataset / "made", "--kind", "line", "--split", "all")

    assert run(*arguments) == 1
    assert "set --dataset_dir to the folder that its paths start from" in capsys.readouterr().err
    assert run(*arguments, "--dataset_dir", dataset) == 0

    assert len(load_datalist(dataset / "made/datalist.json", "test")) == 4
    assert (
        run("--source", dataset / "images", "--dataset_dir", dataset, "--target", tmp_path / "x", "--kind", "line") == 1
    )
    assert "--dataset_dir needs a datalist" in capsys.readouterr().err


def test_sixteen_bits_stay_sixteen(tmp_path):
    values = (radiograph(40) * 65535).astype(np.uint16)
    (tmp_path / "in").mkdir()
    Image.fromarray(values).save(tmp_path / "in/a.png")

    run("--source", tmp_path / "in", "--target", tmp_path / "out", "--kind", "line", "--keep-originals")

    np.testing.assert_array_equal(pixels_of(tmp_path / "out/images/original/a.png"), values)
    assert pixels_of(tmp_path / "out/images/line/a.png").max() > values.max() + 5000


def test_what_cannot_be_corrupted_is_rejected_with_its_reason_and_the_rest_goes_on(tmp_path):
    source = tmp_path / "in"
    save(source / "flat.png", radiograph(64))
    save(source / "ct.png", slice_of_ct(64)[0])
    (source / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    nibabel.save(nibabel.Nifti1Image(np.random.rand(8, 8, 1), np.eye(4)), tmp_path / "volume.nii")
    (source / "volume.png").write_bytes((tmp_path / "volume.nii").read_bytes())

    code = run("--source", source, "--target", tmp_path / "out", "--kind", "needle")

    assert code == 3
    with open(tmp_path / "out/rejected.csv", newline="") as file:
        reasons = {row["file"]: row["reason"] for row in csv.DictReader(file)}
    assert set(reasons) == {"flat.png", "broken.png", "volume.png"}
    assert "shows no body" in reasons["flat.png"]
    assert "expected a picture" in reasons["volume.png"]
    items = validate_datalist(tmp_path / "out/datalist.json")["test"]
    assert [item["image"] for item in items] == ["images/needle/ct.png"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--kind", "blur", "--kernel", "4"), 1, "kernel must be odd"),
        (("--kind", "scratch"), 2, "scratch"),
        (("--kind", "blur", "--split", "calibration"), 1, "one of training, test"),
        ((), 2, "kind"),
    ],
)
def test_wrong_usage_is_one_line(dataset, tmp_path, capsys, arguments, code, message):
    assert run("--source", dataset, "--target", tmp_path / "out", *arguments) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_kinds_are_either_local_or_global():
    assert set(Kind) == {*GLOBAL, *LOCAL}
