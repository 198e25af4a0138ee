"""Staging: what is copied, what is not, and what an interruption leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from medgen import cli
from medgen.data import LatentStore, load_datalist, load_latents, stage_datalist, write_datalist
from medgen.data import stage as module
from medgen.errors import UserError
from medgen.preemption import AGAIN

COUNTS = {"training": 6, "validation": 2, "test": 3}


@pytest.fixture
def source(tmp_path):
    """A data set of three splits, each image with a mask, one of which two share, and a file that nothing names."""
    root, splits = tmp_path / "volume/set", {}
    for split, count in COUNTS.items():
        splits[split] = []
        for number in range(count):
            item = {"image": f"images/{split}/{number}.png", "patient": f"{split}{number}", "mask": "masks/one.png"}
            if split == "test":
                item["anomaly_mask"] = f"anomalies/{number}.png"
            for field in ("image", "mask", "anomaly_mask"):
                if field in item:
                    path = root / item[field]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(np.random.default_rng(number).bytes(1000 + number))
                    os.utime(path, ns=(1, 1_700_000_000_123_456_789 + number))
            splits[split].append(item)
    (root / "images/other.png").write_bytes(b"not named")
    write_datalist(root / "datalist.json", "set", "X-ray", splits)
    return root


def content(folder):
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.name.endswith(".png") and path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (module.LOCK, module.ORIGIN)
    }


def inodes(folder):
    return {path.relative_to(folder).as_posix(): path.stat().st_ino for path in folder.rglob("*") if path.is_file()}


def test_staged_files_have_the_bytes_and_times_of_their_sources_and_bundles_load_them(source, tmp_path):
    staged = stage_datalist(source / "datalist.json", tmp_path / "disk")

    expected = content(source)
    del expected["images/other.png"]
    assert content(tmp_path / "disk") == expected
    files = sum(COUNTS.values()) + COUNTS["test"] + 1
    size = sum(len(data) for name, (data, _) in expected.items() if name != "datalist.json")
    assert (staged.files, staged.copied, staged.size) == (files, files, size)
    for split, count in COUNTS.items():
        items = load_datalist(staged.datalist, split)
        assert len(items) == count
        assert all(Path(item["image"]).is_relative_to(tmp_path / "disk") for item in items)


def test_copies_are_read_by_nobody_who_may_not_read_the_source(source, tmp_path):
    (source / "images/test/0.png").chmod(0o600)
    (source / "images/test/1.png").chmod(0o440)

    stage_datalist(source / "datalist.json", tmp_path / "disk")

    modes = [(tmp_path / f"disk/images/test/{number}.png").stat().st_mode & 0o777 for number in (0, 1)]
    assert modes == [0o600, 0o440]


def test_second_run_copies_nothing_and_a_changed_source_alone(source, tmp_path):
    stage_datalist(source / "datalist.json", tmp_path / "disk")
    before = inodes(tmp_path / "disk")

    again = stage_datalist(source / "datalist.json", tmp_path / "disk")
    unchanged = inodes(tmp_path / "disk")
    changed, touched = source / "images/training/1.png", source / "images/training/2.png"
    changed.write_bytes(b"longer" * 1000)
    os.utime(touched, ns=(5, 5))
    third = stage_datalist(source / "datalist.json", tmp_path / "disk")

    assert (again.copied, unchanged) == (0, before)
    assert third.copied == 2
    after = inodes(tmp_path / "disk")
    assert {name for name in after if name.endswith(".png") and after[name] != before[name]} == {
        "images/training/1.png",
        "images/training/2.png",
    }
    assert (tmp_path / "disk/images/training/1.png").read_bytes() == changed.read_bytes()


def test_only_the_splits_asked_for_are_copied_and_the_datalist_is_the_same(source, tmp_path):
    stage_datalist(source / "datalist.json", tmp_path / "disk", ["training", "validation"])

    assert not (tmp_path / "disk/images/test").exists()
    assert not (tmp_path / "disk/anomalies").exists()
    # a checkpoint knows its datalist by a digest
    assert (tmp_path / "disk/datalist.json").read_bytes() == (source / "datalist.json").read_bytes()


def test_another_data_set_is_refused_and_the_files_that_a_training_reads_stay(source, tmp_path):
    stage_datalist(source / "datalist.json", tmp_path / "disk")
    before = content(tmp_path / "disk")
    other = shutil.copytree(source, tmp_path / "volume/other")
    (other / "images/test/0.png").write_bytes(b"another image")

    with pytest.raises(UserError, match=rf"holds files of {source}, got {other}; choose another --target"):
        stage_datalist(other / "datalist.json", tmp_path / "disk")
    shutil.move(source, tmp_path / "away")  # two volumes may be mounted at one place
    shutil.move(other, source)
    (source / "datalist.json").write_text((source / "datalist.json").read_text().replace('"X-ray"', '"CT"'))
    with pytest.raises(UserError, match=rf"holds files by another datalist\.json of {source}; choose another --target"):
        stage_datalist(source / "datalist.json", tmp_path / "disk")

    assert content(tmp_path / "disk") == before


def test_another_datalist_of_the_same_images_lies_beside_the_first(source, tmp_path):
    stage_datalist(source / "datalist.json", tmp_path / "disk", ["training"])
    datalist = json.loads((source / "datalist.json").read_text())
    datalist["test"].pop()
    datalist["label_names"] = ["no image", "image"]  # a list that is no split
    (source / "datalist_few.json").write_text(json.dumps(datalist))

    staged = stage_datalist(source / "datalist_few.json", tmp_path / "disk", ["training", "test"])

    assert staged.copied == 2 * (COUNTS["test"] - 1)
    for name in ("datalist.json", "datalist_few.json"):
        assert (tmp_path / "disk" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("replaced", [False, True])
def test_datalist_is_away_while_a_file_that_it_promises_is_replaced_alone(replaced, source, tmp_path, monkeypatch):
    staged = stage_datalist(source / "datalist.json", tmp_path / "disk", ["training"])
    if replaced:
        (source / "images/training/0.png").write_bytes(b"new")
    copy, there = module._copy, set()

    def look(*paths):
        there.add(staged.datalist.exists())
        return copy(*paths)

    monkeypatch.setattr(module, "_copy", look)
    stage_datalist(source / "datalist.json", tmp_path / "disk")

    assert there == {not replaced}
    assert staged.datalist.exists()


@pytest.mark.parametrize(
    ("command", "where"), [("stage", "medgen.data.stage.stage_datalist"), ("check", "medgen.check.check_args_file")]
)
def test_command_that_is_told_to_end_ends_with_again(command, where, tmp_path):
    module_name, _, function = where.rpartition(".")
    program = f"""
