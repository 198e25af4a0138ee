"""Latents of a set of images, with what is known of each: what an inversion ends in and its applications begin with."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medgen.data.datalist import load_datalist, printable, validate_datalist
from medgen.errors import UserError
from medgen.output import atomic_file, atomic_write_text

__all__ = ["Embedding", "load_items"]

LATENTS, TABLE = "latents.safetensors", "latents.csv"
STAGES = ("encoder", "optimised")
ABOUT = "embedding"  # of the metadata
TOLD = ("space", "generator_sha256", "encoder_sha256", "stage", "images_sha256")
RANKS = {"latents": 3, "mean": 2, "std": 0}
FIELDS = ("patient", "label", "labels", "age", "sex", "view", "follow_up", "split")  # of a datalist's items
TEXTS = ("image", "patient", "sex", "view", "split")
SHOWN = 12  # digits of a hash in a message


@dataclass(frozen=True)
class Embedding:
    """Latents of images under one generator.

    Two files: ``latents.safetensors`` with the tensors ``latents``, ``mean`` and ``std``, and the rest as a JSON
    text in its metadata; ``latents.csv`` with a row for each image in the order of the latents: ``index``,
    ``image``, what the datalist says of it (``labels`` joined by "|", "[]" for none), and its figures.

    Args:
        latents: (N, L, D) float32.
        items: one for each image: ``image``, its path as in the datalist, what else the datalist says of it, and
            figures such as ``mse``.
        space: "z", "w" or "w+".
        generator_sha256: of the generator's weights.
        encoder_sha256: of the encoder's weights; empty for an optimisation without one.
        mean: (L, D), of the generator's random latents.
        std: root of the mean variance of a number of the latents.
        stage: "encoder", or "optimised" for what a search per image found.

    Raises:
        UserError: the parts do not fit.
    """

    latents: np.ndarray
    items: Sequence[Mapping[str, Any]]
    space: str
    generator_sha256: str
    encoder_sha256: str
    mean: np.ndarray
    std: float
    stage: str

    def __post_init__(self) -> None:
        latents = np.asarray(self.latents)
        if latents.ndim != 3 or latents.dtype != np.float32 or self.mean.shape != latents.shape[1:]:
            raise UserError(
                f"latents must be (N, L, D) in float32 and their mean (L, D), got {latents.shape} in {latents.dtype} "
                f"and {self.mean.shape}; make the embedding anew"
            )
        if len(self.items) != len(latents):
            raise UserError(f"expected an item for each of {len(latents)} latents, got {len(self.items)}; make it anew")
        if self.stage not in STAGES:
            raise UserError(f"stage must be {' or '.join(STAGES)}, got {self.stage!r}; make the embedding anew")

    def __len__(self) -> int:
        return len(self.latents)

    def of_images(self, names: Iterable[str]) -> Embedding:
        """Some of the images, in the order of their names.

        Args:
            names: paths as in the datalist.

        Raises:
            UserError: an image that is not there.
        """
        places = {posixpath.normpath(item["image"]): place for place, item in enumerate(self.items)}
        wanted = [posixpath.normpath(str(name)) for name in names]
        missing = [name for name in wanted if name not in places]
        if missing:
            raise UserError(
                f"{missing[0]} is not among the {len(self)} images of the embedding ({len(missing)} of {len(wanted)} "
                "are not); name images as in its latents.csv, or make an embedding of them"
            )
        chosen = [places[name] for name in wanted]
        return replace(self, latents=self.latents[chosen], items=[self.items[place] for place in chosen])

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write both files, each whole or not at all; a kill in between leaves no embedding.

        Args:
            folder: made where missing; an embedding that is there is replaced.

        Raises:
            UserError: a label with the sign "|".
        """
        from safetensors.numpy import save

        folder = Path(folder)
        table, names = _as_table(self.items)
        tensors = {"latents": self.latents, "mean": self.mean, "std": self.std}
        about = {
            "space": self.space, "generator_sha256": self.generator_sha256, "encoder_sha256": self.encoder_sha256,
            "stage": self.stage, "images_sha256": _digest(names),
        }  # fmt: skip
        metadata = {ABOUT: json.dumps(about)}  # one text: safetensors writes several in any order
        content = save({name: np.asarray(array, np.float32, order="C") for name, array in tensors.items()}, metadata)
        (folder / LATENTS).unlink(missing_ok=True)  # a table without latents says that something is missing
        atomic_write_text(folder / TABLE, table)
        with atomic_file(folder / LATENTS) as file:
            file.write(content)

    @classmethod
    def read(cls, path: str | os.PathLike[str], generator_sha256: str | None = None) -> Embedding:
        """Read what :meth:`write` wrote.

        Args:
            path: the folder, or its ``latents.safetensors``.
            generator_sha256: of the generator that the latents must belong to; None for any.

        Raises:
            UserError: a file is missing, they do not belong together, or they belong to another generator.
        """
        path = Path(path)
        latents_path = path if path.suffix == ".safetensors" else path / LATENTS
        table_path = latents_path.with_suffix(".csv")
        for file in (latents_path, table_path):
            if not file.is_file():
                raise UserError(
                    f"no embedding at {path}: {file.name} is missing; make one with inference.json or optimise.json, "
                    "and name its folder with --embedding"
                )
        arrays, metadata = _read_latents(latents_path)
        items = _read_table(table_path)
        names = [item["image"] for item in items]
        if len(items) != len(arrays["latents"]) or metadata["images_sha256"] != _digest(names):
            raise UserError(
                f"{table_path} and {latents_path.name} must list the same images in the same order, got {len(items)} "
                f"rows and {len(arrays['latents'])} latents that do not belong together; make the embedding anew"
            )
        its = metadata["generator_sha256"]
        if generator_sha256 is not None and its != generator_sha256:
            raise UserError(
                f"the latents in {path} belong to the generator {its[:SHOWN]}, got {generator_sha256[:SHOWN]}; name "
                "their own with --generator, or make an embedding with this one"
            )
        return cls(
            arrays["latents"], items, metadata["space"], its, metadata["encoder_sha256"], arrays["mean"],
            float(arrays["std"]), metadata["stage"],
        )  # fmt: skip


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def _as_table(items: Sequence[Mapping[str, Any]]) -> tuple[str, list[str]]:
    """CSV of items, and their images as it names them."""
    rows = []
    for index, item in enumerate(items):
        row = {"index": index, "image": printable(item["image"])}
        row |= {name: item[name] for name in FIELDS if item.get(name) is not None}
        if "labels" in row:
            labels = [str(label) for label in row["labels"]]
            broken = [label for label in labels if "|" in label]
            if broken:
                raise UserError(f"a label must not have the sign |, got {broken[0]!r}; rename it in the datalist")
            row["labels"] = "|".join(labels) or "[]"
        # figures: neither infinity (the PSNR of equal images) nor NaN is one
        figures = {name: value for name, value in item.items() if name != "image" and name not in FIELDS}
        rows.append(row | {name: value for name, value in figures.items() if math.isfinite(value)})
    given = {name for row in rows for name in row}
    known = [name for name in ("index", "image", *FIELDS) if name in given]
    columns = known + [name for name in dict.fromkeys(name for row in rows for name in row) if name not in known]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or ["index", "image"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue(), [row["image"] for row in rows]


def _read_table(path: Path) -> list[dict[str, Any]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # a spreadsheet puts a mark at the beginning
            rows = list(csv.DictReader(file))
        return [
            {name: _value(name, cell) for name, cell in row.items() if name != "index" and cell not in (None, "")}
            for row in rows
            if row["image"]
        ]
    except (OSError, UnicodeDecodeError, KeyError, csv.Error) as error:
        raise UserError(
            f"{path} must be a CSV with the column image, got {type(error).__name__}; make the embedding anew"
        ) from error


def _value(name: str, cell: str) -> Any:
    """A cell as the datalist had it: numbers as numbers."""
    if name in TEXTS:
        return cell
    if name == "labels":
        return [] if cell == "[]" else cell.split("|")
    for kind in (int,) if name == "label" else (int, float):  # a class may be called "inf"
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell


def _read_latents(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            metadata = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
            arrays = {name: file.get_tensor(name) for name in RANKS if name in file.keys()}
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} is no safetensors file ({type(error).__name__}); make the embedding anew") from error
    if (
        not isinstance(metadata, dict)
        or not all(isinstance(metadata.get(name), str) for name in TOLD)
        or set(arrays) != set(RANKS)
        or any(array.ndim != RANKS[name] or array.dtype != np.float32 for name, array in arrays.items())
        or not all(np.isfinite(array).all() for array in arrays.values())
    ):
        raise UserError(
            f"{path} must hold finite latents (N, L, D), mean (L, D) and std in float32 and name their generator, got "
            "something else; make the embedding anew"
        )
    return arrays, metadata


def load_items(
    datalist: str | os.PathLike[str], split: str, dataset_dir: str | os.PathLike[str] | None = None
) -> list[dict[str, Any]]:
    """Items of one split of a datalist, or of all, each with the name of its split.

    Args:
        datalist: JSON file.
        split: ``training``, ``validation``, ``test`` or another list in it; ``all`` for every item, unless a list has
            that name.
        dataset_dir: base of the relative paths; default: the datalist's folder.

    Returns:
        Copies of the items with full paths and ``split``.

    Raises:
        UserError: as :func:`medgen.data.load_datalist`.
    """
    splits = [split]
    if split == "all":
        content = validate_datalist(datalist)
        lists = {name: value for name, value in content.items() if isinstance(value, list) and value}
        filled = [name for name, items in lists.items() if isinstance(items[0], Mapping)]
        splits = filled if filled and "all" not in filled else ["all"]
    return [{**item, "split": name} for name in splits for item in load_datalist(datalist, name, dataset_dir)]
