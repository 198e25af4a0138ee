"""Scoring, fitting and putting back, and the files of maps: PNG, NIfTI, DICOM."""

from __future__ import annotations

import matplotlib
import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from monai.data import MetaTensor, list_data_collate
from monai.transforms import CenterSpatialCropd, Compose, Flip, LoadImaged
from PIL import Image
from pydicom.config import disable_value_validation
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from scipy.stats import wasserstein_distance
from skimage.metrics import mean_squared_error

from medgen.data import MedicalImageReader, read_frames
from medgen.errors import UserError
from medgen.transforms import (
    FitAnomalyMaskd,
    FitToReferenced,
    ResizeShorterSided,
    RestoreGridd,
    SaveAnomalyDICOMd,
    SaveMapd,
    SaveOverlayd,
    SaveProjectiond,
    ScoreAnomalyd,
    check_files,
    check_scoring,
    default_patch,
    origin_of_reconstructions,
    pair_reconstructions,
)
from medgen.transforms.anomaly import read_anomaly_mask
from medgen.transforms.save_anomaly import BOX_COLOUR, OPACITY, draw_overlay

MAPS = ("mse_map", "wd_map")


def load(path, key="image"):
    read = LoadImaged(key, reader=MedicalImageReader, ensure_channel_first=True, image_only=True)
    return read({key: str(path)})[key]


def grey(array):
    return MetaTensor(torch.as_tensor(np.asarray(array, dtype=np.float32))[None])


def save_png(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.astype(np.uint8)).save(path)
    return path


@pytest.fixture
def pair():
    random = np.random.default_rng(0)
    image = random.integers(20, 220, (48, 64))
    reconstruction = image + random.integers(-5, 6, image.shape)
    reconstruction[10:18, 30:38] -= 15
    return image.astype(np.uint8), reconstruction.astype(np.uint8)


# ---------------------------------------------------------------- pairs


def test_reconstruction_is_named_as_it_was_saved(tmp_path):
    save_png(tmp_path / "rec/p1/a.png", np.zeros((4, 4)))
    item = {"image": str(tmp_path / "in/p1/a.dcm"), "patient": "x"}
    (found,) = pair_reconstructions([{**item, "anomaly_mask": None}], tmp_path / "rec", tmp_path / "in")
    assert found == {**item, "reconstruction": str(tmp_path / "rec/p1/a.png")}


def test_images_of_one_stem_have_their_own_reconstructions(tmp_path):
    items = [{"image": str(tmp_path / f"in/a.{kind}")} for kind in ("dcm", "jpg")]
    found = pair_reconstructions(items, tmp_path / "rec", tmp_path / "in", require_files=False)
    assert [item["reconstruction"] for item in found] == [str(tmp_path / f"rec/a.{k}.png") for k in ("dcm", "jpg")]


def test_reconstructions_of_some_images_are_named_as_those_of_all(tmp_path):
    items = [{"image": str(tmp_path / name)} for name in ("a.png", "a.dcm")]
    folder = tmp_path / "out"
    pairs = pair_reconstructions(items, folder, tmp_path, require_files=False)
    inputs = [item["image"] for item in items]
    assert pair_reconstructions(items[1:], folder, tmp_path, require_files=False, inputs=inputs) == pairs[1:]
    assert pair_reconstructions(items[1:], folder, tmp_path, require_files=False) != pairs[1:]


def test_file_of_the_same_name_will_do(tmp_path):
    (tmp_path / "rec/p1").mkdir(parents=True)
    (tmp_path / "rec/p1/a.jpg").write_bytes(b"")
    (found,) = pair_reconstructions([{"image": str(tmp_path / "in/p1/a.jpg")}], tmp_path / "rec", tmp_path / "in")
    assert found["reconstruction"] == str(tmp_path / "rec/p1/a.jpg")


