"""RSNA Pneumonia Detection Challenge 2018: its DICOM files to PNGs, then to crops of the lungs, in two steps:

python -m preprocessing.rsna organise --source rsna-pneumonia-detection-challenge --target data/rsna

python -m preprocessing.rsna crop --source data/rsna --target data/rsna_512 --boxes lungs/boxes.csv --preset paper

organise makes TARGET/images/ID.png of every stage_2_train_images/ID.dcm and TARGET/datalist.json, one list called all:
image, patient, view, label (0, 1 or 2) and class (Normal, Lung Opacity, No Lung Opacity / Not Normal) by
stage_2_detailed_class_info.csv, and boxes, the opacities of stage_2_train_labels.csv as [x, y, width, height] in pixels
of the PNG. An image that one of the tables lacks, or of which they contradict themselves or each other, is rejected.

The challenge gives every image an id of its own, though many are of one patient of the NIH. --mapping, by default
pneumonia-challenge-dataset-mappings_2018.json in the source, says whose they are (JSON, or CSV with the columns
subset_img_id and img_id); without it each image counts as a patient of its own, and a note says so.

crop cuts every image to the box of its lungs and writes the datalists that a model learns from. Boxes are what the
bundle lung_segmentation writes: a CSV with the columns image (as in the datalist), top, left, bottom, right, in pixels,
bottom and right exclusive. An image without one is rejected. --aspect stretch, the default, resizes the box to a
square, whatever its shape, as chestXray-PGGAN did; --aspect keep grows it around its middle to a square first, and
moves that where it would leave the image (where the image itself is too small, black fills the square).

Splits are by patient, and all classes are divided alike, by the shares of --split. --preset paper takes instead
chestXray-PGGAN's numbers of images, 6,268 normal and 6,268 abnormal ones for training, 2,686 and 5,385 for test.
Training comes first. The paper has no validation; ours, --validation times the training part (0: none), comes from what
training leaves over, at most half of it, and the test takes the rest up to the paper's number: with the challenge's
8,851 normal and 17,833 abnormal images 313 and 313 for validation, 2,270 and 5,385 for test. A note says so, and the
images beyond that are left out. Only where a class has fewer images than training takes do all four numbers shrink
alike, so that training stays balanced.

TARGET/datalist.json holds all classes; datalist_normal.json, datalist_lung_opacity.json, datalist_not_normal.json and
datalist_abnormal.json (the last two together) one each, with the same splits. chestXray-PGGAN had 11,653 abnormal
images; which of the 17,833 those were is not known. An image of lung opacity whose opacities all lie outside of the
crop keeps its class and has no box; the last line counts them.

The same command again goes on where it was interrupted, does what is new or has changed, and writes the datalists anew.

With --shard 0/8 to --shard 7/8, on any machines at once, each of eight processes converts its part of the files; the
same command without --shard then does what is missing and writes the tables, the same bytes as one process alone.

Exit codes: 0 all went well; 3 the datalist was written, but files were rejected; 1 nothing could be written; 2 wrong
usage; 75 some files could not be read, but may be the next time; 130 interrupted.
"""

from __future__ import annotations

import hashlib
import json
import math
import posixpath
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from medgen.data.datalist import (
    file_stem,
    list_files,
    natural_key,
    printable,
    split_by_patient,
    validate_datalist,
    write_datalist,
)
from medgen.data.reader import UnreadableImageError, read_frames
from medgen.errors import UserError
from preprocessing import _convert as c
from preprocessing.split import pick_images

__all__ = ["CLASSES", "app", "crop", "organise", "read_boxes", "read_labels", "read_mapping", "split_classes"]

