"""NIH ChestX-ray14: ``python -m preprocessing.chestxray14 --source DIR --target DIR``.

The source is the dataset as it was published: ``Data_Entry_2017.csv`` or ``Data_Entry_2017_v2020.csv``, the images in
any folders below it (``images/``, ``images_001/images/`` ... ``images_012/images/``), and, if they are there,
``train_val_list.txt`` and ``test_list.txt``. With these the published test set is kept, and validation is taken from
``train_val_list.txt``, by patient; without, or with ``--no-official``, everything is split by patient.

Items carry ``labels`` (the 14 findings, [] for "No Finding"), ``age`` in years, ``sex``, ``view`` and ``follow_up``;
``age`` is missing where the table's is impossible (the 2017 table has patients of 411). All views are converted, as all
published generators of this dataset were trained on all; ``--view PA`` keeps the standing, cleaner ones only.

Rows without an image, images without a row and rows whose name is a path are listed in ``TARGET/rejected.csv``.

With --shard 0/8 to --shard 7/8, on any machines at once, each of eight processes converts its part of the files; the
same command without --shard then does what is missing and writes the tables, the same bytes as one process alone.

Exit codes: 0 all went well; 3 the datalist was written, but files were rejected; 1 nothing could be written; 2 wrong
usage; 75 some files could not be read, but may be the next time; 130 interrupted.
"""

from __future__ import annotations

import csv
import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from medgen.data.datalist import file_stem, list_files, natural_key, split_by_patient
from medgen.errors import UserError
from preprocessing import _convert as c

__all__ = ["FINDINGS", "app", "convert_chestxray14", "read_entries"]

# fmt: off
FINDINGS = (  # the order of the dataset's paper (Wang et al. 2017) and its supplement
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)
# fmt: on
COLUMNS = {  # field: names in the 2017 and the 2020 table
    "image": ("Image Index",),
    "labels": ("Finding Labels",),
    "follow_up": ("Follow-up #",),
    "patient": ("Patient ID",),
    "age": ("Patient Age",),
    "sex": ("Patient Sex", "Patient Gender"),
    "view": ("View Position",),
}
OLDEST = 120  # years
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


class View(StrEnum):
    """Projection of the radiographs to keep."""

    PA = "PA"
    AP = "AP"
    all = "all"


def read_entries(path: Path) -> dict[str, dict[str, Any]]:
    """Read the table of the dataset.

    Args:
        path: ``Data_Entry_2017.csv`` or ``Data_Entry_2017_v2020.csv``.

    Returns:
        Fields of the datalist item (``patient``, ``labels``, ``age``, ``sex``, ``view``, ``follow_up``) per image name.

    Raises:
        UserError: if it cannot be read or lacks a column.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a CSV table ({error})") from error
    # Columns are found by position: the header's own "OriginalImage[Width,Height]" is cut in two by its comma, or not,
    # depending on who has saved the table; both stand to the right of all that is needed here.
    header = [name.strip() for name in rows[0]] if rows else []
    place = {}
    for field, names in COLUMNS.items():
        hit = next((name for name in names if name in header), None)
        if hit is None:
            raise UserError(f"{path} must have a column {' or '.join(names)}, got {', '.join(header) or 'nothing'}")
        place[field] = header.index(hit)
    entries: dict[str, dict[str, Any]] = {}
    for row in rows[1:]:
        cells = {field: row[n].strip() if n < len(row) else "" for field, n in place.items()}
        if not cells["image"]:
            continue
        labels = [label.strip() for label in cells["labels"].split("|")]
        item: dict[str, Any] = {
            "patient": cells["patient"],
            "labels": [label for label in labels if label and label != "No Finding"],
            "age": _years(cells["age"]),
            "sex": cells["sex"],
            "view": cells["view"],
            "follow_up": int(cells["follow_up"]) if cells["follow_up"].isdecimal() else None,
        }
        entries.setdefault(cells["image"], {key: value for key, value in item.items() if value not in (None, "")})
    return entries


def _years(age: str) -> int | None:
    """Age in years of "58", "058Y", "011M" (months) or "012D" (days); None if it is none."""
    match = re.fullmatch(r"(\d+)\s*([YMWD]?)", age.upper())
    if match is None:
        return None
    years = int(match[1]) // {"": 1, "Y": 1, "M": 12, "W": 52, "D": 365}[match[2]]
    return years if years <= OLDEST else None


def _one_file(source: Path, files: list[str], pattern: str) -> Path | None:
    """The source's file of that name, the highest one; of several versions the last."""
    hits = [file for file in files if re.fullmatch(pattern, file.rsplit("/", 1)[-1])]
    return source / min(reversed(hits), key=lambda file: file.count("/")) if hits else None


def _names(path: Path | None) -> set[str] | None:
    return None if path is None else {line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()}


