"""The datalist of a study out of preprocessed datasets: ``python -m preprocessing.split --normal A --target DIR``.

A detector of anomalies learns from normal images and is tested on normal and anomalous ones. Training and validation
hold images of --normal only; test holds the normal test images (anomaly: 0) and all of --anomalous (anomaly: 1):

python -m preprocessing.split --normal data/cxr --anomalous data/hand --anomalous data/head --target data/study

Without --anomalous it splits again, by other shares or into equal parts, say the halves of a real-against-real
baseline:

python -m preprocessing.split --normal data/cxr --split 0.7 0.1 0.2 --target data/cxr_70

python -m preprocessing.split --normal data/cxr --parts 2 --target data/cxr_halves

Inputs are datalists, or the folders that hold a datalist.json. Their own splits are kept, unless --split or --resplit
says otherwise. An item's own anomaly field is believed, whichever option named its dataset: preprocessing.liver_ct and
preprocessing.corrupt write it. Images that preprocessing.corrupt --keep-originals copied are left out where the inputs
have the image itself, which would count twice.

Patients are never divided. One whom the inputs give several places goes to the last of them: training, other splits,
validation, test; and whoever has an anomalous image goes to test with all others. Equal ids are the same person;
--distinct says that they are not when they come from different inputs (numbers, file names), and puts the dataset's
name before each.

Images are not copied. Paths in TARGET/datalist.json start from TARGET if it holds all inputs, else from the folder that
does, which the command prints as the --dataset_dir for the bundles; load_datalist refuses paths that leave it.

Exit codes: 0 all went well; 1 nothing was written; 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from medgen.data.datalist import (
    load_datalist,
    natural_key,
    split_by_patient,
    validate_datalist,
    write_datalist,
    write_rejected,
)
from medgen.errors import UserError
from preprocessing import _convert as c

__all__ = ["app", "assign_splits", "pick_images", "write_split"]

SPLITS = ("training", "validation", "test")
PATHS = ("image", "mask", "anomaly_mask")
MADE_BY = "preprocessing.split"

Item = dict[str, Any]


def assign_splits(
    items: Iterable[Mapping[str, Any]], shares: Mapping[str, float] | None = None, seed: int = 0
) -> tuple[dict[str, list[Item]], list[str]]:
    """Give every patient one split, and those with an anomalous image the test.

    Args:
        items: with ``image``, ``patient``, ``anomaly`` (0 or 1) and, without ``shares``, ``split`` (where the item
            stood before).
        shares: of the images that :func:`medgen.data.split_by_patient` gives each split, counting patients without an
            anomalous image only; None keeps the splits the items have.
        seed: of the split.

    Returns:
        Items without ``split`` per split, in natural order of ``image``; and the patients who had to be moved.
    """
    patients: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        patients[str(item["patient"])].append(dict(item))
    anomalous = {patient for patient, images in patients.items() if any(item["anomaly"] for item in images)}
    moved = []
    if shares is None:
        seen = dict.fromkeys(item["split"] for images in patients.values() for item in images)
        names = ["training", *(name for name in seen if name not in SPLITS), "validation", "test"]
        home = {}
        for patient, images in patients.items():
            places = {item["split"] for item in images if not item["anomaly"]}
            home[patient] = "test" if patient in anomalous else max(places, key=names.index)
            if places - {home[patient]}:
                moved.append(patient)
    else:
        names = list(shares) if not anomalous else list(dict.fromkeys([*shares, "test"]))
        normal = [item for patient, images in patients.items() if patient not in anomalous for item in images]
        drawn = split_by_patient(normal, shares, seed)
        home = {str(item["patient"]): name for name, members in drawn.items() for item in members}
        home |= dict.fromkeys(anomalous, "test")
    splits: dict[str, list[Item]] = {name: [] for name in names}
    for patient, images in patients.items():
        for item in images:
            item.pop("split", None)
        splits[home[patient]] += images
    for members in splits.values():
        members.sort(key=lambda item: natural_key(item["image"]))
    return splits, moved


def pick_images(items: Sequence[Item], count: int, seed: int = 0) -> list[Item]:
    """Some of the items, of as many patients as possible.

    Args:
        items: with ``image`` and ``patient``.
        count: how many; all if there are fewer.
        seed: another seed picks others. The choice does not depend on the order of the items.

    Returns:
        The items picked, in the order given.
    """

    def draw(item: Item) -> bytes:
        return hashlib.sha256(f"{seed}\0{item['image']}".encode()).digest()

    turn: Counter[str] = Counter()
    order = []
    for item in sorted(items, key=draw):
        # everybody's first image comes before anybody's second
        order.append((turn[str(item["patient"])], len(order), item["image"]))
        turn[str(item["patient"])] += 1
    chosen = {image for _, _, image in sorted(order)[:count]}
    return [item for item in items if item["image"] in chosen]


def _read(path: Path, base: Path | None, anomaly: int) -> tuple[dict[str, Any], list[Item]]:
    """A datalist's other keys; its items with full paths, ``split``, ``anomaly``, ``dataset``, ``root``, ``origin``."""
    path = path / "datalist.json" if path.is_dir() else path
    content = validate_datalist(path)
    splits = {
        name: value
        for name, value in content.items()
        if value and isinstance(value, list) and all(isinstance(item, dict) for item in value)
    }
    if not splits:
        raise UserError(f"datalist {path} has no image; run the command that made it again")
    # a datalist that this command has written may lie apart from its images
    first = next(iter(splits.values()))[0]["image"]
    root = path.parent
    if base is not None and not (root / first).is_file():
        root = base
    name = str(content.get("name") or path.resolve().parent.name)
    items = []
    for split in splits:
        for item in load_datalist(path, split, root):
            own = item.get("anomaly", anomaly)
            if own not in (0, 1):
                raise UserError(f"datalist {path}: anomaly must be 0 or 1, got {own!r} for {item['image']}")
            paths = {key: os.path.abspath(item[key]) for key in PATHS if item.get(key)}
            # of a corrupted copy: the dataset that its source belongs to
            origin = item.get("dataset", content.get("source_name"))
            items.append(
                {
                    "dataset": name,
                    **item,
                    **paths,
                    "anomaly": int(own),
                    "split": split,
                    "root": os.path.abspath(root),
                    "origin": origin,
                }
            )
    return {key: value for key, value in content.items() if key not in splits}, items