NAME, MODALITY = "RSNA pneumonia", "X-ray"
CLASSES = ("Normal", "Lung Opacity", "No Lung Opacity / Not Normal")  # of the labels 0, 1 and 2
OPACITY = CLASSES[1]  # the class of Target 1
DATALISTS = {"normal": (0,), "lung_opacity": (1,), "not_normal": (2,), "abnormal": (1, 2)}  # labels in each
IMAGES = "stage_2_train_images"
LABELS, CLASS_INFO = "stage_2_train_labels.csv", "stage_2_detailed_class_info.csv"
MAPPING = "pneumonia-challenge-dataset-mappings_2018.json"
MAPPING_COLUMNS = ("subset_img_id", "img_id")  # the challenge's id; the file in ChestX-ray14, <patient>_<follow-up>.png
FULL_SIZE = 1024  # pixels, of every image of the challenge
SIDES = ("top", "left", "bottom", "right")
SPLITS = ("training", "validation", "test")
# images for training and for test, normal and abnormal: chestXray-PGGAN, of 8,954 and 11,653
PRESETS = {"paper": {(0,): (6268, 2686), (1, 2): (6268, 5385)}}
VALIDATION = 0.05  # times a preset's training part

Item = dict[str, Any]
Box = tuple[int, int, int, int]  # top, left, bottom, right
Goals = dict[tuple[int, ...], dict[str, float]]  # labels of a class: images in each split


class Aspect(StrEnum):
    """How a box that is no square becomes one."""

    stretch = "stretch"
    keep = "keep"


class Preset(StrEnum):
    """Numbers of images in the splits."""

    paper = "paper"


# ---------------------------------------------------------------------------------------------------------------------
# organise


def read_labels(labels: Path, classes: Path) -> tuple[dict[str, Item], dict[str, str]]:
    """Read both tables of the challenge and see that they agree.

    Args:
        labels: ``stage_2_train_labels.csv``; several rows of an image are its boxes.
        classes: ``stage_2_detailed_class_info.csv``; rows are repeated.

    Returns:
        ``label``, ``class`` and ``boxes`` (x, y, width, height in pixels of the DICOM file) per id; and per id that
        cannot be used the reason.

    Raises:
        UserError: if a table cannot be read or lacks a column.
    """
    kinds: dict[str, set[str]] = defaultdict(set)
    for row in c.read_table(classes, ("patientId", "class")):
        kinds[row["patientId"]].add(row["class"])
    targets: dict[str, set[str]] = defaultdict(set)
    boxes: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    wrong: dict[str, str] = {}
    sides = ("x", "y", "width", "height")
    for row in c.read_table(labels, ("patientId", *sides, "Target")):
        name, cells = row["patientId"], [row[side] for side in sides]
        targets[name].add(row["Target"])
        if not any(cells):
            continue
        box = _numbers(cells)
        if box is None or min(box[2:]) <= 0:
            wrong[name] = f"x, y, width, height must be four numbers, the last two above 0, got {', '.join(cells)}"
        elif box not in boxes[name]:
            boxes[name].append(box)
    rows = {}
    for name in sorted({*kinds, *targets}, key=natural_key):
        reason = wrong.get(name) or _contradiction(kinds[name], targets[name], boxes[name])
        if reason:
            wrong[name] = reason
        else:
            kind = kinds[name].pop()
            rows[name] = {"label": CLASSES.index(kind), "class": kind, "boxes": boxes[name]}
    return rows, wrong


def _numbers(cells: Sequence[str]) -> tuple[float, ...] | None:
    try:
        numbers = tuple(map(float, cells))
    except ValueError:
        return None
    return numbers if all(map(math.isfinite, numbers)) else None


def _contradiction(kinds: set[str], targets: set[str], boxes: Sequence[Any]) -> str:
    """What is wrong with the rows of an image; empty if nothing is."""
    if not kinds or not targets:
        there, lacking = (LABELS, CLASS_INFO) if targets else (CLASS_INFO, LABELS)
        return f"listed in {there}, but not in {lacking}"
    if len(kinds) > 1:
        return f"several classes in {CLASS_INFO}: {', '.join(sorted(kinds))}"
    (kind,) = kinds
    if kind not in CLASSES:
        return f"class must be one of {', '.join(CLASSES)}, got {kind!r:.60}"
    if targets not in ({"0"}, {"1"}):
        return f"Target must be 0 or 1 in all rows of an image, got {', '.join(sorted(targets))}"
    (target,) = targets
    if (kind == OPACITY) != (target == "1"):
        return f"class {kind}, but Target {target}"
    if (target == "1") != bool(boxes):
        return f"Target {target} {'with' if boxes else 'without'} a box"
    return ""


