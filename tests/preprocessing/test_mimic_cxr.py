"""MIMIC-CXR in four steps: what each writes, what it refuses, and what it leaves to the others."""

from __future__ import annotations

import csv
import gzip
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from medgen.data import load_classes, load_datalist, validate_datalist
from medgen.data.phantom import PhantomSpec, write_phantom
from preprocessing import _convert as c
from preprocessing import mimic_cxr

pytestmark = pytest.mark.usefixtures("in_this_process")

REPO = Path(__file__).parents[2]
STEPS = ("organise", "create_ids", "sections", "sentences")
SPLITS = ("training", "validation", "test")
METADATA = "mimic-cxr-2.0.0-metadata.csv.gz"
DICOM = "aaaaaaaa-bbbbbbbb-cccccccc-dddddddd-{:08x}"


def _run(step, source, target, *arguments):
    # one worker unless the test says so: each costs the start of an interpreter
    workers = () if step.replace("-", "_") == "create_ids" or "--workers" in arguments else ("--workers", 1)
    size = ("--size", 32) if step == "organise" and "--size" not in arguments else ()
    arguments = ("--source", source, "--target", target, *arguments, *workers, *size)
    return c.main(mimic_cxr.app, [step, *map(str, arguments)])


def _items(target):
    content = validate_datalist(target / "datalist.json")
    return [{**item, "split": split} for split in SPLITS for item in content[split]]


def _reasons(target):
    with open(target / "rejected.csv", encoding="utf-8", newline="") as file:
        return {row["file"]: row["reason"] for row in csv.DictReader(file)}


def _truth(source):
    with open(source / "truth.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name[0] != "."}


def _small(root, views=("PA", "AP", "PA"), reports=True, suffix=".jpg"):
    """A tree of as many patients with one image each, its tables written by hand."""
    rows = ["dicom_id,subject_id,study_id,ViewPosition"]
    for number, view in enumerate(views):
        patient, study, name = f"{10000000 + number}", f"{50000000 + number}", DICOM.format(number)
        folder = root / f"files/p10/p{patient}/s{study}"
        folder.mkdir(parents=True)
        pixels = np.random.default_rng(number).integers(0, 256, (40, 48), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}{suffix}")
        if reports:
            folder.with_suffix(".txt").write_text(f"\n FINDINGS:  Finding {number} is seen.\n", encoding="utf-8")
        rows.append(f"{name},{patient},{study},{view}")
    (root / METADATA).write_bytes(gzip.compress("\n".join(rows).encode()))
    return root


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    out = tmp_path_factory.mktemp("mimic") / "phantom"
    write_phantom("mimic-cxr", out, PhantomSpec(patients=20, images_per_patient=2, size=32, seed=2))
    return out


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory):
    """Target and exit codes of the four steps, all views kept; not to be written to."""
    target = tmp_path_factory.mktemp("mimic") / "target"
    codes = [_run(step, source, target, *(("--view", "all") if step == "create_ids" else ())) for step in STEPS]
    return target, codes


@pytest.fixture(scope="module")
def organised(tmp_path_factory):
    """A small source without tables but the metadata, and a target after organise; not to be written to."""
    root = tmp_path_factory.mktemp("organised")
    source = _small(root / "s", views=("PA",))
    assert _run("organise", source, root / "t") == 0
    return source, root / "t"


@pytest.fixture
def copy(prepared, tmp_path):
    shutil.copytree(prepared[0], tmp_path / "target")
    return tmp_path / "target"


# ---------------------------------------------------------------------------------------------------------------------
# what the steps write


def test_exit_codes_say_which_step_rejected_something(prepared):
    assert prepared[1] == [0, 0, 3, 3]


def test_every_image_becomes_a_png_in_the_same_folders(source, prepared):
    images = {path.relative_to(source / "files").with_suffix("") for path in source.rglob("*.jpg")}

    written = prepared[0] / "images"
    assert {path.relative_to(written).with_suffix("") for path in written.rglob("*.png")} == images
    for path in list(written.rglob("*.png"))[:5]:
        image = Image.open(path)
        assert (image.mode, min(image.size)) == ("L", 32)


def test_image_is_the_jpeg_unless_it_is_resized(source, prepared):
    name = next(row["file"] for row in _truth(source) if row["view"] == "PA")
    expected = np.asarray(Image.open(source / name))
    assert expected.shape == (32, 32)
    assert expected.std() > 20

    written = prepared[0] / "images" / Path(name).relative_to("files").with_suffix(".png")
    np.testing.assert_array_equal(np.asarray(Image.open(written)), expected)


def test_items_carry_what_the_tables_say(source, prepared):
    items = {item["image"]: item for item in _items(prepared[0])}
    rows = {f"images/{row['file'].removeprefix('files/').removesuffix('.jpg')}.png": row for row in _truth(source)}

    assert set(rows) <= set(items)
    chexpert = {"Nodule": "Lung Lesion", "Mass": "Lung Lesion", "Effusion": "Pleural Effusion"}
    for image, row in rows.items():
        item = items[image]
        assert (item["patient"], item["study"]) == (row["patient"], row["study"])
        assert item["view"] in (row["view"], "")
        assert item["split"] in SPLITS
        if row["report"] in ("empty", "missing"):
            assert "labels" not in item
        else:
            shown = {chexpert.get(label, label) for label in row["labels"].split("|")} - {"No Finding"}
            assert set(item["labels"]) == shown
    assert validate_datalist(prepared[0] / "datalist.json")["label_names"] == list(mimic_cxr.FINDINGS)
    assert len(load_datalist(prepared[0] / "datalist.json", "training")) > 10


