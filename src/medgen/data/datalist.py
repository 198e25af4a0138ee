"""Datalists: the JSON that passes from preprocessing to a bundle, split by patient and checked."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import math
import ntpath
import os
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

from medgen.errors import UserError
from medgen.output import atomic_write_text

__all__ = [
    "datalist_hash",
    "distinct_names",
    "evenly",
    "file_stem",
    "items_from_folder",
    "list_files",
    "load_classes",
    "load_datalist",
    "natural_key",
    "printable",
    "readable_items",
    "select_label",
    "split_by_patient",
    "validate_datalist",
    "write_datalist",
    "write_rejected",
]

logger = logging.getLogger(__name__)

Item = dict[str, Any]

SPLITS = ("training", "validation", "test")
PATH_FIELDS = ("image", "mask", "anomaly_mask")  # joined to dataset_dir on loading
NOT_IMAGES = (".csv", ".json", ".txt")
LONGEST_NAME = 200  # bytes; file systems allow 255, of which suffixes and frame numbers need some

# Only these are cut off a name: DICOM files often end in a UID, whose last number is no suffix.
_SUFFIX = re.compile(
    r"\.(png|jpe?g|jpe|jfif|tiff?|bmp|gif|webp|jp2|j2k|pgm|ppm|dcm|dicom|ima|nii\.gz|nii|mha|mhd|nrrd)$", re.IGNORECASE
)


def natural_key(path: str) -> list[tuple[int, int, str]]:
    """Sort key that puts ``image2`` before ``image10``, the same on every machine."""
    parts = re.split(r"([0-9]+)", path)
    # the text itself comes last, so that "01" and "1" are ordered too
    return [(1, int(p), "") if p.isdecimal() else (0, 0, p) for p in parts] + [(0, 0, path)]


def file_stem(name: str) -> str:
    """The file's name without its folder and without the suffix of an image format (``.nii.gz`` is one suffix)."""
    base = posixpath.basename(name.replace(os.sep, "/"))
    return _SUFFIX.sub("", base) or base


def list_files(folder: str | os.PathLike) -> list[str]:
    """Every file below a folder that is not hidden, in natural order.

    Linked folders are entered (public datasets are often spread over disks that way), each folder once.

    Args:
        folder: the root.

    Returns:
        Paths relative to ``folder``, with forward slashes.

    Raises:
        UserError: if ``folder`` is no folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"expected a folder, got {root} ({'a file' if root.exists() else 'not found'})")
    found: list[str] = []
    seen: set[tuple[int, int]] = set()

    def walk(directory: str, prefix: str) -> None:
        status = os.stat(directory)
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        try:
            with os.scandir(directory) as entries:
                # sorted, because of two links to one folder the first is entered
                ordered = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"cannot list {directory}: {error.strerror}; mend its permissions") from error
        for entry in ordered:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                walk(entry.path, f"{prefix}{entry.name}/")
            else:
                found.append(prefix + entry.name)

    walk(str(root), "")
    return sorted(found, key=natural_key)


def printable(name: str) -> str:
    """A file name that is no UTF-8 in a form that can stand in JSON and CSV."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def distinct_names(short: Sequence[str], full: Sequence[str], sources: Sequence[str] | None = None) -> list[str]:
    """Names for the outputs of files, no two the same, on file systems that ignore case, too.

    Args:
        short: the name that each file shall have if no other does, such as its path without suffix.
        full: what those have whose short names meet: ``b.jpg`` and ``b.dcm`` in the place of two ``b``.
        sources: what tells the files apart for certain; names that meet still, or are too long for a file system, end
            in a digest of it. Default: ``full``.

    Returns:
        One name per file, in their order.
    """
    times = Counter(name.casefold() for name in short)
    names = [long if times[name.casefold()] > 1 else name for name, long in zip(short, full, strict=True)]
    times = Counter(name.casefold() for name in names)
    for number, (name, source) in enumerate(zip(names, full if sources is None else sources, strict=True)):
        folder, slash, base = name.rpartition("/")
        if times[name.casefold()] > 1 or len(os.fsencode(base)) > LONGEST_NAME:
            digest = hashlib.sha256(os.fsencode(source)).hexdigest()[:12]
            names[number] = f"{folder}{slash}{os.fsencode(base)[: LONGEST_NAME - 20].decode(errors='ignore')}-{digest}"
    return names


