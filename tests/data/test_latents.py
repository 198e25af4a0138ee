"""The store of latents against plain NumPy, and the scaling against known variances."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from medgen.data import LatentScaling, LatentStore, estimate_scaling, load_latents, write_datalist
from medgen.data.image_set import file_sha256
from medgen.errors import UserError

SHAPE = (3, 4, 5)
SPLITS = ("training", "validation")


def latents_of(path: str, seed: int, copies: int = 0) -> np.ndarray:
    """What stands in for an encoder: depends on the file's content and the seed of its copies."""
    content = int.from_bytes(Path(path).read_bytes()[:4], "big")
    found = [np.random.default_rng(content).normal(2, 3, (2, *SHAPE))]
    found += [np.random.default_rng([seed, copy]).normal(2, 3, (2, *SHAPE)) for copy in range(copies)]
    found = np.float32(found)
    found[:, 1] = abs(found[:, 1]) / 10
    return found


def encode(store: LatentStore, until: int | None = None) -> None:
    store.begin()
    for batch in store.batches:
        for number in batch:
            if number == until:
                return
            item = store.todo[number]
            store.add(number, latents_of(item["image"], item["seed"], store.copies))
    store.finish()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.fixture
def data(tmp_path):
    """Twelve images in two splits, and a file that stands for an autoencoder."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    items = []
    for number in range(12):
        (folder / "images" / f"{number}.png").write_bytes(number.to_bytes(4, "big") + b"picture")
        items.append({"image": f"images/{number}.png", "patient": f"p{number}"})
    write_datalist(folder / "datalist.json", "test", "X-ray", {"training": items[:9], "validation": items[9:]})
    (folder / "autoencoder.pt").write_bytes(b"weights")
    return folder


def make(data: Path, folder: Path, **changes: object) -> LatentStore:
    settings = {
        "latents_dir": folder,
        "datalist": data / "datalist.json",
        "splits": SPLITS,
        "dataset_dir": None,
        "autoencoder_path": data / "autoencoder.pt",
        "latent_shape": SHAPE,
        "transform": "digest",
        "shard_size": 5,
        "batch_size": 2,
    }
    return LatentStore(**{**settings, **changes})


# ---------------------------------------------------------------------------------------------------------------------
# the scaling


def synthetic(rng: np.random.Generator, n: int, channels: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Posteriors whose pixels are correlated: means and standard deviations, and the exact variance."""
    offset = np.array([-3.0, 0.5, 1.0])  # of the channels
    between, within, std = np.array([1.0, 0.5, 2.0]), np.array([0.5, 1.0, 0.2]), np.array([0.1, 0.8, 0.3])
    level = offset[:, None, None] + between[:, None, None] * rng.normal(size=(n, 3, 1, 1))
    rows = within[:, None, None] * rng.normal(size=(n, 3, 8, 1)).repeat(8, 3)  # every row is one number
    exact = between**2 + within**2 + std**2
    if not channels:
        exact = np.array([exact.mean() + offset.var()])
    return level + rows, np.broadcast_to(std[:, None, None], (n, 3, 8, 8)), exact


