"""Shards of preprocessing: any of them, killed or twice at once, then merged, are what one process writes."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medgen.data.phantom.layouts import PhantomSpec, write_phantom
from medgen.errors import UserError
from medgen.preemption import AGAIN
from preprocessing import _convert as c
from preprocessing import chestxray14, corrupt, images, liver_ct, masks, mimic_cxr, rsna

REPO = Path(__file__).parents[2]
FEW = 2  # files that a process finishes before it is killed
ONE_READER = threading.Lock()  # pydicom's warnings, which tell what is wrong with a file, are those of a whole process


def _picture(path, number, side=40):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (side, side + 4), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def _tree(target):
    """Content of every file of a target but the journals, the state of MIMIC-CXR's steps included."""
    return {
        path.relative_to(target).as_posix(): path.read_bytes()
        for path in sorted(target.rglob("*"))
        if path.is_file() and not path.name.startswith(".journal")
    }


def _pool(todo, settings, target, workers, record):
    """Convert in this process: the start of others takes most of a small run's time."""
    for job in todo:
        with ONE_READER:
            outcome = c.convert_file(job, settings, target)
        record(outcome)


def _hiccup(todo, settings, target, workers, record):
    """As on a volume that does not answer for the first file."""
    _pool(todo[1:], settings, target, workers, record)
    record(c.Outcome(todo[0].file, reason="Input/output error", final=False))


def _killed_pool(todo, settings, target, workers, record):
    """As a process that is killed: some files are done, the next is half written."""
    _pool(todo[:FEW], settings, target, workers, record)
    (Path(target) / c.PARTS / "0123456789abcdef.png").write_bytes(b"\x89PNG")
    raise KeyboardInterrupt


# ---------------------------------------------------------------------------------------------------------------------
# the commands, each with files that are rejected among many that are not


