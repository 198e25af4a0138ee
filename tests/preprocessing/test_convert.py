"""The machinery that all preprocessing commands share: pixels, names, journal, pool."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage.transform import resize as skimage_resize

from medgen.errors import UserError
from preprocessing import _convert as c
from preprocessing import images

REPO = Path(__file__).parents[2]


def _smooth(height, width, seed=0):
    """(height, width) float32 in [0, 1] without steep edges."""
    coarse = np.random.default_rng(seed).random((8, 8), dtype=np.float32)
    fine = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(fine), 0, 1)


def _save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((pixels * 255).round().astype(np.uint8)).save(path)


def _run(*arguments):
    # one worker unless the test says so: each costs the start of an interpreter
    workers = () if "--workers" in arguments else ("--workers", 1)
    return c.main(images.app, [str(argument) for argument in (*arguments, *workers)])


def _tree(target):
    """Content of every visible file of a target."""
    return {
        str(path.relative_to(target)): path.read_bytes()
        for path in sorted(target.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


# ---------------------------------------------------------------------------------------------------------------------
# pixels


@pytest.mark.parametrize(
    ("fit", "shape", "expected"),
    [
        ("shorter", (100, 150), (64, 96)),
        ("shorter", (40, 30), (85, 64)),
        ("pad", (100, 150), (64, 64)),
        ("crop", (100, 150), (64, 64)),
    ],
)
@pytest.mark.parametrize(("bits", "mode"), [(8, np.uint8), (16, np.uint16)])
def test_size_and_depth_follow_the_settings(fit, shape, expected, bits, mode):
    image = np.asarray(c.render(_smooth(*shape), c.Settings("x", 64, fit, bits)))

    assert (image.shape, image.dtype) == (expected, mode)


def test_shrinking_agrees_with_an_antialiased_resize_of_scikit_image():
    pixels = _smooth(200, 300)

    got = np.asarray(c.render(pixels, c.Settings("x", 50, bits=16))) / 65535

    expected = skimage_resize(pixels, (50, 75), order=1, anti_aliasing=True)
    assert np.abs(got - expected)[2:-2, 2:-2].max() < 0.01


def test_fine_stripes_shrink_to_their_mean_instead_of_aliasing():
    pixels = np.zeros((512, 512), np.float32)
    pixels[:, ::2] = 1
    pixels[:8] = 0  # so that the result is not constant

    got = np.asarray(c.render(pixels, c.Settings("x", 60)))

    assert np.abs(got[4:].astype(int) - 128)[:, 2:-2].max() <= 8


@pytest.mark.parametrize(("bits", "top"), [(8, 255), (16, 65535)])
def test_every_value_survives_when_the_size_fits_already(bits, top):
    values = np.arange(top + 1).reshape(16, -1) if bits == 8 else np.arange(top + 1).reshape(256, 256)
    pixels = values.astype(np.float32) / np.float32(top)

    got = np.asarray(c.render(pixels, c.Settings("x", values.shape[0], bits=bits)))

    np.testing.assert_array_equal(got, values)


def test_crop_keeps_the_centre_and_pad_adds_black_on_both_sides():
    pixels = np.zeros((20, 40), np.float32)
    pixels[:, 18:22] = 1
    pixels[0, 20] = 0.5

    cropped = np.asarray(c.render(pixels, c.Settings("x", 20, "crop")))
    padded = np.asarray(c.render(pixels, c.Settings("x", 40, "pad")))

    np.testing.assert_array_equal(cropped, (pixels[:, 10:30] * 255 + 0.5).astype(np.uint8))
    np.testing.assert_array_equal(padded[10:30], (pixels * 255 + 0.5).astype(np.uint8))
    assert not padded[:10].any()
    assert not padded[30:].any()


def test_channels_are_weighted_as_by_pillow_repeated_or_kept():
    colour = np.stack([_smooth(32, 32, seed) for seed in range(3)], axis=-1)
    eight = (colour * 255).round().astype(np.uint8)

    grey = np.asarray(c.render(eight / np.float32(255), c.Settings("x", 32, channels="grey")))
    kept = np.asarray(c.render(eight / np.float32(255), c.Settings("x", 32, channels="keep", bits=16)))
    repeated = np.asarray(c.render(colour[..., 0], c.Settings("x", 32, channels="rgb")))

    assert np.abs(grey.astype(int) - np.asarray(Image.fromarray(eight).convert("L"))).max() <= 1
    np.testing.assert_array_equal(kept, eight)
    np.testing.assert_array_equal(repeated[..., 0], repeated[..., 2])


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.zeros((20, 20), np.float32), "same value"),
        (np.full((20, 20, 3), 0.3, np.float32), "same value"),
        (np.where(np.eye(20) > 0, 1e-4, 0).astype(np.float32), "same value in the PNG"),
        (np.where(np.eye(20) > 0, np.nan, 0.5).astype(np.float32), "not finite"),
        (_smooth(10, 200), r"200×10 \(at most 1:8"),
    ],
)
def test_unusable_pictures_are_refused_with_a_reason(pixels, reason):
    with pytest.raises(c._RejectedError, match=reason):
        c.render(pixels, c.Settings("x", 20))


# ---------------------------------------------------------------------------------------------------------------------
# names


def test_no_two_files_share_a_name():
    files = ["a/x.png", "a/x.jpg", "a/X.dcm", "a/x.jpg.png", "b/x.png", "y.frame0001.png", "y.dcm", "1.2.3", "1.2.4"]

    stems = [job.stem for job in c.make_jobs(Path("s"), files)]

    assert stems[:4] == ["a/x.png", "a/x.jpg-" + stems[1][-12:], "a/X.dcm", "a/x.jpg-" + stems[3][-12:]]
    assert stems[4:] == ["b/x", "y.frame0001.png", "y", "1.2.3", "1.2.4"]
    assert len({stem.casefold() for stem in stems}) == len(files)


@pytest.mark.parametrize(
    "name",
    ["../../../../escaped/evil.png", "/evil.png", "a/../../b.png", "a\\..\\..\\b.png", "\\\\host\\b", "a\0b.png"],
)
def test_name_that_would_leave_the_target_is_refused(name):
    with pytest.raises(UserError, match=r"^evil\.jpg would be written outside of the target"):
        c.make_jobs(Path("s"), ["good.png", "evil.jpg"], ["good.png", name])


def test_name_with_two_dots_inside_stays_usable():
    assert [job.stem for job in c.make_jobs(Path("s"), ["a..b/c..d.png", "..."])] == ["a..b/c..d", "..."]


def test_names_that_are_too_long_or_no_utf8_are_made_safe():
    files = ["a" * 240 + ".png", "a" * 241 + ".png", os.fsdecode(b"caf\xe9.png")]

    jobs = c.make_jobs(Path("s"), files)

    assert all(len(job.stem.encode()) < 210 for job in jobs)
    assert len({job.stem for job in jobs}) == 3
    assert (jobs[2].stem, jobs[2].path) == ("caf\\xe9", "s/" + files[2])


def test_colliding_sources_give_two_images(tmp_path):
    _save(tmp_path / "source/x.png", _smooth(20, 20, 1))
    _save(tmp_path / "source/x.bmp", _smooth(20, 20, 2))
    _save(tmp_path / "source/y.png", _smooth(20, 20, 3))

    code = _run("--source", tmp_path / "source", "--target", tmp_path / "target", "--size", 20)

    assert code == 0
    for name in ("x.png", "x.bmp", "y.png"):
        written = tmp_path / "target/images" / (name + ".png" if name[0] == "x" else "y.png")
        np.testing.assert_array_equal(
            np.asarray(Image.open(written)), np.asarray(Image.open(tmp_path / "source" / name))
        )


# ---------------------------------------------------------------------------------------------------------------------
# journal


@pytest.fixture
def source(tmp_path):
    for number in range(12):
        _save(tmp_path / f"source/p{number}.png", _smooth(40, 50, number))
    (tmp_path / "source/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return tmp_path / "source"


def test_result_is_the_same_for_any_number_of_workers(source, tmp_path):
    for workers in (1, 3):
        _run("--source", source, "--target", tmp_path / f"t{workers}", "--size", 16, "--workers", workers)

    assert _tree(tmp_path / "t1") == _tree(tmp_path / "t3")
    assert len(_tree(tmp_path / "t1")) == 12 + 2


def test_second_run_redoes_only_what_changed(source, tmp_path, monkeypatch):
    target = tmp_path / "target"
    arguments = ("--source", source, "--target", target, "--size", 16, "--workers", 1)
    _run(*arguments)
    before = {path.name: path.stat().st_mtime_ns for path in target.rglob("p*.png")}
    _save(source / "p1.png", _smooth(40, 50, 99))  # changed
    (source / "p2.png").unlink()  # gone
    _save(source / "p77.png", _smooth(40, 50, 77))  # new
    (target / "images/p3.png").write_bytes(b"")  # lost in a crash of the machine

    code = _run(*arguments)

    after = {path.name: path.stat().st_mtime_ns for path in target.rglob("p*.png")}
    assert code == 3
    assert {name for name in after if before.get(name) != after[name]} == {"p1.png", "p3.png", "p77.png"}
    listed = json.loads((target / "datalist.json").read_text())
    assert "images/p2.png" not in json.dumps(listed)
    assert _run("--source", source, "--target", tmp_path / "fresh", "--size", 16) == 3
    assert (target / "datalist.json").read_bytes() == (tmp_path / "fresh/datalist.json").read_bytes()
    monkeypatch.setattr(c, "_new_pool", lambda workers: pytest.fail("nothing was left to do"))
    assert _run(*arguments) == 3


def test_state_of_a_folder_is_that_of_its_files(tmp_path):
    folder = tmp_path / "series"
    folder.mkdir()
    (folder / "a.dcm").write_bytes(b"one")
    states = [c.file_key(folder), c.file_key(folder)]
    os.utime(folder / "a.dcm", ns=(1, 1))
    states.append(c.file_key(folder))
    (folder / "b.dcm").write_bytes(b"")
    states.append(c.file_key(folder))
    (folder / "b.dcm").rename(folder / "c.dcm")
    states.append(c.file_key(folder))

    assert states[0] == states[1]
    assert len(set(states)) == 4
    assert c.file_key(tmp_path / "nowhere") is None


def test_torn_last_line_of_the_journal_costs_one_file_only(source, tmp_path):
    target = tmp_path / "target"
    arguments = ("--source", source, "--target", target, "--size", 16, "--workers", 1)
    _run(*arguments)
    expected = _tree(target)
    journal = target / c.JOURNAL
    journal.write_bytes(journal.read_bytes()[:-20])

    _run(*arguments)

    assert _tree(target) == expected
    assert len(journal.read_text().splitlines()) == 1 + 13


def test_outputs_of_a_file_that_changed_its_number_of_frames_are_removed(tmp_path):
    frames = [Image.fromarray((_smooth(20, 20, n) * 255).astype(np.uint8)) for n in range(3)]
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    frames[0].save(source / "x.tif", save_all=True, append_images=frames[1:])
    _run("--source", source, "--target", target, "--size", 20)
    assert sorted(path.name for path in target.rglob("*.png")) == [f"x.frame000{n}.png" for n in range(3)]

    frames[0].save(source / "x.tif")
    _run("--source", source, "--target", target, "--size", 20)

    assert [path.name for path in target.rglob("*.png")] == ["x.png"]


def test_target_of_other_settings_or_origin_is_refused(source, tmp_path, capsys):
    target = tmp_path / "target"
    _run("--source", source, "--target", target, "--size", 16)
    (tmp_path / "foreign/images").mkdir(parents=True)
    capsys.readouterr()

    codes = [
        _run("--source", source, "--target", target, "--size", 32),
        _run("--source", source, "--target", target, "--size", 16, "--window", 50, 350),
        _run("--source", source, "--target", tmp_path / "foreign", "--size", 16),
    ]

    errors = capsys.readouterr().err.splitlines()
    assert codes == [1, 1, 1]
    assert "made with other settings: size 16 (now 32)" in errors[0]
    assert "window none (now 50 350)" in errors[1]
    assert "images of another origin" in errors[2]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--source", "nowhere", "--target", "t"], 1, "expected a folder, got nowhere (not found)"),
        (["--source", "empty", "--target", "t"], 1, "expected images below --source empty, got none"),
        (["--source", "source", "--target", "source/out"], 1, "--target must lie outside of --source"),
        (["--source", "source", "--target", "source"], 1, "--target must lie outside of --source"),
        (["--source", "t/images", "--target", "t"], 1, "--target must lie outside of --source"),
        (["--source", "source", "--target", "source/p1.png/t"], 1, "--target must lie outside of --source"),
        (["--source", "source", "--target", "file/t"], 1, "--target must be a folder that can be written to"),
        (["--source", "source", "--target", "t", "--size", "8"], 2, "--size"),
        (["--source", "source", "--target", "t", "--bits", "12"], 2, "expected 8 or 16, got 12"),
        (["--source", "source", "--target", "t", "--bits", "16", "--channels", "rgb"], 2, "--bits 16 needs"),
        (["--source", "source", "--target", "t", "--window", "1", "0"], 2, "width above 0"),
        (["--source", "source", "--target", "t", "--split", "1", "1", "1"], 1, "sum to 1"),
        (["--source", "source", "--target", "t", "--workers", "0"], 2, "--workers"),
        (["--target", "t"], 2, "--source"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(source, tmp_path, monkeypatch, capsys, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "t/images"):
        (tmp_path / folder).mkdir(parents=True)
    _save(tmp_path / "t/images/a.png", _smooth(20, 20))
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))

    got = _run(*arguments)

    lines = capsys.readouterr().err.splitlines()
    assert (got, len(lines)) == (code, 1)
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


# ---------------------------------------------------------------------------------------------------------------------
# pool


def _chunk_with_a_crash(jobs, settings, target):
    return [_file_with_a_crash(job, settings, target) for job in jobs]


def _file_with_a_crash(job, settings, target):
    if job.file == "p4.png":
        os.kill(os.getpid(), signal.SIGSEGV)
    return c.convert_file(job, settings, target)


def test_file_that_crashes_its_decoder_is_rejected_and_the_rest_goes_on(source, tmp_path, monkeypatch):
    settings, target = c.Settings("x", 16), tmp_path / "target"
    jobs = c.make_jobs(source, sorted(path.name for path in source.iterdir()))
    c.prepare_target(source, target, settings)
    with monkeypatch.context() as patch:
        patch.setattr(c, "_convert_chunk", _chunk_with_a_crash)
        patch.setattr(c, "convert_file", _file_with_a_crash)
        first = c.convert(jobs, settings, target, 2)

    again = c.convert(jobs, settings, target, 2)

    assert list(first) == [job.file for job in jobs]
    assert {file for file, outcome in first.items() if not outcome.images} == {"p4.png", "broken.png"}
    assert "crashed" in first["p4.png"].reason
    assert again["p4.png"].images == ("images/p4.png",)  # a crash may have been the machine's: tried again


def test_full_disk_stops_the_run_instead_of_rejecting_every_file(source, tmp_path):
    settings, target = c.Settings("x", 16), tmp_path / "target"
    c.prepare_target(source, target, settings)
    (target / c.PARTS).rmdir()
    (target / c.PARTS).touch()

    with pytest.raises(UserError, match="cannot be written"):
        c.convert_file(c.make_jobs(source, ["p1.png"])[0], settings, str(target))


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """Options of a command that takes a while, and what it writes when nothing disturbs it."""
    root = tmp_path_factory.mktemp("long")
    pixels = _smooth(800, 800)
    for number in range(60):
        _save(root / f"source/p{number}.png", np.roll(pixels, 10 * number, axis=1))
    options = ["--source", str(root / "source"), "--size", "256", "--workers", "2"]
    assert _run(*options, "--target", root / "undisturbed") == 0
    return options, _tree(root / "undisturbed")


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_stopped_run_goes_on_and_ends_like_an_undisturbed_one(long_run, tmp_path, sent, code):
    options, undisturbed = long_run
    for attempt in range(5):  # on a busy machine a run may be over before the signal reaches it
        target = tmp_path / f"target{attempt}"
        journal = target / c.JOURNAL
        process = subprocess.Popen(
            [sys.executable, "-m", "preprocessing.images", *options, "--target", str(target)],
            cwd=REPO,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # a shell starts background jobs with Ctrl-C ignored, and so would this child be
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        while process.poll() is None and not (journal.exists() and journal.read_text().count("\n") > 4):
            time.sleep(0.01)
        if process.poll() is None:
            # as a terminal does: Ctrl-C reaches the workers, too
            (os.killpg if sent == signal.SIGINT else os.kill)(process.pid, sent)
        errors = process.communicate()[1]
        if process.returncode:
            break
    done = {json.loads(line)["file"]: line for line in journal.read_text().splitlines()[1:]}

    assert process.returncode == code
    assert not (target / "datalist.json").exists()
    assert 0 < len(done) < 60
    assert ("error: interrupted" in errors) == (sent == signal.SIGINT)
    for path in (target / "images").iterdir():
        Image.open(path).load()  # whole, or not there
    assert _run(*options, "--target", target) == 0
    again = {json.loads(line)["file"]: line for line in journal.read_text().splitlines()[1:]}
    assert {file: again[file] for file in done} == done
    assert _tree(target) == undisturbed


def test_rejected_files_are_a_table_that_a_csv_reader_understands(tmp_path, capsys):
    (tmp_path / "source").mkdir()
    _save(tmp_path / "source/good.png", _smooth(20, 20))
    _save(tmp_path / "source/black, all.png", np.zeros((20, 20)))
    (tmp_path / "source/note.txt").write_text("no image")
    (tmp_path / "source/empty.dcm").touch()

    code = _run("--source", tmp_path / "source", "--target", tmp_path / "target", "--size", 16)

    with open(tmp_path / "target/rejected.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert code == 3
    assert [row["file"] for row in rows] == ["black, all.png", "empty.dcm", "note.txt"]
    assert all(row["reason"] for row in rows)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("wrote 1 images, rejected 3 files")
    assert last.endswith(f"datalist: {tmp_path / 'target/datalist.json'}")


def test_nothing_written_is_an_error_that_still_leaves_the_reasons(tmp_path, capsys):
    _save(tmp_path / "source/black.png", np.zeros((20, 20)))

    code = _run("--source", tmp_path / "source", "--target", tmp_path / "target", "--size", 16)

    assert code == 1
    assert "no image could be written" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "target/rejected.csv").read_text().splitlines()[0] == "file,reason"
    assert not (tmp_path / "target/datalist.json").exists()


def test_workers_import_neither_torch_nor_monai():
    code = "import sys, preprocessing._convert; sys.exit(bool({'torch', 'monai'} & set(sys.modules)))"

    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False).returncode == 0