import importlib, os, signal
from medgen import cli
def told(*_):
    print("at work")
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except:  # as pydoc.locate has it, by which MONAI finds what a config names
        raise ValueError
importlib.import_module({module_name!r}).{function} = told
cli.app([{command!r}, {str(tmp_path / "x.json")!r}, "--target", {str(tmp_path / "t")!r}])
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert (told.returncode, told.stdout) == (AGAIN, "at work\n")
    assert told.stderr == "ended by SIGTERM; the same command does what is left\n"


def test_killed_run_leaves_whole_files_and_no_datalist_and_is_continued(source, tmp_path):
    stage_datalist(source / "datalist.json", tmp_path / "disk", ["validation"])
    (tmp_path / "disk/datalist.json").unlink()
    program = f"""
import os, signal, sys
from medgen.data import stage
copy, done = stage._copy, []
def copy_some(source, target, parts):
    if len(done) == 4:  # as if in the midst of a file
        (parts / "0123").write_bytes(source.read_bytes()[:100])
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(source)
    return copy(source, target, parts)
stage._copy = copy_some
stage.stage_datalist({str(source / "datalist.json")!r}, {str(tmp_path / "disk")!r}, threads=1)
"""
    killed = subprocess.run([sys.executable, "-c", program], check=False)

    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "disk/datalist.json").exists()
    assert (tmp_path / "disk" / module.PARTS).exists()
    staged = stage_datalist(source / "datalist.json", tmp_path / "disk")
    there = COUNTS["validation"] + 1 + 4
    assert staged.copied == staged.files - there
    expected = content(source)
    del expected["images/other.png"]
    assert content(tmp_path / "disk") == expected
    assert not (tmp_path / "disk" / module.PARTS).exists()


