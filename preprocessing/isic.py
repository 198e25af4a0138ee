"""Dermoscopic images of the ISIC archive and its challenges, HAM10000 and PH2: one PNG each, with its class.

python -m preprocessing.isic --source ISIC_2019 --target data/isic --size 256

python -m preprocessing.isic --source ISIC_2019 --target data/melanoma --binary melanoma

Tables are found by their columns, in any CSV below the source, or those of --metadata (which may be repeated) alone;
they are joined by the image's id. An image's file is named by its id, in any folder. Columns that are read:

========== ============================================================================================
image      isic_id, image, image_id, image_name, name
diagnosis  diagnosis, dx, clinical diagnosis, or diagnosis_3, _2; or one column each, 0 or 1: MEL, NV, ..., or, as
           in 2017, melanoma and seborrheic_keratosis (neither: nevus)
malignancy benign_malignant, diagnosis_1, or target (1: malignant)
patient    patient_id; lesion: lesion_id; age: age_approx, age_approximate, age; sex: sex
site       anatom_site_general, anatom_site_general_challenge, localization
========== ============================================================================================

PH2_dataset.txt is read, too (its clinical diagnoses 0, 1 and 2 are common nevus, atypical nevus and melanoma), and so
is the table of 2016, which has no header (image, then benign or malignant). MEL, mel and "melanoma in situ" are all
melanoma; NV, naevus and "melanocytic nevi" are nevus; and so on. Every diagnosis is a class of its own, in the order of
the alphabet. --binary melanoma makes two, other (0) and melanoma (1). --classes makes any, in the order given, each
NAME=DIAGNOSIS,...: --classes "melanoma=MEL" --classes "nevus=NV,atypical nevus". Benign and malignant may stand there,
too, for images whose diagnosis no class names; * is all the rest. Images of no class are left out and counted. label is
the class's number, label_names in the datalist has the names. An image whose diagnosis is not known, to which two
tables give different classes, or that is called a benign melanoma or a malignant nevus, is rejected.

Images of one patient, of one lesion, and copies of one another stay together in one split, also where only a row whose
image is missing or left out links them; the datalist's patient is the name of such a group, patient_id and lesion_id
are the table's own ("nan", "unknown" and the like are none). Where a table names neither, an image counts as a patient
of its own, and a note says so. Classes are divided alike, by the shares of --split. Make one dataset of all classes and
take parts of it with preprocessing.subset: the groups are then the same in all of them.

Copies are found by a perceptual hash in all eight orientations, also where they were mirrored, turned, resized or
compressed again; cropped or recoloured ones are not. TARGET/duplicates.csv lists the pairs (file, other, distance);
--drop-duplicates keeps only the first of them in the datalist.

--crop centre, the default, takes the centre square, shorter side = size, as MedImageGAN did; none keeps all of the
image; lesion takes the square around the mask of --masks (ID_segmentation.png, or PH2's ID_lesion.bmp), with a margin
of a tenth of its side. It is moved into the image; where it is larger than that, the image is mirrored at its borders.
Hair, rulers, ink and vignettes are left as they are: a model may learn from them.

Masks and superpixels beside the images are passed over, and so is all that is no image. Of several files of one id
that show the same, the largest is converted; where they show different things, none is.

With --shard 0/8 to --shard 7/8, on any machines at once, each of eight processes converts its part of the files; the
same command without --shard then does what is missing and writes the tables, the same bytes as one process alone.

Exit codes: 0 all went well; 3 the datalist was written, but files were rejected; 1 nothing could be written; 2 wrong
usage; 75 some files could not be read, but may be the next time; 130 interrupted.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from filecmp import cmp
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from scipy.fft import dctn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from medgen.data.datalist import file_stem, list_files, natural_key, split_by_patient, write_rejected
from medgen.data.reader import UnreadableImageError, read_frames
from medgen.errors import UserError
from medgen.output import atomic_write_text
from preprocessing import _convert as c
from preprocessing.masks import RATIO_TOLERANCE, read_mask
from preprocessing.rsna import split_classes

__all__ = [
    "Classes",
    "Record",
    "app",
    "canonical",
    "class_of",
    "convert_isic",
    "find_copies",
    "image_id",
    "perceptual_hash",
    "read_records",
    "unite",
]

SPLITS = ("training", "validation", "test")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".dcm", ".dicom")
MASK_NAME = re.compile(r"(.+?)(_segmentation|_lesion|_mask)$")
NO_IMAGE = re.compile(r".+(_segmentation|_lesion|_mask|_superpixels|_attribute_\w+|_R\d+_Label\d+)$")
JPEG_NOISE = 1 / 16  # between a mask's two values
MARGIN = 0.1  # of the lesion's longer side, at each side of --crop lesion

COLUMNS = {  # of two names in one table the first here counts
    "image": ("isic_id", "image", "image_id", "image_name", "name"),
    "diagnosis": ("diagnosis", "dx", "clinical_diagnosis", "diagnosis_3", "diagnosis_2"),
    "malignancy": ("benign_malignant", "diagnosis_1", "target"),
    "patient": ("patient_id",),
    "lesion": ("lesion_id",),
    "age": ("age_approx", "age_approximate", "age"),
    "sex": ("sex",),
    "site": ("anatom_site_general", "anatom_site_general_challenge", "localization"),
}
OF_2017 = ("melanoma", "seborrheic_keratosis")
ONE_HOT = ("mel", "nv", "bcc", "ak", "akiec", "bkl", "df", "vasc", "scc", "unk", *OF_2017)
PH2_DIAGNOSES = {"0": "common nevus", "1": "atypical nevus", "2": "melanoma"}
# fmt: off
ALIASES = {
    "melanoma": ("mel", "melanoma in situ", "melanoma invasive", "melanoma nos", "melanoma metastasis"),
    "nevus": ("nv", "naevus", "nevi", "melanocytic nevus", "melanocytic nevi"),
    "basal cell carcinoma": ("bcc",),
    # the challenges' class of actinic keratoses holds Bowen's disease, too
    "actinic keratosis": ("ak", "akiec", "solar or actinic keratosis"),
    "benign keratosis": ("bkl", "pigmented benign keratosis"),
    "dermatofibroma": ("df",),
    "vascular lesion": ("vasc",),
    "squamous cell carcinoma": (
        "scc", "squamous cell carcinoma in situ", "squamous cell carcinoma invasive", "squamous cell carcinoma nos",
    ),
    "": ("unk", "unknown", "none", "n/a", "na", "nan", "null", "-"),
}
# fmt: on
CANONICAL = {alias: name for name, aliases in ALIASES.items() for alias in aliases}
MALIGNANCY = {"benign": "benign", "malignant": "malignant", "0": "benign", "1": "malignant"}
REST = "*"
# not of carcinomas: tables that name one "target" often mean melanoma by it
CONTRADICTIONS = {
    "melanoma": "benign",
    **dict.fromkeys(("nevus", "common nevus", "atypical nevus"), "malignant"),
}

# Of the 12,720 pairs of 160 images of PH2 none differs in fewer than 55 of the 255 bits, and none of those of up to 90
# bits in less than 8 levels of colour. Copies that were mirrored, halved or quartered, or saved as JPEG of quality 20
# differ in 23 bits at most, those turned, halved and then so saved in 37 at most (also with another ratio of height to
# width); of those quartered and then so saved, 158 of 160 are found.
HASH_SIDE = 16  # frequencies of the hash in each direction; the first of all, the mean, has no part in it
THUMB_SIDE = 8  # pixels
MAX_BITS = 42
MAX_COLOUR = 8.0  # levels of 255
BLOCK = 1024  # images compared with all others at a time

Item = dict[str, Any]


class Crop(StrEnum):
    """The part of an image that is kept."""

    centre = "centre"
    lesion = "lesion"
    none = "none"


# ---------------------------------------------------------------------------------------------------------------------
# tables


@dataclass
class Record:
    """What the tables say of one image.

    Attributes:
        diagnoses: canonical names, with the table that gave each; without those that say "unknown".
        malignancy: benign or malignant; empty if the tables do not say.
        patients: ids, usually one.
        lesions: ids, usually one (the ISIC archive and HAM10000 name lesions differently).
        fields: ``age`` in years, ``sex``, ``site``, as far as they are known; the first table counts.
        wrong: why it cannot be used; empty if it can.
    """

    diagnoses: dict[str, str] = field(default_factory=dict)
    malignancy: str = ""
    patients: dict[str, None] = field(default_factory=dict)
    lesions: dict[str, None] = field(default_factory=dict)
    fields: Item = field(default_factory=dict)
    wrong: str = ""


def canonical(diagnosis: str) -> str:
    """One name for the spellings of a diagnosis; empty for those that say that it is not known."""
    plain = " ".join(diagnosis.lower().replace("_", " ").replace(",", " ").split())
    return CANONICAL.get(plain, plain)


def image_id(name: str) -> str:
    """The id that a file or a cell of a table names; ISIC 2019 has smaller copies, which keep the archive's id."""
    return file_stem(name.replace("\\", "/").rsplit("/", 1)[-1]).removesuffix("_downsampled")


