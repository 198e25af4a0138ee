"""Feature extraction: what is computed once, what is computed again, what has no row, and what a file may hold."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medgen.data import ImageSet
from medgen.errors import UserError
from medgen.metrics import feature_set
from medgen.metrics.feature_set import FeatureSet, default_cache_dir, extract_features
from medgen.metrics.frechet import FeatureMoments
from medgen.metrics.protocols import get_protocol

OWN = get_protocol("module:stub")
LOST = 200  # grey level of an image whose process ends


class Statistics:
    """Mean, maximum and minimum of each image; works in the processes."""

    feature_names: tuple[str, ...] | None = ("mean", "max", "min")

    def __init__(self, **settings: Any) -> None:
        self.name = "stub"
        self.settings = {"protocol": "stub", **settings}
        self.seen = 0

    def on_images(self, batch: Sequence[np.ndarray]) -> np.ndarray:
        self.seen += len(batch)
        if round(float(batch[0].max()) * 255) == LOST:
            os._exit(1)
        return expected(batch)


class Survives(Statistics):
    """The same, in which nothing ends a process."""

    def on_images(self, batch: Sequence[np.ndarray]) -> np.ndarray:
        self.seen += len(batch)
        return expected(batch)


class Halves:
    """A network: prepared in the processes, given batches here."""

    name = "stub"
    feature_names = None

    def __init__(self) -> None:
        self.settings = {"protocol": "network"}
        self.batches: list[list[tuple[int, ...]]] = []

    @staticmethod
    def prepare(image: np.ndarray) -> np.ndarray:
        return image * np.float32(0.5)

    def on_prepared(self, batch: Sequence[np.ndarray]) -> np.ndarray:
        self.batches.append([image.shape for image in batch])
        return np.array([[image.mean(), image.max()] for image in batch], dtype=np.float32)

    def on_images(self, batch: Sequence[np.ndarray]) -> np.ndarray:
        return self.on_prepared([self.prepare(image) for image in batch])


def write(path: Path, seed: int, shape: tuple[int, ...] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 190, shape, dtype=np.uint8)).save(path)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_set, "CHUNK", 4)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images: chunks of four, four and two."""
    for number in range(10):
        write(tmp_path / "images" / f"{number}.png", number)
    return tmp_path / "images"


def extract(images: Any, cache: Path, extractor: Any = None, **options: Any) -> tuple[FeatureSet, int]:
    """Features, and how many images were looked at for them."""
    extractor = extractor or Statistics()
    found = extract_features(images, OWN, extractor=extractor, cache_dir=cache, progress=False, **options)
    return found, getattr(extractor, "seen", 0)


