"""Writes the classes that a classifier finds in images: a record each, and a table of them."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from monai.transforms import MapTransform
from monai.utils import TransformBackends, convert_to_numpy

from medgen.data.datalist import printable
from medgen.data.image_set import file_sha256
from medgen.data.synthetic_set import weights_sha256
from medgen.errors import UserError
from medgen.output import atomic_write_text
from medgen.transforms.save import SaveArray

__all__ = ["SaveProbabilitiesd", "write_predictions"]


def write_predictions(path: str | PathLike[str], rows: Iterable[Mapping[str, Any]], num_classes: int) -> None:
    """Write the table of a classifier: ``image, patient, label, p0, p1, ...``, and ``prediction`` where rows have it.

    Args:
        path: the CSV, written whole or not at all.
        rows: ``image``, ``patient``, ``label`` (index of the true class; None where it is not known),
            ``probabilities`` (K,), and perhaps ``prediction``, the name of the likeliest class.
        num_classes: K.
    """
    rows = list(rows)
    more = ["prediction"] if any("prediction" in row for row in rows) else []
    table = io.StringIO()
    lines = csv.writer(table, lineterminator="\n")
    lines.writerow(["image", "patient", "label", *(f"p{number}" for number in range(num_classes)), *more])
    for row in rows:
        label = "" if row["label"] is None else row["label"]
        numbers = (repr(float(value)) for value in row["probabilities"])  # all digits: equal are those alone that were
        lines.writerow([row["image"], row["patient"], label, *numbers, *(row[name] for name in more)])
    atomic_write_text(path, table.getvalue())


class _Record(SaveArray):
    """Names records as the other files of a run are named."""

    suffix = ".json"


class SaveProbabilitiesd(MapTransform):
    """Write the probabilities of each image as ``records/NAME.json``, which says that the image is finished.

    :meth:`finish` makes a table of the records.

    Args:
        output_dir: folder to write below.
        settings: plain values that the results depend on; records of other settings are not resumed.
        model_path: weights of the network; the file's SHA-256 becomes one of the settings.
        class_names: of the K classes, in their order.
        data_root: folder that all images lie below; its sub-folders are repeated below ``output_dir``.
        inputs: paths of all images of the run.
        image_key: key of the image, a ``MetaTensor`` that names its file.
        pred_key: key of the probabilities (K,).
    """

    backend: ClassVar[list[TransformBackends]] = [TransformBackends.NUMPY]

    def __init__(
        self,
        output_dir: str | PathLike[str],
        settings: Mapping[str, Any],
        model_path: str | PathLike[str],
        class_names: Sequence[str],
        data_root: str | PathLike[str] = ".",
        inputs: Sequence[str | PathLike[str]] = (),
        image_key: str = "image",
        pred_key: str = "pred",
    ) -> None:
        super().__init__(image_key)
        self.output_dir, self.data_root, self.model_path = Path(output_dir), str(data_root), model_path
        self.class_names, self.pred_key = [str(name) for name in class_names], pred_key
        self._settings = {**settings, "class_names": self.class_names}
        self.records = _Record(self.output_dir / "records", data_root, inputs=inputs)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All settings of the records.

        Raises:
            UserError: no weights.
        """
        return json.loads(json.dumps({**self._settings, "model_sha256": weights_sha256(self.model_path)}))

    def _path(self, file: str | PathLike[str]) -> Path:
        return self.records.path(np.empty(0), {"filename_or_obj": str(file)})

    def _read(self, file: str | PathLike[str]) -> dict[str, Any] | None:
        """The record of an image; None where there is none that can be read."""
        try:
            record = json.loads(self._path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        is_whole = isinstance(record, dict) and {"settings", "image_sha256", "probabilities"} <= set(record)
        return record if is_whole else None

    def has_record(self, item: Mapping[Hashable, Any]) -> bool:
        """Whether a datalist's item has a record, of these settings or others."""
        return self._read(item[self.keys[0]]) is not None

    def is_finished(self, item: Mapping[Hashable, Any]) -> bool:
        """Whether the probabilities of a datalist's item are there.

        Raises:
            UserError: they were made with other settings or from another image.
        """
        image = item[self.keys[0]]
        record = self._read(image)
        if record is None:
            return False
        before = {**record["settings"], "image_sha256": record["image_sha256"]}
        now = {**self.settings, "image_sha256": file_sha256(image)}
        for name in [*now, *before]:
            if before.get(name) != now.get(name):
                raise UserError(
                    f"{self._path(image)} was made with {name} {before.get(name)}, this run has {now.get(name)}; "
                    "resume with what it was made with, or choose another --output_dir"
                )
        return True

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the record of one item; returns a new dictionary with the same entries."""
        d = dict(data)
        file = d[self.keys[0]].meta["filename_or_obj"]
        record = {
            "probabilities": convert_to_numpy(d[self.pred_key]).astype(float).tolist(),
            "settings": self.settings,
            "image_sha256": file_sha256(file),
        }
        atomic_write_text(self._path(file), json.dumps(record) + "\n")
        return d

    def finish(self, items: Sequence[Mapping[str, Any]]) -> None:
        """Write ``predictions.csv`` and print how many images are of each class.

        Args:
            items: of the datalist, all of which have a record; paths below ``data_root``.
        """
        rows = []
        for item in items:
            file = item[self.keys[0]]
            probabilities = self._read(file)["probabilities"]
            rows.append(
                {
                    "image": printable(Path(os.path.relpath(file, self.data_root)).as_posix()),
                    "patient": item["patient"],
                    "label": self._index(item.get("label")),
                    "probabilities": probabilities,
                    "prediction": self.class_names[int(np.argmax(probabilities))],
                }
            )
        table = self.output_dir / "predictions.csv"
        write_predictions(table, rows, len(self.class_names))
        counts = Counter(row["prediction"] for row in rows)
        found = ", ".join(f"{name} {counts[name]}" for name in self.class_names)
        print(f"{len(rows)} images, by their likeliest class: {found}; {table}", flush=True)

    def _index(self, label: Any) -> int | None:
        """The class that a datalist's item names, by number or name; None where it names none of these."""
        if isinstance(label, str):
            return self.class_names.index(label) if label in self.class_names else None
        is_class = isinstance(label, int) and 0 <= label < len(self.class_names)
        return int(label) if is_class else None