def moments(mean: np.ndarray, std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return mean.mean((2, 3)), (mean**2 + std**2).mean((2, 3)) - mean.mean((2, 3)) ** 2


@pytest.mark.parametrize("scaling", ["global", "channel"])
def test_scale_is_within_its_standard_error_of_the_exact_value(scaling):
    distances = []
    for seed in range(300):
        mean, std, exact = synthetic(np.random.default_rng(seed), 150, scaling == "channel")
        found = estimate_scaling(*moments(mean, std), "", scaling)
        distances.append((np.array(found.scale) - exact**-0.5) / found.scale_standard_error)
    distances = np.abs(distances)

    assert distances.max() < 4.5
    for share in (distances < 1.96).mean(0):
        assert 0.9 < share < 0.98  # 95% and its own scatter over 300 seeds


def test_shift_of_channels_is_within_its_standard_error():
    distances = []
    for seed in range(300):
        mean, std, _ = synthetic(np.random.default_rng(seed), 150, True)
        found = estimate_scaling(*moments(mean, std), "", "channel")
        distances.append((np.array(found.shift) - [-3, 0.5, 1]) / found.shift_standard_error)

    assert 0.92 < (np.abs(distances) < 1.96).mean() < 0.98


def test_pixels_of_an_image_do_not_count_as_independent():
    mean, std, _ = synthetic(np.random.default_rng(0), 100, False)
    larger = estimate_scaling(*moments(mean.repeat(4, 2).repeat(4, 3), std.repeat(4, 2).repeat(4, 3)), "")

    assert larger.scale_standard_error == pytest.approx(estimate_scaling(*moments(mean, std), "").scale_standard_error)


def test_global_scale_is_one_over_the_standard_deviation_of_sampled_latents():
    rng = np.random.default_rng(1)
    mean, std, _ = synthetic(rng, 50, False)

    exact = estimate_scaling(*moments(mean, np.zeros_like(mean)), "")
    sampled = np.std([mean + std * rng.normal(size=mean.shape) for _ in range(200)])

    assert exact.scale == pytest.approx((1 / mean.std(),))
    assert exact.shift == (0.0,)
    assert estimate_scaling(*moments(mean, std), "").scale == pytest.approx((1 / sampled,), rel=1e-3)


def test_channel_scaling_whitens_each_channel():
    import torch  # here: processes that this file starts import it

    mean, std, _ = synthetic(np.random.default_rng(2), 50, True)
    scaling = estimate_scaling(*moments(mean, std * 0), "", "channel")

    white = scaling.whiten(torch.from_numpy(mean))

    torch.testing.assert_close(white.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(white.var((0, 2, 3), correction=0), torch.ones(3).double())
    torch.testing.assert_close(scaling.unwhiten(white), torch.from_numpy(mean))
    torch.testing.assert_close(scaling.whiten(torch.from_numpy(mean[0])), white[0])


def test_scaling_is_read_as_it_was_written(tmp_path):
    scaling = LatentScaling((0.3, 0.1 + 0.2), (0.0, -1 / 3), "ab", (1.2e-4, 3.4e-5), (0.0, 0.1), 90_000)
    scaling.write(tmp_path / "scaling.json")

    assert LatentScaling.read(tmp_path / "scaling.json") == scaling
    assert str(scaling) == "scale 0.3000 ± 0.0001, 0.30000 ± 0.00003 over 90,000 images"
    assert str(LatentScaling((0.3,), (0.0,), "ab", n=32)) == "scale 0.3000 over 32 images"


def test_scaling_of_another_autoencoder_is_refused(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"a")
    scaling = LatentScaling((0.3,), (0.0,), "ab")

    with pytest.raises(UserError, match=r"belongs to another autoencoder .* than .*a\.pt"):
        scaling.check_autoencoder(tmp_path / "a.pt")
    with pytest.raises(UserError, match="no autoencoder at"):
        scaling.check_autoencoder(tmp_path / "b.pt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no scaling of latents"),
        ("[1]", "is no scaling of latents"),
        ("{}", "is no scaling of latents"),
        ('{"scale": 0.3, "shift": 0, "autoencoder_sha256": "a"}', "is no scaling of latents"),
        ('{"scale": [0.3], "shift": [0, 0], "autoencoder_sha256": "a"}', "as many finite shifts as scales"),
        ('{"scale": [0.0], "shift": [0], "autoencoder_sha256": "a"}', "as many finite shifts as scales"),
        ('{"scale": [NaN], "shift": [0], "autoencoder_sha256": "a"}', "as many finite shifts as scales"),
        ('{"scale": [1], "shift": [0], "autoencoder_sha256": null}', "as many finite shifts as scales"),
    ],
)
def test_broken_scaling_is_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "scaling.json").write_text(text)

    with pytest.raises(UserError, match=message):
        LatentScaling.read(tmp_path / "scaling.json")