def test_sentences_are_what_the_phantom_says_whatever_the_form_of_the_report(source, prepared):
    by_study = {item["study"]: item for item in _items(prepared[0])}
    forms = Counter()
    for row in _truth(source):
        # the phantom's sentences have no full stop but at their end
        said = re.findall(r"\S[^.]*\.", f"{row['findings']} {row['impression']}")
        got = by_study[row["study"]]["sentences"]
        extra = {"blanks": 1, "not UTF-8": 1}.get(row["report"], 0)
        assert [sentence for sentence in got if sentence in said] == said, row["report"]
        assert len(got) == len(said) + extra, row["report"]
        forms[row["report"]] += 1
    assert len(forms) == 19


def test_text_is_the_section_that_describes_the_image_best(source, prepared):
    by_study = {item["study"]: item["text"] for item in _items(prepared[0])}

    for row in _truth(source):
        text = by_study[row["study"]]
        if row["report"] in ("empty", "missing"):
            assert text == ""
        elif row["report"] in ("no header", "findings and impression"):
            assert text == f"{row['findings']} {row['impression']}"
        elif row["report"] == "blanks":
            assert text.startswith(row["impression"])
        else:
            assert text == (row["impression"] or row["findings"])
    assert not any(re.search(r"\d\. ", text) for text in by_study.values())


def test_each_study_has_a_json_of_sections_and_a_row_in_the_tables(source, prepared):
    folder = prepared[0] / "sections"
    with open(folder / "mimic_cxr_sectioned.csv", encoding="utf-8", newline="") as file:
        sectioned = {row["study"]: row for row in csv.DictReader(file)}
    with open(folder / "mimic_cxr_sections.csv", encoding="utf-8", newline="") as file:
        captions = {row["study"]: row["caption"] for row in csv.DictReader(file)}

    readable = [row for row in _truth(source) if row["report"] not in ("empty", "missing")]
    assert set(sectioned) == set(captions) == {f"s{row['study']}" for row in readable}
    for row in readable:
        study = f"s{row['study']}"
        content = json.loads((folder / f"files/p{row['patient'][:2]}/p{row['patient']}/{study}.json").read_text())
        assert content["study"] == study
        assert content["caption"] == captions[study]
        for name in ("impression", "findings", "last_paragraph", "comparison"):
            assert (content[name] or "") == sectioned[study][name]
        if row["report"] == "addendum":
            assert "addendum" in [section["name"] for section in content["sections"]]


def test_each_study_of_the_datalist_has_a_json_of_its_sentences(prepared):
    for item in _items(prepared[0]):
        study = f"p{item['patient'][:2]}/p{item['patient']}/s{item['study']}"
        path = prepared[0] / "sentences" / "files" / f"{study}.json"
        if item["sentences"]:
            assert json.loads(path.read_text(encoding="utf-8")) == {"sentences": item["sentences"]}


def test_reports_without_text_leave_the_image_and_have_a_row(source, prepared):
    reasons = _reasons(prepared[0])
    items = {item["study"]: item for item in _items(prepared[0])}

    bad = {row["study"]: row for row in _truth(source) if row["report"] in ("empty", "missing", "not UTF-8")}
    assert len(reasons) == len(bad) >= 3
    for study, row in bad.items():
        reason = reasons[str(Path(row["file"]).parent) + ".txt"]
        expected = {
            "empty": "sections: empty; sentences: no text",
            "missing": "sentences: no report found",
            "not UTF-8": "sections: not UTF-8",
        }[row["report"]]
        assert reason.startswith(expected)
        assert bool(items[study]["sentences"]) == (row["report"] == "not UTF-8")
        assert bool(items[study]["text"]) == (row["report"] == "not UTF-8")


# ---------------------------------------------------------------------------------------------------------------------
# one target, four steps


def test_the_same_commands_again_do_no_work_and_lose_nothing(source, copy, capsys):
    before = _times(copy / "images") | _times(copy / "sections/files") | _times(copy / "sentences/files")
    content = {name: (copy / name).read_bytes() for name in ("datalist.json", "rejected.csv")}

    # create_ids in the end: it must not lose what sentences has added
    codes = [_run(step, source, copy, *(("--view", "all") if step == "create_ids" else ())) for step in STEPS]
    assert codes == [0, 0, 3, 3]
    assert _run("create_ids", source, copy, "--view", "all") == 0

    after = _times(copy / "images") | _times(copy / "sections/files") | _times(copy / "sentences/files")
    assert after == before
    assert content == {name: (copy / name).read_bytes() for name in content}


def test_only_a_changed_report_is_read_again(tmp_path):
    source = _small(tmp_path / "s")
    target = tmp_path / "t"
    for step in STEPS:
        _run(step, source, target, *(("--split", 1, 0, 0) if step == "create_ids" else ()))
    before = _times(target / "sections/files") | _times(target / "sentences/files")

    (source / "files/p10/p10000002/s50000002.txt").write_text("\n IMPRESSION:  Something else.\n")
    assert [_run(step, source, target) for step in ("sections", "sentences")] == [0, 0]

    after = _times(target / "sections/files") | _times(target / "sentences/files")
    assert {path.name for path in after if after[path] != before[path]} == {"s50000002.json"}
    assert [item["sentences"] for item in _items(target)] == [["Finding 0 is seen."], ["Something else."]]