def read_mapping(path: Path) -> dict[str, str]:
    """Read which patient of the NIH an image of the challenge is of.

    Args:
        path: ``pneumonia-challenge-dataset-mappings_2018.json``, a list of objects with ``subset_img_id`` and
            ``img_id`` (``00012345_006.png``), or a CSV with these columns.

    Returns:
        The NIH's number of the patient per id; "" where the file names several.

    Raises:
        UserError: if it cannot be read, or an entry names no patient.
    """
    if path.name.lower().endswith((".csv", ".csv.gz")):
        entries = list(c.read_table(path, MAPPING_COLUMNS))
    else:
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} cannot be read as JSON ({c.one_line(error)})") from error
    shape = '[{"subset_img_id": "<id>", "img_id": "00012345_006.png"}, ...]'
    if not isinstance(entries, list):
        raise UserError(f"{path} must hold a list {shape}, got a {type(entries).__name__}")
    patients: dict[str, str] = {}
    for number, entry in enumerate(entries):
        name, image = (entry.get(key) for key in MAPPING_COLUMNS) if isinstance(entry, dict) else (None, None)
        match = re.match(r"(\d+)_\d+", image) if isinstance(image, str) else None
        if match is None or not isinstance(name, str):
            raise UserError(f"{path}: entry {number} must be as in {shape}, got {c.one_line(entry)!r:.200}")
        if patients.setdefault(name, match[1]) != match[1]:
            patients[name] = ""
    return patients


@dataclass(frozen=True)
class _Images(c.Settings):
    """The task of the step organise."""

    def convert(self, job: c.Job, target: Path) -> c.Outcome:
        """One radiograph to a PNG, with the sizes of both."""
        frames = read_frames(job.path)
        name = file_stem(job.file)
        if len(frames) > 1:
            raise UnreadableImageError(f"expected one radiograph, got {len(frames)} frames")
        if frames[0].patient not in (None, name):
            raise UnreadableImageError(f"its PatientID is {frames[0].patient}: not the file that its name says")
        try:
            image = c.render(frames[0].pixels, self)
        except c._RejectedError as error:
            raise UnreadableImageError(str(error)) from error
        png = f"images/{job.stem}.png"
        item = {"size": frames[0].pixels.shape[1::-1], "png_size": image.size}
        return c.Outcome(
            job.file,
            images=(png,),
            view=frames[0].meta.get("view_position", ""),
            bytes=(c.write_png(image, target, png),),
            items=(item,),
        )