def write_rejected(path: str | os.PathLike, rejected: Mapping[str, str]) -> None:
    """Write the CSV (``file, reason``) of what a command could not use; without any it has its header only."""
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["file", "reason"])
    rows.writerows((printable(file), reason) for file, reason in rejected.items())
    try:
        atomic_write_text(path, table.getvalue())
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another folder") from error


def items_from_folder(
    folder: str | os.PathLike, rejected: str | os.PathLike | None = None, num_workers: int = 0
) -> list[Item]:
    """Datalist items for a folder of images without a datalist, for inference.

    Args:
        folder: searched with all folders below it; hidden files are passed over, and so are CSV, JSON and TXT, which
            the line printed at the end counts.
        rejected: CSV to write (``file, reason``). Every file is then read once beforehand: one that is no readable
            image is left out and has a row there, and so has one with several frames, of which the first is used.
            None: every file is taken, unread.
        num_workers: processes that read; 0 reads in this one.

    Returns:
        ``{"image": path, "patient": file name without suffix}`` in natural order (``image2`` before ``image10``);
        paths begin with ``folder``.

    Raises:
        UserError: if ``folder`` is no folder or holds no file, or none that can be read, or if ``rejected`` cannot be
            written.
    """
    found = list_files(folder)
    files = [file for file in found if not file.lower().endswith(NOT_IMAGES)]
    if not files:
        raise UserError(f"expected images below {folder}, got an empty folder; name the folder that holds them")
    if rejected is not None:
        files = _readable(folder, files, rejected, num_workers, len(found) - len(files))
    return [{"image": os.path.join(folder, file), "patient": file_stem(file)} for file in files]