def test_missing_scaling_says_who_writes_it(tmp_path):
    with pytest.raises(UserError, match=r"no scaling of latents at .* encode\.json"):
        LatentScaling.read(tmp_path / "scaling.json")


def test_collapsed_latents_and_single_images_have_no_scaling():
    with pytest.raises(UserError, match="collapsed"):
        estimate_scaling(np.ones((3, 2)), np.zeros((3, 2)), "", "channel")
    with pytest.raises(UserError, match="at least 2 training images"):
        estimate_scaling(np.ones((1, 2)), np.ones((1, 2)), "")
    with pytest.raises(UserError, match="scaling must be global or channel"):
        estimate_scaling(np.ones((2, 2)), np.ones((2, 2)), "", "pixel")


# ---------------------------------------------------------------------------------------------------------------------
# the store


def test_items_find_their_latents(data, tmp_path):
    encode(make(data, tmp_path / "latents", augmented_copies=2, seed=7))

    items = load_latents(
        tmp_path / "latents", data / "datalist.json", "validation", None, data / "autoencoder.pt", SHAPE
    )

    assert [Path(item["image"]).name for item in items] == ["9.png", "10.png", "11.png"]
    for item in items:
        row = np.load(item["latent"]["file"], mmap_mode="r", allow_pickle=False)[item["latent"]["row"]]
        assert (row.shape, row.dtype) == ((3, 2, *SHAPE), np.float16)
        np.testing.assert_array_equal(row[0], latents_of(item["image"], 0)[0].astype(np.float16))
    arrays = [np.load(tmp_path / "latents" / f"0000{shard}.npy") for shard in range(3)]
    assert [len(array) for array in arrays] == [5, 5, 2]


def test_scaling_is_that_of_the_training_split(data, tmp_path):
    encode(make(data, tmp_path / "latents"))

    means, stds = np.stack(
        [latents_of(data / "images" / f"{i}.png", 0)[0].astype(np.float16).astype(float) for i in range(9)], axis=1
    )

    scaling = LatentScaling.read(tmp_path / "latents" / "scaling.json")
    assert scaling.scale == pytest.approx(((means.var() + (stds**2).mean()) ** -0.5,))
    assert scaling.n == 9
    scaling.check_autoencoder(data / "autoencoder.pt")


@pytest.mark.parametrize("until", [0, 4, 5, 7, 11])
def test_interrupted_store_ends_with_the_same_bytes(data, tmp_path, until):
    encode(make(data, tmp_path / "whole", augmented_copies=1))
    encode(make(data, tmp_path / "cut", augmented_copies=1), until)

    resumed = make(data, tmp_path / "cut", augmented_copies=1, resume=True)
    encode(resumed)

    assert len(resumed.todo) == 12 - until // 5 * 5
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    nothing = make(data, tmp_path / "cut", augmented_copies=1, resume=True)
    assert nothing.todo == []
    encode(nothing)
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


@pytest.mark.parametrize("moment", ["array", "index"])
def test_store_killed_while_it_writes_a_shard_goes_on(data, tmp_path, moment):
    encode(make(data, tmp_path / "whole"))
    script = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import medgen.data.latents as latents
from test_latents import encode, make

def kill(*args, **kwargs):
    global calls
    calls += 1
    if calls == 2:
        if {moment == "array"}:
            args[0].write(b"half of it")
            args[0].flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return before(*args, **kwargs)

calls = 0
if {moment == "array"}:
    before, latents.np.save = latents.np.save, kill
else:
    before, latents.atomic_write_text = latents.atomic_write_text, kill
encode(make(Path({str(data)!r}), Path({str(tmp_path / "cut")!r})))
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr

    encode(make(data, tmp_path / "cut", resume=True))

    assert content(tmp_path / "cut") == content(tmp_path / "whole")