def read_records(tables: Sequence[Path]) -> dict[str, Record]:
    """Read tables and join them by the image's id.

    Args:
        tables: CSVs (comma, semicolon or tab) with a column for the image, or PH2_dataset.txt.

    Returns:
        What they say of each image, by id.

    Raises:
        UserError: a table cannot be read or has no column for the image, or none has one for the diagnosis.
    """
    records: dict[str, Record] = defaultdict(Record)
    headers = []
    for path in tables:
        header, rows = _read_rows(path)
        columns, one_hot = _columns(header)
        if "image" not in columns:
            raise UserError(
                f"--metadata {path} must have a column {', '.join(COLUMNS['image'])}; got "
                f"{', '.join(header) or 'an empty file'}"
            )
        headers.append((columns, one_hot))
        for row in rows:
            cells = {name: row[n].strip() if n < len(row) else "" for name, n in columns.items()}
            name = image_id(cells["image"])
            if name:
                hot = {abbreviation: row[n].strip() if n < len(row) else "" for abbreviation, n in one_hot.items()}
                _add(records[name], cells, hot, path.name)
    if not any(one_hot or columns.keys() & {"diagnosis", "malignancy"} for columns, one_hot in headers):
        raise UserError(
            f"expected a table with a column {', '.join(COLUMNS['diagnosis'])}, or MEL, NV, ..., got "
            f"{', '.join(str(path) for path in tables)}; name one with --metadata"
        )
    for record in records.values():
        for name, table in record.diagnoses.items():
            if not record.wrong and record.malignancy and CONTRADICTIONS.get(name) == record.malignancy:
                record.wrong = f"{name} ({table}) and {record.malignancy} at once"
    return dict(records)


