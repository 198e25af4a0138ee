"""Records of scored images, from which the tables of a run are made."""

from __future__ import annotations

import base64
import json
import logging
import os
import time
import zlib
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from monai.data import MetaTensor
from monai.metrics import CumulativeIterationMetric
from monai.transforms import Transform
from monai.utils import TransformBackends, convert_to_numpy, convert_to_tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from medgen.data.image_set import file_sha256
from medgen.data.shard import warn_of_missing
from medgen.errors import UserError
from medgen.output import atomic_write_text
from medgen.transforms.save import SaveArray

__all__ = ["SaveScoresd", "score_images"]

logger = logging.getLogger(__name__)

FILES = {"image": "image_sha256", "reconstruction": "reconstruction_sha256", "anomaly_mask": "mask_sha256"}
ENTRIES = {"settings", "patient", "scores", "metrics", "mask", *FILES.values()}
READERS = 8  # threads: a network disk answers several at once, and hashing lets others run
LOG_SECONDS = 10.0  # between lines where there is no terminal


class _ScoreName(SaveArray):
    """Names records as the other files of a run are named."""

    suffix = ".json"


class SaveScoresd(Transform):
    """Write the scores of an image as a JSON record, which says that the image is finished.

    The record holds the scores, the metrics, the patient that the file names, the mask of the known anomaly at the
    pixels that were scored, and what all of it depends on: the settings and the SHA-256 of the files. Tables of any
    number of images are made of records without scoring one of them again. Put this transform last: everything else
    must be on the disk before the record.

    Args:
        output_dir: folder to write below; made where missing.
        items: that are scored, from :func:`pair_reconstructions`.
        metrics: name -> metric between reconstruction and image, a value each.
        settings: plain values that scores, maps and pictures depend on.
        data_root: see :class:`~medgen.transforms.SavePNG`.
        inputs: paths of all images of the run; see :class:`~medgen.transforms.SavePNG`.
    """

    backend: ClassVar[list[TransformBackends]] = [TransformBackends.NUMPY]

    def __init__(
        self,
        output_dir: str | PathLike[str],
        items: Sequence[Mapping[str, Any]],
        metrics: Mapping[str, CumulativeIterationMetric],
        settings: Mapping[str, Any],
        data_root: str | PathLike[str] = "",
        inputs: Sequence[str | PathLike[str]] = (),
    ) -> None:
        self.names = _ScoreName(output_dir, data_root, inputs=inputs)
        self.items = {os.path.abspath(item["image"]): item for item in items}
        self.metrics, self.settings = dict(metrics), json.loads(json.dumps(dict(settings)))

    def path_of(self, image: str | PathLike[str]) -> Path:
        """Where the record of an image file is."""
        return self.names.path(np.empty(0), {"filename_or_obj": str(image)})

    def pending(self, resume: bool, shard: str | None = None) -> list[Mapping[str, Any]]:
        """The items without a record of these settings and files.

        Args:
            resume: False refuses to score where any item has a record.
            shard: of this run; without, a warning says how many of several are missing.

        Raises:
            UserError: there are records and ``resume`` is False.
        """
        items = list(self.items.values())
        with ThreadPoolExecutor(READERS) as pool:
            if not resume:
                there = sum(pool.map(lambda item: self.path_of(item["image"]).is_file(), items))
                if there:
                    raise UserError(
                        f"{there} of {len(items)} images are scored in the output folder already; keep the scores that "
                        "still hold and do the rest with --resume true, or choose another --output_dir"
                    )
                return items
            finished = list(pool.map(self.is_finished, items))
        todo = [item for item, done in zip(items, finished, strict=True) if not done]
        warn_of_missing(len(todo), len(items), shard)
        return todo

    def is_finished(self, item: Mapping[str, Any]) -> bool:
        """Whether an item has a record that was made with these settings of the files as they are."""
        record = self._record(item["image"])
        return (
            record is not None and record["settings"] == self.settings and self.digests(item).items() <= record.items()
        )

    def _record(self, image: str) -> dict[str, Any] | None:
        """The record of an image; None where there is none that is whole."""
        try:
            record = json.loads(self.path_of(image).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) and record.keys() >= ENTRIES else None

    @staticmethod
    def digests(item: Mapping[str, Any]) -> dict[str, str | None]:
        """SHA-256 of an item's files as they are now."""
        return {name: file_sha256(item[key]) if item.get(key) else None for key, name in FILES.items()}

    def __call__(self, data: Mapping[Hashable, Any], digests: Mapping[str, str | None] | None = None) -> str:
        """Write the record of one item.

        Args:
            data: ``image``, a ``MetaTensor``, and ``reconstruction``, (1, H, W) in [0, 1]; ``scores`` and
                ``anomaly_mask`` (1, H, W).
            digests: :meth:`digests` of the item, taken before its files were read: a file that is replaced meanwhile
                is then scored again. None takes them now.

        Returns:
            The image's path.
        """
        image, reconstruction = (
            convert_to_tensor(data[key], track_meta=False)[None] for key in ("image", "reconstruction")
        )
        meta = data["image"].meta
        source = str(meta["filename_or_obj"])
        found = {}
        for name, metric in self.metrics.items():
            found[name] = float(metric(reconstruction, image))
            metric.reset()  # it would keep the values of all images
        record = {
            "settings": self.settings,
            **(digests or self.digests(self.items[os.path.abspath(source)])),
            "patient": str(meta.get("patient") or ""),
            "scores": dict(data["scores"]),
            "metrics": found,
            "mask": _packed(convert_to_numpy(data["anomaly_mask"])[0] > 0),
        }
        atomic_write_text(self.path_of(source), json.dumps(record) + "\n")
        return source

    def read(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """What :class:`~medgen.handlers.ScoresCSV` takes of an item, from its record.

        Returns:
            ``image``, an empty ``MetaTensor`` that names the file and the patient, ``scores``, ``metrics`` and, where
            an anomaly is known, ``anomaly_mask`` (1, H, W).

        Raises:
            UserError: no record, or none that is whole.
        """
        record = self._record(item["image"])
        if record is None:
            raise UserError(
                f"{self.path_of(item['image'])} is no whole record of scores; score again with --resume true"
            )
        meta = {"filename_or_obj": item["image"], "patient": record["patient"]}
        entry = {
            "image": MetaTensor(torch.empty(0), meta=meta),
            "scores": record["scores"],
            "metrics": record["metrics"],
        }
        if record["mask"] is not None:
            entry["anomaly_mask"] = torch.from_numpy(_unpacked(record["mask"]))[None]
        return entry


def score_images(dataset: Dataset, records: SaveScoresd, num_workers: int = 0) -> None:
    """Score all images of a data set and write their records, with a bar or a line now and then.

    Args:
        dataset: whose items ``records`` takes, made of ``dataset.data``.
        records: writes them.
        num_workers: processes that score; 0 scores in this one.
    """
    # a generator of its own: scoring must not change what a seed gives
    loader = DataLoader(
        _Recorded(dataset, records), batch_size=None, num_workers=num_workers, generator=torch.Generator()
    )
    started = shown = time.monotonic()
    bar = tqdm(loader, desc="scoring", unit="img", dynamic_ncols=True, disable=None)
    for done, _ in enumerate(bar, 1):
        now = time.monotonic()
        if bar.disable and now - shown >= LOG_SECONDS:
            shown = now
            logger.info(f"{done:,}/{len(loader):,} images scored, {done / (now - started):.1f} img/s")
    seconds = max(time.monotonic() - started, 1e-9)
    logger.info(f"{len(loader):,} images scored in {seconds:.0f} s, {len(loader) / seconds:.1f} img/s")


class _Recorded(Dataset):
    """Map-style data set whose items are recorded by the process that makes them."""

    def __init__(self, dataset: Dataset, records: SaveScoresd) -> None:
        self.dataset, self.records = dataset, records

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> str:
        digests = self.records.digests(self.dataset.data[number])
        return self.records(self.dataset[number], digests)


def _packed(mask: np.ndarray) -> dict[str, Any] | None:
    """A mask (H, W) as a text, a bit a pixel; None for one that is empty."""
    if not mask.any():
        return None
    bits = base64.b64encode(zlib.compress(np.packbits(mask).tobytes())).decode()
    return {"shape": list(mask.shape), "bits": bits}


def _unpacked(packed: Mapping[str, Any]) -> np.ndarray:
    """(H, W) uint8 of what :func:`_packed` has written."""
    height, width = packed["shape"]
    bits = np.frombuffer(zlib.decompress(base64.b64decode(packed["bits"])), np.uint8)
    return np.unpackbits(bits, count=height * width).reshape(height, width)
