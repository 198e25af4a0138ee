"""MIMIC-CXR: radiographs to PNGs, and reports to captions, in four steps that share one target:

python -m preprocessing.mimic_cxr organise --source mimic-cxr-jpg/2.0.0 --target data/mimic

python -m preprocessing.mimic_cxr create_ids --source mimic-cxr-jpg/2.0.0 --target data/mimic

python -m preprocessing.mimic_cxr sections --source mimic-cxr-jpg/2.0.0 --target data/mimic

python -m preprocessing.mimic_cxr sentences --source mimic-cxr-jpg/2.0.0 --target data/mimic

organise makes TARGET/images/p10/p10000032/s50414267/ID.png of every JPEG or DICOM file in the folders of a study.

create_ids picks images by their view in mimic-cxr-2.0.0-metadata.csv, splits them by patient and writes
TARGET/datalist.json: image, patient, study, view and, with mimic-cxr-2.0.0-chexpert.csv, labels (what is certainly
there; [] for "No Finding"). The tables may end in .gz. All images of the table with the view are split, organised or
not, so that a patient stays where they are when more are organised. For a model conditioned on labels, --label
"Pleural Effusion" adds label: 1 where the finding is present, 0 where it is absent or the study has "No Finding"; other
images are left out.

sections cuts every report, files/p10/p10000032/s50414267.txt or, where there is no such file, a member of
mimic-cxr-reports.zip, into its sections: TARGET/sections/files/p10/p10000032/s50414267.json, and two tables of all,
mimic_cxr_sectioned.csv (study, impression, findings, last_paragraph, comparison) and mimic_cxr_sections.csv (study, the
one text that describes the image best).

sentences cuts findings and impression, or where there are none the last paragraph, into sentences,
TARGET/sentences/files/p10/p10000032/s50414267.json, and adds to each item of the datalist sentences and text. An image
without a usable report stays there, with [] and "".

What could not be used, or only in part, has a row in TARGET/rejected.csv that begins with the name of the step. The
same command again goes on where it was interrupted, does what is new or has changed, and removes what came of a file
that is gone. The last two steps start anew when TARGET/sections or TARGET/sentences is deleted; create_ids, when
TARGET/datalist.json is.

With --shard 0/8 to --shard 7/8, on any machines at once, each of eight processes does its part of a step, create_ids
excepted; the same command without --shard then does what is missing and writes the tables, the same bytes as one
process alone.

Exit codes: 0 all went well; 3 the step is finished, but files were rejected; 1 nothing could be written; 2 wrong usage;
75 some files could not be read, but may be the next time; 130 interrupted.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image, ImageOps

from medgen.data.datalist import (
    list_files,
    natural_key,
    printable,
    split_by_patient,
    validate_datalist,
    write_datalist,
    write_rejected,
)
from medgen.errors import UserError
from medgen.output import atomic_file, atomic_write_text
from preprocessing import _convert as c
from preprocessing._report_sections import read_overrides, read_report, section_report
from preprocessing._report_sentences import Splitter, label_sentences, make_splitter, report_sentences, strip_numbering

__all__ = ["FINDINGS", "app", "create_ids", "organise", "read_chexpert", "read_metadata", "sections", "sentences"]

# fmt: off
FINDINGS = (  # the columns of mimic-cxr-2.0.0-chexpert.csv, in its order, but for No Finding
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum", "Fracture", "Lung Lesion",
    "Lung Opacity", "Pleural Effusion", "Pleural Other", "Pneumonia", "Pneumothorax", "Support Devices",
)
# fmt: on

NO_FINDING = "No Finding"  # no finding of the table but support devices, says the labeller

NAME, MODALITY = "MIMIC-CXR", "X-ray"
# what each step writes below the target
STEPS = {"organise": "images", "create_ids": "datalist.json", "sections": "sections", "sentences": "sentences"}
STUDY = r"p\d\d/p\d{8}/s\d{8}"
IMAGE_FILE = re.compile(rf"(?:^|/)({STUDY}/[^/]+)\.(?:jpe?g|dcm)$", re.IGNORECASE)
REPORT_FILE = re.compile(rf"(?:^|/)({STUDY})\.txt$")
LOOSE_IMAGE = re.compile(r"\.(?:jpe?g|dcm)$", re.IGNORECASE)
REDUCED = 2  # times the size of the PNGs that a JPEG is decoded at, or more
REPORTS_ZIP = "mimic-cxr-reports.zip"
LONGEST_REPORT = 1 << 20  # bytes; the longest of MIMIC-CXR has some thousands
NO_VIEW = ("", "-")  # what the table has where the view is not known
ALL_VIEWS = "all"
SPLITS = {"train": "training", "validate": "validation", "test": "test"}  # MIMIC's names and ours
# 90,000, 1,161 and 5,000 of 96,161 images, as generative_chestxray has them: there by image, here by patient
SHARES = (0.936, 0.012, 0.052)
TEXT_FIELDS = ("sentences", "text")  # of an item; what the last step adds
SECTIONED = ("impression", "findings", "last_paragraph", "comparison")

Item = dict[str, Any]


class SplitterKind(StrEnum):
    """What cuts a text into sentences."""

    auto = "auto"
    spacy = "spacy"
    rules = "rules"


# ---------------------------------------------------------------------------------------------------------------------
# what the steps leave for each other


def _state_file(target: Path, step: str) -> Path:
    return target / f".{step}.json"


def _state(target: Path, step: str) -> dict[str, Any] | None:
    """Settings and rejected files of a step that is finished; None before."""
    try:
        state = json.loads(_state_file(target, step).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) else None


def _need(step: str, before: str, source: Path | None, target: Path) -> dict[str, Any]:
    """What an earlier step has left; refused where it has not finished."""
    state = _state(target, before)
    if state is None or not (target / STEPS[before]).exists():
        raise UserError(
            f"{step} needs what {before} writes, got a --target {target} where it has not finished; run first: "
            f"python -m preprocessing.mimic_cxr {before} --source {source or 'DIR'} --target {target}"
        )
    return state


def _leave(
    target: Path,
    step: str,
    rejected: Mapping[str, str],
    settings: Mapping[str, Any] | None = None,
    outcomes: Mapping[str, c.Outcome] | None = None,
) -> int:
    """Note what a finished step rejected and write the rows of all steps; gives the exit code."""
    rejected = {file: rejected[file] for file in sorted(rejected, key=natural_key)}
    rows: dict[str, str] = {}
    try:
        atomic_write_text(_state_file(target, step), json.dumps({"settings": settings, "rejected": rejected}) + "\n")
    except OSError as error:
        raise UserError(f"--target {target} cannot be written to ({error.strerror or error})") from error
    for name in STEPS:
        for file, reason in (_state(target, name) or {}).get("rejected", {}).items():
            rows[file] = "; ".join(filter(None, (rows.get(file), f"{name}: {reason}")))
    write_rejected(target / "rejected.csv", rows)
    return c.exit_code(outcomes or {}, rejected)


def _why(target: Path, rejected: Mapping[str, str]) -> str:
    return f"rejected {len(rejected)}" + (f" (reasons: {target / 'rejected.csv'})" if rejected else "")


# ---------------------------------------------------------------------------------------------------------------------
# organise


@dataclass(frozen=True)
class _JpegJob(c.Job):
    """A JPEG, and the DICOM file of the same image; "" where there is none."""

    dicom: str = ""

    def is_made_of(self, used: Sequence[str]) -> bool:
        """The DICOM file is looked at only where the JPEG cannot be used."""
        return not used or list(used) == [self.dicom]


@dataclass(frozen=True)
class _Images(c.Settings):
    """The task of the step organise."""

    def convert(self, job: c.Job, target: Path) -> c.Outcome:
        """One image to a PNG; where its JPEG cannot be used, its DICOM file is."""
        if not isinstance(job, _JpegJob):
            return self._to_png(job, target)
        outcome = c.convert_file(c.Job(job.path, job.file, job.stem), self, str(target))
        if outcome.images:
            return outcome
        if not job.dicom:
            return replace(outcome, used=(("", None, None),))  # one may arrive
        second = c.convert_file(c.Job(job.dicom, job.file, job.stem), self, str(target))
        reason = "its DICOM file was used" if second.images else f"its DICOM file: {second.reason}"
        used = ((job.dicom, *(second.key or (None, None))),)
        final = outcome.final and second.final
        return replace(second, reason=f"{outcome.reason}; {reason}", final=final, used=used)

    def _to_png(self, job: c.Job, target: Path) -> c.Outcome:
        """One file; a large grey JPEG is decoded at a fraction of its size, which takes a third of the time.

        Against decoding all of it, radiographs of 2544² pixels at 512² differ by 0.1 of 255 in the mean, 3 at most.
        """
        try:
            with Image.open(job.path, formats=["JPEG"]) as image:
                if image.mode != "L":
                    raise ValueError("not grey")
                # half, a quarter or an eighth in the JPEG's own transform, as long as twice the size asked for is left
                image.draft("L", (REDUCED * self.size, REDUCED * self.size))
                pixels = np.asarray(ImageOps.exif_transpose(image), dtype=np.float32) / 255
            png = c.render(pixels, self)
        except Exception:  # DICOM, or anything odd: the reader of all formats knows what to do with it, or what to say
            return super().convert(job, target)
        name = f"images/{job.stem}.png"
        return c.Outcome(job.file, images=(name,), bytes=(c.write_png(png, target, name),))


def organise(
    source: c.Source,
    target: c.Target,
    size: c.Size = 512,
    workers: c.Workers = c.DEFAULT_WORKERS,
    shard: c.ShardOption = None,
) -> int:
    """Every JPEG and DICOM file of the studies to a grey PNG whose shorter side is --size.

    Where a study has an image as JPEG and as DICOM, the JPEG is taken, as MIMIC-CXR-JPG's tables describe it, and the
    DICOM file where the JPEG cannot be used.

    Returns:
        The exit code.

    Raises:
        UserError: if there is no image, the target cannot be used, or no file could be converted.
    """
    rejected: dict[str, str] = {}
    found: dict[str, str] = {}
    dicoms: dict[str, str] = {}  # of images that are there as JPEG, too
    files = [file for file in list_files(source) if LOOSE_IMAGE.search(file)]
    for file in sorted(files, key=_is_dicom):
        match = IMAGE_FILE.search(file)
        if match is None:
            rejected[printable(file)] = "not in the folder of a study, files/p10/p10000032/s50414267/"
        elif _is_dicom(file) and match[1] not in dicoms and not _is_dicom(found.get(match[1], file)):
            dicoms[match[1]] = file
        elif match[1] in found:
            rejected[printable(file)] = f"the same image as {printable(found[match[1]])}"
        else:
            found[match[1]] = file
    if not found:
        raise UserError(
            f"expected files/p10/p10000032/s50414267/ID.jpg (or .dcm) below --source {source}, got "
            f"{len(files)} images elsewhere; name the folder that holds files/"
        )
    names = sorted(found, key=natural_key)
    settings = _Images("mimic_cxr", size, channels=c.Channels.grey)
    jobs = c.make_jobs(source, [found[name] for name in names], [f"{name}.png" for name in names])
    for number, (name, job) in enumerate(zip(names, jobs, strict=True)):
        if not _is_dicom(found[name]):
            dicom = str(source / dicoms[name]) if name in dicoms else ""
            jobs[number] = _JpegJob(job.path, job.file, job.stem, dicom)
    c.prepare_target(source, target, settings)
    outcomes = c.convert(jobs, settings, target, workers, shard)
    if shard:
        return c.finish_shard(outcomes, shard)
    c.clear_parts(target)
    rejected |= {file: outcome.reason for file, outcome in outcomes.items() if outcome.reason}
    code = _leave(target, "organise", rejected, outcomes=outcomes)
    images = sum(len(outcome.images) for outcome in outcomes.values())
    if not images:
        raise UserError(f"no image could be written, all {len(rejected)} were rejected; see {target / 'rejected.csv'}")
    if dicoms:
        print(f"note: {len(dicoms)} images are there as JPEG and as DICOM; the JPEG was taken", file=sys.stderr)
    print(f"wrote {images} images below {target / 'images'}, {_why(target, rejected)}", flush=True)
    return code


def _is_dicom(file: str) -> bool:
    return file.lower().endswith(".dcm")


# ---------------------------------------------------------------------------------------------------------------------
# create_ids


def read_metadata(path: Path) -> dict[str, Item]:
    """Read ``mimic-cxr-2.0.0-metadata.csv``.

    Args:
        path: the table, plain or ``.gz``.

    Returns:
        ``patient``, ``study`` and ``view`` per image, which is named as below ``files/`` and without suffix:
        ``p10/p10000032/s50414267/ID``. ``view`` is "" where it is not known.

    Raises:
        UserError: if it cannot be read or lacks a column.
    """
    images: dict[str, Item] = {}
    for row in c.read_table(path, ("dicom_id", "subject_id", "study_id", "ViewPosition")):
        patient, study, view = row["subject_id"], row["study_id"], row["ViewPosition"]
        name = f"p{patient[:2]}/p{patient}/s{study}/{row['dicom_id']}"
        images.setdefault(name, {"patient": patient, "study": study, "view": "" if view in NO_VIEW else view})
    return images


def read_chexpert(path: Path) -> dict[str, dict[str, float]]:
    """Read ``mimic-cxr-2.0.0-chexpert.csv``, or a table like it, such as NegBio's.

    Args:
        path: the table, plain or ``.gz``.

    Returns:
        Per study 1.0 (present), 0.0 (absent) or -1.0 (uncertain) for the findings that its report mentions, and 1.0
        for No Finding where there is none.

    Raises:
        UserError: if it cannot be read, lacks a column, or has another value.
    """
    values = {"": None, "1.0": 1.0, "0.0": 0.0, "-1.0": -1.0, "1": 1.0, "0": 0.0, "-1": -1.0}
    studies = {}
    columns = (*FINDINGS, NO_FINDING)
    for row in c.read_table(path, ("study_id", *columns)):
        wrong = next((name for name in columns if row[name] not in values), None)
        if wrong is not None:
            raise UserError(
                f"{path}, study {row['study_id']}: {wrong} must be 1.0, 0.0, -1.0 or blank, got {row[wrong]!r:.40}"
            )
        studies[row["study_id"]] = {name: v for name in columns if (v := values[row[name]]) is not None}
    return studies


def _class(found: Mapping[str, float] | None, finding: str) -> int | None:
    """1 where a study has the finding, 0 where it has not; None where its report is uncertain, or does not say."""
    value = (found or {}).get(finding)
    # "No Finding" says nothing of support devices
    if value is None and finding != "Support Devices" and (found or {}).get(NO_FINDING) == 1:
        return 0
    return {1.0: 1, 0.0: 0}.get(value)


def _table(source: Path, name: str, option: str, given: Path | None) -> Path | None:
    """The table that an option names, else the newest of its name in the source."""
    if given is not None:
        if not given.is_file():
            raise UserError(f"--{option} must be a CSV table, plain or .gz; {given} is no file")
        return given
    tables = [path for pattern in ("csv", "csv.gz") for path in source.glob(f"mimic-cxr-*-{name}.{pattern}")]
    return max(tables, key=lambda path: natural_key(path.name), default=None)


def _shares(split: tuple[float, float, float]) -> dict[str, float]:
    total = math.fsum(split)
    # numbers of images are shares, too: patients have several, so that no split by patient meets them exactly
    numbers = min(split) >= 0 and all(float(share).is_integer() for share in split)
    scale = total if numbers and total > 1 else 1
    return dict(zip(SPLITS.values(), (share / scale for share in split), strict=True))


def create_ids(
    source: c.Source,
    target: c.Target,
    view: Annotated[
        list[str] | None,
        typer.Option(metavar="VIEW", help="ViewPosition to keep, exactly as in the table; repeat for several; all."),
    ] = None,
    split: Annotated[
        tuple[float, float, float],
        typer.Option(metavar="TRAIN VAL TEST", help="Shares or numbers of the images; patients are never divided."),
    ] = SHARES,
    official: Annotated[bool, typer.Option("--official", help="Take MIMIC's own split from the source.")] = False,
    split_file: Annotated[
        Path | None, typer.Option(help="Take this table's: dicom_id and split (train, validate or test).")
    ] = None,
    metadata: Annotated[Path | None, typer.Option(help="Default: mimic-cxr-*-metadata.csv in the source.")] = None,
    chexpert: Annotated[Path | None, typer.Option(help="Default: mimic-cxr-*-chexpert.csv in the source.")] = None,
    label: Annotated[
        str | None,
        typer.Option(
            metavar="FINDING",
            help='Add label, 0 or 1, for this CheXpert column, such as "Pleural Effusion"; leaves out images where the '
            "finding is uncertain or not mentioned.",
        ),
    ] = None,
    seed: c.Seed = 0,
) -> int:
    """Pick images by their view, split them by patient, and write the datalist.

    Returns:
        The exit code.

    Raises:
        UserError: if organise has not run, a table is missing, or no image is left.
    """
    views = list(dict.fromkeys(view or ["PA"]))
    shares = _shares(split)
    split_by_patient([], shares)  # wrong shares are refused before any table is read
    if label is not None and label not in FINDINGS:
        raise UserError(f"--label must be one of {', '.join(FINDINGS)}; got {label}")
    table = _table(source, "metadata", "metadata", metadata)
    if table is None:
        raise UserError(f"expected mimic-cxr-2.0.0-metadata.csv in --source {source}; name it with --metadata")
    labels_table = _table(source, "chexpert", "chexpert", chexpert)
    if label and labels_table is None:
        raise UserError(f"--label needs mimic-cxr-2.0.0-chexpert.csv in --source {source}; name it with --chexpert")
    split_table = _table(source, "split", "split-file", split_file) if official or split_file else None
    if official and split_table is None:
        raise UserError(f"expected mimic-cxr-2.0.0-split.csv in --source {source}; name it with --split-file")
    converted = _need("create_ids", "organise", source, target)["rejected"]
    settings = {"view": views, "split": split_table.name if split_table else list(split)}
    settings |= ({} if split_table else {"seed": seed}) | ({"label": label} if label else {})
    datalist = target / "datalist.json"
    before = _made_alike(target, datalist, settings)

    listed = read_metadata(table)
    labels = read_chexpert(labels_table) if labels_table else {}
    images = {f.removesuffix(".png"): f"images/{f}" for f in list_files(target / "images") if f.endswith(".png")}
    failed = {match[1]: file for file in converted if (match := IMAGE_FILE.search(file))}
    rejected = {image: f"not listed in {table.name}" for name, image in images.items() if name not in listed}
    wanted = {name: row for name, row in listed.items() if views == [ALL_VIEWS] or row["view"] in views}
    parts = _official_parts(split_table) if split_table else {}
    items: list[Item] = []
    unlabelled = 0
    for name, row in wanted.items():
        if name not in images:
            file = failed.get(name, f"files/{name}.jpg")
            rejected[file] = f"listed in {table.name}, but not converted"
        elif split_table and name.rsplit("/", 1)[-1] not in parts:
            rejected[images[name]] = f"not listed in {split_table.name}"
        else:
            found = labels.get(row["study"])
            item = {"image": images[name], **row}
            if label:
                item["label"] = _class(found, label)
                if item["label"] is None:
                    unlabelled += 1
                    continue
            if found is not None:
                item["labels"] = [finding for finding in FINDINGS if found.get(finding) == 1]
            items.append(item | before.get(images[name], {}))
    _tell_views(listed, wanted, views)
    if unlabelled:
        print(f"left out by --label {label}: {unlabelled} images, where it is uncertain or not mentioned")
    if not items and unlabelled:
        raise UserError(f"no image has a label; choose another --label than {label}")
    if not items:
        raise UserError(
            f"expected images with view {' or '.join(views)}, got none of the {len(listed)} in {table} in {target}; "
            "choose another --view, or run organise again"
        )
    if split_table:
        homes = {item["image"]: parts[Path(item["image"]).stem] for item in items}
    else:
        # all of the table and not what is converted by now: patients must not change their split when more come
        known = [{"image": f"images/{name}.png", **row} for name, row in wanted.items() if row["patient"]]
        drawn = split_by_patient(known, shares, seed)
        homes = {item["image"]: part for part, members in drawn.items() for item in members}
    splits: dict[str, list[Item]] = {name: [] for name in SPLITS.values()}
    for item in sorted(items, key=lambda item: natural_key(item["image"])):
        splits[homes[item["image"]]].append(item)
    names = {"label_names": [f"No {label}", label] if label else list(FINDINGS)} if labels else {}
    # the state first: a run killed between the two would leave a datalist that seems to be of another origin
    code = _leave(target, "create_ids", rejected, settings)
    write_datalist(datalist, NAME, MODALITY, splits, **names)
    for name, members in splits.items():
        print(f"{name}: {len(members)} images of {len({item['patient'] for item in members})} patients")
    if labels_table is None:
        print("note: no labels, since no mimic-cxr-2.0.0-chexpert.csv is in the source", file=sys.stderr)
    if (target / STEPS["sentences"]).exists() and not all("text" in item for item in items):
        print("note: run sentences again, which adds the texts to the new datalist", file=sys.stderr)
    empty = [name for name, members in splits.items() if not members]
    if empty:
        print(f"note: no images for {' and '.join(empty)}: too few patients, or --split says so", file=sys.stderr)
    print(f"wrote {datalist}, {_why(target, rejected)}", flush=True)
    return code


def _made_alike(target: Path, datalist: Path, settings: dict[str, Any]) -> dict[str, Item]:
    """What the last step added to each image of the datalist, if one is there that was made with these settings."""
    if not datalist.exists():
        return {}
    old = (_state(target, "create_ids") or {}).get("settings")
    if old is None:
        raise UserError(f"{datalist} was not made by create_ids; choose another --target")
    if old != settings:
        other = [name for name in {**old, **settings} if old.get(name) != settings.get(name)]
        told = ", ".join(f"{name} {old.get(name)} (now {settings.get(name)})" for name in other)
        raise UserError(f"{datalist} was made with other settings: {told}; delete it to make it anew")
    items = [item for split in SPLITS.values() for item in validate_datalist(datalist).get(split, [])]
    return {item["image"]: {key: item[key] for key in TEXT_FIELDS if key in item} for item in items}


def _official_parts(path: Path) -> dict[str, str]:
    """Our name of the split of each image."""
    parts = {}
    for row in c.read_table(path, ("dicom_id", "split")):
        if row["split"] not in SPLITS:
            raise UserError(f"{path}: split must be {', '.join(SPLITS)}, got {row['split']!r:.40} ({row['dicom_id']})")
        parts[row["dicom_id"]] = SPLITS[row["split"]]
    return parts


def _tell_views(listed: Mapping[str, Item], wanted: Mapping[str, Item], views: Sequence[str]) -> None:
    left_out = Counter(row["view"] or "none" for name, row in listed.items() if name not in wanted)
    if not left_out:
        return
    told = ", ".join(f"{name} {count}" for name, count in left_out.most_common())
    print(f"left out by --view {' '.join(views)}: {left_out.total()} images ({told})")
    studies = {row["study"] for row in listed.values()}
    without = studies - {row["study"] for row in wanted.values()}
    print(f"studies without a view {' or '.join(views)}: {len(without)} of {len(studies)}")


# ---------------------------------------------------------------------------------------------------------------------
# sections


@lru_cache(maxsize=1)
def _archive(path: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


@lru_cache(maxsize=1)
def _overrides(path: str) -> dict[str, Any]:
    return read_overrides(Path(path)) if path else {}


@dataclass(frozen=True)
class _Sections:
    """The task of the step sections; ``overrides`` is a path, ``overrides_hash`` of what it holds."""

    dataset: str
    overrides: str = ""
    overrides_hash: str = ""

    def convert(self, job: c.Job, target: Path) -> c.Outcome:
        """Cut one report into its sections."""
        text, problem = read_report(_report_bytes(job))
        if problem and not text:
            return c.Outcome(job.file, reason=problem)
        study = job.stem.rsplit("/", 1)[-1]
        found = section_report(text, study, _overrides(self.overrides))
        if found.caption is None and not found.overridden:
            nothing = "neither impression, findings, last paragraph nor comparison in it"
            problem = f"{problem}; {nothing}" if problem else nothing
        fields = {name: getattr(found, name) for name in SECTIONED}
        content = {
            "study": study,
            "report": job.file,
            "caption": found.caption,
            **fields,
            "overridden": found.overridden,
            "sections": [{"name": s.name, "text": s.text, "start": s.start} for s in found.sections],
        }
        written = _write_json(target, job.stem, content)
        row = {"study": study, "caption": found.caption, **fields}
        return c.Outcome(job.file, images=(written[0],), bytes=(written[1],), items=(row,), reason=problem)


def _report_bytes(job: c.Job) -> bytes:
    """A report, from its file or out of the archive; too large a one is rejected unread."""
    try:
        with open(job.path, "rb") if job.path.endswith(".txt") else _archive(job.path).open(job.file) as file:
            data = file.read(LONGEST_REPORT + 1)
    # RuntimeError: encrypted, or packed in a way that zipfile does not know
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise c.UnreadableImageError(f"damaged in the archive ({c.one_line(error)})") from error
    if len(data) > LONGEST_REPORT:
        raise c.UnreadableImageError(f"larger than {LONGEST_REPORT} bytes, no report")
    return data


def _write_json(target: Path, stem: str, content: Mapping[str, Any]) -> tuple[str, int]:
    name = f"files/{stem}.json"
    text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
    return name, c.write_whole(target, name, lambda part: part.write_text(text, encoding="utf-8"))


def _report_jobs(reports: Path, rejected: dict[str, str]) -> dict[str, c.Job]:
    """One job per study with a report, in a folder with any folders above ``p10``, or in an archive."""
    if reports.is_dir():
        files = list_files(reports)
    else:
        try:
            with zipfile.ZipFile(reports) as archive:
                files = sorted(archive.namelist(), key=natural_key)
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(
                f"--reports must be a folder or a zip archive, got {reports} ({c.one_line(error)})"
            ) from error
    jobs: dict[str, c.Job] = {}
    for file in files:
        match = REPORT_FILE.search(file)
        if match is None:
            continue
        name = printable(file)
        if match[1] in jobs:
            rejected[name] = f"a second report of the study, beside {jobs[match[1]].file}"
        else:
            # below the target stands the matched end alone, so that no name leads out of it
            jobs[match[1]] = c.Job(str(reports / file if reports.is_dir() else reports), name, match[1])
    return jobs


def sections(
    source: c.Source,
    target: c.Target,
    reports: Annotated[
        Path | None, typer.Option(help="Folder of the reports, or their zip; default: both, in the source.")
    ] = None,
    overrides: Annotated[
        Path | None,
        typer.Option(
            help='What to take for single studies, as JSON {"s10000001": "findings", "s10000002": [120, 480]} (from '
            "character 120 to before 480; [0, 0]: nothing) or CSV with the columns study, section, start, end."
        ),
    ] = None,
    workers: c.Workers = c.DEFAULT_WORKERS,
    shard: c.ShardOption = None,
) -> int:
    """Cut the reports into their sections.

    Returns:
        The exit code.

    Raises:
        UserError: if there is no report, or the target cannot be used.
    """
    rejected: dict[str, str] = {}
    if not source.is_dir():
        raise UserError(f"expected a folder as --source, got {source}")
    place = reports or source
    jobs = _report_jobs(place, rejected)
    if reports is None and (source / REPORTS_ZIP).is_file():
        jobs = _report_jobs(source / REPORTS_ZIP, rejected) | jobs  # a loose file wins
    if not jobs:
        raise UserError(
            f"expected reports p10/p10000032/s50414267.txt below {place} or {REPORTS_ZIP} in it, got none; name their "
            "folder or archive with --reports"
        )
    task = _Sections("mimic_cxr sections")
    if overrides is not None:
        read_overrides(overrides)  # refused before any report is read
        digest = hashlib.sha256(overrides.read_bytes()).hexdigest()[:12]
        task = _Sections(task.dataset, str(overrides.resolve()), digest)
    folder = target / "sections"
    c.prepare_target(place, folder, task, folder="files")
    outcomes = c.convert([jobs[stem] for stem in sorted(jobs, key=natural_key)], task, folder, workers, shard)
    if shard:
        return c.finish_shard(outcomes, shard)
    c.clear_parts(folder)
    rows = [row for outcome in outcomes.values() for row in outcome.items]
    _write_csv(folder / "mimic_cxr_sectioned.csv", ("study", *SECTIONED), rows)
    _write_csv(folder / "mimic_cxr_sections.csv", ("study", "caption"), (row for row in rows if row["caption"]))
    rejected |= {file: outcome.reason for file, outcome in outcomes.items() if outcome.reason}
    code = _leave(target, "sections", rejected, {"reports": str(place.resolve())}, outcomes)
    if overrides is None:
        print(
            "note: MIMIC-CXR's 54 manual overrides are not applied; sections --help says how (--overrides)",
            file=sys.stderr,
        )
    print(f"wrote the sections of {len(rows)} reports below {folder}, {_why(target, rejected)}", flush=True)
    return code


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    try:
        with atomic_file(path, "w") as file:
            table = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error})") from error


# ---------------------------------------------------------------------------------------------------------------------
# sentences


@lru_cache(maxsize=1)
def _splitter(kind: str) -> Splitter:
    return make_splitter(kind)


def _study(item: Mapping[str, Any]) -> str:
    """Where MIMIC-CXR has the study of an item."""
    return f"p{str(item['patient'])[:2]}/p{item['patient']}/s{item.get('study')}"


@dataclass(frozen=True)
class _StudyJob(c.Job):
    """A study's sections, and its labels where template sentences are wanted."""

    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Sentences:
    """The task of the step sentences; ``labels`` is a hash of all labels, or says that there are none."""

    dataset: str
    splitter: str
    labels: str = "not used"

    def convert(self, job: _StudyJob, target: Path) -> c.Outcome:
        """Cut one study's findings and impression into sentences."""
        found = json.loads(Path(job.path).read_text(encoding="utf-8"))
        findings, impression = found["findings"], found["impression"]
        if not (findings or impression):  # what describes the image in a report without such headers
            findings = found["last_paragraph"]
        said = report_sentences(findings, impression, _splitter(self.splitter))
        if job.labels:
            report = " ".join(filter(None, (findings, impression)))
            said += label_sentences(dict.fromkeys(job.labels, 1.0), report)
        item = {"sentences": said, "text": strip_numbering(found["caption"] or "")}
        written = _write_json(target, job.stem, {"sentences": said})
        return c.Outcome(job.file, images=(written[0],), bytes=(written[1],), items=(item,))