def _add(record: Record, cells: Mapping[str, str], hot: Mapping[str, str], table: str) -> None:
    """Add one row to what is known of an image."""
    diagnosis = cells.get("diagnosis", "")
    if hot:
        chosen = [abbreviation for abbreviation, cell in hot.items() if _number(cell) == 1]
        odd = next((f"{name} {cell}" for name, cell in hot.items() if cell and _number(cell) not in (0, 1)), None)
        if odd:
            record.wrong = f"expected 0 or 1 for each diagnosis in {table}, got {odd:.80}: predictions are no diagnosis"
        elif len(chosen) != 1:
            record.wrong = f"expected one diagnosis of 1 in {table}, got {', '.join(chosen).upper() or 'none'}"
        diagnosis = chosen[0] if chosen else ""
    if (name := canonical(diagnosis)) != "":
        record.diagnoses.setdefault(name, table)
    said = _malignancy(cells.get("malignancy", ""))
    if said and record.malignancy not in ("", said):
        record.wrong = f"benign and malignant at once; {table} says {said}"
    record.malignancy = said or record.malignancy
    for kind, ids in (("patient", record.patients), ("lesion", record.lesions)):
        own = cells.get(kind, "")
        if canonical(own) != "":
            # a table that was read with gaps in a column of numbers, and written again, has 17.0 for 17
            ids[re.sub(r"(?<=\d)\.0$", "", own)] = None
    age = _number(cells.get("age", ""))
    fields = {
        "age": None if age is None else round(age),
        "sex": cells.get("sex", "").lower(),
        "site": cells.get("site"),
    }
    for key, value in fields.items():
        if isinstance(value, int) or (value and canonical(value) != ""):
            record.fields.setdefault(key, value)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if np.isfinite(number) else None


def _read_rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        first = text.partition("\n")[0]
        if first.startswith("||"):
            return _ph2_rows(text)
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--metadata {path} cannot be read as a table in UTF-8 ({c.one_line(error)})") from error
    if not rows:
        return [], []
    header, *below = rows
    columns, one_hot = _columns(header)
    if "image" not in columns and all(len(row) == 2 and _malignancy(row[1]) for row in rows if row):
        return ["image", "benign_malignant"], rows  # of 2016, which has no header
    if one_hot.keys() == set(OF_2017):
        # where both are 0, it is a nevus
        places = one_hot.values()
        cells = [[*row, *[""] * len(header)][: len(header)] for row in below]
        below = [[*row, str(int(all(_number(row[n]) == 0 for n in places)))] for row in cells]
        header = [*header, "NV"]
    return header, below


def _malignancy(text: str) -> str:
    """benign or malignant; empty if the cell says neither."""
    return MALIGNANCY.get(text.strip().lower().removesuffix(".0"), "")


def _ph2_rows(text: str) -> tuple[list[str], list[list[str]]]:
    """PH2_dataset.txt: cells between ``||``, the legend below the rows without."""
    lines = [line.strip().strip("|").split("||") for line in text.splitlines() if line.startswith("||")]
    header, *rows = [[cell.strip() for cell in line] for line in lines]
    # the histological diagnosis is in words, and only there for lesions that were cut out
    place = header.index("Clinical Diagnosis") if "Clinical Diagnosis" in header else None
    for row in rows:
        if place is not None and place < len(row):
            row[place] = PH2_DIAGNOSES.get(row[place], row[place])
    return header, rows