def expected(images: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([[image.mean(), image.max(), image.min()] for image in images])


# ---------------------------------------------------------------------------------------------------------------------
# what is computed


def test_rows_are_the_images_in_their_order(folder: Path, cache: Path) -> None:
    images = ImageSet.from_source(folder, patient_pattern=r"(\d)")

    found, _ = extract(images, cache)

    np.testing.assert_array_equal(found.features, expected(images))
    assert found.files == tuple(f"{n}.png" for n in range(10))
    assert found.patients == tuple("0123456789")
    assert found.names == ("mean", "max", "min")
    assert found.protocol == "module:stub"
    assert not found.rejected


def test_arrays_are_a_set_without_files(cache: Path) -> None:
    arrays = [np.full((1, 2, 3), value, np.float32) for value in (0, 0.25, 1)]

    found, _ = extract(arrays, cache)

    np.testing.assert_array_equal(found.features[:, 0], [0, 0.25, 1])
    assert found.files == ("0", "1", "2")
    assert found.patients is None


@pytest.mark.parametrize("extractor", [Statistics, Halves])
def test_processes_change_nothing(folder: Path, tmp_path: Path, extractor: type) -> None:
    images = ImageSet.from_source(folder)

    here, there = (extract(images, tmp_path / f"cache{n}", extractor(), num_workers=n, batch_size=3)[0] for n in (0, 2))

    np.testing.assert_array_equal(here.features, there.features)
    assert here.files == there.files


def test_network_gets_batches_of_one_shape_and_what_was_prepared(folder: Path, cache: Path) -> None:
    write(folder / "6.png", 6, (9, 9))
    network = Halves()
    images = ImageSet.from_source(folder)

    found, _ = extract(images, cache, network, batch_size=4)

    small, large = (1, 8, 8), (1, 9, 9)
    assert network.batches == [[small] * 4, [small] * 2, [large], [small] * 3]
    np.testing.assert_allclose(found.features, [[i.mean() / 2, i.max() / 2] for i in images], rtol=1e-6)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_network_gets_all_channels_whether_they_differ_or_not(tmp_path: Path, cache: Path, num_workers: int) -> None:
    write(tmp_path / "images" / "grey.png", 0)
    write(tmp_path / "images" / "rgb.png", 1, (8, 8, 3))
    images = ImageSet.from_source(tmp_path / "images")
    protocol = get_protocol("module:x", feature_channels=3)

    class Channels(Halves):
        prepare = staticmethod(protocol.prepare)

        def on_prepared(self, batch: Sequence[np.ndarray]) -> np.ndarray:
            self.batches.append([image.shape for image in batch])
            return np.stack([image.mean((1, 2)) for image in batch])

    network = Channels()
    found, _ = extract(images, cache, network, num_workers=num_workers)

    assert network.batches == [[(3, 8, 8), (3, 8, 8)]]
    np.testing.assert_allclose(found.features, [[images[0].mean()] * 3, images[1].mean((1, 2))], rtol=1e-6)


def test_features_stay_on_disk(folder: Path, cache: Path) -> None:
    found, _ = extract(ImageSet.from_source(folder), cache)

    assert isinstance(found.features, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        found.features[0] = 0


# ---------------------------------------------------------------------------------------------------------------------
# the cache


def test_second_extraction_looks_at_no_image(folder: Path, cache: Path) -> None:
    first, looked = extract(ImageSet.from_source(folder), cache)
    scanned, again = extract(ImageSet.from_source(folder).scan(progress=False), cache)

    assert (looked, again) == (10, 0)
    np.testing.assert_array_equal(first.features, scanned.features)


def test_same_contents_under_other_names_are_found_again(folder: Path, cache: Path, tmp_path: Path) -> None:
    extract(ImageSet.from_source(folder), cache)
    folder.rename(tmp_path / "moved")

    assert extract(ImageSet.from_source(tmp_path / "moved"), cache)[1] == 0


def test_changed_image_costs_its_chunk(folder: Path, cache: Path) -> None:
    before, _ = extract(ImageSet.from_source(folder), cache)
    kept = np.array(before.features)
    write(folder / "5.png", 99)

    after, looked = extract(ImageSet.from_source(folder), cache)

    assert looked == 4
    changed = np.flatnonzero((after.features != kept).any(axis=1))
    assert changed.tolist() == [5]
    np.testing.assert_array_equal(before.features, kept)  # what was handed out before stays as it was


@pytest.mark.parametrize("change", ["weights", "size", "mode", "code"])
def test_other_settings_are_other_features(
    folder: Path, cache: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(ImageSet.from_source(folder), cache, Statistics(weights_sha256="a"))
    if change == "code":
        monkeypatch.setattr(feature_set, "_code_digest", lambda: "other")
    options = {"size": {"image_size": 4}, "mode": {"mode": "RGB"}}.get(change, {})

    extractor = Statistics(weights_sha256="b" if change == "weights" else "a")
    _, looked = extract(ImageSet.from_source(folder, **options), cache, extractor)

    assert looked == 10


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 99])
def test_damaged_chunk_is_computed_again_and_said(
    folder: Path, cache: Path, damage: Any, capsys: pytest.CaptureFixture
) -> None:
    first, _ = extract(ImageSet.from_source(folder), cache)
    chunks = sorted(cache.glob("??/*.npz"))
    chunks[1].write_bytes(damage(chunks[1].read_bytes()))

    again, looked = extract(ImageSet.from_source(folder), cache)

    assert len(chunks) == 3
    assert looked in (2, 4)
    assert f"{chunks[1]} is damaged" in capsys.readouterr().err
    np.testing.assert_array_equal(first.features, again.features)


def test_bit_that_flipped_on_the_disk_is_noticed(folder: Path, cache: Path) -> None:
    extract(ImageSet.from_source(folder), cache)
    chunk = sorted(cache.glob("??/*.npz"))[0]
    data = bytearray(chunk.read_bytes())
    with np.load(chunk) as file:
        data[data.index(file["features"].tobytes()) + 3] ^= 1
    chunk.write_bytes(data)

    assert extract(ImageSet.from_source(folder), cache)[1] in (2, 4)


def test_interrupted_extraction_goes_on(folder: Path, cache: Path) -> None:
    class Interrupted(Statistics):
        def on_images(self, batch: Sequence[np.ndarray]) -> np.ndarray:
            if self.seen == 6:  # in the second chunk
                raise KeyboardInterrupt
            return super().on_images(batch)

    images = ImageSet.from_source(folder)
    with pytest.raises(KeyboardInterrupt):
        extract(images, cache, Interrupted())
    assert not list(cache.rglob(".*"))  # nothing half written

    found, looked = extract(images, cache)

    assert looked == 6
    np.testing.assert_array_equal(found.features, expected(images))


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable], list]:
    """Runs something in three threads, which all have their files open before any of them writes arrays."""
    barrier, savez = Barrier(3), np.savez

    def three_times(act: Callable) -> list:
        with ThreadPoolExecutor(3) as pool:
            return [one.result() for one in [pool.submit(act) for _ in range(3)]]

    monkeypatch.setattr(np, "savez", lambda *args, **arrays: (barrier.wait(timeout=60), savez(*args, **arrays)))
    return three_times