def organise(
    source: c.Source,
    target: c.Target,
    size: Annotated[
        int, typer.Option(min=c.SMALLEST, max=c.LARGEST, help="Shorter side of the PNGs; the challenge's have 1024.")
    ] = FULL_SIZE,
    mapping: Annotated[
        Path | None, typer.Option(help=f"Whose image an id is; default: {MAPPING} in the source.", show_default=False)
    ] = None,
    workers: c.Workers = c.DEFAULT_WORKERS,
    shard: c.ShardOption = None,
) -> int:
    """Every DICOM file to a grey PNG, with its class and boxes in one datalist.

    Returns:
        The exit code.

    Raises:
        UserError: if a table or the images are missing, the target cannot be used, or no file could be converted.
    """
    for table in (LABELS, CLASS_INFO):
        if not (source / table).is_file():
            raise UserError(f"expected {table} in --source {source}, got none; name the folder that holds {IMAGES}/")
    rows, wrong = read_labels(source / LABELS, source / CLASS_INFO)
    if mapping is None and (source / MAPPING).is_file():
        mapping = source / MAPPING
    patients = {name: name for name in rows} if mapping is None else read_mapping(mapping)

    rejected: dict[str, str] = {}
    found: dict[str, str] = {}
    seen: set[str] = set()
    for file in list_files(source / IMAGES):
        file, name = f"{IMAGES}/{file}", printable(file_stem(file))
        if not file.lower().endswith(".dcm"):
            rejected[file] = "no .dcm file"
            continue
        seen.add(name)
        if name in found:
            rejected[file] = f"the same image as {printable(found[name])}"
        elif name not in rows:
            rejected[file] = wrong.get(name, f"listed neither in {LABELS} nor in {CLASS_INFO}")
        elif not patients.get(name):
            rejected[file] = f"{'several patients' if name in patients else 'no patient'} in {mapping.name}"
        else:
            found[name] = file
    for name in [*rows, *wrong]:
        if name not in seen:
            rejected[f"{IMAGES}/{name}.dcm"] = wrong.get(name, f"listed in {LABELS}, but not found")
    if not found:
        raise UserError(
            f"none of the {len(rows)} images of {source / LABELS} can be used, the first: "
            f"{next(iter(rejected.values()), 'no row')}; name the folder as the challenge publishes it"
        )

    names = sorted(found, key=natural_key)
    settings = _Images("rsna", size, channels=c.Channels.grey)
    jobs = c.make_jobs(source, [found[name] for name in names], names)
    c.prepare_target(source, target, settings)
    outcomes = c.convert(jobs, settings, target, workers, shard)
    if shard:
        return c.finish_shard(outcomes, shard)
    items = []
    for name, job in zip(names, jobs, strict=True):
        outcome, row = outcomes[job.file], rows[name]
        if outcome.reason:
            rejected[job.file] = outcome.reason
            continue
        (sizes,) = outcome.items
        window = (0, 0, sizes["size"][1], sizes["size"][0])
        boxes = [moved for box in row["boxes"] if (moved := _moved(box, window, sizes["png_size"]))]
        if len(boxes) < len(row["boxes"]):
            rejected[job.file] = f"a box lies outside of the image, {'×'.join(map(str, sizes['size']))}"
            continue
        item = {"image": outcome.images[0], "patient": patients[name], **row, "boxes": boxes}
        items.append(item | ({"view": outcome.view} if outcome.view else {}))
    if mapping is None:
        print(
            f"note: each image counts as a patient of its own, though many are of one; --mapping {MAPPING} says whose",
            file=sys.stderr,
        )
    rejected = {file: rejected[file] for file in sorted(rejected, key=natural_key)}
    return c.finish(target, NAME, MODALITY, {"all": items}, rejected, outcomes, label_names=list(CLASSES))


def _moved(box: Sequence[float], window: Box, size: Sequence[int]) -> list[float] | None:
    """A box (x, y, width, height) of an image in pixels of its window resized to ``size`` (width, height).

    What leaves the window is cut off; None if nothing is left.
    """
    top, left, bottom, right = window
    scale_x, scale_y = size[0] / (right - left), size[1] / (bottom - top)
    start_x, end_x = max(box[0], left), min(box[0] + box[2], right)
    start_y, end_y = max(box[1], top), min(box[1] + box[3], bottom)
    if start_x >= end_x or start_y >= end_y:
        return None
    moved = ((start_x - left) * scale_x, (start_y - top) * scale_y, (end_x - start_x) * scale_x)
    return [round(number, 2) for number in (*moved, (end_y - start_y) * scale_y)]


# ---------------------------------------------------------------------------------------------------------------------
# crop


def read_boxes(path: Path) -> tuple[dict[str, Box], dict[str, str]]:
    """Read the boxes of the lungs.

    Args:
        path: CSV with the columns image, top, left, bottom, right; whole pixels, bottom and right exclusive.

    Returns:
        The box (top, left, bottom, right) per image; and per image whose box cannot be used the reason.

    Raises:
        UserError: if it cannot be read or lacks a column.
    """
    boxes: dict[str, Box] = {}
    wrong: dict[str, str] = {}
    for row in c.read_table(path, ("image", *SIDES)):
        image = posixpath.normpath(row["image"])
        numbers = _numbers([row[side] for side in SIDES])
        if numbers is None or not all(number.is_integer() for number in numbers):
            got = ", ".join(row[side] for side in SIDES)
            wrong[image] = f"top, left, bottom, right must be four whole numbers, got {got}"
            continue
        top, left, bottom, right = box = tuple(map(int, numbers))
        if top >= bottom or left >= right:
            wrong[image] = f"its box is empty: {_told(box)}"
        elif boxes.setdefault(image, box) != box:
            wrong[image] = f"two boxes in {path.name}: {_told(boxes[image])} and {_told(box)}"
    return {image: box for image, box in boxes.items() if image not in wrong}, wrong


