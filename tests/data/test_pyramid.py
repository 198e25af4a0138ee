"""ImagePyramid and GrowingDataLoader: exact levels, builds that survive, and an order that depends on nothing else."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import time
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest
import torch
from monai.data import Dataset
from monai.transforms import Compose, LoadImaged, MapTransform, RandFlipd, SelectItemsd
from PIL import Image

from medgen.data import pyramid as module
from medgen.data.growth import GrowthSchedule
from medgen.data.image_reader import MedicalImageReader
from medgen.data.pyramid import GrowingDataLoader, ImagePyramid
from medgen.data.stream import ResumableDataLoader
from medgen.errors import UserError
from medgen.transforms import ResizeShorterSided

LOAD = LoadImaged("image", reader=MedicalImageReader, ensure_channel_first=True, image_only=True)
READ = Compose([LOAD])
SCHEDULE = GrowthSchedule([4, 8, 16], [8, 6, 4], [1e-3] * 3, [20, 30, 40], [0, 10, 10])
FORK = multiprocessing.get_context("fork")  # the children need no import of MONAI


class Counted(MapTransform):
    """Decodes, and appends a line to a file, which processes share."""

    def __init__(self, record: str, seconds: float = 0.0) -> None:
        super().__init__("image")
        self.record, self.seconds = record, seconds

    def __call__(self, data):
        with open(self.record, "a") as file:
            file.write(f"{os.path.basename(data['image'])}\n")
        time.sleep(self.seconds)
        return LOAD(data)


def counted(folder, seconds=0.0):
    return Compose([Counted(str(folder / "decoded.txt"), seconds)])


def decoded(folder):
    record = folder / "decoded.txt"
    return record.read_text().split() if record.exists() else []


def make_items(folder, count=10, size=16, channels=1, labels=False):
    random = np.random.default_rng(count)
    items = []
    for number in range(count):
        pixels = random.integers(0, 256, (size, size, channels), dtype=np.uint8).squeeze()
        Image.fromarray(pixels).save(folder / f"{number}.png")
        item = {"image": str(folder / f"{number}.png"), "patient": str(number)}
        items.append({**item, "label": number % 3} if labels else item)
    return items


def pixels_of(item):
    """(C, S, S) uint8, read by Pillow."""
    pixels = np.asarray(Image.open(item["image"]))
    return np.moveaxis(np.atleast_3d(pixels), -1, 0)


def make(folder, **kwargs):
    items = make_items(folder, **kwargs)
    return ImagePyramid(items, READ, kwargs.get("size", 16), kwargs.get("channels", 1), folder / "cache")


def images(loader, count):
    return [batch["image"] for batch in islice(loader, count)]


# the pyramid ---------------------------------------------------------------------------------------------------------


def test_levels_are_box_means_of_the_full_image_rounded_once_ties_to_even(tmp_path):
    items = make_items(tmp_path, count=3, channels=3)
    pyramid = ImagePyramid(items, READ, 16, 3, tmp_path / "cache")
    for number, item in enumerate(items):
        full = pixels_of(item)
        for resolution in (4, 8, 16):
            step = 16 // resolution
            blocks = full.reshape(3, resolution, step, resolution, step).astype(int).sum((2, 4))
            # Python rounds fractions exactly, ties to even
            expected = [[[round(Fraction(int(v), step**2)) for v in row] for row in plane] for plane in blocks]
            assert pyramid.read([number], resolution)[0].tolist() == expected


def test_rounding_is_not_cascaded(tmp_path):
    # means 0.5, 0.5, 0.5 and 1, which round to 0, 0, 0 and 1; their mean is 0.625, that of the rounded ones 0.25
    block = np.zeros((4, 4), dtype=np.uint8)
    block[0, 0] = block[0, 2] = block[2, 0] = 2
    block[2:, 2:] = 1
    Image.fromarray(np.tile(block, (4, 4))).save(tmp_path / "tie.png")
    pyramid = ImagePyramid([{"image": str(tmp_path / "tie.png")}], READ, 16, 1, tmp_path / "cache")
    assert pyramid.read([0], 8)[0, 0, :2, :2].tolist() == [[0, 0], [0, 1]]
    assert (pyramid.read([0], 4) == 1).all()


def test_full_level_holds_the_images_themselves(tmp_path):
    items = make_items(tmp_path)
    pyramid = ImagePyramid(items, READ, 16, 1, tmp_path / "cache")
    assert len(pyramid) == 10
    assert pyramid.resolutions == (4, 8, 16)
    read = pyramid.read([7, 2, 2], 16)
    assert read.dtype == np.uint8
    assert type(read) is np.ndarray
    assert np.array_equal(read, np.stack([pixels_of(items[i]) for i in (7, 2, 2)]))


def test_labels_are_those_of_the_items_or_none(tmp_path):
    items = make_items(tmp_path, labels=True)
    assert ImagePyramid(items, READ, 16, 1, tmp_path / "cache").labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    for odd in ({"label": None}, {"label": "normal"}, {"label": True}):
        some = [*items[:-1], {**items[-1], **odd}]
        assert ImagePyramid(some, READ, 16, 1, tmp_path / "cache").labels is None


def test_file_of_what_is_in_it_stands_beside_the_levels(tmp_path):
    items = make_items(tmp_path, labels=True)
    pyramid = ImagePyramid(items, READ, 16, 1, tmp_path / "cache")
    content = json.loads((pyramid.folder / "pyramid.json").read_text())
    assert [path for path, _, _ in content["images"]] == [item["image"] for item in items]
    assert {path.name for path in pyramid.folder.iterdir()} == {
        ".lock",
        "0004.npy",
        "0008.npy",
        "0016.npy",
        "pyramid.json",
    }


def test_finished_pyramid_is_read_without_decoding(tmp_path):
    items = make_items(tmp_path)
    first = ImagePyramid(items, counted(tmp_path), 16, 1, tmp_path / "cache")
    assert len(decoded(tmp_path)) == 10
    second = ImagePyramid(items, counted(tmp_path), 16, 1, str(tmp_path / "cache"))
    assert len(decoded(tmp_path)) == 10
    assert second.folder == first.folder
    assert np.array_equal(first.read(range(10), 8), second.read(range(10), 8))


def test_whatever_decides_the_levels_makes_a_folder_of_its_own(tmp_path):
    items = make_items(tmp_path, labels=True)

    def folder(data=items, transform=READ, size=16):
        return ImagePyramid(data, transform, size, 1, tmp_path / "cache").folder

    resized = Compose([LOAD, ResizeShorterSided("image", size=8)])
    folders = [folder(), folder(items[::-1]), folder(transform=resized, size=8), folder(items[:1])]
    Image.fromarray(np.zeros((16, 16), dtype=np.uint8)).save(items[0]["image"])
    folders.append(folder())
    os.utime(items[0]["image"], ns=(0, 0))
    folders.append(folder())
    assert len(set(folders)) == 6
    assert (ImagePyramid(items, READ, 16, 1, tmp_path / "cache").read([0], 16) == 0).all()


def test_other_labels_take_the_same_folder(tmp_path):
    items = make_items(tmp_path, labels=True)
    first = ImagePyramid(items, counted(tmp_path), 16, 1, tmp_path / "cache")
    relabelled = [{**item, "label": 5} for item in items]
    second = ImagePyramid(relabelled, counted(tmp_path), 16, 1, tmp_path / "cache")
    assert second.folder == first.folder
    assert len(decoded(tmp_path)) == 10
    assert (first.labels.tolist(), second.labels.tolist()) == ([0, 1, 2, 0, 1, 2, 0, 1, 2, 0], [5] * 10)


def test_relative_and_absolute_paths_name_the_same_images(tmp_path, monkeypatch):
    items = make_items(tmp_path)
    monkeypatch.chdir(tmp_path)
    relative = [{**item, "image": os.path.basename(item["image"])} for item in items]
    assert (
        ImagePyramid(relative, READ, 16, 1, "cache").folder.resolve()
        == ImagePyramid(items, READ, 16, 1, tmp_path / "cache").folder
    )


def test_pyramid_that_lost_a_level_is_built_again(tmp_path):
    items = make_items(tmp_path)
    first = ImagePyramid(items, READ, 16, 1, tmp_path / "cache")
    before = first.read(range(10), 4)
    (first.folder / "0004.npy").write_bytes(b"\x93NUMPY\x01\x00 cut short")
    again = ImagePyramid(items, READ, 16, 1, tmp_path / "cache")
    assert np.array_equal(again.read(range(10), 4), before)
    assert np.array_equal(first.read(range(10), 16), again.read(range(10), 16))  # a training that reads goes on


@pytest.mark.slow(reason="starts a process that imports MONAI")
def test_worker_processes_build_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WORTH_A_PROCESS", 4)
    items = make_items(tmp_path)
    alone = ImagePyramid(items, READ, 16, 1, tmp_path / "alone")
    helped = ImagePyramid(items, READ, 16, 1, tmp_path / "helped", num_workers=1)
    for resolution in (4, 8, 16):
        assert np.array_equal(alone.read(range(10), resolution), helped.read(range(10), resolution))


def test_pyramid_passes_to_another_process_without_its_pixels(tmp_path):
    pyramid = make(tmp_path, count=10, size=64)
    sent = pickle.dumps(pyramid)
    assert len(sent) < 2000
    assert np.array_equal(pickle.loads(sent).read([3], 64), pyramid.read([3], 64))


# builds that end too early -------------------------------------------------------------------------------------------


def build_slowly(items, folder):
    module.JOURNAL_SECONDS = 0.0
    ImagePyramid(items, counted(folder, 0.05), 16, 1, folder / "cache")


def test_killed_build_goes_on_where_it_was(tmp_path):
    items = make_items(tmp_path, count=20)
    child = FORK.Process(target=build_slowly, args=(items, tmp_path))
    child.start()
    while len(decoded(tmp_path)) < 6:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    before = decoded(tmp_path)
    assert 6 <= len(before) < 20
    pyramid = ImagePyramid(items, counted(tmp_path, 0.05), 16, 1, tmp_path / "cache")
    # at most the image that was under way is decoded a second time
    assert len(decoded(tmp_path)) <= 21
    assert np.array_equal(pyramid.read(range(20), 16), np.stack(list(map(pixels_of, items))))


def test_images_that_failed_and_no_others_are_decoded_again(tmp_path, monkeypatch):
    items = make_items(tmp_path, count=6)
    broken = tmp_path / "3.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:60])
    status = broken.stat()
    with pytest.raises(UserError, match=r"1 of 6 images"):
        ImagePyramid(items, counted(tmp_path), 16, 1, tmp_path / "cache")
    # the same file to the key, as after a failure of the disk that has passed
    monkeypatch.setattr(
        module,
        "_fingerprints",
        lambda *a, original=module._fingerprints: [
            [p, status.st_size, status.st_mtime_ns] if p == str(broken) else [p, size, time_]
            for p, size, time_ in original(*a)
        ],
    )
    broken.write_bytes(whole)
    pyramid = ImagePyramid(items, counted(tmp_path), 16, 1, tmp_path / "cache")
    assert Counter(decoded(tmp_path)) == {f"{i}.png": 1 + (i == 3) for i in range(6)}
    assert np.array_equal(pyramid.read(range(6), 16), np.stack(list(map(pixels_of, items))))


def test_two_jobs_that_want_one_pyramid_build_it_once(tmp_path):
    items = make_items(tmp_path)
    made, failures = [], []

    def job():
        try:
            made.append(ImagePyramid(items, counted(tmp_path, 0.02), 16, 1, tmp_path / "cache"))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=job) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sorted(decoded(tmp_path)) == sorted(f"{i}.png" for i in range(10))
    assert all(np.array_equal(pyramid.read(range(10), 4), made[0].read(range(10), 4)) for pyramid in made)


# what cannot be used -------------------------------------------------------------------------------------------------


def one_line_of(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_unreadable_images_are_counted_and_the_first_is_named(tmp_path):
    items = make_items(tmp_path)
    for number in (4, 8):
        (tmp_path / f"{number}.png").write_bytes((tmp_path / f"{number}.png").read_bytes()[:50])
    with pytest.raises(UserError) as error:
        ImagePyramid(items, READ, 16, 1, tmp_path / "cache")
    message = one_line_of(error)
    assert message.startswith("2 of 10 images cannot be used for training, the first: ")
    assert "4.png: " in message
    assert message.count("4.png") == 1


def test_setting_that_fits_no_image_is_found_before_all_are_decoded(tmp_path):
    items = make_items(tmp_path, count=40, size=8)
    with pytest.raises(UserError, match=r"20 of 40 images .*0\.png: is 8×8 pixels .*expected 16×16"):
        ImagePyramid(items, counted(tmp_path), 16, 1, tmp_path / "cache")
    assert len(decoded(tmp_path)) == 20


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"channels": 3}, r"0\.png: expected 3 channel\(s\), got 1"),
        ({"image_size": 32}, r"0\.png: is 16×16 pixels .*expected 32×32"),
        ({"image_size": 24}, r"image_size must be a power of two from 4 on, got 24"),
        ({"image_size": 2}, r"image_size must be a power of two from 4 on, got 2"),
        ({"data": []}, r"at least one image, got none"),
        ({"data": [{"image": "gone.png"}]}, r"gone\.png cannot be read \(No such file"),
        ({"transform": Compose([LOAD, Compose([RandFlipd("image")])])}, r"must not be random, .*got RandFlipd"),
        ({"transform": Compose([LOAD, SelectItemsd("patient")])}, r"0\.png: KeyError: 'image'"),
    ],
)
def test_what_makes_no_pyramid_is_refused_in_one_line(tmp_path, kwargs, message):
    arguments = {"data": make_items(tmp_path, 2), "transform": READ, "image_size": 16, "channels": 1}
    with pytest.raises(UserError, match=message) as error:
        ImagePyramid(**{**arguments, **kwargs}, cache_dir=tmp_path / "cache")
    one_line_of(error)


def test_values_outside_the_unit_interval_are_refused(tmp_path):
    np.save(tmp_path / "bright.npy", np.full((16, 16), 2, dtype=np.float32))
    bright = Compose([LoadImaged("image", ensure_channel_first=True, image_only=True)])
    with pytest.raises(UserError, match=r"bright\.npy: has values from 2 to 2, expected 0 to 1"):
        ImagePyramid([{"image": str(tmp_path / "bright.npy")}], bright, 16, 1, tmp_path / "cache")


def test_need_of_disk_is_told_and_a_small_disk_refused_before_anything_is_decoded(tmp_path, monkeypatch, caplog):
    items = make_items(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=3359))
    with caplog.at_level("INFO"), pytest.raises(UserError, match=r"needs more room: 10 of 10 images") as error:
        ImagePyramid(items, counted(tmp_path), 16, 1, tmp_path / "cache")  # 10 × (16² + 8² + 4²) = 3,360 bytes
    one_line_of(error)
    assert not decoded(tmp_path)
    assert "10 of 10 images to decode, 0.00 GB of disk" in caplog.text


def test_disk_that_fills_up_is_one_line_and_the_build_goes_on_later(tmp_path, monkeypatch):
    items = make_items(tmp_path)
    write = module._write_rows

    def full_at_five(build, task):
        if task[0] == 5:
            raise OSError(28, "No space left on device")
        return write(build, task)

    monkeypatch.setattr(module, "JOURNAL_SECONDS", 0.0)
    monkeypatch.setattr(module, "_write_rows", full_at_five)
    with pytest.raises(UserError, match=r"cannot be written to .* \(No space left on device\); make room") as error:
        ImagePyramid(items, counted(tmp_path), 16, 1, tmp_path / "cache")
    one_line_of(error)
    monkeypatch.setattr(module, "_write_rows", write)
    ImagePyramid(items, counted(tmp_path), 16, 1, tmp_path / "cache")
    assert len(decoded(tmp_path)) == 10


def test_cache_dir_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written to .*choose another cache_dir"):
        ImagePyramid(make_items(tmp_path), READ, 16, 1, tmp_path / "file" / "cache")


def test_unknown_resolution_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"resolution must be one of 4, 8, 16, got 32"):
        make(tmp_path).read([0], 32)


# the loader ----------------------------------------------------------------------------------------------------------


def test_batches_follow_the_schedule(tmp_path):
    loader = GrowingDataLoader(make(tmp_path, labels=True), SCHEDULE)
    position = 0
    for batch in islice(loader, 30):
        stage = SCHEDULE.at(position)
        position += stage.batch_size
        assert batch["image"].shape == (stage.batch_size, 1, stage.resolution, stage.resolution)
        assert batch["image"].dtype == torch.uint8
        assert batch["label"].dtype == torch.int64
        assert (loader.images_seen, loader.global_batch_size) == (position, stage.batch_size)
    assert position > SCHEDULE.total_images


def test_length_is_reached_by_no_training_before_its_end(tmp_path):
    loader = GrowingDataLoader(make(tmp_path), SCHEDULE)
    steps = 1 + next(step for step, _ in enumerate(loader) if loader.images_seen >= SCHEDULE.total_images)
    assert steps <= len(loader) <= steps + len(SCHEDULE.resolutions)


def test_order_is_that_of_the_other_trainings(tmp_path):
    items = make_items(tmp_path, labels=True)
    pyramid = ImagePyramid(items, READ, 16, 1, tmp_path / "cache")
    flat = GrowthSchedule([16], [4], [1e-3], [1000], [0])
    ours = GrowingDataLoader(pyramid, flat, seed=3)
    theirs = ResumableDataLoader(Dataset(items, READ), batch_size=4, seed=3)
    for mine, other in islice(zip(ours, theirs, strict=False), 8):
        assert torch.equal(mine["label"], other["label"])
        assert torch.equal(mine["image"], (other["image"] * 255).round().to(torch.uint8).as_tensor())


@pytest.mark.parametrize("mirror", [False, True])
def test_training_resumed_at_any_step_sees_the_same_batches(tmp_path, mirror):
    pyramid = make(tmp_path, labels=True)
    whole = list(islice(GrowingDataLoader(pyramid, SCHEDULE, seed=1, mirror=mirror), 20))
    position = 0
    for step, batch in enumerate(whole):
        rest = GrowingDataLoader(pyramid, SCHEDULE, seed=1, mirror=mirror)
        rest.images_seen = position
        assert rest.global_batch_size == SCHEDULE.at(position).batch_size
        for a, b in zip(whole[step:], rest, strict=False):
            assert torch.equal(a["image"], b["image"])
            assert torch.equal(a["label"], b["label"])
            break
        position += len(batch["image"])


def test_new_iterator_goes_on_where_the_last_one_stopped(tmp_path):
    pyramid = make(tmp_path)
    whole = images(GrowingDataLoader(pyramid, SCHEDULE, mirror=True), 12)
    loader = GrowingDataLoader(pyramid, SCHEDULE, mirror=True)
    parts = [batch for _ in range(4) for batch in images(loader, 3)]
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_ranks_share_the_stream_without_overlap(tmp_path, monkeypatch):
    pyramid = make(tmp_path)
    whole = GrowingDataLoader(pyramid, SCHEDULE, seed=2, mirror=True)
    monkeypatch.setattr(module.idist, "get_world_size", lambda: 2)
    ranks = []
    for rank in range(2):
        monkeypatch.setattr(module.idist, "get_rank", lambda rank=rank: rank)
        ranks.append(GrowingDataLoader(pyramid, SCHEDULE, seed=2, mirror=True))
    for together, first, second in islice(zip(whole, *ranks, strict=False), 15):
        assert torch.equal(together["image"][0::2], first["image"])
        assert torch.equal(together["image"][1::2], second["image"])
    assert whole.images_seen == ranks[0].images_seen == ranks[1].images_seen


def test_each_pass_shows_every_image_once(tmp_path):
    items = make_items(tmp_path, count=10)
    pyramid = ImagePyramid([{**item, "label": n} for n, item in enumerate(items)], READ, 16, 1, tmp_path / "cache")
    loader = GrowingDataLoader(pyramid, SCHEDULE)
    shown = torch.cat([batch["label"] for batch in islice(loader, 12)]).tolist()
    assert all(sorted(shown[start : start + 10]) == list(range(10)) for start in range(0, 60, 10))
    assert shown[:10] != shown[10:20]


def test_mirroring_flips_half_of_the_images_left_and_right(tmp_path):
    pyramid = make(tmp_path, count=40)
    flat = GrowthSchedule([8], [40], [1e-3], [1000], [0])
    plain = torch.cat(images(GrowingDataLoader(pyramid, flat, seed=1), 20))
    mirrored = torch.cat(images(GrowingDataLoader(pyramid, flat, seed=1, mirror=True), 20))
    flipped = (mirrored != plain).flatten(1).any(1)
    assert torch.equal(mirrored[flipped], plain[flipped].flip(-1))
    assert 340 < int(flipped.sum()) < 460  # 400 ± 4 standard deviations
    assert not torch.equal(flipped[:40], flipped[40:80])


def test_seed_decides_order_and_mirroring(tmp_path):
    pyramid = make(tmp_path)
    first, again, other = (
        torch.cat(images(GrowingDataLoader(pyramid, SCHEDULE, seed=seed, mirror=True), 2)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_error_while_reading_ahead_reaches_the_training_in_its_turn(tmp_path, monkeypatch):
    pyramid = make(tmp_path)
    read = pyramid.read
    calls = []

    def fails_at_third(indices, resolution):
        calls.append(resolution)
        if len(calls) == 3:
            raise UserError("the disk is gone")
        return read(indices, resolution)

    monkeypatch.setattr(pyramid, "read", fails_at_third)
    batches = iter(GrowingDataLoader(pyramid, SCHEDULE))
    next(batches), next(batches)
    with pytest.raises(UserError, match="the disk is gone"):
        next(batches)


def test_no_thread_outlives_its_iterator(tmp_path):
    loader = GrowingDataLoader(make(tmp_path), SCHEDULE)
    before = threading.active_count()
    batches = iter(loader)
    next(batches)
    assert threading.active_count() == before + 1
    del batches
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("change", "processes", "message"),
    [
        ({"resolutions": [8, 16, 32]}, 1, r"resolutions must be among 4, 8, 16, got 32; set image_size"),
        ({"batch_sizes": [8, 6, 12]}, 1, r"takes 12 images at 16×16, the training split holds 10; lower --batch_sizes"),
        ({"batch_sizes": [8, 6, 3]}, 2, r"batch of 3 images at 16×16 cannot be shared evenly by 2 processes"),
    ],
)
def test_schedule_that_the_data_or_the_processes_do_not_fit_is_refused(
    tmp_path, monkeypatch, change, processes, message
):
    pyramid = make(tmp_path)
    monkeypatch.setattr(module.idist, "get_world_size", lambda: processes)
    with pytest.raises(UserError, match=message):
        GrowingDataLoader(pyramid, replace(SCHEDULE, **change))


# a group of processes ------------------------------------------------------------------------------------------------


def build_in_a_group(rank, folder, items, results):
    torch.set_num_threads(1)  # the threads of the parent are not there after a fork
    module.BEAT_SECONDS = 0.05
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    try:
        pyramid = ImagePyramid(items, counted(folder, 0.05), 16, 1, folder / "cache")
        sums = [batch["image"].sum().item() for batch in islice(GrowingDataLoader(pyramid, SCHEDULE), 4)]
        results.put((rank, str(pyramid.folder), sums))
    except UserError as error:
        results.put((rank, "error", str(error)))
    finally:
        torch.distributed.destroy_process_group()


def in_a_group(folder, items):
    results = FORK.Queue()
    children = [FORK.Process(target=build_in_a_group, args=(rank, folder, items, results)) for rank in range(2)]
    for child in children:
        child.start()
    found = sorted(results.get(timeout=60) for _ in children)
    for child in children:
        child.join()
    return found


def test_rank_0_builds_while_the_others_wait_and_hear_of_it(tmp_path):
    items = make_items(tmp_path)
    (_, folder, ours), (_, same, theirs) = in_a_group(tmp_path, items)
    assert folder == same
    assert sorted(decoded(tmp_path)) == sorted(f"{i}.png" for i in range(10))
    assert ours != theirs


def test_what_rank_0_cannot_build_ends_all(tmp_path):
    items = make_items(tmp_path)
    (tmp_path / "7.png").write_bytes(b"no image")
    (_, first, message), (_, second, heard) = in_a_group(tmp_path, items)
    assert first == second == "error"
    assert "7.png" in message
    assert heard == f"rank 0 has built no image pyramid: {message}"