def sentences(
    target: c.Target,
    source: Annotated[Path | None, typer.Option(help="Not read; accepted as by the other steps.")] = None,
    splitter: Annotated[
        SplitterKind, typer.Option(help="auto: spaCy's en_core_web_sm where it is installed, else our rules.")
    ] = SplitterKind.auto,
    labels: Annotated[bool, typer.Option("--labels", help="Add template sentences for the CheXpert labels.")] = False,
    workers: c.Workers = c.DEFAULT_WORKERS,
    shard: c.ShardOption = None,
) -> int:
    """Cut the reports of the datalist's images into sentences and add them to the datalist.

    Returns:
        The exit code.

    Raises:
        UserError: if create_ids or sections has not run, or the target cannot be used.
    """
    _need("sentences", "create_ids", source, target)
    sectioned = _need("sentences", "sections", source, target)
    datalist, read = target / "datalist.json", target / "sections"
    content = validate_datalist(datalist)
    items = [item for split in SPLITS.values() for item in content.get(split, [])]
    studies = {_study(item): item for item in items}
    known = {study: tuple(item.get("labels", ())) for study, item in studies.items()} if labels else {}
    if labels and not any("labels" in item for item in items):
        raise UserError(
            f"--labels needs the CheXpert labels, which no item of {datalist} has; delete it and run create_ids with "
            "mimic-cxr-2.0.0-chexpert.csv in --source, or with --chexpert"
        )
    task = _Sentences("mimic_cxr sentences", make_splitter(splitter).name)
    if labels:
        told = json.dumps(sorted(known.items())).encode()
        task = _Sentences(task.dataset, task.splitter, hashlib.sha256(told).hexdigest()[:12])
    jobs = [
        _StudyJob(str(read / "files" / f"{study}.json"), f"{study}.json", study, known.get(study, ()))
        for study in sorted(studies, key=natural_key)
        if re.fullmatch(STUDY, study) and (read / "files" / f"{study}.json").is_file()
    ]
    folder = target / "sentences"
    # not the folder of the sections: the target may be moved
    c.prepare_target(Path(sectioned["settings"]["reports"]), folder, task, folder="files")
    outcomes = c.convert(jobs, task, folder, workers, shard)
    if shard:
        return c.finish_shard(outcomes, shard)
    c.clear_parts(folder)

    files = {match[1]: file for file in sectioned["rejected"] if (match := REPORT_FILE.search(file))}
    rejected: dict[str, str] = {}
    texts = {outcome.file.removesuffix(".json"): outcome.items[0] for outcome in outcomes.values() if outcome.items}
    for study in studies:
        outcome = outcomes.get(f"{study}.json")
        file = files.get(study, f"files/{study}.txt")
        if outcome is not None and outcome.reason:
            rejected[file] = outcome.reason
        elif study not in texts:
            rejected[file] = "no text" if study in files else "no report found"
        elif not texts[study]["sentences"]:
            rejected[file] = "no sentence in it"
    for item in items:
        item.update(texts.get(_study(item), {"sentences": [], "text": ""}))
    write_datalist(datalist, splits=content, **{key: content.pop(key) for key in ("name", "modality")})
    code = _leave(target, "sentences", rejected, outcomes=outcomes)
    mute = sum(not item["sentences"] for item in items)
    count = sum(len(text["sentences"]) for text in texts.values())
    if mute:
        print(f"note: {mute} of {len(items)} images stay in the datalist without sentences", file=sys.stderr)
    print(f"wrote {count} sentences of {len(texts)} studies ({task.splitter}), {_why(target, rejected)}", flush=True)
    return code


app = c.new_steps((organise, create_ids, sections, sentences), __doc__)

if __name__ == "__main__":
    sys.exit(c.main(app))
