"""Sets of images: what is in them, what is left out of them, and when two can be compared."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image

from medgen.data.image_set import CHESTXRAY14_PATIENT, ImageSet, fit_image
from medgen.errors import UserError

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(path: Path, levels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(levels).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten grey PNGs of two patients, with what else lies in folders of images."""
    root = tmp_path / "cohort"
    for number in range(10):
        write(root / f"p{number % 2}" / f"image{number}.png", noise(24, 20, seed=number))
    (root / "labels.csv").write_text("file,label\n")
    (root / ".hidden.png").write_bytes(b"x")
    return root


@pytest.fixture
def datalist(folder: Path) -> Path:
    items = [
        {"image": f"p{n % 2}/image{n}.png", "patient": f"patient{n % 2}", "label": n, "synthetic": n == 4}
        for n in range(10)
    ]
    path = folder / "datalist.json"
    path.write_text(json.dumps({"name": "x", "training": items[::2], "test": items[1::2], "numTest": 5}))
    return path


# ---------------------------------------------------------------------------------------------------------------------
# what is in a set


def test_folder_gives_its_images_in_natural_order(folder: Path) -> None:
    write(folder / "p0" / "image10.png", noise(24, 20, seed=10))

    images = ImageSet.from_source(folder)

    assert images.files == (
        *(f"p0/image{n}.png" for n in (0, 2, 4, 6, 8, 10)),
        *(f"p1/image{n}.png" for n in (1, 3, 5, 7, 9)),
    )
    assert images.patients is None
    assert images.name == "cohort"
    assert images[1].dtype == np.float32
    np.testing.assert_array_equal(images[1], noise(24, 20, seed=2)[None] / np.float32(255))


def test_colour_is_channel_first(tmp_path: Path) -> None:
    levels = noise(5, 7, 3)
    write(tmp_path / "a.png", levels)

    image = ImageSet.from_source(tmp_path)[0]

    np.testing.assert_array_equal(image, levels.transpose(2, 0, 1) / np.float32(255))


def test_datalist_gives_one_split_or_all_with_what_its_items_say(datalist: Path) -> None:
    test = ImageSet.from_source(datalist, split="test")
    everything = ImageSet.from_source(datalist)

    assert test.files == tuple(f"p1/image{n}.png" for n in (1, 3, 5, 7, 9))
    assert test.patients == ("patient1",) * 5
    assert len(everything) == 10
    assert everything.labels == (0, 2, 4, 6, 8, 1, 3, 5, 7, 9)
    assert sum(everything.synthetic) == 1
    assert everything.synthetic[2]


def test_dataset_dir_is_the_base_of_a_datalists_paths(datalist: Path, tmp_path: Path) -> None:
    moved = datalist.rename(tmp_path / "datalist.json")

    images = ImageSet.from_source(moved, dataset_dir=tmp_path / "cohort")

    assert images[0].shape == (1, 24, 20)
    with pytest.raises(UserError, match="set dataset_dir"):
        ImageSet.from_source(moved)


def test_datalist_cannot_lead_outside(datalist: Path) -> None:
    content = json.loads(datalist.read_text())
    content["test"][0]["image"] = "../../etc/passwd.png"
    datalist.write_text(json.dumps(content))

    with pytest.raises(UserError, match="must be a path below"):
        ImageSet.from_source(datalist)


def test_frames_are_images_of_their_own(tmp_path: Path) -> None:
    pages = [noise(6, 5, seed=n) for n in range(3)]
    first, *others = [Image.fromarray(page) for page in pages]
    first.save(tmp_path / "b.tif", save_all=True, append_images=others)
    write(tmp_path / "a.png", noise(6, 5, seed=9))
    volume = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / "c.nii.gz")

    images = ImageSet.from_source(tmp_path)

    assert images.files == ("a.png", "b.tif#0", "b.tif#1", "b.tif#2", *(f"c.nii.gz#{n}" for n in range(4)))
    np.testing.assert_array_equal(images[2], pages[1][None] / np.float32(255))
    assert images[7].max() == 1
    assert images[4].min() == 0
    assert images[4].max() < images[7].max()