def test_images_that_a_projection_gave_none_are_left_out(tmp_path, caplog):
    items = [{"image": str(tmp_path / f"in/p/{n}.png")} for n in range(3)]
    save_png(tmp_path / "rec/p/1.png", np.zeros((4, 4)))
    save_png(tmp_path / "rec/p/2.png", np.zeros((4, 4)))
    table = tmp_path / "rejected.csv"
    table.write_text("file,reason\np/0.png,diverged\np/2.png,1 of 2 frames left out\n")
    pairs = pair_reconstructions(items, tmp_path / "rec", tmp_path / "in", rejected=table)
    assert [pair["image"] for pair in pairs] == [item["image"] for item in items[1:]]
    assert "1 of 3 images have no reconstruction and are left out" in caplog.text
    arguments = {"data_root": tmp_path / "in", "inputs": [item["image"] for item in items]}
    assert pair_reconstructions(items, tmp_path / "rec", rejected=table, at_most=1, **arguments) == pairs[:1]
    assert pair_reconstructions([], tmp_path / "rec", rejected=table, **arguments) == []  # an empty shard
    with pytest.raises(UserError, match=r"none of 1 images has a reconstruction in .*rejected\.csv says why"):
        pair_reconstructions(items[:1], tmp_path / "rec", rejected=table, **arguments)


def test_missing_reconstructions_are_counted(tmp_path):
    items = [{"image": str(tmp_path / f"in/{n}.png")} for n in range(3)]
    save_png(tmp_path / "rec/1.png", np.zeros((4, 4)))
    with pytest.raises(UserError, match=r"0\.png not found \(2 of 3 reconstructions are missing\)"):
        pair_reconstructions(items, tmp_path / "rec", tmp_path / "in")


# ---------------------------------------------------------------- scores


def test_scores_are_those_of_scikit_image_and_scipy_on_8_bits(pair):
    image, reconstruction = pair
    # float32 of an image that was resized: between the levels
    between = image / 255 + 0.3 / 255
    found = ScoreAnomalyd(patch=8)({"image": grey(between), "reconstruction": grey(reconstruction / 255)})["scores"]
    assert found["mse_full"] == pytest.approx(mean_squared_error(image, reconstruction) / 255**2, rel=1e-12)
    assert found["wd_full"] == pytest.approx(wasserstein_distance(image.ravel(), reconstruction.ravel()) / 255)
    row, column = found["wd_patch_row"], found["wd_patch_column"]
    patches = (array[row : row + 8, column : column + 8].ravel() for array in pair)
    assert found["wd_patch"] == pytest.approx(wasserstein_distance(*patches) / 255)
    assert (row, column, found["patch"]) == (10, 30, 8)


def test_maps_peak_at_the_anomaly_and_keep_the_metadata(pair, tmp_path):
    image = load(save_png(tmp_path / "a.png", pair[0]))
    found = ScoreAnomalyd(patch=8)({"image": image, "reconstruction": grey(pair[1] / 255)})
    for key in MAPS:
        heat = found[key]
        assert (heat.shape, heat.dtype, float(heat.min()) >= 0) == ((1, 48, 64), torch.float32, True)
        row, column = np.unravel_index(int(heat.argmax()), heat.shape[1:])
        assert 10 <= row < 18
        assert 30 <= column < 38
        assert heat.meta["filename_or_obj"] == str(tmp_path / "a.png")


def test_image_without_a_body_can_be_batched():
    black, white = grey(np.zeros((8, 8))), grey(np.ones((8, 8)))
    items = [ScoreAnomalyd(patch=2)({"image": image, "reconstruction": white}) for image in (black, white)]
    scores = list_data_collate([{"scores": item["scores"]} for item in items])["scores"]
    assert torch.isnan(scores["mse_body"]).tolist() == [True, False]
    assert items[0]["scores"]["body_share"] == 0


@pytest.mark.parametrize(
    ("shape", "patch"), [((512, 512), 32), ((128, 300), 32), ((64, 64), 16), ((32, 48), 8), ((3, 3), 1)]
)
def test_patch_is_32_or_a_quarter_of_the_shorter_side(shape, patch):
    assert default_patch(shape) == patch
    item = {"image": grey(np.full(shape, 0.5)), "reconstruction": grey(np.full(shape, 0.25))}
    assert ScoreAnomalyd()(item)["scores"]["patch"] == patch