def write_split(
    target: c.Target,
    normal: Annotated[
        list[Path], typer.Option(help="Datalist (or its folder) of normal images; may be repeated.", show_default=False)
    ],
    anomalous: Annotated[
        list[Path] | None, typer.Option(help="Datalist (or its folder) of anomalous images; may be repeated.")
    ] = None,
    split: Annotated[
        tuple[float, float, float] | None,
        typer.Option(metavar="TRAIN VAL TEST", help="Split the normal images again, by these shares."),
    ] = None,
    resplit: Annotated[bool, typer.Option("--resplit", help="Split them again, by 0.8 0.1 0.1.")] = False,
    parts: Annotated[
        int | None, typer.Option(min=2, help="Split them again, into so many equal parts: part1, part2, ...")
    ] = None,
    test_count: Annotated[
        int | None, typer.Option(min=1, help="Keep at most so many normal test images, drawn; default: all.")
    ] = None,
    max_anomalous: Annotated[
        int | None, typer.Option(min=1, help="Keep at most so many anomalous images, drawn; default: all.")
    ] = None,
    distinct: Annotated[
        bool, typer.Option("--distinct", help="Equal patient ids of different inputs are different people.")
    ] = False,
    dataset_dir: Annotated[
        Path | None, typer.Option(help="Where the paths start from; default: see above.", show_default=False)
    ] = None,
    seed: c.Seed = 0,
    name: Annotated[str, typer.Option(help="Name in the datalist; default: the target folder's.")] = "",
) -> int:
    """Write the datalist of a study; see the head of this module.

    Returns:
        The exit code.

    Raises:
        UserError: if an input cannot be used, the target holds another command's datalist, the images have no common
            folder, or training or test would be empty.
    """
    if parts is not None and (split is not None or resplit or anomalous):
        raise typer.BadParameter("--parts excludes --split, --resplit and --anomalous: give one")
    shares = {f"part{number + 1}": 1 / parts for number in range(parts)} if parts else None
    if split is not None or resplit:
        shares = dict(zip(SPLITS, split or c.DEFAULT_SPLIT, strict=True))
        split_by_patient([], shares)  # wrong shares first of all
    datalist = target / "datalist.json"
    _claim(datalist)

    heads, items, named = [], [], set()
    for anomaly, paths in ((0, normal), (1, anomalous or [])):
        for path in paths:
            head, members = _read(path, dataset_dir, anomaly)
            if distinct:
                prefix = members[0]["dataset"]
                if prefix in named:
                    raise UserError(f"--distinct needs inputs of different names, got two {prefix}; rename one")
                named.add(prefix)
                members = [{**item, "patient": f"{prefix}/{item['patient']}"} for item in members]
            heads.append(head)
            items += members
    twice = [image for image, times in Counter(item["image"] for item in items).items() if times > 1]
    if twice:
        raise UserError(f"{twice[0]} stands in two inputs ({len(twice)} images do); give each dataset once")
    items = _without_copies(items)
    root = _root(items, target, dataset_dir)
    for item in items:
        del item["root"], item["origin"]
        item.update({key: Path(item[key]).relative_to(root).as_posix() for key in PATHS if item.get(key)})

    study = any(item["anomaly"] for item in items)
    splits, moved = assign_splits(items, shares, seed)
    if study:
        test = splits["test"]
        ill = [item for item in test if item["anomaly"]]
        well = [item for item in test if not item["anomaly"]]
        ill = ill if max_anomalous is None else pick_images(ill, max_anomalous, seed)
        well = well if test_count is None else pick_images(well, test_count, seed)
        if not well or not splits.get("training"):
            raise UserError(
                f"{'test' if not well else 'training'} would have no normal image; give other shares with --split, or "
                "--distinct if equal patient ids of the inputs are different people"
            )
        splits["test"] = sorted([*well, *ill], key=lambda item: natural_key(item["image"]))
    else:
        if max_anomalous is not None:
            raise UserError("--max_anomalous needs anomalous images, got none; name them with --anomalous")
        if test_count is not None and "test" in splits:
            splits["test"] = pick_images(splits["test"], test_count, seed)
        for item in (item for members in splits.values() for item in members):
            del item["anomaly"]
    if moved:
        print(
            f"note: moved {len(moved)} patients who stood in several splits or have anomalous images, {moved[0]} "
            "first; --distinct if equal ids of the inputs are different people",
            file=sys.stderr,
        )
    _write(datalist, name or target.resolve().name, heads, splits, seed, root)
    return 0