def convert_chestxray14(
    source: c.Source,
    target: c.Target,
    size: c.Size = 512,
    fit: c.FitOption = c.Fit.shorter,
    view: Annotated[View, typer.Option(help="Radiographs to keep by their projection.")] = View.all,
    entries: Annotated[
        Path | None, typer.Option(help="The table; default: the newest Data_Entry_2017*.csv in the source.")
    ] = None,
    official: Annotated[
        bool, typer.Option(help="Keep the published test set where train_val_list.txt and test_list.txt are there.")
    ] = True,
    split: c.SplitOption = c.DEFAULT_SPLIT,
    workers: c.Workers = c.DEFAULT_WORKERS,
    shard: c.ShardOption = None,
    seed: c.Seed = 0,
) -> int:
    """Convert the dataset and write its datalist; see the head of this module.

    Returns:
        The exit code.

    Raises:
        UserError: if the table or the images are missing, the target cannot be used, or no file could be converted.
    """
    settings = c.Settings("chestxray14", size, fit, channels=c.Channels.grey)
    fractions = dict(zip(("training", "validation", "test"), split, strict=True))
    split_by_patient([], fractions)  # wrong shares must not come to light after hours of converting
    files = list_files(source)
    table = entries or _one_file(source, files, r"Data_Entry_2017.*\.csv")
    if table is None:
        raise UserError(
            f"expected Data_Entry_2017*.csv below --source {source}, got none; copy it there or name it with --entries"
        )
    rows = read_entries(table)
    train_val, test = None, None
    if official:
        train_val = _names(_one_file(source, files, r"train_val_list.*\.txt"))
        test = _names(_one_file(source, files, r"test_list.*\.txt"))

    images = [file for file in files if file.lower().endswith(IMAGE_SUFFIXES)]
    rejected: dict[str, str] = {}
    for name in [name for name in rows if not _is_plain(name)]:
        # names become paths below the target, and a table may come from anywhere
        rejected[name] = f"named in {table.name} by a path, expected a plain file name"
        del rows[name]
    found = _locate(rows, images, table.name, rejected)
    wanted: dict[str, str] = {}
    left_out = 0
    for name, row in rows.items():
        part = _part(name, train_val, test)
        if view != View.all and row.get("view") != view:
            left_out += 1
        elif name not in found:
            rejected[name] = f"listed in {table.name}, but not found below the source"
        elif not row.get("patient"):
            rejected[found[name]] = f"no Patient ID in {table.name}"
        elif part is None:
            rejected[found[name]] = "neither in train_val_list.txt nor in test_list.txt (--no-official converts it)"
        else:
            wanted[found[name]] = name
    if not wanted:
        raise UserError(
            f"none of the {len(rows)} images of {table} is below --source {source}"
            + (f" with view {view}" if view != View.all else "")
            + "; name the folder that holds images/ or images_001/"
        )

    files = sorted(wanted, key=natural_key)
    # images/00012/00012345_006.png, however the archives were unpacked: 31 folders instead of 112,120 files in one
    jobs = c.make_jobs(source, files, [f"{wanted[file][:5]}/{wanted[file]}" for file in files])
    c.prepare_target(source, target, settings)
    outcomes = c.convert(jobs, settings, target, workers, shard)
    if shard:
        return c.finish_shard(outcomes, shard)
    rejected |= {file: outcome.reason for file, outcome in outcomes.items() if outcome.reason}
    parts: dict[str, list[dict[str, Any]]] = {"all": [], "train_val": [], "test": []}
    for file, outcome in outcomes.items():
        name = wanted[file]
        parts[_part(name, train_val, test) or "all"] += [{"image": image, **rows[name]} for image in outcome.images]
    splits = split_by_patient(parts["all"], fractions, seed)
    if parts["train_val"] or parts["test"]:
        learn = fractions["training"] + fractions["validation"]
        if not learn:
            raise UserError(f"--split must leave something for training, got {split}")
        shares = {key: fractions[key] / learn for key in ("training", "validation")}
        splits = {**split_by_patient(parts["train_val"], shares, seed), "test": parts["test"]}
    if left_out:
        print(f"left out by --view {view}: {left_out} images")
    rejected = {file: rejected[file] for file in sorted(rejected, key=natural_key)}
    return c.finish(target, "ChestX-ray14", "X-ray", splits, rejected, outcomes, label_names=list(FINDINGS))


def _is_plain(name: str) -> bool:
    return not any(part in name for part in ("/", "\\", "..", "\0"))


def _part(name: str, train_val: set[str] | None, test: set[str] | None) -> str | None:
    """The published part that an image belongs to; with one list only, the rest belongs to the other part."""
    if train_val is None and test is None:
        return "all"
    if test is not None and name in test:
        return "test"
    if train_val is not None and name in train_val:
        return "train_val"
    return "train_val" if train_val is None else "test" if test is None else None


def _locate(rows: dict[str, Any], images: list[str], table: str, rejected: dict[str, str]) -> dict[str, str]:
    """Path below the source per image name; what has no row, or stands there twice, is rejected."""
    # a copy saved as JPEG is the table's image still, though its suffix differs
    stems = {file_stem(name): name for name in rows}
    found: dict[str, str] = {}
    for exact in (True, False):
        for file in images:
            base = file.rsplit("/", 1)[-1]
            if (base in rows) != exact:
                continue
            name = base if exact else stems.get(file_stem(base))
            if name is None:
                rejected[file] = f"not listed in {table}"
            elif name in found:
                rejected[file] = f"the same image as {found[name]}"
            else:
                found[name] = file
    return found


app = c.new_app(convert_chestxray14, __doc__)

if __name__ == "__main__":
    sys.exit(c.main(app))