class _FrameCounts:
    """Map-style data set over files: the number of frames and, if that is 0, the reason."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> tuple[int, str]:
        from medgen.data.reader import UnreadableImageError, one_line, read_some

        try:
            return read_some(Path(self.paths[number]), None, 0)[0].count, ""
        except UnreadableImageError as error:
            return 0, str(error)
        except MemoryError:
            return 0, "too large for the memory"
        except OSError as error:
            return 0, one_line(error.strerror or error)
        except Exception as error:  # one odd file must not stop the rest
            return 0, f"{type(error).__name__}: {one_line(error)}"


def _checked(paths: Sequence[str], num_workers: int) -> Iterable[tuple[int, str]]:
    """The number of frames of each file and, if that is 0, the reason."""
    # here, since whoever imports this module does not want to wait for torch
    import torch
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    # Processes, since the reader silences its decoders through filters of warnings, which threads share. A generator
    # of their own, since a DataLoader draws from torch's: the check must not change what a seed gives.
    loader = DataLoader(_FrameCounts(paths), batch_size=None, num_workers=num_workers, generator=torch.Generator())
    return tqdm(loader, desc="checking", unit="file", leave=False, disable=None)


def _readable(
    folder: str | os.PathLike, files: list[str], rejected: str | os.PathLike, num_workers: int, texts: int
) -> list[str]:
    """The files whose first frame can be read; the others, and those with more frames, go to the CSV."""
    rows, used, several = {}, [], 0
    checked = _checked([os.path.join(folder, file) for file in files], num_workers)
    for file, (count, reason) in zip(files, checked, strict=True):
        if count:
            used.append(file)
        if count > 1:
            several += 1
            left_out = f"{count - 1} of {count} frames left out, only the first is used"
            reason = f"{left_out}; python -m preprocessing.images converts them all"
        if reason:
            rows[file] = reason
    write_rejected(rejected, rows)
    if not used:
        raise UserError(f"none of the {len(files)} files below {folder} is a readable image; see {rejected}")
    print(
        f"{folder}: {len(used)} of {len(files)} files are readable images, {several} of them with further frames that "
        f"are left out; reasons: {rejected}" + (f"; {texts} CSV, JSON or TXT passed over" if texts else ""),
        flush=True,
    )
    return used


def readable_items(
    items: Sequence[Item],
    data_root: str | os.PathLike,
    rejected: str | os.PathLike | None,
    num_workers: int = 0,
    is_known: Callable[[Item], bool] = lambda item: False,
    from_folder: bool = False,
) -> list[Item]:
    """The items of a datalist or folder whose image can be read; the others go to a CSV, and work on the rest goes on.

    Args:
        items: with full paths.
        data_root: folder that the CSV's paths start from.
        rejected: CSV to write (``file, reason``). None, for a shard: the log has them, none need be left, and the run
            that merges the shards writes the CSV.
        num_workers: processes that read; 0 reads in this one.
        is_known: whether an item need not be read, such as one that is finished.
        from_folder: the items are those of :func:`items_from_folder` in ``data_root``, unread: with ``rejected`` it is
            done as there, finished or not.

    Returns:
        The items, in their order.

    Raises:
        UserError: no image can be read, or ``rejected`` cannot be written.
    """
    if from_folder and rejected is not None:
        files = [os.path.relpath(item["image"], data_root) for item in items]
        texts = sum(file.lower().endswith(NOT_IMAGES) for file in list_files(data_root))
        readable = set(_readable(data_root, files, rejected, num_workers, texts))
        return [item for item, file in zip(items, files, strict=True) if file in readable]
    todo = [item["image"] for item in items if not is_known(item)]
    reasons = {path: why for path, (count, why) in zip(todo, _checked(todo, num_workers), strict=True) if not count}
    used = [item for item in items if item["image"] not in reasons]
    if rejected is None:
        for path, why in reasons.items():
            logger.warning(f"{path} is left out: {why}")
        return used
    write_rejected(rejected, {Path(os.path.relpath(path, data_root)).as_posix(): why for path, why in reasons.items()})
    if not used:
        raise UserError(f"none of the {len(items)} images of the datalist can be read; see {rejected}")
    return used


def split_by_patient(
    items: Iterable[Mapping[str, Any]], fractions: Mapping[str, float] | None = None, seed: int = 0
) -> dict[str, list[Item]]:
    """Split items so that no patient stands in two splits.

    Patients are taken in an order that depends on the seed and their ids only, so the order of ``items`` and adding
    other fields change nothing. Each goes to the split that lacks most of its share; then whole patients are moved or
    exchanged as long as that brings the number of *images* nearer to the fractions. With many patients the result is
    within one image of them; patients with many images are not favoured for any split.

    Args:
        items: datalist items with ``image`` and ``patient``.
        fractions: share of the images per split, summing to 1; default 0.8 / 0.1 / 0.1 for training, validation
            and test.
        seed: another seed gives another split.

    Returns:
        Items per split in natural order of ``image``. No split with a fraction above 0 is empty when there are at
        least as many patients as such splits; with fewer, the ones with the largest fractions are filled.

    Raises:
        UserError: if the fractions do not sum to 1, one is negative, or an item has no patient.
    """
    fractions = {"training": 0.8, "validation": 0.1, "test": 0.1} if fractions is None else dict(fractions)
    total = math.fsum(fractions.values())
    if not fractions or min(fractions.values()) < 0 or not math.isclose(total, 1, abs_tol=1e-6):
        shares = ", ".join(f"{name} {share:g}" for name, share in fractions.items())
        raise UserError(f"split fractions must be 0 or more and sum to 1, got {shares} (sum {total:g})")

    images: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        if not str(item.get("patient", "")):
            raise UserError(f"expected a patient in every item, got none for {item.get('image', item)}")
        images[str(item["patient"])].append(dict(item))
    order = sorted(images, key=lambda patient: hashlib.sha256(f"{seed}\0{patient}".encode()).digest())
    size = {patient: len(images[patient]) for patient in order}

    splits = [name for name, share in fractions.items() if share > 0]
    target = {name: fractions[name] * sum(size.values()) for name in splits}
    count = dict.fromkeys(splits, 0)
    home: dict[str, str] = {}
    for patient in order:
        name = max(splits, key=lambda s: ((target[s] - count[s]) / target[s], target[s]))
        home[patient] = name
        count[name] += size[patient]
    _fill_empty(home, size, count, splits)
    _approach(home, size, count, target)

    result: dict[str, list[Item]] = {name: [] for name in fractions}
    for patient in order:
        result[home[patient]] += images[patient]
    for members in result.values():
        members.sort(key=lambda item: natural_key(str(item.get("image", ""))))
    return result


def _fill_empty(home: dict[str, str], size: dict[str, int], count: dict[str, int], splits: list[str]) -> None:
    """Give every empty split the smallest patient of the split with the most patients."""
    for name in splits:
        patients = Counter(home.values())
        donor = max(splits, key=lambda s: patients[s])
        if patients[name] == 0 and patients[donor] > 1:
            patient = min((p for p in home if home[p] == donor), key=size.__getitem__)
            home[patient] = name
            count[donor] -= size[patient]
            count[name] += size[patient]


def _approach(home: dict[str, str], size: dict[str, int], count: dict[str, int], target: dict[str, float]) -> None:
    """Move or exchange single patients while that lessens the distance of the image counts from their targets."""
    # Patients of one size are interchangeable here, so sizes are searched and not pairs of patients.
    members: dict[str, dict[int, list[str]]] = {name: defaultdict(list) for name in target}
    for patient, name in home.items():
        members[name][size[patient]].append(patient)
    while True:
        best_gain, best = 1e-9, None
        for giver, taker in permutations(target, 2):
            sizes = [k for k, patients in members[giver].items() if patients]
            may_move = sum(len(patients) for patients in members[giver].values()) > 1
            back = ([0] if may_move else []) + [k for k, patients in members[taker].items() if patients]
            error = abs(count[giver] - target[giver]) + abs(count[taker] - target[taker])
            for out in sizes:
                for into in back:
                    net = out - into
                    after = abs(count[giver] - net - target[giver]) + abs(count[taker] + net - target[taker])
                    if error - after > best_gain:
                        best_gain, best = error - after, (giver, taker, out, into)
        if best is None:
            return
        giver, taker, out, into = best
        moved = members[giver][out].pop()
        home[moved] = taker
        if into:
            returned = members[taker][into].pop()
            home[returned] = giver
            members[giver][into].append(returned)
        members[taker][out].append(moved)
        count[giver] -= out - into
        count[taker] += out - into


def _unsafe(path: str) -> bool:
    """Whether a datalist's path is absolute (on any system) or leaves its root."""
    # ntpath too: "C:\\x" is a harmless relative name here and an absolute path for a colleague on Windows
    if path.startswith(("/", "\\")) or ntpath.splitdrive(path)[0] or "\0" in path:
        return True
    return ".." in path and posixpath.normpath(path.replace("\\", "/")).split("/")[0] == ".."