def test_frames_behind_a_name_that_promises_none_are_found_by_the_scan(tmp_path: Path) -> None:
    pages = [Image.fromarray(noise(6, 5, seed=n)) for n in range(3)]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    (tmp_path / "x.tif").rename(tmp_path / "x.png")

    images = ImageSet.from_source(tmp_path).scan()

    assert images.files == ("x.png#0", "x.png#1", "x.png#2")
    assert images.summary.duplicates == 0


def test_patients_of_a_folder_are_taken_from_names_only_when_asked(tmp_path: Path) -> None:
    for name in ("00000013_005", "00000013_006", "00000102_000"):
        write(tmp_path / f"{name}.png", noise(4, 4))

    silent = ImageSet.from_source(tmp_path)
    asked = ImageSet.from_source(tmp_path, patient_pattern=CHESTXRAY14_PATIENT)

    assert silent.patients is None
    assert asked.patients == ("00000013", "00000013", "00000102")
    with pytest.raises(UserError, match="finds no patient"):
        ImageSet.from_source(tmp_path, patient_pattern="^x(.+)")


def test_sample_is_drawn_by_its_seed_and_keeps_the_order(folder: Path) -> None:
    everything = ImageSet.from_source(folder).files

    drawn = [ImageSet.from_source(folder, max_images=4, seed=seed).files for seed in (0, 0, 1)]

    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert len(set(drawn[0])) == 4
    assert list(drawn[0]) == sorted(drawn[0], key=everything.index)
    assert ImageSet.from_source(folder, max_images=99).files == everything


def test_subset_keeps_patients_beside_their_images(datalist: Path) -> None:
    images = ImageSet.from_source(datalist)

    part = images.subset([7, 0])

    assert part.files == (images.files[7], images.files[0])
    assert part.patients == ("patient1", "patient0")
    np.testing.assert_array_equal(part[0], images[7])


def test_set_survives_the_way_to_another_process(datalist: Path) -> None:
    images = ImageSet.from_source(datalist, image_size=8)

    copy = pickle.loads(pickle.dumps(images))

    assert copy.files == images.files
    np.testing.assert_array_equal(copy[3], images[3])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: p / "absent", "does not exist"),
        (lambda p: (p / "empty").mkdir() or p / "empty", "got an empty folder"),
        (lambda p: (p / "notes.pdf").write_text("x") and p, "got 1 other files"),
        (lambda p: write(p / "a.png", noise(2, 2)), "got the file"),
    ],
)
def test_sources_without_images_are_refused(tmp_path: Path, make, said: str) -> None:
    with pytest.raises(UserError, match=said):
        ImageSet.from_source(make(tmp_path))


def test_arguments_that_do_not_fit_are_refused(folder: Path, datalist: Path) -> None:
    for options, said in (
        ({"split": "test"}, "split belongs to a datalist"),
        ({"image_size": 0}, "image_size must be"),
        ({"mode": "grey"}, "mode must be L"),
        ({"max_images": 0}, "max_images must be"),
        ({"max_images": 1, "seed": -1}, "seed must be"),
        ({"patient_pattern": "("}, "no regular expression"),
        ({"patient_pattern": "image"}, "finds no patient"),
    ):
        with pytest.raises(UserError, match=said):
            ImageSet.from_source(folder, **options)
    with pytest.raises(UserError, match="split validation is missing"):
        ImageSet.from_source(datalist, split="validation")


# ---------------------------------------------------------------------------------------------------------------------
# size and mode


def test_centre_square_is_kept_upright() -> None:
    pixels = np.zeros((40, 60), np.float32)
    pixels[:20, 10:50] = 1  # top half of the centre square bright

    image = fit_image(pixels, image_size=10)

    assert image.shape == (1, 10, 10)
    # at the border the filter sees what lies beside the square, as if the whole picture were resized and then cut
    np.testing.assert_allclose(image[0, :4, 1:-1], 1, atol=1e-6)
    np.testing.assert_allclose(image[0, 6:], 0, atol=1e-6)


