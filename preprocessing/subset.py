"""A datalist with fewer training images: ``python -m preprocessing.subset --datalist DATA --target DIR``.

For studies of rare classes, say 40 images of one class and 1,000 of another, the other classes left out:

python -m preprocessing.subset --datalist data/mednist --training Hand=40 --training CXR=1000 --only --target data/rare

--training CLASS=N (repeated) takes N images of a class, --validation the same of that split; classes not named there
keep all of theirs, and so do the test and any other split. A class is named as in the datalist's label_names, or by its
number. --keep CLASS (repeated) leaves out the classes not named, in all splits; --only keeps those of --training. The
classes kept are numbered anew from 0, in the order in which they are named, or else in the datalist's.

Images are taken patient by patient, in an order that the seed and the patients' ids decide. So a smaller number is a
part of a larger one of the same seed, and nothing else changes when one class gets more.

--label-from FINDING makes the classes out of ChestX-ray14's lists of findings first: 1 for images with the finding
among their labels, 0 for those without any ("No Finding"); the others are left out and counted.

TARGET/datalist.json holds all classes, datalist_<class>.json each of them alone, with the same splits and labels, for a
generator of that class. Images are not copied; the last line says the --dataset_dir that the paths start from.

Exit codes: 0 all went well; 1 nothing was written; 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from medgen.data.datalist import distinct_names, natural_key, validate_datalist, write_datalist, write_rejected
from medgen.errors import UserError
from preprocessing import _convert as c

__all__ = ["app", "first_images", "write_subset"]

MADE_BY = "preprocessing.subset"
NO_FINDING = "No Finding"

Item = dict[str, Any]


def first_images(items: Sequence[Item], count: int, seed: int = 0) -> list[Item]:
    """Some of the items, of as few patients as come first.

    Args:
        items: with ``image`` and ``patient``.
        count: how many; all if there are fewer.
        seed: of the patients' order, which depends on nothing but it and their ids.

    Returns:
        The items taken, in the order given; those of a smaller count are among those of a larger one.
    """

    def draw(item: Item) -> tuple[bytes, list[tuple[int, int, str]]]:
        return hashlib.sha256(f"{seed}\0{item['patient']}".encode()).digest(), natural_key(item["image"])

    taken = {item["image"] for item in sorted(items, key=draw)[:count]}
    return [item for item in items if item["image"] in taken]


def _label_of_finding(splits: Mapping[str, Sequence[Item]], finding: str) -> dict[str, list[Item]]:
    """Items whose label is whether they have a finding; those that have others only are left out."""
    findings = {label for items in splits.values() for item in items for label in item.get("labels", ())}
    if finding not in findings:
        got = ", ".join(sorted(findings)) or "no labels at all"
        raise UserError(f"--label_from must be a finding that the datalist's labels have, {got}; got {finding!r:.80}")
    labelled = {
        name: [
            {**item, "label": int(finding in item["labels"])}
            for item in items
            if finding in item.get("labels", ()) or item.get("labels") == []
        ]
        for name, items in splits.items()
    }
    left_out = sum(map(len, splits.values())) - sum(map(len, labelled.values()))
    print(f"left out by --label_from {finding}: {left_out} images with other findings alone")
    return labelled


def _numbered(splits: Mapping[str, Sequence[Item]], names: Any) -> tuple[dict[str, list[Item]], list[str]]:
    """Items with labels as numbers, and the names of the classes."""
    labels = [item.get("label") for items in splits.values() for item in items]
    if isinstance(names, list) and names:
        names = [str(name) for name in names]
    elif labels and all(isinstance(label, int) and label >= 0 for label in labels):
        names = [str(number) for number in range(max(labels) + 1)]
    else:
        names = sorted({label for label in labels if isinstance(label, str)})
    numbers: dict[Any, int] = {name: number for number, name in enumerate(names)}
    numbers |= {number: number for number in range(len(names))}
    for item, label in zip((item for items in splits.values() for item in items), labels, strict=True):
        if isinstance(label, bool) or not isinstance(label, int | str) or label not in numbers:
            raise UserError(
                f"{item['image']} must have a label that is one of {', '.join(names) or 'the classes'}, got "
                f"{label!r:.80}; mend the datalist, or make labels with --label_from"
            )
    return {split: [{**i, "label": numbers[i["label"]]} for i in items] for split, items in splits.items()}, names


def _class(text: str, names: Sequence[str]) -> int:
    """The number of a class, given its name or number."""
    if text in names:
        return names.index(text)
    if text.isdecimal() and int(text) < len(names):
        return int(text)
    raise UserError(f"expected a class of {', '.join(names)}, or its number, got {text!r:.80}; see --help")


def _counts(texts: Sequence[str] | None, names: Sequence[str], option: str) -> dict[int, int]:
    """Images wanted per class, from ``CLASS=N`` of each."""
    counts: dict[int, int] = {}
    for text in texts or ():
        name, _, count = text.rpartition("=")
        if not name or not count.isdecimal() or int(count) < 1:
            raise UserError(f"{option} must be CLASS=N with N from 1, got {text!r:.80}")
        number = _class(name, names)
        if number in counts:
            raise UserError(f"{option} names {names[number]} twice; give one number of images")
        counts[number] = int(count)
    return counts


def _taken(items: Sequence[Item], counts: Mapping[int, int], names: Sequence[str], split: str, seed: int) -> list[Item]:
    """The items of a split, fewer of the classes that have a count."""
    kept = []
    for label in range(len(names)):
        own = [item for item in items if item["label"] == label]
        if counts.get(label, 0) > len(own):
            raise UserError(
                f"--{split} {names[label]}={counts[label]} needs as many {split} images of that class, got {len(own)}; "
                "ask for fewer"
            )
        kept += first_images(own, counts[label], seed) if label in counts else own
    return sorted(kept, key=lambda item: natural_key(item["image"]))


def write_subset(
    datalist: Annotated[Path, typer.Option(help="Datalist, or the folder that holds one.", show_default=False)],
    target: Annotated[Path, typer.Option(help="Folder to write the datalists to.", show_default=False)],
    training: Annotated[
        list[str] | None, typer.Option(metavar="CLASS=N", help="Training images of a class; repeated for each.")
    ] = None,
    validation: Annotated[
        list[str] | None, typer.Option(metavar="CLASS=N", help="Validation images of a class; repeated for each.")
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(metavar="CLASS", help="A class to keep; repeated. Default: all.")
    ] = None,
    only: Annotated[bool, typer.Option("--only", help="Keep the classes that --training names, no others.")] = False,
    label_from: Annotated[
        str | None, typer.Option(metavar="FINDING", help="Make the labels: 1 with this finding, 0 without any.")
    ] = None,
    dataset_dir: Annotated[
        Path | None, typer.Option(help="Where the datalist's paths start from; default: its folder.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the patients' order.")] = 0,
    name: Annotated[str, typer.Option(help="Name in the datalist; default: the target folder's.")] = "",
) -> int:
    """Write the datalists; see the head of this module.

    Returns:
        The exit code.

    Raises:
        UserError: if the datalist cannot be used, a class is unknown or has too few images, or the target holds another
            command's datalist.
    """
    if keep and only:
        raise typer.BadParameter("--keep and --only exclude each other: give one")
    if only and not training:
        raise typer.BadParameter("--only keeps the classes of --training, got none")
    datalist = datalist / "datalist.json" if datalist.is_dir() else datalist
    content = validate_datalist(datalist)
    splits = {
        key: value
        for key, value in content.items()
        if isinstance(value, list)
        and all(isinstance(item, dict) for item in value)
        and (value or key in ("training", "validation", "test"))  # an empty list of names is no split
    }
    first = next((item["image"] for items in splits.values() for item in items), None)
    if first is None:
        raise UserError(f"datalist {datalist} has no image; run the command that made it again")
    root = dataset_dir or datalist.parent
    if not (root / first).is_file():
        raise UserError(
            f"{root / first} not found; name the folder that the datalist's paths start from, --dataset_dir"
        )
    head = {key: value for key, value in content.items() if key not in splits}
    names = head.pop("label_names", None)
    if label_from is not None:
        splits, names = _label_of_finding(splits, label_from), [NO_FINDING, label_from]
    splits, names = _numbered(splits, names)

    wanted = {
        "training": _counts(training, names, "--training"),
        "validation": _counts(validation, names, "--validation"),
    }
    chosen = [_class(text, names) for text in keep or ()] or list(wanted["training"] if only else range(len(names)))
    twice = next((number for number in chosen if chosen.count(number) > 1), None)
    if twice is not None:
        raise UserError(f"--keep names {names[twice]} twice; name each class once")
    for split, counts in wanted.items():
        lost = next((number for number in counts if number not in chosen), None)
        if lost is not None:
            by = "--only keeps the classes of --training alone" if only else "--keep leaves it out"
            raise UserError(f"--{split} names {names[lost]}, but {by}; name that class there, or not in --{split}")
    anew = {old: new for new, old in enumerate(chosen)}
    names = [names[number] for number in chosen]
    splits = {
        split: [{**item, "label": anew[item["label"]]} for item in items if item["label"] in anew]
        for split, items in splits.items()
    }
    for split, counts in wanted.items():
        own = {anew[number]: count for number, count in counts.items()}
        splits[split] = _taken(splits.get(split, []), own, names, split, seed)
    count = Counter(item["label"] for item in splits["training"])
    empty = next((one for number, one in enumerate(names) if not count[number]), None)
    if empty is not None:
        raise UserError(f"class {empty} has no training image; keep the other classes alone, by --keep")
    _write(target, name or target.resolve().name, head, splits, names, seed, root)
    return 0


def _is_ours(path: Path) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("made_by") == MADE_BY
    except (OSError, ValueError, AttributeError):
        return False


def _write(
    target: Path,
    name: str,
    head: Mapping[str, Any],
    splits: Mapping[str, Sequence[Item]],
    names: Sequence[str],
    seed: int,
    root: Path,
) -> None:
    datalist = target / "datalist.json"
    if datalist.exists() and not _is_ours(datalist):
        raise UserError(f"{datalist} was not written by this command; choose another --target")
    extra = {**head, "label_names": list(names), "made_by": MADE_BY, "seed": seed}
    modality = extra.pop("modality", "unknown")
    extra.pop("name", None)
    stems = [re.sub(r"[^a-z0-9]+", "_", one.lower()).strip("_") for one in names]
    # names that are the same but for their signs are told apart by their numbers
    full = [f"{stem}_{n}".strip("_") for n, stem in enumerate(stems)]
    short = [stem or one for stem, one in zip(stems, full, strict=True)]
    stems = distinct_names(short, full, [f"{n} {one}" for n, one in enumerate(names)])
    single = {target / f"datalist_{stem}.json": number for number, stem in enumerate(stems)}
    for path in target.glob("datalist_*.json"):
        if path not in single and _is_ours(path):  # of another choice of classes
            path.unlink()
    target.mkdir(parents=True, exist_ok=True)
    for path, number in single.items():
        own = {split: [item for item in items if item["label"] == number] for split, items in splits.items()}
        write_datalist(path, f"{name}, {names[number]}", modality, own, **extra)
    write_datalist(datalist, name, modality, splits, **extra)
    write_rejected(target / "rejected.csv", {})
    for split, items in splits.items():
        count = Counter(item["label"] for item in items)
        told = ", ".join(f"{one} {count[number]}" for number, one in enumerate(names))
        print(f"{split}: {len(items)} images of {len({item['patient'] for item in items})} patients ({told})")
    print(f"datalist: {datalist}; of one class each: {', '.join(path.name for path in single)}")
    # whole paths, since bundles' commands are typed in other folders
    datalist, root, target = (Path(os.path.abspath(path)) for path in (datalist, root, target))
    if root != target:
        print(f"use it with: {shlex.join(['--datalist', str(datalist), '--dataset_dir', str(root)])}", flush=True)


app = c.new_app(write_subset, __doc__)

if __name__ == "__main__":
    sys.exit(c.main(app))
