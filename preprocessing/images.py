"""Any folder of images, DICOM or NIfTI: ``python -m preprocessing.images --source DIR --target DIR``.

Every file below the source becomes one PNG, or one per frame, under ``TARGET/images`` in the same folders; the ones
that cannot be used get a row in ``TARGET/rejected.csv``. Hidden files and CSV files are passed over.

The patient is taken from the CSV, else from DICOM PatientID, else it is the file's own name without suffix. The CSV
(``--labels``) has a header; its columns are found by name, in any case, with space, ``_`` or ``-`` between words:

========= ==================================================================
file      file, image, filename, file name, path, image path, image index
patient   patient, patient id, subject, subject id
label     label, class, diagnosis, target: one label; whole numbers stay numbers
labels    labels, finding labels: several, divided by ``|``
text      text, report
age, sex  age, patient age; sex, gender, patient sex, patient gender
view      view, view position
========= ==================================================================

A file is named there by its path below the source, by its name, or by its name without suffix. Rows that name no file
are rejected, too.

With --shard 0/8 to --shard 7/8, on any machines at once, each of eight processes converts its part of the files; the
same command without --shard then does what is missing and writes the tables, the same bytes as one process alone.

Exit codes: 0 all went well; 3 the datalist was written, but files were rejected; 1 nothing could be written; 2 wrong
usage; 75 some files could not be read, but may be the next time; 130 interrupted.
"""

from __future__ import annotations

import csv
import io
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Annotated, Any

import typer

from medgen.data.datalist import file_stem, list_files, natural_key, split_by_patient
from medgen.errors import UserError
from preprocessing import _convert as c

__all__ = ["app", "convert_images", "read_labels"]

ALIASES = {
    "file": ("file", "image", "filename", "file name", "path", "image path", "image index"),
    "patient": ("patient", "patient id", "patientid", "subject", "subject id"),
    "label": ("label", "class", "diagnosis", "target"),
    "labels": ("labels", "finding labels"),
    "text": ("text", "report"),
    "age": ("age", "patient age"),
    "sex": ("sex", "gender", "patient sex", "patient gender"),
    "view": ("view", "view position"),
}


def read_labels(path: Path) -> dict[str, dict[str, Any]]:
    """Read a CSV of labels, separated by comma, semicolon or tab.

    Args:
        path: the CSV; see the head of this module for its columns.

    Returns:
        Fields of the datalist item (``patient``, ``label``, ...) per file as it is named in the CSV.

    Raises:
        UserError: if it cannot be read, has no column for the file, or says two things about one file.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        first = text.partition("\n")[0]
        # StringIO, not splitlines: a report between quotes may have several lines
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--labels {path} cannot be read as a CSV in UTF-8 ({c.one_line(error)})") from error
    header = rows[0] if rows else []
    columns = _columns(header)
    if "file" not in columns or len(columns) < 2:
        raise UserError(
            f"--labels {path} must have a column file (or {', '.join(ALIASES['file'][1:3])}) and one of "
            f"{', '.join(list(ALIASES)[1:])}; got {', '.join(header) or 'an empty file'}"
        )
    table: dict[str, dict[str, Any]] = {}
    for row in rows[1:]:
        cells = {name: row[n].strip() if n < len(row) else "" for name, n in columns.items()}
        file = cells.pop("file").replace("\\", "/").removeprefix("./")
        if not file:
            continue
        fields: dict[str, Any] = {name: cell for name, cell in cells.items() if cell}
        if table.setdefault(file, fields) != fields:
            raise UserError(f"--labels {path} says two things about {file}: {table[file]} and {fields}; keep one row")
    whole = [name for name in ("label", "age") if all(_is_whole(f[name]) for f in table.values() if name in f)]
    for fields in table.values():
        fields.update({name: int(fields[name]) for name in whole if name in fields})
        if "labels" in fields:
            fields["labels"] = [label.strip() for label in fields["labels"].split("|") if label.strip()]
    return table


def _columns(header: list[str]) -> dict[str, int]:
    """Position of each known column; of two aliases the one named first in :data:`ALIASES` counts."""
    plain = [" ".join(name.replace("_", " ").replace("-", " ").lower().split()) for name in header]
    found = {}
    for field, aliases in ALIASES.items():
        hit = next((alias for alias in aliases if alias in plain), None)
        if hit is not None:
            found[field] = plain.index(hit)
    return found


def _is_whole(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _match(table: dict[str, dict[str, Any]], files: list[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Fields per source file, and the rows that name no file."""
    known = set(files)
    names: dict[str, set[str]] = defaultdict(set)
    for file in files:
        base = file.rsplit("/", 1)[-1]
        folder = file[: len(file) - len(base)]
        for name in (folder + file_stem(base), base, file_stem(base)):
            names[name].add(file)
    fields: dict[str, dict[str, Any]] = {}
    lost = []
    for name, row in table.items():
        hits = {name} if name in known else names.get(name, set())
        if not hits:
            lost.append(name)
            continue
        file = min(hits, key=natural_key)
        if len(hits) > 1:
            raise UserError(f"--labels: {name} names {len(hits)} files, {file} first; write paths below --source")
        if fields.setdefault(file, row) != row:
            raise UserError(f"--labels: two rows name {file} and differ, one of them as {name}; keep one")
    return fields, lost