def test_shrinking_does_not_alias() -> None:
    stripes = np.tile(np.array([0, 1], np.float32), (64, 32))  # the finest there are

    image = fit_image(stripes, image_size=16)

    np.testing.assert_allclose(image[..., 2:-2], 0.5, atol=0.01)


def test_size_that_fits_changes_no_pixel() -> None:
    pixels = noise(16, 16).astype(np.float32) / 255

    np.testing.assert_array_equal(fit_image(pixels, image_size=16)[0], pixels)


def test_values_stay_within_their_range_when_enlarged() -> None:
    edge = np.repeat(np.array([[0.0, 1.0]], np.float32), 2, axis=0)

    image = fit_image(edge, image_size=64)

    assert image.min() == 0
    assert image.max() == 1


def test_modes_are_those_of_pillow() -> None:
    levels = noise(8, 9, 3)

    grey = fit_image(levels / np.float32(255), mode="L")
    rgb = fit_image(levels[..., 0] / np.float32(255), mode="RGB")

    np.testing.assert_allclose(grey[0] * 255, np.asarray(Image.fromarray(levels).convert("L")), atol=1)
    assert grey.shape == (1, 8, 9)
    assert rgb.shape == (3, 8, 9)
    np.testing.assert_array_equal(rgb[0], rgb[2])


# ---------------------------------------------------------------------------------------------------------------------
# the scan


