"""Writes what a segmentation found in images: masks, outlines and boxes to crop to, and a table of them."""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import warnings
from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from monai.transforms import MapTransform
from monai.utils import TransformBackends, convert_to_numpy

from medgen.data.datalist import PATH_FIELDS, printable, write_datalist, write_rejected
from medgen.data.image_set import file_sha256
from medgen.data.synthetic_set import weights_sha256
from medgen.errors import UserError
from medgen.output import atomic_write_text
from medgen.transforms.outline import PREDICTED, draw_outlines
from medgen.transforms.save import SaveArray, SavePNG

# of the function that MONAI's RemoveSmallObjects calls, once an image
warnings.filterwarnings("ignore", message="Parameter `min_size` is deprecated")

__all__ = ["SaveRegiond", "bounding_box"]

COLUMNS = ("image", "top", "left", "bottom", "right", "area_fraction", "mean_uncertainty")
MOST_UNCERTAIN = 0.5  # the largest standard deviation of values in [0, 1]


def bounding_box(mask: np.ndarray, margin: float = 0.0) -> tuple[int, int, int, int] | None:
    """The rectangle around a mask.

    Args:
        mask: (H, W) bool.
        margin: added on each side, as a share of the rectangle's own height and width, rounded to whole pixels; what
            would leave the image is cut off.

    Returns:
        top, left, bottom, right in pixels, bottom and right exclusive; None for an empty mask.
    """
    edges = []
    for axis, side in enumerate(mask.shape):
        inside = np.flatnonzero(mask.any(axis=1 - axis))
        if not len(inside):
            return None
        first, last = int(inside[0]), int(inside[-1]) + 1
        more = round(margin * (last - first))
        edges.append((max(0, first - more), min(side, last + more)))
    (top, bottom), (left, right) = edges
    return top, left, bottom, right


class _Record(SaveArray):
    """Names records as the other files of a run are named."""

    suffix = ".json"