def test_patch_larger_than_the_image_is_refused_with_the_file(tmp_path):
    image = load(save_png(tmp_path / "small.png", np.zeros((8, 8))))
    with pytest.raises(UserError, match=r"small\.png: patch must be between 1 and .*, got 32 for \(8, 8\)"):
        ScoreAnomalyd(patch=32)({"image": image, "reconstruction": image})


@pytest.mark.parametrize(
    "settings",
    [
        {"patch": 0},
        {"patch": 2.5},
        {"patch": True},
        {"body_threshold": 1.0},
        {"body_threshold": "x"},
        {"keys": "image"},
    ],
)
def test_senseless_settings_are_refused_before_any_image(settings):
    with pytest.raises(UserError):
        ScoreAnomalyd(**settings)


@pytest.mark.parametrize("bad", [np.nan, 1.5, -0.2])
def test_values_out_of_range_are_refused(bad):
    image = np.full((8, 8), 0.5)
    image[0, 0] = bad
    with pytest.raises(UserError, match="must"):
        ScoreAnomalyd()({"image": grey(image), "reconstruction": grey(np.full((8, 8), 0.5))})


# ---------------------------------------------------------------- fitting and putting back


def test_fitting_is_what_the_projection_does(tmp_path):
    picture = save_png(tmp_path / "a.png", np.random.default_rng(0).integers(0, 256, (75, 120)))
    projected = Compose([ResizeShorterSided("image", 32), CenterSpatialCropd("image", (32, 32))])
    expected = projected({"image": load(picture)})["image"]
    found = FitToReferenced("image", "reconstruction")({"image": load(picture), "reconstruction": grey(np.eye(32))})
    torch.testing.assert_close(found["image"].as_tensor(), expected.as_tensor(), rtol=0, atol=0)
    torch.testing.assert_close(found["image"].affine, expected.affine)


def test_image_of_other_proportions_than_the_reconstruction_is_refused(tmp_path):
    image = load(save_png(tmp_path / "tall.png", np.zeros((90, 30))))
    with pytest.raises(UserError, match=r"tall\.png: 90×30 pixels .* cannot be fitted to the reconstruction's 16×32"):
        FitToReferenced("image", "reconstruction")({"image": image, "reconstruction": grey(np.zeros((16, 32)))})


@pytest.mark.parametrize("shape", [(90, 200), (200, 90), (64, 64), (17, 33)])
def test_each_pixel_of_the_file_gets_the_value_of_its_place(tmp_path, shape):
    item = {"image": load(save_png(tmp_path / "a.png", np.zeros(shape))), "reconstruction": grey(np.zeros((32, 32)))}
    image = FitToReferenced("image", "reconstruction")(item)["image"]
    scale = np.diag(image.affine.numpy())[:2]
    shift = image.affine.numpy()[:2, -1]
    # a map of places: of each of its pixels the row and column of the file
    places = np.stack(np.meshgrid(*(np.arange(32) * scale[i] + shift[i] for i in (0, 1)), indexing="ij"))
    heat = MetaTensor(torch.as_tensor(places), meta=dict(image.meta))

    restored = RestoreGridd("heat")({"heat": heat})["heat"].numpy()

    assert restored.shape == (2, *shape)
    truth = np.stack(np.mgrid[: shape[0], : shape[1]])
    scored = ~np.isnan(restored[0])
    # the scored square reaches half a pixel of the map beyond the centres, where the outermost value holds
    between = ((truth >= places.min((1, 2))[:, None, None]) & (truth <= places.max((1, 2))[:, None, None])).all(0)
    assert scored[between].all()
    np.testing.assert_allclose(restored[:, between], truth[:, between], atol=1e-3)
    assert scored.any(1).sum() == pytest.approx(min(shape), abs=2)
    assert scored.any(0).sum() == pytest.approx(min(shape), abs=2)