def _read(path: str | os.PathLike) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise UserError(
            f"datalist {path} not found; make one with: python -m preprocessing.images --source DIR --target DIR"
        ) from None
    except OSError as error:
        raise UserError(f"datalist {path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"datalist {path} is not JSON: {' '.join(str(error).split())}") from error


def _splits(datalist: Mapping[str, Any]) -> dict[str, list[Item]]:
    """The keys that hold items: the three usual ones, and any other non-empty list of objects."""
    return {
        name: value
        for name, value in datalist.items()
        if name in SPLITS or (isinstance(value, list) and value and all(isinstance(item, dict) for item in value))
    }


def validate_datalist(datalist: Mapping[str, Any] | str | os.PathLike) -> dict[str, Any]:
    """Check a datalist; nothing is looked up on disk but the datalist itself.

    Args:
        datalist: its content, or the path of its JSON file.

    Returns:
        The content. Splits are ``training``, ``validation``, ``test`` and every other key that holds a list of objects.

    Raises:
        UserError: if it is not JSON or has no split; if an item lacks ``image`` or ``patient``; if a path is absolute
            or leaves its root; if an image stands there twice or a patient stands in two splits.
    """
    where = "datalist"
    if isinstance(datalist, str | os.PathLike):
        where = f"datalist {datalist}"
        datalist = _read(datalist)
    shape = '{"training": [{"image": ..., "patient": ...}, ...], ...}'
    if not isinstance(datalist, Mapping):
        raise UserError(f"{where}: expected an object {shape}, got a {type(datalist).__name__}")
    splits = _splits(datalist)
    if not splits:
        raise UserError(f"{where}: expected {shape}, got no split, only the keys {sorted(map(str, datalist))}")

    image_home: dict[str, str] = {}
    patient_home: dict[str, str] = {}
    for name, items in splits.items():
        if not isinstance(items, list):
            raise UserError(f"{where}: {name} must be a list of items, got a {type(items).__name__}")
        for number, item in enumerate(items):
            spot = f"{where}: {name}[{number}]"
            if not isinstance(item, Mapping):
                raise UserError(f"{spot} must be an object with image and patient, got {item!r:.80}")
            image, patient = item.get("image"), item.get("patient")
            if not isinstance(image, str) or not image:
                raise UserError(f"{spot} must have an image (a relative path), got {image!r:.80}")
            if isinstance(patient, bool) or not isinstance(patient, str | int) or patient == "":
                raise UserError(f"{spot} ({image}) must have a patient (an id), got {patient!r:.80}")
            for field in PATH_FIELDS:
                path = item.get(field)
                if path is None:
                    continue
                if not isinstance(path, str) or _unsafe(path):
                    raise UserError(f"{spot}: {field} must be a path below the dataset's folder, got {path!r:.200}")
            image, patient = posixpath.normpath(image), str(patient)
            other = image_home.setdefault(image, spot)
            if other is not spot:
                raise UserError(f"{spot}: image {image} stands already in {other.removeprefix(where + ': ')}")
            other = patient_home.setdefault(patient, name)
            if other != name:
                raise UserError(
                    f"{where}: patient {patient} stands in two splits, {other} and {name}; "
                    "split by patient (medgen.data.split_by_patient)"
                )
    return dict(datalist)


def write_datalist(
    path: str | os.PathLike,
    name: str,
    modality: str | Mapping[str, str],
    splits: Mapping[str, Sequence[Mapping[str, Any]]],
    **extra: Any,
) -> None:
    """Check and write a datalist in MONAI's Decathlon form, all of it or nothing.

    Args:
        path: JSON file to write; a file that is there is replaced in one step.
        name: dataset's name.
        modality: as in the Decathlon form, ``"CT"`` or ``{"0": "CT"}``.
        splits: items per split; paths relative to the datalist's folder.
        extra: other top-level keys, such as ``description`` or ``label_names``.

    Raises:
        UserError: as :func:`validate_datalist`, before anything is written; or if ``path`` cannot be written.
    """
    content = validate_datalist({"name": name, "modality": modality, **extra, **splits})
    try:
        atomic_write_text(path, _dump(content))
    except OSError as error:
        raise UserError(f"datalist {path} cannot be written: {error.strerror}") from error


def _dump(content: Mapping[str, Any]) -> str:
    """JSON with one item a line: a person can read it and `diff` can compare it, at 100,000 items too."""
    lines = []
    splits = _splits(content)
    for key, value in content.items():
        if splits.get(key):
            value = "[\n    " + ",\n    ".join(json.dumps(item, ensure_ascii=False) for item in value) + "\n  ]"
        else:
            value = json.dumps(value, ensure_ascii=False)
        lines.append(f"  {json.dumps(key)}: {value}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def load_datalist(
    datalist: str | os.PathLike, split: str, dataset_dir: str | os.PathLike | None = None, require_files: bool = True
) -> list[Item]:
    """Items of one split, with full paths; this is what a bundle's JSON calls.

    .. code-block:: json

        {"_target_": "medgen.data.load_datalist",
         "datalist": "@datalist", "split": "training", "dataset_dir": "@dataset_dir"}

    Args:
        datalist: JSON file.
        split: ``training``, ``validation``, ``test`` or another list in it.
        dataset_dir: base of the relative paths; default (None or empty): the datalist's folder.
        require_files: look whether every image and mask exists (one listing per folder, so it costs little).

    Returns:
        Copies of the items with ``image``, ``mask`` and ``anomaly_mask`` joined to ``dataset_dir``.

    Raises:
        UserError: if the datalist is missing or refused by :func:`validate_datalist`, the split is missing or empty,
            or a file is missing.
    """
    content = validate_datalist(datalist)
    splits = _splits(content)
    if not splits.get(split):
        there = ", ".join(f"{name} ({len(items)})" for name, items in splits.items())
        state = "empty" if split in splits else "missing"
        raise UserError(f"datalist {datalist}: split {split} is {state}; it has {there}")
    root = Path(dataset_dir) if dataset_dir else Path(datalist).parent
    items = [
        {
            key: os.path.join(root, value) if key in PATH_FIELDS and value is not None else value
            for key, value in item.items()
        }
        for item in splits[split]
    ]
    if require_files:
        missing = list(_missing(item[field] for item in items for field in PATH_FIELDS if item.get(field)))
        if missing:
            raise UserError(
                f"{missing[0]} not found ({len(missing)} of the files of split {split} are missing); "
                f"set dataset_dir to the folder that the paths in {datalist} start from, now {root}"
            )
    return items


def load_classes(
    datalist: str | os.PathLike,
    split: str,
    dataset_dir: str | os.PathLike | None = None,
    num_classes: int = 0,
    normal: bool = False,
) -> list[Item]:
    """Items of one split as :func:`load_datalist` gives them, with labels as class indices.

    Args:
        datalist: JSON file; its ``label_names``, where there are any, say the order of labels that are names.
        split: ``training``, ``validation``, ``test`` or another list in it.
        dataset_dir: base of the relative paths; default: the datalist's folder.
        num_classes: of the network; 0 leaves labels as they are.
        normal: whether the split must hold normal images alone, as what a detector of anomalies learns from must.

    Returns:
        The items, ``label`` from 0 to ``num_classes - 1``.

    Raises:
        UserError: as :func:`load_datalist`, or an item without a label, or with one that is no class, or an anomalous
            item where there must be none.
    """
    items = load_datalist(datalist, split, dataset_dir)
    anomalous = [item["image"] for item in items if normal and item.get("anomaly")]
    if anomalous:
        raise UserError(
            f"datalist {datalist}: {len(anomalous)} of {len(items)} items of split {split} are anomalous, the first is "
            f"{anomalous[0]}; a detector learns from normal images alone: make the splits with preprocessing.split"
        )
    if not num_classes:
        return items
    names = _read(datalist).get("label_names") or []
    index = {str(name): number for number, name in enumerate(names)} if isinstance(names, list) else {}
    for item in items:
        label = item.get("label")
        number = index.get(label) if isinstance(label, str) else label
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < num_classes:
            got = "none" if label is None else repr(label)
            remedy = f"mend the datalist, or set --num_classes to {len(names) or 0}"
            if label is None:
                remedy = "give the items labels, or for a generator without classes set --num_classes to 0"
            known = f" or one of label_names ({', '.join(map(str, names))})" if index else ""
            raise UserError(
                f"datalist {datalist}: {item['image']}: label must be a class from 0 to {num_classes - 1}{known}, got "
                f"{got}; {remedy}"
            )
        item["label"] = number
    return items


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """At most ``count`` items, taken from all of a list: of one in the order of its classes each is there.

    Args:
        items: any number.
        count: of the items wanted, at least 1.

    Returns:
        All items if there are no more, in their order.
    """
    n = min(len(items), count)
    return [items[place * len(items) // n] for place in range(n)]


def select_label(items: Iterable[Item], label: int | str | None) -> list[Item]:
    """The items of one class, for a model of that class alone.

    Args:
        items: of a datalist.
        label: the class, as the items have it, a number or a name; None takes all.

    Returns:
        The items, in their order.

    Raises:
        UserError: no item has this label.
    """
    items = list(items)
    if label is None:
        return items
    # a number may arrive from the command line as a text
    chosen = [item for item in items if item.get("label") is not None and str(item["label"]) == str(label)]
    if not chosen and all(item.get("label") is None for item in items):
        raise UserError(f"label {label!r:.80} cannot be chosen from items without labels; leave --label out")
    if not chosen:
        counts = Counter(str(item.get("label")) for item in items)
        there = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
        raise UserError(f"label must be one that the datalist's items have, {there}, got {label!r:.80}; set --label")
    return chosen


def _missing(paths: Iterable[str]) -> Iterator[str]:
    """The paths that are no files; folders are listed once instead of asking a network disk for every file."""
    listed: dict[str, set[str]] = {}
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in listed:
            try:
                with os.scandir(folder or ".") as entries:
                    listed[folder] = {entry.name for entry in entries if entry.is_file()}
            except OSError:
                listed[folder] = set()
        # the second look: file systems that ignore case or normalise accents list another spelling
        if name not in listed[folder] and not os.path.isfile(path):
            yield path


def datalist_hash(datalist_path: str | os.PathLike) -> str:
    """Fingerprint of a datalist's content: the same for any formatting and order of keys.

    The order of the items counts: training draws its batches by it.

    Args:
        datalist_path: JSON file.

    Returns:
        SHA-256, 64 hexadecimal digits.

    Raises:
        UserError: if the file is missing or not JSON.
    """
    canonical = json.dumps(_read(datalist_path), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