def test_what_came_of_a_file_that_is_gone_is_removed_and_nothing_else(tmp_path, capsys):
    source = _small(tmp_path / "s", views=("PA",) * 4)
    target = tmp_path / "t"
    for step in STEPS:
        assert _run(step, source, target) == 0
    mine = [target / "images/mine.png", target / "sections/files/p10/mine.json"]
    for path in mine:
        path.write_text("mine")
    (source / "files/p10/p10000001/s50000001.txt").unlink()
    next(source.glob("files/p10/p10000002/s50000002/*.jpg")).unlink()
    with open(target / "sections" / c.JOURNAL, "a") as journal:  # a target from elsewhere
        entry = {"stem": "x", "file": "x.txt", "images": ["../images/mine.png", str(mine[0])], "bytes": [4, 4]}
        journal.write(json.dumps(entry) + "\n")
    capsys.readouterr()

    assert [_run(step, source, target) for step in STEPS] == [0, 3, 0, 3]

    assert "note: removed the results of files that are not asked for any more: 1\n" in capsys.readouterr().err
    assert all(path.exists() for path in mine)
    said = {item["study"]: (item["sentences"], item["text"]) for item in _items(target)}
    assert said["50000001"] == ([], "")
    assert set(said) == {"50000000", "50000001", "50000003"}
    left = {path.stem for path in target.rglob("*.*") if path.suffix in (".png", ".json") and path not in mine}
    assert "s50000001" not in left
    assert DICOM.format(2) not in left
    assert {DICOM.format(0), DICOM.format(1), DICOM.format(3), "s50000000", "s50000003"} <= left
    assert "s50000001" not in (target / "sections/mimic_cxr_sectioned.csv").read_text()


@pytest.mark.parametrize("killed", ["_leave", "write_datalist"])
def test_create_ids_killed_before_its_end_can_be_run_again(organised, tmp_path, monkeypatch, killed):
    shutil.copytree(organised[1], tmp_path / "t")

    def kill(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mimic_cxr, killed, kill)
        assert _run("create_ids", organised[0], tmp_path / "t") == 130
    assert _run("create_ids", organised[0], tmp_path / "t") == 0
    assert len(_items(tmp_path / "t")) == 1


@pytest.mark.parametrize(
    ("done", "step", "first"),
    [
        ((), "create_ids", "organise"),
        ((), "sentences", "create_ids"),
        (("organise", "create_ids"), "sentences", "sections"),
        (("sections",), "create_ids", "organise"),
    ],
)
def test_a_step_too_early_names_the_one_before(tmp_path, capsys, done, step, first):
    source = _small(tmp_path / "s")
    for name in done:
        assert _run(name, source, tmp_path / "t") == 0
    capsys.readouterr()

    assert _run(step, source, tmp_path / "t") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"run first: python -m preprocessing.mimic_cxr {first} --source {source}" in error


@pytest.mark.parametrize(("gone", "first"), [("datalist.json", "create_ids"), ("sections", "sections")])
def test_a_step_whose_results_were_deleted_is_named_again(source, copy, capsys, gone, first):
    shutil.rmtree(copy / gone) if (copy / gone).is_dir() else (copy / gone).unlink()

    assert _run("sentences", source, copy) == 1
    assert f"run first: python -m preprocessing.mimic_cxr {first} " in capsys.readouterr().err


def test_reports_may_come_before_images(tmp_path):
    source = _small(tmp_path / "s")

    codes = [_run(step, source, tmp_path / "t") for step in ("sections", "organise", "create_ids", "sentences")]

    assert codes == [0] * 4
    assert all(item["sentences"] for item in _items(tmp_path / "t"))


@pytest.mark.parametrize(
    ("step", "arguments", "message"),
    [
        ("organise", ("--size", 48), "size 32 (now 48)"),
        ("create_ids", ("--view", "PA"), "view ['all'] (now ['PA'])"),
        ("create_ids", ("--view", "all", "--seed", 1), "seed 0 (now 1)"),
        ("create_ids", ("--view", "all", "--official"), "split [0.936, 0.012, 0.052] (now mimic-cxr-2.0.0-split"),
        ("sentences", ("--labels",), "labels not used (now "),
    ],
)
def test_changed_settings_are_refused(source, copy, capsys, step, arguments, message):
    content = (copy / "datalist.json").read_bytes()

    assert _run(step, source, copy, *arguments) == 1

    assert message in capsys.readouterr().err
    assert (copy / "datalist.json").read_bytes() == content


def test_deleted_results_are_made_anew_with_other_settings(source, copy, capsys):
    (copy / "datalist.json").unlink()

    assert _run("create_ids", source, copy, "--view", "PA") == 0
    assert "note: run sentences again" in capsys.readouterr().err
    shutil.rmtree(copy / "sentences")
    assert {item["view"] for item in _items(copy)} == {"PA"}
    assert not any("sentences" in item for item in _items(copy))
    assert _run("sentences", source, copy, "--labels") == 3

    item = next(item for item in _items(copy) if "Cardiomegaly" in item.get("labels", ()))
    templates = [sentence for sentence in item["sentences"] if sentence.islower()]
    assert {"the patient has cardiomegaly.", "there is a cardiomegaly."} <= set(templates)