def test_bright_spot_comes_back_to_its_pixel(tmp_path):
    source = np.zeros((100, 160))
    source[40:44, 60:64] = 255  # centre 41.5, 61.5
    item = {"image": load(save_png(tmp_path / "a.png", source)), "reconstruction": grey(np.zeros((25, 25)))}
    image = FitToReferenced("image", "reconstruction")(item)["image"]
    restored = RestoreGridd("image")({"image": image})["image"].numpy()[0]
    weights = np.nan_to_num(restored)
    rows, columns = np.mgrid[:100, :160]
    centre = (weights * rows).sum() / weights.sum(), (weights * columns).sum() / weights.sum()
    assert centre == pytest.approx((41.5, 61.5), abs=0.51)
    # of 40 columns MONAI's centre crop takes 8 to 32, four of the file each
    np.testing.assert_array_equal(np.isnan(restored), np.broadcast_to((np.arange(160) - 32) // 100 != 0, (100, 160)))


def test_flipped_image_is_refused_rather_than_mapped_wrong(tmp_path):
    image = Flip(spatial_axis=1)(load(save_png(tmp_path / "a.png", np.zeros((8, 8)))))
    with pytest.raises(UserError, match=r"a\.png: was rotated or flipped"):
        RestoreGridd("heat")({"heat": image})


def test_mask_keeps_a_line_that_is_thinner_than_a_pixel(tmp_path):
    mask = np.zeros((320, 400))
    mask[:, 203] = 255
    item = {"image": load(save_png(tmp_path / "a.png", np.zeros((320, 400)))), "reconstruction": grey(np.eye(32))}
    item = FitToReferenced("image", "reconstruction")(item)
    item["anomaly_mask"] = str(save_png(tmp_path / "m.png", mask))
    found = FitAnomalyMaskd()(item)["anomaly_mask"]
    # the file's column 203 lies in the crop of columns 40 to 359, ten to a pixel
    assert found.shape == (1, 32, 32)
    assert torch.equal(found[0].nonzero()[:, 1].unique(), torch.tensor([16]))
    assert int(found.sum()) == 32


def test_mask_of_a_small_image_grows_with_it(tmp_path):
    mask = np.zeros((8, 8))
    mask[2, 5] = 1  # any value above 0
    item = {"image": load(save_png(tmp_path / "a.png", np.zeros((8, 8)))), "reconstruction": grey(np.eye(32))}
    item = FitToReferenced("image", "reconstruction")(item)
    item["anomaly_mask"] = str(save_png(tmp_path / "m.png", mask))
    found = FitAnomalyMaskd()(item)["anomaly_mask"][0]
    assert int(found.sum()) == 16
    assert bool(found[8:12, 20:24].all())


def test_item_without_a_mask_gets_zeros_and_a_mask_of_another_size_is_refused(tmp_path):
    image = load(save_png(tmp_path / "a.png", np.zeros((8, 9))))
    assert int(FitAnomalyMaskd()({"image": image})["anomaly_mask"].sum()) == 0
    mask = save_png(tmp_path / "m.png", np.ones((9, 9)))
    with pytest.raises(UserError, match=r"m\.png: an anomaly_mask must have its image's 8×9 pixels .* got 9×9"):
        FitAnomalyMaskd()({"image": image, "anomaly_mask": str(mask)})


@pytest.mark.parametrize("level", [1, 7])
@pytest.mark.parametrize("suffix", ["png", "tif", "float.tif", "palette.png", "nii.gz"])
def test_mask_is_read_by_its_values_also_where_it_is_constant(tmp_path, suffix, level):
    for name, array in (("all", np.full((6, 9), level)), ("part", level * np.eye(6, 9))):
        path = tmp_path / f"{name}.{suffix}"
        if suffix == "nii.gz":
            volume = array.T[::-1, ::-1, None].astype(np.int16)  # upright in radiological display
            nib.save(nib.Nifti1Image(volume, np.eye(4)), path)
        elif suffix == "float.tif":
            Image.fromarray(array.astype(np.float32)).save(path)
        else:
            image = Image.fromarray(array.astype(np.uint8))
            if suffix.startswith("palette"):
                image = image.convert("P")
            image.save(path)
        np.testing.assert_array_equal(read_anomaly_mask(path), array > 0)


def test_jpeg_is_refused_as_a_mask(tmp_path):
    path = tmp_path / "m.jpg"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
    with pytest.raises(UserError, match=r"m\.jpg: a JPEG .* save the mask as PNG"):
        read_anomaly_mask(path)


# ---------------------------------------------------------------- checks before a projection


@pytest.mark.parametrize(
    ("anomalies", "message"),
    [
        ([0, 2, 1], r"anomaly must be 1, or 0 or absent .* got 2 for 1\.png \(1 of 3 items\)"),
        ([None, 1, "needle"], r"got 'needle' for 2\.png"),
        (["normal"], "got 'normal'"),
    ],
)
def test_class_that_is_neither_0_nor_1_is_refused(anomalies, message):
    items = [{"image": f"{n}.png", "anomaly": kind} for n, kind in enumerate(anomalies)]
    with pytest.raises(UserError, match=message):
        check_scoring(items)


@pytest.mark.parametrize(
    ("patch", "message"), [(65, r"shorter side of the image, 64 pixels, got 65; set --patch"), ("x", "got 'x'")]
)
def test_patch_that_no_image_has_is_refused(patch, message):
    check_scoring([{"image": "a.png", "anomaly": 1}, {"image": "b.png"}], 64, (64, 80))
    with pytest.raises(UserError, match=message):
        check_scoring([], patch, (64, 80))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_files_that_would_end_a_projection_are_named_before_it(tmp_path, num_workers):
    items = []
    for number in range(4):
        item = {"image": str(save_png(tmp_path / f"{number}.png", np.zeros((8, 9))))}
        items.append(item | {"anomaly_mask": str(save_png(tmp_path / f"m{number}.png", np.ones((8, 9))))})
    items.append({"image": items[0]["image"], "anomaly_mask": None})
    check_files(items, num_workers)
    save_png(tmp_path / "m1.png", np.ones((9, 8)))
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:40])
    with pytest.raises(UserError) as caught:
        check_files(items, num_workers)
    assert "m1.png: an anomaly_mask must have its image's 8×9 pixels" in str(caught.value)
    assert "(2 of 5 items cannot be used)" in str(caught.value)
    with pytest.raises(UserError, match=r"3\.png: .*truncated or damaged.* \(1 of 1 items"):
        check_files(items[3:4], num_workers)