def _columns(header: Sequence[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Position of each known column, and of those that stand for one diagnosis each."""
    plain = [" ".join(name.replace("_", " ").replace("-", " ").lower().split()).replace(" ", "_") for name in header]
    found = {}
    for name, aliases in COLUMNS.items():
        hit = next((alias for alias in aliases if alias in plain), None)
        if hit is not None:
            found[name] = plain.index(hit)
    one_hot = {name: plain.index(name) for name in ONE_HOT if name in plain}
    return found, one_hot if len(one_hot) > 1 else {}


# ---------------------------------------------------------------------------------------------------------------------
# classes


@dataclass(frozen=True)
class Classes:
    """Classes out of diagnoses.

    Attributes:
        names: of the classes, in the order of their numbers.
        terms: class per canonical diagnosis, ``benign``, ``malignant`` or ``*`` (all the rest).
    """

    names: tuple[str, ...]
    terms: Mapping[str, int]

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Classes:
        """Read ``NAME=DIAGNOSIS,...`` of each class.

        Raises:
            UserError: one is of another form, or a name or a diagnosis stands there twice.
        """
        names: list[str] = []
        terms: dict[str, int] = {}
        for text in texts:
            name, equals, rest = (part.strip() for part in text.partition("="))
            own = [canonical(term) for term in rest.split(",") if term.strip()]
            if not (name and equals and own) or "" in own:
                raise UserError(f"--classes must be as in melanoma=MEL,melanoma in situ, got {text!r:.100}")
            twice = next((term for term in own if terms.get(term, len(names)) != len(names)), None)
            if name in names or twice:
                raise UserError(f"--classes names {twice or name} twice; each diagnosis and class stands there once")
            terms |= dict.fromkeys(own, len(names))
            names.append(name)
        if len(names) < 2:
            raise UserError(f"--classes needs two classes or more, got {', '.join(names)}; repeat it for each")
        return cls(tuple(names), terms)

    @classmethod
    def of_all(cls, records: Sequence[Record]) -> Classes:
        """One class per diagnosis; where no diagnosis is known at all, benign and malignant."""
        names = {name for record in records for name in record.diagnoses} or {record.malignancy for record in records}
        return cls(tuple(sorted(names - {""})), {name: n for n, name in enumerate(sorted(names - {""}))})


def class_of(record: Record, classes: Classes) -> int | str | None:
    """The class of an image.

    Args:
        record: what the tables say of it.
        classes: to choose from.

    Returns:
        The class's number; the reason where the tables do not say it; or None where no class names its diagnosis.
    """
    if record.wrong:
        return record.wrong
    if not record.diagnoses and record.malignancy not in classes.terms:
        # what is malignant and has no name may be the one that another class names
        if record.malignancy != "benign" or REST not in classes.terms:
            return "its diagnosis is not known"
    by_malignancy = classes.terms.get(record.malignancy, classes.terms.get(REST))
    found = {name: classes.terms.get(name, by_malignancy) for name in record.diagnoses} or {"": by_malignancy}
    numbers = {number for number in found.values() if number is not None}
    if len(numbers) > 1:
        told = " and ".join(f"{name} ({table})" for name, table in record.diagnoses.items())
        return f"the tables give it different classes: {told}"
    return numbers.pop() if numbers else None


# ---------------------------------------------------------------------------------------------------------------------
# copies


def perceptual_hash(pixels: np.ndarray) -> str:
    """Signs of the lowest frequencies of an image.

    Squeezed to 64×64 grey pixels, its discrete cosine transform has a sign for each of the lowest 16×16 frequencies but
    the first, the mean. Flipping the image flips the signs of the odd frequencies, turning it transposes them: so the
    hash of every orientation follows from one.

    Args:
        pixels: (H, W) or (H, W, 3), in [0, 1].

    Returns:
        256 bits, row by row, as 64 hexadecimal digits; the first bit is 0.
    """
    grey = pixels if pixels.ndim == 2 else pixels @ c.LUMA
    size = 4 * HASH_SIDE
    waves = dctn(np.asarray(c.resize(grey, (size, size), None), np.float64), norm="ortho")[:HASH_SIDE, :HASH_SIDE]
    waves[0, 0] = 0
    return np.packbits(waves > 0).tobytes().hex()


def _thumbnail(pixels: np.ndarray) -> str:
    """8×8 colours, 8 bits each, as 384 hexadecimal digits."""
    colour = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=-1)
    planes = [c.resize(colour[..., n], (THUMB_SIDE, THUMB_SIDE), None) for n in range(3)]
    return c.quantise(np.stack(planes, axis=-1), wide=False).tobytes().hex()


def find_copies(hashes: Sequence[str], thumbnails: Sequence[str]) -> list[tuple[int, int, int]]:
    """Find the images that are copies of one another, in any of the eight orientations of a rectangle.

    Two images are copies if their hashes differ in at most :data:`MAX_BITS` bits and, so oriented, their thumbnails by
    at most :data:`MAX_COLOUR` of 255 levels on average.

    Args:
        hashes: of :func:`perceptual_hash`, one per image.
        thumbnails: 8×8 RGB, bytes in hexadecimal digits, one per image.

    Returns:
        Number of an image, of a later one, and the bits by which they differ; sorted.
    """
    count = len(hashes)
    if not count:
        return []
    packed = np.frombuffer(bytes.fromhex("".join(hashes)), np.uint8).reshape(count, -1)
    signs = np.unpackbits(packed, axis=1).astype(np.float32).reshape(count, HASH_SIDE, HASH_SIDE) * 2 - 1
    signs[:, 0, 0] = 0
    colours = np.frombuffer(bytes.fromhex("".join(thumbnails)), np.uint8).reshape(count, THUMB_SIDE, THUMB_SIDE, 3)
    colours = colours.astype(np.int16)
    bits = HASH_SIDE**2 - 1
    flip = (-1.0) ** np.arange(HASH_SIDE, dtype=np.float32)
    rows = signs.reshape(count, -1)
    best: dict[tuple[int, int], int] = {}
    for start in range(0, count, BLOCK):
        for turn, down, across in np.ndindex(2, 2, 2):
            waves = signs[start : start + BLOCK].swapaxes(1, 2) if turn else signs[start : start + BLOCK]
            waves = waves * (flip[:, None] if down else 1) * (flip if across else 1)
            # of two vectors of 1 and -1 the product is the number of equal signs less that of the others
            agree = rows[start:] @ waves.reshape(len(waves), -1).T
            later, earlier = np.nonzero(agree >= bits - 2 * MAX_BITS)
            later, earlier = later[later > earlier], earlier[later > earlier]
            seen = colours[start + earlier].swapaxes(1, 2) if turn else colours[start + earlier]
            seen = seen[:, :: -1 if down else 1, :: -1 if across else 1]
            alike = np.abs(seen - colours[start + later]).mean((1, 2, 3)) <= MAX_COLOUR
            for one, two in zip(earlier[alike], later[alike], strict=True):
                distance = (bits - round(float(agree[two, one]))) // 2
                pair = start + int(one), start + int(two)
                best[pair] = min(distance, best.get(pair, distance))
    return sorted((*pair, distance) for pair, distance in best.items())


def unite(keys: Sequence[Sequence[Any]]) -> list[int]:
    """Groups of what shares a key, directly or by way of others.

    Args:
        keys: of each member; any number of them.

    Returns:
        Number of the group of each member.
    """
    numbers: dict[Any, int] = {}
    edges = [(member, numbers.setdefault(key, len(numbers))) for member, own in enumerate(keys) for key in own]
    total = len(keys) + len(numbers)
    members, shared = np.array(edges, dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(edges), np.int8), (members, len(keys) + shared)), shape=(total, total))
    return connected_components(graph, directed=False)[1][: len(keys)].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# the command


@dataclass(frozen=True)
class _Job(c.Job):
    """An image and, for --crop lesion, its mask."""

    mask: str = ""

    def is_made_of(self, used: Sequence[str]) -> bool:
        """Whether the image still has the same mask."""
        return list(used) == ([self.mask] if self.mask else [])


@dataclass(frozen=True)
class _Task:
    """The task of this command."""

    dataset: str
    size: int
    crop: str

    def convert(self, job: _Job, target: Path) -> c.Outcome:
        """One image to a PNG in colour, with its hash."""
        used = ((job.mask, *(c.file_key(job.mask) or (None, None))),) if job.mask else ()
        png = f"images/{job.stem}.png"
        try:
            frames = read_frames(job.path)
            pixels = frames[0].pixels
            if len(frames) > 1:
                raise UnreadableImageError(f"expected one image, got {len(frames)} frames")
            part = _around_lesion(pixels, read_mask(Path(job.mask))) if job.mask else pixels
            fit = c.Fit.crop if self.crop == Crop.centre else c.Fit.shorter
            image = c.render(part, c.Settings(self.dataset, self.size, fit, channels=c.Channels.rgb))
        except (UnreadableImageError, c._RejectedError) as error:
            return c.Outcome(job.file, reason=c.one_line(error), used=used)
        # of the whole image, so that every --size and --crop finds the same copies
        item = {"hash": perceptual_hash(pixels), "thumbnail": _thumbnail(pixels)}
        size = c.write_png(image, target, png)
        return c.Outcome(job.file, images=(png,), colour=True, bytes=(size,), items=(item,), used=used)


def _around_lesion(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The square around a mask with its margin, moved into the image; mirrored at its borders where it is too large."""
    height, width = pixels.shape[:2]
    tall, wide = mask.shape
    if abs((tall / wide) / (height / width) - 1) > RATIO_TOLERANCE:
        raise UnreadableImageError(f"the mask is {wide}×{tall}, the image {width}×{height}: not of one image")
    spans = []
    for axis, scale in ((1, height / tall), (0, width / wide)):
        marked = np.flatnonzero(mask.any(axis))
        spans.append((marked[0] * scale, (marked[-1] + 1) * scale))
    side = round(max(high - low for low, high in spans) * (1 + 2 * MARGIN))
    starts, borders = [], []
    for (low, high), end in zip(spans, (height, width), strict=True):
        start = round((low + high - side) / 2)
        start = min(max(start, 0), end - side) if side <= end else start
        borders.append((max(-start, 0), max(start + side - end, 0)))
        starts.append(start + borders[-1][0])
    padded = np.pad(pixels, (*borders, *[(0, 0)] * (pixels.ndim - 2)), mode="symmetric")
    return padded[starts[0] : starts[0] + side, starts[1] : starts[1] + side]


def _find_tables(source: Path, files: Sequence[str]) -> list[Path]:
    """The files below the source that have a column for the image and one of the others."""
    tables = []
    for file in files:
        if file.lower().endswith((".csv", ".tsv")) or file.rsplit("/", 1)[-1] == "PH2_dataset.txt":
            try:
                header, _ = _read_rows(source / file)
            except UserError as error:
                print(f"note: passed over: {str(error).removeprefix('--metadata ')}", file=sys.stderr)
                continue
            columns, one_hot = _columns(header)
            if "image" in columns and (len(columns) > 1 or one_hot):
                tables.append(source / file)
    if not tables:
        raise UserError(
            f"expected a CSV below --source {source} with a column {', '.join(COLUMNS['image'])}, and others, got "
            "none; name it with --metadata"
        )
    return tables


def _find_masks(folder: Path) -> dict[str, Path]:
    """The mask per image id."""
    masks: dict[str, Path] = {}
    for file in list_files(folder):
        stem = image_id(file)
        if match := MASK_NAME.match(stem):
            masks[match[1]] = folder / file
        else:  # of PH2, whose masks lie among its photographs, this is the photograph
            masks.setdefault(stem, folder / file)
    if not masks:
        raise UserError(f"expected masks (ID_segmentation.png and the like) below --masks {folder}, got none")
    return masks


def _one_file_each(
    source: Path, there: Mapping[str, Sequence[str]], masks: Mapping[str, Path]
) -> tuple[dict[str, str], dict[str, str]]:
    """The photograph of each image.

    Args:
        source: where the files' paths start from.
        there: files per id.
        masks: of --masks, per id.

    Returns:
        The file per id, and the reason per file that is rejected.

    Raises:
        UserError: the files of most images show different things.
    """
    found: dict[str, str] = {}
    rejected: dict[str, str] = {}
    unclear: list[str] = []
    for ident, files in there.items():
        mask = masks[ident].resolve() if ident in masks else None
        if len(files) > 1:
            files = [file for file in files if (source / file).resolve() != mask]
        elif mask is not None and (source / files[0]).resolve() == mask:
            rejected[files[0]] = "its mask and its photograph are this one file: one of the two is missing"
            continue
        if len(files) > 1:
            files, reasons = _photographs(source, files)
            rejected |= reasons
        if len(files) == 1:
            found[ident] = files[0]
        elif files:
            unclear.append(ident)
            for file in files:
                others = " and ".join(other for other in files if other != file)
                rejected[file] = f"named as {others}, which shows something else: leave only the photograph there"
    if len(unclear) * 2 > len(there):
        first = " and ".join(there[unclear[0]])
        raise UserError(
            f"of {len(unclear)} of {len(there)} images several files that differ have the name, the first {first}; "
            "name the folder of the photographs as --source, and the table by --metadata"
        )
    return found, rejected


def _photographs(source: Path, files: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Those of an image's files that show different photographs, and the reasons against the others but masks."""
    pictures: dict[str, np.ndarray] = {}
    masks: list[str] = []
    reasons: dict[str, str] = {}
    unlike: list[str] = []
    for file in files:
        try:
            # bytes first: where challenges share images by the ten thousand, decoding them takes an hour
            twin = next((one for one in unlike if cmp(source / one, source / file, shallow=False)), None)
            if twin is not None:
                reasons[file] = f"the same image as {twin}"
                continue
            unlike.append(file)
        except OSError as error:
            reasons[file] = c.one_line(error)
    if len(unlike) == 1:
        return unlike, reasons
    for file in unlike:
        try:
            pixels = read_frames(source / file)[0].pixels
        except (UnreadableImageError, OSError) as error:
            reasons[file] = c.one_line(error)
            continue
        if _is_mask(pixels):
            masks.append(file)
        else:
            pictures[file] = pixels
    if not pictures:
        return [], reasons | dict.fromkeys(masks, "it has two values, as masks have: no photograph")
    # of those of one size the first
    largest = sorted(pictures, key=lambda file: -pictures[file].shape[0] * pictures[file].shape[1])
    hashes = [perceptual_hash(pictures[file]) for file in largest]
    copies = find_copies(hashes, [_thumbnail(pictures[file]) for file in largest])
    same = [largest[later] for first, later, _ in copies if first == 0]
    reasons |= dict.fromkeys(same, f"the same image as {largest[0]}")
    return [file for file in largest if file not in same], reasons


def _is_mask(pixels: np.ndarray) -> bool:
    """Whether an image has two values, or, as JPEG leaves them, next to none between black and white."""
    if pixels.ndim == 3:
        if np.abs(pixels - pixels[..., :1]).max() > JPEG_NOISE:
            return False
        pixels = pixels[..., 0]
    if ((pixels == pixels.min()) | (pixels == pixels.max())).all():
        return True
    return bool((np.minimum(pixels, 1 - pixels) <= JPEG_NOISE).mean() >= 0.95)


def convert_isic(
    source: c.Source,
    target: c.Target,
    metadata: Annotated[
        list[Path] | None,
        typer.Option(help="Table of the images; may be repeated. Default: all that are in the source."),
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIAGNOSIS,...", help="A class and its diagnoses; repeated for each. * is the rest."),
    ] = None,
    binary: Annotated[
        str | None, typer.Option(metavar="DIAGNOSIS", help="Two classes: this one (1) and all the rest (0).")
    ] = None,
    size: Annotated[int, typer.Option(min=c.SMALLEST, max=c.LARGEST, help="Shorter side of the PNGs in pixels.")] = 256,
    crop: Annotated[
        Crop, typer.Option(help="centre: the centre square; lesion: the square around the mask; none: all of it.")
    ] = Crop.centre,
    masks: Annotated[Path | None, typer.Option(help="Folder of the lesions' masks, for --crop lesion.")] = None,
    drop_duplicates: Annotated[
        bool, typer.Option("--drop-duplicates", help="Leave copies out of the datalist, but the first of each.")
    ] = False,
    split: c.SplitOption = c.DEFAULT_SPLIT,
    workers: c.Workers = c.DEFAULT_WORKERS,
    shard: c.ShardOption = None,
    seed: c.Seed = 0,
    name: Annotated[str, typer.Option(help="Dataset's name in the datalist; default: the source folder's.")] = "",
) -> int:
    """Convert the images and write the datalist; see the head of this module.

    Returns:
        The exit code.

    Raises:
        UserError: if a table or the images are missing, the target cannot be used, or no file could be converted.
    """
    if classes and binary is not None:
        raise typer.BadParameter("--classes and --binary exclude each other: give one")
    if (crop == Crop.lesion) != (masks is not None):
        raise typer.BadParameter("--crop lesion and --masks DIR go together: give both or none")
    shares = dict(zip(SPLITS, split, strict=True))
    split_by_patient([], shares)  # wrong shares must not come to light after hours of converting
    if binary is not None:
        classes = [f"other={REST}", f"{canonical(binary)}={binary}"]
    wanted = Classes.parse(classes) if classes else None
    files = list_files(source)
    tables = metadata or _find_tables(source, files)
    records = read_records(tables)
    listed = f"listed in {', '.join(path.name for path in tables)}"
    found_masks = _find_masks(masks) if masks is not None else {}

    rejected: dict[str, str] = {}
    there: dict[str, list[str]] = defaultdict(list)
    for file in files:
        if not file.lower().endswith(IMAGE_SUFFIXES):
            continue
        ident = image_id(file)
        if ident in records:
            there[ident].append(file)
        elif not NO_IMAGE.match(file_stem(file)):
            rejected[file] = f"not {listed}"
    found, reasons = _one_file_each(source, there, found_masks)
    rejected |= reasons
    if wanted is None:
        wanted = Classes.of_all([records[ident] for ident in found])
    labels: dict[str, int] = {}
    left_out: Counter[str] = Counter()
    for ident, record in records.items():
        verdict = class_of(record, wanted)
        if verdict is None:
            left_out[" or ".join(record.diagnoses) or record.malignancy] += ident in found
        elif ident not in there:
            rejected[ident] = f"{listed}, but not found below the source"
        elif ident not in found:
            continue  # its files are rejected
        elif isinstance(verdict, str):
            rejected[found[ident]] = verdict
        elif masks is not None and ident not in found_masks:
            rejected[found[ident]] = "no mask"
        else:
            labels[ident] = verdict
    if not labels and not left_out.total():
        first = next(iter(rejected.items()), ("", "no row"))
        raise UserError(
            f"none of the {len(records)} images of the tables can be used, the first: {' '.join(first).strip()}; "
            "mend the tables, or name the folder of the images as --source"
        )
    empty = [name for number, name in enumerate(wanted.names) if number not in labels.values()]
    if empty:
        known = Counter(
            one for ident in found for one in records[ident].diagnoses or (records[ident].malignancy,) if one
        )
        told = ", ".join(f"{one} {number}" for one, number in known.most_common())
        raise UserError(f"no image is of class {empty[0]}; the tables have {told}: see --classes and --binary")

    names = sorted(labels, key=natural_key)
    jobs = [
        _Job(job.path, job.file, job.stem, str(found_masks[ident].resolve()) if masks is not None else "")
        for ident, job in zip(names, c.make_jobs(source, [found[n] for n in names], names), strict=True)
    ]
    task = _Task("isic", size, crop)
    c.prepare_target(source, target, task)
    outcomes = c.convert(jobs, task, target, workers, shard)
    if shard:
        return c.finish_shard(outcomes, shard)
    rejected |= {job.file: outcomes[job.file].reason for job in jobs if outcomes[job.file].reason}

    written = [(ident, job.file) for ident, job in zip(names, jobs, strict=True) if outcomes[job.file].images]
    hashes = [outcomes[file].items[0] for _, file in written]
    copies = find_copies([item["hash"] for item in hashes], [item["thumbnail"] for item in hashes])
    items = _items(written, outcomes, records, labels, copies)
    _write_copies(target, [file for _, file in written], items, copies)
    dropped = _later_copies(len(items), copies) if drop_duplicates else set()
    kept = [item for number, item in enumerate(items) if number not in dropped]
    count = Counter(item["label"] for item in kept)
    rejected = {file: rejected[file] for file in sorted(rejected, key=natural_key)}
    lost = next((class_name for label, class_name in enumerate(wanted.names) if not count[label]), None)
    if kept and lost is not None and all(outcome.final for outcome in outcomes.values()):
        write_rejected(target / "rejected.csv", rejected)
        raise UserError(
            f"no image of class {lost} is left, all were rejected or dropped as copies: see {target / 'rejected.csv'} "
            "and duplicates.csv; mend the files, or choose other classes by --classes"
        )
    goals = {(label,): {split: share * n for split, share in shares.items()} for label, n in count.items()}
    splits = split_classes(kept, goals, seed) if kept else {split: [] for split in SPLITS}

    if left_out.total():
        told = ", ".join(f"{ident} {number}" for ident, number in left_out.most_common() if number)
        print(f"left out, of no class: {left_out.total()} images ({told})")
    if dropped:
        print(f"left out by --drop-duplicates: {len(dropped)} images")
    for label, class_name in enumerate(wanted.names):
        own = ", ".join(f"{split} {sum(item['label'] == label for item in splits[split])}" for split in SPLITS)
        print(f"class {label}, {class_name}: {own}")
    return c.finish(
        target,
        name or source.resolve().name,
        "dermoscopy",
        splits,
        rejected,
        outcomes,
        label_names=list(wanted.names),
        seed=seed,
    )


def _items(
    written: Sequence[tuple[str, str]],
    outcomes: Mapping[str, c.Outcome],
    records: Mapping[str, Record],
    labels: Mapping[str, int],
    copies: Sequence[tuple[int, int, int]],
) -> list[Item]:
    """Datalist items, whose patient is the group that may not be divided."""
    # a row whose image is not written may still say that two others are of one patient
    idents = [ident for ident, _ in written]
    idents += sorted(records.keys() - set(idents), key=natural_key)
    keys: list[list[tuple[str, Any]]] = []
    for ident in idents:
        record = records[ident]
        keys.append([("patient", one) for one in record.patients] + [("lesion", one) for one in record.lesions])
    for one, two, _ in copies:
        keys[one].append(("copy", (one, two)))
        keys[two].append(("copy", (one, two)))
    groups = unite(keys)
    # the first id of a group is its name: of a patient if there is one, else of a lesion, else of an image
    names: dict[int, tuple[int, list[tuple[int, int, str]], str]] = {}
    for group, ident in zip(groups, idents, strict=True):
        record = records[ident]
        for rank, ids in enumerate((record.patients, record.lesions, (ident,))):
            for one in ids:
                option = (rank, natural_key(one), one)
                names[group] = min(option, names.get(group, option))
    groups = groups[: len(written)]
    items = []
    for group, (ident, file) in zip(groups, written, strict=True):
        record = records[ident]
        item: Item = {"image": outcomes[file].images[0], "patient": names[group][2], "label": labels[ident]}
        item |= {"diagnosis": " or ".join(record.diagnoses)} if record.diagnoses else {}
        for key, ids in (("patient_id", record.patients), ("lesion_id", record.lesions)):
            item |= {key: next(iter(ids))} if ids else {}
        items.append(item | record.fields)
    alone = sum(names[group][0] == 2 for group in groups)
    if alone:
        print(
            f"note: {alone} of {len(items)} images name neither patient nor lesion: each counts as a patient of its "
            "own, with its copies; those of one patient may stand in several splits",
            file=sys.stderr,
        )
    several = sum(len(records[ident].patients) > 1 for ident, _ in written)
    if several:
        print(f"note: to {several} images the tables give several patients, who stay together", file=sys.stderr)
    return items


def _later_copies(count: int, copies: Sequence[tuple[int, int, int]]) -> set[int]:
    """The numbers of all images but the first of each set of copies."""
    keys: list[list[int]] = [[] for _ in range(count)]
    for edge, (one, two, _) in enumerate(copies):
        keys[one].append(edge)
        keys[two].append(edge)
    first: dict[int, int] = {}
    return {number for number, group in enumerate(unite(keys)) if first.setdefault(group, number) != number}


def _write_copies(
    target: Path, files: Sequence[str], items: Sequence[Item], copies: Sequence[tuple[int, int, int]]
) -> None:
    """Write the pairs of copies and say how many there are."""
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(("file", "other", "distance"))
    rows.writerows((files[one], files[two], distance) for one, two, distance in copies)
    path = target / "duplicates.csv"
    try:
        atomic_write_text(path, table.getvalue())
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}); mend that and run it again") from error
    if not copies:
        return
    differ = [(files[one], files[two]) for one, two, _ in copies if items[one]["label"] != items[two]["label"]]
    told = f"; {len(differ)} of them have different classes, the first {' and '.join(differ[0])}" if differ else ""
    print(f"note: {len(copies)} pairs of images are copies of one another, see {path}{told}", file=sys.stderr)


app = c.new_app(convert_isic, __doc__)

if __name__ == "__main__":
    sys.exit(c.main(app))