def test_labels_without_a_table_of_labels_say_where_they_come_from(tmp_path, capsys):
    source = _small(tmp_path / "s")
    for step in STEPS[:3]:
        _run(step, source, tmp_path / "t")

    assert _run("sentences", source, tmp_path / "t", "--labels") == 1
    assert "run create_ids with mimic-cxr-2.0.0-chexpert.csv" in capsys.readouterr().err


@pytest.mark.parametrize("step", ["create_ids", "create-ids"])
def test_steps_and_options_are_written_with_either_dash(organised, tmp_path, step):
    shutil.copytree(organised[1], tmp_path / "t")
    (tmp_path / "split.csv").write_text(f"dicom_id,split\n{DICOM.format(0)},test\n")

    assert _run(step, organised[0], tmp_path / "t", f"--split{step[6]}file", tmp_path / "split.csv") == 0
    assert [item["split"] for item in _items(tmp_path / "t")] == ["test"]


def test_unknown_step_is_a_usage_error(tmp_path, capsys):
    assert c.main(mimic_cxr.app, ["organize"]) == 2
    assert "organize" in capsys.readouterr().err


def test_command_imports_no_framework():
    code = (
        "import sys, preprocessing.mimic_cxr\n"
        "heavy = {'torch', 'monai', 'transformers', 'spacy'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )

    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# images


def test_dicom_becomes_the_same_images_and_the_jpeg_of_a_pair_is_taken(tmp_path, capsys):
    spec = PhantomSpec(patients=3, images_per_patient=1, size=32, seed=1)
    write_phantom("mimic-cxr", tmp_path / "jpg", spec)
    write_phantom("mimic-cxr-dicom", tmp_path / "dcm", spec)

    assert _run("organise", tmp_path / "dcm", tmp_path / "from_dcm") == 0
    assert _run("create_ids", tmp_path / "dcm", tmp_path / "from_dcm", "--view", "all") == 0
    assert _run("organise", tmp_path / "jpg", tmp_path / "from_jpg") == 0
    shutil.copytree(tmp_path / "dcm" / "files", tmp_path / "jpg" / "files", dirs_exist_ok=True)
    capsys.readouterr()
    assert _run("organise", tmp_path / "jpg", tmp_path / "from_both") == 0

    paths = [item["image"] for item in _items(tmp_path / "from_dcm")]
    assert len(paths) >= 3
    for path in paths:
        jpg, dcm, both = (np.asarray(Image.open(tmp_path / f"from_{t}" / path)) for t in ("jpg", "dcm", "both"))
        assert np.abs(jpg.astype(float) - dcm).mean() < 4  # JPEG's loss; an inverted image would be far off
        np.testing.assert_array_equal(both, jpg)
    assert not _reasons(tmp_path / "from_both")
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert notes == [f"note: {len(paths)} images are there as JPEG and as DICOM; the JPEG was taken"]


@pytest.mark.parametrize("late", [False, True])
def test_dicom_is_used_where_the_jpeg_cannot_be(tmp_path, late):
    spec = PhantomSpec(patients=2, images_per_patient=1, size=32, seed=1)
    write_phantom("mimic-cxr", tmp_path / "s", spec)
    write_phantom("mimic-cxr-dicom", tmp_path / "dcm", spec)
    source, target = tmp_path / "s", tmp_path / "t"
    damaged, *others = sorted(source.rglob("*.jpg"))
    whole = damaged.read_bytes()
    damaged.write_bytes(b"damaged")
    name = damaged.relative_to(source).as_posix()
    if late:
        assert _run("organise", source, target) == 3
        assert set(_reasons(target)) == {name}
    # in folders of their own, as two downloads side by side
    shutil.copytree(tmp_path / "dcm" / "files", source / "dicom" / "files")

    for _ in range(2):  # the second run takes it from the journal
        assert _run("organise", source, target) == 3
        assert len(list((target / "images").rglob("*.png"))) == 1 + len(others)
        reasons = _reasons(target)
        assert set(reasons) == {name}
        assert reasons[name].endswith("; its DICOM file was used")
    assert _run("organise", tmp_path / "dcm", tmp_path / "only") == 0
    png = damaged.relative_to(source / "files").with_suffix(".png")
    assert (target / "images" / png).read_bytes() == (tmp_path / "only/images" / png).read_bytes()

    dicom = next((source / "dicom").rglob(f"{damaged.stem}.dcm"))
    dicom.write_bytes(b"damaged, too")
    assert _run("organise", source, target) == 3
    assert "; its DICOM file: " in _reasons(target)[name]
    assert not (target / "images" / png).exists()
    damaged.write_bytes(whole)
    assert _run("organise", source, target) == 0
    assert not _reasons(target)


def test_two_jpegs_of_one_image_are_a_row(tmp_path):
    source = _small(tmp_path / "s", views=("PA",))
    shutil.copytree(source / "files", source / "copy" / "files")

    assert _run("organise", source, tmp_path / "t") == 3
    name = f"files/p10/p10000000/s50000000/{DICOM.format(0)}.jpg"
    assert _reasons(tmp_path / "t") == {f"files/{name[6:]}": f"organise: the same image as copy/{name}"}


@pytest.mark.parametrize("shape", [(640, 520), (161, 129), (64, 90)])
def test_large_jpeg_is_reduced_like_one_decoded_whole(tmp_path, shape):
    coarse = np.random.default_rng(0).random((24, 20), dtype=np.float32)
    fine = np.asarray(Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BICUBIC))
    job = c.Job(str(tmp_path / "a.jpg"), "a.jpg", "a")
    Image.fromarray((np.clip(fine, 0, 1) * 255).astype(np.uint8)).save(job.path, quality=95)
    pictures = []
    for folder, task in (("whole", c.Settings), ("reduced", mimic_cxr._Images)):
        settings = task("mimic_cxr", 64, channels="grey")
        c.prepare_target(tmp_path / "none", tmp_path / folder, settings)
        assert settings.convert(job, tmp_path / folder).images == ("images/a.png",)
        pictures.append(np.asarray(Image.open(tmp_path / folder / "images/a.png")).astype(int))

    difference = np.abs(pictures[0] - pictures[1])
    assert difference.max() <= 3
    assert difference.mean() < 0.5