# ---------------------------------------------------------------- pictures


def test_overlay_shows_the_image_where_there_is_nothing_and_plasma_at_the_top():
    image = np.array([[0.0, 0.2, 0.4, 1.0]])
    picture = draw_overlay(image, np.array([[0.0, np.nan, 3.0, 9.0]]), limit=3.0)
    top = np.array(matplotlib.colormaps["plasma"](1.0)[:3])
    expected = [[0.0] * 3, [0.2] * 3, (1 - OPACITY) * 0.4 + OPACITY * top, (1 - OPACITY) + OPACITY * top]
    np.testing.assert_array_equal(picture[0], np.rint(np.array(expected) * 255))


def test_box_lies_around_its_patch():
    plain = draw_overlay(np.full((40, 40), 0.5), np.zeros((40, 40)), 1.0)
    boxed = draw_overlay(np.full((40, 40), 0.5), np.zeros((40, 40)), 1.0, box=(10, 20, 17, 27))
    outline = np.zeros((40, 40), bool)
    outline[9:19, 19:29] = True
    outline[10:18, 20:28] = False
    assert (boxed[outline] == BOX_COLOUR).all()
    np.testing.assert_array_equal(boxed[~outline], plain[~outline])


def scored(path, reconstruction, patch=4):
    """What the configs' chain gives the savers."""
    source = load(path)
    item = {"image": source, "source": source, "reconstruction": grey(reconstruction)}
    item = FitToReferenced("image", "reconstruction")(item)
    return RestoreGridd(MAPS)(ScoreAnomalyd(patch=patch)(item))