@pytest.mark.parametrize("count", [1, 2, 5])
def test_shares_have_the_files_of_the_whole_and_leave_the_scaling_to_their_merge(data, tmp_path, count):
    encode(make(data, tmp_path / "whole"))
    for index in reversed(range(count)):
        store = make(data, tmp_path / "parts", shard=f"{index}/{count}")
        encode(store, until=None if index else 3)  # the first is cut off, and done again
        store.close()  # as the system does when a process ends
    encode(make(data, tmp_path / "parts", shard=f"0/{count}"))
    assert make(data, tmp_path / "parts", shard=f"0/{count}").todo == []
    assert not (tmp_path / "parts" / "scaling.json").exists()

    merged = make(data, tmp_path / "parts", resume=True)
    assert merged.todo == []
    encode(merged)

    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_merge_does_what_a_lost_share_has_left(data, tmp_path):
    encode(make(data, tmp_path / "whole"))
    encode(make(data, tmp_path / "parts", shard="0/2"))
    merged = make(data, tmp_path / "parts", resume=True)
    assert len(merged.todo) == 5
    encode(merged)
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_shares_encode_at_the_same_time_and_nothing_else_does(data, tmp_path):
    first, second = (make(data, tmp_path / "latents", shard=f"{index}/2") for index in range(2))
    twin = make(data, tmp_path / "latents", shard="0/2")
    first.begin()
    second.begin()
    for other in (twin, make(data, tmp_path / "latents", resume=True)):
        with pytest.raises(UserError, match="another process encodes into"):
            other.begin()
    first.close()
    second.close()
    twin.begin()
    twin.close()


def test_shares_that_begin_at_the_same_time_have_one_autoencoder(data, tmp_path):
    (data / "newer.pt").write_bytes(b"other weights")
    first, late, twin = (
        make(data, tmp_path / "latents", shard=shard, autoencoder_path=data / name)
        for shard, name in (("0/2", "autoencoder.pt"), ("1/2", "newer.pt"), ("1/2", "autoencoder.pt"))
    )
    first.begin()  # has encoded nothing yet
    with pytest.raises(UserError, match=r"the latents in .* are of another autoencoder .*newer\.pt"):
        late.begin()
    twin.begin()  # the one refused holds no lock
    first.close()
    twin.close()
    batches = make(data, tmp_path / "latents", shard="0/2", batch_size=4)
    with pytest.raises(UserError, match=r"with batch_size 2, this run has 4; .* delete latents\.json"):
        batches.begin()


def test_file_of_another_autoencoder_among_the_latents_is_refused(data, tmp_path):
    encode(make(data, tmp_path / "latents"))
    index = tmp_path / "latents" / "00001.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({**content, "autoencoder_sha256": "0" * 64}))
    with pytest.raises(UserError, match=r"00001\.npy are of another autoencoder"):
        make(data, tmp_path / "latents", resume=True)
    with pytest.raises(UserError, match=r"00001\.npy are of another autoencoder"):
        load_latents(tmp_path / "latents", data / "datalist.json", "training")
    del content["autoencoder_sha256"]  # older files
    index.write_text(json.dumps(content))
    assert make(data, tmp_path / "latents", resume=True).todo == []


def test_latents_of_another_batch_size_are_refused_and_older_ones_do_not_say_it(data, tmp_path):
    encode(make(data, tmp_path / "latents", shard="0/2"))
    with pytest.raises(UserError, match="were made with batch_size 2, this run has 4"):
        make(data, tmp_path / "latents", shard="1/2", batch_size=4)
    path = tmp_path / "latents" / "latents.json"
    header = json.loads(path.read_text())
    del header["batch_size"]
    path.write_text(json.dumps(header))
    make(data, tmp_path / "latents", shard="1/2", batch_size=4)