def test_large_jpeg_keeps_orientation_and_polarity(tmp_path, monkeypatch):
    source = _small(tmp_path / "s", views=("PA",))
    path = next(source.rglob("*.jpg"))
    row, column = np.mgrid[:1000, :800] / 1000
    # bright at the upper right; no symmetry, and detail finer than a pixel of the PNG
    picture = 0.1 + 0.5 * column + 0.4 * (1 - row) + 0.05 * np.sin(600 * row + 200 * column)
    exif = Image.Exif()
    exif[274] = 6  # shown turned by 90 degrees
    Image.fromarray((255 * picture).astype(np.uint8)).save(path, quality=95, exif=exif)
    decoded = []
    render = c.render
    monkeypatch.setattr(c, "render", lambda pixels, settings: decoded.append(pixels.shape) or render(pixels, settings))

    assert _run("organise", source, tmp_path / "t") == 0

    assert decoded == [(100, 125)]  # an eighth, turned
    whole = ImageOps.exif_transpose(Image.open(path)).convert("F").resize((40, 32), Image.Resampling.BICUBIC)
    written = np.asarray(Image.open(next((tmp_path / "t/images").rglob("*.png")))).astype(float)
    assert written.shape == (32, 40)
    assert np.abs(written - np.asarray(whole)).max() <= 2
    assert written[-1, -1] > written[0, 0] + 150