def _told(box: Box) -> str:
    return ", ".join(f"{side} {number}" for side, number in zip(SIDES, box, strict=True))


@dataclass(frozen=True)
class _CropJob(c.Job):
    """An image, its box, and the file that this is from."""

    box: Box
    boxes: str


@dataclass(frozen=True)
class _Crop:
    """The task of the step crop."""

    dataset: str
    size: int
    aspect: str

    def convert(self, job: _CropJob, target: Path) -> c.Outcome:
        """One image to its lungs."""
        # another table of boxes may say otherwise of this image
        used = ((job.boxes, *(c.file_key(job.boxes) or (None, None))),)
        (frame, *_) = read_frames(job.path)
        height, width = frame.pixels.shape[:2]
        top, left, bottom, right = window = job.box
        if min(top, left) < 0 or bottom > height or right > width:
            reason = f"its box leaves the image, {width}×{height}: {_told(job.box)}"
            return c.Outcome(job.file, reason=reason, used=used)
        if self.aspect == Aspect.keep:
            top, left, bottom, right = window = _square(job.box, height, width)
        pixels = frame.pixels if frame.pixels.ndim == 2 else frame.pixels @ c.LUMA
        black = ((max(-top, 0), max(bottom - height, 0)), (max(-left, 0), max(right - width, 0)))
        part = np.pad(pixels[max(top, 0) : bottom, max(left, 0) : right], black)
        plane = c.quantise(c.resize(part, (self.size, self.size), None), wide=False)
        if plane.min() == plane.max():
            return c.Outcome(job.file, reason="all pixels in its box have the same value", used=used)
        png = f"images/{job.stem}.png"
        size = c.write_png(Image.fromarray(plane), target, png)
        return c.Outcome(job.file, images=(png,), bytes=(size,), items=({"window": window},), used=used)


def _square(box: Box, height: int, width: int) -> Box:
    """The smallest square around a box, moved into the image; if that is too small, in its middle and beyond it."""
    top, left, bottom, right = box
    side = max(bottom - top, right - left)

    def start(low: int, high: int, end: int) -> int:
        return (end - side) // 2 if side > end else min(max((low + high - side) // 2, 0), end - side)

    top, left = start(top, bottom, height), start(left, right, width)
    return top, left, top + side, left + side


def split_classes(
    items: Sequence[Item], goals: Mapping[tuple[int, ...], Mapping[str, float]], seed: int = 0
) -> dict[str, list[Item]]:
    """Split by patient so that every class is divided in its own proportions.

    As :func:`medgen.data.split_by_patient`, which knows no classes: each patient, those with many images first, goes to
    the split that lacks most of what they have. With many patients of one image each class is within a few images of
    its proportions.

    Args:
        items: with ``image``, ``patient`` and ``label``.
        goals: number of images in each split, or anything in proportion to it, per class, which is a group of labels.
        seed: of the split; the order of the items changes nothing.

    Returns:
        The items per split, in natural order of ``image``.
    """
    class_of = {label: labels for labels in goals for label in labels}
    patients: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        patients[item["patient"]].append(item)
    count = Counter(class_of[item["label"]] for item in items)
    target = {
        (labels, split): goal * count[labels] / sum(goals[labels].values())
        for labels in goals
        for split, goal in goals[labels].items()
    }
    lacking = dict(target)
    splits: dict[str, list[Item]] = {split: [] for split in SPLITS}

    def draw(patient: str) -> tuple[int, bytes]:
        return -len(patients[patient]), hashlib.sha256(f"{seed}\0{patient}".encode()).digest()

    for patient in sorted(patients, key=draw):
        own = Counter(class_of[item["label"]] for item in patients[patient])

        def need(split: str, own: Counter = own) -> tuple[float, float]:
            keys = [(labels, split) for labels in own]
            if not all(target[key] for key in keys):
                return -math.inf, 0  # a split that shall have none of a class
            lack = sum(own[key[0]] * lacking[key] / target[key] for key in keys)
            return lack, sum(target[key] for key in keys)

        home = max(SPLITS, key=need)
        splits[home] += patients[patient]
        for labels, images in own.items():
            lacking[labels, home] -= images
    for members in splits.values():
        members.sort(key=lambda item: natural_key(item["image"]))
    return splits