def test_processes_of_one_node_copy_once(source, tmp_path, monkeypatch):
    copy, copies, begun, go_on = module._copy, [], threading.Event(), threading.Event()

    def tell(line, **_):
        if line.endswith("this one waits for it"):
            go_on.set()

    def slow(*paths):
        begun.set()
        assert go_on.wait(60)
        copies.append(paths)
        return copy(*paths)

    monkeypatch.setattr(module, "_copy", slow)
    monkeypatch.setattr(module, "print", tell, raising=False)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(stage_datalist, source / "datalist.json", tmp_path / "disk")
        begun.wait(60)
        second = pool.submit(stage_datalist, source / "datalist.json", tmp_path / "disk")

    assert first.result().copied == first.result().files == len(copies)
    assert second.result().copied == 0


@pytest.mark.parametrize("path", ["/etc/hostname", "../secret.png", "images/../../secret.png", "C:\\secret.png"])
@pytest.mark.parametrize("field", ["image", "mask"])
def test_path_that_leaves_the_data_set_is_refused_before_anything_is_written(source, tmp_path, path, field):
    (source.parent / "secret.png").write_bytes(b"secret")
    item = {"image": "images/test/0.png", "patient": "p", field: path}
    (source / "datalist.json").write_text(json.dumps({"training": [item]}))

    with pytest.raises(UserError, match=rf"{field} must be a path below the dataset's folder") as error:
        stage_datalist(source / "datalist.json", tmp_path / "disk")

    assert "\n" not in str(error.value)
    assert not (tmp_path / "disk").exists()


def test_link_in_the_target_leads_nothing_out_of_it(source, tmp_path):
    (tmp_path / "disk/images").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "disk/images/training").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(UserError, match="leads out of --target"):
        stage_datalist(source / "datalist.json", tmp_path / "disk")

    assert not list((tmp_path / "elsewhere").iterdir())
    assert not (tmp_path / "disk/datalist.json").exists()


def test_link_in_the_place_of_a_file_is_replaced_and_its_end_left_alone(source, tmp_path):
    (tmp_path / "disk/masks").mkdir(parents=True)
    shutil.copy2(source / "masks/one.png", tmp_path / "victim")
    (tmp_path / "disk/masks/one.png").symlink_to(tmp_path / "victim")
    (source / "masks/one.png").write_bytes(b"new")

    stage_datalist(source / "datalist.json", tmp_path / "disk")

    assert not (tmp_path / "disk/masks/one.png").is_symlink()
    assert (tmp_path / "disk/masks/one.png").read_bytes() == b"new"
    assert len((tmp_path / "victim").read_bytes()) > 3


def test_disk_that_is_too_small_is_one_line_with_both_numbers(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10_000))

    with pytest.raises(UserError, match=r"15 of 15 files need 0\.1 MB in .*, 0\.0 MB are free; choose a --target"):
        stage_datalist(source / "datalist.json", tmp_path / "disk")

    assert not list((tmp_path / "disk").rglob("*.png"))


def test_disk_that_is_too_small_for_more_splits_keeps_those_that_are_there(source, tmp_path, monkeypatch):
    staged = stage_datalist(source / "datalist.json", tmp_path / "disk", ["training"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10_000))

    with pytest.raises(UserError, match="choose a --target on a larger disk"):
        stage_datalist(source / "datalist.json", tmp_path / "disk")

    assert len(load_datalist(staged.datalist, "training")) == COUNTS["training"]


def _without_a_file(source, target):
    (source / "images/test/1.png").unlink()
    return {}


def _folder_for_a_file(source, target):
    (source / "images/test/1.png").unlink()
    (source / "images/test/1.png").mkdir()
    return {}


def _unknown_split(source, target):
    return {"splits": ["training", "tset"]}


def _own_folder(source, target):
    target.symlink_to(source)
    return {}


def _file_as_target(source, target):
    target.touch()
    return {}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without_a_file, r"images/test/1\.png is no file that can be read \(1 of 15 are not\); set --dataset_dir"),
        (_folder_for_a_file, r"images/test/1\.png is no file that can be read"),
        (_unknown_split, "--splits must be of training, validation, test of .*, got tset"),
        (_own_folder, "--target must be another folder than the data set's"),
        (_file_as_target, "--target must be a folder that can be written to"),
    ],
)
def test_what_cannot_be_staged_is_one_line_and_leaves_the_source_alone(source, tmp_path, spoil, message):
    options = spoil(source, tmp_path / "disk")
    before = content(source)

    with pytest.raises(UserError, match=message) as error:
        stage_datalist(source / "datalist.json", tmp_path / "disk", **options)

    assert "\n" not in str(error.value)
    assert content(source) == before
    assert not (tmp_path / "disk").is_dir() or not (tmp_path / "disk/datalist.json").exists() or spoil is _own_folder