def test_upside_down_colour_and_constant_jpegs_are_told_apart(tmp_path):
    source = _small(tmp_path / "s")
    paths = sorted(source.rglob("*.jpg"))
    ramp = np.tile(np.linspace(0, 255, 48, dtype=np.uint8)[:, None], (1, 40))
    exif = Image.Exif()
    exif[274] = 3  # orientation: turned by 180 degrees
    Image.fromarray(ramp).save(paths[0], exif=exif)
    Image.fromarray(np.stack([ramp, ramp // 2, ramp // 2], axis=-1)).save(paths[1])
    Image.fromarray(np.full_like(ramp, 7)).save(paths[2])

    assert _run("organise", source, tmp_path / "t") == 3

    written = {path.stem: np.asarray(Image.open(path)).astype(int) for path in (tmp_path / "t").rglob("*.png")}
    assert written[DICOM.format(0)][0].mean() > written[DICOM.format(0)][-1].mean() + 200
    assert written[DICOM.format(1)].ndim == 2
    assert list(_reasons(tmp_path / "t").values()) == ["organise: all pixels have the same value"]


def test_images_that_are_damaged_or_out_of_place_are_rejected_by_name(tmp_path):
    source = _small(tmp_path / "s")
    damaged = source / f"files/p10/p10000000/s50000000/{DICOM.format(0)}.jpg"
    damaged.write_bytes(damaged.read_bytes()[:300])
    (source / "preview.jpg").write_bytes((source / f"files/p10/p10000002/s50000002/{DICOM.format(2)}.jpg").read_bytes())

    assert _run("organise", source, tmp_path / "t") == 3
    assert _run("create_ids", source, tmp_path / "t") == 3

    reasons = _reasons(tmp_path / "t")
    assert reasons["preview.jpg"] == "organise: not in the folder of a study, files/p10/p10000032/s50414267/"
    both = reasons[f"files/p10/p10000000/s50000000/{DICOM.format(0)}.jpg"]
    assert both.startswith("organise: ")
    assert both.endswith(f"; create_ids: listed in {METADATA}, but not converted")
    assert [item["study"] for item in _items(tmp_path / "t")] == ["50000002"]


def test_source_without_images_says_what_was_expected(tmp_path, capsys):
    (tmp_path / "s").mkdir()
    Image.fromarray(np.eye(20, dtype=np.uint8) * 255).save(tmp_path / "s" / "a.jpg")

    assert _run("organise", tmp_path / "s", tmp_path / "t") == 1
    assert "expected files/p10/p10000032/s50414267/ID.jpg (or .dcm) below --source" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# the datalist


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ((), ["PA", "PA"]),
        (("--view", "PA", "--view", "AP"), ["PA", "AP", "PA"]),
        (("--view", "all"), ["PA", "AP", "PA RLD", "", "", "PA"]),
    ],
)
def test_view_is_matched_exactly(tmp_path, capsys, arguments, kept):
    source = _small(tmp_path / "s", views=("PA", "AP", "PA RLD", "", "-", "PA"), reports=False)
    _run("organise", source, tmp_path / "t")
    capsys.readouterr()

    assert _run("create_ids", source, tmp_path / "t", "--split", 1, 0, 0, *arguments) == 0

    assert [item["view"] for item in _items(tmp_path / "t")] == kept
    if not arguments:
        out = capsys.readouterr().out
        assert "left out by --view PA: 4 images (none 2, " in out
        assert "studies without a view PA: 4 of 6" in out


def test_split_never_divides_a_patient_and_meets_the_shares(source, copy):
    for split in ((0.6, 0.2, 0.2), (60, 20, 20)):
        (copy / "datalist.json").unlink()
        assert _run("create_ids", source, copy, "--view", "all", "--split", *split) == 0
        items = _items(copy)
        homes: dict[str, set[str]] = {}
        for item in items:
            homes.setdefault(item["patient"], set()).add(item["split"])
        assert all(len(home) == 1 for home in homes.values())
        counts = Counter(item["split"] for item in items)
        for name, share in zip(SPLITS, (0.6, 0.2, 0.2), strict=True):
            assert abs(counts[name] - share * len(items)) <= 3
        content = {item["image"]: item["split"] for item in items}
        assert content == {item["image"]: item["split"] for item in _items(copy)}


def test_shares_and_numbers_in_the_same_proportion_give_the_same_split(source, copy):
    lists = []
    for split in ((0.6, 0.3, 0.1), (600, 300, 100)):
        (copy / "datalist.json").unlink()
        _run("create_ids", source, copy, "--view", "all", "--split", *split)
        lists.append((copy / "datalist.json").read_bytes())

    assert lists[0] == lists[1]


def test_no_patient_changes_split_when_more_images_are_organised(tmp_path):
    source = _small(tmp_path / "s", views=("PA",) * 30, reports=False)
    later = sorted((source / "files/p10").iterdir())[::3]
    (tmp_path / "away").mkdir()
    for folder in later:
        folder.rename(tmp_path / "away" / folder.name)
    splits = []
    for code in (3, 0):
        _run("organise", source, tmp_path / "t")
        assert _run("create_ids", source, tmp_path / "t", "--split", 0.5, 0.25, 0.25) == code
        splits.append({item["patient"]: item["split"] for item in _items(tmp_path / "t")})
        if code:
            for folder in later:
                (tmp_path / "away" / folder.name).rename(folder)

    assert (len(splits[0]), len(splits[1])) == (20, 30)
    assert set(splits[0].values()) == set(SPLITS)
    assert splits[0].items() <= splits[1].items()


def test_label_is_a_class_that_a_model_can_be_trained_on(tmp_path, capsys):
    source = _small(tmp_path / "s", views=("PA",) * 7, reports=False)
    head = ("subject_id", "study_id", *mimic_cxr.FINDINGS, "No Finding")
    given = ({"Edema": "1.0"}, {"Edema": "0.0", "Fracture": "1.0"}, {"No Finding": "1.0"}, {"Edema": "-1.0"})
    given += ({"Fracture": "1.0"}, {"No Finding": "1.0", "Support Devices": "1.0"})  # and a study without a row
    with open(source / "mimic-cxr-2.0.0-chexpert.csv", "w", newline="") as file:
        table = csv.DictWriter(file, head, restval="")
        table.writeheader()
        for number, row in enumerate(given):
            table.writerow({"subject_id": f"1000000{number}", "study_id": f"5000000{number}", **row})
    _run("organise", source, tmp_path / "t")
    capsys.readouterr()

    assert _run("create_ids", source, tmp_path / "t", "--label", "Edema", "--split", 1, 0, 0) == 0

    assert "left out by --label Edema: 3 images, where it is uncertain or not mentioned" in capsys.readouterr().out
    items = load_classes(tmp_path / "t/datalist.json", "training", num_classes=2)
    assert {item["study"][-1]: item["label"] for item in items} == {"0": 1, "1": 0, "2": 0, "5": 0}
    assert validate_datalist(tmp_path / "t/datalist.json")["label_names"] == ["No Edema", "Edema"]
    assert _run("create_ids", source, tmp_path / "t", "--label", "Fracture", "--split", 1, 0, 0) == 1
    assert "label Edema (now Fracture)" in capsys.readouterr().err
    # No Finding says nothing of support devices
    (tmp_path / "t/datalist.json").unlink()
    assert _run("create_ids", source, tmp_path / "t", "--label", "Support Devices", "--split", 1, 0, 0) == 0
    assert {item["study"][-1]: item["label"] for item in _items(tmp_path / "t")} == {"5": 1}
    (tmp_path / "t/datalist.json").unlink()
    assert _run("create_ids", source, tmp_path / "t", "--label", "Pneumonia", "--view", "PA", "--split", 0, 0, 1) == 0
    assert {item["label"] for item in _items(tmp_path / "t")} == {0}


def test_official_split_is_followed(source, copy):
    (copy / "datalist.json").unlink()

    assert _run("create_ids", source, copy, "--view", "all", "--official") == 0

    text = gzip.decompress((source / "mimic-cxr-2.0.0-split.csv.gz").read_bytes()).decode()
    names = {"train": "training", "validate": "validation", "test": "test"}
    official = {row["dicom_id"]: names[row["split"]] for row in csv.DictReader(text.splitlines())}
    assert {Path(item["image"]).stem: item["split"] for item in _items(copy)} == official
    assert set(official.values()) == set(SPLITS)


def test_tables_and_images_that_disagree_are_rows(tmp_path):
    source = _small(tmp_path / "s", views=("PA",) * 4)
    text = gzip.decompress((source / METADATA).read_bytes()).decode().splitlines()
    # the last image is in no table, and the table has an image that is nowhere; plain, as some unpack it
    lost = f"{DICOM.format(9)},10000009,50000009,PA"
    (source / METADATA).unlink()
    (source / METADATA.removesuffix(".gz")).write_text("\n".join([*text[:-1], lost, "../../x,..,..,PA"]))
    (tmp_path / "split.csv").write_text(f"dicom_id,split\n{DICOM.format(0)},train\n{DICOM.format(1)},test\n")
    _run("organise", source, tmp_path / "t")

    assert _run("create_ids", source, tmp_path / "t", "--split-file", tmp_path / "split.csv") == 3

    reasons = _reasons(tmp_path / "t")
    folder = "p10/p1000000{0}/s5000000{0}/"
    assert reasons[f"files/{folder.format(9)}{DICOM.format(9)}.jpg"].endswith(", but not converted")
    assert reasons[f"images/{folder.format(3)}{DICOM.format(3)}.png"].startswith("create_ids: not listed in mimic-cxr")
    assert reasons[f"images/{folder.format(2)}{DICOM.format(2)}.png"] == "create_ids: not listed in split.csv"
    assert len(reasons) == 4
    assert [item["split"] for item in _items(tmp_path / "t")] == ["training", "test"]


def test_a_split_file_that_divides_a_patient_is_refused(tmp_path, capsys):
    source = _small(tmp_path / "s", views=("PA", "PA"))
    twin = source / "files/p10/p10000000/s50000008"
    shutil.copytree(source / "files/p10/p10000001/s50000001", twin)
    rows = gzip.decompress((source / METADATA).read_bytes()).decode()
    rows = rows.replace("10000001,50000001", "10000000,50000008")
    (source / METADATA).write_bytes(gzip.compress(rows.encode()))
    (tmp_path / "split.csv").write_text(f"dicom_id,split\n{DICOM.format(0)},train\n{DICOM.format(1)},test\n")
    _run("organise", source, tmp_path / "t")

    assert _run("create_ids", source, tmp_path / "t", "--split-file", tmp_path / "split.csv") == 1
    assert "patient 10000000 stands in two splits" in capsys.readouterr().err
    assert not (tmp_path / "t/datalist.json").exists()


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        ("--metadata", b"dicom_id,subject_id\na,b\n", "lacks study_id, ViewPosition, has dicom_id, subject_id"),
        ("--metadata", b"\x1f\x8b damaged", "cannot be read as a CSV table"),
        ("--metadata", "dicom_id,Ansicht\xfc\n".encode("latin-1"), "cannot be read as a CSV table"),
        ("--metadata", None, "is no file"),
        ("--chexpert", b"subject_id,study_id\n1,2\n", "lacks Atelectasis, "),
        ("--chexpert", f"study_id,{','.join(mimic_cxr.FINDINGS)},No Finding\n5,yes{',' * 13}\n".encode(), "got 'yes'"),
        ("--split-file", b"dicom_id,split\na,valid\n", "split must be train, validate, test, got 'valid' (a)"),
    ],
)
def test_table_that_is_wrong_is_one_line(organised, tmp_path, capsys, option, content, message):
    if content is not None:
        (tmp_path / "table.csv").write_bytes(content)

    assert _run("create_ids", *organised, option, tmp_path / "table.csv") == 1

    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--split", 0.5, 0.2, 0.2), "must be 0 or more and sum to 1"),
        (("--split", -1, 1, 1), "must be 0 or more and sum to 1"),
        (("--split", 0.8, 0.2, 0.2), "must be 0 or more and sum to 1"),
        (("--label", "Effusion"), "--label must be one of Atelectasis, "),
        (("--label", "Edema"), "--label needs mimic-cxr-2.0.0-chexpert.csv in --source"),
        (("--view", "LL"), "expected images with view LL, got none of the 1"),
        (("--official",), "expected mimic-cxr-2.0.0-split.csv in --source"),
    ],
)
def test_choice_that_cannot_be_met_is_one_line(organised, capsys, arguments, message):
    assert _run("create_ids", *organised, *arguments) == 1
    assert message in capsys.readouterr().err