def convert_images(
    source: c.Source,
    target: c.Target,
    labels: Annotated[Path | None, typer.Option(help="CSV with a column file, and patient, label or others.")] = None,
    folder_labels: Annotated[
        bool, typer.Option("--folder-labels", help="Label = name of the first folder below the source.")
    ] = False,
    size: c.Size = 512,
    fit: c.FitOption = c.Fit.shorter,
    bits: c.Bits = 8,
    window: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="CENTER WIDTH", help="Intensity window in the image's units, for CT in HU: 50 350."),
    ] = None,
    channels: Annotated[c.Channels, typer.Option(help="keep: grey stays grey and colour stays colour.")] = (
        c.Channels.keep
    ),
    split: c.SplitOption = c.DEFAULT_SPLIT,
    workers: c.Workers = c.DEFAULT_WORKERS,
    shard: c.ShardOption = None,
    seed: c.Seed = 0,
    modality: Annotated[str, typer.Option(help="Written to the datalist; default: what most files say.")] = "",
    name: Annotated[str, typer.Option(help="Dataset's name in the datalist; default: the source folder's.")] = "",
) -> int:
    """Convert a folder and write its datalist; see the head of this module.

    Returns:
        The exit code.

    Raises:
        UserError: if the source is empty, the target cannot be used, or no file could be converted.
    """
    if window is not None and not window[1] > 0:
        raise typer.BadParameter(f"--window needs a width above 0, got {window[1]:g}")
    if bits == 16 and channels == c.Channels.rgb:
        raise typer.BadParameter("--bits 16 needs --channels grey or keep: colour PNGs have 8 bits per channel")
    if labels is not None and folder_labels:
        raise typer.BadParameter("--labels and --folder-labels exclude each other: give one")
    settings = c.Settings("images", size, fit, bits, channels, window)
    fractions = dict(zip(("training", "validation", "test"), split, strict=True))
    split_by_patient([], fractions)  # wrong shares must not come to light after hours of converting
    files = [file for file in list_files(source) if not file.lower().endswith(".csv")]
    if not files:
        raise UserError(f"expected images below --source {source}, got none; name the folder that holds them")
    table = read_labels(labels) if labels is not None else {}
    jobs = c.make_jobs(source, files)
    fields, lost = _match(table, [job.file for job in jobs])
    c.prepare_target(source, target, settings)
    outcomes = c.convert(jobs, settings, target, workers, shard)
    if shard:
        return c.finish_shard(outcomes, shard)

    items = []
    for job in jobs:
        outcome = outcomes[job.file]
        item: dict[str, Any] = {"patient": outcome.patient or file_stem(job.file)}
        if outcome.view:
            item["view"] = outcome.view
        if folder_labels and "/" in job.file:
            item["label"] = job.file.partition("/")[0]
        item.update(fields.get(job.file, {}))
        items += [{"image": image, **item} for image in outcome.images]
    rejected = {file: outcome.reason for file, outcome in outcomes.items() if outcome.reason}
    rejected |= dict.fromkeys(lost, f"listed in {labels.name}, but not found below the source") if labels else {}

    written = [outcome for outcome in outcomes.values() if outcome.images]
    colours = Counter(outcome.colour for outcome in written)
    if len(colours) == 2:
        print(
            f"note: {colours[False]} files are grey and {colours[True]} in colour; --channels grey (or rgb) in a new "
            "target makes them alike",
            file=sys.stderr,
        )
    unnamed = sum(
        not outcome.patient and "patient" not in fields.get(file, {})
        for file, outcome in outcomes.items()
        if outcome.images
    )
    if unnamed:
        print(
            f"note: {unnamed} of {len(written)} files name no patient: each file name counts as one; if a patient has "
            "several, give --labels CSV with a column patient, or the splits will share patients",
            file=sys.stderr,
        )
    said = Counter(outcome.modality for outcome in written if outcome.modality)
    modality = modality or (min(said, key=lambda m: (-said[m], m)) if said else "unknown")
    classes = sorted({item["label"] for item in items if "label" in item})
    return c.finish(
        target,
        name or source.resolve().name,
        modality,
        split_by_patient(items, fractions, seed),
        rejected,
        outcomes,
        **({"label_names": classes} if classes else {}),
    )


app = c.new_app(convert_images, __doc__)

if __name__ == "__main__":
    sys.exit(c.main(app))