def _of_images(root):
    for number in range(11):
        _picture(root / f"s/p{number}.png", number)
    (root / "s/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (root / "s/note.txt").write_text("no image")
    (root / "s/p1.bmp").write_bytes((root / "s/p1.png").read_bytes())  # meets another's name
    return images.app, ["--source", root / "s", "--size", 16], 3


def _of_chestxray14(root):
    names = [f"{patient:08d}_{number:03d}.png" for patient in range(1, 6) for number in range(2)]
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position"
    rows = [f"{name},No Finding,0,{int(name[:8])},050Y,F,PA" for name in (*names, "00000009_000.png")]
    for number, name in enumerate(names):
        _picture(root / f"s/images_{number % 3:03d}/images/{name}", number)
    (root / "s/Data_Entry_2017.csv").write_text("\n".join([header, *rows]) + "\n")
    (root / f"s/images_000/images/{names[3]}").write_bytes(b"\x89PNG\r\n\x1a\n")
    return chestxray14.app, ["--source", root / "s", "--size", 16], 3


def _of_mimic(root):
    write_phantom("mimic-cxr", root / "s", PhantomSpec(patients=5, images_per_patient=2, size=32, seed=2))
    broken, *_ = sorted((root / "s").rglob("*.jpg"))
    broken.write_bytes(b"\xff\xd8\xff")
    return mimic_cxr.app, ["organise", "--source", root / "s", "--size", 32], 3


def _of_mimic_reports(root):
    write_phantom("mimic-cxr", root / "s", PhantomSpec(patients=8, images_per_patient=2, size=32, seed=2))
    return mimic_cxr.app, ["sections", "--source", root / "s"], 0


def _of_liver(root):
    write_phantom("liver_ct", root / "s", PhantomSpec(patients=6, size=32, seed=2))
    series = next(path.parent for path in sorted((root / "s").rglob("*.dcm")))
    sorted(series.iterdir())[3].unlink()  # a slice is missing
    return liver_ct.app, ["--source", root / "s/images", "--size", 16], 3


def _of_rsna(root):
    write_phantom("rsna", root / "s", PhantomSpec(patients=9, size=32, seed=2))
    broken, *_ = sorted((root / "s").rglob("*.dcm"))
    broken.write_bytes(broken.read_bytes()[:-200])
    return rsna.app, ["organise", "--source", root / "s", "--size", 32], 3


def _of_rsna_crop(root):
    app, options, _ = _of_rsna(root)
    c.main(app, [str(part) for part in (*options, "--target", root / "organised", "--workers", 1)])
    content = json.loads((root / "organised/datalist.json").read_text())
    rows = [f"{item['image']},4,5,{20 + number},30" for number, item in enumerate(content["all"])]
    rows[2] = rows[2].rpartition(",")[0] + ",99"  # leaves the image
    (root / "boxes.csv").write_text("\n".join(["image,top,left,bottom,right", *rows[:-1]]) + "\n")
    return app, ["crop", "--source", root / "organised", "--boxes", root / "boxes.csv", "--size", 16], 3


def _of_corrupt(root):
    _of_images(root)
    (root / "s/black.png").write_bytes((root / "s/p1.png").read_bytes()[:60])
    return corrupt.app, ["--source", root / "s", "--kind", "noise", "--kind", "disc", "--keep-originals"], 3


COMMANDS = [_of_images, _of_chestxray14, _of_mimic, _of_mimic_reports, _of_liver, _of_rsna, _of_rsna_crop, _of_corrupt]


@pytest.mark.parametrize("make", COMMANDS, ids=lambda make: make.__name__.removeprefix("_of_"))
def test_shards_killed_doubled_and_of_other_numbers_merge_to_the_bytes_of_one_process(make, tmp_path, monkeypatch):
    app, options, code = make(tmp_path)
    one, shards = tmp_path / "one/target", tmp_path / "shards/target"  # some data sets are named after the folder

    def run(target, *more, pool=_pool):
        monkeypatch.setattr(c, "_pool", pool)
        return c.main(app, [str(part) for part in (*options, "--target", target, "--workers", 1, *more)])

    def times():
        return {path: path.stat().st_mtime_ns for path in shards.rglob("*") if path.is_file()}

    assert run(one) == code
    assert run(shards, "--shard", "0/3", pool=_killed_pool) == c.INTERRUPTED
    with ThreadPoolExecutor() as threads:  # another shard, and the killed one twice, at once
        several = [threads.submit(run, shards, "--shard", shard) for shard in ("1/3", "0/3", "0/3")]
    codes = {future.result() for future in several}
    codes.add(run(shards, "--shard", "1/2"))
    before = times()
    codes |= {run(shards, "--shard", "0/3"), run(shards, "--shard", "1/2")}

    assert codes <= {0, 3}
    assert {path: time for path, time in times().items() if ".journal" not in path.name} == {
        path: time for path, time in before.items() if ".journal" not in path.name
    }
    assert not [path for path in before if path.suffix == ".csv" or path.name in ("datalist.json", ".organise.json")]
    done = [path for path in before if c.PARTS not in path.parts and ".journal" not in path.name]
    assert 0 < len(done) < len(_tree(one))
    assert run(shards) == code
    assert _tree(shards) == _tree(one)
    assert {path.name for path in shards.rglob(".journal*")} == {c.JOURNAL}
    assert not list(shards.rglob(c.PARTS))


@pytest.mark.parametrize("make", COMMANDS, ids=lambda make: make.__name__.removeprefix("_of_"))
def test_file_that_may_be_read_another_time_is_no_success_of_any_command(make, tmp_path, monkeypatch, capsys):
    app, options, code = make(tmp_path)
    capsys.readouterr()

    def run(*more, pool=_hiccup):
        monkeypatch.setattr(c, "_pool", pool)
        return c.main(app, [str(part) for part in (*options, "--target", tmp_path / "t", "--workers", 1, *more)])

    assert run("--shard", "0/2") == AGAIN == 75
    assert "error: 1 files may be converted another time, the first is " in capsys.readouterr().err
    assert run() == AGAIN
    assert "(Input/output error); run the same command again" in capsys.readouterr().err
    assert run("--shard", "0/2", pool=_pool) in (0, 3)
    assert run(pool=_pool) == code


def test_disk_error_of_one_file_ends_with_again_and_the_next_run_with_success(tmp_path, monkeypatch):
    monkeypatch.setattr(c, "_pool", _pool)
    for number in range(3):
        _picture(tmp_path / f"s/p{number}.png", number)
    options = ["--source", str(tmp_path / "s"), "--target", str(tmp_path / "t"), "--size", "16"]
    read = c.read_frames

    def flaky(path, **settings):
        if str(path).endswith("p1.png"):
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(path, **settings)

    monkeypatch.setattr(c, "read_frames", flaky)
    assert c.main(images.app, options) == AGAIN
    assert (tmp_path / "t/rejected.csv").read_text() == "file,reason\np1.png,Stale file handle\n"
    monkeypatch.setattr(c, "read_frames", read)
    assert c.main(images.app, options) == 0


@pytest.mark.parametrize("shard", [None, "0/1"])
@pytest.mark.parametrize("moment", ["begin", "line", "end"])
def test_full_disk_under_a_journal_is_one_line(moment, shard, tmp_path, monkeypatch, capsys):
    _picture(tmp_path / "s/p.png", 0)
    options = ["--source", str(tmp_path / "s"), "--target", str(tmp_path / "t"), "--size", "16"]
    c.prepare_target(tmp_path / "s", tmp_path / "t", c.Settings("images", 16))

    def full(path, mode="r", **more):
        if mode != "a":
            return open(path, mode, **more)
        if moment == "begin":
            raise OSError(errno.ENOSPC, "No space left on device")
        # a network disk may take a line, and say when the file is closed that it could not
        return open("/dev/full", mode, encoding="utf-8", buffering=1 if moment == "line" else -1)

    monkeypatch.setattr(c, "_pool", _pool)
    monkeypatch.setattr(c, "open", full, raising=False)
    code = c.main(images.app, [*options, *(("--shard", shard) if shard else ())])

    assert code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.endswith("jsonl cannot be written (No space left on device); mend that and run the same command again")


def test_merge_says_what_the_shards_have_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(c, "_pool", _pool)
    for number in range(5):
        _picture(tmp_path / f"s/p{number}.png", number)
    options = ["--source", str(tmp_path / "s"), "--size", "16", "--target"]

    assert c.main(images.app, [*options, str(tmp_path / "alone")]) == 0
    assert "note: the shards" not in capsys.readouterr().err
    for shard in ("0/3", "2/3"):
        assert c.main(images.app, [*options, str(tmp_path / "t"), "--shard", shard]) == 0
    assert c.main(images.app, [*options, str(tmp_path / "t")]) == 0
    assert "note: the shards have left 2 of 5 files undone; this process does them now." in capsys.readouterr().err


def test_shards_of_sentences_merge_into_the_datalist_that_one_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(c, "_pool", _pool)
    write_phantom("mimic-cxr", tmp_path / "s", PhantomSpec(patients=5, images_per_patient=2, size=32, seed=2))

    def run(target, step, *more):
        options = [step, "--source", tmp_path / "s", "--target", tmp_path / target, *more]
        return c.main(mimic_cxr.app, [str(part) for part in options])

    for step in ("organise", "create-ids", "sections"):
        assert run("one", step) in (0, 3)
    shutil.copytree(tmp_path / "one", tmp_path / "shards")
    before = (tmp_path / "shards/datalist.json").read_bytes()
    monkeypatch.setattr(c, "_pool", _hiccup)
    assert run("one", "sentences") == AGAIN
    monkeypatch.setattr(c, "_pool", _pool)
    code = run("one", "sentences")

    assert {run("shards", "sentences", "--shard", shard) for shard in ("1/3", "0/2")} == {0}
    assert (tmp_path / "shards/datalist.json").read_bytes() == before
    assert run("shards", "sentences") == code
    assert _tree(tmp_path / "shards") == _tree(tmp_path / "one")


def test_shards_of_masks_merge_to_the_bytes_of_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(c, "_pool", _pool)
    for number in range(9):
        _picture(tmp_path / f"s/p{number}.png", number)
        _picture(tmp_path / f"masks/p{number}.png", 100 + number, side=80 if number == 4 else 40)
    (tmp_path / "masks/p7.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "masks/p8.png").unlink()
    for target in ("one", "shards"):
        assert c.main(images.app, ["--source", str(tmp_path / "s"), "--target", str(tmp_path / target)]) == 0

    def run(target, *more):
        options = ["--target", tmp_path / target, "--masks", tmp_path / "masks", "--workers", 1, *more]
        return c.main(masks.app, [str(part) for part in options])

    monkeypatch.setattr(c, "_pool", _hiccup)
    assert run("one") == AGAIN
    monkeypatch.setattr(c, "_pool", _pool)
    assert run("one") == 3
    assert {run("shards", "--shard", f"{number}/3") for number in (0, 1)} <= {0, 3}
    assert not (tmp_path / "shards/datalist_masks.json").exists()
    assert run("shards") == 3
    assert _tree(tmp_path / "shards") == _tree(tmp_path / "one")
    with open(tmp_path / "shards/rejected_masks.csv", newline="") as file:
        assert {row["file"] for row in csv.DictReader(file)} == {f"images/p{number}.png" for number in (4, 7, 8)}


def test_mask_that_comes_later_is_united_and_one_that_goes_is_taken_back(tmp_path, monkeypatch):
    monkeypatch.setattr(c, "_pool", _pool)
    _picture(tmp_path / "s/p.png", 0)
    for folder in ("left", "right"):
        _picture(tmp_path / folder / "other.png", 2)
    _picture(tmp_path / "left/p.png", 0)
    c.main(images.app, ["--source", str(tmp_path / "s"), "--target", str(tmp_path / "t"), "--size", "40"])

    def inside():
        folders = ["--masks", str(tmp_path / "left"), "--masks", str(tmp_path / "right")]
        c.main(masks.app, ["--target", str(tmp_path / "t"), *folders])
        return (np.asarray(Image.open(tmp_path / "t/masks/p.png")) > 0).sum()

    alone = inside()
    right = np.zeros((40, 44), np.uint8)
    right[:, :22] = 255
    Image.fromarray(right).save(tmp_path / "right/p.png")
    both = inside()
    (tmp_path / "right/p.png").unlink()

    assert both > alone
    assert inside() == alone


# ---------------------------------------------------------------------------------------------------------------------
# processes that share a target


def test_processes_that_are_killed_at_once_lose_their_own_files_only(tmp_path):
    """Two shards as processes with their pools, one of them killed by SIGKILL in the middle."""
    pixels = np.random.default_rng(0).integers(0, 256, (700, 700), dtype=np.uint8)
    (tmp_path / "s").mkdir()
    for number in range(40):
        Image.fromarray(np.roll(pixels, number)).save(tmp_path / f"s/p{number}.png")
    command = [sys.executable, "-m", "preprocessing.images", "--source", tmp_path / "s", "--size", "256"]
    command = [str(part) for part in (*command, "--target", tmp_path / "t", "--workers", 1)]

    def start(shard):
        return subprocess.Popen([*command, "--shard", shard], cwd=REPO, stdout=subprocess.PIPE, text=True)

    def lines_of(shard):
        files = (tmp_path / "t").glob(f".journal.{shard}-of-2.*.jsonl")
        return sum(file.read_text().count("\n") for file in files)

    killed, other = start("0/2"), start("1/2")
    while killed.poll() is None and lines_of(0) < FEW:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    said = other.communicate()[0]
    done = lines_of(0)
    again = start("0/2")
    again.communicate()

    assert (other.returncode, again.returncode) == (0, 0)
    assert said.startswith("shard 1/2: 20 files are done, 0 of them rejected; ")
    assert FEW <= done <= 20
    assert lines_of(0) == lines_of(1) == 20
    assert c.main(images.app, [*command[3:]]) == 0
    assert len(json.loads((tmp_path / "t/datalist.json").read_text())["training"]) == 32


def test_terminated_run_is_interrupted_as_by_ctrl_c(tmp_path, monkeypatch, capsys):
    _picture(tmp_path / "s/p.png", 0)
    monkeypatch.setattr(c, "_pool", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)

    assert c.main(images.app, ["--source", str(tmp_path / "s"), "--target", str(tmp_path / "t")]) == c.INTERRUPTED

    assert "the same command again goes on from here" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_job_passes_sigterm_on_and_takes_rejected_files_alone_for_success():
    job = ["bash", str(REPO / "cluster/accept_rejected.sh")]
    codes = [subprocess.run([*job, "bash", "-c", f"exit {code}"], check=False).returncode for code in (0, 1, 3, AGAIN)]
    assert codes == [0, 1, 0, AGAIN]

    program = """
import sys, time
def step():
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        time.sleep(0.5)
        print("finished", flush=True)
from preprocessing import _convert as c
sys.exit(c.main(c.new_app(step, "A step.")))
"""
    process = subprocess.Popen([*job, sys.executable, "-c", program], cwd=REPO, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == "finished\n"
    assert process.returncode == c.INTERRUPTED


@pytest.mark.parametrize("links", [True, False])
def test_many_may_prepare_an_empty_target_at_once_with_the_same_settings_only(tmp_path, monkeypatch, links):
    if not links:  # as on some network disks
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError()))
    (tmp_path / "s").mkdir()
    many = 8
    for attempt in range(5):
        target, barrier = tmp_path / f"t{attempt}", threading.Barrier(many)

        def prepare(size, target=target, barrier=barrier):
            barrier.wait()
            try:
                c.prepare_target(tmp_path / "s", target, c.Settings("x", size))
            except UserError as error:
                return str(error)
            return ""

        with ThreadPoolExecutor(many) as threads:
            said = list(threads.map(prepare, [16] * many))
            if links:
                other = list(threads.map(prepare, [32, 16] * (many // 2)))

        assert said == [""] * many
        assert not links or (set(other[1::2]) == {""} and all("size 16 (now 32)" in text for text in other[::2]))
        assert sorted(path.name for path in target.iterdir()) == [c.JOURNAL, c.PARTS, "images"]


def test_unfinished_file_that_a_merge_clears_away_is_written_again(tmp_path):
    (tmp_path / c.PARTS).mkdir()
    saved = []

    def save(part):
        saved.append(part)
        part.write_text("whole")
        if len(saved) == 1:
            c.clear_parts(tmp_path)

    assert c.write_whole(tmp_path, "images/a.png", save) == 5
    assert (tmp_path / "images/a.png").read_text() == "whole"
    assert len({*saved}) == 1 < len(saved)


def test_shard_leaves_other_shards_unfinished_files_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(c, "_pool", _pool)
    _picture(tmp_path / "s/p.png", 0)
    part = tmp_path / "t" / c.PARTS / "of-another.png"
    c.prepare_target(tmp_path / "s", tmp_path / "t", c.Settings("images", 16))
    part.write_bytes(b"half")
    options = ["--source", str(tmp_path / "s"), "--target", str(tmp_path / "t"), "--size", "16"]

    assert c.main(images.app, [*options, "--shard", "0/1"]) == 0

    assert part.read_bytes() == b"half"


def test_source_that_changed_after_its_shard_is_converted_again_and_its_old_images_go(tmp_path, monkeypatch):
    monkeypatch.setattr(c, "_pool", _pool)
    frames = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (20, 20), dtype=np.uint8)) for n in range(3)]
    (tmp_path / "s").mkdir()
    frames[0].save(tmp_path / "s/x.tif", save_all=True, append_images=frames[1:])
    _picture(tmp_path / "s/y.png", 0)
    options = ["--source", str(tmp_path / "s"), "--size", "20"]
    for shard in ("0/2", "1/2"):
        assert c.main(images.app, [*options, "--target", str(tmp_path / "t"), "--shard", shard]) == 0
    assert len(list((tmp_path / "t/images").iterdir())) == 4

    frames[0].save(tmp_path / "s/x.tif")
    (tmp_path / "s/y.png").unlink()
    for target in ("t", "fresh"):
        assert c.main(images.app, [*options, "--target", str(tmp_path / target)]) == 0

    assert _tree(tmp_path / "t") == _tree(tmp_path / "fresh")


def test_journals_are_no_images_and_may_be_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(c, "_pool", _pool)
    for number in range(4):
        _picture(tmp_path / f"s/p{number}.png", number)
    options = ["--source", str(tmp_path / "s"), "--target", str(tmp_path / "t"), "--size", "16"]
    c.main(images.app, [*options, "--shard", "0/2"])
    (journal,) = (tmp_path / "t").glob(c.SHARD_JOURNALS)
    lines = journal.read_bytes().splitlines()
    journal.write_bytes(lines[0] + b"\n" + lines[1])  # a line whose end is missing, and one of no text
    shutil.copy(journal, journal.with_name(".journal.0-of-2.copy.jsonl"))
    journal.write_bytes(b"\xff\xfe\x00\n" + journal.read_bytes())

    assert c.main(images.app, options) == 0

    files = [json.loads(line)["file"] for line in (tmp_path / "t" / c.JOURNAL).read_text().splitlines()[1:]]
    assert sorted(files) == [f"p{number}.png" for number in range(4)]


@pytest.mark.parametrize("shard", ["3/3", "-1/3", "1", "1/0", "a/b", "0/3/4"])
def test_shard_that_is_none_is_a_usage_error(tmp_path, capsys, shard):
    _picture(tmp_path / "s/p.png", 0)

    code = c.main(images.app, ["--source", str(tmp_path / "s"), "--target", str(tmp_path / "t"), f"--shard={shard}"])

    assert code == 2
    assert "must be i/n with i from 0 to n - 1" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


def test_more_shards_than_files_are_empty_and_no_mistake(tmp_path, capsys):
    _picture(tmp_path / "s/p.png", 0)
    options = ["--source", str(tmp_path / "s"), "--target", str(tmp_path / "t")]

    assert c.main(images.app, [*options, "--shard", "5/9"]) == 0

    assert capsys.readouterr().out.startswith("shard 5/9: 0 files are done")
    assert not list((tmp_path / "t").glob(c.SHARD_JOURNALS))