def test_overlays_are_upright_enlarged_and_have_a_scale(tmp_path):
    source = np.tile(np.linspace(0, 200, 40), (30, 1)).round()
    reconstruction = source[:, 5:35] / 255
    reconstruction[4:8, 20:24] += 0.2
    item = scored(save_png(tmp_path / "in/p1/a.png", source), reconstruction)
    SaveOverlayd(MAPS, tmp_path / "out", tmp_path / "in", limits=[None, 0.1])(item)
    with Image.open(tmp_path / "out/p1/a_mse.png") as saved:
        picture = np.asarray(saved)
    factor = 18  # 30 pixels to at least 512
    assert picture.shape[0] == 30 * factor
    assert picture.shape[1] > 40 * factor
    # above the box, the top of the anomaly; the crop begins at column 5
    box = (picture == BOX_COLOUR).all(-1)
    rows, columns = np.nonzero(box)
    assert (rows.min() // factor, rows.max() // factor) == (3, 8)
    assert (columns.min() // factor, columns.max() // factor) == (24, 29)
    np.testing.assert_array_equal(picture[-1, : 5 * factor : factor, 0], source[-1, :5])
    assert (tmp_path / "out/p1/a_wd.png").is_file()


@pytest.mark.parametrize("limits", [0.0, [1.0], [None, -1], ["abc", None]])
def test_senseless_limits_are_refused(tmp_path, limits):
    with pytest.raises(UserError, match="limits must be a number above 0 or null for each of the 2 maps"):
        SaveOverlayd(MAPS, tmp_path, limits=limits)


def test_other_keys_than_the_maps_are_refused(tmp_path):
    with pytest.raises(UserError, match="maps to save must be mse_map or wd_map, got heat"):
        SaveMapd("heat", tmp_path)


# ---------------------------------------------------------------- NIfTI


def test_map_of_a_picture_is_read_back_upright(tmp_path):
    source = np.random.default_rng(0).integers(0, 256, (20, 28))
    item = scored(save_png(tmp_path / "a.png", source), np.zeros((20, 28)))
    SaveMapd(MAPS, tmp_path / "out")(item)
    back = read_frames(tmp_path / "out/a_mse.nii.gz")[0].pixels
    heat = item["mse_map"][0].numpy()
    np.testing.assert_allclose(back, (heat - heat.min()) / (heat.max() - heat.min()), atol=1e-6)
    volume = nib.load(tmp_path / "out/a_mse.nii.gz")
    assert volume.get_data_dtype() == np.float32
    np.testing.assert_array_equal(np.asarray(volume.dataobj)[..., 0].T, heat)


def test_same_map_gives_the_same_file_and_nan_outside_the_crop(tmp_path):
    item = scored(save_png(tmp_path / "a.png", np.full((20, 40), 99)), np.zeros((20, 20)))
    for name in ("one", "two"):
        SaveMapd(MAPS, tmp_path / name)(item)
    assert (tmp_path / "one/a_wd.nii.gz").read_bytes() == (tmp_path / "two/a_wd.nii.gz").read_bytes()
    values = np.asarray(nib.load(tmp_path / "one/a_wd.nii.gz").dataobj)[..., 0].T
    assert np.isnan(values[:, :10]).all()
    assert np.isnan(values[:, 30:]).all()
    assert not np.isnan(values[:, 10:30]).any()


@pytest.mark.parametrize(
    "affine",
    [
        np.diag([2.0, 3, 4, 1]),
        np.diag([-2.0, -3, 4, 1]),
        np.array([[0, 2.0, 0, 5], [0, 0, -3, 6], [4, 0, 0, 7], [0, 0, 0, 1]]),  # axes permuted and flipped
    ],
    ids=["RAS", "LPS", "permuted"],
)
def test_map_of_a_volume_lies_in_its_space(tmp_path, affine):
    volume = np.full((16, 18, 20), 10, np.float32)
    spot = (5, 6, 7)
    volume[spot] = 200
    world = affine @ [*spot, 1]
    nib.save(nib.Nifti1Image(volume, affine), tmp_path / "v.nii.gz")
    frames = read_frames(tmp_path / "v.nii.gz")
    number = next(frame.index for frame in frames if frame.pixels.max() == 1)
    read = LoadImaged("image", reader=MedicalImageReader(frame=number), ensure_channel_first=True, image_only=True)
    source = read({"image": str(tmp_path / "v.nii.gz")})["image"]
    heat = MetaTensor(source.as_tensor(), meta=source.meta)

    SaveMapd("mse_map", tmp_path / "out")({"mse_map": heat})

    saved = nib.load(tmp_path / "out/v_mse.nii.gz")
    values = np.asarray(saved.dataobj)
    assert sorted(values.shape)[0] == 1
    peak = np.unravel_index(values.argmax(), values.shape)
    np.testing.assert_allclose(saved.affine @ [*peak, 1], world, atol=1e-4)


# ---------------------------------------------------------------- DICOM


def write_dicom(path, pixels, **elements):
    """A CT image without private matters; ``pixels`` uint8, (H, W) or (frames, H, W)."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[path.name])
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.StudyInstanceUID, ds.SeriesInstanceUID = (generate_uid(entropy_srcs=[text]) for text in ("study", "series"))
    ds.PatientID, ds.PatientName, ds.Modality = "P7", "A^B", "CT"
    ds.Rows, ds.Columns = pixels.shape[-2:]
    if pixels.ndim == 3:
        ds.NumberOfFrames = len(pixels)
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit, ds.PixelRepresentation = 7, 0
    ds.WindowCenter, ds.WindowWidth = 128, 256
    for name, value in elements.items():
        setattr(ds, name, value)
    ds.PixelData = pixels.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path


def test_map_of_a_ct_slice_has_its_position(tmp_path):
    position, along_row, along_column = np.array([-10.0, 20, 30]), np.array([0.0, 1, 0]), np.array([0.0, 0, -1])
    path = write_dicom(
        tmp_path / "a.dcm",
        np.random.default_rng(0).integers(0, 256, (16, 24)),
        ImagePositionPatient=list(position),
        ImageOrientationPatient=[*along_row, *along_column],
        PixelSpacing=[0.5, 0.7],
        SliceThickness=2,
    )
    SaveMapd(MAPS, tmp_path / "out")(scored(path, np.zeros((16, 24))))
    affine = nib.load(tmp_path / "out/a_mse.nii.gz").affine
    column, row = 5, 9
    # PS3.3 C.7.6.2.1.1: the first spacing is that between rows
    lps = position + 0.7 * column * along_row + 0.5 * row * along_column
    np.testing.assert_allclose(affine @ [column, row, 0, 1], [*(lps * [-1, -1, 1]), 1], atol=1e-5)


def test_radiograph_has_its_spacing_and_one_of_zero_counts_as_unknown(tmp_path):
    for name, spacing, expected in (("a", [0.2, 0.1], (0.1, 0.2)), ("b", [0, 0], (1, 1))):
        path = write_dicom(tmp_path / f"{name}.dcm", np.full((16, 16), 7), ImagerPixelSpacing=spacing)
        SaveMapd(MAPS, tmp_path / "out")(scored(path, np.zeros((16, 16))))
        zooms = nib.load(tmp_path / f"out/{name}_mse.nii.gz").header.get_zooms()
        assert zooms[:2] == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:Invalid value", "ignore:A value of type", "ignore:The value")
@pytest.mark.parametrize(
    "elements",
    [
        {"PixelSpacing": [0.3]},
        {"PixelSpacing": ["nan", "nan"]},
        {"ImageOrientationPatient": [1, 0, 0], "ImagePositionPatient": [0, 0, 0], "PixelSpacing": [1, 1]},
        {"ImageOrientationPatient": [0] * 6, "ImagePositionPatient": [0, 0, 5], "PixelSpacing": [1, 1]},
        {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "ImagePositionPatient": [0, 0], "PixelSpacing": [1, 1]},
        {"SliceThickness": [1, 2]},
    ],
)
def test_odd_header_stops_no_map(tmp_path, elements):
    with disable_value_validation():
        path = write_dicom(tmp_path / "a.dcm", np.full((16, 24), 7), **elements)
    SaveMapd(MAPS, tmp_path / "out")(scored(path, np.zeros((16, 16))))
    np.testing.assert_array_equal(nib.load(tmp_path / "out/a_mse.nii.gz").affine, np.diag([-1, -1, 1, 1]))


def test_dicom_objects_of_other_origin_patch_or_limits_are_another_series(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", np.full((16, 16), 7))
    series = set()
    for number, (patch, settings) in enumerate(
        [(4, {}), (4, {}), (8, {}), (4, {"origin": lambda: "other weights"}), (4, {"limits": [0.5, None]})]
    ):
        item = scored(path, np.zeros((16, 16)), patch)
        SaveAnomalyDICOMd(MAPS, tmp_path / f"out{number}", **settings)(item)
        for kind in ("overlay", "map"):
            written = pydicom.dcmread(tmp_path / f"out{number}/a_mse_{kind}.dcm")
            series.add((kind, written.SeriesInstanceUID))
    assert len(series) == 2 * 4


def test_origin_is_the_projections_or_else_the_first_reconstructions(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"weights")
    image = save_png(tmp_path / "in/a.png", np.zeros((4, 4)))
    saver = SaveProjectiond(tmp_path / "projections", {"steps": 2}, tmp_path / "model.pt", tmp_path / "in")
    saver(
        {
            "image": MetaTensor(torch.zeros(1, 4, 4), meta={"filename_or_obj": str(image)}),
            "w": torch.zeros(1, 2),
            "noise": [],
            "loss_curve": torch.zeros(2),
            "steps": 2,
            "distance": 0.5,
        }
    )
    pairs = [{"image": str(image), "reconstruction": str(image)}]
    assert origin_of_reconstructions(pairs, tmp_path / "projections", tmp_path / "in") == saver.origin()
    without = origin_of_reconstructions(pairs, None)
    assert without == origin_of_reconstructions(pairs, tmp_path / "none", tmp_path / "in")
    save_png(image, np.ones((4, 4)))
    assert origin_of_reconstructions(pairs, None) != without


def test_dicom_objects_lie_on_the_source_and_refer_to_it(tmp_path):
    stored = np.full((20, 32), 155)
    stored[12:16, 20:24] = 55  # bright, since the image is MONOCHROME1
    path = write_dicom(tmp_path / "in/s/a.dcm", stored, PhotometricInterpretation="MONOCHROME1", PixelSpacing=[1, 1])
    item = scored(path, np.full((20, 20), 100 / 255))

    SaveAnomalyDICOMd(MAPS, tmp_path / "out", tmp_path / "in")(item)

    source = pydicom.dcmread(path)
    overlay, parametric = (pydicom.dcmread(tmp_path / f"out/s/a_mse_{kind}.dcm") for kind in ("overlay", "map"))
    values = np.frombuffer(parametric.FloatPixelData, "<f4").reshape(20, 32)
    np.testing.assert_array_equal(values, np.nan_to_num(item["mse_map"][0].numpy()))
    row, column = np.unravel_index(values.argmax(), values.shape)
    assert 12 <= row < 16
    assert 20 <= column < 24
    assert (values[:, :6] == 0).all()
    assert (overlay.Rows, overlay.Columns, overlay.PhotometricInterpretation) == (20, 32, "RGB")
    np.testing.assert_array_equal(overlay.pixel_array[0, 0], [100] * 3)  # outside the crop the image as it is shown
    for written in (overlay, parametric):
        assert written.PatientID == "P7"
        assert written.StudyInstanceUID == source.StudyInstanceUID
        assert written.SeriesInstanceUID != source.SeriesInstanceUID
        assert written.SourceImageSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
    assert f"from 0 to {values.max():.4g}" in overlay.DerivationDescription
    assert sorted(p.name for p in (tmp_path / "out/s").iterdir()) == [
        f"a_{measure}_{kind}.dcm" for measure in ("mse", "wd") for kind in ("map", "overlay")
    ]


def test_first_frame_of_several_is_the_one_referred_to(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", np.stack([np.full((16, 16), level) for level in (50, 100, 150)]))
    SaveAnomalyDICOMd(MAPS, tmp_path / "out")(scored(path, np.zeros((16, 16))))
    for kind in ("overlay", "map"):
        written = pydicom.dcmread(tmp_path / f"out/a_wd_{kind}.dcm")
        assert written.SourceImageSequence[0].ReferencedFrameNumber == 1
        assert int(written.get("NumberOfFrames", 1)) == 1


def test_other_formats_give_no_dicom(tmp_path):
    item = scored(save_png(tmp_path / "a.png", np.full((16, 16), 9)), np.zeros((16, 16)))
    assert SaveAnomalyDICOMd(MAPS, tmp_path / "out")(item).keys() == item.keys()
    assert not (tmp_path / "out").exists()