def _preset_goals(preset: Preset, items: Sequence[Item], validation: float) -> Goals:
    """Numbers of images of a preset: training first, then validation, then test.

    All are made smaller alike where a class has fewer images than training takes.
    """
    numbers = PRESETS[preset]
    there = {labels: sum(item["label"] in labels for item in items) for labels in numbers}
    if not all(there.values()):
        raise UserError(f"--preset {preset} needs normal and abnormal images, got none of one; leave it out")
    scale = 1.0
    if any(there[labels] < train for labels, (train, _) in numbers.items()):
        scale = min(there[labels] / sum(wanted) for labels, wanted in numbers.items())
    goals = {}
    for labels, (train, test) in numbers.items():
        learn = max(1, round(train * scale))
        left = there[labels] - learn
        kept = min(max(1, round(learn * validation)), left // 2) if validation else 0
        tested = min(max(1, round(test * scale)), left - kept)
        goals[labels] = dict(zip(SPLITS, (learn, kept, tested), strict=True))
    if any((goals[labels]["training"], goals[labels]["test"]) != wanted for labels, wanted in numbers.items()):
        of_paper = " and ".join(f"{sum(pair):,}" for pair in numbers.values())
        here = " and ".join(f"{count:,}" for count in there.values())
        taken = ", ".join(f"{name} {' and '.join(f'{goal[name]:,}' for goal in goals.values())}" for name in SPLITS)
        smaller = f", the paper's numbers times {scale:.4g}" if scale < 1 else ""
        print(
            f"note: --preset {preset} is of {of_paper} images (normal and abnormal), here are {here}: taken for "
            f"{taken}{smaller}",
            file=sys.stderr,
        )
    return goals


def crop(
    source: Annotated[Path, typer.Option(help="What organise has written, or its datalist.", show_default=False)],
    target: c.Target,
    boxes: Annotated[
        Path, typer.Option(help="Lungs, as CSV: image, top, left, bottom, right in pixels.", show_default=False)
    ],
    size: Annotated[int, typer.Option(min=c.SMALLEST, max=c.LARGEST, help="Side of the square PNGs in pixels.")] = 512,
    aspect: Annotated[
        Aspect, typer.Option(help="stretch: the box to a square, as the source; keep: the square around the box.")
    ] = Aspect.stretch,
    split: Annotated[
        tuple[float, float, float] | None,
        typer.Option(metavar="TRAIN VAL TEST", help="Shares of the images of each class; default: 0.8 0.1 0.1."),
    ] = None,
    preset: Annotated[Preset | None, typer.Option(help="Numbers of images instead of --split.")] = None,
    validation: Annotated[
        float | None,
        typer.Option(
            min=0, max=0.5, help=f"Validation images, as a share of --preset's training part; default: {VALIDATION}."
        ),
    ] = None,
    workers: c.Workers = c.DEFAULT_WORKERS,
    shard: c.ShardOption = None,
    seed: c.Seed = 0,
) -> int:
    """Every image to the box of its lungs, and the datalists: of all classes, and of each.

    Returns:
        The exit code.

    Raises:
        UserError: if the datalist or the boxes cannot be used, or the target, or no image could be cropped.
    """
    if preset is not None and split is not None:
        raise typer.BadParameter("--preset excludes --split: give one")
    if preset is None and validation is not None:
        raise typer.BadParameter("--validation goes with --preset; --split says how many are for validation")
    shares = dict(zip(SPLITS, split or c.DEFAULT_SPLIT, strict=True))
    split_by_patient([], shares)  # wrong shares are refused before anything is read
    datalist = source / "datalist.json" if source.is_dir() else source
    if not datalist.is_file():
        raise UserError(
            f"expected what organise has written, got no {datalist}; run: python -m preprocessing.rsna organise "
            "--source CHALLENGE --target DIR, and name DIR as --source here"
        )
    content = validate_datalist(datalist)
    rows = {posixpath.normpath(item["image"]): item for item in content.get("all", [])}
    odd = next((image for image, item in rows.items() if item.get("label") not in range(len(CLASSES))), None)
    if not rows or odd:
        got = f"the label {rows[odd].get('label')!r} of {odd}" if odd else "no list called all"
        raise UserError(f"--source must be what organise has written, got {got} in {datalist}")
    found, wrong = read_boxes(boxes)
    rejected = {
        image: wrong.get(image, f"no box in {boxes.name}: no lungs were found in it, or it was not looked at")
        for image in rows
        if image not in found
    }
    unknown = {image: f"has a box, but is not in {datalist.name}" for image in [*found, *wrong] if image not in rows}
    files = sorted(rows.keys() & found.keys(), key=natural_key)
    if not files:
        first = next(iter(wrong.items()), None) if not found else None
        got = f"{first[0]}: {first[1]}" if first else f"{len(found)} boxes, the first of {next(iter(found), 'none')}"
        raise UserError(
            f"expected boxes of the {len(rows)} images of {datalist} in {boxes}, got {got}; name the table "
            "that was made of this datalist"
        )

    task = _Crop("rsna crop", size, aspect)
    root = datalist.parent
    jobs = [
        _CropJob(job.path, job.file, job.stem, found[file], str(boxes.resolve()))
        for file, job in zip(files, c.make_jobs(root, files, [f.removeprefix("images/") for f in files]), strict=True)
    ]
    c.prepare_target(root, target, task)
    outcomes = c.convert(jobs, task, target, workers, shard)
    if shard:
        return c.finish_shard(outcomes, shard)
    items = []
    for file, job in zip(files, jobs, strict=True):
        outcome, row = outcomes[job.file], rows[file]
        if outcome.reason:
            rejected[file] = outcome.reason
            continue
        window = outcome.items[0]["window"]
        moved = [_moved(box, window, (size, size)) for box in row.get("boxes", [])]
        items.append({**row, "image": outcome.images[0], "boxes": [box for box in moved if box]})

    rejected = dict(sorted((rejected | unknown).items(), key=lambda row: natural_key(row[0])))
    extra: dict[str, Any] = {"label_names": list(CLASSES), "seed": seed}
    splits: dict[str, list[Item]] = {name: [] for name in SPLITS}
    if items and preset is not None:
        goals = _preset_goals(preset, items, VALIDATION if validation is None else validation)
        drawn = split_classes(items, goals, seed)
        for labels, goal in goals.items():
            for name in SPLITS:
                own = [item for item in drawn[name] if item["label"] in labels]
                splits[name] += pick_images(own, goal[name], seed)
        for members in splits.values():
            members.sort(key=lambda item: natural_key(item["image"]))
        extra["preset"] = str(preset)
        print(f"left out by --preset {preset}: {len(items) - sum(map(len, splits.values()))} images")
    elif items:
        count = Counter(item["label"] for item in items)
        goals = {(label,): {name: share * n for name, share in shares.items()} for label, n in count.items()}
        splits = split_classes(items, goals, seed)
    if items:
        for name, labels in DATALISTS.items():
            own = {part: [i for i in members if i["label"] in labels] for part, members in splits.items()}
            write_datalist(target / f"datalist_{name}.json", f"{NAME}, {name}", MODALITY, own, **extra)
            print(f"datalist_{name}.json: " + ", ".join(f"{part} {len(members)}" for part, members in own.items()))
    code = c.finish(target, NAME, MODALITY, splits, rejected, outcomes, **extra)
    ill = [item for members in splits.values() for item in members if item["label"] == CLASSES.index(OPACITY)]
    if outside := sum(not item["boxes"] for item in ill):
        print(f"{outside} of {len(ill)} images of {OPACITY} have no box: their opacities lie outside of the crop")
    return code


app = c.new_steps((organise, crop), __doc__)

if __name__ == "__main__":
    sys.exit(c.main(app))