def test_datalist_of_another_origin_is_not_overwritten(organised, tmp_path, capsys):
    shutil.copytree(organised[1], tmp_path / "t")
    (tmp_path / "t/datalist.json").write_text("mine")

    assert _run("create_ids", organised[0], tmp_path / "t") == 1
    assert "was not made by create_ids" in capsys.readouterr().err
    assert (tmp_path / "t/datalist.json").read_text() == "mine"


# ---------------------------------------------------------------------------------------------------------------------
# reports


def test_reports_are_read_out_of_their_archive_and_no_name_leads_out(source, prepared, tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()
    with zipfile.ZipFile(folder / "mimic-cxr-reports.zip", "w") as archive:
        for path in sorted(source.rglob("*.txt")):
            archive.write(path, path.relative_to(source))
        archive.writestr("../../p10/p10999999/s50999999.txt", "\n FINDINGS:  Outside.\n")
        archive.writestr("/etc/p10/p10999998/s50999998.txt", "\n FINDINGS:  Outside.\n")
        archive.writestr("other/../../evil.txt", "\n FINDINGS:  Outside.\n")
        archive.writestr("copy/p10/p10999998/s50999998.txt", "\n FINDINGS:  Twice.\n")
        archive.writestr("files/p10/p10999997/s50999997.txt", b"x" * (2 << 20))

    assert _run("sections", folder, tmp_path / "t") == 3

    written = tmp_path / "t/sections/files"
    for path in (prepared[0] / "sections/files").rglob("*.json"):
        assert (written / path.relative_to(prepared[0] / "sections/files")).read_bytes() == path.read_bytes()
    others = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("s5099*")} | {
        p.name for p in tmp_path.rglob("evil*")
    }
    assert others == {f"t/sections/files/p10/p1099999{n}/s5099999{n}.json" for n in (8, 9)}
    reasons = _reasons(tmp_path / "t")
    assert reasons["copy/p10/p10999998/s50999998.txt"].startswith("sections: a second report of the study")
    assert "larger than 1048576 bytes" in reasons["files/p10/p10999997/s50999997.txt"]