def _without_copies(items: Sequence[Item]) -> list[Item]:
    """Leave out unchanged copies of images that stand among the items themselves, which would count twice."""
    originals: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        if "source" not in item:
            originals[os.path.basename(item["image"])].append(item)

    def is_there(copy: Item) -> bool:
        source = "/" + posixpath.normpath(str(copy["source"]))
        # its root may have been another one then, so paths are compared from their ends
        return any(
            ("/" + Path(item["image"]).as_posix()).endswith(source) and copy["origin"] == item["dataset"]
            for item in originals[posixpath.basename(source)]
        )

    kept = [item for item in items if item["anomaly"] or "source" not in item or not is_there(item)]
    if len(kept) < len(items):
        print(
            f"note: left out {len(items) - len(kept)} unchanged copies of images that the inputs have themselves",
            file=sys.stderr,
        )
    return kept


def _claim(datalist: Path) -> None:
    """Refuse to overwrite what this command has not written: most of all its own inputs."""
    if not datalist.exists():
        return
    try:
        made_by = json.loads(datalist.read_text(encoding="utf-8")).get("made_by")
    except (OSError, ValueError, AttributeError):
        made_by = None
    if made_by != MADE_BY:
        raise UserError(f"{datalist} was not written by this command; choose another --target")


def _root(items: Sequence[Item], target: Path, given: Path | None) -> Path:
    """The folder that all paths start from."""
    try:
        common = Path(os.path.commonpath({item["root"] for item in items}))
    except ValueError as error:  # drives of Windows
        raise UserError("the inputs have no folder in common; copy them below one") from error
    wanted = Path(os.path.abspath(given if given is not None else target))
    if common.is_relative_to(wanted):
        return wanted
    if given is not None:
        raise UserError(f"--dataset_dir must hold all inputs, got {given}; name {common} or a folder above it")
    return common


def _write(
    datalist: Path, name: str, heads: Sequence[Mapping[str, Any]], splits: dict[str, list[Item]], seed: int, root: Path
) -> None:
    modalities = list(dict.fromkeys(json.dumps(head.get("modality", "unknown")) for head in heads))
    labels = dict.fromkeys(label for head in heads for label in head.get("label_names", ()))
    extra = {"label_names": list(labels)} if labels else {}
    write_datalist(
        datalist,
        name,
        json.loads(modalities[0]) if len(modalities) == 1 else "mixed",
        splits,
        made_by=MADE_BY,
        seed=seed,
        **extra,
    )
    write_rejected(datalist.with_name("rejected.csv"), {})
    for split, members in splits.items():
        anomalous = sum(item.get("anomaly", 0) for item in members)
        told = f", {anomalous} of them anomalous" if anomalous else ""
        print(f"{split}: {len(members)} images of {len({item['patient'] for item in members})} patients{told}")
    empty = [split for split, members in splits.items() if not members]
    if empty:
        print(f"note: no images for {' and '.join(empty)}", file=sys.stderr)
    print(f"datalist: {datalist}", flush=True)
    if root != Path(os.path.abspath(datalist.parent)):
        use = shlex.join(["--datalist", str(datalist), "--dataset_dir", str(root)])
        print(f"use it with: {use}", flush=True)


app = c.new_app(write_split, __doc__)

if __name__ == "__main__":
    sys.exit(c.main(app))