class SaveRegiond(MapTransform):
    """Write the mask of each image, its outline over the image, its uncertainty, and a record with its box.

    ``masks/NAME.png`` (0 and 255, the image's own size), ``overlays/NAME.png`` (outline and box), with an uncertainty
    ``uncertainty/NAME.png`` (255 is a standard deviation of 0.5, the largest there is), and ``records/NAME.json``,
    which is written last and says that the image is finished. An image in which the mask covers less than ``min_area``
    has no mask and no box. :meth:`finish` makes a table, a datalist and a list of refused images of the records.

    Args:
        output_dir: folder to write below.
        settings: plain values that the results depend on; records of other settings are not resumed.
        model_path: weights of the network; the file's SHA-256 becomes one of the settings.
        margin: of the box; see :func:`bounding_box`.
        min_area: least share of the image that the mask must cover, 0 to 1.
        data_root: folder that all images lie below; its sub-folders are repeated below ``output_dir``.
        inputs: paths of all images of the run.
        image_key: key of the image at its own size, a ``MetaTensor`` (C, H, W) in [0, 1].
        mask_key: key of the mask (1, H, W).
        uncertainty_key: key of the standard deviations (1, H, W); an item may lack it.
    """

    backend: ClassVar[list[TransformBackends]] = [TransformBackends.NUMPY]

    def __init__(
        self,
        output_dir: str | PathLike[str],
        settings: Mapping[str, Any],
        model_path: str | PathLike[str],
        margin: float = 0.05,
        min_area: float = 0.05,
        data_root: str | PathLike[str] = ".",
        inputs: Sequence[str | PathLike[str]] = (),
        image_key: str = "image",
        mask_key: str = "mask",
        uncertainty_key: str = "uncertainty",
    ) -> None:
        super().__init__(image_key)
        self.output_dir, self.data_root, self.model_path = Path(output_dir), str(data_root), model_path
        self.margin, self.min_area = margin, min_area
        self.mask_key, self.uncertainty_key = mask_key, uncertainty_key
        self._settings = {**settings, "margin": margin, "min_area": min_area}
        folders = ("masks", "overlays", "uncertainty")
        self.pictures = {name: SavePNG(self.output_dir / name, data_root, inputs=inputs) for name in folders}
        self.records = _Record(self.output_dir / "records", data_root, inputs=inputs)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All settings of the records.

        Raises:
            UserError: no weights.
        """
        return {**self._settings, "model_sha256": weights_sha256(self.model_path)}

    def _path(self, saver: SavePNG | SaveArray, file: str | PathLike[str]) -> Path:
        return saver.path(np.empty(0), {"filename_or_obj": str(file)})

    def _read(self, file: str | PathLike[str]) -> dict[str, Any] | None:
        """The record of an image; None where there is none that can be read."""
        try:
            record = json.loads(self._path(self.records, file).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) and {"settings", "image_sha256", "box"} <= set(record) else None

    def has_record(self, item: Mapping[Hashable, Any]) -> bool:
        """Whether a datalist's item has a record, of these settings or others."""
        return self._read(item[self.keys[0]]) is not None

    def is_finished(self, item: Mapping[Hashable, Any]) -> bool:
        """Whether the results of a datalist's item are there.

        Raises:
            UserError: they were made with other settings or from another image.
        """
        image = item[self.keys[0]]
        record = self._read(image)
        if record is None:
            return False
        before = {**record["settings"], "image_sha256": record["image_sha256"]}
        now = json.loads(json.dumps({**self.settings, "image_sha256": file_sha256(image)}))
        for name in [*now, *before]:
            if before.get(name) != now.get(name):
                raise UserError(
                    f"{self._path(self.records, image)} was made with {name} {before.get(name)}, this run has "
                    f"{now.get(name)}; resume with what it was made with, or choose another --output_dir"
                )
        wanted = ["overlays", *(["masks"] if record["box"] else [])]
        return all(self._path(self.pictures[name], image).is_file() for name in wanted)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the results of one item; returns a new dictionary with the same entries.

        Raises:
            UserError: the image has been changed since it was read, to another size.
        """
        d = dict(data)
        image, mask = d[self.keys[0]], convert_to_numpy(d[self.mask_key])[0] > 0
        file = image.meta["filename_or_obj"]
        if image.shape[1:] != mask.shape:
            raise UserError(f"{file} has {tuple(image.shape[1:])} pixels, its mask {mask.shape}: the file has changed")
        is_blank = float(image.max()) == float(image.min())  # a network draws something in any picture
        if is_blank:
            mask = np.zeros_like(mask)
        area = float(mask.mean())
        box = bounding_box(mask, self.margin) if area >= self.min_area else None
        why = "the image is one grey level" if is_blank else f"{area:.1%} of the image, min_area is {self.min_area:.1%}"
        reason = "" if box else f"no lung found: {why}"
        record = {"box": box, "area_fraction": area, "mean_uncertainty": None, "reason": reason}
        meta = {"filename_or_obj": file}
        if box:
            self.pictures["masks"].save(mask[None].astype(np.float32), meta)
        overlay = draw_outlines(convert_to_numpy(image), {PREDICTED: mask}, box)
        self.pictures["overlays"].save(overlay.transpose(2, 0, 1) / np.float32(255), meta)
        if self.uncertainty_key in d:
            deviation = convert_to_numpy(d[self.uncertainty_key])
            record["mean_uncertainty"] = float(deviation.mean(dtype=np.float64))
            self.pictures["uncertainty"].save(deviation / MOST_UNCERTAIN, meta)
        record |= {"settings": self.settings, "image_sha256": file_sha256(file)}
        atomic_write_text(self._path(self.records, file), json.dumps(record) + "\n")
        return d

    def finish(
        self,
        items: Sequence[Mapping[str, Any]],
        rejected: str | PathLike[str],
        split: str = "test",
    ) -> None:
        """Write ``boxes.csv``, ``datalist.json`` and the list of refused images, and print how many there are of each.

        Args:
            items: of the datalist, all of which have a record; paths below ``data_root``.
            rejected: CSV (``file``, ``reason``) of this run, which has the files that could not be read.
            split: name of the list in the datalist.
        """
        with open(rejected, newline="", encoding="utf-8") as table:
            refused = {row["file"]: row["reason"] for row in csv.DictReader(table)}
        rows: list[tuple[Any, ...]] = [COLUMNS]
        found = []
        for item in items:
            file = item[self.keys[0]]
            record, name = self._read(file), self._name(file)
            if record["box"]:
                numbers = (record["area_fraction"], record["mean_uncertainty"])
                rows.append((name, *record["box"], *("" if value is None else f"{value:.6f}" for value in numbers)))
                found.append({**item, "mask": str(self._path(self.pictures["masks"], file))})
            else:
                refused[name] = "; ".join(filter(None, (refused.get(name), record["reason"])))
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows(rows)
        atomic_write_text(self.output_dir / "boxes.csv", table.getvalue())
        write_rejected(rejected, refused)
        datalist = self._write_datalist(found, split)
        print(
            f"{len(items)} images: {len(found)} boxes in {self.output_dir / 'boxes.csv'}, no lung found in "
            f"{len(items) - len(found)} ({rejected}); {datalist}",
            flush=True,
        )

    def _name(self, image: str | PathLike[str]) -> str:
        """The image as the datalist names it."""
        return printable(Path(os.path.relpath(image, self.data_root)).as_posix())

    def _write_datalist(self, found: Sequence[Mapping[str, Any]], split: str) -> str:
        """Write the items with their masks; returns how to name the datalist to a bundle."""
        root = os.path.commonpath([os.path.abspath(folder) for folder in (self.output_dir, self.data_root)])
        items = [
            {
                **item,
                **{
                    key: Path(os.path.relpath(item[key], root)).as_posix()
                    for key in PATH_FIELDS
                    if item.get(key) is not None
                },
            }
            for item in found
        ]
        datalist = self.output_dir / "datalist.json"
        write_datalist(datalist, "segmented", "X-ray", {split if items else "test": items})
        return shlex.join(["--datalist", str(datalist), "--dataset_dir", root])