def test_extractions_at_once_into_one_cache_do_not_meet(
    folder: Path, cache: Path, together: Callable[[Callable], list]
) -> None:
    found = together(lambda: extract(ImageSet.from_source(folder), cache)[0])

    for one in found:
        np.testing.assert_array_equal(one.features, expected(ImageSet.from_source(folder)))
    assert len(list(cache.rglob("*.np?"))) == 4  # three chunks, one set
    assert not list(cache.rglob(".*"))


def test_features_saved_at_once_are_whole(tmp_path: Path, together: Callable[[Callable], list]) -> None:
    together(lambda: some_features().save(tmp_path / "x.npz"))

    assert len(FeatureSet.load(tmp_path / "x.npz")) == 40
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def test_set_that_lies_there_whole_is_not_written_again_and_one_that_is_not_is(folder: Path, cache: Path) -> None:
    images = ImageSet.from_source(folder)
    extract(images, cache)
    (path,) = cache.glob("sets/*.npy")
    whole, file = path.read_bytes(), path.stat().st_ino
    kept = path.with_name("kept")
    os.link(path, kept)  # its number cannot be given to another file

    extract(images, cache)
    assert path.stat().st_ino == file

    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    for damaged in (b"", whole[:100], whole[:-1], whole + b"x", flipped):
        path.write_bytes(damaged)
        found, looked = extract(images, cache)
        assert looked == 0
        np.testing.assert_array_equal(found.features, expected(images))
        assert path.read_bytes() == whole