def test_share_of_another_layout_or_other_settings_is_refused(data, tmp_path):
    encode(make(data, tmp_path / "latents", shard="0/2"))
    with pytest.raises(UserError, match=r"00000\.npy holds other images than this datalist has there, or --shard_size"):
        make(data, tmp_path / "latents", shard="0/2", shard_size=4)
    with pytest.raises(UserError, match="were made with augmented_copies 0, this run has 2"):
        make(data, tmp_path / "latents", shard="1/2", augmented_copies=2)
    with pytest.raises(UserError, match="a scaling alone is measured by one process"):
        make(data, tmp_path / "other", shard="0/2", write_latents=False)


def test_batches_stay_within_shards(data, tmp_path):
    assert make(data, tmp_path / "latents").batches == [[0, 1], [2, 3], [4], [5, 6], [7, 8], [9], [10, 11]]


def test_seed_of_copies_depends_on_the_image_alone(data, tmp_path):
    whole = {item["image"]: item["seed"] for item in make(data, tmp_path / "latents", seed=3).todo}
    part = {
        item["image"]: item["seed"] for item in make(data, tmp_path / "latents", seed=3, splits=["validation"]).todo
    }
    other = {item["image"]: item["seed"] for item in make(data, tmp_path / "latents", seed=4).todo}

    assert len(set(whole.values())) == len(whole)
    assert part.items() <= whole.items()
    assert not part.items() & other.items()


def test_images_may_be_added_and_a_split_at_a_time(data, tmp_path):
    encode(make(data, tmp_path / "latents", splits=["validation"]))
    assert not (tmp_path / "latents" / "scaling.json").exists()

    added = make(data, tmp_path / "latents", splits=["training"], resume=True)
    encode(added)

    assert len(added.todo) == 9
    for split in SPLITS:
        for item in load_latents(tmp_path / "latents", data / "datalist.json", split):
            row = np.load(item["latent"]["file"])[item["latent"]["row"], 0]
            np.testing.assert_array_equal(row, latents_of(item["image"], 0)[0].astype(np.float16))


def test_new_fields_and_another_split_change_nothing(data, tmp_path):
    encode(make(data, tmp_path / "latents"))
    datalist = json.loads((data / "datalist.json").read_text())
    items = [{**item, "sentences": ["Clear lungs."]} for item in datalist["validation"] + datalist["training"][:3]]
    write_datalist(data / "other.json", "test", "X-ray", {"training": items})

    found = load_latents(tmp_path / "latents", data / "other.json", "training")

    assert [item["sentences"] for item in found] == [["Clear lungs."]] * 6
    row = np.load(found[0]["latent"]["file"])[found[0]["latent"]["row"], 0]
    np.testing.assert_array_equal(row, latents_of(data / "images" / "9.png", 0)[0].astype(np.float16))


def test_classes_come_as_numbers(data, tmp_path):
    encode(make(data, tmp_path / "latents"))
    datalist = json.loads((data / "datalist.json").read_text())
    items = [{**item, "label": "sick"} for item in datalist["training"]]
    write_datalist(data / "other.json", "test", "X-ray", {"training": items}, label_names=["well", "sick"])

    found = load_latents(tmp_path / "latents", data / "other.json", "training", num_classes=2)

    assert {item["label"] for item in found} == {1}


def test_latents_suffice_without_the_images(data, tmp_path):
    encode(make(data, tmp_path / "latents"))
    shutil.rmtree(data / "images")

    assert len(load_latents(tmp_path / "latents", data / "datalist.json", "training")) == 9


def test_copy_of_the_images_with_other_times_is_the_same(data, tmp_path):
    encode(make(data, tmp_path / "latents"))
    for image in (data / "images").iterdir():
        os.utime(image, (1, 1))

    assert len(load_latents(tmp_path / "latents", data / "datalist.json", "training")) == 9
    assert make(data, tmp_path / "latents", resume=True).todo == []


