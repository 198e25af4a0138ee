"""Records of projections: what was found for an image, and proof that the image is finished."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends, convert_to_numpy

from medgen.data.datalist import printable, write_rejected
from medgen.data.image_set import file_sha256
from medgen.data.synthetic_set import weights_sha256
from medgen.errors import UserError
from medgen.output import atomic_file
from medgen.transforms.save import SaveArray, SavePNG

__all__ = ["ProjectionRecord", "SaveProjectiond", "SaveUnlessDiverged"]

logger = logging.getLogger(__name__)

RANKS = {"w": 2, "loss_curve": 1, "steps": 0, "distance": 0, "settings": 0, "source": 0}  # of a record's arrays
FOUND = ("w", "loss_curve", "steps", "distance")  # by the projector
KINDS = {"steps": "iu", "settings": "U", "source": "U"}  # of NumPy's types; the others are floating


class RecordName(SaveArray):
    """Names records as the other files of a run are named."""

    suffix = ".npz"


class ProjectionRecord:
    """Reading of one record.

    Args:
        path: the ``.npz`` that :class:`SaveProjectiond` wrote.

    Raises:
        UserError: it cannot be read, or is no record.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        arrays = self._arrays(*RANKS)
        self.w = arrays["w"]  # (L, W)
        self.loss_curve = arrays["loss_curve"]  # (steps,), NaN after an early stop
        self.steps = int(arrays["steps"])
        self.distance = float(arrays["distance"])
        self.settings: dict[str, Any] = json.loads(str(arrays["settings"]))
        self.source: dict[str, Any] = json.loads(str(arrays["source"]))  # the image: image_sha256, label

    @cached_property
    def noise(self) -> list[np.ndarray]:
        """Maps (H, W), read when asked for: nearly all of the file. Empty where they were not saved."""
        arrays = self._arrays()
        return [arrays[f"noise_{number}"] for number in range(len(arrays) - len(RANKS))]

    def _arrays(self, *names: str) -> dict[str, np.ndarray]:
        arrays = _read(self.path, *names)
        if arrays is None:
            raise UserError(f"{self.path} is no whole record of a projection; project again with --resume true")
        return arrays


def _read(path: Path, *names: str) -> dict[str, np.ndarray] | None:
    """Arrays of a record, all if none is named; None for a file that is no whole record."""
    try:
        with np.load(path, allow_pickle=False) as file:
            maps = {f"noise_{number}" for number in range(len(file.files) - len(RANKS))}
            if set(file.files) != {*RANKS, *maps}:
                return None
            arrays = {name: file[name] for name in names or file.files}
        for name, array in arrays.items():
            if array.ndim != RANKS.get(name, 2) or array.dtype.kind not in KINDS.get(name, "f"):
                return None
            if KINDS.get(name) == "U" and not isinstance(json.loads(str(array)), dict):
                return None
        return arrays
    # a broken or foreign file raises whatever its bytes lead to
    except Exception:
        return None