def test_loose_reports_and_those_of_the_archive_are_merged(tmp_path, capsys):
    source = _small(tmp_path / "s", views=("PA", "PA"))
    loose = source / "files/p10/p10000001/s50000001.txt"
    with zipfile.ZipFile(source / "mimic-cxr-reports.zip", "w") as archive:
        for number in (0, 1):
            archive.writestr(f"files/p10/p1000000{number}/s5000000{number}.txt", "\n FINDINGS:  Out of the archive.\n")
    (source / "files/p10/p10000000/s50000000.txt").unlink()
    for step in STEPS:
        assert _run(step, source, tmp_path / "t") == 0

    texts = {item["study"]: item["text"] for item in _items(tmp_path / "t")}
    assert texts == {"50000000": "Out of the archive.", "50000001": "Finding 1 is seen."}
    loose.unlink()
    assert [_run(step, source, tmp_path / "t") for step in ("sections", "sentences")] == [0, 0]
    assert {item["text"] for item in _items(tmp_path / "t")} == {"Out of the archive."}


def test_sections_without_overrides_say_so(tmp_path, capsys):
    source = _small(tmp_path / "s", views=("PA",))
    (tmp_path / "o.csv").write_text("study,section,start,end\n")

    assert _run("sections", source, tmp_path / "t") == 0
    note = "note: MIMIC-CXR's 54 manual overrides are not applied; sections --help says how (--overrides)"
    assert capsys.readouterr().err.count(note) == 1
    assert _run("sections", source, tmp_path / "u", "--overrides", tmp_path / "o.csv") == 0
    assert note not in capsys.readouterr().err


def test_reports_may_lie_elsewhere(tmp_path):
    source = _small(tmp_path / "s", reports=False)
    reports = _small(tmp_path / "r")
    _run("organise", source, tmp_path / "t")
    _run("create_ids", source, tmp_path / "t")

    assert _run("sections", source, tmp_path / "t", "--reports", reports / "files") == 0
    assert _run("sentences", source, tmp_path / "t") == 0
    assert all(item["text"].startswith("Finding ") for item in _items(tmp_path / "t"))


def test_no_report_at_all_is_one_line(tmp_path, capsys):
    source = _small(tmp_path / "s", reports=False)

    assert _run("sections", source, tmp_path / "t") == 1
    assert "mimic-cxr-reports.zip in it, got none; name their folder or archive" in capsys.readouterr().err


def test_archive_that_is_none_is_one_line(tmp_path, capsys):
    source = _small(tmp_path / "s")
    (tmp_path / "r.zip").write_bytes(b"PK damaged")

    assert _run("sections", source, tmp_path / "t", "--reports", tmp_path / "r.zip") == 1
    assert "--reports must be a folder or a zip archive, got" in capsys.readouterr().err


def test_report_that_says_nothing_of_the_image_is_a_row(tmp_path):
    source = _small(tmp_path / "s", views=("PA", "PA"))
    (source / "files/p10/p10000001/s50000001.txt").write_text("\n TECHNIQUE:  Chest film.\n")
    codes = [_run(step, source, tmp_path / "t") for step in STEPS]

    assert codes == [0, 0, 3, 3]
    assert _reasons(tmp_path / "t") == {
        "files/p10/p10000001/s50000001.txt": "sections: neither impression, findings, last paragraph nor comparison "
        "in it; sentences: no sentence in it"
    }


def test_overrides_take_what_they_name_and_are_part_of_the_settings(tmp_path, capsys):
    source = _small(tmp_path / "s", views=("PA", "PA"))
    (source / "files/p10/p10000001/s50000001.txt").write_text("\n TECHNIQUE:  Film.\n \n COMMENT:  A fracture.\n")
    (tmp_path / "o.json").write_text(json.dumps({"s50000001": "comment", "50000000": [0, 0]}))
    for step in ("organise", "create_ids"):
        _run(step, source, tmp_path / "t")

    assert _run("sections", source, tmp_path / "t", "--overrides", tmp_path / "o.json") == 0
    assert _run("sentences", source, tmp_path / "t") == 3
    texts = {item["study"]: item["text"] for item in _items(tmp_path / "t")}
    assert texts == {"50000001": "A fracture.", "50000000": ""}
    (tmp_path / "o.json").write_text("{}")
    assert _run("sections", source, tmp_path / "t", "--overrides", tmp_path / "o.json") == 1
    assert "was made with other settings: overrides_hash" in capsys.readouterr().err


def test_sections_of_another_origin_are_not_touched(tmp_path, capsys):
    source = _small(tmp_path / "s", views=("PA",))
    mine = tmp_path / "t/sections/files/p10/mine.json"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")

    assert _run("sections", source, tmp_path / "t") == 1
    assert "with files of another origin; choose another folder" in capsys.readouterr().err
    assert [path for path in (tmp_path / "t").rglob("*") if path.is_file()] == [mine]