def test_changed_image_is_refused(data, tmp_path):
    encode(make(data, tmp_path / "latents"))
    (data / "images" / "4.png").write_bytes(b"another")

    with pytest.raises(UserError, match=r"4\.png is not the image whose latents are in .*latents: it has changed"):
        load_latents(tmp_path / "latents", data / "datalist.json", "training")
    with pytest.raises(UserError, match=r"4\.png is not the image"):
        make(data, tmp_path / "latents", resume=True)


def test_changed_image_of_the_same_size_is_refused(data, tmp_path):
    encode(make(data, tmp_path / "latents"))
    (data / "images" / "4.png").write_bytes(b"\0\0\0\x09picture")

    with pytest.raises(UserError, match=r"4\.png is not the image"):
        load_latents(tmp_path / "latents", data / "datalist.json", "training")


def test_a_start_of_training_reads_few_images_whose_times_alone_have_changed(data, tmp_path, monkeypatch, caplog):
    from medgen.data import latents

    caplog.set_level("INFO")
    encode(make(data, tmp_path / "latents"))
    for image in (data / "images").iterdir():
        os.utime(image, (1, 1))
    read = []
    monkeypatch.setattr(latents, "COMPARED", 3)
    monkeypatch.setattr(latents, "file_sha256", lambda path: read.append(Path(path).name) or file_sha256(path))

    load_latents(tmp_path / "latents", data / "datalist.json", "training")

    assert read == ["0.png", "4.png", "8.png"]
    assert "9 images have other times than when they were encoded; 3 are compared" in caplog.text
    make(data, tmp_path / "latents", resume=True)
    assert len([name for name in read if name.endswith(".png")]) == 3 + 12


def test_image_without_latents_is_named(data, tmp_path):
    encode(make(data, tmp_path / "latents", splits=["training"]))

    with pytest.raises(UserError, match=r"no latents of images/9\.png \(3 of the 3 images of split validation"):
        load_latents(tmp_path / "latents", data / "datalist.json", "validation")


def test_latents_of_another_autoencoder_are_refused(data, tmp_path):
    encode(make(data, tmp_path / "latents"))
    (data / "autoencoder.pt").write_bytes(b"other weights")

    with pytest.raises(UserError, match="are of another autoencoder"):
        load_latents(tmp_path / "latents", data / "datalist.json", "training", None, data / "autoencoder.pt")
    for write in (True, False):
        with pytest.raises(UserError, match="are of another autoencoder"):
            make(data, tmp_path / "latents", resume=True, write_latents=write)


@pytest.mark.parametrize(
    "change",
    [{"transform": "other"}, {"augmented_copies": 1}, {"latent_shape": (3, 8, 8)}],
    ids=lambda change: next(iter(change)),
)
def test_other_settings_are_refused(data, tmp_path, change):
    encode(make(data, tmp_path / "latents"))

    with pytest.raises(UserError, match=f"were made with {next(iter(change))} .*, this run has"):
        make(data, tmp_path / "latents", resume=True, **change)


def test_folder_with_latents_is_refused_unless_resumed(data, tmp_path):
    encode(make(data, tmp_path / "latents"))

    with pytest.raises(UserError, match=r"holds latents of 12 images already; .* --resume true"):
        make(data, tmp_path / "latents")


def test_latents_of_another_shape_are_refused(data, tmp_path):
    encode(make(data, tmp_path / "latents"))

    with pytest.raises(UserError, match=r"are \[3, 4, 5\], this config has \[3, 8, 8\]"):
        load_latents(tmp_path / "latents", data / "datalist.json", "training", latent_shape=(3, 8, 8))


def test_no_latents_there_says_how_to_make_them(data, tmp_path):
    with pytest.raises(UserError, match=r"no latents in .*; write them with encode\.json"):
        load_latents(tmp_path, data / "datalist.json", "training")