def test_file_that_changes_while_it_is_copied_is_copied_again_and_given_up_after_some_times(
    source, tmp_path, monkeypatch
):
    copyfile, times = shutil.copyfile, []

    def restless(path, part, until=2):
        copyfile(path, part)
        if Path(path).name == "one.png" and len(times) < until:
            times.append(path)
            Path(path).write_bytes(b"x" * (50 + len(times)))

    monkeypatch.setattr(shutil, "copyfile", restless)
    stage_datalist(source / "datalist.json", tmp_path / "disk")
    assert (tmp_path / "disk/masks/one.png").read_bytes() == b"x" * 52

    (source / "masks/one.png").write_bytes(b"again")
    monkeypatch.setattr(shutil, "copyfile", lambda path, part: restless(path, part, until=99))
    with pytest.raises(UserError, match=r"one\.png changes while it is copied"):
        stage_datalist(source / "datalist.json", tmp_path / "disk")
    assert not (tmp_path / "disk/datalist.json").exists()


def test_latents_are_staged_in_the_place_of_the_images_and_load_as_before(source, tmp_path):
    latents, weights = tmp_path / "latents", tmp_path / "autoencoder.pt"
    weights.write_bytes(b"weights")
    for splits in (["validation"], ["training"]):
        store = LatentStore(
            latents, source / "datalist.json", splits, None, weights, (2, 3, 3), "digest", shard_size=4, resume=True
        )
        store.begin()
        for item in store.todo:
            store.add(item["number"], np.random.default_rng(item["number"]).random((1, 2, 2, 3, 3)))
        store.finish()

    staged = stage_datalist(source / "datalist.json", tmp_path / "disk", ["training"], latents_dir=latents)

    before = load_latents(latents, source / "datalist.json", "training", autoencoder_path=weights)
    after = load_latents(tmp_path / "disk/latents", staged.datalist, "training", autoencoder_path=weights)
    assert not (tmp_path / "disk/images").exists()
    for old, new in zip(before, after, strict=True):
        assert new["latent"]["row"] == old["latent"]["row"]
        assert Path(new["latent"]["file"]).read_bytes() == Path(old["latent"]["file"]).read_bytes()
    assert {path.name for path in latents.iterdir() if path.name[0] != "."} - {
        path.name for path in (tmp_path / "disk/latents").iterdir()
    } == {"00000.npy", "00000.json"}  # of the validation split
    with pytest.raises(UserError, match=r"has no latents of images/test/0\.png"):
        stage_datalist(source / "datalist.json", tmp_path / "disk", latents_dir=latents)
    with pytest.raises(UserError, match="must be another folder than the data set's"):
        stage_datalist(source / "datalist.json", source, ["training"], latents_dir=latents)


def test_command_says_what_is_needed_and_how_fast_it_was(source, tmp_path):
    options = ["stage", str(source / "datalist.json"), "--target", str(tmp_path / "disk")]
    runs = [CliRunner().invoke(cli.app, [*options, "--splits", "training, test"]) for _ in range(2)]

    first, second = (run.stdout.splitlines() for run in runs)
    assert [run.exit_code for run in runs] == [0, 0]
    assert first[0].startswith("13 of 13 files need 0.1 MB in ")
    assert first[0].endswith(" MB are free")
    assert first[1].startswith("staged 13 files, 13 of them copied now: 0.0 MB in ")
    assert " MB/s; datalist: " in first[1]
    assert second == [second[0]]
    assert second[0].startswith("staged 13 files, 0 of them copied now: 0.0 MB in ")
    assert second[0].endswith(f" s; datalist: {tmp_path / 'disk/datalist.json'}")


def test_command_imports_no_framework():
    code = "import sys, medgen.data.stage; sys.exit(bool({'torch', 'monai', 'mlflow'} & set(sys.modules)))"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