@pytest.fixture
def spoilt(datalist: Path) -> Path:
    """The datalist with a truncated, a foreign and a constant image."""
    root = datalist.parent
    whole = (root / "p0/image2.png").read_bytes()
    (root / "p0/image2.png").write_bytes(whole[: len(whole) // 2])
    (root / "p1/image3.png").write_text("no image")
    write(root / "p1/image9.png", np.full((24, 20), 7, np.uint8))
    (root / "p0/image6.png").write_bytes((root / "p0/image0.png").read_bytes())
    return datalist


@pytest.mark.parametrize("num_workers", [0, 2])
def test_scan_drops_what_cannot_be_read_and_counts_the_rest(spoilt: Path, num_workers: int) -> None:
    images = ImageSet.from_source(spoilt)

    scanned = images.scan(num_workers, progress=False)

    assert scanned is images
    assert set(images.rejected) == {"p0/image2.png", "p1/image3.png"}
    assert "truncated or damaged" in images.rejected["p0/image2.png"]
    assert "not a PNG" in images.rejected["p1/image3.png"]
    assert len(images) == len(images.patients) == len(images.summary.shapes) == 8
    assert images.patients == ("patient0",) * 4 + ("patient1",) * 4
    assert images.summary.constant == ("p1/image9.png",)
    assert images.summary.duplicates == 1


def test_scan_sums_up_the_whole_set(folder: Path) -> None:
    images = ImageSet.from_source(folder).scan(progress=False)

    levels = np.concatenate([np.asarray(Image.open(folder / file)).ravel() for file in images.files])
    np.testing.assert_array_equal(images.summary.histogram, np.bincount(levels, minlength=256))
    assert images.summary.mean == pytest.approx(levels.mean() / 255)
    assert images.summary.hashes[3] == hashlib.sha256((folder / images.files[3]).read_bytes()).hexdigest()


def test_scan_refuses_a_set_of_which_nothing_can_be_read(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_text("no image")

    with pytest.raises(UserError, match=r"none of the 3 images of .* can be read; 0\.png: not a PNG"):
        ImageSet.from_source(tmp_path).scan(progress=False)


def test_slices_of_a_volume_share_its_content_but_not_their_key(tmp_path: Path) -> None:
    volume = np.random.default_rng(0).random((4, 5, 3), dtype=np.float32)
    path = tmp_path / "v.nii"
    nib.save(nib.Nifti1Image(volume, np.eye(4)), path)
    images = ImageSet.from_source(tmp_path)

    before = [images.content_key(i) for i in range(3)]

    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert before == [f"{digest}:{n}:None:None" for n in range(3)]
    nib.save(nib.Nifti1Image(1 - volume, np.eye(4)), path)
    assert images.content_key(2) != before[2]
    assert images.scan(progress=False).summary.duplicates == 0


def test_files_that_are_no_images_by_name_or_content_are_listed(folder: Path) -> None:
    (folder / "report.pdf").write_bytes(b"%PDF")

    images = ImageSet.from_source(folder)

    assert images.rejected == {"report.pdf": "no image by its name or its content"}
    assert len(images) == 10


def test_content_key_follows_content_size_and_mode_but_not_the_name(folder: Path) -> None:
    plain, small, grey = (ImageSet.from_source(folder, **options) for options in ({}, {"image_size": 8}, {"mode": "L"}))
    before = plain.content_key(0)
    scanned = ImageSet.from_source(folder).scan(progress=False)

    assert len({before, small.content_key(0), grey.content_key(0), plain.content_key(1)}) == 4
    assert scanned.content_key(0) == before
    write(folder / "p0/image0.png", noise(24, 20, seed=99))
    assert plain.content_key(0) != before


def test_sets_that_differ_are_told_apart_in_one_line(tmp_path: Path) -> None:
    for name, shape in (("large", (64, 64)), ("small", (32, 32)), ("colour", (64, 64, 3))):
        for number in range(2):
            write(tmp_path / name / f"{number}.png", noise(*shape, seed=number))
    large, small, colour = (ImageSet.from_source(tmp_path / name) for name in ("large", "small", "colour"))

    large.check_comparable(ImageSet.from_source(tmp_path / "large"))
    with pytest.raises(UserError, match=r"^small are 32×32 grey, large 64×64 grey; give --image_size 32$"):
        small.check_comparable(large)
    with pytest.raises(UserError, match=r"^large are 64×64 grey, colour 64×64 RGB; give --mode L$"):
        large.check_comparable(colour)


def test_mixed_set_names_an_image_of_the_rarer_kind(folder: Path) -> None:
    write(folder / "z.png", noise(30, 30))

    with pytest.raises(UserError, match=r"differ: 10 are 20×24 grey, 1 30×30 grey \(z\.png\); give --image_size 20"):
        ImageSet.from_source(folder).check_same_shape()
    assert ImageSet.from_source(folder, image_size=20).check_same_shape() == (1, 20, 20)


def test_dicom_is_shown_as_a_viewer_would(tmp_path: Path) -> None:
    ds = pydicom.dcmread(pydicom.data.get_testdata_file("CT_small.dcm"))
    ds.save_as(tmp_path / "ct.dcm")

    image = ImageSet.from_source(tmp_path)[0]

    values = ds.pixel_array.astype(float)
    assert image.shape == (1, *values.shape)
    assert np.corrcoef(image.ravel(), values.ravel())[0, 1] > 0.9


def test_importing_and_scanning_need_neither_torch_nor_monai(folder: Path) -> None:
    code = (
        "import sys; from medgen.data import ImageSet; import medgen.metrics.feature_set, medgen.metrics.protocols\n"
        f"ImageSet.from_source({str(folder)!r}).scan(progress=False)\n"
        "print(sorted({'torch', 'monai'} & set(sys.modules)))"
    )

    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert printed.strip() == "[]"


def test_real_radiographs_are_read_as_they_are(tmp_path: Path) -> None:
    import zipfile

    archive = SHARED / "nih_cxr512.zip"
    if not archive.exists():
        pytest.skip("the real radiographs of ../shared/data are not here")
    with zipfile.ZipFile(archive) as file:
        for name in [name for name in file.namelist() if name.endswith(".jpg")][:6]:
            (tmp_path / Path(name).name).write_bytes(file.read(name))

    images = ImageSet.from_source(tmp_path, patient_pattern=CHESTXRAY14_PATIENT).scan(progress=False)

    assert not images.rejected
    assert images.check_same_shape() == (1, 512, 512)
    assert 0.2 < images.summary.mean < 0.8