class SaveProjectiond(MapTransform):
    """Write what a projector found for an image as one ``.npz`` without pickles.

    Projectors are :class:`~medgen.inferers.StyleGAN2Projector` and :class:`~medgen.inferers.LatentOptimiser`.

    Arrays ``w`` (L, W), ``noise_0`` … (H, W) from the smallest map, ``loss_curve`` (steps,), ``steps``, ``distance``
    and two JSON texts: ``settings``, and ``source`` with the SHA-256 of the image's file and its label. Maps that were
    not optimised are the model's own and are left out. The file is written whole or not at all. Put this transform
    last: a record says that the image is finished, so everything else must be on the disk before it.

    Args:
        output_dir: folder to write below; made where missing.
        settings: plain values that a projection depends on, the size of the batch among them; records of other
            settings are not resumed.
        model_path: weights of the generator; the file's SHA-256 becomes one of the settings. None: ``settings`` say
            already whose the latents are.
        data_root: see :class:`~medgen.transforms.SavePNG`.
        inputs: see :class:`~medgen.transforms.SavePNG`.
        image_key: key of the image, whose file names the record.
        label_key: key of the class that the image is projected with; None: without.
        save_noise: False leaves the noise maps out, nearly all of the file's size: 2.8 MB at 512×512 pixels. The
            reconstruction cannot be made again from the record then.
        reconstruction_dir: folder of the reconstructions, without whose PNG no image is finished; None: the record
            alone says so.
    """

    backend: ClassVar[list[TransformBackends]] = [TransformBackends.NUMPY]

    def __init__(
        self,
        output_dir: str | PathLike[str],
        settings: Mapping[str, Any],
        model_path: str | PathLike[str] | None,
        data_root: str | PathLike[str] = "",
        inputs: Sequence[str | PathLike[str]] = (),
        image_key: str = "image",
        label_key: str | None = None,
        save_noise: bool = True,
        reconstruction_dir: str | PathLike[str] | None = None,
    ) -> None:
        super().__init__(image_key)
        self.names = RecordName(output_dir, data_root, inputs=inputs)
        self.pictures = None if reconstruction_dir is None else SavePNG(reconstruction_dir, data_root, inputs=inputs)
        self.model_path, self.label_key = model_path, label_key
        self.save_noise = save_noise and settings.get("optimise_noise", True)
        self._settings = dict(settings)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All settings of the records.

        Raises:
            UserError: no weights.
        """
        own = {"save_noise": self.save_noise}
        if self.model_path is not None:
            own["model_sha256"] = weights_sha256(self.model_path)
        return self._settings | own

    def origin(self) -> str:
        """The settings as the records hold them: what tells reconstructions of two projections apart."""
        return json.dumps(self.settings, sort_keys=True)

    def path_of(self, file: str | PathLike[str]) -> Path:
        """Where the record of an image file is."""
        return self.names.path(np.empty(0), {"filename_or_obj": str(file)})

    def source_of(self, file: str | PathLike[str], data: Mapping[Hashable, Any]) -> dict[str, Any]:
        """What a record says of its image, whose label ``data`` holds.

        Raises:
            UserError: the file cannot be read.
        """
        try:
            source: dict[str, Any] = {"image_sha256": file_sha256(file)}
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}); mend it, or take it out of the data") from error
        return source if self.label_key is None else source | {"label": int(data[self.label_key])}

    def has_record(self, item: Mapping[Hashable, Any]) -> bool:
        """Whether a datalist's item has a record, of these settings or others."""
        return self.path_of(item[self.keys[0]]).is_file()

    def is_finished(self, item: Mapping[Hashable, Any]) -> bool:
        """Whether the record of a datalist's item is there, and its reconstruction where a folder of them was given.

        Raises:
            UserError: it was made with other settings, from another image or with another label.
        """
        image = item[self.keys[0]]
        path = self.path_of(image)
        record = _read(path, *RANKS)
        if record is None:
            return False
        now = self.settings | self.source_of(image, item)
        before = json.loads(str(record["settings"])) | json.loads(str(record["source"]))
        for name in [*now, *before]:
            if before.get(name) != now.get(name):
                raise UserError(
                    f"{path} was made with {name} {before.get(name)}, this run has {now.get(name)}; resume "
                    f"with what it was made with, or choose another --output_dir"
                )
        if self.pictures is None:
            return True
        return self.pictures.path(np.empty(0), {"filename_or_obj": item[self.keys[0]]}).is_file()

    def projected(self, items: Sequence[Mapping[Hashable, Any]], required: bool = True) -> list[Mapping[Hashable, Any]]:
        """The items that have a record, in their order; a warning says how many have none.

        Args:
            items: of a datalist.
            required: False for a config that is looked through before anything is projected: without any record all
                items, and no word on those that have none.

        Raises:
            UserError: there are items, and none has.
        """
        found = list(filter(self.has_record, items))
        if not required:
            return found or list(items)
        if items and not found:
            raise UserError(
                f"none of {len(items)} images could be projected, rejected.csv says why; lower --initial_lr, or look "
                "whether these weights make images"
            )
        if len(found) < len(items):
            logger.warning(
                f"{len(items) - len(found)} of {len(items)} images could not be projected and have no "
                "reconstruction; rejected.csv says which"
            )
        return found

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the record of one item; returns a new dictionary with ``projection_path``.

        Args:
            data: the image, a ``MetaTensor``, and the entries of the projector's output for it.
        """
        d = dict(data)
        file = d[self.keys[0]].meta["filename_or_obj"]
        path = self.path_of(file)
        arrays = {name: convert_to_numpy(d[name]) for name in FOUND}
        source = json.dumps(self.source_of(file, d), sort_keys=True)
        if self.save_noise:
            arrays |= {f"noise_{number}": convert_to_numpy(noise)[0] for number, noise in enumerate(d["noise"])}
        with atomic_file(path) as record:
            np.savez(record, **arrays, settings=np.array(self.origin()), source=np.array(source))
        d["projection_path"] = str(path)
        return d


class SaveUnlessDiverged(Transform):
    """Write what was found for an image, or say in a CSV that its projection diverged and go on with the next.

    Args:
        transform: what writes an item.
        rejected: CSV (``file, reason``); rows that are there stay. None, for a shard, which others work beside: the
            log alone has it, until all shards' results are merged.
        data_root: folder that ``file`` is relative to; empty: paths as they are.
        image_key: key of the image.
    """

    def __init__(
        self,
        transform: Callable[[Mapping[Hashable, Any]], Any],
        rejected: str | PathLike[str] | None,
        data_root: str | PathLike[str] = "",
        image_key: str = "image",
    ) -> None:
        self.transform, self.rejected = transform, None if rejected is None else Path(rejected)
        self.data_root, self.image_key = str(data_root), image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> Any:
        """Write one item and return what ``transform`` does, or the item as it is.

        Args:
            data: the image, a ``MetaTensor``, and the entries of the projector's output for it.
        """
        if math.isfinite(data["distance"]):
            return self.transform(data)
        file = str(data[self.image_key].meta["filename_or_obj"])
        reason = "its projection ended in values that are not finite"
        if self.rejected is not None:
            self._reject(file, reason)
        logger.warning(f"{file}: {reason}; lower --initial_lr, or look whether these weights make images")
        return data

    def _reject(self, file: str, reason: str) -> None:
        name = os.path.relpath(file, self.data_root) if self.data_root else file
        name, rows = printable(name.replace(os.sep, "/")), {}
        if self.rejected.is_file():
            with open(self.rejected, newline="", encoding="utf-8") as table:
                rows = {row["file"]: row["reason"] for row in csv.DictReader(table)}
        if reason not in rows.get(name, ""):
            rows[name] = f"{rows[name]}; {reason}" if name in rows else reason
            write_rejected(self.rejected, rows)