def test_cache_lies_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDGEN_CACHE", str(tmp_path / "c"))
    assert default_cache_dir() == tmp_path / "c"
    monkeypatch.delenv("MEDGEN_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "medgen" / "features"


def test_cache_that_cannot_be_written_to_is_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")

    with pytest.raises(UserError, match="choose another with --cache_dir or MEDGEN_CACHE"):
        extract(ImageSet.from_source(folder), tmp_path / "file")


# ---------------------------------------------------------------------------------------------------------------------
# what has no row


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("extractor", [Statistics, Halves])
def test_unreadable_images_are_counted_and_the_rest_goes_on(
    folder: Path, cache: Path, num_workers: int, extractor: type
) -> None:
    whole = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(whole[: len(whole) // 2])
    (folder / "report.pdf").write_bytes(b"%PDF")
    images = ImageSet.from_source(folder, patient_pattern=r"(\d)")

    found, _ = extract(images, cache, extractor(), num_workers=num_workers)
    again, looked = extract(images, cache, extractor())

    assert len(found) == 9
    assert found.files == tuple(f"{n}.png" for n in range(10) if n != 3)
    assert found.patients == tuple(str(n) for n in range(10) if n != 3)
    assert set(found.rejected) == {"3.png", "report.pdf"}
    assert "truncated or damaged" in found.rejected["3.png"]
    assert looked == 0
    assert again.rejected == found.rejected


@pytest.mark.parametrize("scanned", [False, True])
def test_file_that_is_away_is_asked_for_again_next_time(folder: Path, cache: Path, scanned: bool) -> None:
    images = ImageSet.from_source(folder)
    if scanned:
        images.scan(progress=False)
    (folder / "7.png").rename(folder / "away")
    found, _ = extract(images, cache)
    (folder / "away").rename(folder / "7.png")

    again, looked = extract(images, cache)

    assert list(found.rejected) == ["7.png"]
    assert "no such file" in found.rejected["7.png"].lower()
    assert looked == 4  # its chunk
    assert len(again) == 10


def test_what_others_note_in_the_image_set_is_not_a_reason_here(folder: Path, cache: Path) -> None:
    (folder / "3.png").write_bytes(b"x")
    (folder / "report.pdf").write_bytes(b"%PDF")
    images = ImageSet.from_source(folder)
    images.rejected["7.png"] = "has no features by another protocol"
    before = dict(images.rejected)

    found, _ = extract(images, cache)

    assert set(found.rejected) == {"3.png", "report.pdf"}
    assert "7.png" in found.files
    assert images.rejected == before


def test_one_extractor_serves_several_sets(folder: Path, cache: Path) -> None:
    images = ImageSet.from_source(folder)
    for extractor in (Statistics(), Halves()):
        for chosen in (range(5), range(3, 10), range(5)):
            subset = images.subset(chosen)
            found, _ = extract(subset, cache, extractor)
            anew, _ = extract(subset, cache / "anew", type(extractor)())
            np.testing.assert_array_equal(found.features, anew.features)
            assert found.settings == anew.settings


def test_extractor_of_the_other_role_is_refused(cache: Path) -> None:
    of_samples = Statistics(role="samples")
    with pytest.raises(UserError, match="must be that of role reference, got one made for samples; make one for each"):
        extract_features([], "xrv_ldm_source", role="reference", extractor=of_samples, cache_dir=cache)


def test_features_that_are_not_finite_are_a_reason(cache: Path) -> None:
    class Divides(Statistics):
        def on_images(self, batch: Sequence[np.ndarray]) -> np.ndarray:
            with np.errstate(all="ignore"):
                return super().on_images(batch) / batch[0].std()

    arrays = [np.array([[[0, value]]], np.float32) for value in (0.5, 0, 1)]

    found, _ = extract(arrays, cache, Divides())

    assert found.files == ("0", "2")
    assert found.rejected == {"1": "3 of 3 features are not finite (mean, max, min)"}
    assert np.isfinite(found.features).all()


def test_extractor_that_fails_on_an_image_is_a_reason(cache: Path) -> None:
    class Refuses(Statistics):
        def on_images(self, batch: Sequence[np.ndarray]) -> np.ndarray:
            if batch[0].shape[1] < 4:
                raise UserError("too small: 4 pixels at least")
            return super().on_images(batch)

    arrays = [np.zeros((1, 8, 8), np.float32), np.zeros((1, 2, 2), np.float32)]
    found, _ = extract(arrays, cache, Refuses())
    again, looked = extract(arrays, cache, Refuses())

    assert found.rejected == again.rejected == {"1": "too small: 4 pixels at least"}
    assert looked == 0


def test_process_that_ends_costs_one_image_and_it_is_tried_again(folder: Path, cache: Path) -> None:
    Image.new("L", (8, 8), LOST).save(folder / "6.png")
    images = ImageSet.from_source(folder)

    found, _ = extract(images, cache, num_workers=2)

    assert len(found) == 9
    assert found.rejected == {
        "6.png": "the process that worked on it crashed or was killed (damaged file, or too little memory)"
    }
    again, looked = extract(images, cache, Survives())
    assert looked == 4  # its chunk
    np.testing.assert_array_equal(again.features, expected(images))


def test_set_of_which_nothing_is_left_is_told(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")

    with pytest.raises(UserError, match=r"none of the 1 images gives module:stub features; a\.png: not a PNG"):
        extract(ImageSet.from_source(tmp_path), cache)
    with pytest.raises(UserError, match="it holds no image"):
        extract([], cache)


@pytest.mark.parametrize("apart", [1, 4])  # in one chunk, and in two
def test_features_of_two_widths_are_told(cache: Path, apart: int) -> None:
    class Flat(Statistics):
        feature_names = None

        def on_images(self, batch: Sequence[np.ndarray]) -> np.ndarray:
            return batch[0].reshape(1, -1)

    arrays = [np.zeros((1, 2, 2), np.float32)] * apart + [np.zeros((1, 3, 3), np.float32)]

    with pytest.raises(UserError, match="as many features, got 4 and 9; bring the images to one size"):
        extract(arrays, cache, Flat())


def test_batch_size_and_role_are_checked_first(cache: Path) -> None:
    with pytest.raises(UserError, match="batch_size must be"):
        extract([], cache, batch_size=0)
    with pytest.raises(UserError, match="treats reference and samples differently"):
        extract_features([], "xrv_ldm_source", cache_dir=cache)


# ---------------------------------------------------------------------------------------------------------------------
# files


def some_features(**changes: Any) -> FeatureSet:
    rows = np.random.default_rng(0).normal(5, 2, (40, 3))
    files = tuple(f"{n}.png" for n in range(40))
    settings = {"protocol": "x", "size": 8, "range": [0, 1]}
    return replace(
        FeatureSet(rows, ("a", "b", "c"), files, ("p",) * 40, "x", settings, {"bad.png": "truncated"}), **changes
    )


def test_saved_features_come_back(tmp_path: Path) -> None:
    saved = some_features()

    saved.save(tmp_path / "new" / "x.npz")
    loaded = FeatureSet.load(tmp_path / "new" / "x.npz")

    np.testing.assert_array_equal(loaded.features, saved.features)
    for name in ("names", "files", "patients", "protocol", "settings", "rejected"):
        assert getattr(loaded, name) == getattr(saved, name)
    with zipfile.ZipFile(tmp_path / "new" / "x.npz") as archive:  # no other is read
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
    some_features(patients=None).save(tmp_path / "x.npz")
    assert FeatureSet.load(tmp_path / "x.npz").patients is None


class Run:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("was_run",)


def npz(features: Any, **meta: Any) -> bytes:
    told = {"format": 1, "medgen": "0", "protocol": "x", "settings": {}, "names": [], "files": [], "patients": None}
    told = json.dumps({**told, "rejected": {}, **meta}).encode()
    file = io.BytesIO()
    np.savez(file, features=features, meta=np.frombuffer(told, dtype=np.uint8))
    return file.getvalue()


def compressed() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, features=np.zeros((999, 999)), meta=np.zeros(9, np.uint8))
    return file.getvalue()


def header_says(shape: str) -> bytes:
    """An archive as saved, but for the shape in a header; its checksums are right."""
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(npz(np.zeros((12345, 3))))) as whole, zipfile.ZipFile(changed, "w") as lies:
        for name in whole.namelist():
            lies.writestr(name, whole.read(name).replace(b"(12345, 3)", shape.encode()))
    return changed.getvalue()


def array(content: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, content, allow_pickle=True)
    return file.getvalue()


def moments_file() -> bytes:
    file = io.BytesIO()
    np.savez(file, n=1, mean=np.zeros(2), scatter=np.zeros((2, 2)))
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(b"", "is no feature file", id="empty"),
        pytest.param(b"nonsense", "is no feature file", id="text"),
        pytest.param(pickle.dumps(Run()), "is no feature file", id="pickle"),
        pytest.param(array(np.zeros(3)), "is no feature file", id="array"),
        pytest.param(array(np.array([Run()], dtype=object)), "is no feature file", id="pickled array"),
        pytest.param(npz(np.array([[Run()]], dtype=object)), "is no feature file", id="pickled features"),
        pytest.param(npz(np.array([["a"]])), "is no feature file", id="words"),
        pytest.param(npz(np.zeros((2, 2)), settings=3), "is no feature file", id="settings"),
        pytest.param(npz(np.zeros((2, 2)))[:150], "is no feature file", id="truncated"),
        pytest.param(compressed(), "must hold its arrays uncompressed, got features compressed", id="compressed"),
        pytest.param(header_says("(999999,3)"), "must hold the 24,000,104 bytes that features has", id="too large"),
        pytest.param(header_says("(9**99999)"), "is no feature file", id="sum"),
        pytest.param(header_says("(12345, 2)"), "must hold the 197,648 bytes that features has", id="too small"),
        pytest.param(moments_file(), "is no feature file", id="moments"),
        pytest.param(npz(np.zeros(2)), "must be .images, features.", id="one row"),
        pytest.param(npz(np.zeros((2, 2)), files=["a"]), "files must be 2", id="files"),
        pytest.param(npz(np.array([[np.nan]])), "not finite", id="NaN"),
        pytest.param(npz(np.zeros((2, 2)), format=99, medgen="9.9"), "written by medgen 9.9; upgrade", id="newer"),
    ],
)
def test_other_files_are_refused_in_one_line_and_run_nothing(
    tmp_path: Path, content: bytes, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.npz"
    path.write_bytes(content)

    with pytest.raises(UserError, match=said) as caught:
        FeatureSet.load(path)

    assert "\n" not in str(caught.value)
    assert not (tmp_path / "was_run").exists()


def test_file_that_is_missing_or_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")

    with pytest.raises(UserError, match=r"cannot be read \(No such file"):
        FeatureSet.load(tmp_path / "absent.npz")
    with pytest.raises(UserError, match=r"cannot be written: .*choose another --output"):
        some_features().save(tmp_path / "file" / "x.npz")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_moments_are_those_of_numpy(tmp_path: Path) -> None:
    found = some_features()

    found.moments().save(tmp_path / "m.npz")
    moments = FeatureMoments.load(tmp_path / "m.npz")

    assert moments.n == 40
    assert moments.protocol == "x"
    assert json.loads(moments.settings) == found.settings
    np.testing.assert_allclose(moments.mean, found.features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(found.features, rowvar=False), rtol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# what can be compared


def test_sets_made_alike_can_be_compared() -> None:
    some_features().check_comparable(some_features(features=np.zeros((2, 3)), files=("a", "b"), patients=None))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"settings": {"protocol": "x", "size": 16, "range": [0, 1]}}, "size 8 and 16"),
        ({"settings": {"protocol": "x", "size": 8, "range": [0, 255]}}, r"range \[0, 1\] and \[0, 255\]"),
        ({"settings": {"protocol": "x", "range": [0, 1]}}, "size 8 and absent"),
        ({"settings": {"protocol": "x", "size": 8, "range": [0, 1], "clip": None}}, "clip absent and None"),
        ({"names": ("a", "b", "d")}, "or other names"),
        ({"features": np.zeros((40, 4)), "names": ()}, "3 and 4 columns"),
    ],
)
def test_sets_made_otherwise_cannot(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=rf"two kinds cannot be compared: .*{said}"):
        some_features().check_comparable(some_features(**changes))


def test_the_two_sides_of_the_source_protocol_can_be_compared(tmp_path: Path) -> None:
    sides = [get_protocol("xrv_ldm_source", role=role).settings for role in ("reference", "samples")]
    real, fake = (some_features(settings=settings) for settings in sides)

    real.check_comparable(fake)

    assert real.moments().settings == fake.moments().settings


def test_parts_that_do_not_belong_together_are_refused() -> None:
    for changes in ({"files": ("a",)}, {"patients": ("a",)}, {"names": ("a",)}, {"features": np.zeros(3)}):
        with pytest.raises(UserError, match="must be"):
            some_features(**changes)


def test_importing_needs_no_torch() -> None:
    code = (
        "import sys, medgen.metrics.feature_set, medgen.cli_features\n"
        "medgen.cli_features.protocol_table()\n"
        "print(sorted({'torch', 'monai'} & set(sys.modules)))"
    )

    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert printed.strip() == "[]"