@pytest.mark.parametrize("text", ["{", "[]", '{"name": "something"}'])
def test_foreign_index_is_refused(data, tmp_path, text):
    (tmp_path / "latents.json").write_text(text)

    with pytest.raises(UserError, match=r"latents\.json"):
        load_latents(tmp_path, data / "datalist.json", "training")


@pytest.mark.parametrize("name", ["00001.npy", "00001.json"])
def test_broken_shard_is_encoded_again(data, tmp_path, name):
    encode(make(data, tmp_path / "latents"))
    before = content(tmp_path / "latents")
    (tmp_path / "latents" / name).write_bytes(before[name][: len(before[name]) // 2])

    with pytest.raises(UserError, match=r"no latents of images/5\.png \(4 of the 9"):
        load_latents(tmp_path / "latents", data / "datalist.json", "training")
    encode(make(data, tmp_path / "latents", resume=True))

    assert content(tmp_path / "latents") == before


def test_shard_of_pickles_is_not_read(data, tmp_path):
    encode(make(data, tmp_path / "latents"))
    np.save(tmp_path / "latents" / "00000.npy", np.array([None] * 5), allow_pickle=True)

    assert len(make(data, tmp_path / "latents", resume=True).todo) == 5


@pytest.mark.parametrize("name", ["00001-copy.json", "00001_1.json"])
def test_copies_of_a_shards_files_are_no_shards(data, tmp_path, name):
    encode(make(data, tmp_path / "latents"))
    for suffix in (".json", ".npy"):
        shutil.copy(tmp_path / "latents" / f"00001{suffix}", (tmp_path / "latents" / name).with_suffix(suffix))

    assert make(data, tmp_path / "latents", resume=True).todo == []
    places = [item["latent"]["file"] for item in load_latents(tmp_path / "latents", data / "datalist.json", "training")]
    assert {Path(place).name for place in places} == {"00000.npy", "00001.npy"}


@pytest.mark.parametrize("field", ["image", "size", "time", "sha256", "mean", "variance"])
def test_shard_that_lacks_what_is_known_of_an_image_is_encoded_again(data, tmp_path, field, caplog):
    encode(make(data, tmp_path / "latents"))
    path = tmp_path / "latents" / "00001.json"
    text = json.loads(path.read_text())
    del text["images"][2][field]
    path.write_text(json.dumps(text))

    assert len(make(data, tmp_path / "latents", resume=True).todo) == 5
    assert "00001.json and its array are not a complete shard" in caplog.text


@pytest.mark.parametrize("row", [0, 2, 4])
def test_array_that_a_shard_was_not_written_for_is_encoded_again(data, tmp_path, row):
    encode(make(data, tmp_path / "latents"))
    array = np.load(tmp_path / "latents" / "00000.npy")
    array[row, 0, 0, 0, 0, 0] += 1
    np.save(tmp_path / "latents" / "00000.npy", array)

    with pytest.raises(UserError, match=r"no latents of images/0\.png \(5 of the 9"):
        load_latents(tmp_path / "latents", data / "datalist.json", "training")
    assert len(make(data, tmp_path / "latents", resume=True).todo) == 5


def test_resumed_store_sees_a_change_in_the_middle_of_a_large_array(data, tmp_path, monkeypatch):
    monkeypatch.setattr("medgen.data.latents.ENDS", 200)
    encode(make(data, tmp_path / "latents"))
    with open(tmp_path / "latents" / "00000.npy", "r+b") as file:
        file.seek(600)
        file.write(b"damage")

    assert len(make(data, tmp_path / "latents", resume=True).todo) == 5


def test_no_array_is_read_by_the_index_of_another(data, tmp_path, monkeypatch):
    encode(make(data, tmp_path / "latents", splits=["training"], shard_size=9))
    array = tmp_path / "latents" / "00000.npy"
    array.write_bytes(array.read_bytes()[:60])
    datalist = json.loads((data / "datalist.json").read_text())
    write_datalist(data / "other.json", "test", "X-ray", {"training": datalist["training"][::-1]})
    store = make(
        data, tmp_path / "latents", splits=["training"], shard_size=9, datalist=data / "other.json", resume=True
    )

    def kill(path: Path, text: str) -> None:
        if Path(path).name == "00000.json":
            raise KeyboardInterrupt
        before(path, text)

    from medgen.data import latents

    before = latents.atomic_write_text
    monkeypatch.setattr(latents, "atomic_write_text", kill)
    with pytest.raises(KeyboardInterrupt):
        encode(store)

    assert len(np.load(array)) == 9
    with pytest.raises(UserError, match="9 of the 9 images"):
        load_latents(tmp_path / "latents", data / "datalist.json", "training")


def test_two_runs_do_not_encode_into_one_folder(data, tmp_path):
    first, second = (make(data, tmp_path / "latents", splits=[split]) for split in SPLITS)
    first.begin()

    with pytest.raises(UserError, match=r"another process encodes into .*latents; wait for it"):
        second.begin()

    first.close()
    encode(first)
    with pytest.raises(UserError, match=r"another run has encoded into .*latents meanwhile; start this one again"):
        second.begin()
    encode(make(data, tmp_path / "latents", resume=True))


def test_lock_of_a_process_goes_with_it(data, tmp_path):
    script = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_latents import make

store = make(Path({str(data)!r}), Path({str(tmp_path / "latents")!r}))
store.begin()
print("locked", flush=True)
sys.stdin.read()
"""
    holder = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match="another process encodes into"):
            make(data, tmp_path / "latents").begin()
    finally:
        holder.kill()
        holder.communicate()

    encode(make(data, tmp_path / "latents"))

    assert make(data, tmp_path / "latents", resume=True).todo == []


def test_one_scale_for_channels_far_from_zero_is_remarked_on(data, tmp_path, caplog):
    for scaling, remarks in (("global", 1), ("channel", 0)):
        caplog.clear()
        store = make(data, tmp_path / scaling, scaling=scaling)
        store.begin()
        for item in store.todo:
            latents = latents_of(item["image"], item["seed"])
            latents[:, 0, 1] -= 10
            store.add(item["number"], latents)
        store.finish()

        found = [record.message for record in caplog.records if "--scaling channel" in record.message]
        assert len(found) == remarks
        assert all(message.startswith("the mean of channel 1 of the latents is") for message in found)


def test_scaling_alone_leaves_no_latents(data, tmp_path):
    encode(make(data, tmp_path / "whole"))
    encode(make(data, tmp_path / "alone", write_latents=False, augmented_copies=3))

    assert list(content(tmp_path / "alone")) == ["scaling.json"]
    assert content(tmp_path / "alone")["scaling.json"] == content(tmp_path / "whole")["scaling.json"]
    with pytest.raises(UserError, match="add training"):
        make(data, tmp_path / "alone", write_latents=False, splits=["validation"])


def test_latents_that_float16_cannot_hold_are_refused(data, tmp_path):
    store = make(data, tmp_path / "latents")
    store.begin()

    for value in (1e5, np.nan):
        with pytest.raises(UserError, match=r"latents of images/0\.png are not finite"):
            store.add(0, np.full((1, 2, *SHAPE), value, np.float32))
    with pytest.raises(UserError, match=r"expected shape \(1, 2, 3, 4, 5\), got \(1, 2, 3, 8, 8\)"):
        store.add(0, np.zeros((1, 2, 3, 8, 8), np.float32))


def test_missing_split_and_autoencoder_are_named(data, tmp_path):
    with pytest.raises(UserError, match="split test is missing"):
        make(data, tmp_path, splits=["test"])
    with pytest.raises(UserError, match="no autoencoder at"):
        make(data, tmp_path, autoencoder_path=data / "none.pt")


def test_importing_the_store_imports_no_torch():
    script = "import sys, medgen.data.latents; print('torch' in sys.modules, 'monai' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout

    assert printed.split() == ["False", "False"]
